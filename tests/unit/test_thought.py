"""Turns of thought, right answers in any form, advice at low entropy, two judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from group_data import group, trace
from tiny import tiny_config

from rlsf_ray.algorithms.answers import mentions
from rlsf_ray.algorithms.thought import transition_rate
from rlsf_ray.judging import between_judges, of_batch
from rlsf_ray.records import ScoredGroup
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.guard import low_entropy


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("It is 4. But wait, let me check: 2 + 2.", 3 / 7),  # but, wait, let me check; of it is but wait let me check
        ("Buttons awaiting instead-of maybes", 1 / 5),  # "instead", and not parts of words
        ("", 0.0),
        ("12 + 3 = 15", 0.0),
    ],
)
def test_turns_of_thought_are_counted_for_each_word(text: str, rate: float) -> None:
    assert transition_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("text", "gold", "answer_format", "found"),
    [
        ("It is 7, no: it is 8.", "7", "number", True),  # said, though it is not the answer
        ("It is 7.0 then", "7", "number", True),
        ("It is 17 or 70", "7", "number", False),
        ("B is wrong, so it is C", "B", "choice", True),
        ("A dog barks, so it is C", "A", "choice", False),
        ("so it is Paris", "Paris", "phrase", True),
    ],
)
def test_the_right_answer_may_stand_anywhere(text: str, gold: str, answer_format: str, found: bool) -> None:
    assert mentions(text, gold, answer_format) is found


def test_a_number_of_the_question_is_not_found_again() -> None:
    assert not mentions("3 + 0 is 30", "3", "number", "What is 3 + 0?")
    assert mentions("it is 7, no: 8", "7", "number", "What is 3 + 4?")


def test_low_entropy_is_advised_against_with_its_number() -> None:
    assert low_entropy(0.9) is None
    assert "0.31 nats" in str(low_entropy(0.31))


def test_rank_correlation_and_gap_of_two_judges_by_hand(tmp_path: Path, tiny: Path) -> None:
    """Ranks 1 2 3 4 against 1 2.5 2.5 4: covariance 4.5 / sqrt(5 * 4.5) = 0.9487; a constant judge says nothing."""
    both = tiny_config(tiny, judges=["live", "frozen"], signal="self_certainty", pairs={"rule": "best_worst"})
    store = RunStore.create_or_resume(str(tmp_path / "run"), both)
    one = group(*(trace(k, str(k), 0.5) for k in range(4)))

    def scored(name: str, first: tuple[float, ...], second: tuple[float, ...]) -> ScoredGroup:
        return ScoredGroup(
            group=replace(one, id=name),
            signal="x",
            scores=first,
            second_scores=second,
            labels=(0, 1, 2, 3),
            reason="tie",
        )

    groups = [
        scored("a", (1.0, 2.0, 3.0, 4.0), (0.0, 1.0, 1.0, 2.0)),
        scored("b", (1.0, 1.0, 1.0, 1.0), (0.0, 1.0, 2.0, 3.0)),
    ]
    store.write_table("traces", 0, 0, [row for g in groups for row in store.trace_rows(g)])
    assert of_batch(groups) == pytest.approx({k: v for k, v in between_judges(store)[0].items() if k != "round"})
    assert of_batch([replace(one, second_scores=None) for one in groups]) is None
    (found,) = between_judges(store)
    assert (found["round"], found["groups"]) == (0, 1)
    assert found["rank_correlation"] == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert found["gap"] == pytest.approx((1.5 - 0.5) / 2)  # means of the groups: 2.5 - 1.0 and 1.0 - 1.5
