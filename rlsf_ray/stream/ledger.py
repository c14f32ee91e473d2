"""How every (prompt, round) ended: trained, filtered, rolled back, or failed, with a reason. The sums must close."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rlsf_ray.records import Json, Outcome

IN_FLIGHT, PAIRS, TRAINED, FILTERED, FAILED = "in_flight", "pairs", "trained", "filtered", "failed"
ROLLED_BACK, LESS_SURE = "rolled_back", "less_sure"


class Ledger:
    """One entry for each sequence of each round: (state, reason). An entry leaves `in_flight` once, and ends once."""

    def __init__(self) -> None:
        self._rounds: dict[int, list[tuple[str, str]]] = {}

    def admit(self, round: int, count: int) -> None:
        """`count` prompts of `round` are admitted; a resumed round keeps what is known."""
        self._rounds.setdefault(round, [(IN_FLIGHT, "")] * count)

    def scored(self, round: int, outcomes: Iterable[Outcome]) -> None:
        """The scorer's word: with pairs, or filtered."""
        for outcome in outcomes:
            entry = (PAIRS, "") if outcome.reason is None else (FILTERED, outcome.reason)
            self._move(round, outcome.sequence, (IN_FLIGHT,), entry)

    def recovered(self, round: int, reasons: Mapping[int, str | None]) -> list[int]:
        """What the run directory says of prompts that were scored before a crash; None: with pairs.

        Returns the sequences that this ledger did not know of yet.
        """
        news = [sequence for sequence in reasons if self._rounds[round][sequence][0] == IN_FLIGHT]
        for sequence in news:
            reason = reasons[sequence]
            self._rounds[round][sequence] = (PAIRS, "") if reason is None else (FILTERED, reason)
        return news

    def failed(self, round: int, sequences: Iterable[int], reason: str) -> None:
        """These prompts were given up."""
        for sequence in sequences:
            self._move(round, sequence, (IN_FLIGHT,), (FAILED, reason))

    def trained(self, round: int, sequences: Iterable[int]) -> None:
        """These groups are in the committed checkpoint."""
        for sequence in sequences:
            self._move(round, sequence, (PAIRS, IN_FLIGHT), (TRAINED, ""))

    def left_out(self, round: int, sequences: Iterable[int]) -> None:
        """These groups have pairs, but the round has enough of surer ones."""
        for sequence in sequences:
            self._move(round, sequence, (PAIRS, IN_FLIGHT), (FILTERED, LESS_SURE))

    def rolled_back(self, first: int) -> None:
        """The run goes back to before round `first`: what was or would be trained from there on is abandoned."""
        for round, entries in self._rounds.items():
            if round >= first:
                open_ones = (IN_FLIGHT, PAIRS, TRAINED)
                self._rounds[round] = [(ROLLED_BACK, "") if entry[0] in open_ones else entry for entry in entries]

    def _move(self, round: int, sequence: int, sources: tuple[str, ...], entry: tuple[str, str]) -> None:
        entries = self._rounds[round]
        if entries[sequence] == entry:
            return
        if entries[sequence][0] not in sources:
            raise ValueError(f"round {round}, prompt {sequence} ended as {entries[sequence]}, now told {entry}")
        entries[sequence] = entry

    def sequences(self, round: int, state: str) -> list[int]:
        """Sequences of a round in one state."""
        return [i for i, (s, _) in enumerate(self._rounds.get(round, ())) if s == state]

    def size(self, round: int) -> int:
        return len(self._rounds.get(round, ()))

    def totals(self) -> Json:
        """{"admitted", "trained", "filtered", "failed", "rolled_back", "in_flight", "reasons": {reason: count}}."""
        entries = [entry for round in self._rounds.values() for entry in round]
        states = Counter(state for state, _ in entries)
        reasons = Counter(reason for _, reason in entries if reason)
        return {
            "admitted": len(entries),
            "trained": states[TRAINED],
            "filtered": states[FILTERED],
            "failed": states[FAILED],
            "rolled_back": states[ROLLED_BACK],
            "in_flight": states[IN_FLIGHT] + states[PAIRS],
            "reasons": dict(reasons.most_common()),
        }

    def to_json(self) -> Json:
        return {str(round): [list(entry) for entry in entries] for round, entries in self._rounds.items()}

    @classmethod
    def from_json(cls, rounds: Mapping[str, Sequence[Sequence[str]]]) -> Ledger:
        """What `to_json` gave. Prompts in flight then are in flight now."""
        ledger = cls()
        for round, entries in rounds.items():
            ledger._rounds[int(round)] = [(state, reason) for state, reason in entries]
        return ledger
