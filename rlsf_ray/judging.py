"""How far two judges of the same traces agree, from the table of traces."""

from __future__ import annotations

from itertools import groupby

import numpy as np

from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore


def between_judges(store: RunStore) -> list[Json]:
    """[{"round", "groups", "rank_correlation", "gap"}] of the rounds that were scored twice.

    Spearman's correlation among the traces of a group, mean over groups where both judges tell traces apart (None:
    there are none); the gap is the first score less the second, mean over traces.
    """
    found = []
    for round in store.rounds("traces"):
        table = store.read_table("traces", round).select(["group_id", "score", "second_score"])
        rows = [r for r in table.to_pylist() if r["score"] is not None and r["second_score"] is not None]
        if not rows:
            continue
        groups = [[(r["score"], r["second_score"]) for r in g] for _, g in groupby(rows, key=lambda r: r["group_id"])]
        each = [rho for group in groups if (rho := _spearman(np.array(group))) is not None]
        gap = float(np.mean([r["score"] - r["second_score"] for r in rows]))
        mean = float(np.mean(each)) if each else None
        found.append({"round": round, "groups": len(each), "rank_correlation": mean, "gap": gap})
    return found


def _spearman(scores: np.ndarray) -> float | None:
    """Of [K, 2]; None where a column is constant. Equal scores share their mean rank."""
    if len(scores) < 2 or (np.ptp(scores, axis=0) == 0.0).any():
        return None
    return float(np.corrcoef(np.column_stack([_ranks(column) for column in scores.T]).T)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[which])
