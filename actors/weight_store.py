"""Owns every published version, so that weights outlive the worker that trained them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from actors.job import Job
from rlsf_ray.adapters import CANARY_FILE, canaries_from_bytes, checksum, from_peft
from rlsf_ray.errors import WeightsError
from rlsf_ray.records import Canary, Json, WeightsVersion
from rlsf_ray.run_store import TRAINED_FILE

ADAPTER_FILE = "adapter_model.safetensors"  # in a checkpoint


class WeightStore:
    """Versions on storage, the newest few also as numpy arrays in the object store."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._held: dict[int, tuple[WeightsVersion, Any]] = {}

    def prepare(self) -> None:
        self._store = self._job.enter(self._name)

    def publish(self, record: Json, boxed: list[Any]) -> WeightsVersion:
        """Make the adapter of a committed checkpoint a version. Doing it again changes nothing.

        Raises WeightsError if the adapter is not what the trainer said, or if the version is known with other content.
        """
        with boxed[0].as_directory() as folder:
            adapter = from_peft((Path(folder) / ADAPTER_FILE).read_bytes())
            files = [Path(folder) / name for name in (CANARY_FILE, TRAINED_FILE)]
            canaries, trained = (file.read_bytes() if file.exists() else b"" for file in files)  # none in an older run
        config = self._store.config
        weights = self._store.write_adapter(record["version"], adapter, config.model.name, config)
        if weights.checksum != record["checksum"]:
            raise WeightsError(
                f"the checkpoint of round {record['round']} holds an adapter with checksum {weights.checksum}, expected"
                f" {record['checksum']} as the trainer reported; the checkpoint changed on storage"
            )
        if canaries:
            self._store.storage.write(_canary_file(record["version"]), canaries)
        if trained:
            self._store.storage.write(f"versions/{record['version']:04d}/{TRAINED_FILE}", trained)
        self._hold(weights, adapter, canaries_from_bytes(canaries))
        return weights

    def publish_reward(self, record: Json, boxed: list[Any]) -> None:
        """Keep the reward model of a committed checkpoint. Raises WeightsError if it is not what the trainer said."""
        with boxed[0].as_directory() as folder:
            weights = from_peft((Path(folder) / ADAPTER_FILE).read_bytes())
        if checksum(weights) != record["checksum"]:
            raise WeightsError(
                f"the checkpoint of round {record['round']} holds a reward model with checksum {checksum(weights)},"
                f" expected {record['checksum']} as the trainer reported; the checkpoint changed on storage"
            )
        self._store.write_reward(weights, record["round"])

    def roll_back(self, to: int, past: int | None, share: float, known: int) -> int:
        """Publish what lies between two versions as one that is newer than all others; returns its number.

        `known`: the newest that the run has noted. Where a crash kept it from noting this one, it is that.
        """
        config, newest = self._store.config, self._store.versions()[-1]
        adapter = self._store.read_between(to, past, share)
        made = newest > known and self._store.read_adapter(newest)[1].checksum == checksum(adapter)
        weights = self._store.write_adapter(newest if made else newest + 1, adapter, config.model.name, config)
        self._hold(weights, adapter, [])
        return weights.version

    def get(self, version: int) -> tuple[WeightsVersion, int, list[Any]]:
        """(name and checksum, the version before it, [reference of (adapter, canaries)]).

        Raises WeightsError for an unknown version.
        """
        if version not in self._held:
            adapter, weights = self._store.read_adapter(version)
            self._hold(weights, adapter, canaries_from_bytes(self._store.storage.read(_canary_file(version)) or b""))
        weights, reference = self._held[version]
        before = max((known for known in self._store.versions() if known < version), default=0)
        return weights, before, [reference]

    def _hold(self, weights: WeightsVersion, adapter: Any, canaries: list[Canary]) -> None:
        self._held[weights.version] = (weights, ray.put((adapter, canaries)))
        for old in sorted(self._held)[: -(self._store.config.cluster.max_staleness + 2)]:
            if old != weights.version:
                del self._held[old]


def _canary_file(version: int) -> str:
    return f"versions/{version:04d}/{CANARY_FILE}"
