"""The scorer pool: a batch to the least busy scorer; more of them while batches wait at each, fewer when idle."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayError

from actors.pool import LOOK_S, GivenUp, Hands
from actors.watch import Watch
from rlsf_ray.errors import DeadlineError
from rlsf_ray.records import Json, Outcome

logger = logging.getLogger(__name__)

CROWDED = 2  # batches at every scorer that are not computed yet: one more is wanted
ANSWER_S = 5.0
LOOKS = 5  # in a row at which they were so many


class ScorerPool:
    """Scorers by name; `handles` is the crew's own dict, which holds those that come. `start_task` runs beside us."""

    def __init__(
        self,
        handles: dict[str, Any],
        hands: Hands,
        watch: Watch,
        attempts: int,
        start_task: Callable[[Coroutine[Any, Any, Any]], Any],
    ) -> None:
        self._handles, self._hands, self._watch, self._attempts = handles, hands, watch, attempts
        self._start_task = start_task
        self._first = frozenset(handles)  # always there; others come and go
        self._queued = dict.fromkeys(handles, 0)  # batches at each one that takes work
        self._idle_since = dict.fromkeys(handles, time.monotonic())
        self._numbers = itertools.count(len(handles))
        self._tries = itertools.count()  # of batches: a later one at the same batch has a higher number
        self._left: set[str] = set()  # ended because their nodes go
        self._away: set[str] = set()  # broken, and not back yet

    async def prepare(self) -> None:
        """Build every scorer. One that dies meanwhile builds itself again at its first batch."""

        async def build(name: str, scorer: Any) -> None:
            try:
                await self._watch.answer(scorer.prepare.remote(), name)
            except RayActorError as error:
                logger.warning("%s broke while it was built: %s", name, error)

        await asyncio.gather(*(build(name, scorer) for name, scorer in self._handles.items()))

    async def score(self, boxed: list[Any], round: int, part: int) -> tuple[list[Outcome], Json]:
        """(the batch's outcomes, its stage event) from the least busy of the scorers that failed it least.

        Raises GivenUp once one has failed it `attempts` times: that others restart just now must not use these up, and
        Ray does not tell who died of this batch from who was away.
        """
        failures = Counter[str]()
        while max(failures.values(), default=0) < self._attempts:
            there = self._queued.keys() - self._away
            if not there:
                await self._watch.pause("every scorer")
                continue
            name = min(sorted(there), key=lambda scorer: (failures[scorer], self._queued[scorer]))
            self._queued[name] += 1
            try:
                call = self._handles[name].process.remote(boxed, round, part, next(self._tries))
                outcomes, event = await self._watch.answer_while_moving(call, name)
                return list(outcomes), event
            except RayActorError as error:
                logger.warning("%s broke while scoring: %s", name, error)
                failures[name] += 1
                self._bring_back(name)
            finally:
                if name in self._queued:
                    self._queued[name] -= 1
                    self._idle_since[name] = time.monotonic()
        raise GivenUp("ScorerDied")

    def _bring_back(self, name: str) -> None:
        """No more work for a broken scorer until it has built itself again."""
        if name not in self._away:
            self._away.add(name)
            self._watch.moved()  # how long it may be away counts from here
            self._start_task(self._return(name))

    async def _return(self, name: str) -> None:
        """See `_bring_back`. Raises DeadlineError if it hangs and no other works, or is away while nothing moves."""
        while (scorer := self._handles.get(name)) is not None:  # else given back
            try:
                await self._watch.answer(scorer.prepare.remote(), name)
                break
            except RayActorError:
                await self._watch.pause(name)
            except DeadlineError as error:
                if self._queued.keys() <= self._away:
                    raise
                logger.warning("%s is ended and starts again: %s", name, error)
                self._hands.end(scorer, True)
                await self._watch.pause(name)
        self._away.remove(name)

    async def keep(self, most: int, idle_s: float) -> None:
        """As long as the pool works: at most `most` scorers, those beyond the first given back once idle."""
        crowded, calm_since = 0, time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            await self._leave()
            for name in self._spare(idle_s):
                logger.info("%s is given back: no work for %g s", name, idle_s)
                self._give_back(name)
            if most == len(self._first):
                continue
            if await self._crowded():
                crowded, calm_since = crowded + 1, time.monotonic()
            else:
                crowded = 0
            starting = self._handles.keys() - self._queued.keys()
            for name in starting if time.monotonic() - calm_since > idle_s else ():
                logger.info("%s is not needed any more", name)
                self._give_back(name)
            if crowded >= LOOKS and not starting and len(self._handles) < most:
                crowded, name = 0, f"scorer-{next(self._numbers)}"
                logger.info("batches wait at every scorer: %s is asked for", name)
                self._handles[name] = self._hands.ask(name)
                self._start_task(self._take_in(name))

    async def _leave(self) -> None:
        """A scorer whose node is about to go starts again elsewhere, or is given back; its batches go to others."""
        leaving = set(await asyncio.to_thread(self._hands.leaving, self._handles))
        for name in leaving - self._left:
            logger.warning("%s leaves its node, which is about to go", name)
            if name in self._first:
                self._hands.end(self._handles[name], True)
            else:
                self._give_back(name)
        self._left = leaving & self._first

    def _spare(self, idle_s: float) -> list[str]:
        long_ago = time.monotonic() - idle_s
        extra = self._queued.keys() - self._first
        return [name for name in extra if not self._queued[name] and self._idle_since[name] < long_ago]

    async def _crowded(self) -> bool:
        """Do batches wait to be computed at every scorer? Those that wait for room in the buffer do not count."""
        there = self._queued.keys() - self._away
        try:
            async with asyncio.timeout(ANSWER_S):
                backlogs = await asyncio.gather(*(self._handles[name].backlog.remote() for name in there))
        except (RayActorError, TimeoutError):  # one that restarts, perhaps
            return False
        return min(backlogs, default=0) >= CROWDED

    async def _take_in(self, name: str) -> None:
        """Let a new scorer take work once it is built. It may wait for a node as long as it likes."""
        scorer = self._handles[name]  # which may be given back meanwhile
        try:
            await scorer.__ray_ready__.remote()
            await self._watch.answer(scorer.prepare.remote(), name)
        except (RayError, DeadlineError) as error:  # such as no memory left on its GPU: the others go on
            if name in self._handles:
                logger.warning("%s could not start: %s", name, error)
                self._give_back(name)
            return
        if name in self._handles:
            self._queued[name], self._idle_since[name] = 0, time.monotonic()
            logger.info("%s is there", name)

    def _give_back(self, name: str) -> None:
        """Let go of a scorer beyond the first."""
        if name in self._first or name not in self._handles:
            return
        self._queued.pop(name, None)
        self._idle_since.pop(name, None)
        with suppress(ValueError):
            self._hands.end(self._handles.pop(name), False)
