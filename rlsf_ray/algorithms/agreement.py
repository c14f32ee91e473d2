"""Amortised agreement: how often other traces would give this answer, told from one trace alone.

The share of a prompt's other traces with the same answer is a far better calibrated confidence than the answer's own
probability, but costs K traces. A small logistic map, fitted to that share on unlabelled prompts, tells it from
statistics of a single trace. A trained version counts as others the traces of the version before as well: see
`over_two_versions`. No gold answer is used anywhere. This project's own; the share itself is known from
self-consistency (2203.11171).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEATURES = ("answer_prob", "disparity", "length", "answer_prob x disparity")
CLIP = 1e-4  # a probability is kept this far from 0 and 1 before its logit is taken
RIDGE = 1.0  # penalty on the squared weights of standardised features, in traces
STEPS = 50


def features(logprob: NDArray[np.float32], top1: NDArray[np.float32], top2: NDArray[np.float32], span: slice) -> Floats:
    """Features [F] of one trace of T tokens (log-prob of each token, the two largest probabilities) and its answer.

    Logits of the answer's probability and disparity, log of T, and the product of the two logits.
    """
    prob = _logit(float(np.exp(logprob[span].astype(np.float64).sum())))
    gap = _logit(float((top1 - top2)[span].astype(np.float64).mean()))
    return np.array([prob, gap, np.log(len(logprob)), prob * gap])


def leave_one_out(labels: Sequence[int]) -> Floats:
    """Share of the K - 1 OTHER traces with the same answer class, for each trace [K]; 0 without an answer (-1)."""
    classes = np.asarray(labels, dtype=np.int64)
    same = (classes[:, None] == classes[None, :]).sum(axis=1) - 1
    return np.where(classes >= 0, same / max(1, len(classes) - 1), 0.0)


def over_two_versions(labels: Sequence[int], own: int) -> Floats:
    """Agreement [K] of a version's K = `own` traces, which come first in `labels`, with those and the version before.

    Half of it is `leave_one_out`, half the share of the earlier version's K traces with that answer; without any, it
    is `leave_one_out`. A version agrees with itself on whatever its last training has sharpened, right or wrong; the
    version before has not seen that. That disagreement of two models tells their error is known (2106.13799). The
    earlier version's k-th trace is left out for the k-th: the two were drawn with one seed.
    Raises ValueError if the earlier version has another number of traces.
    """
    ours, earlier = np.asarray(labels[:own], dtype=np.int64), np.asarray(labels[own:], dtype=np.int64)
    alone = leave_one_out(labels[:own])
    if not len(earlier):
        return alone
    if len(earlier) != own:
        raise ValueError(f"got {own} traces of a version and {len(earlier)} of the one before, expected as many")
    same = (ours[:, None] == earlier[None, :]) & ~np.eye(own, dtype=bool)
    return (alone + np.where(ours >= 0, same.sum(axis=1) / max(1, own - 1), 0.0)) / 2


@dataclass(frozen=True, slots=True)
class AgreementMap:
    """A logistic map of standardised features. `weights` [F + 1], the last one is the intercept."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    num_traces: int

    def __call__(self, rows: Floats) -> Floats:
        """Expected agreement [N], in (0, 1), of traces with these features [N, F]."""
        design = (np.asarray(rows, dtype=np.float64) - self.mean) / self.scale
        return _sigmoid(design @ np.array(self.weights[:-1]) + self.weights[-1])

    def of_one(self, row: Sequence[float]) -> float:
        """Expected agreement of the trace with these features [F]."""
        return float(self(np.array([row]))[0])

    def to_json(self) -> dict[str, Any]:
        """What calibration.json holds."""
        return {
            "features": list(FEATURES),
            "mean": list(self.mean),
            "scale": list(self.scale),
            "weights": list(self.weights),
            "num_traces": self.num_traces,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> AgreementMap:
        """Raises ValueError for a map over other features: another version of this package wrote it."""
        if tuple(found["features"]) != FEATURES:
            raise ValueError(f"a map over {found['features']}, expected {list(FEATURES)}; measure the version again")
        return cls(tuple(found["mean"]), tuple(found["scale"]), tuple(found["weights"]), found["num_traces"])


def fit(rows: Floats, agreement: Floats) -> AgreementMap:
    """Ridge logistic regression of the agreement [N] on features [N, F] by Newton's method; a share is a soft label.

    Raises ValueError without rows, or with an agreement outside [0, 1].
    """
    rows, target = np.asarray(rows, dtype=np.float64), np.asarray(agreement, dtype=np.float64)
    if len(rows) == 0 or len(rows) != len(target) or not ((target >= 0.0) & (target <= 1.0)).all():
        raise ValueError(f"a map needs features and shares in [0, 1] of one length, got {len(rows)} and {len(target)}")
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    design = np.column_stack([(rows - mean) / scale, np.ones(len(rows))])
    penalty = np.diag([RIDGE] * rows.shape[1] + [1e-3])  # the intercept is free, but for agreements that are all 0 or 1
    weights = np.zeros(design.shape[1])
    for _ in range(STEPS):
        share = _sigmoid(design @ weights)
        slope = design.T @ (target - share) - penalty @ weights
        curvature = (design * (share * (1.0 - share))[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature, slope)
        weights = weights + step / max(1.0, float(np.abs(step).max()))  # far steps would overshoot a flat likelihood
        if np.abs(step).max() < 1e-8:
            break
    return AgreementMap(tuple(mean.tolist()), tuple(scale.tolist()), tuple(weights.tolist()), len(rows))


def _logit(p: float) -> float:
    p = min(max(p, CLIP), 1.0 - CLIP)
    return float(np.log(p / (1.0 - p)))


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -50.0, 50.0))))
