"""Learning from advantages and from a reward model as a service: what the loop does, and with two training workers."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from advantage_runs import CERTAINTY, REWARD
from tiny import tiny_config

from rlsf_ray import loop
from rlsf_ray.config import RunConfig
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]
NO_PROBE: Json = {"data": {"probe": []}}


@pytest.fixture(scope="module")
def configs(tiny: Path) -> dict[str, RunConfig]:
    two = {"cluster": {"trainers": {"count": 2}}}
    return {
        "certainty": tiny_config(tiny, **NO_PROBE, **CERTAINTY),
        "two_workers": tiny_config(tiny, **NO_PROBE, **CERTAINTY, **two),
        "reward": tiny_config(tiny, **NO_PROBE, **REWARD),
    }


@pytest.fixture(scope="module")
def served(
    launch: Callable[[RunConfig, Path], "Future[Json]"],
    configs: dict[str, RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, RunStore]:
    folder = tmp_path_factory.mktemp("served")
    futures = {name: launch(config, folder / name) for name, config in configs.items()}
    for future in futures.values():
        future.result()
    return {name: RunStore.open(str(folder / name)) for name in configs}


@pytest.mark.parametrize("name", ["certainty", "reward"])
def test_the_service_gives_the_scores_and_the_adapters_of_the_loop(
    served: dict[str, RunStore], configs: dict[str, RunConfig], tmp_path: Path, name: str
) -> None:
    loop.run(configs[name], str(tmp_path / "run"))
    looped = RunStore.open(str(tmp_path / "run"))
    columns = ["trace_id", "signal", "score", "second_score", "advantage", "reason"]
    ours, theirs = (s.read_table("traces").select(columns).to_pylist() for s in (served[name], looped))
    assert len(ours) == len(theirs) > 60
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4, nan_ok=True), row["trace_id"]
    assert served[name].versions() == looped.versions()
    last = looped.versions()[-1]
    found, expected = (store.read_adapter(last)[0] for store in (served[name], looped))
    assert max(np.abs(found[key] - expected[key]).max() for key in expected) <= 1e-5
    if name == "reward":
        weights, others = served[name].read_reward(), looped.read_reward()
        assert max(np.abs(weights[key] - others[key]).max() for key in others) <= 1e-5


def test_two_training_workers_give_the_losses_of_one(served: dict[str, RunStore]) -> None:
    one, two = (
        [
            {key: row[key] for key in row if key != "time"}
            for row in served[name].read_metrics("train")
            if not row["round"]
        ]
        for name in ("certainty", "two_workers")
    )
    assert len(one) == len(two) >= 2
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
