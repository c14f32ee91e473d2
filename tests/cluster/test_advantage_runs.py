"""Learning from advantages and from a reward model as a service: what the loop does, and with two training workers."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from advantage_runs import CERTAINTY, REWARD
from several_runs import reflecting
from tiny import tiny_config

from rlsf_ray import loop
from rlsf_ray.config import RunConfig
from rlsf_ray.errors import NoPairsError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.ledger import Ledger

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]
NO_PROBE: Json = {"data": {"probe": []}}


@pytest.fixture(scope="module")
def configs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    drawn = {"rollout": {"temperature": 0.7}}  # so that the scorers read the traces of each version again
    two = {"rounds": 3, "cluster": {"trainers": {"count": 2}, "max_staleness": 1}}
    return {
        "certainty": tiny_config(tiny, **NO_PROBE, **CERTAINTY | drawn),
        "two_workers": tiny_config(tiny, **NO_PROBE, **CERTAINTY | drawn | two),
        "reward": tiny_config(tiny, **NO_PROBE, **REWARD),
        "several": tiny_config(tiny, **reflecting(tmp_path_factory.mktemp("several"))),
        "reward_two_workers": tiny_config(tiny, **NO_PROBE, **REWARD | {"cluster": {"trainers": {"count": 2}}}),
    }


@pytest.fixture(scope="module")
def served(
    launch: Callable[[RunConfig, Path], "Future[Json]"],
    configs: dict[str, RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, RunStore]:
    folder = tmp_path_factory.mktemp("served")
    for names in (("certainty", "reward", "several"), ("two_workers", "reward_two_workers")):  # as many as have CPUs
        futures = [launch(configs[name], folder / name) for name in names]
        for future in futures:
            future.result()
    return {name: RunStore.open(str(folder / name)) for name in configs}


@pytest.mark.parametrize("name", ["certainty", "reward", "several"])
def test_the_service_gives_the_scores_and_the_adapters_of_the_loop(
    served: dict[str, RunStore], configs: dict[str, RunConfig], tmp_path: Path, name: str
) -> None:
    loop.run(configs[name], str(tmp_path / "run"))
    looped = RunStore.open(str(tmp_path / "run"))
    tables = [store.read_table("traces") for store in (served[name], looped)]
    words = ["trace_id", "signal", "reason"]
    assert tables[0].select(words).to_pylist() == tables[1].select(words).to_pylist()
    assert tables[0].num_rows > 60
    for column in ("score", "second_score", "advantage") if name != "several" else ("score", "advantage"):
        ours, theirs = (np.array(table[column].to_pylist(), dtype=float) for table in tables)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert served[name].versions() == looped.versions()
    last = looped.versions()[-1]
    found, expected = (store.read_adapter(last)[0] for store in (served[name], looped))
    assert max(np.abs(found[key] - expected[key]).max() for key in expected) <= 1e-5
    if name == "several":
        assert tables[0].select(["turns"]).to_pylist() == tables[1].select(["turns"]).to_pylist()
        groups = [served[name].row_to_group(row) for row in served[name].read_table("groups").to_pylist()]
        assert len(groups) > 2
        assert all(0 < trace.learned.sum() < len(trace.token_ids) for group in groups for trace in group.traces)
    if name == "reward":
        states = [store.read_json("state.json") for store in (served[name], looped)]
        ends = [Ledger.from_json(state["ledger"]).totals() for state in states]
        assert ends[0] == ends[1]
        assert ends[0]["reasons"]["less_sure"] > 0
        weights, others = served[name].read_reward(0), looped.read_reward(0)
        assert max(np.abs(weights[key] - others[key]).max() for key in others) <= 1e-5


@pytest.mark.parametrize(("alone", "together"), [("certainty", "two_workers"), ("reward", "reward_two_workers")])
def test_two_training_workers_give_the_losses_of_one(served: dict[str, RunStore], alone: str, together: str) -> None:
    """Of the first round; that of a reward model learns from the surest prompts only."""
    one, two = (
        [
            {key: row[key] for key in row if key != "time"}
            for row in served[name].read_metrics("train")
            if not row["round"]
        ]
        for name in (alone, together)
    )
    assert len(one) == len(two) >= 2
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_the_live_judge_is_the_version_that_wrote_whatever_was_published_since(served: dict[str, RunStore]) -> None:
    """The base model wrote round 0, and is its own frozen judge; later rounds are by versions up to one old."""
    rows = [row for row in served["two_workers"].read_table("traces").to_pylist() if row["score"] is not None]
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        assert row["round"] - 1 <= row["version"] <= row["round"]
        gaps[row["version"] == 0].append(abs(row["score"] - row["second_score"]))
    assert max(gaps[True]) < 1e-4
    assert np.mean(gaps[False]) > 1e-3
    assert served["two_workers"].read_metrics("judges-scorer-0")


def test_a_reward_model_without_pairs_is_named_as_the_loop_names_it(
    served: dict[str, RunStore], launch: Callable[[RunConfig, Path], "Future[Json]"], tiny: Path, tmp_path: Path
) -> None:
    none = tiny_config(tiny, **NO_PROBE, **REWARD | {"pairs": {"rule": "voted", "min_chosen": 100.0}})
    with pytest.raises(NoPairsError, match="no prompt gave a preference pair"):  # and not a missing reward model
        launch(none, tmp_path / "none").result()
