"""Calibration: confidences with right or wrong -> how far one can be trusted for the other.

N answers. `confidence` [N] lies in [0, 1], `correct` [N] is 0 or 1. An answer that cannot be read counts as wrong
with confidence 0; the caller decides that. Bins hold their lower edge, [lo, hi); the last one holds 1.0 too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Counts = tuple[ArrayLike, ArrayLike]  # (part [Q], whole [Q]) of Q questions
Interval = tuple[float, float, float]  # (estimate, low, high)


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error over equal-width bins: sum of |accuracy - mean confidence| by share of the answers."""
    c, y = _checked(confidence, correct)
    which = _equal_width(c, bins)
    return float(sum(abs(y[which == b].sum() - c[which == b].sum()) for b in range(bins)) / len(c))


def ece_equal_mass(confidence: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error over bins of equal counts (within one). Equal confidences share their accuracy."""
    c, y = _checked(confidence, correct)
    y = _shared_in_ties(c, y)  # a cut through a tie must not depend on the order
    order = np.argsort(c, kind="stable")
    return float(sum(abs(y[part].sum() - c[part].sum()) for part in np.array_split(order, bins)) / len(c))


def brier(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean squared distance of confidence and correctness."""
    c, y = _checked(confidence, correct)
    return float(np.mean((c - y) ** 2))


def brier_skill(confidence: ArrayLike, correct: ArrayLike) -> float:
    """1 - Brier / (p (1 - p)), p the accuracy: above 0 the confidence says more than the accuracy alone.

    nan if all are right or all wrong.
    """
    c, y = _checked(confidence, correct)
    p = float(y.mean())
    return 1.0 - float(np.mean((c - y) ** 2)) / (p * (1.0 - p)) if 0.0 < p < 1.0 else float("nan")


def nll(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean negative log-likelihood of correctness in nats; confidence is kept 1e-6 away from 0 and 1."""
    c, y = _checked(confidence, correct)
    c = np.clip(c, 1e-6, 1.0 - 1e-6)
    return float(-np.mean(y * np.log(c) + (1.0 - y) * np.log(1.0 - c)))


def auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Chance that a right answer has more confidence than a wrong one, ties half; nan if all are right or all wrong."""
    c, y = _checked(confidence, correct)
    right = float(y.sum())
    wrong = len(y) - right
    if right == 0.0 or wrong == 0.0:
        return float("nan")
    _, inverse, counts = np.unique(c, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]  # equal confidences share their mean rank
    return float((ranks[y == 1.0].sum() - right * (right + 1.0) / 2.0) / (right * wrong))


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve: share of wrong answers among the k surest, mean over k; less is better.

    Answers of equal confidence count as if drawn in a random order.
    """
    c, y = _checked(confidence, correct)
    order = np.argsort(-c, kind="stable")
    wrong = 1.0 - _shared_in_ties(c, y)[order]
    return float(np.mean(np.cumsum(wrong) / np.arange(1, len(c) + 1)))


def fit_temperature(confidence: ArrayLike, correct: ArrayLike) -> float:
    """The temperature that makes `scale`d confidences likeliest (1706.04599). A baseline: it needs labels."""
    c, y = _checked(confidence, correct)
    grid = np.geomspace(0.1, 100.0, 301)
    return float(min(grid, key=lambda temperature: nll(scale(c, temperature), y)))


def scale(confidence: ArrayLike, temperature: float) -> Floats:
    """Confidences whose logits are divided by `temperature`; 0 and 1 stay."""
    c = np.asarray(confidence, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(1.0 / (1.0 + np.exp(-(np.log(c) - np.log1p(-c)) / temperature)), dtype=np.float64)


def reliability(
    confidence: ArrayLike, correct: ArrayLike, bins: int = 10
) -> list[tuple[float | None, float | None, int]]:
    """(mean confidence, accuracy, count) of each equal-width bin; (None, None, 0) for an empty one."""
    c, y = _checked(confidence, correct)
    which = _equal_width(c, bins)
    rows: list[tuple[float | None, float | None, int]] = []
    for b in range(bins):
        inside = which == b
        count = int(inside.sum())
        rows.append((float(c[inside].mean()), float(y[inside].mean()), count) if count else (None, None, 0))
    return rows


def overconfidence(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Mean confidence minus accuracy: above 0 the model is too sure."""
    c, y = _checked(confidence, correct)
    return float(c.mean() - y.mean())


def ratio_interval(part: ArrayLike, whole: ArrayLike, *, resamples: int = 2000) -> Interval:
    """(estimate, low, high) at 95 % of the sum of `part` [Q] over that of `whole` [Q], by bootstrap over questions.

    All three are nan where the whole is nothing.
    """
    return _percentiles(_ratios([(part, whole)], resamples)[0])


def share_interval(part: ArrayLike, whole: ArrayLike, *, resamples: int = 2000) -> Interval:
    """`ratio_interval` of counts: `part` [Q] of `whole` [Q] samples.

    Of none or all of them a bootstrap sees no spread. Then it is Wilson's interval, in which a question counts once
    however many samples it has, since they hang together.
    """
    share, low, high = ratio_interval(part, whole, resamples=resamples)
    if share not in (0.0, 1.0):
        return share, low, high
    z2 = NormalDist().inv_cdf(0.975) ** 2
    away = z2 / (float(np.count_nonzero(whole)) + z2)
    return (0.0, 0.0, away) if share == 0.0 else (1.0, 1.0 - away, 1.0)


def ratio_rise(before: Counts, after: Counts) -> Interval:
    """(estimate, low, high) at 95 % of the rise from one ratio to another, both of the same Q questions.

    Paired: each draw takes the same questions for both. nan where either is of nothing.
    """
    old, new = _ratios([before, after], 2000)
    return _percentiles(new - old)


def share_rise(before: Counts, after: Counts) -> Interval:
    """`ratio_rise` of two shares. Where one of them is 0 or 1, from the interval of each by square and add.

    Newcombe 1998 (Statistics in Medicine 17: 873), method 10: what has no spread cannot vary with the other, so that
    pairing gains nothing.
    """
    (old, old_low, old_high), (new, new_low, new_high) = share_interval(*before), share_interval(*after)
    if not {old, new} & {0.0, 1.0}:
        return ratio_rise(before, after)
    rise = new - old
    return rise, rise - math.hypot(new - new_low, old_high - old), rise + math.hypot(new_high - new, old - old_low)


def _ratios(counts: Sequence[Counts], resamples: int) -> Floats:
    """[len(counts), 1 + resamples]: the ratio of each (part [Q], whole [Q]), and of questions drawn alike for all."""
    pairs = np.asarray(counts, dtype=np.float64)  # [n, 2, Q]
    draws = np.random.default_rng(0).integers(pairs.shape[-1], size=(resamples, pairs.shape[-1]))
    sums = np.concatenate([pairs.sum(axis=-1)[..., None], pairs[..., draws].sum(axis=-1)], axis=-1)
    with np.errstate(invalid="ignore"):  # a draw may hold empty questions only; nan is left out later
        return np.asarray(sums[:, 0] / sums[:, 1], dtype=np.float64)


def _percentiles(drawn: Floats) -> Interval:
    """(estimate, low, high) at 95 % of the estimate and its resamples [1 + resamples]."""
    known = drawn[1:][~np.isnan(drawn[1:])]
    if np.isnan(drawn[0]) or not len(known):
        return float("nan"), float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(drawn[0]), float(low), float(high)


def _shared_in_ties(c: Floats, y: Floats) -> Floats:
    """The accuracy of all answers of equal confidence, for each answer."""
    _, inverse, counts = np.unique(c, return_inverse=True, return_counts=True)
    return np.asarray((np.bincount(inverse, weights=y) / counts)[inverse], dtype=np.float64)


def _equal_width(confidence: Floats, bins: int) -> NDArray[np.int64]:
    """Bin of each confidence. Edges are b / bins, so that 0.3 opens the fourth of ten bins despite rounding."""
    return np.searchsorted(np.arange(1, bins) / bins, confidence, side="right").astype(np.int64)


def _checked(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    c, y = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if c.shape != y.shape or c.ndim != 1 or len(c) == 0:
        raise ValueError(f"confidence and correct must be two lists of one length, not empty; got {c.shape}, {y.shape}")
    if not ((c >= 0.0) & (c <= 1.0)).all():
        raise ValueError(f"confidence must lie in [0, 1], got {c.min()} to {c.max()}; count an unread answer as 0")
    if not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("correct must be 0 or 1 for each answer")
    return c, y
