"""A user's own signal, as `own_parts:token_count` in a config."""

from __future__ import annotations

from collections.abc import Sequence

from rlsf_ray.algorithms.signals import TraceStats


def token_count(traces: Sequence[TraceStats]) -> list[float]:
    return [float(len(trace.logprob)) for trace in traces]
