"""Voting: the answers of several traces and their weights -> one answer and its share.

K traces. `labels` [K] number the distinct answers (-1: no answer). A trace without an answer casts no vote, yet its
weight counts in the whole: a share is "of all traces". Ties go to the smallest label, the answer seen first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SURE = 0.8  # a confidence that needs no further trace, unless told otherwise
Labels = Sequence[int] | NDArray[np.int_]
Weights = Sequence[float] | NDArray[np.float64]


def tally(labels: Labels, weights: Weights) -> dict[int, float]:
    """Summed weight of each answer, by label in rising order; an absent weight (nan) counts 0."""
    filled = np.nan_to_num(np.asarray(weights, dtype=np.float64), nan=0.0)
    classes = np.asarray(labels, dtype=np.int64)
    if len(classes) != len(filled):
        raise ValueError(f"labels and weights must have one length, got {len(classes)} and {len(filled)}")
    return {int(label): float(filled[classes == label].sum()) for label in np.unique(classes) if label >= 0}


def weighted(labels: Labels, weights: Weights) -> tuple[int, float]:
    """The heaviest answer and its share of the whole weight; (-1, 0.0) if no trace has an answer."""
    sums = tally(labels, weights)
    if not sums:
        return -1, 0.0
    winner = max(sums, key=lambda label: sums[label])
    whole = float(np.nansum(np.asarray(weights, dtype=np.float64)))
    return winner, sums[winner] / whole if whole > 0.0 else 0.0


def majority(labels: Labels) -> tuple[int, float]:
    """The most frequent answer and its share of all K traces."""
    return weighted(labels, [1.0] * len(labels))


def calibrated(labels: Labels, alone: Weights) -> tuple[int, float, float]:
    """(the winner of a vote weighed by `alone` [K], each trace's own calibrated confidence; how sure; how far ahead).

    How sure: the mean of what all K traces grant the winner, its own confidence where a trace gives that answer and 0
    where not. So agreement alone makes nothing surer: a trained model agrees with itself in what is wrong, too.
    (-1, 0.0, 0.0) if no trace has an answer.
    """
    winner, _ = weighted(labels, alone)
    if winner < 0:
        return -1, 0.0, 0.0
    sums = tally(labels, alone)
    ahead = sums[winner] - max((value for label, value in sums.items() if label != winner), default=0.0)
    return winner, sums[winner] / len(labels), ahead


def rounds(most: int) -> list[int]:
    """How many traces a question has by the end of each round: twice as many each time up to 16, then `most`."""
    return [size for size in (1, 2, 4, 8, 16) if size < most] + [most]


def settled(vote: tuple[float, float], traces: int, *, sure: float, most: int) -> bool:
    """Are no more traces wanted after `traces` of them, of which `calibrated` says how sure and how far ahead?

    The winner is `sure` enough, or no other can catch up: each further trace has a weight of at most 1. `most`: there
    may be.
    """
    share, ahead = vote
    return traces >= most or 0.0 < share >= sure or ahead > most - traces


def borda(labels: Labels, scores: Weights, p: float = 0.5) -> tuple[int, float]:
    """The trace of rank r by score (1: best) casts (K - r + 1)^p votes. Self-certainty 2502.18581; p=0 is majority.

    Absent scores (nan) rank last; equal scores keep the order of the traces.
    """
    filled = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf)
    votes = np.empty(len(filled), dtype=np.float64)
    votes[np.argsort(-filled, kind="stable")] = np.arange(len(filled), 0, -1, dtype=np.float64) ** p
    return weighted(labels, votes)
