"""How a batch meets failures: other scorers first, the same traces again, an error that says why."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError
from rounds_parts import (
    DEADLINE_S,
    EVENT,
    Reply,
    dead,
    filtered,
    fine,
    make,
    score,
    unavailable,
    with_pairs,
)

from actors import watch
from actors.pool import GivenUp
from rlsf_ray.errors import DeadlineError
from rlsf_ray.records import Json, Outcome


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
        return [filtered(sequence) for sequence in (0, 2)], EVENT

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


def test_outcomes_of_an_earlier_attempt_hold_whatever_was_written_since(tmp_path: Path) -> None:
    """The first attempt had prompts 0 and 1, the traces that were written anew are of 1 and 2."""
    made, scorers, _ = make(tmp_path, a=fine)

    async def call(method: str, prompts: list[str], round: int, first: int, **options: Any) -> tuple[str, Json]:
        if len(prompts) > 1 or prompts == ["poison"]:
            raise GivenUp("GeneratorDied")
        return f"traces of {first}", EVENT

    async def process(boxed: list[Any], round: int, part: int, attempt: int) -> tuple[list[Outcome], Json]:
        return [with_pairs(0), filtered(1)], EVENT

    made._batches._pool = SimpleNamespace(call=call)  # type: ignore[assignment]
    scorers["a"].process = SimpleNamespace(remote=process)
    outcomes, failed = asyncio.run(made._batches._generate_and_score(0, 0, 0, ["poison", "b", "c"]))  # type: ignore[list-item]
    assert ([outcome.sequence for outcome in outcomes], failed) == ([0, 1], {2: "TracesLost"})


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
