"""Idle shares and the cost of a pair, by hand."""

from __future__ import annotations

import pytest

from rlsf_ray.records import Json
from rlsf_ray.stream.effort import Effort, devices


def event(role: str, actor: str, start: float, end: float, stage: str = "write") -> Json:
    return {"role": role, "actor": actor, "stage": stage, "start": start, "end": end}


def test_idle_shares_and_the_cost_of_a_pair() -> None:
    now = [100.0]
    effort = Effort({"generator": 0.5, "scorer": 0.25, "trainer": 1.0}, lambda: now[0])
    effort.add(event("generator", "g0", 100, 106))
    effort.add(event("generator", "g0", 104, 108))  # beside the first
    effort.add(event("generator", "g1", 100, 104))
    effort.add(event("generator", "g1", 101, 103))  # within
    effort.add(event("trainer", "t0", 108, 110))
    effort.add(event("trainer", "t0", 100, 108, stage="wait for groups"))
    effort.add(event("evaluator", "e", 100, 110, stage="judge"))
    now[0] = 110.0
    assert effort.idle() == pytest.approx({"generator": 1 - 12 / 20, "trainer": 0.8, "evaluator": 0.0})
    assert effort.per_example(4) == pytest.approx((12 * 0.5 + 2 * 1.0) / 4)
    assert effort.per_example(0) is None


def test_work_from_before_this_life_does_not_count() -> None:
    effort = Effort({}, lambda: 100.0)
    effort.add(event("scorer", "s", 90, 95))
    assert effort.idle() == {"scorer": 0.0}  # nothing has passed yet
    assert effort.per_example(1) == 0.0


def test_processes_count_where_there_is_no_gpu() -> None:
    assert devices({"generators": 0.5, "scorers": 0.0}) == {"generator": 0.5, "scorer": 0.0, "trainer": 0.0}
    assert devices({"generators": 0.0}) == devices({}) == {"generator": 1.0, "scorer": 1.0, "trainer": 1.0}
