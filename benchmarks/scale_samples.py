"""Processor time and memory of the processes below this one, by what they are in a run."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from rlsf_ray.records import Json

ROLES = {
    "Coordinator": "coordinator",
    "PairBuffer": "pair_buffer",
    "WeightStore": "weight_store",
    "Generator": "generator",
    "ScorerWorker": "scorer",
    "RayTrainWorker": "trainer",
}
REST = "ray and others"  # raylet, control service, workers without a role of ours


class Use(NamedTuple):
    """One process: what it is, seconds it has computed, its resident bytes."""

    role: str
    cpu_s: float
    resident: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Every process below this one at `time` (unix seconds)."""

    time: float
    uses: dict[int, Use]

    @classmethod
    def now(cls) -> Sample:
        """Look at them."""
        uses = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # ended meanwhile
                cpu = process.cpu_times()
                uses[process.pid] = Use(role_of(process.cmdline()), cpu.user + cpu.system, process.memory_info().rss)
        return cls(time.time(), uses)


def role_of(command: Sequence[str]) -> str:
    """By the title that Ray gives a process: `ray::Generator.write` or, while it waits, `ray::Generator`."""
    found = re.match(r"ray::(\w+)", command[0] if command else "")
    return ROLES.get(found.group(1), REST) if found else REST


def busy(samples: Sequence[Sample], start: float, end: float) -> Json:
    """Between the samples nearest to `start` and `end`: {role: {"processes", "cores", "busiest"}}.

    `cores`: seconds computed a second by all of its processes, `busiest`: by the one that computed most. A
    Python process that is at 1 can hardly do more. Raises ValueError where too few samples lie there.
    """
    first, last = (min(samples, key=lambda sample: abs(sample.time - when)) for when in (start, end))
    if first.time >= last.time:
        raise ValueError(f"no two samples between {start:.1f} and {end:.1f}; expected a longer run: raise --batches")
    shares: dict[str, list[float]] = {}
    for process, use in last.uses.items():
        before = first.uses[process].cpu_s if process in first.uses else 0.0
        shares.setdefault(use.role, []).append((use.cpu_s - before) / (last.time - first.time))
    return {
        role: {"processes": len(found), "cores": sum(found), "busiest": max(found)}
        for role, found in sorted(shares.items())
    }


def memory(samples: Sequence[Sample]) -> Json:
    """{role: resident MB of its largest process at its largest}."""
    largest: dict[str, int] = {}
    for use in (use for sample in samples for use in sample.uses.values()):
        largest[use.role] = max(largest.get(use.role, 0), use.resident)
    return {role: round(size / 1e6) for role, size in sorted(largest.items())}
