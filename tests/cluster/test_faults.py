"""Runs that are disturbed: killed actors, a drain, a full disk, no pairs at all, other source."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray
from advantage_runs import REWARD
from running import alive, free_cpus, our_processes, standing_groups, training_worker, training_workers, wait_for
from tiny import tiny_config

from actors.job import NAMESPACE, Job, source_hash
from actors.spawn import spawn_coordinator
from rlsf_ray import loop, operate
from rlsf_ray.config import RunConfig
from rlsf_ray.errors import DrainedError, InputError, NoPairsError, ServiceError, StorageError
from rlsf_ray.placement import NO_GPUS
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.limits import NO_LIMITS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]

Launch = Callable[[RunConfig, Path], "Future[Json]"]


def test_a_killed_generator_and_a_drain_change_nothing_in_the_result(
    launch: Launch, small: Callable[..., RunConfig], cluster: int, tmp_path: Path
) -> None:
    all_cores = {role: {"threads": 0} for role in ("generators", "scorers", "trainers")}
    config = small(rounds=3, cluster={"prompts_per_call": 2, **all_cores}, data={"probe": []})
    life = launch(config, tmp_path / "disturbed")
    wait_for(lambda: "disturbed/generator-0" in alive("disturbed"), life=life)
    ray.kill(ray.get_actor("disturbed/generator-0", namespace=NAMESPACE), no_restart=False)
    wait_for(lambda: operate.status("disturbed")["steps"] > 2, life=life)
    operate.stop("disturbed")
    with pytest.raises(DrainedError, match="the same command resumes it"):
        life.result()
    assert RunStore.open(str(tmp_path / "disturbed")).read_json("state.json")["state"] == "drained"
    wait_for(lambda: not alive("disturbed") and standing_groups() == 0 and free_cpus() == cluster, 20)

    summary = launch(config, tmp_path / "disturbed").result()
    _equals_the_loop(summary, config, tmp_path / "disturbed", tmp_path / "loop")


def test_a_killed_scorer_and_a_killed_training_worker_change_nothing_in_the_result(
    launch: Launch, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(rounds=3, cluster={"prompts_per_call": 2}, data={"probe": []})
    life = launch(config, tmp_path / "killed")
    wait_for(lambda: "killed/scorer-0" in alive("killed"), life=life)
    wait_for(lambda: operate.status("killed")["traces"] > 0, life=life)
    ray.kill(ray.get_actor("killed/scorer-0", namespace=NAMESPACE), no_restart=False)
    wait_for(lambda: operate.status("killed")["version"] == 1, life=life)
    os.kill(training_worker(), signal.SIGKILL)
    _equals_the_loop(life.result(), config, tmp_path / "killed", tmp_path / "loop")


def test_kills_while_a_reward_model_is_trained_and_while_it_judges_change_nothing_in_the_result(
    launch: Launch, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(data={"probe": []}, **REWARD | {"rounds": 4, "reward_model": REWARD["reward_model"] | {"rounds": 2}})
    life = launch(config, tmp_path / "rewarded")
    reward = tmp_path / "rewarded/reward"
    wait_for((reward / "round-0000.json").exists, life=life)
    os.kill(training_worker(), signal.SIGKILL)
    wait_for((reward / "round-0001.json").exists, life=life)
    wait_for(lambda: operate.status("rewarded")["version"] > 0, life=life)
    ray.kill(ray.get_actor("rewarded/scorer-0", namespace=NAMESPACE), no_restart=False)  # it held the reward model
    _equals_the_loop(life.result(), config, tmp_path / "rewarded", tmp_path / "loop")
    ours, theirs = (RunStore.open(str(tmp_path / name)).read_reward(1) for name in ("rewarded", "loop"))
    assert max(np.abs(ours[name] - theirs[name]).max() for name in theirs) <= 1e-5


def test_a_scorer_that_dies_while_it_waits_for_room_loses_nothing(
    launch: Launch, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(rounds=3, cluster={"prompts_per_call": 4, "buffer_groups": 1}, data={"probe": []})
    life = launch(config, tmp_path / "waiting")
    wait_for((tmp_path / "waiting/groups/round-0000/part-00000.parquet").exists, life=life)
    assert operate.status("waiting")["traces"] == 0  # the first batch waits: the trainer has not begun
    ray.kill(ray.get_actor("waiting/scorer-0", namespace=NAMESPACE), no_restart=False)
    _equals_the_loop(life.result(), config, tmp_path / "waiting", tmp_path / "loop")


def test_a_buffer_that_stays_empty_for_longer_than_the_collective_timeout_ends_nothing(
    launch: Launch, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(cluster={"trainers": {"count": 2}, "deadline_s": 45.0}, data={"probe": []})
    life = launch(config, tmp_path / "idle")
    wait_for(lambda: "idle/generator-0" in alive("idle"), life=life)
    wait_for(lambda: "fleet" in operate.status("idle"), life=life)  # the run goes on: it takes orders
    operate.pause("idle")
    workers = wait_for(lambda: len(found := training_workers()) == 2 and found, life=life)
    time.sleep(70.0)  # the collectives' time-out is 55 s
    assert operate.status("idle")["steps"] == 0
    operate.resume("idle")
    wait_for(lambda: operate.status("idle")["steps"] > 0, life=life)
    assert training_workers() == workers
    counts = life.result()["accounting"]
    assert counts["trained"] > 0
    assert counts["admitted"] == counts["trained"] + counts["filtered"] == 16


def test_a_straggler_is_waited_for(launch: Launch, small: Callable[..., RunConfig], tmp_path: Path) -> None:
    two = {"count": 2, "cpus": 0.5, "threads": 1}
    config = small(rounds=3, cluster={"prompts_per_call": 2, "generators": two}, data={"probe": []})
    life = launch(config, tmp_path / "slow")
    wait_for(lambda: "slow/generator-1" in alive("slow"), life=life)
    wait_for(lambda: operate.status("slow")["version"] == 1, life=life)
    straggler = our_processes(lambda process: "ray::Generator" in " ".join(process.cmdline()))[0]
    straggler.suspend()
    time.sleep(10.0)
    straggler.resume()
    _equals_the_loop(life.result(), config, tmp_path / "slow", tmp_path / "loop")


def _equals_the_loop(summary: Json, config: RunConfig, root: Path, loop_root: Path) -> None:
    """The run at `root` has the pairs, the adapter and the accounting of an undisturbed run of the loop."""
    loop.run(config, str(loop_root))
    ours, theirs = RunStore.open(str(root)), RunStore.open(str(loop_root))
    assert ours.read_table("pairs").to_pylist() == theirs.read_table("pairs").to_pylist()
    assert ours.versions() == theirs.versions()
    last = theirs.versions()[-1]
    adapter, expected = ours.read_adapter(last)[0], theirs.read_adapter(last)[0]
    assert last >= 2
    assert max(np.abs(adapter[name] - expected[name]).max() for name in expected) <= 1e-6
    assert summary["accounting"] == theirs.read_json("summary.json")["accounting"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_was_committed_and_the_run_goes_on_once_there_is_room(
    launch: Launch, small: Callable[..., RunConfig], small_disk: Path
) -> None:
    config, root = small(rounds=3, data={"probe": []}), small_disk / "full"
    life = launch(config, root)
    wait_for(lambda: (root / "versions/0001/version.json").exists(), life=life)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 10))
    with pytest.raises(StorageError, match=r"no (room|space left).*(free|Free) space"):
        life.result()
    wait_for(lambda: not alive("full"))
    assert RunStore.open(str(root)).read_adapter(1)
    filler.unlink()
    assert launch(config, root).result()["accounting"]["admitted"] == 24
    assert RunStore.open(str(root)).versions() == [1, 2, 3]


def test_two_runs_in_one_folder_are_refused(launch: Launch, small: Callable[..., RunConfig], tmp_path: Path) -> None:
    """As two runs embedded in two processes would be: their coordinators do not know of each other."""
    config = small(data={"probe": []})
    store = RunStore.create_or_resume(str(tmp_path / "shared"), config)
    with store.storage.lock(), pytest.raises(InputError, match="another run works in"):
        launch(config, tmp_path / "shared").result()
    assert store.read_json("state.json") is None


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
    job = Job(run="mixed", root=str(tmp_path / "mixed"), source=source_hash(), gpus=NO_GPUS)
    coordinator = spawn_coordinator(job, {"PYTHONPATH": os.getcwd()})
    with pytest.raises(ServiceError, match="other source than the driver: expected 0000"):
        ray.get(coordinator.start.remote("0" * 64, NO_LIMITS, None))
    ray.kill(coordinator)


def test_a_cluster_that_is_too_small_is_refused_before_anything_starts(
    launch: Launch, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(cluster={"generators": {"gpus": 4}})
    with pytest.raises(InputError, match="4 GPU needed"):
        launch(config, tmp_path / "large").result()
    assert alive("large") == []
