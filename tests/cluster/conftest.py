"""One local Ray for each file of cluster tests."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from tiny import tiny_config

from actors.job import NAMESPACE
from rlsf_ray import service
from rlsf_ray.config import RunConfig
from rlsf_ray.records import Json

CPUS = 12  # logical: several runs stand side by side


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Ray of the file's own, gone before other tests connect; its number of logical CPUs."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp() / "cache")  # as in ../conftest.py
    ray.init("local", namespace=NAMESPACE, num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    yield CPUS
    ray.shutdown()


@pytest.fixture(scope="session")
def small(tiny: Path) -> Callable[..., RunConfig]:
    """tiny_config over the session's model with changes."""

    def make(**changes: Any) -> RunConfig:
        return tiny_config(tiny, **changes)

    return make


@pytest.fixture(scope="module")
def launch(cluster: int) -> Iterator[Callable[[RunConfig, Path], "Future[Json]"]]:
    """Begin a run in the folder given, which also names it; its future has the summary or the error."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        yield lambda config, root: threads.submit(service.run, config, root=str(root), run_name=root.name)
