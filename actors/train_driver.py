"""Holds the one `TorchTrainer.fit()` of a run."""

from __future__ import annotations

from actors.job import Job


class TrainDriver:
    """`fit()` has no public cancel: killing this actor is the hard way to stop it."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name

    def fit(self) -> None:
        """Train every round that is left. Returns when the last is committed, or the buffer was closed."""
        import ray.train
        from ray.train.torch import TorchTrainer

        from actors.training_job import Commit, train_fn

        store = self._job.enter(self._name)
        pool = store.config.cluster.trainers
        TorchTrainer(
            train_fn,
            train_loop_config={"job": self._job},
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
                failure_config=ray.train.FailureConfig(max_failures=3),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                callbacks=[Commit(self._job)],
            ),
        ).fit()
