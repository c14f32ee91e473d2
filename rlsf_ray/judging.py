"""How far two judges of the same traces agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from rlsf_ray.records import Json, ScoredGroup
from rlsf_ray.run_store import RunStore


def between_judges(store: RunStore) -> list[Json]:
    """[{"round", ...}] of the rounds that were scored twice, from the table of traces; see `compared`."""
    found = []
    for round in store.rounds("traces") if len(store.config.judges) > 1 else ():
        table = store.read_table("traces", round).select(["group_id", "score", "second_score"])
        rows = [r for r in table.to_pylist() if r["score"] is not None and r["second_score"] is not None]
        groups = [[(r["score"], r["second_score"]) for r in g] for _, g in groupby(rows, key=lambda r: r["group_id"])]
        if groups:
            found.append({"round": round} | compared([np.array(group) for group in groups]))
    return found


def of_batch(scored: Sequence[ScoredGroup]) -> Json | None:
    """`compared` of a batch that two judges have just scored; None with one judge."""
    both = [np.column_stack([one.scores, one.second_scores]) for one in scored if one.second_scores is not None]
    groups = [kept for group in both if len(kept := group[~np.isnan(group).any(axis=1)])]
    return compared(groups) if groups else None


def compared(groups: Sequence[np.ndarray]) -> Json:
    """{"groups", "rank_correlation", "gap"} of the scores [K, 2] of each group, by the first and the second judge.

    Spearman's correlation among the traces of a group, mean over the groups where both judges tell traces apart (None:
    there are none); the gap is the first score less the second, mean over traces.
    """
    each = [rho for group in groups if (rho := _spearman(group)) is not None]
    traces = np.concatenate(groups)
    gap = float((traces[:, 0] - traces[:, 1]).mean())
    return {"groups": len(each), "rank_correlation": float(np.mean(each)) if each else None, "gap": gap}


def _spearman(scores: np.ndarray) -> float | None:
    """Of [K, 2]; None where a column is constant. Equal scores share their mean rank."""
    if len(scores) < 2 or (np.ptp(scores, axis=0) == 0.0).any():
        return None
    return float(np.corrcoef(np.column_stack([_ranks(column) for column in scores.T]).T)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[which])
