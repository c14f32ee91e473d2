"""The benchmarks of swaps and of the learner, on the tiny model; with vLLM they are run by hand."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import bench_false_alarms
import bench_learner
import bench_swap
import bench_vllm
import pytest
from bench_common import own_ray
from tiny import tiny_config

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
