"""What Ray Train is handed: the function of its workers, and word of each commit."""

from __future__ import annotations

import logging
from typing import Any

import ray
import ray.train

from actors.job import Job
from actors.train_driver import keep_index
from rlsf_ray.errors import DrainedError, RlsfError, StorageError
from rlsf_ray.records import Json
from rlsf_ray.storage import Storage

logger = logging.getLogger(__name__)

TELL_S = 60.0  # for the coordinator to hear of an error


class Commit(ray.train.UserCallback):
    """Tells the coordinator that a checkpoint is saved. Runs in Ray Train's controller.

    `ray.train.report` returns before the checkpoint is registered, so rank 0 cannot say this.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def after_report(self, run_context: Any, metrics: list[Json], checkpoint: Any) -> None:
        if checkpoint is not None:
            try:
                keep_index(Storage(self._job.root), self._job.run)
            except StorageError as error:  # what was trained is saved all the same
                logger.warning("no copy of the list of checkpoints: %s", error)
            self._job.actor("coordinator").committed.remote(metrics[0], [checkpoint])


def train_fn(settings: Json) -> None:
    """What each worker of the training job runs.

    A typed error goes to the coordinator, which ends the run; returning keeps Ray Train from trying three times more.
    """
    job: Job = settings["job"]
    from actors.trainer import Worker  # torch and the models' libraries: the driver and the controller need neither

    try:
        Worker(job).run()
    except DrainedError:
        return
    except RlsfError as error:
        ray.get(job.actor("coordinator").train_failed.remote(error), timeout=TELL_S)
