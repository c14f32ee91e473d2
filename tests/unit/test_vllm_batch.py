"""Requests of one call begin in order and at once; the engine is let go again whatever happens."""

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
        self.paused, self.pauses = False, 0

    def get_num_unfinished_requests(self) -> int:
        return len(self.waiting)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self.paused, self.pauses = True, self.pauses + 1

    async def resume_generation(self) -> None:
        self.paused = False

    async def ask(self, name: str) -> str:
        if name == "refused":
            raise ValueError(name)
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


def test_a_call_that_begins_alone_is_one_batch_in_order() -> None:
    names = [f"r{i}" for i in range(200)]
    engine, (answers,) = asyncio.run(with_engine(names))
    assert engine.batches == [names]
    assert answers == [name.upper() for name in names]
    assert not engine.paused


def test_beside_others_nothing_is_held_up() -> None:
    engine, (first, second) = asyncio.run(with_engine(["a", "b"], ["c"]))
    assert (first, second, engine.pauses) == (["A", "B"], ["C"], 1)


def test_a_refused_request_leaves_the_engine_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlsf_ray.engines.vllm_batch.BEGIN_S", 0.05)
    engine, (error,) = asyncio.run(with_engine(["a", "refused"]))
    assert isinstance(error, ValueError)
    assert not engine.paused
