"""How the coordinator's rounds meet failures: other scorers first, the same traces again, an error that says why."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError
from tiny import tiny_config
from vitals_data import HEALTHY

from actors import watch
from actors.journal import Journal
from actors.measuring import Measuring
from actors.pool import GivenUp
from actors.rounds import Rounds
from actors.watch import Watch
from rlsf_ray.errors import DeadlineError, ServiceError, StorageError
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
        return [_filtered(0, self._name)], EVENT

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


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RETRY_S", 0.01)


def test_a_dead_scorer_gives_its_batch_to_another_with_the_same_traces(tmp_path: Path) -> None:
    made, scorers, pool = make(tmp_path, a=dead, b=fine)
    assert score(made) == ["b"]
    assert (scorers["a"].got, scorers["b"].got, pool.written) == (["traces 1"], ["traces 1"], 1)


def test_a_restarting_scorer_is_waited_for_without_counting_attempts(tmp_path: Path) -> None:
    made, scorers, pool = make(tmp_path, a=lambda call: unavailable() if call == 1 else None)
    scorers["a"].back = lambda call: unavailable() if call < 8 else None
    assert score(made) == ["a"]
    assert (len(scorers["a"].got), scorers["a"].built, pool.written) == (2, 8, 1)


def test_a_scorer_that_never_comes_back_ends_the_wait_by_name(tmp_path: Path) -> None:
    now = [0.0]

    def away(call: int) -> BaseException:
        now[0] += 0.4 * DEADLINE_S
        return unavailable()

    made, scorers, _ = make(tmp_path, clock=lambda: now[0], a=lambda call: unavailable())
    scorers["a"].back = away
    with pytest.raises(DeadlineError, match=r"^(a|every scorer) has been unavailable"):
        score(made)
    assert scorers["a"].built == 3  # its deadline began at the first failure


def test_a_scorer_that_is_away_for_long_does_not_end_a_run_that_moves(tmp_path: Path) -> None:
    """As after a call that rightly waited long for room, or while other scorers work."""
    now = [0.0]

    def away(call: int) -> BaseException | None:
        now[0] += DEADLINE_S / 2
        made._watch.moved()
        return unavailable() if call < 10 else None

    made, scorers, _ = make(tmp_path, clock=lambda: now[0], a=lambda call: unavailable() if call == 1 else None)
    scorers["a"].back = away
    assert score(made) == ["a"]
    assert scorers["a"].built == 10  # five times as long as the deadline


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
    went = [("made", 0, 1, 0.125), ("loaded", 2)] if crashed_after == "verdict" else []
    assert done == ["prepared", *went, ("judged", 2), ("made", 0, 1, 0.0), ("loaded", 3), ("judged", 3)]
    assert again._state.rolled_back == {"from": 1, "to": 0, "past": 1, "share": 0.0, "version": 3}
    assert not again.may_train


def _next_life(made: Rounds) -> Rounds:
    saved = json.loads(json.dumps(made._state.to_json()))
    state = RunState("run", made._config, saved)
    return Rounds(made._store, state, Journal(made._store, state, Effort({})), made._crew, Watch(DEADLINE_S))


def test_a_batch_is_given_up_once_it_has_killed_one_scorer_three_times(tmp_path: Path) -> None:
    made, scorers, _ = make(tmp_path, a=dead, b=dead)

    async def play() -> Any:
        async with asyncio.TaskGroup() as made._tasks:
            return await made._batches._generate_and_score(0, 0, 4, ["one", "two"])

    assert asyncio.run(play()) == ([], {4: "ScorerDied", 5: "ScorerDied"})
    assert (len(scorers["a"].got), len(scorers["b"].got)) == (3, 2)


def test_scorers_that_restart_together_use_up_no_attempts(tmp_path: Path) -> None:
    """As after the loss of their node."""
    once: Reply = lambda call: unavailable() if call == 1 else None  # noqa: E731
    made, scorers, _ = make(tmp_path, a=once, b=once, c=once)
    for scorer in scorers.values():
        scorer.back = lambda call: unavailable() if call < 3 else None
    assert score(made)[0] in scorers


def test_lost_traces_are_written_again(tmp_path: Path) -> None:
    made, scorers, pool = make(tmp_path, a=lambda call: ObjectLostError("0" * 56, None, "") if call == 1 else None)
    assert score(made) == ["a"]
    assert (scorers["a"].got, pool.written) == (["traces 1", "traces 2"], 2)


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


def test_a_prompt_that_kills_its_generator_takes_no_other_of_its_batch_along(tmp_path: Path) -> None:
    made, scorers, _ = make(tmp_path, a=fine)
    calls, given_up = list[tuple[int, int]](), list[Any]()

    async def call(method: str, prompts: list[str], round: int, first: int, **options: Any) -> tuple[str, Json]:
        calls.append((first, len(prompts)))
        if "poison" in prompts:
            raise GivenUp("GeneratorDied")
        return f"traces of {first}", EVENT

    async def process(boxed: list[Any], round: int, part: int, attempt: int) -> tuple[list[Outcome], Json]:
        scorers["a"].got.append(boxed)
        return [_filtered(sequence) for sequence in (0, 2)], EVENT

    async def give_up(round: int, sequences: list[int]) -> list[Outcome]:
        given_up.append(sequences)
        return []

    made._batches._pool = SimpleNamespace(call=call)  # type: ignore[assignment]
    scorers["a"].process = SimpleNamespace(remote=process)
    made._crew.buffer = SimpleNamespace(give_up=SimpleNamespace(remote=give_up))
    made._state.ledger.admit(0, 3)
    prompts: Any = ["fine", "poison", "fine"]

    async def play() -> None:
        await made._permits.acquire()
        await made._batch(0, 0, 0, prompts)

    asyncio.run(play())
    assert calls == [(0, 3), (0, 1), (1, 1), (2, 1)]
    assert scorers["a"].got == [["traces of 0", "traces of 2"]]
    assert given_up == [[1]]
    assert made._state.ledger.totals()["reasons"] == {"no_answers": 2, "GeneratorDied": 1}
    assert made._state.ledger.totals()["in_flight"] == 0


def _filtered(sequence: int, name: str = "g") -> Outcome:
    counts = {"num_traces": 4, "num_tokens": 9, "num_cut_off": 0, "num_parsed": 0, "num_examples": 0}
    return Outcome(group_id=name, sequence=sequence, reason="no_answers", **counts)


def _with_pairs(sequence: int) -> Outcome:
    return replace(_filtered(sequence), num_parsed=4, num_examples=2, reason=None)


def test_outcomes_of_an_earlier_attempt_hold_whatever_was_written_since(tmp_path: Path) -> None:
    """The first attempt had prompts 0 and 1, the traces that were written anew are of 1 and 2."""
    made, scorers, _ = make(tmp_path, a=fine)

    async def call(method: str, prompts: list[str], round: int, first: int, **options: Any) -> tuple[str, Json]:
        if len(prompts) > 1 or prompts == ["poison"]:
            raise GivenUp("GeneratorDied")
        return f"traces of {first}", EVENT

    async def process(boxed: list[Any], round: int, part: int, attempt: int) -> tuple[list[Outcome], Json]:
        return [_with_pairs(0), _filtered(1)], EVENT

    made._batches._pool = SimpleNamespace(call=call)  # type: ignore[assignment]
    scorers["a"].process = SimpleNamespace(remote=process)
    outcomes, failed = asyncio.run(made._batches._generate_and_score(0, 0, 0, ["poison", "b", "c"]))  # type: ignore[list-item]
    assert ([outcome.sequence for outcome in outcomes], failed) == ([0, 1], {2: "TracesLost"})


@pytest.mark.parametrize(
    ("found", "ends"),
    [
        ([_with_pairs(0), _filtered(1)], {"pairs": [0], "filtered": [1], "failed": [2]}),  # the buffer holds the batch
        ([_filtered(0), _filtered(1)], {"in_flight": [0, 1, 2]}),  # perhaps it was not stored any more: made anew
        ([_filtered(0), _filtered(1), _filtered(2)], {"filtered": [0, 1, 2]}),
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
        made._state.scored(len(ended), [_with_pairs(0) if pairs else _filtered(0)])
    if fits:
        asyncio.run(made._check_checkpoint(checkpoint))
        return
    with pytest.raises(StorageError, match="Restore both from one copy"):
        asyncio.run(made._check_checkpoint(checkpoint))


def test_pairs_that_a_dead_scorer_had_put_are_not_lost(tmp_path: Path) -> None:
    """Prompts 0 and 1 go out together and the scorer dies three times, once after the buffer took prompt 1."""
    made, _, _ = make(tmp_path, a=dead)
    put = Outcome(
        group_id="g", sequence=1, num_traces=4, num_tokens=9, num_cut_off=0, num_parsed=4, num_examples=2, reason=None
    )
    asked: list[Any] = []

    async def give_up(round: int, sequences: range) -> list[Outcome]:
        asked.append((round, list(sequences)))
        return [put]

    made._crew.buffer = SimpleNamespace(give_up=SimpleNamespace(remote=give_up))
    made._state.ledger.admit(0, 2)
    prompts: Any = [None, None]

    async def play() -> None:
        await made._permits.acquire()
        async with asyncio.TaskGroup() as made._tasks:
            await made._batch(0, 0, 0, prompts)

    asyncio.run(play())
    assert asked == [(0, [0, 1])]
    assert made._state.ledger.sequences(0, "pairs") == [1]
    assert made._state.ledger.totals()["reasons"] == {"ScorerDied": 1}
