"""What a run will take, told from one that has ended: the arithmetic by hand, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config, override_config
from rlsf_ray.errors import InputError
from rlsf_ray.forecast import busy_seconds, describe_forecast, forecast, rates_of
from rlsf_ray.plan import Plan
from rlsf_ray.run_store import RunStore

SOURCE = "[{kind: reasoning_gym, name: products, count: 100}]"
SMALL = [f"data.train={SOURCE}", f"data.probe={SOURCE}", "rounds=2", "prompts_per_round=10", "rollout.traces=4"]
SMALL += ["learner.epochs=3", "pairs.surest=null", "data.calibration=0", "eval.during=0", "eval.samples=4"]
CORES: dict[str, float] = {"CPU": 2.0}
GPUS: dict[str, float] = {"CPU": 8.0, "GPU": 2.0}


def row(role: str, stage: str, round: int, start: float, seconds: float, tokens: int) -> dict[str, Any]:
    return {
        "role": role,
        "actor": f"{role}-0",
        "stage": stage,
        "round": round,
        "start": 1000.0 + start,
        "end": 1000.0 + start + seconds,
        "tokens": tokens,
    }


def finished(root: Path, config: RunConfig) -> RunStore:
    """Two rounds of 10 prompts x 4 traces x 50 tokens: written in 20 s, scored in 4 s, half of them read three times in
    30 s; measured before and after in 10 s each; 2 s in each round in which nobody worked, 40 s around it all."""
    store = RunStore.create_or_resume(str(root), config)
    rows = [row("generator", "probe", 0, 0, 10, 1000)]
    for round, at in ((0, 10.0), (1, 66.0)):
        rows += [row("generator", "generate", round, at, 20, 2000), row("scorer", "score", round, at + 20, 4, 2000)]
        rows += [row("trainer", "train", round, at + 26, 30, 3000), row("trainer", "wait", round, at, 26, 0)]
    rows.append(row("generator", "probe", 1, 122, 10, 1000))
    store.append_metrics("stages", rows)
    counts = {"traces": 80, "tokens": 4000, "pairs": 30}
    summary = {"training": counts, "accounting": {"admitted": 20}, "seconds": {"total": 132.0 + 40.0}}
    store.write_json("summary.json", summary)
    return store


def plan_of(config: RunConfig, prompts: int) -> Plan:
    return Plan(
        config=config,
        model=None,
        train_prompts=100,
        probe_prompts=10,
        calibration_prompts=0,
        longest_prompt=None,
        prompts=prompts,
        traces=prompts * config.rollout.traces,
        steps=0,
    )


@pytest.fixture
def config() -> RunConfig:
    return load_config("rlsf", SMALL)


def test_rates_are_those_of_the_finished_run(tmp_path: Path, config: RunConfig) -> None:
    rates = rates_of(finished(tmp_path / "run", config), config, CORES)
    assert (rates.tokens_per_trace, rates.examples_per_prompt, rates.start_s) == (50.0, 1.5, 40.0)
    # 6000 tokens read in 3 passes each: 2000 a pass of 4000 that were written
    assert rates.read_per_token == pytest.approx(0.5)
    assert rates.seconds_per_token == pytest.approx({"generate": 0.01, "score": 0.002, "train": 0.01, "probe": 0.01})
    assert rates.gap_s == pytest.approx(2.0)


def test_the_same_run_again_takes_as_long(tmp_path: Path, config: RunConfig) -> None:
    """All but the measuring, whose traces are as long as the others here: 2 x 10 x (4 + 1) x 50 tokens, not 2000."""
    rates = rates_of(finished(tmp_path / "run", config), config, CORES)
    found = forecast(plan_of(config, 20), rates, CORES)
    assert found.tokens == pytest.approx({"generate": 4000, "score": 4000, "train": 6000, "probe": 5000})
    assert found.examples == 30
    assert found.total_s == pytest.approx(172.0 + 30.0)


def test_more_work_takes_longer_by_the_same_rates(tmp_path: Path, config: RunConfig) -> None:
    """3 rounds of 20 prompts x 4 traces: 12,000 tokens in 120 s, 24 s of scoring; one epoch reads 6,000 in 60 s."""
    rates = rates_of(finished(tmp_path / "run", config), config, CORES)
    more = override_config(config, ["rounds=3", "prompts_per_round=20", "learner.epochs=1", "data.probe=[]"])
    found = forecast(replace(plan_of(more, 60), probe_prompts=0), rates, CORES)
    assert found.seconds == pytest.approx({"generate": 120, "score": 24, "train": 60, "probe": 0})
    assert found.total_s == pytest.approx(40 + 3 * 2 + 204)


def test_on_gpus_of_their_own_stages_overlap_where_versions_may_lag(tmp_path: Path, config: RunConfig) -> None:
    """20 + 20 prompts written in 40 s by one generator, in 20 s by two; training takes 60 s."""
    store = finished(tmp_path / "run", config)
    rates = rates_of(store, config, GPUS)
    assert rates.gap_s == pytest.approx((132 - 20 - 40 - 60) / 2)  # scoring went on beside writing
    plan = replace(plan_of(config, 20), probe_prompts=0)
    assert forecast(plan, rates, GPUS).total_s == pytest.approx(40 + 2 * rates.gap_s + 40 + 60)
    two = override_config(config, ["cluster.generators.count=2", "cluster.max_staleness=1"])
    found = forecast(replace(plan, config=two), rates, {"CPU": 8.0, "GPU": 3.0})
    assert found.seconds["generate"] == pytest.approx(20.0)
    assert found.total_s == pytest.approx(40 + 2 * rates.gap_s + 60)


def test_what_one_actor_does_at_once_counts_once() -> None:
    """vLLM works on several batches: 4 s and 4 s that share 2, beside 5 s of another generator."""
    rows = [row("generator", "generate", 0, 0, 4, 1), row("generator", "generate", 0, 2, 4, 1)]
    other = row("generator", "generate", 0, 0, 5, 1) | {"actor": "generator-1"}
    assert busy_seconds([*rows, other])["generate"] == 6 + 5


def test_training_workers_do_not_take_turns(tmp_path: Path, config: RunConfig) -> None:
    """What two workers needed 60 s for takes two workers 60 s again, and one 120 s."""
    two = override_config(config, ["cluster.trainers.count=2"])
    rates = rates_of(finished(tmp_path / "run", two), two, CORES)
    assert rates.gap_s == pytest.approx(2.0)
    assert forecast(plan_of(two, 20), rates, CORES).seconds["train"] == pytest.approx(60)
    assert forecast(plan_of(config, 20), rates, CORES).seconds["train"] == pytest.approx(120)


def test_the_text_says_by_whose_rates(tmp_path: Path, config: RunConfig) -> None:
    rates = rates_of(finished(tmp_path / "run", config), config, CORES)
    text = describe_forecast(plan_of(config, 20), rates, CORES)
    assert "Tokens   about 4,000 written, 6,000 read in training, 5,000 written to measure" in text
    assert "Learns   from about 30 pairs" in text
    assert (
        "Time     about 3 min 22 s: generating 40 s, scoring 8 s, training 1 min 00 s, measuring 50 s, in turns" in text
    )
    assert "on machines of their own about 1.5 generators keep one training worker busy" in text
    assert str(tmp_path / "run") in text


def test_what_says_nothing_of_the_run_is_refused(tmp_path: Path, config: RunConfig) -> None:
    store = finished(tmp_path / "run", config)
    for change, key in (("engine=vllm", "engine=transformers, expected vllm"), ("model.name=other", "model.name=")):
        with pytest.raises(InputError, match=key):
            rates_of(store, override_config(config, [change]), CORES)
    begun = RunStore.create_or_resume(str(tmp_path / "begun"), config)
    with pytest.raises(InputError, match="expected a finished run"):
        rates_of(begun, config, CORES)
