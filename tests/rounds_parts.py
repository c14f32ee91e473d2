"""Rounds of a run whose generators and scorers are made up."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError
from tiny import tiny_config

from actors.journal import Journal
from actors.rounds import Rounds
from actors.watch import Watch
from rlsf_ray.records import Json, Outcome
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.effort import Effort
from rlsf_ray.stream.run_state import RunState

DEADLINE_S = 5.0
Reply = Callable[[int], BaseException | None]

EVENT = {"role": "scorer", "actor": "s", "stage": "score", "start": 0.0, "end": 1.0}


class Scorer:
    """Its n-th call raises what `reply(n)` gives, else it answers with its own name; `back`: the same of its start."""

    attempts = 0  # the highest so far, of all scorers

    def __init__(self, name: str, reply: Reply) -> None:
        self._name, self._reply, self.got = name, reply, list[Any]()
        self.back: Reply = fine
        self.built = 0
        self.process, self.prepare = SimpleNamespace(remote=self._call), SimpleNamespace(remote=self._build)

    async def _call(self, boxed: list[Any], round: int, part: int, attempt: int = 0) -> tuple[list[Outcome], Json]:
        self.got.append(boxed[0])
        assert attempt == 0 or attempt > Scorer.attempts
        Scorer.attempts = attempt
        error = self._reply(len(self.got))
        if error is not None:
            raise error
        return [filtered(0, self._name)], EVENT

    async def _build(self) -> None:
        self.built += 1
        error = self.back(self.built)
        if error is not None:
            raise error


class Pool:
    """Every call writes other traces."""

    def __init__(self) -> None:
        self.written = 0

    async def call(self, *args: Any, **options: Any) -> tuple[str, Json]:
        self.written += 1
        return f"traces {self.written}", EVENT


def fine(call: int) -> None:
    return None


def dead(call: int) -> RayActorError:
    return RayActorError()


def unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("restarts", None)


def score(made: Rounds) -> Any:
    async def play() -> Any:
        async with asyncio.TaskGroup() as made._tasks:
            outcomes, failed = await made._batches._generate_and_score(0, 0, 0, [])
        assert not failed
        return [outcome.group_id for outcome in outcomes]

    try:
        return asyncio.run(play())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def make(
    folder: Path, *, clock: Callable[[], float] = time.monotonic, rounds: int = 2, **replies: Reply
) -> tuple[Rounds, dict[str, Scorer], Pool]:
    config = tiny_config(Path("model"), rounds=rounds)  # attempts: 3
    scorers = {name: Scorer(name, reply) for name, reply in replies.items()}
    crew: Any = SimpleNamespace(scorers=scorers, generators={}, hands=lambda pool: None)
    store = RunStore.create_or_resume(str(folder), config)
    state = RunState("run", config)
    made = Rounds(store, state, Journal(store, state, Effort({})), crew, Watch(DEADLINE_S, clock))
    pool = Pool()
    made._batches._pool = pool  # type: ignore[assignment]
    return made, scorers, pool


def filtered(sequence: int, name: str = "g") -> Outcome:
    counts = {"num_traces": 4, "num_tokens": 9, "num_cut_off": 0, "num_parsed": 0, "num_examples": 0}
    return Outcome(group_id=name, sequence=sequence, reason="no_answers", **counts)


def with_pairs(sequence: int) -> Outcome:
    return replace(filtered(sequence), num_parsed=4, num_examples=2, reason=None)
