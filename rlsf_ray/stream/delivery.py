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
            f" {1 - NEAR:.2f} to {1 + NEAR:.2f} (noise of the engine: {self.noise:.3g})"
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
    the trainer's, measured (benchmarks/results/log.md); a quarter of its square is the trainer's own, and is taken out
    of its move, which would look too large by it. Where the trainer moved less than this noise, or
    the share is too uncertain by it, the swap is "unproven".
    """
    if not before:  # nothing to read: no canaries came with the version
        return Delivery(verdict="unproven", share=0.0, expected_move=0.0, gap=0.0, noise=noise)
    new, trained_new = (np.concatenate(part).astype(np.float64) for part in (after, trained_after))
    moved, expected = new - np.concatenate(before), trained_new - np.concatenate(trained_before)
    seen = float(expected @ expected)
    square = max(0.0, seen - len(expected) * noise**2 / 2)
    move = math.sqrt(square / len(expected))
    spread = noise * math.sqrt(2 * seen) / square if square else math.inf  # of the share, by noise alone
    says_something = move >= noise and spread * SURE <= NEAR
    product = float(moved @ expected)
    share = product / square if square else 0.0 * product  # not a number stays one
    if not math.isfinite(share) or (says_something and abs(share - 1) > NEAR):
        verdict: Literal["proved", "unproven", "failed"] = "failed"
    else:
        verdict = "proved" if says_something else "unproven"
    gap = new - trained_new
    return Delivery(
        verdict=verdict, share=share, expected_move=move, gap=math.sqrt(float(gap @ gap) / len(gap)), noise=noise
    )
