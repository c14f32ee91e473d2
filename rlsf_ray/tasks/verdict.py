"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a text passed (None: the check could not be made, or did not end), and why not."""

    right: bool | None
    reason: str = ""
