"""Trains the rounds of a run, in as few calls of `TorchTrainer.fit()` as its workers' failures allow."""

from __future__ import annotations

import json
import logging
import math
import time
from typing import Any

from actors.job import Job
from rlsf_ray.run_store import RunStore
from rlsf_ray.storage import Storage

LAG_S = 5.0  # the coordinator notes a checkpoint after Ray Train has it
logger = logging.getLogger(__name__)

FAILURES = 3  # of the workers, after which a round that has not ended is given up; of spot nodes Ray allows any number


class TrainDriver:
    """`fit()` has no public cancel: killing this actor is the hard way to stop it."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name

    def fit(self) -> None:
        """Train every round that is left. Returns when the last is committed, or the buffer was closed.

        Raises `ray.train.TrainingFailedError` where workers failed too often without ending a round.
        """
        import ray.train

        store = self._job.enter(self._name)
        mend_index(store.storage, self._job.run)
        while True:
            before = rounds_ended(store)
            try:
                self._trainer(store).fit()
                return
            except ray.train.TrainingFailedError as error:
                time.sleep(LAG_S)
                if (ended := rounds_ended(store)) == before:
                    raise
                if ended >= store.config.rounds:  # it went back meanwhile: nothing is left to train
                    return
                logger.warning("training goes on after round %d: its workers failed too often: %s", ended, error)

    def _trainer(self, store: RunStore) -> Any:
        """A new training job from the run's last checkpoint on."""
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        from actors.trainer import WAIT_S
        from actors.training_job import Commit, train_fn

        pool = store.config.cluster.trainers
        return TorchTrainer(
            train_fn,
            train_loop_config={"job": self._job},
            # longer than rank 0 waits for anyone, so that its own error comes first and says who was silent
            torch_config=TorchConfig(timeout_s=math.ceil(store.config.cluster.deadline_s + 2 * WAIT_S)),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(pool.count, pool.most) if pool.most else pool.count,
                use_gpu=bool(pool.gpus),
                resources_per_worker={
                    "CPU": pool.cpus,
                    **({"GPU": pool.gpus} if pool.gpus else {}),
                    **self._job.marks.get("trainers", {}),
                },
            ),
            run_config=ray.train.RunConfig(
                name=self._job.run,  # the same run finds its checkpoints again
                storage_path=store.storage.key("checkpoints"),
                storage_filesystem=store.storage.arrow(),
                failure_config=ray.train.FailureConfig(max_failures=FAILURES),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                callbacks=[Commit(self._job)],
            ),
        )


def keep_index(storage: Storage, run: str) -> None:
    """Copy Ray Train's list of checkpoints, which is whole now."""
    if (data := storage.read(_index(run))) is not None:
        storage.write(f"{_index(run)}.copy", data)


def mend_index(storage: Storage, run: str) -> None:
    """Put the copy in the place of a list that a crash has cut short; else Ray Train would start no more."""
    data = storage.read(_index(run))
    if data is None:
        return
    try:
        json.loads(data)
    except ValueError:
        copy = storage.read(f"{_index(run)}.copy")
        logger.warning(
            "%s was only half written: %s", storage.path(_index(run)), "its copy" if copy else "none is kept"
        )
        if copy:
            storage.write(_index(run), copy)
        else:  # it was the first
            storage.remove(_index(run))


def _index(run: str) -> str:
    """Ray Train's list of a run's checkpoints (2.60), which it writes by truncating the old one."""
    return f"checkpoints/{run}/checkpoint_manager_snapshot.json"


def rounds_ended(store: RunStore) -> int:
    """As the coordinator has noted them."""
    return len((store.read_json("state.json") or {}).get("ended", ()))
