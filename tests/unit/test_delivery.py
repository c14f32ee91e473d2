"""Proof of delivery: what counts as arrived, what as not, and when nothing can be said."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from rlsf_ray.records import FloatArray
from rlsf_ray.stream.delivery import Delivery, judge

TOKENS, NOISE = 240, 0.05


def swap(draw: np.random.Generator, *, move: float, share: float, tokens: int = TOKENS) -> Delivery:
    """The trainer moves by `move` nats rms, the engine by `share` of that; both read with their part of the noise.

    They always disagree about something, before and after.
    """
    start, step, always = draw.normal(-1.0, 1.0, tokens), draw.normal(0.0, move, tokens), draw.normal(0.0, 0.3, tokens)
    trained_old, trained_new = (start + part + draw.normal(0.0, NOISE / np.sqrt(2), tokens) for part in (0, step))
    engines = NOISE / np.sqrt(2)
    old, new = (start + always + part + draw.normal(0.0, engines, tokens) for part in (0, share * step))
    arrays = [array.astype(np.float32) for array in (old, new, trained_old, trained_new)]
    before, after, trained_before, trained_after = ([array[:100], array[100:]] for array in arrays)
    return judge(before, after, trained_before, trained_after, NOISE)


def verdicts(count: int, **how: Any) -> set[str]:
    draw = np.random.default_rng(0)
    return {swap(draw, **how).verdict for _ in range(count)}


def test_the_share_is_the_least_squares_one_worked_out_by_hand() -> None:
    """Moves (0.1, 0.3) of expected (0.2, 0.2): (0.02 + 0.06) / (0.04 + 0.04) = 1; rms of the expected one 0.2."""
    found = judge(
        [np.float32([-1.0, -2.0])], [np.float32([-0.9, -1.7])], [np.float32([-1, -2])], [np.float32([-0.8, -1.8])], 1e-4
    )
    assert (found.share, found.expected_move) == (pytest.approx(1.0), pytest.approx(0.2))
    assert found.gap == pytest.approx(0.1)  # -0.9 against -0.8, -1.7 against -1.8


def test_a_swap_that_arrives_is_proved_whatever_engine_and_trainer_always_disagree_about() -> None:
    assert verdicts(50, move=0.3, share=1.0) == {"proved"}


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0, -1.0], ids=["old kept", "half the scale", "twice", "turned round"])
def test_a_swap_that_does_not_arrive_fails_with_both_numbers(share: float) -> None:
    assert verdicts(50, move=0.3, share=share) == {"failed"}
    text = str(swap(np.random.default_rng(1), move=0.3, share=share))
    assert "moved by" in text
    assert re.search(r"of the trainer's move of 0\.[23]\d* nats", text)


@pytest.mark.parametrize("move", [0.0, 1e-6, 1e-3, 0.02], ids=["B is zero", "lr 5e-7", "warm-up", "small"])
def test_a_move_that_the_noise_hides_proves_nothing_and_raises_no_alarm(move: float) -> None:
    for share in (0.0, 1.0):
        assert verdicts(50, move=move, share=share) == {"unproven"}


@pytest.mark.parametrize("tokens", [60, 240, 640, 8000])
@pytest.mark.parametrize("move", [0.01, 0.03, 0.05, 0.07, 0.1, 0.15])
def test_a_swap_that_arrives_never_fails_however_small_the_move_and_long_the_traces(tokens: int, move: float) -> None:
    assert "failed" not in verdicts(50, move=move, share=1.0, tokens=tokens)


def test_noise_that_grows_with_the_move_of_a_token_raises_no_alarm() -> None:
    """As bfloat16 does it: the tokens that say most about the share are the least certain."""
    draw, found = np.random.default_rng(3), []
    for _ in range(400):
        step = draw.normal(0.0, 0.1, TOKENS)
        wide = NOISE * (0.3 + np.abs(step) / 0.1)
        old, new, trained_old, trained_new = (
            np.float32(part + draw.normal(0.0, 1.0, TOKENS) * wide / np.sqrt(2)) for part in (0, step, 0, step)
        )
        found.append(judge([old], [new], [trained_old], [trained_new], NOISE).verdict)
    assert "failed" not in found


def test_an_engine_that_goes_astray_fails_however_little_can_be_said_about_its_share() -> None:
    draw = np.random.default_rng(4)
    step = draw.normal(0.0, 0.02, TOKENS)
    still, moved = np.zeros(TOKENS, np.float32), np.float32(step)
    assert judge([still], [np.float32(draw.normal(0.0, 2.0, TOKENS))], [still], [moved], NOISE).verdict == "failed"


def test_log_probs_that_are_no_numbers_fail() -> None:
    one: list[FloatArray] = [np.float32([-1.0, -1.0])]
    bad: list[FloatArray] = [np.float32([-1.0, np.nan])]
    assert judge(one, bad, one, [np.float32([-2.0, -2.0])], NOISE).verdict == "failed"


def test_a_version_without_canaries_is_unproven() -> None:
    assert judge([], [], [], [], NOISE).verdict == "unproven"
