"""Processor time of a command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any


def processor_seconds(command: Sequence[str], **options: Any) -> tuple[subprocess.CompletedProcess[str], float]:
    """(the ended command, its processor time): the clock on the wall also counts what else the machine does."""
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    after = os.times()
    return done, after.children_user + after.children_system - before.children_user - before.children_system
