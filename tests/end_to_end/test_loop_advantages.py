"""Learning from advantages, and from a reward model, in one process on the tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from advantage_runs import CERTAINTY, REWARD
from tiny import tiny_config

from rlsf_ray import loop
from rlsf_ray.algorithms.signals import Signal
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.errors import InputError, NoPairsError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.run_state import RunState


def test_advantages_come_from_what_the_version_itself_reads(tiny: Path, tmp_path: Path) -> None:
    seen: list[Json] = []
    summary = loop.run(tiny_config(tiny, **CERTAINTY), str(tmp_path / "run"), seen.append)
    store = RunStore.open(str(tmp_path / "run"))
    assert store.versions() == [1, 2]
    traces = store.read_table("traces").to_pylist()
    assert store.read_table("pairs").num_rows == 0
    credited = [row for row in traces if row["advantage"] is not None]
    assert summary["training"]["credited traces"] == len(credited) > 20
    assert all(row["finished"] for row in credited)
    by_group: dict[str, list[Json]] = {}
    for row in credited:
        by_group.setdefault(row["group_id"], []).append(row)
    for rows in by_group.values():
        order = np.argsort([row["score"] for row in rows])
        assert (np.diff(np.array([row["advantage"] for row in rows])[order]) >= 0).all()  # more certain, more advantage
        assert sum(row["advantage"] for row in rows) == pytest.approx(0.0, abs=1e-6)
    # in round 0 the live judge is the base model; in round 1 it is version 1
    gap = {r: max(abs(row["score"] - row["second_score"]) for row in credited if row["round"] == r) for r in (0, 1)}
    assert gap[0] < 1e-4 < gap[1]
    rows = store.read_metrics("train")
    assert {"entropy", "kl", "reward", "clipped", "weight"} <= rows[0].keys()
    assert all(math.isfinite(row["entropy"]) for row in rows)
    assert "credited traces" in seen[-1]


def as_the_recipe_says(name: str, tiny: Path) -> RunConfig:
    """A recipe as it is but for its size: a few sums, and the tiny model."""
    size = tiny_config(tiny).model_dump(mode="json")
    taken = {"data": size["data"], "model": size["model"], "rounds": 2, "prompts_per_round": 8}
    taken |= {"rollout.traces": 6, "rollout.max_tokens": 12, "advantages.traces_per_step": 16, "eval.samples": 2}
    taken |= {"learner.lora_rank": 4, "learner.lora_alpha": 8, "learner.learning_rate": 1e-3, "guard": "warn"}
    taken |= {"reward_model.rounds": 1, "pairs.min_chosen": 0.0} if name == "rlsf_reward_model" else {}
    return load_config(name, [f"{key}={json.dumps(value)}" for key, value in taken.items()])


@pytest.mark.parametrize(
    ("recipe", "reward"),
    [
        ("rlif_self_certainty", "self_certainty"),
        ("rlif_token_entropy", "token_entropy"),
        ("rlif_trajectory_entropy", "trajectory_logprob"),
        ("rlif_majority", "majority"),
        ("rlsf_reward_model", "reward"),
    ],
)
def test_every_recipe_trains_on_what_its_reward_says(recipe: str, reward: str, tiny: Path, tmp_path: Path) -> None:
    config = as_the_recipe_says(recipe, tiny)
    loop.run(config, str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    adapter = store.read_adapter(store.versions()[-1])[0]
    assert any(array.any() for name, array in adapter.items() if ".lora_B." in name)
    groups: dict[str, list[Json]] = {}
    for row in store.read_table("traces").to_pylist():
        if row["signal"] == reward:
            groups.setdefault(row["group_id"], []).append(row)
    credited = [[row for row in rows if row["advantage"] is not None] for rows in groups.values()]
    credited = [rows for rows in credited if rows]
    assert len(credited) >= 2
    for rows in credited:
        assert _rewards(recipe, rows) == pytest.approx([row["score"] for row in rows], rel=1e-3), recipe
        better = np.argsort([row["score"] for row in rows], kind="stable")
        assert (np.diff(np.array([row["advantage"] for row in rows])[better]) >= -1e-6).all()


def _rewards(recipe: str, rows: list[Json]) -> list[float]:
    """What can be told from the traces alone; else the scores themselves."""
    if recipe == "rlif_trajectory_entropy":
        return [float(np.sum(row["logprob"])) for row in rows]
    if recipe == "rlif_majority":
        labels = [row["label"] if row["finished"] else -1 for row in rows]
        commonest = max((label for label in labels if label >= 0), key=labels.count)
        return [float(label == commonest) for label in labels]
    return [row["score"] for row in rows]


def test_the_trainer_reads_tempered_traces_as_they_were_drawn(tiny: Path, tmp_path: Path) -> None:
    """At each round's first step the policy still is the version that wrote them, at its temperature."""
    tempered = CERTAINTY | {"rollout": {"temperature": 0.6}, "judges": ["frozen"]}
    loop.run(tiny_config(tiny, **tempered), str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    for round in (0, 1):
        first = next(row for row in store.read_metrics("train") if row["round"] == round)
        assert first["logprob_gap"] < 1e-3
        assert round or first["kl"] < 1e-4  # in round 0 the policy is the reference


def test_a_killed_run_with_advantages_goes_on_to_the_same_adapter(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, **CERTAINTY)
    loop.run(config, str(tmp_path / "whole"))

    def stop_in_round_1(status: Json) -> None:
        if status["round"] == 1 and status["message"] == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(config, str(tmp_path / "cut"), stop_in_round_1)
    loop.run(config, str(tmp_path / "cut"))
    whole, cut = (RunStore.open(str(tmp_path / name)).read_adapter(2)[0] for name in ("whole", "cut"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, cut[name])


def test_the_reward_model_learns_the_pairs_and_then_scores_the_traces(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, **REWARD)
    # the pairs of round 0 are random; taught often enough, the reward model knows them by heart
    config = config.model_copy(update={"reward_model": config.reward_model.model_copy(update={"epochs": 25})})
    loop.run(config, str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    assert store.versions() == [2, 3], "the round of the reward model makes no version"
    traces = store.read_table("traces").to_pylist()
    assert {row["signal"] for row in traces if row["round"] == 0} == {"disparity"}
    assert {row["signal"] for row in traces if row["round"] > 0} == {"reward"}
    assert {row["version"] for row in traces if row["round"] == 1} == {0}
    learned = [row for row in store.read_metrics("train") if row["round"] == 0]
    first, *_ = learned
    assert first["accuracy"] == 0.0  # it prefers nothing at first
    assert np.mean([row["accuracy"] for row in learned[-8:]]) > 0.8


def test_a_reward_run_killed_in_either_phase_goes_on_to_the_same_adapter(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, **REWARD | {"rounds": 4, "reward_model": {"rounds": 2, "learning_rate": 1e-2}})
    loop.run(config, str(tmp_path / "whole"))
    expected, _ = RunStore.open(str(tmp_path / "whole")).read_adapter(4)
    for round in (1, 2, 3):

        def stop(status: Json, at: int = round) -> None:
            if status["round"] == at and status["message"] == "training":
                raise KeyboardInterrupt

        root = str(tmp_path / f"cut-{round}")
        with pytest.raises(KeyboardInterrupt):
            loop.run(config, root, stop)
        loop.run(config, root)
        found, _ = RunStore.open(root).read_adapter(4)
        for name, array in expected.items():
            np.testing.assert_array_equal(array, found[name])


def test_a_run_killed_between_the_reward_model_and_its_round_trains_that_round_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward model of round 1 is written and the run's state is not: the round counts as never trained."""
    config = tiny_config(tiny, **REWARD | {"rounds": 3, "reward_model": {"rounds": 2, "learning_rate": 1e-2}})
    whole = loop.run(config, str(tmp_path / "whole"))
    committed = RunState.committed

    def killed(state: RunState, round: int, *rest: Any) -> None:
        if round == 1:
            raise KeyboardInterrupt
        committed(state, round, *rest)

    monkeypatch.setattr(RunState, "committed", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config, str(tmp_path / "cut"))
    monkeypatch.undo()
    cut = loop.run(config, str(tmp_path / "cut"))
    stores = [RunStore.open(str(tmp_path / name)) for name in ("whole", "cut")]
    weights, others = (store.read_reward(1) for store in stores)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, others[name])
    assert cut["training"] == whole["training"]


def test_steps_go_on_counting_when_the_policy_begins(tiny: Path, tmp_path: Path) -> None:
    summary = loop.run(tiny_config(tiny, **REWARD), str(tmp_path / "run"))
    rows = RunStore.open(str(tmp_path / "run")).read_metrics("train")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert summary["training"]["steps"] == len(rows)
    assert summary["training"]["pairs"] > 0 < summary["training"]["credited traces"]


def test_a_users_own_signal_over_the_distribution_drives_a_run(tiny: Path, tmp_path: Path) -> None:
    loop.run(tiny_config(tiny, **CERTAINTY | {"signal": "own_parts:calm"}), str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    assert store.versions() == [1, 2]
    scores = [row["score"] for row in store.read_table("traces").to_pylist() if row["score"] is not None]
    assert max(scores) < 0.0  # minus an entropy
    assert len(set(scores)) > 10


def test_a_signal_that_is_not_finite_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="signal own_parts:endless gave"):
        loop.run(tiny_config(tiny, **CERTAINTY | {"signal": "own_parts:endless"}), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="cannot need"):
        Signal(lambda traces: [], needs=frozenset({"full_vocab"}))


def test_a_rollout_that_draws_otherwise_than_the_trainer_reckons_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, **CERTAINTY | {"rollout": {"name": "own_parts:warmer"}})
    with pytest.raises(InputError, match=r"own_parts:warmer gives method='sample' at temperature 1.5, expected"):
        loop.run(config, str(tmp_path / "run"))
    loop.run(tiny_config(tiny, rollout={"name": "own_parts:warmer"}), str(tmp_path / "pairs"))  # DPO asks for none


def test_without_any_pair_there_is_no_reward_model_and_the_run_says_so(tiny: Path, tmp_path: Path) -> None:
    none = {"pairs": {"rule": "voted", "min_chosen": 100.0}}
    with pytest.raises(NoPairsError, match="no prompt gave a preference pair"):
        loop.run(tiny_config(tiny, **REWARD | none), str(tmp_path / "run"))
