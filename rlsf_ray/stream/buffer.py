"""What waits between the scorers and the trainer, and what the trainer holds: bounded, in order, lease and commit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlsf_ray.records import TrainingGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Groups in admission order. Ask again from `next_sequence`; `ended`: the round has no more."""

    groups: tuple[TrainingGroup, ...]
    next_sequence: int
    ended: bool


class PairQueue:
    """Groups by (round, sequence). Every sequence of a round is put once, as a group with pairs or as skipped.

    Only groups that nobody has leased count against the capacity: the trainer needs a whole round for its later
    passes, so a bound on leased groups could never be met. A leased group stays until its round is committed, so that
    a trainer that restarts gets the same groups again.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: dict[tuple[int, int], TrainingGroup] = {}
        self._leased: dict[tuple[int, int], TrainingGroup] = {}
        self._skipped: set[tuple[int, int]] = set()
        self._sizes: dict[int, int] = {}
        self._rounds_ended = 0

    def knows(self, round: int, sequence: int) -> bool:
        """True if this sequence was put, or its round is over."""
        key = (round, sequence)
        return round < self._rounds_ended or key in self._waiting or key in self._leased or key in self._skipped

    def has_room(self, group: TrainingGroup) -> bool:
        """True if the group may be put now.

        A group before all that wait always may: the trainer can be waiting for nothing else.
        """
        if len(self._waiting) < self._capacity or self.knows(group.round, group.sequence):
            return True
        return (group.round, group.sequence) < min(self._waiting)

    def put(self, group: TrainingGroup) -> bool:
        """Take a group; False if it is known already."""
        if self.knows(group.round, group.sequence):
            return False
        self._waiting[group.round, group.sequence] = group
        return True

    def skip(self, round: int, sequences: Iterable[int]) -> None:
        """These sequences have no pairs (filtered or failed): nobody needs to wait for them."""
        self._skipped |= {(round, sequence) for sequence in sequences if not self.knows(round, sequence)}

    def close_round(self, round: int, size: int) -> None:
        """The round has `size` sequences, with pairs or skipped."""
        self._sizes[round] = size

    def lease(self, round: int, first: int, max_groups: int) -> Lease:
        """Up to `max_groups` groups from sequence `first` on, without a gap. Asking again gives the same groups."""
        if round < self._rounds_ended:
            return Lease(groups=(), next_sequence=first, ended=True)
        groups: list[TrainingGroup] = []
        sequence = first
        while len(groups) < max_groups and self.knows(round, sequence):
            key = (round, sequence)
            if key in self._waiting:
                self._leased[key] = self._waiting.pop(key)
            if key in self._leased:
                groups.append(self._leased[key])
            sequence += 1
        return Lease(groups=tuple(groups), next_sequence=sequence, ended=self._sizes.get(round) == sequence)

    def end_rounds(self, count: int) -> None:
        """Rounds before `count` are committed, or had no pairs: drop what they hold."""
        self._rounds_ended = max(self._rounds_ended, count)
        self._waiting = {key: group for key, group in self._waiting.items() if key[0] >= self._rounds_ended}
        self._leased = {key: group for key, group in self._leased.items() if key[0] >= self._rounds_ended}
        self._skipped = {key for key in self._skipped if key[0] >= self._rounds_ended}

    def num_examples(self, round: int) -> dict[int, int]:
        """Sequence -> examples of the groups held for a round, waiting or leased."""
        held = self._waiting | self._leased
        return {sequence: held[r, sequence].num_examples for r, sequence in sorted(held) if r == round}


def unknown(queue: PairQueue, groups: Sequence[TrainingGroup]) -> list[TrainingGroup]:
    """The groups that the queue has not seen, in admission order."""
    new = [group for group in groups if not queue.knows(group.round, group.sequence)]
    return sorted(new, key=lambda group: (group.round, group.sequence))
