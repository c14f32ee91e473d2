"""Did a swap reach the engine? Its log-probs on canary tokens must have moved as the trainer's did.

Letters in shapes: C canary tokens, of all canaries one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlsf_ray.records import FloatArray

NEAR = 1 / 3  # how far from 1 the share of the trainer's move may be
SURE = 4.0  # NEAR must be as many standard deviations of what noise does to that share, or nothing is proved
FAR = 4.0  # times the noise, beyond twice the trainer's move: so far only other weights move an engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One swap of one generator. Moves are root mean squares in nats a token."""

    verdict: Literal["proved", "unproven", "failed"]
    share: float  # of the trainer's move that the engine made: 1 if it holds the new version, 0 if the old one
    expected_move: float
    gap: float  # of the engine's log-probs to the trainer's, after the swap
    noise: float

    def __str__(self) -> str:
        return (
            f"moved by {self.share:.2f} of the trainer's move of {self.expected_move:.3g} nats a token, expected"
            f" {1 - NEAR:.2f} to {1 + NEAR:.2f}; now {self.gap:.3g} from the trainer's log-probs (noise of the engine:"
            f" {self.noise:.3g})"
        )


def judge(
    before: Sequence[FloatArray],
    after: Sequence[FloatArray],
    trained_before: Sequence[FloatArray],
    trained_after: Sequence[FloatArray],
    noise: float,
) -> Delivery:
    """Compare the engine's log-probs [C] under the old and the new version with the trainer's.

    The share is the least-squares one: <engine's move, trainer's move> over the trainer's move squared. What engine and
    trainer always disagree about cancels in the moves. `noise`: standard deviation of one log-prob of the engine around
    the trainer's, measured (benchmarks/results/log.md); half of its square is the trainer's own, and is taken out of
    its move, which would look too large by it. Where the trainer moved less than this noise, or the share is too
    uncertain, the swap is "unproven". Tokens that move most are the noisiest: how far each was off before counts, too.
    """
    if not before:  # nothing to read: no canaries came with the version
        return Delivery(verdict="unproven", share=0.0, expected_move=0.0, gap=0.0, noise=noise)
    old, new, trained_old, trained_new = (
        np.concatenate(part).astype(np.float64) for part in (before, after, trained_before, trained_after)
    )
    moved, expected = new - old, trained_new - trained_old
    seen = float(expected @ expected)
    square = max(0.0, seen - len(expected) * noise**2)
    move = math.sqrt(square / len(expected))
    product = float(moved @ expected)
    share = product / square if square else 0.0 * product  # not a number stays one
    apart = np.clip(np.nan_to_num(old - trained_old), -FAR * noise, FAR * noise) * expected
    spread = math.sqrt(2 * max(noise**2 * seen, float(apart @ apart))) / square if square else math.inf
    says_something = move >= noise and spread * SURE <= NEAR
    astray = not math.isfinite(share) or _rms(moved) > 2 * move + FAR * noise
    if astray or (says_something and abs(share - 1) > NEAR):
        verdict: Literal["proved", "unproven", "failed"] = "failed"
    else:
        verdict = "proved" if says_something else "unproven"
    gap = _rms(new - trained_new)
    return Delivery(verdict=verdict, share=share, expected_move=move, gap=gap, noise=noise)


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(values @ values) / len(values))
