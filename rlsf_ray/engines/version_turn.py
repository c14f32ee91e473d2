"""Who may write where there is room for the weights of one version only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any


class VersionTurn:
    """Whose weights are in, where there is room for one version: a change waits until nobody writes any more."""

    def __init__(self, change: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        self._change, self._active, self._writing = change, 0, 0
        self._gate, self._idle = asyncio.Lock(), asyncio.Condition()

    @asynccontextmanager
    async def of(self, version: int) -> AsyncIterator[None]:
        """Write with `version`. First come, first served: who waits for another version is not overtaken."""
        async with self._gate:
            if self._active != version:
                async with self._idle:
                    await self._idle.wait_for(lambda: self._writing == 0)
                self._active = -1  # if the change fails, nobody knows what is in
                await self._change(version)
                self._active = version
            self._writing += 1
        try:
            yield
        finally:
            self._writing -= 1  # first: the next line may be cancelled
            async with self._idle:
                self._idle.notify_all()

    async def forget(self, version: int) -> None:
        """`version` means other content from now on."""
        if self._active == version:
            self._active = -1
