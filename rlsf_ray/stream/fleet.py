"""Which replica gets the next piece of work: health, loaded version, priority.

    STALE  started or restarted; gets no work until it has proved a version
    READY  serves its version
    DEAD   gone for good

After NeMo RL's fleet_health.py: nothing goes from dead or restarted to ready without current weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

ROOM, FULL = 0.7, 0.9  # shares of a KV cache in use
FIRST_SLOTS = 2  # the next batch waits at the engine when one ends


class State(StrEnum):
    STALE = "stale"
    READY = "ready"
    DEAD = "dead"


@dataclass(slots=True)
class Replica:
    """One generator as the coordinator sees it. `version` is the newest it has loaded and proved.

    It works on `in_flight` pieces at once, at most `slots`.
    """

    name: str
    state: State = State.STALE
    version: int = 0
    slots: int = 1
    in_flight: int = 0


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """A piece of work that waits: lowest priority first, then first come."""

    priority: tuple[int, ...]
    number: int
    least_version: int = field(compare=False)


class Fleet:
    """Matches waiting work to replicas with a free slot whose weights are new enough."""

    def __init__(self, names: Sequence[str], *, most_slots: int = 1) -> None:
        first = min(most_slots, FIRST_SLOTS)
        self._replicas = {name: Replica(name, slots=first) for name in names}
        self._most_slots = most_slots
        self._waiting: list[Ticket] = []
        self._tickets = 0
        self.held = False  # no work is handed out

    def ready(self, name: str, version: int) -> None:
        """`name` has loaded and proved `version`."""
        replica = self._replicas[name]
        if replica.state is not State.DEAD:
            replica.version = max(version, replica.version) if replica.state is State.READY else version
            replica.state = State.READY

    def failed(self, name: str) -> None:
        """`name` broke or restarts: what it had loaded is lost."""
        replica = self._replicas[name]
        if replica.state is not State.DEAD:
            replica.state = State.STALE

    def died(self, name: str) -> None:
        """`name` will not come back."""
        self._replicas[name].state = State.DEAD

    def submit(self, priority: tuple[int, ...], least_version: int) -> Ticket:
        """Queue a piece of work that needs at least `least_version`."""
        self._tickets += 1
        ticket = Ticket(priority, self._tickets, least_version)
        self._waiting.append(ticket)
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """The work is no longer wanted."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    def match(self) -> list[tuple[Ticket, Replica]]:
        """Hand out all work that can start now; it takes its slots from here until `release`."""
        matched: list[tuple[Ticket, Replica]] = []
        if self.held:
            return matched
        for ticket in sorted(self._waiting):
            replica = self._free(ticket.least_version)
            if replica is not None:
                replica.in_flight += 1
                self._waiting.remove(ticket)
                matched.append((ticket, replica))
        return matched

    def _free(self, least_version: int) -> Replica | None:
        """The replica with the newest weights, among equals the one with the least work, then by name."""
        ready = [r for r in self._replicas.values() if r.state is State.READY and r.in_flight < r.slots]
        fit = [replica for replica in ready if replica.version >= least_version]
        return min(fit, key=lambda replica: (-replica.version, replica.in_flight, replica.name), default=None)

    def adapt(self, name: str, kv_usage: float) -> None:
        """More pieces at once while the KV cache of `name` has room, fewer once it is full."""
        replica = self._replicas[name]
        if kv_usage > FULL:
            replica.slots = max(1, replica.slots - 1)
        elif kv_usage < ROOM:
            replica.slots = min(self._most_slots, replica.slots + 1)

    def release(self, name: str) -> None:
        """`name` has finished a piece of work, or failed at it."""
        self._replicas[name].in_flight -= 1

    def names(self, *states: State) -> list[str]:
        """Replicas in one of these states."""
        return [name for name, replica in self._replicas.items() if replica.state in states]
