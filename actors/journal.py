"""What the coordinator keeps on disk while a run goes on: state.json and the stage events."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.effort import Effort
from rlsf_ray.stream.run_state import RunState

SAVE_S = 5.0


class Journal:
    """Writes beside the event loop, in the order of the calls."""

    def __init__(self, store: RunStore, state: RunState, effort: Effort) -> None:
        self._store, self._state, self._effort = store, state, effort
        self._writer = ThreadPoolExecutor(1)  # of its own: others may be busy for long
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[None] | None = None  # waits for its turn
        self._events: list[Json] = []  # stage events that are not written yet

    def record(self, event: Json) -> None:
        """Count a stage event, and keep it for the next `save`."""
        self._effort.add(event)
        self._events.append(event)

    async def save(self) -> None:
        """Write the stage events and state.json as they are now, or a little later.

        Calls that come while a write goes on share the next one: state.json names every prompt, and a batch must not
        wait for a write of its own. A write that has begun is finished, even if the run is stopped.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._write_next())
        await asyncio.shield(self._next)

    async def _write_next(self) -> None:
        async with self._turn:
            self._next = None  # whoever calls from here on has news
            events, self._events = self._events, []
            state = self._state.to_json()
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, events, state)

    def _write(self, events: list[Json], state: Json) -> None:
        if events:
            self._store.append_metrics("stages", events)
        self._store.write_json("state.json", state)

    async def keep_saving(self) -> None:
        """Save while nothing but training goes on."""
        while True:
            await asyncio.sleep(SAVE_S)
            if self._events:
                await self.save()
