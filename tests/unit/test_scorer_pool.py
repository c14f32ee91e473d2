"""Scorers come while batches wait at each of them, go when idle, and leave a node that goes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors import scorers as module
from actors import watch
from actors.scorers import ScorerPool
from actors.watch import Watch


class Scorer:
    """It computes one batch at a time, each for `seconds`; `dies`: its calls raise that it is gone for good."""

    def __init__(self, seconds: float = 0.0, *, dies: bool = False, starts: bool = True) -> None:
        self._seconds, self._dies, self._starts = seconds, dies, starts
        self._computing, self._waiting, self.done = asyncio.Lock(), 0, list[int]()
        self.process, self.backlog = SimpleNamespace(remote=self._process), SimpleNamespace(remote=self._backlog)
        self.prepare = self.__ray_ready__ = SimpleNamespace(remote=self._prepare)

    async def _process(self, boxed: list[Any], round: int, part: int, attempt: int) -> tuple[list[Any], Any]:
        if self._dies:
            raise ActorDiedError
        self._waiting += 1
        async with self._computing:
            await asyncio.sleep(self._seconds)
        self._waiting -= 1
        self.done.append(part)
        return [part], {"stage": "score"}

    async def _backlog(self) -> int:
        return self._waiting

    async def _prepare(self) -> None:
        await asyncio.sleep(0.02)
        if not self._starts:
            raise RayTaskError("prepare", "no memory left on its GPU", MemoryError())


class Hired:
    """Hands that give the scorers of a list one by one, then quick ones, and note whom they ended."""

    def __init__(self, *scorers: Scorer, leaving: tuple[str, ...] = ()) -> None:
        self.ended: list[tuple[Any, bool]] = []
        self.scorers, self.gone = list(scorers), list(leaving)

    def ask(self, name: str) -> Scorer:
        return self.scorers.pop(0) if self.scorers else Scorer(0.01)

    def end(self, handle: Any, restarts: bool) -> None:
        self.ended.append((handle, restarts))

    def leaving(self, handles: Mapping[str, Any]) -> list[str]:
        return [name for name in self.gone if name in handles]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETRY_S", 0.01)
    monkeypatch.setattr(module, "LOOK_S", 0.01)


async def work(handles: dict[str, Any], hands: Any, most: int, batches: int, until: int) -> list[int]:
    """Score so many batches at once, then wait until `until` scorers are left; returns their numbers."""
    async with asyncio.TaskGroup() as tasks:
        pool = ScorerPool(handles, hands, Watch(5.0), 3, tasks.create_task)
        await pool.prepare()
        keeping = tasks.create_task(pool.keep(most, 0.1))
        found = await asyncio.gather(*(pool.score(["groups"], 0, part) for part in range(batches)))
        async with asyncio.timeout(5.0):
            while len(handles) != until:
                await asyncio.sleep(0.01)
        keeping.cancel()
    return sorted(part for outcomes, _ in found for part in outcomes)


def test_a_scorer_comes_while_batches_wait_and_goes_when_idle() -> None:
    first, second, third = Scorer(0.05), Scorer(0.05), Scorer(0.05)
    hands, handles = Hired(second, third), {"scorer-0": first}

    async def play() -> list[int]:
        async with asyncio.TaskGroup() as tasks:
            pool = ScorerPool(handles, hands, Watch(5.0), 3, tasks.create_task)
            keeping = tasks.create_task(pool.keep(2, 1.0))
            waves = [[pool.score(["groups"], 0, 4 * wave + i) for i in range(4)] for wave in range(4)]
            found = [one for wave in waves for one in await asyncio.gather(*wave)]
            async with asyncio.timeout(5.0):
                while len(handles) > 1:
                    await asyncio.sleep(0.01)
            keeping.cancel()
        return [part for outcomes, _ in found for part in outcomes]

    assert asyncio.run(play()) == list(range(16))
    assert second.done
    assert sorted(first.done + second.done) == list(range(16))
    assert hands.ended == [(second, False)]
    assert hands.scorers == [third], "two at most"


def test_a_scorer_whose_batches_only_wait_for_the_buffer_gets_no_help() -> None:
    first = Scorer(0.3)
    first.backlog = SimpleNamespace(remote=lambda: asyncio.sleep(0, 0))
    assert asyncio.run(work({"scorer-0": first}, Hired(), 2, 4, until=1)) == [0, 1, 2, 3]


def test_one_that_cannot_start_is_let_go_and_another_is_asked_for() -> None:
    first, second, third = Scorer(0.1), Scorer(starts=False), Scorer(0.01)
    hands = Hired(second, third)

    assert asyncio.run(work({"scorer-0": first}, hands, 2, 8, until=1)) == list(range(8))
    assert hands.ended[0] == (second, False)


def test_one_that_finds_no_place_is_let_go_once_nothing_waits() -> None:
    first, second, gone = Scorer(0.05), Scorer(), asyncio.Event()
    second.__ray_ready__ = SimpleNamespace(remote=gone.wait)

    async def play() -> list[int]:
        hands = Hired(second)
        playing = asyncio.ensure_future(work({"scorer-0": first}, hands, 2, 6, until=1))
        async with asyncio.timeout(5.0):
            while not hands.ended:
                await asyncio.sleep(0.01)
        assert hands.ended == [(second, False)]
        gone.set()
        return await playing

    assert asyncio.run(play()) == list(range(6))


def test_a_batch_of_one_that_died_for_good_goes_to_another() -> None:
    first, second = Scorer(0.05), Scorer(dies=True)
    hands = Hired(second, Scorer(dies=True), Scorer(dies=True))
    assert asyncio.run(work({"scorer-0": first}, hands, 2, 6, until=1)) == list(range(6))
    assert first.done == list(range(6))


def test_a_scorer_on_a_node_that_goes_starts_again_or_is_given_back() -> None:
    first, second = Scorer(0.05), Scorer(0.05)
    hands = Hired(second, leaving=("scorer-0", "scorer-1"))
    assert asyncio.run(work({"scorer-0": first}, hands, 2, 8, until=1)) == list(range(8))
    assert hands.ended[:2] == [(first, True), (second, False)]
    assert first not in dict(hands.ended[1:]), "once"


@pytest.mark.parametrize("alone", [True, False])
def test_a_scorer_that_hangs_as_it_comes_back_is_ended_or_alone_ends_the_run(alone: bool) -> None:
    """It dies at its first batch, and its next start never ends."""
    broken, fine, hands = Scorer(dies=True), Scorer(), Hired()
    handles: dict[str, Any] = {"scorer-0": broken} | ({} if alone else {"scorer-1": fine})

    async def play() -> list[int]:
        async with asyncio.TaskGroup() as tasks:
            watch = Watch(0.2)
            pool = ScorerPool(handles, hands, watch, 3, tasks.create_task)
            await pool.prepare()
            broken.prepare = SimpleNamespace(remote=lambda: asyncio.sleep(30.0))
            (found,), _ = await pool.score(["groups"], 0, 0)
            for _ in range(6):  # while the run goes on
                watch.moved()
                await asyncio.sleep(0.05)
            handles.clear()  # and is over
            return [found]

    if alone:
        with pytest.raises(ExceptionGroup) as errors:
            asyncio.run(play())
        assert "scorer-0 has not answered" in str(errors.value.exceptions[0])
    else:
        assert asyncio.run(play()) == [0]
        assert set(hands.ended) == {(broken, True)}
