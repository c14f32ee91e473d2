"""One logging set-up for every process, with role and run in each line; and reading these lines again.

Where the run directory is a local folder, `logs/<role>.jsonl` there holds them as JSON, a line each.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

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
        return json.dumps(row, ensure_ascii=False)


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


def _file(path: str, role: str, run: str) -> logging.Handler:
    handler = RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=1, delay=True, encoding="utf-8")
    handler.setFormatter(_JsonLines(role, run))
    return handler


def read_logs(root: str, role: str | None = None) -> list[Json]:
    """The kept lines of a local run directory, oldest first; of one role, or of all. Half lines do not count."""
    folder = Path(root, FOLDER)
    files = [*folder.glob("*.jsonl.1"), *folder.glob("*.jsonl")]
    wanted = [file for file in files if role is None or file.name.partition(".jsonl")[0] == role]
    return sorted((row for file in wanted for row in _rows(file)), key=lambda row: row["time"])


def _rows(file: Path) -> Iterator[Json]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # the process was killed while it wrote
            row = json.loads(line)
            yield row


def log_line(row: Json) -> str:
    """One kept line as a person reads it, with its traceback below."""
    at = datetime.fromtimestamp(row["time"]).isoformat(sep=" ", timespec="seconds")
    head = f"{at} {row['level']} [{row['role']}] {row['logger']}: {row['message']}"
    return f"{head}\n{row['error']}" if "error" in row else head
