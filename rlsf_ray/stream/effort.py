"""What a run's actors have worked in this life: idle shares, and device-seconds for each example."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from rlsf_ray.records import Json

PAID = ("generator", "scorer", "trainer")  # whose work makes examples and learns from them; measuring is apart


class Effort:
    """Adds up stage events as they come, in any order; work of one actor that overlaps counts once."""

    def __init__(self, devices: Mapping[str, float], clock: Callable[[], float] = time.time) -> None:
        """`devices`: of one actor of each role, in GPUs; 1 where a run has no GPU, so that processes count."""
        self._devices, self._clock = devices, clock
        self._began = clock()
        self._busy: dict[tuple[str, str], float] = {}  # (role, actor) -> seconds
        self._until: dict[str, float] = {}  # actor -> the end of its last work

    def add(self, event: Json) -> None:
        """One row as `actors.job.event` makes it."""
        if str(event["stage"]).startswith(("wait", "idle")):
            return
        key = (str(event["role"]), str(event["actor"]))
        start = max(float(event["start"]), self._until.get(key[1], self._began))
        self._busy[key] = self._busy.get(key, 0.0) + max(0.0, float(event["end"]) - start)
        self._until[key[1]] = max(float(event["end"]), self._until.get(key[1], 0.0))

    def idle(self) -> dict[str, float]:
        """Share of the time in which the actors of each role that have worked did not, in this life of the run."""
        elapsed = self._clock() - self._began
        found = {}
        for role in dict.fromkeys(role for role, _ in self._busy):
            busy = [seconds for (its, _), seconds in self._busy.items() if its == role]
            found[role] = max(0.0, 1.0 - sum(busy) / (elapsed * len(busy))) if elapsed > 0 else 0.0
        return found

    def per_example(self, examples: int) -> float | None:
        """Device-seconds of generators, scorers and trainers for each pair or credited trace; None before the first."""
        spent = sum(seconds * self._devices.get(role, 1.0) for (role, _), seconds in self._busy.items() if role in PAID)
        return spent / examples if examples else None


def devices(gpus: Mapping[str, float]) -> dict[str, float]:
    """GPUs of one actor of each paid role, from those of each pool; without any, each process counts as one."""
    return {role: gpus.get(f"{role}s", 0.0) if any(gpus.values()) else 1.0 for role in PAID}
