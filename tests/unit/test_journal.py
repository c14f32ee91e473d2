"""What is saved while others save."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from actors.journal import Journal
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.effort import Effort
from rlsf_ray.stream.run_state import RunState

EVENT = {"role": "scorer", "actor": "s", "stage": "score", "end": 1.0}


class Slow(RunStore):
    """Begins a file, and ends it once it may; or there is no room."""

    begun, full = 0, False
    may_end: threading.Event

    def write_json(self, name: str, obj: Any) -> None:
        self.begun += 1
        assert self.may_end.wait(30)
        if self.full:
            raise OSError("no room")
        super().write_json(name, obj)


def make(folder: Path) -> tuple[Journal, RunState, Slow]:
    config = tiny_config(Path("model"))
    RunStore.create_or_resume(str(folder), config)
    store, state = Slow.open(str(folder)), RunState("run", config)
    assert isinstance(store, Slow)
    store.may_end = threading.Event()
    return Journal(store, state, Effort({})), state, store


async def until_begun(store: Slow) -> None:
    while not store.begun:
        await asyncio.sleep(0.001)


def test_calls_during_a_write_share_the_next_and_find_what_they_had_to_say(tmp_path: Path) -> None:
    journal, state, store = make(tmp_path)

    async def batch(number: int) -> None:
        journal.record(EVENT | {"start": number})
        state.counts["traces"] += 1
        told = state.counts["traces"]
        await journal.save()
        assert number in [row["start"] for row in store.read_metrics("stages")]
        assert store.read_json("state.json")["counts"]["traces"] >= told

    async def play() -> None:
        first = asyncio.create_task(batch(0))
        await until_begun(store)
        others = [asyncio.create_task(batch(number)) for number in range(1, 20)]
        await asyncio.sleep(0.01)
        store.may_end.set()
        await asyncio.gather(first, *others)

    asyncio.run(play())
    assert store.begun == 2
    assert sorted(row["start"] for row in store.read_metrics("stages")) == list(range(20))


def test_who_shares_a_write_hears_of_its_failure_and_the_next_call_writes_again(tmp_path: Path) -> None:
    journal, _, store = make(tmp_path)
    store.full = True
    store.may_end.set()

    async def play() -> None:
        found = await asyncio.gather(*(journal.save() for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in found] == ["no room"] * 3
        store.full = False
        await journal.save()

    asyncio.run(play())
    assert store.read_json("state.json")["state"] == "starting"


def test_a_write_that_has_begun_is_finished_though_its_caller_is_stopped(tmp_path: Path) -> None:
    journal, _, store = make(tmp_path)

    async def play() -> None:
        saving = asyncio.create_task(journal.save())
        await until_begun(store)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        assert store.read_json("state.json") is None
        store.may_end.set()
        while store.read_json("state.json") is None:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(play(), 30))
    assert store.begun == 1
