"""Requests of one call begin at once; the engine is let go again whatever happens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rlsf_ray.engines.vllm_batch import Together


class Engine:
    """Takes requests as vLLM does: registered at once, read when a step begins, answered one step later."""

    def __init__(self) -> None:
        self.output_processor = self
        self.waiting: list[tuple[str, asyncio.Future[str]]] = []
        self.batches: list[list[str]] = []
        self.paused, self.pauses, self.asked = False, 0, 0

    def get_num_unfinished_requests(self) -> int:
        return len(self.waiting)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self.paused, self.pauses = True, self.pauses + 1
        await asyncio.sleep(0)

    async def resume_generation(self) -> None:
        self.paused = False

    async def ask(self, name: str) -> str:
        if name == "refused":
            raise ValueError(name)
        self.asked += 1
        if self.asked % 10 == 0:  # the event loop does not get to all of them at once
            await asyncio.sleep(0)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting.append((name, answer))
        return await answer

    async def steps(self) -> None:
        while True:
            await asyncio.sleep(0)
            if self.waiting and not self.paused:
                batch, self.waiting = self.waiting, []
                self.batches.append([name for name, _ in batch])
                for name, answer in batch:
                    answer.set_result(name.upper())


async def with_engine(*calls: list[str]) -> tuple[Engine, list[Any]]:
    engine = Engine()
    together, steps = Together(engine), asyncio.create_task(engine.steps())
    started = [asyncio.create_task(together.run([engine.ask(name) for name in names])) for names in calls]
    results = await asyncio.wait_for(asyncio.gather(*started, return_exceptions=True), 10)
    steps.cancel()
    return engine, results


def test_a_call_that_begins_alone_is_one_batch() -> None:
    names = [f"r{i}" for i in range(200)]
    engine, (answers,) = asyncio.run(with_engine(names))
    assert [sorted(batch) for batch in engine.batches] == [sorted(names)]
    assert answers == [name.upper() for name in names]
    assert not engine.paused


def test_beside_others_nothing_is_held_up() -> None:
    engine, (first, second) = asyncio.run(with_engine(["a", "b"], ["c"]))
    assert (first, second, engine.pauses) == (["A", "B"], ["C"], 1)


def test_a_refused_request_leaves_the_engine_at_work() -> None:
    engine, (error,) = asyncio.run(with_engine(["a", "refused"]))
    assert isinstance(error, ValueError)
    assert not engine.paused


def test_who_is_cancelled_while_the_engine_waits_lets_it_go_on() -> None:
    async def play() -> tuple[Engine, list[asyncio.Task[None]]]:
        engine = Engine()
        call = asyncio.create_task(Together(engine).run([engine.ask("a"), engine.ask("b")]))
        while not engine.paused:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return engine, [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    engine, left = asyncio.run(play())
    assert not engine.paused
    assert not left
