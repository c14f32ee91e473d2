"""When a round may generate, and how old its weights may be.

A round that gives no pairs publishes nothing, so age is counted in published versions, not by subtracting numbers.
"""

from __future__ import annotations


class Admission:
    """Holds `max_staleness` by refusing work, so that nothing is generated to be thrown away (AReaL, SkyRL)."""

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._ended: dict[int, int | None] = {}  # round -> the version it made, None: it had no pairs
        self._versions = [0]

    def end_round(self, round: int, version: int | None) -> None:
        """Round `round` is over: it made `version`, or nothing. Saying so twice changes nothing.

        Raises ValueError if the version does not grow, or if the round ended otherwise before.
        """
        if round in self._ended:
            if self._ended[round] != version:
                raise ValueError(f"round {round} ended with version {self._ended[round]}, now told {version}")
            return
        if version is not None:
            if version <= self.newest:
                raise ValueError(f"round {round} made version {version}, but version {self.newest} is published")
            self._versions.append(version)
        self._ended[round] = version

    @property
    def newest(self) -> int:
        """The newest published version."""
        return self._versions[-1]

    def made(self) -> list[tuple[int, int]]:
        """(round, version) of every round that made one."""
        return [(round, version) for round, version in self._ended.items() if version is not None]

    @property
    def rounds_ended(self) -> int:
        """Rounds over without a gap, counted from round 0."""
        count = 0
        while count in self._ended:
            count += 1
        return count

    def may_admit(self, round: int) -> bool:
        """True once every round but the `max_staleness` before this one is over."""
        return self.rounds_ended >= round - self._max_staleness

    def least_version(self, round: int) -> int:
        """The oldest version that may write for `round`: what rounds up to round - max_staleness - 1 have made."""
        made = [v for r, v in self._ended.items() if v is not None and r < round - self._max_staleness]
        return max(made, default=0)
