"""The buffer actor as the plain class it is: waiting, durability, recovery."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

from actors.job import Job, source_hash
from actors.pair_buffer import PairBuffer
from rlsf_ray.placement import NO_GPUS
from rlsf_ray.records import Json, Pair, TrainingGroup, TrainingTrace
from rlsf_ray.run_store import RunStore


def group(sequence: int) -> TrainingGroup:
    trace = TrainingTrace(
        id="t",
        seed=1,
        version=0,
        score=0.5,
        answer="1",
        token_ids=np.array([1, 2], np.int32),
        logprob=np.array([-0.5, -1.0], np.float32),
        reference_logprob=np.array([-0.5, -1.0], np.float32),
    )
    return TrainingGroup(
        id=f"r0/{sequence}",
        round=0,
        sequence=sequence,
        prompt_id=str(sequence),
        signal="disparity",
        prompt_ids=np.array([3], np.int32),
        traces=(trace, trace),
        pairs=(Pair(chosen=0, rejected=1),),
    )


def trace_row(sequence: int, reason: str | None) -> Json:
    return {"group_id": f"r0/{sequence}", "round": 0, "sequence": sequence, "reason": reason}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A run whose buffer holds two groups."""
    RunStore.create_or_resume(str(tmp_path / "run"), tiny_config(Path("model"), cluster={"buffer_groups": 2}))
    return Job(run="run", root=str(tmp_path / "run"), source=source_hash(), gpus=NO_GPUS)


def test_a_put_waits_while_the_buffer_is_full_and_goes_on_after_a_lease(job: Job) -> None:
    async def scenario() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        await buffer.prepare(0)
        await buffer.put(0, 0, 0, [group(0), group(1)], [])
        second = asyncio.create_task(buffer.put(0, 1, 0, [group(2)], [3]))
        await asyncio.sleep(0.2)
        assert not second.done()
        lease = await buffer.lease(0, 0, 8, 1.0)
        assert lease is not None
        assert [g.sequence for g in lease.groups] == [0, 1]
        assert await second == 1
        await buffer.close_round(0, 4)
        rest = await buffer.lease(0, lease.next_sequence, 8, 1.0)
        assert rest is not None
        assert ([g.sequence for g in rest.groups], rest.ended) == ([2], True)

    asyncio.run(scenario())


def test_a_lease_of_nothing_comes_back_empty_in_time_and_none_once_closed(job: Job) -> None:
    async def scenario() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        await buffer.prepare(0)
        lease = await asyncio.wait_for(buffer.lease(0, 0, 8, 0.05), 5)
        assert lease is not None
        assert (lease.groups, lease.ended) == ((), False)
        waiting = asyncio.create_task(buffer.lease(0, 0, 8, 60.0))
        await asyncio.sleep(0.05)
        await buffer.close()
        assert await asyncio.wait_for(waiting, 5) is None

    asyncio.run(scenario())


def test_a_new_life_finds_the_groups_that_were_put_and_why_the_others_are_missing(job: Job) -> None:
    """The traces of a batch are stored first: prompt 3 was scored, but its group never reached the buffer."""
    RunStore.open(job.root).write_table("traces", 0, 0, [trace_row(0, None), trace_row(1, "tie")])
    RunStore.open(job.root).write_table("traces", 0, 1, [trace_row(2, "tie"), trace_row(3, None)])

    async def first_life() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        await buffer.prepare(0)
        await buffer.put(0, 0, 0, [group(0)], [1])

    async def second_life() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        found = (await buffer.prepare(0))[0]
        ends = [(outcome.sequence, outcome.num_examples, outcome.reason) for outcome in found]
        assert ends == [(0, 1, None), (1, 0, "tie"), (2, 0, "tie")]
        assert await buffer.put(0, 0, 0, [group(0)], [1]) == 0  # told again: not taken twice
        lease = await buffer.lease(0, 0, 8, 1.0)
        assert lease is not None
        again = lease.groups[0]
        assert again.traces[0].token_ids.tolist() == [1, 2]
        assert again.traces[0].reference_logprob.tolist() == [-0.5, -1.0]

    asyncio.run(first_life())
    asyncio.run(second_life())


def test_a_batch_is_what_the_first_attempt_has_stored(job: Job) -> None:
    """The buffer has room for two of three groups: the scorer dies waiting, and its put lives on.

    The next attempt has other traces, of which none but the last prompt would have pairs.
    """
    reasons = (None, None, None, "tie")
    rows = [trace_row(sequence, reason) for sequence, reason in enumerate(reasons)]
    RunStore.open(job.root).write_table("traces", 0, 0, rows)

    async def first_life() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        await buffer.prepare(0)
        assert await buffer.begin(0, 0, 4) is None
        first = asyncio.create_task(buffer.put(0, 0, 4, [group(0), group(1), group(2)], [3]))
        while len(buffer._queue.num_examples(0)) < 2:
            await asyncio.sleep(0.01)
        again = asyncio.create_task(buffer.begin(0, 0, 9))
        lease = await buffer.lease(0, 0, 8, 60.0)
        assert lease is not None
        assert (len(lease.groups), await first) == (2, 3)
        ended = [(outcome.sequence, outcome.num_examples, outcome.reason) for outcome in await again or ()]
        assert ended == [(0, 1, None), (1, 1, None), (2, 1, None), (3, 0, "tie")]

    async def second_life() -> None:
        found = (await PairBuffer(job, "pair_buffer").prepare(0))[0]
        assert [outcome.sequence for outcome in found] == [0, 1, 2, 3]

    asyncio.run(first_life())
    asyncio.run(second_life())


def test_what_comes_late_from_a_dead_scorer_is_dropped(job: Job) -> None:
    """Its put reaches the buffer after the next attempt at the batch has begun."""

    async def scenario() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        await buffer.prepare(0)
        assert await buffer.begin(0, 0, 1) is None
        assert await buffer.begin(0, 0, 2) is None
        assert await buffer.put(0, 0, 1, [group(0)], [1]) == 0
        assert RunStore.open(job.root).rounds("groups") == []
        assert await buffer.put(0, 0, 2, [group(1)], [0]) == 1
        await _has_only(buffer, 1, size=2)

    asyncio.run(scenario())


def test_a_batch_that_could_not_be_stored_may_be_stored_by_the_next_attempt(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        await buffer.prepare(0)
        with monkeypatch.context() as patch:
            patch.setattr(buffer, "_write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await buffer.put(0, 0, 1, [group(0)], [])
        assert await buffer.begin(0, 0, 2) is None
        assert await buffer.put(0, 0, 2, [group(0)], []) == 1

    asyncio.run(scenario())


async def _has_only(buffer: PairBuffer, sequence: int, *, size: int) -> None:
    """Round 0 of `size` prompts ends with one group."""
    await buffer.close_round(0, size)
    lease = await buffer.lease(0, 0, 8, 1.0)
    assert lease is not None
    assert ([g.sequence for g in lease.groups], lease.ended) == ([sequence], True)


def test_a_prompt_that_was_given_up_does_not_come_back_in_a_new_life(job: Job) -> None:
    """Its scorer died while its put waited for room: the group is in the files, the ledger says failed."""
    RunStore.open(job.root).write_table("traces", 0, 0, [trace_row(0, None), trace_row(1, None)])

    async def scenario() -> None:
        first = PairBuffer(job, "pair_buffer")
        await first.prepare(0)
        await first.put(0, 0, 0, [group(0), group(1)], [])
        second = PairBuffer(job, "pair_buffer")
        found = (await second.prepare(0, {0: [1]}))[0]
        assert [outcome.sequence for outcome in found] == [0]
        await _has_only(second, 0, size=2)

    asyncio.run(scenario())


def test_giving_a_batch_up_keeps_what_was_put_and_skips_the_rest(job: Job) -> None:
    RunStore.open(job.root).write_table("traces", 0, 0, [trace_row(0, None), trace_row(1, None)])

    async def scenario() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        await buffer.prepare(0)
        await buffer.put(0, 0, 0, [group(0)], [])
        held = await buffer.give_up(0, [0, 1])
        assert [(outcome.sequence, outcome.num_examples) for outcome in held] == [(0, 1)]
        assert await buffer.put(0, 0, 0, [group(1)], []) == 0  # too late: it counts as failed
        await _has_only(buffer, 0, size=2)

    asyncio.run(scenario())


def test_a_new_life_drops_rounds_that_are_over(job: Job) -> None:
    async def scenario() -> None:
        buffer = PairBuffer(job, "pair_buffer")
        assert await buffer.prepare(1) == {}
        lease = await buffer.lease(0, 0, 8, 1.0)
        assert lease is not None
        assert lease.ended

    asyncio.run(scenario())
