"""What every actor of a run knows at birth, and the few lines each of them needs to begin."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray

from rlsf_ray.config_sections import PoolConfig
from rlsf_ray.errors import ServiceError
from rlsf_ray.logs import setup_logging
from rlsf_ray.placement import placed
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

NAMESPACE = "rlsf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run: its name, its absolute root, the hash of the source that started it, each pool's GPUs and marks.

    The config lies at the root.
    """

    run: str
    root: str
    source: str
    gpus: Mapping[str, float]
    marks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # see placement.marks

    def actor(self, role: str) -> Any:
        """The handle of another actor of this run, by name."""
        return ray.get_actor(f"{self.run}/{role}", namespace=NAMESPACE)

    def enter(self, role: str, *, threads: int | None = None) -> RunStore:
        """Begin work in this process: logging, the source check, torch threads (0: all cores).

        Raises ServiceError if this process runs other source than the driver.
        """
        check_source(self.source, role)
        if threads is not None:
            import torch

            torch.set_num_threads(threads or os.cpu_count() or 1)
        store = RunStore.open(self.root)
        setup_logging(role, self.run, root=store.root if store.storage.local else None)
        store.config = placed(store.config, self.gpus)  # the GPUs of this life
        return store


def source_hash() -> str:
    """sha256 over every Python file of the two packages, as this process would import them."""
    digest = hashlib.sha256()
    for package in ("actors", "rlsf_ray"):
        spec = find_spec(package)
        assert spec, f"{package} is not importable"
        assert spec.origin
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def check_source(expected: str, where: str) -> None:
    """Raises ServiceError if the source here is not what the driver runs."""
    found = source_hash()
    if found != expected:
        raise ServiceError(
            f"{where} runs other source than the driver: expected {expected[:12]}, got {found[:12]}. Install the same"
            " rlsf-ray on every node (pip install the wheel and restart Ray), or submit with --working-dir so that Ray"
            " ships the source"
        )


def device(pool: PoolConfig) -> str:
    """Where an actor of `pool` computes. Ray does not hide the node's GPUs from an actor that asked for none."""
    return "cuda" if pool.gpus else "cpu"


def event(role: str, actor: str, stage: str, round: int, start: float, tokens: int = 0) -> Json:
    """One row of metrics/stages.jsonl for work that began at `start` (unix seconds) and ends now."""
    now = time.time()
    row: Json = {"time": now, "role": role, "actor": actor, "stage": stage, "round": round}
    return row | {"start": start, "end": now, "tokens": tokens}
