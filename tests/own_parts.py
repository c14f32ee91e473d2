"""A user's own signals and rollouts, as `own_parts:token_count` in a config."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rlsf_ray.algorithms.signals import Signal, TraceStats
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Sampling
from rlsf_ray.records import Prompt
from rlsf_ray.rollouts.desk import Desk, Talk
from rlsf_ray.rollouts.programs import sample


def token_count(traces: Sequence[TraceStats]) -> list[float]:
    return [float(len(trace.logprob)) for trace in traces]


def patient(traces: Sequence[TraceStats]) -> list[float]:
    """Takes two seconds for each group."""
    time.sleep(2.0)
    return token_count(traces)


def endless(traces: Sequence[TraceStats]) -> list[float]:
    return [math.inf for _ in traces]


def _calm(traces: Sequence[TraceStats]) -> list[float]:
    return [-float(t.distribution.entropy.max()) if t.finished and t.distribution else math.nan for t in traces]


calm = Signal(_calm, needs=frozenset({"distribution"}))


def warmer(config: RunConfig) -> Sampling:
    """A rollout that draws at a temperature of its own."""
    return Sampling(max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature + 0.5)


def slow(config: RunConfig) -> Sampling:
    """A rollout whose batches take two seconds."""
    time.sleep(2.0)
    return sample(config)


async def spoilt(desk: Desk, prompt: Prompt) -> list[Talk]:
    """Kills its process at one prompt, and hangs at another as long as the file named there is missing."""
    words = prompt.messages[-1][1].split()
    if "poison" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in words and not (marker := Path(words[words.index("hang") + 1])).exists():
        marker.touch()
        time.sleep(3600)
    talks = [desk.begin(prompt, index) for index in range(desk.config.rollout.traces)]
    await asyncio.gather(*(talk.write("attempt") for talk in talks))
    return talks
