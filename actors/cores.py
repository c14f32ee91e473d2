"""The cores and the memory of a node, which the actors share where each of them uses all cores."""

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
    """Compute alone among the actors of this node that use every core.

    Two teams of as many threads as there are cores wait for each other at every operation: side by side, steps took
    5.7 s instead of 2.4 s while generation ran at under two thirds of its speed (benchmarks/results/log.md). Nothing
    is held on a GPU, or where the config divides the cores (`threads`). The lock of a dead process is free; a holder
    that hangs is found by the coordinator's deadline.
    """
    if pool.gpus or pool.threads:
        yield
        return
    path = Path(tempfile.gettempdir(), f"rlsf-cores-{os.getuid()}.lock")
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def give_memory_back() -> None:
    """Hand free memory back to the system at the end of a batch or round.

    What malloc keeps for later would add up over the actors, whose peaks come one after the other. Not for each
    optimiser step: that made steps a tenth slower (benchmarks/results/log.md).
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
