"""Turns groups into pairs, and hands them to the buffer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from actors.cores import Cores, give_memory_back
from actors.generator import num_tokens
from actors.job import Job, device, event
from rlsf_ray.errors import WeightsError
from rlsf_ray.judging import of_batch
from rlsf_ray.records import Group, Json, Outcome, ScoredGroup, TrainingGroup


class ScorerWorker:
    """One scorer. Its methods run in several threads, of which one computes: the others wait for room in the buffer.

    So a batch that waits never keeps back an earlier one, which the trainer may be waiting for.
    """

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._computing = threading.Lock()
        self._scorer: Any = None
        self._backlog, self._counting = 0, threading.Lock()

    def backlog(self) -> int:
        """Batches here that are not computed yet."""
        return self._backlog

    def prepare(self) -> None:
        """Build the scorer if there is none (first start, or a restart)."""
        with self._computing:
            if self._scorer is None:
                from rlsf_ray.engines.scorer import Scorer

                self._store = self._job.enter(self._name, threads=0)
                config = self._store.config
                self._cores = Cores(config.cluster.scorers)
                self._buffer = self._job.actor("pair_buffer")
                pool = config.cluster.scorers
                scorer = Scorer(config, threads=pool.threads, device=device(pool))
                scorer.judge.load()
                self._weights = self._job.actor("weight_store")
                self._scorer = scorer

    def process(self, boxed: list[Any], round: int, part: int, attempt: int) -> tuple[list[Outcome], Json]:
        """Score one batch and put it into the buffer; waits while the buffer is full.

        `boxed` holds references of lists of groups. Traces are stored before the buffer hears of them. The
        coordinator watches how long this takes. `attempt` grows; where an earlier one at this batch has stored it, that
        holds, and its outcomes are returned.
        """
        from rlsf_ray.engines.scorer import outcome

        with self._waiting():
            self.prepare()
            start = time.time()
            held: list[Outcome] | None = ray.get(self._buffer.begin.remote(round, part, attempt))
            if held is not None:
                return held, event("scorer", self._name, "score", round, start)
            scored, training, done = self._compute(boxed, round, part)
        skipped = [one.group.sequence for one in scored if one.reason is not None]
        ray.get(self._buffer.put.remote(round, part, attempt, training, skipped))
        return [outcome(one) for one in scored], done

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        with self._counting:
            self._backlog += 1
        try:
            yield
        finally:
            with self._counting:
                self._backlog -= 1

    def _compute(self, boxed: list[Any], round: int, part: int) -> tuple[list[ScoredGroup], list[TrainingGroup], Json]:
        """(scored groups, those with something to learn, the stage event); stores the traces."""
        lists: list[list[Group]] = ray.get(boxed, timeout=self._store.config.cluster.deadline_s)
        groups = [group for groups in lists for group in groups]
        self._fetch(round, {group.version for group in groups})
        with self._computing, self._cores.turn():
            start = time.time()
            scored, training = self._score(groups)
            rows = [row for one in scored for row in self._store.trace_rows(one)]
            self._store.write_table("traces", round, part, rows)
            if found := of_batch(scored):
                self._store.append_metrics(f"judges-{self._name}", [{"round": round, "part": part, **found}])
            done = event("scorer", self._name, "score", round, start, num_tokens(groups))
            give_memory_back()
        return scored, training, done

    def _fetch(self, round: int, versions: set[int]) -> None:
        """Hold the adapters of these versions, where the signal is to be read with them; and the reward model."""
        judge, config = self._scorer.judge, self._store.config
        deadline_s = config.cluster.deadline_s
        if config.reward_model and not config.trains_reward(round) and not judge.has_reward:
            trained = self._store.reward_round(round)
            if trained is None:
                raise WeightsError(f"round {round} is to be scored by a reward model, but no round before has made one")
            with self._computing:
                judge.load_reward(self._store.read_reward(trained))
        for version in sorted(versions):
            if not judge.holds(version):
                _, _, boxed = ray.get(self._weights.get.remote(version), timeout=deadline_s)
                adapter, _ = ray.get(boxed[0], timeout=deadline_s)
                with self._computing:
                    judge.load_version(version, adapter)

    def _score(self, groups: list[Group]) -> tuple[list[ScoredGroup], list[TrainingGroup]]:
        scored = self._scorer.score(groups)
        return scored, self._scorer.training_groups(scored)
