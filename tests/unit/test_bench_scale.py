"""The figures of the scale benchmark, from rows and samples made by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import bench_scale
import pyarrow as pa
import pytest
from bench_scale import figures, layout, measured_service_s, staleness, with_efficiency
from scale_samples import REST, Sample, Use, busy, memory, role_of

from rlsf_ray.config import RunConfig

OPTIONS = argparse.Namespace(processes=16, rounds=4, batches=2, set=["cluster.prompts_per_call=2"])


def written(round: int, start: float) -> dict[str, Any]:
    return {"stage": "generate", "round": round, "start": start, "end": start + 1.0}


def swapped(version: int, start: float, end: float) -> dict[str, Any]:
    return {"stage": "swap", "round": version - 1, "version": version, "start": start, "end": end, "verdict": "proved"}


def sample(time: float, **seconds: float) -> Sample:
    """A process for each role, with a thousandth of a megabyte more at each second."""
    uses = {n: Use(role, cpu, int(1e6 * (100 + time))) for n, (role, cpu) in enumerate(sorted(seconds.items()))}
    return Sample(time, uses)


def config() -> RunConfig:
    return bench_scale.scale_config(1, OPTIONS.batches, OPTIONS, Path("questions.jsonl"))


def test_the_rate_is_of_the_rounds_between_the_first_two_and_the_last() -> None:
    """Of 4 rounds only round 2 counts: 2 batches of 2 prompts, 5 s until round 3 begins."""
    stages = [written(0, 0.0), written(1, 7.0), written(2, 10.0), written(2, 11.0), written(3, 15.0), written(3, 16.0)]
    stages += [swapped(1, 8.0, 9.0), swapped(1, 8.5, 10.0), swapped(2, 12.0, 12.5)]
    samples = [
        sample(0.0, coordinator=5.0, generator=1.0, pair_buffer=0.0, weight_store=0.0),
        sample(10.5, coordinator=6.0, generator=2.0, pair_buffer=0.0, weight_store=0.0),
        sample(14.5, coordinator=8.0, generator=3.0, pair_buffer=1.0, weight_store=0.0),
        sample(30.0, coordinator=99.0, generator=99.0, pair_buffer=99.0, weight_store=99.0),
    ]
    found = figures(stages, samples, config())
    assert found["steady_s"] == 5.0
    assert found["groups_per_s"] == pytest.approx(4 / 5)
    assert found["batches_per_s"] == pytest.approx(2 / 5)
    assert found["cores"]["coordinator"] == {"processes": 1, "cores": 0.5, "busiest": 0.5}  # 2 s in the 4 s between
    assert found["control_cores"] == pytest.approx(0.75)
    cost = found["control_s_per_group"]
    assert cost == pytest.approx({"coordinator": 0.5 * 5 / 4, "pair_buffer": 0.25 * 5 / 4, "weight_store": 0.0})
    assert found["groups_per_control_s"]["pair_buffer"] == pytest.approx(3.2)
    assert found["groups_per_control_s"]["weight_store"] is None
    assert found["swap"]["one_s"]["max"] == 1.5
    assert found["swap"]["all_s"] == {"p50": 1.25, "p95": 1.92, "max": 2.0}
    assert found["swap"]["verdicts"] == {"proved": 3}
    assert found["memory_mb"]["coordinator"] == 130


def test_the_busiest_of_several_processes_is_told_from_their_sum() -> None:
    one, two = Use("scorer", 1.0, 0), Use("scorer", 2.0, 0)
    samples = [Sample(0.0, {7: one, 8: one}), Sample(2.0, {7: two, 8: one, 9: Use("scorer", 0.5, 0)})]  # 9 is new
    assert busy(samples, 0.0, 2.0) == {"scorer": {"processes": 3, "cores": 0.75, "busiest": 0.5}}
    with pytest.raises(ValueError, match="no two samples between"):
        busy(samples, 0.1, 0.2)


def test_memory_is_that_of_the_largest_process_at_its_largest() -> None:
    def with_scorers(*sizes: int) -> Sample:
        return Sample(0.0, {n: Use("scorer", 0.0, size) for n, size in enumerate(sizes)})

    assert memory([with_scorers(3_000_000, 1), with_scorers(2, 5_000_000)]) == {"scorer": 5}


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::Generator.write"], "generator"),
        (["ray::PairBuffer"], "pair_buffer"),
        (["ray::RayTrainWorker.poll_status"], "trainer"),
        (["/usr/lib/raylet", "--x"], REST),
        (["ray::IDLE"], REST),
        ([], REST),
    ],
)
def test_a_process_is_known_by_the_title_that_ray_gives_it(command: list[str], role: str) -> None:
    assert role_of(command) == role


def test_efficiency_compares_with_so_many_times_one_generator() -> None:
    points = [{"generators": 1, "groups_per_s": 2.0}, {"generators": 64, "groups_per_s": 96.0}]
    assert [point["efficiency"] for point in with_efficiency(points)] == [1.0, 0.75]
    assert [point["target"] for point in with_efficiency(points)] == [None, 0.95]


@pytest.mark.parametrize(("most", "last"), [(40.0, 0.5), (1e9, 8.0 / 2**bench_scale.HALVINGS)])
def test_the_sweep_ends_where_it_broke_or_after_enough_halvings(
    most: float, last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something gives out at 40 groups/s: 8 generators that could write 64 or 128 at 1 and 0.5 s do not."""

    def measure(generators: int, service_s: float, options: Any) -> dict[str, Any]:
        rate = min(most, 8 * generators / service_s)
        return {"generators": generators, "service_s": service_s, "groups_per_s": rate}

    monkeypatch.setattr(bench_scale, "measure", measure)
    found = bench_scale.sweep(8, 8.0, OPTIONS)
    assert found[0] == {"generators": 8, "service_s": 4.0, "groups_per_s": 16.0, "efficiency": 1.0, "target": None}
    assert found[-1]["service_s"] == last
    assert [point["efficiency"] < 0.5 for point in found[:-1]] == [False] * (len(found) - 1)


def test_staleness_counts_groups_and_not_traces() -> None:
    columns = {"group_id": ["a", "a", "b", "b", "c"], "round": [2] * 5, "version": [2, 2, 1, 1, 1]}
    assert staleness([pa.table(columns)]) == {"0": 1, "1": 2}


@pytest.mark.parametrize(("generators", "expected"), [(1, (1, 1)), (4, (4, 1)), (64, (16, 4)), (256, (16, 16))])
def test_generators_are_laid_out_over_at_most_16_processes(generators: int, expected: tuple[int, int]) -> None:
    assert layout(generators, 16) == expected


@pytest.mark.parametrize("generators", [0, 17])
def test_generators_that_do_not_divide_are_refused(generators: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        layout(generators, 16)


def test_the_service_time_is_a_measured_batch_and_at_least_a_second() -> None:
    def vllm(rates: list[float]) -> dict[str, Any]:
        settings = {"prompts": 40, "prompts_per_call": 16}
        return {"settings": settings, "writers": {"pool, vllm": {"tokens": [900] * 3, "tokens_per_s": rates}}}

    assert measured_service_s(vllm([100.0, 50.0, 10.0])) == pytest.approx(18 / 3)  # 18 s for three batches
    assert measured_service_s(vllm([9000.0] * 3)) == 1.0


def test_a_wave_of_groups_has_room_in_the_buffer_and_a_round_has_prompts_for_each_batch() -> None:
    one, many = (bench_scale.scale_config(n, OPTIONS.batches, OPTIONS, Path("questions.jsonl")) for n in (1, 256))
    assert (one.prompts_per_round, one.cluster.buffer_groups, one.cluster.scorers.count) == (4, 64, 1)
    assert (many.prompts_per_round, many.cluster.buffer_groups, many.cluster.scorers.count) == (1024, 512, 2)
    assert many.cluster.generators.count == 16
