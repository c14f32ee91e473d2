"""The generator pool: carries out what stream/fleet.py decides, and brings broken replicas back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError

from actors.watch import Watch
from rlsf_ray.errors import EngineError, ServiceError, WeightsError
from rlsf_ray.records import Json
from rlsf_ray.stream.fleet import Fleet, Replica, State, Ticket

logger = logging.getLogger(__name__)


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
        handles: Mapping[str, Any],
        watch: Watch,
        attempts: int,
        start_task: Callable[[Coroutine[Any, Any, Any]], Any],
        swapped: Callable[[Json], None],
        most_slots: int = 1,
    ) -> None:
        self._handles, self._watch, self._attempts, self.start_task = handles, watch, attempts, start_task
        self._fleet = Fleet(list(handles), most_slots=most_slots)
        self._swapped = swapped
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
        for name in self._fleet.names(State.READY):
            self.start_task(self._load(name, version))

    def hold(self, held: bool) -> None:
        """Hand out no more work, or all that has waited; what is being written is ended."""
        self._fleet.held = held
        self._hand_out()

    async def call(
        self, method: str, *args: Any, priority: tuple[int, ...], least_version: int, version: int | None = None
    ) -> tuple[Any, Json]:
        """`method(*args, version)` on some generator: (reference of its result, its stage event).

        `version` None: the newest that the generator has loaded, at least `least_version`. A batch whose generator
        dies or fails goes to another. Raises GivenUp after `attempts` tries.
        """
        reason = ""
        for _ in range(self._attempts):
            replica = await self._grant(priority, least_version)
            name, used = replica.name, replica.version if version is None else version
            try:
                result, done = getattr(self._handles[name], method).options(num_returns=2).remote(*args, used)
                event: Json = await self._watch.answer(done, f"{name} ({method})")
                if swap := event.pop("swap", None):
                    self._heard(swap)
                if "kv_usage" in event:
                    self._fleet.adapt(name, event["kv_usage"])
                return result, event
            except RayActorError as error:
                reason = "GeneratorDied"
                logger.warning("%s broke while writing: %s", name, error)
                self._bring_back(name)
            except EngineError as error:
                reason = "EngineError"
                logger.warning("%s could not write a batch: %s", name, error)
                self._bring_back(name)  # it must show that it still works before it gets the next one
            finally:
                self._fleet.release(name)
                self._hand_out()
        raise GivenUp(reason)

    async def _grant(self, priority: tuple[int, ...], least_version: int) -> Replica:
        ticket = self._fleet.submit(priority, least_version)
        granted = self._granted[ticket] = asyncio.get_running_loop().create_future()
        self._hand_out()
        try:
            return await self._watch.answer_while_moving(
                self._granted[ticket], f"the generator pool (stale: {self._fleet.names(State.STALE)})"
            )
        except BaseException:
            if granted.done() and not granted.cancelled():  # cancelled between the grant and its use
                self._fleet.release(granted.result().name)
                self._hand_out()
            raise
        finally:
            self._fleet.withdraw(ticket)
            del self._granted[ticket]

    def _hand_out(self) -> None:
        for ticket, replica in self._fleet.match():
            self._granted[ticket].set_result(replica)

    async def _load(self, name: str, version: int) -> None:
        try:
            swap = await self._watch.answer(
                self._handles[name].load_version.remote(version), f"{name} (load version {version})"
            )
        except (RayActorError, EngineError) as error:
            logger.warning("%s broke while loading version %d: %s", name, version, error)
            self._bring_back(name)  # an idle generator has no other caller
            return
        self._ready(name, version, swap)

    def _bring_back(self, name: str) -> None:
        """No more work for a broken generator until it has started again."""
        self._fleet.failed(name)
        self.start_task(self._prepare(name))

    async def _prepare(self, name: str) -> None:
        """Bring a new or restarted generator to the newest version, unless that is under way.

        Raises ServiceError if none is left, DeadlineError if this one stays unavailable and the run stands still.
        """
        if name in self._preparing:
            return
        self._preparing.add(name)
        try:
            await self._start(name)
        finally:
            self._preparing.remove(name)

    async def _start(self, name: str) -> None:
        deaths = 0
        self._watch.moved()  # how long it may be away counts from here
        while True:
            version = self._newest
            try:
                swap = await self._watch.answer(self._handles[name].prepare.remote(version), f"{name} (start)")
            except ActorUnavailableError:
                await self._watch.pause(name)
                continue
            except (RayActorError, EngineError) as error:
                if isinstance(error, EngineError) and name not in self._worked:
                    raise  # the first start: what is wrong is wrong with the config
                deaths += 1
                self._watch.moved()
                if deaths <= self._attempts:  # it may have died of this call and be on its way back
                    await self._watch.pause(name)
                    continue
                self._fleet.died(name)
                if not self._fleet.names(State.READY, State.STALE):
                    raise ServiceError(f"every generator died, the last one so: {error}; see its log") from error
                logger.warning("%s is gone for good: %s", name, error)
                return
            if version == self._newest:
                self._ready(name, version, swap)
                return

    def _ready(self, name: str, version: int, swap: Json | None) -> None:
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
