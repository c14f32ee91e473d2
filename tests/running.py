"""Helpers for tests that run on a real Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.util import list_named_actors, placement_group_table


def wait_for(condition: Callable[[], Any], seconds: float = 180.0, life: Future[Any] | None = None) -> Any:
    """The first true value of `condition`, looked at every 0.1 s. Raises what ended the run `life`, if it is over."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        if life is not None and life.done():
            raise AssertionError(f"the run is over: {life.result()}")
        assert time.monotonic() < until, f"nothing within {seconds} s"
        time.sleep(0.1)
    return value


def alive(run_name: str) -> list[str]:
    """Named actors of a run that are alive."""
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith(f"{run_name}/")]


def standing_groups() -> int:
    """Placement groups that are not removed."""
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def free_cpus() -> float:
    """Logical CPUs that nobody holds."""
    return float(ray.available_resources().get("CPU", 0.0))


def our_processes(matches: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Those below this process that match; one that ends meanwhile does not."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if matches(process):
                found.append(process)
    return found


def training_workers() -> list[int]:
    """The processes of the training workers of this Ray."""
    found = our_processes(lambda process: "RayTrainWorker" in " ".join(process.cmdline()))
    return sorted(process.pid for process in found)


def training_worker() -> int:
    """The process of the only one."""
    (worker,) = training_workers()
    return worker
