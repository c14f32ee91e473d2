"""The whole method in one process, on the tiny model."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import WATCHED, collapsing, tiny_config

from rlsf_ray import loop
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.build import build_engine
from rlsf_ray.errors import GuardError, InputError, NoPairsError
from rlsf_ray.evaluate import evaluate_version, measure_version
from rlsf_ray.export import pair_messages
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets


def test_a_run_leaves_everything_in_its_directory(config: RunConfig, tmp_path: Path) -> None:
    seen: list[Json] = []
    summary = loop.run(config, str(tmp_path / "run"), seen.append)
    store = RunStore.open(str(tmp_path / "run"))
    assert store.versions() == [1, 2]
    assert summary["accounting"]["admitted"] == 16 == summary["accounting"]["trained"]
    assert summary["before"]["sampled_accuracy"] is not None
    assert len(summary["difference"]["sampled_accuracy"]) == 3
    traces = store.read_table("traces").to_pylist()
    assert len(traces) == 2 * 8 * 4
    assert {row["version"] for row in traces if row["round"] == 0} == {0}
    assert {row["version"] for row in traces if row["round"] == 1} == {1}, "round 1 is written by version 1"
    ids = {row["trace_id"] for row in traces}
    pairs = store.read_table("pairs").to_pylist()
    assert len(pairs) == 32
    assert all(row["chosen_trace_id"] in ids and row["rejected_trace_id"] in ids for row in pairs)
    assert {status["message"] for status in seen} >= {"generating and scoring", "training"}
    assert seen[-1]["state"] == "done"
    assert len(store.read_metrics("train")) == seen[-1]["steps"]


def test_the_same_seed_gives_the_same_adapter(config: RunConfig, tmp_path: Path) -> None:
    adapters = []
    for name in ("one", "two"):
        loop.run(config, str(tmp_path / name))
        adapters.append(RunStore.open(str(tmp_path / name)).read_adapter(2)[0])
    for name, array in adapters[0].items():
        np.testing.assert_array_equal(array, adapters[1][name])


def test_another_seed_changes_prompts_sampling_and_initialisation_but_not_the_probe(
    config: RunConfig, tiny: Path, tmp_path: Path
) -> None:
    loop.run(config, str(tmp_path / "zero"))
    loop.run(tiny_config(tiny, seed=1), str(tmp_path / "one"))
    zero, one = (RunStore.open(str(tmp_path / name)) for name in ("zero", "one"))
    questions = [[row["id"] for row in s.read_json("eval/version-0000.json")["questions"]] for s in (zero, one)]
    assert questions[0] == questions[1]
    orders = [s.read_table("traces", 0)["prompt_id"].to_pylist() for s in (zero, one)]
    assert orders[0] != orders[1]


def test_a_killed_run_goes_on_after_its_last_version(config: RunConfig, tmp_path: Path) -> None:
    whole = loop.run(config, str(tmp_path / "whole"))

    def stop_in_round_1(status: Json) -> None:
        if status["round"] == 1 and status["message"] == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(config, str(tmp_path / "cut"), stop_in_round_1)
    resumed = loop.run(config, str(tmp_path / "cut"))
    assert resumed["accounting"] == whole["accounting"]
    assert resumed["training"] == whole["training"]
    adapters = [RunStore.open(str(tmp_path / name)).read_adapter(2)[0] for name in ("whole", "cut")]
    for name, array in adapters[0].items():
        np.testing.assert_array_equal(array, adapters[1][name])


def test_a_run_killed_while_it_is_measured_is_measured_when_it_goes_on(config: RunConfig, tmp_path: Path) -> None:
    def stop(status: Json) -> None:
        if status["message"] == "evaluating version 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(config, str(tmp_path / "cut"), stop)
    summary = loop.run(config, str(tmp_path / "cut"))
    assert [one["version"] for one in summary["versions"]] == [0, 2]
    assert summary["after"] is not None


def test_a_run_killed_between_its_checkpoint_and_its_adapter_publishes_it_when_it_goes_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: RunStore, version: int, *args: Any) -> None:
        raise KeyboardInterrupt

    whole = RunStore.write_adapter
    monkeypatch.setattr(RunStore, "write_adapter", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, str(tmp_path / "cut"))
    monkeypatch.setattr(RunStore, "write_adapter", whole)
    store = RunStore.open(str(tmp_path / "cut"))
    assert (store.versions(), store.read_json("state.json")["version"]) == ([], 1)
    loop.run(config, str(tmp_path / "cut"))
    assert store.versions() == [1, 2]
    steps = [row["step"] for row in store.read_metrics("train")]
    assert steps == sorted(set(steps))  # round 0 was not trained again


def test_a_version_that_was_not_measured_before_a_kill_is_measured_when_the_run_goes_on(
    tiny: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny, eval={"during": 3})

    def stop(status: Json) -> None:
        if status["message"] == "evaluating version 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(config, str(tmp_path / "cut"), stop)
    summary = loop.run(config, str(tmp_path / "cut"))
    assert [one["version"] for one in summary["versions"]] == [0, 1, 2]


def test_a_finished_run_answers_at_once(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = loop.run(config, str(tmp_path / "run"))
    monkeypatch.delattr(loop, "_build")
    assert loop.run(config, str(tmp_path / "run")) == summary


def test_a_run_of_the_service_is_not_taken_over(config: RunConfig, tmp_path: Path) -> None:
    store = RunStore.create_or_resume(str(tmp_path / "run"), config)
    store.write_json("state.json", {"state": "drained", "ledger": {}})
    with pytest.raises(InputError, match="holds a run of the service"):
        loop.run(config, str(tmp_path / "run"))


def test_no_pairs_at_all_is_an_error_that_counts_the_reasons(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, rollout={"max_tokens": 2})
    with pytest.raises(NoPairsError, match=r"all_cut_off: 16.*raise rollout.max_tokens"):
        loop.run(config, str(tmp_path / "run"))
    state = RunStore.open(str(tmp_path / "run")).read_json("state.json")
    assert (state["state"], state["error"]["type"]) == ("failed", "NoPairsError")


def test_self_feedback_moves_the_tiny_model_towards_its_own_vote(tiny: Path, tmp_path: Path) -> None:
    """The share of traces that give their prompt's voted answer rises over the rounds: the method does something."""
    config = tiny_config(
        tiny,
        rounds=3,
        prompts_per_round=16,
        rollout={"traces": 8},
        pairs={"rule": "voted", "max_pairs": 3},
        learner={"epochs": 6, "learning_rate": 1e-2},
        loss={"nll": 0.0},
        signal="self_consistency",
    )
    loop.run(config, str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    shares = [_vote_share(store.read_table("traces", round).to_pylist()) for round in range(3)]
    assert shares[2] > shares[0] + 0.3, shares


def test_a_run_that_collapses_ends_on_its_last_good_version(tiny: Path, tmp_path: Path) -> None:
    """A learning rate far too high: version 1 writes noise, an eighth of the way there too: the base model again."""
    config = collapsing(tiny)
    summary = loop.run(config, str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    assert summary["guard"]["rolled_back"] == {"from": 1, "to": 0, "past": 1, "share": 0.0, "version": 3}
    said = [(verdict["version"], verdict["action"]) for verdict in summary["guard"]["verdicts"]]
    assert said == [(1, "stop"), (2, "stop")]
    assert "base model" in summary["guard"]["verdicts"][0]["reasons"][0]
    assert store.versions() == [1, 2, 3]
    assert not any(array.any() for name, array in store.read_adapter(3)[0].items() if ".lora_B." in name)
    base, last = (store.read_json(f"eval/version-{version:04d}.json") for version in (0, 3))
    assert base["vitals"] == last["vitals"]
    counts = summary["accounting"]
    assert (counts["rolled_back"], counts["trained"], counts["admitted"]) == (8, 0, 8)
    assert loop.run(config, str(tmp_path / "run")) == summary


@pytest.mark.parametrize(("bad", "share"), [((2,), 0.125), ((2, 3), 0.0)])
def test_a_run_goes_back_to_a_part_of_the_step_if_the_guard_lets_that_pass(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: tuple[int, ...], share: float
) -> None:
    """Version 2 is said to write nothing but repetitions, as are versions part of the way from the good version 1."""
    measure = loop.evaluate_version

    def measured(engine: Any, sets: Any, config: RunConfig, version: int, earlier: Json | None) -> Json:
        found = measure(engine, sets, config, version, earlier)
        return found | {"vitals": found["vitals"] | {"repetition": 0.9}} if version in bad else found

    monkeypatch.setattr(loop, "evaluate_version", measured)
    config = tiny_config(tiny, **WATCHED)
    summary = loop.run(config, str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    last = max(bad) + 1
    assert summary["guard"]["rolled_back"] == {"from": 2, "to": 1, "past": 2, "share": share, "version": last}
    good, past, ended = (store.read_adapter(version)[0] for version in (1, 2, last))
    for name, array in ended.items():
        np.testing.assert_allclose(array, (1 - share) * good[name] + share * past[name], atol=1e-7)
    counts = summary["accounting"]
    trained = 16 if share else 8  # the second round has a part in the last version, or none
    assert (counts["trained"], counts["rolled_back"], counts["admitted"]) == (trained, 16 - trained, 16)
    assert {pair["round"] for pair in pair_messages(store)} == ({0, 1} if share else {0})
    assert [one["version"] for one in summary["versions"]] == [0, *range(2, last + 1)]
    maps = [store.read_json(f"versions/{version:04d}/calibration.json") for version in (1, 2, last)]
    assert None not in maps
    assert (maps[0] == maps[2]) is (share == 0), "with the content of version 1, against the same version before it"
    assert store.version_before(last) == store.version_before(1) == 0
    assert loop.run(config, str(tmp_path / "run")) == summary


def test_a_version_measured_again_has_the_same_map(tiny: Path, tmp_path: Path) -> None:
    """The run counts agreement against the answers it has kept of version 1; `rlsf eval` has it write them again."""
    config = tiny_config(tiny, **WATCHED)
    loop.run(config, str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    kept = store.measured(2, 1)
    again = measure_version(store, config, load_sets(config), 2)
    assert kept is not None
    assert kept["calibration"] is not None
    for key in ("calibration", "vitals", "questions"):
        assert again[key] == kept[key]
    with closing(build_engine(config)) as engine:
        engine.load_version(2, store.read_adapter(2)[0])
        alone = evaluate_version(engine, load_sets(config), config, 2)
    assert alone["calibration"] != kept["calibration"]


def test_a_guard_that_only_warns_lets_it_happen_and_one_that_stops_says_why(tiny: Path, tmp_path: Path) -> None:
    summary = loop.run(collapsing(tiny, guard="warn"), str(tmp_path / "warn"))
    assert {verdict["action"] for verdict in summary["guard"]["verdicts"]} == {"warn"}
    assert summary["guard"]["rolled_back"] is None
    with pytest.raises(GuardError, match=r"version 1 shows signs of collapse \(.*last good one is the base model"):
        loop.run(collapsing(tiny, guard="stop"), str(tmp_path / "stop"))
    assert loop.run(collapsing(tiny, guard="off"), str(tmp_path / "off"))["guard"]["verdicts"] == []


def test_a_run_without_a_probe_set_is_watched_all_the_same(tiny: Path, tmp_path: Path) -> None:
    summary = loop.run(collapsing(tiny, data={"probe": []}), str(tmp_path / "run"))
    assert summary["guard"]["rolled_back"]["to"] == 0
    assert summary["difference"] is None


def _vote_share(rows: list[dict[str, Any]]) -> float:
    by_group: dict[str, list[int]] = {}
    for row in rows:
        by_group.setdefault(row["group_id"], []).append(row["label"])
    return float(np.mean([max(map(labels.count, labels)) / len(labels) for labels in by_group.values()]))


def test_of_a_round_only_the_surest_prompts_are_trained_and_exported(tiny: Path, tmp_path: Path) -> None:
    pairs = {"rule": "best_worst", "max_pairs": 1, "same_answer": True, "surest": 0.1}
    summary = loop.run(tiny_config(tiny, pairs=pairs), str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    formed = store.read_table("pairs").to_pylist()
    assert len(formed) > 2
    assert summary["accounting"]["trained"] == 2 == summary["training"]["pairs"]
    assert summary["accounting"]["reasons"]["less_sure"] == len(formed) - 2
    for round in (0, 1):
        best = sorted((row["chosen_score"] for row in formed if row["round"] == round), reverse=True)[:1]
        kept = [row["chosen_score"] for row in pair_messages(store) if row["round"] == round]
        assert sorted(kept, reverse=True) == best
