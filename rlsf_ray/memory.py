"""How much memory a process and everything it has started really use."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType


class PeakMemory:
    """Samples the sum of PSS over this process and its descendants in a thread; `peak_gb` is the largest so far.

    PSS shares out pages that several processes map, so the sum counts each page once. Linux only; elsewhere it stays 0.
    """

    def __init__(self, every_s: float = 3.0) -> None:
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)
        self.peak_gb = 0.0

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.peak_gb = max(self.peak_gb, tree_pss_bytes(os.getpid()) / 1e9)
            if self._stop.wait(self._every_s):
                return


def tree_pss_bytes(root: int) -> int:
    """Sum of PSS over process `root` and its descendants now."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        children.setdefault(_parent(folder), []).append(int(folder.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += _pss_bytes(process)
        waiting += children.get(process, [])
    return total


def _parent(folder: Path) -> int:
    """The parent's id; 0 for a process that has just ended."""
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def _pss_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # ended, or not ours
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
