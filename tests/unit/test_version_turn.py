"""One version at a time: a change waits for those who write, and nobody overtakes who waits for it."""

from __future__ import annotations

import asyncio

import pytest

from rlsf_ray.engines.version_turn import VersionTurn


def test_those_of_one_version_write_together_and_a_change_waits_for_all_of_them() -> None:
    seen: list[str] = []

    async def play() -> None:
        async def change(version: int) -> None:
            seen.append(f"change to {version}")

        turn = VersionTurn(change)

        async def write(name: str, version: int, seconds: float) -> None:
            async with turn.of(version):
                seen.append(f"{name} begins")
                await asyncio.sleep(seconds)
                seen.append(f"{name} ends")

        await asyncio.gather(write("a", 0, 0.02), write("b", 0, 0.04), write("c", 1, 0.01), write("d", 0, 0.0))

    asyncio.run(play())
    assert seen == [
        *("a begins", "b begins", "a ends", "b ends"),
        *("change to 1", "c begins", "c ends"),
        *("change to 0", "d begins", "d ends"),
    ]


def test_after_a_failed_change_the_next_writer_changes_again() -> None:
    tried: list[int] = []

    async def play() -> None:
        async def change(version: int) -> None:
            tried.append(version)
            if len(tried) == 1:
                raise ValueError("torn")

        turn = VersionTurn(change)
        with pytest.raises(ValueError, match="torn"):
            async with turn.of(1):
                pass
        async with turn.of(0):  # what the failed change has left behind is not version 0
            pass
        async with turn.of(0):
            pass

    asyncio.run(play())
    assert tried == [1, 0]


def test_new_content_under_the_active_number_is_taken_in() -> None:
    tried: list[int] = []

    async def play() -> None:
        async def change(version: int) -> None:
            tried.append(version)

        turn = VersionTurn(change)
        for _ in range(2):
            async with turn.of(1):
                pass
            await turn.forget(1)
        async with turn.of(1):
            pass

    asyncio.run(play())
    assert tried == [1, 1, 1]
