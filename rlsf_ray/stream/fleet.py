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


class State(StrEnum):
    STALE = "stale"
    READY = "ready"
    DEAD = "dead"


@dataclass(slots=True)
class Replica:
    """One generator as the coordinator sees it. `version` is the newest it has loaded and proved."""

    name: str
    state: State = State.STALE
    version: int = 0
    busy: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """A piece of work that waits: lowest priority first, then first come."""

    priority: tuple[int, ...]
    number: int
    least_version: int = field(compare=False)


class Fleet:
    """Matches waiting work to idle replicas whose weights are new enough."""

    def __init__(self, names: Sequence[str]) -> None:
        self._replicas = {name: Replica(name) for name in names}
        self._waiting: list[Ticket] = []
        self._tickets = 0

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
            replica.state, replica.busy = State.STALE, False

    def died(self, name: str) -> None:
        """`name` will not come back."""
        self._replicas[name].state = State.DEAD
        self._replicas[name].busy = False

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
        """Hand out all work that can start now; the replicas are busy from here until `release`."""
        matched = []
        for ticket in sorted(self._waiting):
            replica = self._idle(ticket.least_version)
            if replica is not None:
                replica.busy = True
                self._waiting.remove(ticket)
                matched.append((ticket, replica))
        return matched

    def _idle(self, least_version: int) -> Replica | None:
        """The idle replica with the newest weights, by name among equals."""
        fit = [
            r for r in self._replicas.values() if r.state is State.READY and not r.busy and r.version >= least_version
        ]
        return min(fit, key=lambda replica: (-replica.version, replica.name), default=None)

    def release(self, name: str) -> None:
        """`name` has finished its work."""
        self._replicas[name].busy = False

    def names(self, *states: State) -> list[str]:
        """Replicas in one of these states."""
        return [name for name, replica in self._replicas.items() if replica.state in states]
