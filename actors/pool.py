"""The generator pool: carries out what stream/fleet.py decides, brings broken replicas back, grows and shrinks."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError

from actors.watch import Watch
from rlsf_ray.errors import DeadlineError, EngineError, ServiceError, WeightsError
from rlsf_ray.records import Json
from rlsf_ray.stream.fleet import Fleet, Replica, State, Ticket

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # how often the pool looks for slow, leaving, missing and idle generators


@dataclass(frozen=True, slots=True)
class Hands:
    """What a pool may do to its actors.

    `ask` for one more by name; `end` one (by handle; True: it starts again elsewhere); which are `leaving` their nodes?
    """

    ask: Callable[[str], Any]
    end: Callable[[Any, bool], None]
    leaving: Callable[[Mapping[str, Any]], Collection[str]]


LOST = "TracesLost"  # why a batch or a prompt is given up whose traces are not there any more


class GivenUp(Exception):
    """A batch failed as often as it may; `reason` names the last error's type."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class GeneratorPool:
    """Calls to generators, most urgent first, up to `most_slots` at once on each, as its KV cache has room.

    `start_task` runs a coroutine beside us; `swapped` hears of the versions that generators have proved at a start or
    after `publish`.
    """

    def __init__(
        self,
        handles: dict[str, Any],
        hands: Hands,
        watch: Watch,
        attempts: int,
        start_task: Callable[[Coroutine[Any, Any, Any]], Any],
        swapped: Callable[[Json], None],
        most_slots: int = 1,
    ) -> None:
        self._handles, self._hands, self._watch = handles, hands, watch
        self._attempts, self.start_task, self._swapped = attempts, start_task, swapped
        self._fleet = Fleet(handles, most_slots=most_slots)
        self._first = frozenset(handles)  # always there; others come and go
        self._numbers = itertools.count(len(handles))
        self._granted: dict[Ticket, asyncio.Future[Replica]] = {}
        self._preparing: set[str] = set()
        self._worked: set[str] = set()  # generators that have been ready once
        self._reloaded: dict[int, set[str]] = {}  # version -> generators that did not have it after the first load
        self._newest = 0

    async def prepare(self, version: int) -> None:
        """Build every engine and load `version` everywhere."""
        self._newest = version
        await asyncio.gather(*(self._prepare(name) for name in self._handles))

    def publish(self, version: int) -> None:
        """Let every generator load `version` after the batch it is writing. Nothing waits for this."""
        self._newest = version
        for name in self._fleet.names(State.HEALTHY, State.SUSPECT):
            self.start_task(self._load(name, version))

    def hold(self, held: bool) -> None:
        """Hand out no more work, or all that has waited; what is being written is ended."""
        self._fleet.held = held
        self._hand_out()

    def states(self) -> Json:
        """Each generator's state by its name."""
        return self._fleet.states()

    async def keep(self, most: int, idle_s: float) -> None:
        """As long as the pool works: at most `most` generators, those beyond the first given back once idle."""
        while True:
            await asyncio.sleep(LOOK_S)
            for name, reason in self._fleet.suspects().items():
                logger.warning("%s %s: no more work for it until it has answered", name, reason)
            for name in await asyncio.to_thread(self._hands.leaving, self._handles):
                if name in self._handles and self._fleet.drain(name):
                    logger.warning("%s leaves its node, which is about to go", name)
                    self._hands.end(self._handles[name], True)
                    self._bring_back(name, restarts=True)
            for name in self._fleet.spare(len(self._first), idle_s):
                logger.info("%s is given back: no work for %g s", name, idle_s)
                self._give_back(name)
            for _ in range(self._fleet.missing(most)):
                name = f"generator-{next(self._numbers)}"
                logger.info("work waits: %s is asked for", name)
                self._handles[name] = self._hands.ask(name)
                self._fleet.add(name)
                self.start_task(self._prepare(name))

    async def call(
        self, method: str, *args: Any, priority: tuple[int, ...], least_version: int, version: int | None = None
    ) -> tuple[Any, Json]:
        """`method(*args, version)` on some generator: (reference of its result, its stage event).

        `version` None: the newest that the generator has loaded, at least `least_version`. A batch whose generator
        dies or fails goes to another. Raises GivenUp after `attempts` tries.
        """
        reason = ""
        for _ in range(self._attempts):
            ticket, replica = await self._grant(priority, least_version)
            done = False
            name, used = replica.name, replica.version if version is None else version
            handle = self._handles[name]
            try:
                result, ended = getattr(handle, method).options(num_returns=2).remote(*args, used)
                event: Json = await self._watch.answer(ended, f"{name} ({method})")
                done = True
                if swap := event.pop("swap", None):
                    self._heard(swap)
                if "kv_usage" in event:
                    self._fleet.adapt(name, event["kv_usage"])
                return result, event
            except RayActorError as error:
                reason = "GeneratorDied"
                logger.warning("%s broke while writing: %s", name, error)
                self._bring_back(name, restarts=True)
            except DeadlineError as error:
                reason = "GeneratorHung"
                self._end_hung(name, handle, error)
            except EngineError as error:
                reason = "EngineError"
                logger.warning("%s could not write a batch: %s", name, error)
                self._bring_back(name)  # it must show that it still works before it gets the next one
            finally:
                self._fleet.release(name, ticket, done=done)
                self._hand_out()
        raise GivenUp(reason)

    async def _grant(self, priority: tuple[int, ...], least_version: int) -> tuple[Ticket, Replica]:
        ticket = self._fleet.submit(priority, least_version)
        granted = self._granted[ticket] = asyncio.get_running_loop().create_future()
        self._hand_out()
        try:
            return ticket, await self._watch.answer_while_moving(granted, f"the generator pool ({self.states()})")
        except BaseException:
            if granted.done() and not granted.cancelled():  # cancelled between the grant and its use
                self._fleet.release(granted.result().name, ticket, done=False)
                self._hand_out()
            raise
        finally:
            self._fleet.withdraw(ticket)
            del self._granted[ticket]

    def _hand_out(self) -> None:
        for ticket, replica in self._fleet.match():
            self._granted[ticket].set_result(replica)

    async def _load(self, name: str, version: int) -> None:
        if name not in self._handles:  # given back meanwhile
            return
        handle = self._handles[name]
        try:
            swap = await self._watch.answer(handle.load_version.remote(version), f"{name} (load version {version})")
        except DeadlineError as error:
            self._end_hung(name, handle, error)
            return
        except (RayActorError, EngineError) as error:
            if name in self._handles:
                logger.warning("%s broke while loading version %d: %s", name, version, error)
                self._bring_back(name, restarts=isinstance(error, RayActorError))  # an idle one has no other caller
            return
        self._ready(name, version, swap)

    def _end_hung(self, name: str, handle: Any, error: DeadlineError) -> None:
        """A generator that does not answer starts again."""
        logger.warning("%s is ended and starts again: %s", name, error)
        self._hands.end(handle, True)
        self._watch.moved()  # how long it may be away counts from here
        self._bring_back(name, restarts=True)

    def _bring_back(self, name: str, *, restarts: bool = False) -> None:
        """No more work for a broken generator until it has started again."""
        if name not in self._handles:  # given back meanwhile
            return
        self._fleet.failed(name, restarts=restarts)
        self.start_task(self._prepare(name))

    async def _prepare(self, name: str) -> None:
        """Bring a new or restarted generator to the newest version, unless that is under way.

        Raises ServiceError if none is left, DeadlineError if this one hangs and no other works, or if it stays
        unavailable and the run stands still.
        """
        if name in self._preparing:
            return
        self._preparing.add(name)
        try:
            await self._start(name)
        finally:
            self._preparing.remove(name)

    async def _start(self, name: str) -> None:
        """See `_prepare`. One beyond the first may wait for a node as long as work waits: nobody waits for it."""
        extra = name not in self._first
        deaths = 0
        if extra:
            with suppress(RayActorError):  # else `prepare` says so
                await self._handles[name].__ray_ready__.remote()
        else:
            self._watch.moved()  # how long it may be away counts from here
        while name in self._handles:
            version = self._newest
            try:
                swap = await self._watch.answer(self._handles[name].prepare.remote(version), f"{name} (start)")
            except ActorUnavailableError:
                await self._watch.pause(name)
                continue
            except (RayActorError, EngineError, DeadlineError) as error:
                hangs = isinstance(error, DeadlineError)
                alone = not self._fleet.names(State.HEALTHY, State.SUSPECT)
                if not extra and ((hangs and alone) or self._begins(name, error)):
                    raise
                deaths += 1
                if deaths > self._attempts or (extra and hangs):
                    self._lost(name, error)
                    return
                if hangs:
                    self._hands.end(self._handles[name], True)
                if name in self._first:
                    self._watch.moved()
                await self._watch.pause(name)
                continue
            if version == self._newest:
                self._ready(name, version, swap)
                return

    def _begins(self, name: str, error: Exception) -> bool:
        """Is this the engine's first start? What is wrong is wrong with the config then."""
        return isinstance(error, EngineError) and name not in self._worked

    def _lost(self, name: str, error: Exception) -> None:
        """It does not come back. Raises ServiceError if it was the last."""
        logger.warning("%s is gone for good: %s", name, error)
        if name not in self._first:
            self._give_back(name)
            return
        self._fleet.died(name)
        self._hands.end(self._handles[name], False)
        if not self._fleet.names(*(state for state in State if state is not State.DEAD)):
            raise ServiceError(f"every generator died, the last one so: {error}; see its log") from error

    def _give_back(self, name: str) -> None:
        if name not in self._handles:  # given back meanwhile
            return
        self._fleet.remove(name)
        self._hands.end(self._handles.pop(name), False)

    def _ready(self, name: str, version: int, swap: Json | None) -> None:
        if name not in self._handles:  # given back meanwhile
            return
        if swap is not None:
            self._heard(swap)
        self._worked.add(name)
        self._fleet.ready(name, version)
        self._watch.moved()
        self._hand_out()

    def _heard(self, swap: Json) -> None:
        """A generator has taken a version in. Raises WeightsError if half the pool needed a second load for it."""
        self._swapped(swap)
        if swap["loads"] == 1:
            return
        version, of = swap["version"], len(self._handles)
        names = self._reloaded.setdefault(version, set())
        names.add(swap["actor"])
        if len(names) > 1 and 2 * len(names) >= of:
            raise WeightsError(
                f"version {version} reached {len(names)} of {of} generators only when it was loaded again"
                f" ({', '.join(sorted(names))}), expected that to be rare; their logs have the log-probs: repair the"
                " way of the weights to the engines, then run the same command to resume"
            )
