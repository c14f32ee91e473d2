"""The generator pool over generators that break: they come back once, by themselves, or the wait ends."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError

from actors import pool, watch
from actors.pool import GeneratorPool, GivenUp
from actors.watch import Watch
from rlsf_ray.errors import DeadlineError, EngineError, WeightsError
from rlsf_ray.records import Json
from rlsf_ray.stream import fleet


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
        return await reply() if callable(reply) else reply


class Write(Method):
    """A method that gives a result and an event."""

    def options(self, num_returns: int) -> "Write":
        return self

    def remote(self, *args: Any) -> tuple[Any, Coroutine[Any, Any, Any]]:  # type: ignore[override]
        return "groups", super().remote(*args)


class Hired:
    """Hands that note whom they ended, and give every new generator the same method."""

    def __init__(self, write: Callable[[int], Any] = lambda call: {}, leaving: Sequence[str] = ()) -> None:
        self.ended: list[tuple[Any, bool]] = []
        self.write, self.gone = write, list(leaving)

    def ask(self, name: str) -> "Handle":
        return Handle(write=self.write)

    def end(self, handle: Any, restarts: bool) -> None:
        self.ended.append((handle, restarts))

    def leaving(self, handles: Mapping[str, Any]) -> list[str]:
        gone, self.gone = self.gone, []
        return gone


class Handle:
    def __init__(self, **methods: Callable[[int], Any]) -> None:
        self.write = Write(methods.get("write", lambda call: {}))
        self.__ray_ready__ = Method(lambda call: None)
        self.prepare = Method(methods.get("prepare", lambda call: None))
        self.load_version = Method(methods.get("load_version", lambda call: None))


def unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("restarting", None)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETRY_S", 0.01)
    monkeypatch.setattr(pool, "LOOK_S", 0.01)
    monkeypatch.setattr(fleet, "GROW_S", 0.03)


def test_an_idle_generator_that_broke_while_loading_is_started_again_and_gets_work() -> None:
    async def play() -> tuple[int, str, int]:
        handle = Handle(load_version=lambda call: RayActorError())
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool({"g": handle}, Hired(), Watch(5.0), 2, tasks.create_task, print)
            await generators.prepare(0)
            generators.publish(1)
            generators.publish(2)  # both loads fail: still one start
            _, replica = await generators._grant((0,), 2)
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
            handles = {"generator-7": Handle(prepare=away)}
            await GeneratorPool(handles, Hired(), watch, 2, tasks.create_task, print).prepare(0)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(play())
    assert caught.group_contains(DeadlineError, match="generator-7 has been unavailable")


def test_a_generator_that_is_unavailable_for_a_while_is_waited_for() -> None:
    async def play() -> int:
        handle = Handle(prepare=lambda call: unavailable() if call < 5 else None)
        async with asyncio.TaskGroup() as tasks:
            await GeneratorPool({"g": handle}, Hired(), Watch(5.0), 1, tasks.create_task, print).prepare(0)
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
            pool = GeneratorPool(
                handles, Hired(), Watch(5.0), 2, tasks.create_task, lambda swap: told.append(swap["actor"])
            )
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
            generators = GeneratorPool({"g": Handle()}, Hired(), Watch(5.0), 1, tasks.create_task, print)
            await generators.prepare(0)
            first, _ = await generators._grant((0,), 0)
            waiting = asyncio.ensure_future(generators._grant((1,), 0))
            await asyncio.sleep(0)
            generators._fleet.release("g", first)
            generators._hand_out()  # to the waiting one, which is cancelled before it wakes
            waiting.cancel()
            await asyncio.wait({waiting})
            return (await asyncio.wait_for(generators._grant((2,), 0), 2.0))[1].name

    assert asyncio.run(play()) == "g"


class Hangs(Write):
    """A call that is never answered, until the actor has been ended."""

    async def _answer(self, reply: Any) -> Any:
        await asyncio.Event().wait()


def test_a_batch_of_a_generator_that_hangs_goes_to_another_and_the_hung_one_is_ended() -> None:
    async def play() -> tuple[Any, list[tuple[Any, bool]], dict[str, Any]]:
        hands, handles = Hired(), {"a": Handle(), "b": Handle()}
        handles["a"].write = Hangs(lambda call: None)
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool(handles, hands, Watch(0.2), 2, tasks.create_task, print)
            await generators.prepare(0)
            result, _ = await generators.call("write", priority=(0,), least_version=0)
        return result, hands.ended, handles

    result, ended, handles = asyncio.run(play())
    assert result == "groups"
    assert ended == [(handles["a"], True)]
    assert handles["a"].prepare.calls == 2  # and it has started again


def test_a_batch_that_kills_every_generator_is_given_up_by_name() -> None:
    async def play() -> int:
        handles = {"a": Handle(write=lambda call: RayActorError()), "b": Handle(write=lambda call: RayActorError())}
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool(handles, Hired(), Watch(5.0), 3, tasks.create_task, print)
            await generators.prepare(0)
            with pytest.raises(GivenUp, match="GeneratorDied"):
                await generators.call("write", priority=(0,), least_version=0)
        return handles["a"].write.calls + handles["b"].write.calls

    assert asyncio.run(play()) == 3


def test_waiting_work_brings_generators_and_idleness_takes_them_away() -> None:
    """Six batches of 0.1 s for one generator, of at most three; later nobody has work."""

    async def play() -> tuple[list[str], list[str], list[tuple[Any, bool]]]:
        async def slow() -> Json:
            await asyncio.sleep(0.1)
            return {}

        hands = Hired(lambda call: slow)
        handles = {"generator-0": Handle(write=lambda call: slow)}
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool(handles, hands, Watch(5.0), 1, tasks.create_task, print)
            await generators.prepare(0)
            keeping = tasks.create_task(generators.keep(3, 0.15))
            work = (generators.call("write", priority=(0, i), least_version=0) for i in range(6))
            await asyncio.gather(*work)
            at_work = sorted(handles)
            async with asyncio.timeout(5.0):
                while len(handles) > 1:
                    await asyncio.sleep(0.02)
            keeping.cancel()
        return at_work, sorted(handles), hands.ended

    at_work, left, ended = asyncio.run(play())
    assert at_work == ["generator-0", "generator-1", "generator-2"]
    assert left == ["generator-0"]
    assert [restarts for _, restarts in ended] == [False, False]


def test_a_generator_on_a_node_that_goes_starts_again_elsewhere() -> None:
    async def play() -> tuple[list[tuple[Any, bool]], Handle, dict[str, str]]:
        handle, hands = Handle(), Hired(leaving=["g"])
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool({"g": handle}, hands, Watch(5.0), 1, tasks.create_task, print)
            await generators.prepare(0)
            keeping = tasks.create_task(generators.keep(1, 5.0))
            async with asyncio.timeout(5.0):
                while handle.prepare.calls < 2 or generators.states() != {"g": "healthy"}:
                    await asyncio.sleep(0.01)
            keeping.cancel()
        return hands.ended, handle, generators.states()

    ended, handle, states = asyncio.run(play())
    assert ended == [(handle, True)]
    assert states == {"g": "healthy"}


@pytest.mark.parametrize("method", ["prepare", "load_version"])
def test_one_that_hangs_while_another_works_is_ended_and_the_run_goes_on(method: str) -> None:
    """In its second start, or in a swap: as on a node whose GPU has broken."""

    async def play() -> tuple[Hired, Handle, dict[str, str]]:
        async def forever() -> None:
            await asyncio.Event().wait()

        hangs = {method: lambda call: forever if call == {"prepare": 2, "load_version": 1}[method] else None}
        hands, handles = Hired(), {"a": Handle(**hangs), "b": Handle()}
        if method == "prepare":
            handles["a"].write = Write(lambda call: RayActorError())
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool(handles, hands, Watch(0.2), 3, tasks.create_task, print)
            await generators.prepare(0)
            generators.publish(1)
            await generators.call("write", priority=(0,), least_version=0)
            async with asyncio.timeout(5.0):
                while not hands.ended or generators.states() != {"a": "healthy", "b": "healthy"}:
                    await asyncio.sleep(0.01)
        return hands, handles["a"], generators.states()

    hands, hung, states = asyncio.run(play())
    assert hands.ended == [(hung, True)]
    assert states == {"a": "healthy", "b": "healthy"}


def test_one_that_hangs_alone_ends_the_run_by_name() -> None:
    async def play() -> None:
        async def forever() -> None:
            await asyncio.Event().wait()

        async with asyncio.TaskGroup() as tasks:
            handles = {"generator-7": Handle(prepare=lambda call: forever)}
            await GeneratorPool(handles, Hired(), Watch(0.1), 2, tasks.create_task, print).prepare(0)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(play())
    assert caught.group_contains(DeadlineError, match="generator-7 .start. has not answered")


def test_a_generator_that_is_given_back_with_a_batch_in_flight_fails_that_batch_only() -> None:
    async def play() -> Any:
        late = asyncio.Event()

        async def fails_late() -> None:
            await late.wait()
            raise EngineError("broken")

        handles = {"a": Handle(write=lambda call: fails_late), "b": Handle()}
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool(handles, Hired(), Watch(5.0), 2, tasks.create_task, print)
            await generators.prepare(0)
            call = tasks.create_task(generators.call("write", priority=(0,), least_version=0))
            await asyncio.sleep(0.05)
            generators._give_back("a")
            late.set()
            return (await call)[0]

    assert asyncio.run(play()) == "groups"


def test_the_only_generator_that_hangs_once_starts_again_and_writes() -> None:
    """Its start takes a while: that nothing has moved for as long as it hung does not end the run."""
    hands, handle = Hired(), Handle()
    hangs, writes = Hangs(lambda call: None), handle.write

    async def starts_again() -> None:
        await asyncio.sleep(0.1)
        handle.write = writes

    async def play() -> Any:
        async with asyncio.TaskGroup() as tasks:
            generators = GeneratorPool({"a": handle}, hands, Watch(0.2), 2, tasks.create_task, print)
            await generators.prepare(0)
            handle.write, handle.prepare = hangs, Method(lambda call: starts_again)
            return await generators.call("write", priority=(0,), least_version=0)

    assert asyncio.run(play())[0] == "groups"
    assert hands.ended == [(handle, True)]
