"""The cores and the memory of a node, which the actors share where each of them uses all cores."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from rlsf_ray.config_sections import PoolConfig

logger = logging.getLogger(__name__)

LATE_S = 60.0


class Cores:
    """One actor's turns at the cores of its node.

    Two teams of as many threads as there are cores wait for each other at every operation: side by side, steps took
    5.7 s instead of 2.4 s while generation ran at under two thirds of its speed (benchmarks/results/log.md). Nothing
    is held on a GPU, or where the config divides the cores (`threads`). The lock of a dead process is free; a wait that
    is long names the holder in the log, and ends with the coordinator's deadline for this actor's call.
    """

    def __init__(self, pool: PoolConfig) -> None:
        self._shared = bool(pool.gpus or pool.threads)
        self._mutex, self._inside, self._held = threading.Lock(), 0, ExitStack()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Compute alone among the actors of this node that use every core; calls of this actor share its turn."""
        if self._shared:
            yield
            return
        with self._mutex:
            if self._inside == 0:
                self._take()
            self._inside += 1
        try:
            yield
        finally:
            with self._mutex:
                self._inside -= 1
                if self._inside == 0:
                    self._held.close()

    def _take(self) -> None:
        path = Path(tempfile.gettempdir(), f"rlsf-cores-{os.getuid()}.lock")
        try:
            _lock(self._held.enter_context(path.open("a")), path)
        except OSError as error:  # it only makes things faster
            logger.warning("computing beside other actors: %s cannot be locked (%s)", path, error)


def _lock(file: IO[str], path: Path) -> None:
    """Wait for the lock on `file`, and write into it who has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        late = threading.Timer(LATE_S, _warn, (path,))
        late.start()
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        finally:
            late.cancel()
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()


def _warn(path: Path) -> None:
    logger.warning("waiting for the cores of this node for %g s; %s has them (%s)", LATE_S, path.read_text(), path)


def give_memory_back() -> None:
    """Hand free memory back to the system at the end of a batch or round.

    What malloc keeps for later would add up over the actors, whose peaks come one after the other. Not for each
    optimiser step: that made steps a tenth slower (benchmarks/results/log.md).
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
