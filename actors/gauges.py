"""A run's status as metrics: Ray's agent on each node hands them to Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from ray.util.metrics import Gauge

from rlsf_ray.records import Json
from rlsf_ray.stream.fleet import State

STATES = ("trained", "filtered", "failed", "rolled_back", "in_flight")
COUNTS = ("traces", "tokens", "pairs", "credited traces", "steps", "version", "staleness")
LABELS = {"rlsf_prompts": "state", "rlsf_generators": "state", "rlsf_idle": "role"}


class Gauges:
    """Made in the process that tells them; Prometheus finds each name with `ray_` before it, and the label `run`."""

    def __init__(self, run: str) -> None:
        self._run = run

    def tell(self, status: Json) -> None:
        """Set every number that the status has."""
        for name, label, value in _numbers(status):
            tags = {"run": self._run} | ({LABELS[name]: label} if label else {})
            self._gauges[name].set(value, tags)

    @cached_property
    def _gauges(self) -> dict[str, Gauge]:
        about = {
            "rlsf_prompts": "Admitted prompts by how they ended, or in flight",
            "rlsf_generators": "Generators by state",
            "rlsf_idle": "Share of the time without work, by role, in this life of the run",
            "rlsf_device_s_per_example": "Device-seconds for each pair or credited trace, in this life of the run",
            "rlsf_guard": "What the guard said last: 0 nothing, 1 a warning, 2 to stop",
            "rlsf_disk_used": "Share of the run directory's disk in use",
            **{_name(count): f"{count} of the run".capitalize() for count in COUNTS},
        }
        return {
            name: Gauge(name, text, ("run", LABELS[name]) if name in LABELS else ("run",))
            for name, text in about.items()
        }


def _name(count: str) -> str:
    return "rlsf_" + count.replace(" ", "_")


def _numbers(status: Json) -> Iterator[tuple[str, str, float]]:
    """(metric, label, value) of what the status tells."""
    for state in STATES:
        yield "rlsf_prompts", state, status["accounting"][state]
    states = list((status.get("fleet") or {}).values())
    for kind in State:  # 0 too: a state that nobody is in any more would keep its last number
        yield "rlsf_generators", kind.value, states.count(kind.value)
    for role, share in (status.get("idle") or {}).items():
        yield "rlsf_idle", role, share
    for count in COUNTS:
        if count in status:
            yield _name(count), "", status[count]
    verdicts = status.get("verdicts") or ()
    yield "rlsf_guard", "", {"warn": 1, "stop": 2}[verdicts[-1]["action"]] if verdicts else 0
    for name in ("device_s_per_example", "disk_used"):
        if status.get(name) is not None:
            yield f"rlsf_{name}", "", status[name]
