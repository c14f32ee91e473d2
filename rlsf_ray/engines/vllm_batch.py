"""Requests to vLLM that begin together, so that the same call is batched alike each time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

logger = logging.getLogger(__name__)

BEGIN_S = 2.0  # for all requests of a call to be on their way
LOOK_S = 0.001


class Together:
    """How requests begin: in their order and at once, unless others are being written already.

    What a sequence gives depends a little on the batch that it is read in, so sampled tokens do, and vLLM batches what
    has arrived when a step begins. Where requests come one by one that is chance: of two runs with the same seed 1 in
    15 of the first traces differed, and 1 in 2 of the second round's (benchmarks/results/log.md).
    """

    def __init__(self, llm: Any) -> None:
        self._llm, self._calls = llm, 0

    async def run(self, works: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The results of `works`, each of which asks `llm` once. Where one fails, or we are cancelled, all end."""
        alone, self._calls = self._calls == 0, self._calls + 1
        tasks: list[asyncio.Task[Any]] = []
        try:
            if alone:
                await self._begin(works, tasks)
            else:
                tasks += map(asyncio.create_task, works)
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            for work in works[len(tasks) :]:  # never begun
                work.close()
            self._calls -= 1

    async def _begin(self, works: Sequence[Coroutine[Any, Any, Any]], tasks: list[asyncio.Task[Any]]) -> None:
        states = self._llm.output_processor
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
            tasks += map(asyncio.create_task, works)  # the event loop takes them up in this order
            until = time.monotonic() + BEGIN_S
            while states.get_num_unfinished_requests() < len(tasks) and not any(task.done() for task in tasks):
                if time.monotonic() > until:
                    logger.warning("%d requests do not begin together: not all there after %g s", len(tasks), BEGIN_S)
                    return
                await asyncio.sleep(LOOK_S)
        finally:
            await self._llm.resume_generation()
