"""A user's own signals and rollouts, as `own_parts:token_count` in a config."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rlsf_ray.algorithms.signals import Signal, TraceStats
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Sampling
from rlsf_ray.rollouts.programs import sample


def token_count(traces: Sequence[TraceStats]) -> list[float]:
    return [float(len(trace.logprob)) for trace in traces]


def endless(traces: Sequence[TraceStats]) -> list[float]:
    return [math.inf for _ in traces]


def _calm(traces: Sequence[TraceStats]) -> list[float]:
    return [-float(t.distribution.entropy.max()) if t.finished and t.distribution else math.nan for t in traces]


calm = Signal(_calm, needs=frozenset({"distribution"}))


def slow(config: RunConfig) -> Sampling:
    """A rollout whose batches take two seconds."""
    time.sleep(2.0)
    return sample(config)
