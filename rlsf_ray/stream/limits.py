"""How much a run may take before it drains by itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of all lives of a run together; None: no limit."""

    hours: float | None = None
    tokens: int | None = None  # written for training

    def reached(self, seconds: float, tokens: int) -> str | None:
        """What has been reached after so long and so many tokens, in words; None: nothing yet."""
        if self.hours is not None and seconds >= 3600.0 * self.hours:
            return f"has run for {seconds / 3600.0:.2f} h of at most {self.hours:g}"
        if self.tokens is not None and tokens >= self.tokens:
            return f"has written {tokens} tokens of at most {self.tokens}"
        return None


NO_LIMITS = Limits()
