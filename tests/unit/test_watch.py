"""Waits: a failure beside them is heard at once, and a deadline names who was late."""

from __future__ import annotations

import asyncio
import time

import pytest

from actors.watch import Watch
from rlsf_ray.errors import DeadlineError


async def fails_as_it_moves(watch: Watch) -> None:
    await asyncio.sleep(0.05)
    watch.moved()  # wakes whoever waits, in the same moment
    raise ValueError("the commit was refused")


def test_a_task_that_moves_and_fails_in_one_moment_ends_the_wait_beside_it() -> None:
    watch = Watch(deadline_s=20.0)

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fails_as_it_moves(watch))
            await watch.until(lambda: False, "the trainer")

    start = time.monotonic()
    with pytest.raises(ExceptionGroup) as found:
        asyncio.run(run())
    assert [type(error) for error in found.value.exceptions] == [ValueError]
    assert time.monotonic() - start < 5.0


def test_an_answer_that_comes_with_a_failure_beside_it_does_not_hide_it() -> None:
    watch = Watch(deadline_s=20.0)

    async def run() -> None:
        done = asyncio.get_running_loop().create_future()

        async def answers_and_fails() -> None:
            await asyncio.sleep(0.05)
            done.set_result(1)
            raise ValueError("the commit was refused")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(answers_and_fails())
            await watch.answer(done, "the weight store")
            await asyncio.sleep(20.0)

    start = time.monotonic()
    with pytest.raises(ExceptionGroup):
        asyncio.run(run())
    assert time.monotonic() - start < 5.0


def test_a_deadline_names_who_was_late() -> None:
    async def run() -> None:
        await Watch(deadline_s=0.05).until(lambda: False, "the trainer")

    with pytest.raises(DeadlineError, match=r"the trainer has not answered and nothing else has moved for 0\.05 s"):
        asyncio.run(run())


def test_a_held_run_need_not_move_and_its_deadline_counts_anew_from_the_end() -> None:
    now = [0.0]
    watch = Watch(deadline_s=10.0, clock=lambda: now[0])

    async def run() -> float:
        watch.hold(True)
        waiting = asyncio.ensure_future(watch.until(lambda: False, "the trainer"))
        for _ in range(3):
            now[0] += 100.0
            await asyncio.sleep(0)
            watch._event.set()  # as if time had passed: it looks again
            watch._event = asyncio.Event()
        assert not waiting.done()
        watch.hold(False)
        await asyncio.sleep(0)
        assert not waiting.done()
        now[0] += 11.0
        watch._event.set()
        with pytest.raises(DeadlineError, match="the trainer"):
            await waiting
        return now[0]

    assert asyncio.run(run()) == 311.0


def test_whoever_is_asked_alone_is_late_before_the_run_is_said_to_stand_still() -> None:
    """A generator that hangs with the last batch of a round is ended and replaced; the round waits for that."""
    watch, told = Watch(deadline_s=0.3), list[str]()

    async def ask() -> None:
        await asyncio.sleep(0.1)  # after the run has last moved
        with pytest.raises(DeadlineError, match=r"^the generator has not answered"):
            await watch.answer(asyncio.sleep(30.0), "the generator")
        await asyncio.sleep(0.1)
        told.append("ended")
        watch.moved()

    async def run() -> None:
        asking = asyncio.ensure_future(ask())
        await watch.until(lambda: bool(told), "the trainer")
        await asking

    asyncio.run(run())
    assert told == ["ended"]
