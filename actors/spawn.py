"""Creates and removes the actors of a run. The only place that applies `ray.remote`."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.evaluator import Evaluator
from actors.generator import Generator
from actors.job import NAMESPACE, Job
from actors.leftovers import free_left_groups
from actors.nodes import leaving
from actors.pair_buffer import PairBuffer
from actors.pool import Hands
from actors.scorer import ScorerWorker
from actors.scorers import CROWDED
from actors.train_driver import TrainDriver
from actors.weight_store import WeightStore
from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import PoolConfig
from rlsf_ray.errors import DeadlineError

LOOK_S = 60.0  # for every node to answer one question
ON_HEAD = {"node:__internal_head__": 0.001}  # what only steers must not keep a worker node from being given back
MOST_SLOTS = {"transformers": 1, "vllm": 4}  # batches that a generator works on at once
BESIDE = 100  # calls that the buffer must hear while every batch waits in it

# Phases overlap on few cores: idle OpenMP threads may spin for a moment only (with none at all generation loses a
# third of its speed). With these two thresholds malloc gives large blocks back, at no cost in speed (measured in
# benchmarks/results/log.md; few arenas instead cost a fifth). The rest is for Ray Train: report to the controller
# every 0.2 s instead of 2 s, and do without the watcher for preempted nodes.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def spawn_coordinator(job: Job, environment: dict[str, str]) -> Any:
    """The detached coordinator of a run, or the one that is there already. It outlives the driver."""
    from actors.coordinator import Coordinator

    options = {
        "name": f"{job.run}/coordinator",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": ON_HEAD,
        "max_concurrency": 200,
        "runtime_env": {"env_vars": {**ENVIRONMENT, **environment}},  # its children inherit it
    }
    return ray.remote(Coordinator).options(**options).remote(job)


def most_batches(config: RunConfig) -> int:
    """How many batches may be on their way at once: at every generator as many as it takes and one that comes next, at
    every scorer as many as make it crowded.
    """
    generators, scorers = config.cluster.generators.at_most, config.cluster.scorers.at_most
    return (MOST_SLOTS[config.engine] + 1) * generators + CROWDED * scorers


class Crew:
    """Every actor of one run but the coordinator, which owns them: they die with it."""

    def __init__(self, job: Job, config: RunConfig) -> None:
        self._job = job
        self._cluster = config.cluster
        batches = most_batches(config)
        waiting = batches * config.cluster.attempts  # a call to the buffer outlives the scorer that made it
        steering: Any = {"pool": PoolConfig(), "resources": ON_HEAD}
        self.weights = self._spawn(WeightStore, "weight_store", **steering)
        self.buffer = self._spawn(PairBuffer, "pair_buffer", max_concurrency=waiting + BESIDE, **steering)
        self.evaluator = self._spawn(Evaluator, "evaluator", **steering)
        self.driver = self._spawn(TrainDriver, "train_driver", **steering)
        slots = MOST_SLOTS[config.engine]
        calls = slots + 1 if slots > 1 else 1  # with vLLM a version is loaded beside them
        self._calls = {"generators": calls, "scorers": batches + 1}  # all may meet at one scorer, which answers
        self.generators = self._pool(Generator, "generators")
        self.scorers = self._pool(ScorerWorker, "scorers")

    def _pool(self, cls: type, pool: str) -> dict[str, Any]:
        """The actors of a pool by name."""
        names = [f"{pool.removesuffix('s')}-{index}" for index in range(getattr(self._cluster, pool).count)]
        return {name: self._member(cls, pool, name) for name in names}

    def _member(self, cls: type, pool: str, name: str) -> Any:
        """One actor of a pool. Ray restarts it as often as it dies (it would keep the name of one that it lets go); how
        often that may be is the pool's to say.
        """
        resources = dict(self._job.marks.get(pool, {}))
        settings: PoolConfig = getattr(self._cluster, pool)
        calls = self._calls[pool]
        return self._spawn(cls, name, pool=settings, resources=resources, max_restarts=-1, max_concurrency=calls)

    def hands(self, pool: Literal["generators", "scorers"]) -> Hands:
        """What a pool may do; Ray's autoscaler sees an actor that waits for a node, if it takes something."""
        cls = Generator if pool == "generators" else ScorerWorker
        return Hands(
            ask=lambda name: self._member(cls, pool, name),
            end=lambda handle, restarts: ray.kill(handle, no_restart=not restarts),
            leaving=leaving,
        )

    def _spawn(self, cls: type, name: str, *, pool: PoolConfig, **options: Any) -> Any:
        name_and_place = {"name": f"{self._job.run}/{name}", "namespace": NAMESPACE}
        takes = {"num_cpus": pool.cpus, "num_gpus": pool.gpus or 0.0}
        return ray.remote(cls).options(**name_and_place, **takes, **options).remote(self._job, name)

    def stop_generating(self) -> None:
        """End the generators and scorers, whose work nobody waits for any more: the trainer gets their cores."""
        for handle in (*self.generators.values(), *self.scorers.values()):
            ray.kill(handle)

    async def dismiss(self, seconds: float, *, leaves_group: bool) -> None:
        """Kill every actor; returns when their names are gone, or after `seconds`.

        `leaves_group`: the trainer is killed in its work, and what it leaves is freed once Ray has seen its death.
        """
        singles = {"weight_store": self.weights, "pair_buffer": self.buffer, "evaluator": self.evaluator}
        everyone = {"train_driver": self.driver, **singles, **self.generators, **self.scorers}
        for handle in everyone.values():
            ray.kill(handle)
        until = asyncio.get_running_loop().time() + seconds
        names = {f"{self._job.run}/{name}" for name in everyone}
        while asyncio.get_running_loop().time() < until:
            if leaves_group and free_left_groups():
                leaves_group = False
            if not leaves_group and not names & set(ray.util.list_named_actors()):
                return
            await asyncio.sleep(0.1)


def nodes_without(path: str) -> list[str]:
    """Addresses of the nodes that do not see the file `path`. Raises DeadlineError naming those that do not say."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    look = ray.remote(num_cpus=0)(os.path.exists)
    found = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(path)
        for node in nodes
    ]
    _, late = ray.wait(found, num_returns=len(found), timeout=LOOK_S)
    addresses = [node["NodeManagerAddress"] for node in nodes]
    if late:
        silent = [address for address, answer in zip(addresses, found, strict=True) if answer in late]
        raise DeadlineError(
            f"{', '.join(silent)} did not look for {path} within {LOOK_S:g} s; check with `ray status` that these nodes"
            " are alive and can start a task"
        )
    return [address for address, seen in zip(addresses, ray.get(found), strict=True) if not seen]
