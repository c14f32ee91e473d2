"""Folders for an engine's files that are as large as a model, and must not pile up when processes are killed."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

PREFIX, LOCK = "rlsf-versions-", ".lock"


class Scratch:
    """A folder below the system's for temporary files. Those that killed processes have left there go first.

    A living owner holds a lock in its folder, which the system takes back with the process.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with suppress(OSError):  # somebody else's, or gone meanwhile
                _lock(left / LOCK).close()
                shutil.rmtree(left)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        young = self.path / f"{LOCK}.young"
        young.touch()
        self._held = _lock(young)
        young.rename(self.path / LOCK)  # nobody can take it between making and locking

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._held.close()


def _lock(path: Path) -> IO[bytes]:
    """A lock on `path`, held while the file is open. Raises OSError if another process has it, or there is no file."""
    file = path.open("r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file
