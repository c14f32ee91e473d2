"""One logging set-up for every process, with role and run in each line."""

from __future__ import annotations

import logging
import sys

_ROOTS = ("rlsf_ray", "actors")


class _Stderr(logging.Handler):
    """Writes to whatever standard error is at that moment: a live panel puts its own in place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def setup_logging(role: str, run: str, *, level: int = logging.INFO) -> None:
    """Send the project's log lines to standard error as `time level role run module: message`.

    Only the loggers of this project are touched: the root logger belongs to whoever hosts the process. Calling this
    again replaces the earlier set-up, so a process that changes its role does not write a line twice.
    """
    handler = _Stderr()
    handler.set_name("rlsf")
    who = f"{role} {run}".replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s [{who}] %(name)s: %(message)s"))
    for root in _ROOTS:
        logger = logging.getLogger(root)
        for old in [h for h in logger.handlers if h.get_name() == "rlsf"]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level)
