"""A small task with a check and settings of small runs of several turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def sums_with_checks(folder: Path) -> Path:
    """Sums whose check wants one number that the tiny model writes now and then; the answer column is that number."""
    path = folder / "checked.jsonl"
    rows = []
    for n in range(40):
        wanted = 1 + n % 3
        check = {"kind": "exact", "data": {"accepted": [str(wanted)]}}
        question = f"State the final answer: {n % 10} + {n // 10} ="
        rows.append({"question": question, "answer": str(wanted), "check": check})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def reflecting(folder: Path, **changes: Any) -> dict[str, Any]:
    """Reflect, Retry, Reward on those sums."""
    source = {"kind": "file", "path": str(sums_with_checks(folder)), "check": "check", "id": None}
    return {
        "signal": "passed",
        "data": {"train": [{**source, "count": 24, "labels": True}], "probe": [{**source, "count": 6}]},
        "rollout": {"name": "reflect_retry", "traces": 6, "max_tokens": 12},
        "advantages": {"turns": ["reflection"], "traces_per_step": 12},
        **changes,
    }
