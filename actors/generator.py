"""Writes groups with an engine, each call pinned to a version of the weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.cores import cores, give_memory_back
from actors.job import Job, device, event
from rlsf_ray.errors import WeightsError
from rlsf_ray.records import Group, Json, Prompt, WeightsVersion
from rlsf_ray.rollouts.programs import write_groups, write_probe_groups


class Generator:
    """One engine. Its methods run one after the other, so a version is swapped between two batches."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._engine: Any = None
        self._versions: list[int] = []

    def prepare(self, version: int) -> None:
        """Build the engine and load `version`."""
        self.load_version(version)

    def _build(self) -> None:
        """Build the engine if there is none: at the first call, or at the first call after a restart."""
        if self._engine is None:
            from rlsf_ray.engines.transformers_engine import TransformersEngine

            store = self._job.enter(self._name, threads=0)
            self._config = store.config
            pool = self._config.cluster.generators
            self._engine = TransformersEngine(
                self._config.model, self._config.learner, threads=pool.threads, device=device(pool)
            )

    def load_version(self, version: int) -> None:
        """Fetch `version` from the WeightStore and prove that the engine holds it.

        Every batch begins here, so a generator that Ray restarted while nobody watched comes back by itself.
        Raises WeightsError if what the engine holds is not what was published.
        """
        self._build()
        if version == 0 or version in self._versions:
            return
        deadline_s = self._config.cluster.deadline_s
        weights, boxed = ray.get(self._job.actor("weight_store").get.remote(version), timeout=deadline_s)
        self._load(weights, ray.get(boxed[0], timeout=deadline_s))

    def _load(self, weights: WeightsVersion, adapter: Any) -> None:
        held = self._engine.load_version(weights.version, adapter)
        if held != weights.checksum:
            raise WeightsError(
                f"{self._name} loaded version {weights.version} with checksum {held}, expected {weights.checksum};"
                " the weights changed on their way, run the same command again"
            )
        others = sorted({*self._versions} - {weights.version})[-(self._config.cluster.max_staleness + 1) :]
        self._versions = [*others, weights.version]
        self._engine.forget_versions(min(self._versions))

    def write(
        self, prompts: Sequence[Prompt], round: int, first_sequence: int, version: int
    ) -> tuple[list[Group], Json]:
        """(groups, stage event) for one batch of training prompts."""
        self.load_version(version)
        with cores(self._config.cluster.generators):
            start = time.time()
            groups = write_groups(
                self._engine, prompts, config=self._config, round=round, first_sequence=first_sequence, version=version
            )
            done = event("generator", self._name, "generate", round, start, num_tokens(groups))
            give_memory_back()
        return groups, done

    def probe(
        self, prompts: Sequence[Prompt], first_sequence: int, version: int
    ) -> tuple[tuple[list[Group], list[Group]], Json]:
        """((sampled, greedy), stage event) for one batch of probe prompts."""
        self.load_version(version)
        with cores(self._config.cluster.generators):
            start = time.time()
            groups = write_probe_groups(
                self._engine, prompts, config=self._config, version=version, first_sequence=first_sequence
            )
            tokens = sum(num_tokens(part) for part in groups)
            done = event("generator", self._name, "probe", max(0, version - 1), start, tokens)
            give_memory_back()
        return groups, done


def num_tokens(groups: Sequence[Group]) -> int:
    """Tokens written."""
    return sum(len(trace.token_ids) for group in groups for trace in group.traces)
