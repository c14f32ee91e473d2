"""Calibration: confidences with right or wrong -> how far one can be trusted for the other.

N answers. `confidence` [N] lies in [0, 1], `correct` [N] is 0 or 1. An answer that cannot be read counts as wrong
with confidence 0; the caller decides that. Bins hold their lower edge, [lo, hi); the last one holds 1.0 too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


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


def nll(confidence: ArrayLike, correct: ArrayLike, clip: float = 1e-6) -> float:
    """Mean negative log-likelihood of correctness in nats; confidence is kept `clip` away from 0 and 1."""
    c, y = _checked(confidence, correct)
    c = np.clip(c, clip, 1.0 - clip)
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


def bootstrap_interval(
    values_by_question: Sequence[ArrayLike],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(estimate, low, high): percentile bootstrap that draws whole questions, since their samples hang together.

    Of the mean over the samples [n] of all questions. Raises ValueError if there are no samples.
    """
    questions = [np.asarray(values, dtype=np.float64) for values in values_by_question]
    if sum(len(values) for values in questions) == 0:
        raise ValueError("an interval needs samples, got none; give at least one question with one sample")
    draws = np.random.default_rng(seed).integers(len(questions), size=(resamples, len(questions)))
    sums = np.array([values.sum() for values in questions])
    counts = np.array([len(values) for values in questions], dtype=np.float64)
    estimate = float(sums.sum() / counts.sum())
    with np.errstate(invalid="ignore"):  # a draw may hold empty questions only; nan is left out below
        estimates = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    tail = (1.0 - level) / 2.0
    low, high = np.nanquantile(estimates, [tail, 1.0 - tail])
    return estimate, float(low), float(high)


def paired_interval(
    before_by_question: Sequence[ArrayLike],
    after_by_question: Sequence[ArrayLike],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(estimate, low, high) of the mean over questions of (mean after - mean before); the questions are the same."""
    differences = [
        np.atleast_1d(np.mean(np.asarray(after, dtype=np.float64)) - np.mean(np.asarray(before, dtype=np.float64)))
        for before, after in zip(before_by_question, after_by_question, strict=True)
    ]
    return bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)


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
