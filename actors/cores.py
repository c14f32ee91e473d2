"""One computation at a time on the cores of a node, where actors use all of them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlsf_ray.config import PoolConfig


@contextmanager
def cores(pool: PoolConfig) -> Iterator[None]:
    """Compute alone among the actors of this node that use every core; at the end, free memory goes back to the system.

    Two teams of as many threads as there are cores wait for each other at every operation: side by side they took
    1.7 times as long as one after the other (benchmarks/results/log.md). Nothing is held on a GPU, or where the
    config divides the cores (`threads`). The lock of a dead process is free; a holder that hangs is found by the
    coordinator's deadline.
    """
    if pool.gpus or pool.threads:
        yield
        return
    path = Path(tempfile.gettempdir(), f"rlsf-cores-{os.getuid()}.lock")
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        _give_memory_back()


def _give_memory_back() -> None:
    """What malloc keeps for later would add up over the actors, whose peaks come one after the other."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
