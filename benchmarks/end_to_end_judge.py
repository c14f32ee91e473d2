"""The judge of bench_end_to_end.py: of two traces the longer is better, and the first of two equal ones.

It knows nothing of right and wrong; it costs nothing, and each prompt gives a pair, as with TRL's OnlineDPO.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from rlsf_ray.algorithms.preferences import Candidates, Decision, Limits
from rlsf_ray.algorithms.signals import Scores, Signal, TraceStats


def num_tokens(ids: Sequence[int], ends: Collection[int]) -> int:
    """Tokens up to the first of `ends`, with it; what follows is padding."""
    return next((number for number, token in enumerate(ids, 1) if token in ends), len(ids))


def _longer(traces: Sequence[TraceStats]) -> Scores:
    """Each trace's length in tokens, with the one that ended it."""
    return np.array([len(trace.logprob) for trace in traces], dtype=np.float64)


longer = Signal(_longer, needs=frozenset({"text"}))


def outer_pairs(candidates: Candidates, limits: Limits, rng: np.random.Generator) -> Decision:
    """The best over the worst, the second best over the second worst and so on, up to `max_pairs`.

    Of two traces that is one pair, ties and traces that were cut off included.
    """
    order = np.argsort(-candidates.scores, kind="stable").tolist()
    most = min(len(order) // 2, limits.max_pairs or len(order))
    pairs = zip(order[:most], order[::-1][:most], strict=True)
    return Decision(tuple((i, j, 1.0, candidates.gap(i, j)) for i, j in pairs))
