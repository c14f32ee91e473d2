"""The durable, bounded buffer between scorers and trainer: stream/buffer.py with waiting and files."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby

from actors.job import Job
from rlsf_ray.records import Outcome, TrainingGroup
from rlsf_ray.run_store import group_to_row, pair_rows, row_to_group, rows_to_outcome
from rlsf_ray.stream.buffer import Lease, PairQueue, unknown


class PairBuffer:
    """An async actor: many calls wait here at once, one event loop changes the queue."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._changed = asyncio.Condition()
        self._closed = False
        # By (round, part): the attempt that may store the batch, and what an attempt has stored
        self._attempts: dict[tuple[int, int], int] = {}
        self._stored: dict[tuple[int, int], tuple[Sequence[TrainingGroup], Sequence[int]]] = {}
        self._turns: dict[tuple[int, int], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._idle_cpu_s = time.process_time()  # spent on imports, before any work

    async def prepare(
        self, rounds_ended: int, without: Mapping[int, Sequence[int]] | None = None
    ) -> dict[int, list[Outcome]]:
        """Start from the run directory: groups of rounds that are not over come back, but for those given up before.

        `without`: round -> sequences that ended without pairs. Returns how the prompts of these rounds have ended, as
        far as that is certain.
        """
        self._store = self._job.enter(self._name)
        self._queue = PairQueue(self._store.config.cluster.buffer_groups)
        self._queue.end_rounds(rounds_ended)
        for round, sequences in (without or {}).items():
            self._queue.skip(round, sequences)
        return await asyncio.to_thread(self._recover, rounds_ended)

    def _recover(self, rounds_ended: int) -> dict[int, list[Outcome]]:
        recovered = {}
        for round in self._store.rounds("traces"):
            if round >= rounds_ended:
                for row in self._store.read_table("groups", round).to_pylist():
                    self._queue.put(row_to_group(row))
                recovered[round] = self._outcomes(round)
        return recovered

    def _outcomes(self, round: int) -> list[Outcome]:
        """Of the prompts whose traces are stored and that were filtered, or whose pairs are held here."""
        columns = ["group_id", "sequence", "token_ids", "finished", "answer", "reason"]
        traces = self._store.read_table("traces", round).select(columns).sort_by("sequence").to_pylist()
        pairs = self._queue.num_examples(round)
        groups = [list(rows) for _, rows in groupby(traces, key=lambda row: row["sequence"])]
        outcomes = [rows_to_outcome(rows, pairs.get(rows[0]["sequence"], 0)) for rows in groups]
        return [outcome for outcome in outcomes if outcome.num_examples or outcome.reason is not None]

    async def begin(self, round: int, part: int, attempt: int) -> list[Outcome] | None:
        """An attempt at a batch begins: from here on an earlier one, whose scorer has died, stores nothing any more.

        Returns how the batch has ended if an earlier one has stored it: that holds, whatever was written since. Waits
        for room as that one's `put` did.
        """
        key = round, part
        async with self._turns[key]:
            self._attempts[key] = attempt
            stored = self._stored.get(key)
        if stored is None:
            return None
        groups, skipped = stored
        await self._let_in(round, groups, skipped)
        ended = {*(group.sequence for group in groups), *skipped}
        outcomes = await asyncio.to_thread(self._outcomes, round)
        return [outcome for outcome in outcomes if outcome.sequence in ended]

    async def put(
        self, round: int, part: int, attempt: int, groups: Sequence[TrainingGroup], skipped: Sequence[int]
    ) -> int:
        """Take a batch: stored first, then let in as there is room. Returns how many groups were new.

        What comes from an attempt after which another has begun is dropped.
        """
        key = round, part
        async with self._turns[key]:
            if attempt < self._attempts.get(key, attempt):
                return 0
            new = unknown(self._queue, groups)
            if new:
                await asyncio.to_thread(self._write, round, part, groups)
            self._stored[key] = groups, skipped
        await self._let_in(round, groups, skipped)
        return len(new)

    async def _let_in(self, round: int, groups: Sequence[TrainingGroup], skipped: Sequence[int]) -> None:
        """A batch into the queue, group by group; those that it knows change nothing."""
        for group in groups:
            async with self._changed:
                while not (self._closed or self._queue.has_room(group)):
                    await self._changed.wait()
                self._queue.put(group)
                self._changed.notify_all()
        async with self._changed:
            self._queue.skip(round, skipped)
            self._changed.notify_all()

    async def give_up(self, round: int, sequences: Sequence[int]) -> list[Outcome]:
        """No more attempts for these prompts. Returns the outcomes of those whose groups are held all the same."""
        async with self._changed:
            self._queue.skip(round, sequences)
            self._changed.notify_all()
            held = set(self._queue.num_examples(round)) & set(sequences)
        outcomes = await asyncio.to_thread(self._outcomes, round) if held else []
        return [outcome for outcome in outcomes if outcome.sequence in held]

    def _write(self, round: int, part: int, groups: Sequence[TrainingGroup]) -> None:
        """Pairs before groups: a group that is found after a crash has its pairs stored."""
        self._store.write_table("pairs", round, part, [row for group in groups for row in pair_rows(group)])
        self._store.write_table("groups", round, part, [group_to_row(group) for group in groups])

    async def lease(self, round: int, first: int, max_groups: int, wait_s: float) -> Lease | None:
        """Groups from sequence `first` on; an empty lease if none came within `wait_s`; None once closed."""
        until = asyncio.get_running_loop().time() + wait_s
        async with self._changed:
            while not self._closed:
                lease = self._queue.lease(round, first, max_groups)
                remaining_s = until - asyncio.get_running_loop().time()
                if lease.groups or lease.ended or remaining_s <= 0:
                    self._changed.notify_all()  # there may be room now
                    return lease
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), remaining_s)
        return None

    async def close_round(self, round: int, size: int) -> None:
        """The round has `size` sequences."""
        async with self._changed:
            self._queue.close_round(round, size)
            self._changed.notify_all()

    async def end_rounds(self, count: int) -> None:
        """The rounds before `count` are over."""
        async with self._changed:
            self._queue.end_rounds(count)
            self._changed.notify_all()
        for known in (self._attempts, self._stored, self._turns):
            for key in [key for key in known if key[0] < count]:
                del known[key]

    async def close(self) -> None:
        """No more leases: the trainer stops at its next step."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def processor_time(self) -> float:
        """Seconds that this process has computed, without its imports."""
        return time.process_time() - self._idle_cpu_s
