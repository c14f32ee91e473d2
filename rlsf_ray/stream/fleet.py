"""Which replica gets the next piece of work, which is in doubt, and how many there should be.

    STARTING    its first process starts, or waits for a node
    RESTARTING  another one does
    STALE       it runs, but has to prove a version before it gets work
    HEALTHY     serves its version
    SUSPECT     takes far longer than others for a piece of work: gets no more until it has answered
    DRAINING    its node is about to go: gets no more work, and starts elsewhere once it has none
    DEAD        gone for good

After NeMo RL's fleet_health.py: nothing goes from dead or starting to healthy without current weights.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

ROOM, FULL = 0.7, 0.9  # shares of a KV cache in use
FIRST_SLOTS = 2  # the next batch waits at the engine when one ends
SLOW = 3.0  # times as long as the slowest of the last pieces of its kind
LAST_PIECES, LEAST_PIECES = 20, 5  # so many are remembered, and needed before anybody is slow
GROW_S = 5.0  # work that has waited so long asks for more replicas


class State(StrEnum):
    STARTING = "starting"
    RESTARTING = "restarting"
    STALE = "stale"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(slots=True, eq=False)
class Replica:
    """One generator as the coordinator sees it. `version` is the newest it has loaded and proved.

    It works on the pieces in `begun` (ticket -> since when), at most `slots` at once; `idle_since` it has had none.
    """

    name: str
    idle_since: float
    state: State = State.STARTING
    version: int = 0
    slots: int = 1
    begun: dict[Ticket, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """A piece of work that waits: lowest priority first, then first come. Its kind is `priority[0]`."""

    priority: tuple[int, ...]
    number: int
    least_version: int = field(compare=False)


class Fleet:
    """Matches waiting work to replicas with a free slot whose weights are new enough. A pure state machine."""

    def __init__(
        self, names: Iterable[str], *, most_slots: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._most_slots = clock, most_slots
        self._replicas: dict[str, Replica] = {}
        self._waiting: list[Ticket] = []
        self._waiting_since: float | None = None
        self._lasted: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=LAST_PIECES))  # by kind, in s
        self._tickets = 0
        self.held = False  # no work is handed out
        for name in names:
            self.add(name)

    # --- replicas -----------------------------------------------------------------------------------------------

    def add(self, name: str) -> None:
        """One more replica, which starts."""
        self._replicas[name] = Replica(name, self._clock(), slots=min(self._most_slots, FIRST_SLOTS))

    def remove(self, name: str) -> None:
        """`name` is given back."""
        del self._replicas[name]

    def ready(self, name: str, version: int) -> None:
        """`name` has loaded and proved `version`."""
        replica = self._replicas[name]
        if replica.state is State.DEAD:
            return
        keeps = replica.state in (State.HEALTHY, State.SUSPECT, State.DRAINING)  # what it has loaded
        replica.version = max(version, replica.version) if keeps else version
        if not keeps:
            replica.state = State.HEALTHY

    def failed(self, name: str, *, restarts: bool = False) -> None:
        """`name` broke (its process `restarts`, or runs still): it must prove a version before it gets work."""
        replica = self._replicas.get(name)  # None: given back while it worked
        if replica and replica.state is not State.DEAD:
            replica.state = State.RESTARTING if restarts else State.STALE

    def died(self, name: str) -> None:
        """`name` will not come back."""
        self._replicas[name].state = State.DEAD

    def drain(self, name: str) -> bool:
        """No more work for `name`, whose node goes. Returns whether it has none left and may start elsewhere."""
        replica = self._replicas[name]
        if replica.state in (State.HEALTHY, State.SUSPECT):
            replica.state = State.DRAINING
        return replica.state is State.DRAINING and not replica.begun

    def names(self, *states: State) -> list[str]:
        """Replicas in one of these states."""
        return [name for name, replica in self._replicas.items() if replica.state in states]

    def states(self) -> dict[str, str]:
        """Each replica's state by its name."""
        return {name: replica.state.value for name, replica in self._replicas.items()}

    # --- work ---------------------------------------------------------------------------------------------------

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
            self._waiting_since = None
            return matched
        for ticket in sorted(self._waiting):
            replica = self._free(ticket.least_version)
            if replica is not None:
                replica.begun[ticket] = self._clock()
                self._waiting.remove(ticket)
                matched.append((ticket, replica))
        if not self._waiting:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = self._clock()
        return matched

    def _free(self, least_version: int) -> Replica | None:
        """The replica with the newest weights, among equals the one with the least work, then by name."""
        healthy = [r for r in self._replicas.values() if r.state is State.HEALTHY and len(r.begun) < r.slots]
        fit = [replica for replica in healthy if replica.version >= least_version]
        return min(fit, key=lambda replica: (-replica.version, len(replica.begun), replica.name), default=None)

    def adapt(self, name: str, kv_usage: float) -> None:
        """More pieces at once while the KV cache of `name` has room, fewer once it is full."""
        replica = self._replicas[name]
        if kv_usage > FULL:
            replica.slots = max(1, replica.slots - 1)
        elif kv_usage < ROOM:
            replica.slots = min(self._most_slots, replica.slots + 1)

    def release(self, name: str, ticket: Ticket, *, done: bool = True) -> None:
        """`name` has finished a piece of work (`done`), or failed at it."""
        if name not in self._replicas:
            return
        replica, now = self._replicas[name], self._clock()
        lasted = now - replica.begun.pop(ticket)
        if done:
            self._lasted[ticket.priority[0]].append(lasted)
            if replica.state is State.SUSPECT:
                replica.state = State.HEALTHY
        if not replica.begun:
            replica.idle_since = now

    # --- who is slow, and how many are wanted -------------------------------------------------------------------

    def suspects(self) -> dict[str, str]:
        """Replicas that have become suspect since the last look, each with the reason."""
        found = {}
        for name in self.names(State.HEALTHY):
            for ticket, since in self._replicas[name].begun.items():
                past, lasts = self._lasted[ticket.priority[0]], self._clock() - since
                if len(past) >= LEAST_PIECES and lasts > SLOW * max(past):
                    self._replicas[name].state = State.SUSPECT
                    found[name] = (
                        f"works on one batch for {lasts:.1f} s; the slowest of the last took {max(past):.1f} s"
                    )
        return found

    def missing(self, most: int) -> int:
        """How many more replicas, of at most `most`, the waiting work asks for."""
        if self._waiting_since is None or self._clock() - self._waiting_since < GROW_S:
            return 0
        living = [replica for replica in self._replicas.values() if replica.state is not State.DEAD]
        coming = sum(replica.state in (State.STARTING, State.RESTARTING) for replica in living)
        return max(0, min(most - len(living), len(self._waiting) - coming))

    def spare(self, least: int, idle_s: float) -> list[str]:
        """Replicas beyond the first `least` that have had no work for `idle_s` while none waited."""
        if self._waiting or self.held:
            return []
        extra: Sequence[Replica] = list(self._replicas.values())[least:]
        return [r.name for r in extra if not r.begun and self._clock() - r.idle_since >= idle_s]
