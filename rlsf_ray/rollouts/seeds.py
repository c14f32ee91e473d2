"""Names of groups and random streams of traces."""

from __future__ import annotations

import hashlib

from rlsf_ray.records import Prompt


def group_id(prompt: Prompt, round: int) -> str:
    """Names one (prompt, round)."""
    return f"r{round}/{prompt.id}" if round >= 0 else f"probe/{prompt.id}"


def trace_seed(salt: str, prompt_id: str, index: int | str) -> int:
    """Each trace has its own random stream, made of run seed, round, prompt and trace index (and turn)."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{prompt_id}/{index}".encode()).digest()[:8], "big") >> 1
