"""The benchmarks of swaps, of the learner and of scale, on tiny models; with vLLM they are run by hand."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import bench_end_to_end
import bench_false_alarms
import bench_learner
import bench_scale
import bench_swap
import bench_vllm
import end_to_end_judge
import numpy as np
import pytest
from bench_common import own_ray
from tiny import tiny_config

from rlsf_ray.algorithms.preferences import Candidates, Limits
from rlsf_ray.engines.build import build_engine


def test_fifty_small_swaps_of_each_kind_raise_no_alarm(tiny: Path) -> None:
    config = tiny_config(tiny, learner={"warmup_steps": 0, "learning_rate": 5e-5}, pairs={"same_answer": True})
    engine = build_engine(config, threads=1, device="cpu")
    for name, kind in bench_false_alarms.measure(config, engine, 50).items():
        assert sum(kind["verdicts"].values()) == 50, name
        assert "failed" not in kind["verdicts"], (name, kind)
        assert kind["loaded_again"] == 0, name
    engine.close()


@pytest.mark.cluster
def test_the_swap_benchmark_counts_what_its_swaps_proved(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, cluster={"max_staleness": 1, "prompts_per_call": 2}, data={"probe": []})
    with own_ray():
        result = asyncio.run(bench_swap.measure(config, 2, tmp_path))
    assert result["verdicts"] == {"proved": 2}
    assert result["failed_requests"] == 0
    assert 0 < result["publish_to_proved_s"]["p50"] <= result["publish_to_proved_s"]["max"]
    assert result["bytes"]["adapter"] > 0
    printed = bench_swap.as_text({"machine": {"cores": 1}, **result})
    assert "failed requests: 0" in printed


def test_a_ratio_compares_the_writers_turn_by_turn() -> None:
    writers = {"a": {"tokens_per_s": [90.0, 120.0, 50.0]}, "b": {"tokens_per_s": [100.0, 100.0, 100.0]}}
    assert bench_vllm.ratio(writers, "a", "b") == {"median": 0.9, "low": 0.5, "high": 1.2}


@pytest.mark.parametrize("grpo", [False, True])
def test_the_learner_and_trl_train_the_same(tiny: Path, grpo: bool) -> None:
    """In float32; DPO on drawn traces of several lengths, GRPO on written ones, whose log-probs are real."""
    lengths, step = (None, 8) if grpo else ((12, 8), 12)
    case = bench_learner.Case(groups=2, traces=4, step=step, lengths=lengths, dtype="float32", grpo=grpo)
    options = argparse.Namespace(model=str(tiny), set=["learner.max_tokens_per_pass=64"])
    found = bench_learner.measure(case, options, turns=1)
    assert found["trained"]["pairs or traces"] == step
    same = found["same"]
    assert same["largest weight that was zero"] > 1e-5
    assert same["largest difference of weights"] < 1e-6
    assert same["largest difference of losses"] < 1e-5
    assert found["speed"]["median"] > 0
    assert "a case" in bench_learner.line("a case", found)


END_TO_END = [
    "model.dtype=float32",
    "rollout.max_tokens=12",
    "data.suffix=''",
    "cluster.deadline_s=180",
    *(f"cluster.{pool}={{cpus: 0.5, threads: 1}}" for pool in ("generators", "scorers", "trainers")),
]


def end_to_end(tiny: Path, *more: str) -> argparse.Namespace:
    return argparse.Namespace(model=str(tiny), set=[*END_TO_END, *more], turns=1, prompts=8)


def test_the_judge_takes_the_longer_trace_and_of_equal_ones_the_first() -> None:
    def pairs(*lengths: int) -> list[tuple[int, int, float]]:
        size = len(lengths)
        candidates = Candidates(
            scores=np.array(lengths, dtype=np.float64),
            labels=np.full(size, -1),
            lengths=np.array(lengths),
            finished=np.zeros(size, dtype=np.bool_),  # cut off, and still judged: so does TRL
        )
        decision = end_to_end_judge.outer_pairs(candidates, Limits(max_pairs=3), np.random.default_rng(0))
        return [(chosen, rejected, margin) for chosen, rejected, _, margin in decision.pairs]

    assert pairs(3, 5) == [(1, 0, 2.0)]
    assert pairs(5, 3) == [(0, 1, 2.0)]
    assert pairs(4, 4) == [(0, 1, 0.0)]
    assert pairs(1, 8, 2, 7, 3, 6, 4, 5) == [(1, 0, 7.0), (3, 2, 5.0), (5, 4, 3.0)]  # eight traces, at most three pairs
    assert end_to_end_judge.num_tokens([5, 6, 9, 9], {9, 10}) == 3  # the second 9 is padding
    assert end_to_end_judge.num_tokens([5, 6, 7], {9, 10}) == 3  # cut off


def test_the_loop_and_trl_train_the_same_pairs_of_the_same_prompts(tiny: Path) -> None:
    options = end_to_end(tiny)
    names = ["TRL", "loop, transformers"]
    turn = {name: bench_end_to_end.run_row(bench_end_to_end.ROWS[name], options) for name in names}
    bench_end_to_end.check_same(turn)
    for name, found in turn.items():
        assert found["pairs"] == len(set(found["prompts"])) == 8, name  # one pair a prompt, and no prompt twice
        assert found["margin"] == pytest.approx(found["spread"], abs=1e-3), name  # the longer is chosen in each pair
        assert found["spread"] > 0, name  # there was something to judge
        assert 16 < found["tokens"] <= 8 * 2 * 12, name
        assert min(found["start_s"], found["warm_s"], found["seconds"]) > 0, name
    rows = {name: bench_end_to_end.summed(name, {name: [found] for name, found in turn.items()}) for name in names}
    assert rows["TRL"]["speed"] is None
    assert "| loop, transformers | 8 |" in bench_end_to_end.as_text({"rows": rows})
    turn["TRL"]["prompts"][0] = "another"
    with pytest.raises(SystemExit, match="loop, transformers: prompts are"):
        bench_end_to_end.check_same(turn)


@pytest.mark.cluster
def test_overlap_is_measured_with_the_share_and_the_bound_of_each_stage(tiny: Path) -> None:
    found = bench_end_to_end.measure(["overlap on"], end_to_end(tiny, "engine=transformers"))["overlap on"]
    (turn,), overlap = found["turns"], found["overlap"]
    assert turn["pairs"] == turn["prompts"] == 4 * 8
    assert turn["margin"] == pytest.approx(turn["spread"])
    assert found["speed"] is None  # what it is compared with was not measured
    busy = overlap["busy_s"]
    assert overlap["bound_s"] == max(busy["generator"], busy["trainer"]) < overlap["sum_s"]
    assert all(0.0 <= idle <= 1.0 for idle in overlap["idle"].values())
    assert "| overlap on |" in bench_end_to_end.as_text({"rows": {"overlap on": found}}).splitlines()[-1]


@pytest.mark.cluster
def test_the_scale_benchmark_steers_a_simulated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One generator and two in a process, at a tenth of a second: versions are proved, and generators hold no torch."""
    monkeypatch.setattr(bench_scale, "ROUND_S", 2.0)
    overrides = ["cluster.prompts_per_call=1", "rollout.traces=4", "cluster.deadline_s=180"]
    options = argparse.Namespace(processes=1, rounds=4, batches=1, set=overrides)
    points = bench_scale.with_efficiency([bench_scale.measure(size, 0.1, options) for size in (1, 2)])
    for point in points:
        assert point["groups_per_s"] <= 1.05 * point["generators"] / 0.1
        assert point["swap"]["verdicts"].keys() == {"proved"}
        assert point["staleness"].keys() <= {"0", "1"}
        assert sum(point["staleness"].values()) == 2 * 20 * point["generators"]
        assert point["cores"].keys() >= {"coordinator", "pair_buffer", "weight_store", "generator", "scorer", "trainer"}
        assert point["memory_mb"]["generator"] < 0.6 * point["memory_mb"]["scorer"]
    assert points[0]["groups_per_s"] > 2.0
    assert points[1]["efficiency"] > 0.6  # the second slot of the process is used
    settings = {"prompts_per_call": 1, "service_s": 0.1, "service_from": "the test"}
    printed = bench_scale.as_text({"machine": {"cores": 1}, "settings": settings, "points": points, "sweep": points})
    assert "busiest process" in printed
