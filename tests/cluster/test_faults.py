"""Runs that are disturbed: a killed generator, a drain, no pairs at all, other source."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import ray
from running import alive, free_cpus, standing_groups, wait_for
from tiny import tiny_config

from actors.job import NAMESPACE, Job, source_hash
from actors.spawn import spawn_coordinator
from rlsf_ray import loop, service
from rlsf_ray.config import RunConfig
from rlsf_ray.errors import DrainedError, InputError, NoPairsError, ServiceError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]

Launch = Callable[[RunConfig, Path], "Future[Json]"]


def test_a_killed_generator_and_a_drain_change_nothing_in_the_result(
    launch: Launch, small: Callable[..., RunConfig], cluster: int, tmp_path: Path
) -> None:
    config = small(rounds=3, cluster={"prompts_per_call": 2}, data={"probe": []})
    life = launch(config, tmp_path / "disturbed")
    wait_for(lambda: "disturbed/generator-0" in alive("disturbed"))
    ray.kill(ray.get_actor("disturbed/generator-0", namespace=NAMESPACE), no_restart=False)
    wait_for(lambda: service.status("disturbed")["steps"] > 2)
    service.stop("disturbed")
    with pytest.raises(DrainedError, match="the same command resumes it"):
        life.result()
    assert RunStore.open(str(tmp_path / "disturbed")).read_json("state.json")["state"] == "drained"
    wait_for(lambda: not alive("disturbed") and standing_groups() == 0 and free_cpus() == cluster, 20)

    summary = launch(config, tmp_path / "disturbed").result()
    loop.run(config, str(tmp_path / "loop"))
    ours, theirs = RunStore.open(str(tmp_path / "disturbed")), RunStore.open(str(tmp_path / "loop"))
    assert ours.read_table("pairs").to_pylist() == theirs.read_table("pairs").to_pylist()
    assert ours.versions() == theirs.versions() == [1, 2, 3]
    adapter, expected = ours.read_adapter(3)[0], theirs.read_adapter(3)[0]
    assert max(np.abs(adapter[name] - expected[name]).max() for name in expected) <= 1e-6
    assert summary["accounting"] == theirs.read_json("summary.json")["accounting"]


def test_a_run_without_pairs_ends_with_the_reasons_counted(
    launch: Launch, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(pairs={"rule": "best_worst", "min_chosen": 2.0}, data={"probe": []})  # no score is above 1
    with pytest.raises(NoPairsError, match=r"below_min_chosen: \d+"):
        launch(config, tmp_path / "no_pairs").result()
    state = RunStore.open(str(tmp_path / "no_pairs")).read_json("state.json")
    assert (state["state"], state["version"], state["ended"]) == ("failed", 0, [[0, None], [1, None]])
    wait_for(lambda: not alive("no_pairs"))


def test_a_model_that_does_not_load_ends_the_run_with_the_engine_s_own_error(launch: Launch, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "nothing", data={"probe": []})
    with pytest.raises(InputError, match="model folder not found"):
        launch(config, tmp_path / "no_model").result()
    wait_for(lambda: not alive("no_model") and standing_groups() == 0, 30)


def test_a_driver_of_other_source_is_refused(small: Callable[..., RunConfig], cluster: int, tmp_path: Path) -> None:
    RunStore.create_or_resume(str(tmp_path / "mixed"), small())
    job = Job(run="mixed", root=str(tmp_path / "mixed"), source=source_hash())
    coordinator = spawn_coordinator(job, {"PYTHONPATH": os.getcwd()})
    with pytest.raises(ServiceError, match="other source than the driver: expected 0000"):
        ray.get(coordinator.start.remote("0" * 64))
    ray.kill(coordinator)


def test_a_cluster_that_is_too_small_is_refused_before_anything_starts(
    launch: Launch, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(cluster={"generators": {"gpus": 4}})
    with pytest.raises(InputError, match="4 GPU needed"):
        launch(config, tmp_path / "large").result()
    assert alive("large") == []
