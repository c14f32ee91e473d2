"""One logging set-up for every process, with role and run in each line; and reading these lines again.

Where the run directory is a local folder, `logs/<role>.jsonl` there holds them as JSON, a line each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlsf_ray.records import Json

FOLDER = "logs"
_ROOTS = ("rlsf_ray", "actors")
_FILE_BYTES = 20 << 20  # of one role; there may be one older file of it


class _Stderr(logging.Handler):
    """Writes to whatever standard error is at that moment: a live panel puts its own in place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _JsonLines(logging.Formatter):
    def __init__(self, role: str, run: str) -> None:
        super().__init__()
        self._who = {"role": role, "run": run}

    def format(self, record: logging.LogRecord) -> str:
        row: Json = {"time": record.created, "level": record.levelname, **self._who, "logger": record.name}
        row["message"] = record.getMessage()
        if record.exc_info:
            row["error"] = self.formatException(record.exc_info)
        return json.dumps(row)


def setup_logging(role: str, run: str, *, root: str | None = None, level: int = logging.INFO) -> None:
    """Send the project's log lines to standard error as `time level role run module: message`.

    With `root`, a local run directory, to its logs too. A log that cannot be written ends nothing. Only the loggers of
    this project are touched: the root logger belongs to whoever hosts the process. Calling this again replaces the
    earlier set-up, so a process that changes its role does not write a line twice.
    """
    stderr = _Stderr()
    who = f"{role} {run}".replace("%", "%%")
    stderr.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s [{who}] %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [stderr]
    if root is not None:
        with suppress(OSError):
            os.makedirs(f"{root}/{FOLDER}", exist_ok=True)
            handlers.append(_file(f"{root}/{FOLDER}/{role}.jsonl", role, run))
    for name in _ROOTS:
        logger = logging.getLogger(name)
        for old in [handler for handler in logger.handlers if handler.get_name() == "rlsf"]:
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            handler.set_name("rlsf")
            logger.addHandler(handler)
        logger.setLevel(level)


class _File(RotatingFileHandler):
    """Says once that it cannot write."""

    said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.said:
            self.said = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr, flush=True)


def _file(path: str, role: str, run: str) -> logging.Handler:
    if os.path.exists(path):
        with open(path, "ab") as file:
            file.write(b"\n")  # ends a line that a killed process has left torn
    handler = _File(path, maxBytes=_FILE_BYTES, backupCount=1, delay=True, encoding="utf-8")
    handler.setFormatter(_JsonLines(role, run))
    return handler


def roles(root: str) -> list[str]:
    """Who has logged in a local run directory."""
    return sorted({_role(path) for path in Path(root, FOLDER).glob("*.jsonl*")})


class Tail:
    """The kept lines of a local run directory, of one role or of all: at each call those that are new, oldest first."""

    def __init__(self, root: str, role: str | None = None) -> None:
        self._folder, self._role = Path(root, FOLDER), role
        self._read: dict[int, int] = {}  # inode -> bytes; a file that is renamed keeps its inode

    def __call__(self) -> list[Json]:
        rows: list[Json] = []
        for path in sorted(self._folder.glob("*.jsonl*"), reverse=True):  # the older file of a role first
            if self._role in (None, _role(path)):
                with suppress(FileNotFoundError):  # renamed just now: the next call finds it
                    rows += self._new(path)
        return sorted(rows, key=lambda row: row["time"])

    def _new(self, path: Path) -> list[Json]:
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(self._read.get(inode, 0))
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read[inode] = self._read.get(inode, 0) + len(whole) + len(newline)
        return [row for line in whole.split(b"\n") if (row := _row(line))]


def _role(path: Path) -> str:
    return path.name.partition(".jsonl")[0]


def _row(line: bytes) -> Json | None:
    """None for an empty line, or one that was torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def log_line(row: Json) -> str:
    """One kept line as a person reads it, with its traceback below."""
    at = datetime.fromtimestamp(row["time"]).isoformat(sep=" ", timespec="seconds")
    head = f"{at} {row['level']} [{row['role']}] {row['logger']}: {row['message']}"
    return f"{head}\n{row['error']}" if "error" in row else head
