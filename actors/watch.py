"""Waiting with a deadline that names who has not answered, and errors as the project's own types."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from rlsf_ray.errors import DeadlineError, RlsfError, ServiceError

RETRY_S = 0.3  # a restarting actor is asked again this often


class Watch:
    """Deadlines of one run. `moved` says that something happened, and lets `until` look again.

    While the run is `held`, nothing has to move. While somebody is asked who has a deadline of its own, twice as long
    may pass: a generator that hangs, alone at work, is to be ended and not the run.

    Waits are bounded by `asyncio.timeout` and not by `wait_for`: that of Python 3.11 drops a cancellation that comes in
    the moment in which the awaited thing is done, and the failure of another task would be heard at the deadline only.
    """

    def __init__(self, deadline_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.deadline_s, self._clock = deadline_s, clock
        self._moved_at = clock()
        self.held = False
        self._asked = 0  # calls without an answer yet
        self._event = asyncio.Event()

    def hold(self, held: bool) -> None:
        """Let the run stand still, or count again from now."""
        self.held = held
        self.moved()

    def _remaining_s(self) -> float:
        """Until something has to have moved."""
        limit = 2 * self.deadline_s if self._asked else self.deadline_s
        return limit - (0.0 if self.held else self._clock() - self._moved_at)

    def moved(self) -> None:
        """Something made progress."""
        self._moved_at = self._clock()
        self._event.set()
        self._event = asyncio.Event()

    async def answer(self, call: Any, who: str) -> Any:
        """The result of one call, which must come within the deadline. Raises DeadlineError or the call's own error."""
        self._asked += 1
        try:
            async with asyncio.timeout(self.deadline_s):
                result = await asyncio.ensure_future(call)
        except TimeoutError:
            raise self.late(who, "has not answered") from None
        finally:
            self._asked -= 1
        self.moved()
        return result

    async def answer_while_moving(self, call: Any, who: str) -> Any:
        """The result of a call that may take long, as long as anything in the run makes progress."""
        future = asyncio.ensure_future(call)
        try:
            while not future.done():
                remaining_s = self._remaining_s()
                if remaining_s <= 0:
                    raise self.late(who, "has not answered and nothing else has moved")
                await asyncio.wait({future}, timeout=remaining_s)
            return future.result()
        finally:
            future.cancel()

    async def until(self, ready: Callable[[], bool], who: str) -> None:
        """Return once `ready()`; looked at after each `moved`."""
        while not ready():
            event = self._event
            remaining_s = self._remaining_s()
            if remaining_s <= 0:
                raise self.late(who, "has not answered and nothing else has moved")
            with suppress(TimeoutError):
                async with asyncio.timeout(remaining_s):
                    await event.wait()

    async def pause(self, who: str) -> None:
        """Before a broken actor is asked again. Raises DeadlineError if nothing in the run has moved for too long."""
        if self._remaining_s() < 0:
            raise self.late(who, "has been unavailable and nothing else has moved")
        await asyncio.sleep(RETRY_S)

    def late(self, who: str, what: str) -> DeadlineError:
        """The error for a wait that has reached the deadline."""
        return DeadlineError(
            f"{who} {what} for {self.deadline_s:g} s, expected less than cluster.deadline_s; look at its log under"
            " Ray's session folder, or raise cluster.deadline_s"
        )


def plain(error: BaseException) -> RlsfError:
    """The error of the project's own types that stands behind what Ray or asyncio wrapped around it."""
    found = list(_leaves(error))
    for leaf in found:
        if isinstance(leaf, RlsfError):
            return leaf
    first = found[0]
    if isinstance(first, RayActorError):
        named = re.search(r"^\s*name: (\S+)", str(first), flags=re.MULTILINE)
        who = named[1] if named else "an actor of the run"
        return ServiceError(f"{who} died and did not come back; run the same command to resume ({first})")
    return ServiceError(
        f"{type(first).__name__}: {first}; run the same command to resume, and report this with the coordinator's log"
        " if it comes back"
    )


def _leaves(error: BaseException) -> list[BaseException]:
    """Errors at the bottom of groups, of Ray's task errors and of Ray Train's worker errors."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return _leaves(error.cause)
    workers = getattr(error, "worker_failures", None)  # ray.train.WorkerGroupError
    if workers:
        return [leaf for inner in workers.values() for leaf in _leaves(inner)]
    return [error]
