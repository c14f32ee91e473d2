"""The page of ratios, and which of them have fallen."""

from __future__ import annotations

import bench_profile
import pytest
import speed
from bench_common import Ratio


def test_a_ratio_that_falls_by_more_than_15_percent_is_told() -> None:
    before = [Ratio("a", 10.0, 9.0, 11.0), Ratio("b", 2.0, 2.0, 2.0), Ratio("gone", 5.0, 5.0, 5.0)]
    now = [Ratio("a", 8.6, 8.0, 9.0), Ratio("b", 1.69, 1.69, 1.69), Ratio("new", 0.1, 0.1, 0.1)]
    assert speed.fallen(before, now) == ["b: 1.69, before 2.00: more than 15% less"]


def test_the_page_is_what_the_committed_results_give() -> None:
    found = speed.read_results()
    assert (speed.RESULTS / "speed.md").read_text() == speed.as_page(found)
    for name in found:
        assert f"`python benchmarks/{name}.py`" in speed.as_page(found)


def test_a_target_is_met_by_every_turn_or_by_the_median_or_not() -> None:
    lines = [speed._line(Ratio("r", 3.0, low, 4.0, target)) for low, target in ((2.9, 2.5), (2.9, 2.95), (2.9, 3.5))]
    assert [line.split("| ")[-1] for line in lines] == ["yes, by every turn |", "yes |", "no |"]


def test_every_second_of_a_run_has_gone_to_something() -> None:
    """Of 20 s: 5 s of writing alone, 1 s beside training, whose other 2 s are alone; 2 s in which nobody worked."""

    def row(role: str, stage: str, start: float, end: float) -> dict[str, object]:
        return {"role": role, "stage": stage, "start": start, "end": end}

    stages = [
        row("generator", "generate", 100, 104),
        row("trainer", "train", 106, 109),
        row("generator", "generate", 108, 110),
    ]
    found = bench_profile.costs(stages, 20.0)
    assert found == pytest.approx(
        {
            "writing traces to learn from": 4 + 0.5 + 1,
            "training steps": 2 + 0.5,
            "nobody works before the trainer begins": 2,
            bench_profile.AROUND: 10,
        }
    )
    result = {"machine": {"cores": 2}, "costs": found, "total_s": 20.0}
    page = bench_profile.as_page(result | {"control": {"coordinator_s": 1.0, "buffer_s": 0.5, "share": 0.075}})
    assert "| 1 | writing traces to learn from | 5.5 | 27.5% |" in page
