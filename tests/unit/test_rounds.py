"""A run's rounds over its lives: what is taken up, measured, committed, and gone back from."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError
from rounds_parts import (
    DEADLINE_S,
    EVENT,
    Scorer,
    filtered,
    fine,
    make,
    with_pairs,
)
from tiny import tiny_config
from vitals_data import HEALTHY

from actors.journal import Journal
from actors.measuring import Measuring
from actors.rounds import Rounds
from actors.watch import Watch
from rlsf_ray.errors import ServiceError, StorageError
from rlsf_ray.records import Json, Outcome
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.effort import Effort
from rlsf_ray.stream.run_state import RunState


def test_a_version_is_measured_once_whoever_asks(tmp_path: Path) -> None:
    """A resumed run asks twice: when it hears of the checkpoint, and when it goes on."""
    made, _, _ = make(tmp_path, a=fine)
    measured: list[int] = []

    async def evaluate(version: int, questions: int) -> None:
        measured.append(version)

    async def play() -> None:
        pool = SimpleNamespace(start_task=asyncio.ensure_future)
        parts: Any = (made._state, made._journal, None, pool, made._watch, made._config, [], [])
        measuring = Measuring(*parts)
        measuring.evaluate = evaluate  # type: ignore[method-assign,assignment]
        measuring.beside()  # the base: measured before the rounds
        made._state.admission.end_round(0, 1)
        measuring.beside()
        measuring.beside()
        made._state.admission.end_round(1, 2)  # the last: measured on all questions, after the rounds
        measuring.beside()
        await measuring.ended()

    asyncio.run(play())
    assert measured == [1]


def test_versions_that_an_earlier_life_did_not_measure_are_measured_in_order(tmp_path: Path) -> None:
    made, _, _ = make(tmp_path, a=fine, rounds=4)
    begun, measured = list[int](), list[int]()

    async def evaluate(version: int, questions: int) -> None:
        begun.append(version)
        await asyncio.sleep(0.05 if version == 1 else 0.0)
        measured.append(version)

    async def play() -> None:
        for round, version in enumerate((1, None, 2)):
            made._state.admission.end_round(round, version)
        pool = SimpleNamespace(start_task=asyncio.ensure_future)
        parts: Any = (made._state, made._journal, None, pool, made._watch, made._config, [], [])
        measuring = Measuring(*parts)
        measuring.evaluate = evaluate  # type: ignore[method-assign,assignment]
        measuring.beside()
        await measuring.ended()

    asyncio.run(play())
    assert begun == measured == [1, 2]


def test_a_commit_that_comes_while_the_run_goes_back_publishes_nothing(tmp_path: Path) -> None:
    made, _, _ = make(tmp_path, a=fine)
    made.may_train = False
    asyncio.run(made._commit({"round": 0, "version": 1}, []))
    assert made._state.admission.newest == 0


@pytest.mark.parametrize("crashed_after", ["verdict", "roll back"])
def test_the_next_life_of_a_run_that_was_to_go_back_trains_no_more(tmp_path: Path, crashed_after: str) -> None:
    made, _, _ = make(tmp_path, a=fine)
    made._state.ledger.admit(0, 2)
    made._state.committed(0, 1, [0, 1], {}, {})
    assert made._state.judged(0, asdict(HEALTHY)) == "go_on"
    assert made._state.judged(1, asdict(HEALTHY) | {"length": 2.0}) == "stop"
    if crashed_after == "roll back":
        made._state.roll_back(2)
    again, done = _next_life(made), list[Any]()

    def newest() -> int:
        return again._state.admission.newest

    async def call(name: str, result: Any, *args: Any) -> Any:
        done.append((name, *args))
        return result

    async def judge(version: int) -> str:
        done.append(("judged", version))
        return "stop" if version == 2 else "go_on"

    async def prepare() -> None:
        done.append("prepared")
        again._measuring = SimpleNamespace(judge=judge)  # type: ignore[assignment]
        again._pool = SimpleNamespace(prepare=lambda version: call("loaded", None, version))  # type: ignore[assignment]

    again._prepare = prepare  # type: ignore[method-assign]
    again._crew = SimpleNamespace(  # type: ignore[assignment]
        weights=SimpleNamespace(roll_back=SimpleNamespace(remote=lambda *back: call("made", newest() + 1, *back)))
    )

    async def play() -> None:
        await again.run(asyncio.get_running_loop().create_future())

    asyncio.run(play())
    went = [("made", 0, 1, 0.125, 1), ("loaded", 2)] if crashed_after == "verdict" else []
    assert done == ["prepared", *went, ("judged", 2), ("made", 0, 1, 0.0, 2), ("loaded", 3), ("judged", 3)]
    assert again._state.rolled_back == {"from": 1, "to": 0, "past": 1, "share": 0.0, "version": 3}
    assert not again.may_train


def _next_life(made: Rounds) -> Rounds:
    saved = json.loads(json.dumps(made._state.to_json()))
    state = RunState("run", made._config, saved)
    return Rounds(made._store, state, Journal(made._store, state, Effort({})), made._crew, Watch(DEADLINE_S))


def test_lost_traces_of_a_probe_set_are_written_again_and_given_up_by_name(tmp_path: Path) -> None:
    made, _, pool = make(tmp_path, a=fine)
    judge = Scorer("judge", lambda call: ObjectLostError("0" * 56, None, "") if call == 1 else None)

    async def taken(boxed: list[Any], version: int, first: int) -> Json:
        return (await judge._call(boxed, version, first))[1]

    def measure() -> None:
        evaluator = SimpleNamespace(judge=SimpleNamespace(remote=taken))
        parts: Any = (made._state, made._journal, evaluator, pool, made._watch, made._config, [], [])
        asyncio.run(Measuring(*parts)._batch("probe", "judge", 1, 0, []))

    measure()
    assert (judge.got, pool.written) == (["traces 1", "traces 2"], 2)
    judge._reply = lambda call: ObjectLostError("0" * 56, None, "")
    with pytest.raises(ServiceError, match="version 1 cannot be evaluated: TracesLost too often"):
        measure()


def test_stage_events_of_every_caller_are_written_once_and_in_order(tmp_path: Path) -> None:
    config = tiny_config(Path("model"))
    store = RunStore.create_or_resume(str(tmp_path), config)
    journal = Journal(store, RunState("run", config), Effort({}))

    async def play() -> None:
        for number in range(20):
            journal.record(EVENT | {"start": number})
            if number % 3 == 0:
                await asyncio.gather(journal.save(), journal.save())
        await journal.save()

    asyncio.run(play())
    assert [row["start"] for row in store.read_metrics("stages")] == list(range(20))


@pytest.mark.parametrize(
    ("found", "ends"),
    [
        ([with_pairs(0), filtered(1)], {"pairs": [0], "filtered": [1], "failed": [2]}),  # the buffer holds the batch
        ([filtered(0), filtered(1)], {"in_flight": [0, 1, 2]}),  # perhaps it was not stored any more: made anew
        ([filtered(0), filtered(1), filtered(2)], {"filtered": [0, 1, 2]}),
    ],
)
def test_a_batch_of_a_round_in_progress_is_taken_up_whole_or_made_anew(
    tmp_path: Path, found: list[Outcome], ends: dict[str, list[int]]
) -> None:
    made, _, _ = make(tmp_path, a=fine)
    made._size, made._train = 3, []
    made._prompts = lambda round: ["prompt"] * 3  # type: ignore[method-assign,list-item]
    made._recover(0, found)
    ledger = made._state.ledger
    states = ("pairs", "filtered", "failed", "in_flight")
    assert {state: known for state in states if (known := ledger.sequences(0, state))} == ends


@pytest.mark.parametrize(
    ("ended", "pairs", "checkpoint", "fits"),
    [
        ([], 0, -1, True),
        ([1, 2], 0, 1, True),
        ([1, 2], 0, 2, True),  # saved, but the run had not heard of it
        ([1, None], 0, 0, True),  # round 1 had no pairs
        ([1], 0, 2, True),  # nor had round 1 here, which had not been noted
        ([1], 1, 2, False),  # but here it had
        ([1, 2], 0, 0, False),  # an older copy of the checkpoints
        ([1, 2], 0, -1, False),
        ([], -1, 1, False),  # no state.json
    ],
)
def test_a_checkpoint_that_does_not_belong_to_the_state_is_refused(
    tmp_path: Path, ended: list[int | None], pairs: int, checkpoint: int, fits: bool
) -> None:
    """`pairs`: of the round after those that have ended; -1: nothing is known of it."""
    made, _, _ = make(tmp_path, a=fine, rounds=4)
    for round, version in enumerate(ended):
        made._state.admission.end_round(round, version)
    if pairs >= 0:
        made._state.ledger.admit(len(ended), 1)
        made._state.scored(len(ended), [with_pairs(0) if pairs else filtered(0)])
    if fits:
        asyncio.run(made._check_checkpoint(checkpoint))
        return
    with pytest.raises(StorageError, match="Restore both from one copy"):
        asyncio.run(made._check_checkpoint(checkpoint))
