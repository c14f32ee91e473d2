"""The generator pool over generators that break: they come back once, by themselves, or the wait ends."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError

from actors import watch
from actors.pool import GeneratorPool
from actors.watch import Watch
from rlsf_ray.errors import DeadlineError, WeightsError


class Method:
    """Stands for `handle.method`: counts its calls, and answers or raises what `reply` says of the n-th."""

    def __init__(self, reply: Callable[[int], Any]) -> None:
        self._reply, self.calls = reply, 0

    def remote(self, *args: Any) -> Coroutine[Any, Any, Any]:
        self.calls += 1
        return self._answer(self._reply(self.calls))

    async def _answer(self, reply: Any) -> Any:
        await asyncio.sleep(0.01)
        if isinstance(reply, BaseException):
            raise reply
        return reply


class Handle:
    def __init__(self, **methods: Callable[[int], Any]) -> None:
        self.prepare = Method(methods.get("prepare", lambda call: None))
        self.load_version = Method(methods.get("load_version", lambda call: None))


def unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("restarting", None)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETRY_S", 0.01)


def test_an_idle_generator_that_broke_while_loading_is_started_again_and_gets_work() -> None:
    async def play() -> tuple[int, str, int]:
        handle = Handle(load_version=lambda call: RayActorError())
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool({"g": handle}, Watch(5.0), 2, tasks.create_task, print)
            await generators.prepare(0)
            generators.publish(1)
            generators.publish(2)  # both loads fail: still one start
            replica = await generators._grant((0,), 2)
        return handle.prepare.calls, replica.name, replica.version

    assert asyncio.run(play()) == (2, "g", 2)


def test_a_generator_that_stays_unavailable_ends_the_wait_by_name() -> None:
    now = [0.0]

    def away(call: int) -> ActorUnavailableError:
        now[0] += 2.0
        return unavailable()

    async def play() -> None:
        async with asyncio.TaskGroup() as tasks:
            watch = Watch(5.0, lambda: now[0])
            await GeneratorPool({"generator-7": Handle(prepare=away)}, watch, 2, tasks.create_task, print).prepare(0)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(play())
    assert caught.group_contains(DeadlineError, match="generator-7 has been unavailable")


def test_a_generator_that_is_unavailable_for_a_while_is_waited_for() -> None:
    async def play() -> int:
        handle = Handle(prepare=lambda call: unavailable() if call < 5 else None)
        async with asyncio.TaskGroup() as tasks:
            await GeneratorPool({"g": handle}, Watch(5.0), 1, tasks.create_task, print).prepare(0)
        return handle.prepare.calls

    assert asyncio.run(play()) == 5


def _swap_on_four(loads: dict[str, int]) -> list[str]:
    """Publish version 1 to four generators; who has told of it."""
    told: list[str] = []

    def swap(name: str) -> Callable[[int], Any]:
        return lambda call: {"actor": name, "version": 1, "loads": loads.get(name, 1)}

    async def play() -> None:
        handles = {name: Handle(load_version=swap(name)) for name in "abcd"}
        async with asyncio.TaskGroup() as tasks:
            pool = GeneratorPool(handles, Watch(5.0), 2, tasks.create_task, lambda swap: told.append(swap["actor"]))
            await pool.prepare(0)
            pool.publish(1)

    asyncio.run(play())
    return told


def test_one_generator_that_needs_a_second_load_is_no_reason_to_stop() -> None:
    assert sorted(_swap_on_four({"b": 2})) == ["a", "b", "c", "d"]


def test_half_the_pool_needing_a_second_load_ends_the_run() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        _swap_on_four({"b": 2, "d": 2})
    assert caught.group_contains(WeightsError, match=r"version 1 reached 2 of 4 generators only .*\(b, d\)")


def test_a_slot_that_was_granted_to_a_call_which_is_cancelled_comes_back() -> None:
    async def play() -> str:
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool({"g": Handle()}, Watch(5.0), 1, tasks.create_task, print)
            await generators.prepare(0)
            await generators._grant((0,), 0)
            waiting = asyncio.ensure_future(generators._grant((1,), 0))
            await asyncio.sleep(0)
            generators._fleet.release("g")
            generators._hand_out()  # to the waiting one, which is cancelled before it wakes
            waiting.cancel()
            await asyncio.wait({waiting})
            return (await asyncio.wait_for(generators._grant((2,), 0), 2.0)).name

    assert asyncio.run(play()) == "g"
