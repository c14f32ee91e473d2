"""How many batches of a round go on their way at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_config

from actors.journal import Journal
from actors.rounds import Rounds
from actors.watch import Watch
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.effort import Effort
from rlsf_ray.stream.run_state import RunState


def test_each_generator_of_a_large_pool_has_a_batch_and_another_that_comes_next(tmp_path: Path) -> None:
    """Of 100 generators, and a scorer, which may have two: nothing else bounds them."""
    config = tiny_config(Path("model"), cluster={"generators": {"count": 100}, "prompts_per_call": 1})
    crew: Any = SimpleNamespace(scorers={"a": None}, generators={}, hands=lambda pool: None)
    store, state = RunStore.create_or_resume(str(tmp_path), config), RunState("run", config)
    made = Rounds(store, state, Journal(store, state, Effort({})), crew, Watch(5.0))
    made._prompts = lambda round: [None] * 300  # type: ignore[assignment, list-item, return-value]
    begun: list[int] = []

    async def run(round: int, part: int, first: int, prompts: Any) -> None:
        begun.append(part)
        await asyncio.Event().wait()

    made._batches.run = run  # type: ignore[method-assign]

    async def play() -> None:
        async with asyncio.timeout(1.0), asyncio.TaskGroup() as made._tasks:
            await made._admit(0)

    with pytest.raises(TimeoutError):
        asyncio.run(play())
    assert begun == list(range(2 * 100 + 2))
