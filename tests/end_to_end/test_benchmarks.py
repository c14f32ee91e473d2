"""The benchmarks of swaps, on the tiny model and its own engine; with vLLM they are run by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path

import bench_false_alarms
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
