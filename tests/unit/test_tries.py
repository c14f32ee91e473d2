"""What further tries are worth, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlsf_ray.records import Check, Group, Json, ProbePrompt, Prompt, Trace, Turn
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tries import counts_of_tries, judge_episodes


def episode(*tries: tuple[str, bool], thought: int = 10) -> list[Json]:
    """Answers with whether they are right, and a thought of so many tokens before each but the first."""
    turns: list[Json] = []
    for n, (answer, right) in enumerate(tries):
        if n:
            turns.append({"role": "reflection", "answer": None, "right": None, "length": thought, "repetition": 0.5})
        told = {"answer": answer, "label": hash(answer), "right": right, "length": 3}
        turns.append({"role": "retry" if n else "attempt", **told})
    return turns


def shares(*rows: list[list[Json]]) -> dict[str, float]:
    with np.errstate(invalid="ignore"):
        found = counts_of_tries([{"episodes": episodes} for episodes in rows])
        return {name: float(part.sum() / whole.sum()) for name, (part, whole) in found.items()}


def test_shares_of_tries() -> None:
    found = shares(
        [episode(("1", True)), episode(("2", False), ("1", True))],
        [episode(("3", False), ("4", False)), episode(("5", True), ("6", False), thought=20)],
    )
    assert found["first_try"] == 0.5
    assert found["last_try"] == 0.5
    assert found["wrong_to_right"] == 0.5  # of the two that failed at first
    assert found["right_to_wrong"] == 1.0  # of the one that was asked again though it was right
    assert found["thought_length"] == pytest.approx(40 / 3)
    assert found["thought_repetition"] == 0.5


def test_a_try_that_could_not_be_checked_is_not_called_wrong() -> None:
    unknown = episode(("1", False), ("2", True))
    unknown[0]["right"] = None
    found = shares([unknown, episode(("3", False), ("1", True))], [unknown, unknown])
    assert found["unchecked_tries"] == 0.75
    assert found["first_try"] == 0.0
    assert found["last_try"] == found["wrong_to_right"] == found["voted_tries"] == 1.0
    assert found["thought_length"] == 10.0


def test_the_vote_is_over_the_last_answers() -> None:
    wins = [episode(("9", False), ("4", True)), episode(("4.0", True)), episode(("5", False))]
    loses = [episode(("4", True)), episode(("5", False)), episode(("4", True), ("5", False))]
    assert shares(wins, loses)["voted_tries"] == 0.5


def written(check: Check | None, *episodes: tuple[str, ...]) -> list[list[Json]]:
    """Episodes of such answers, judged as the probe set's are; the right answer is 0.5."""
    none = np.zeros(0, dtype=np.float32)
    empty = {"token_ids": none.astype(np.int32), "logprob": none, "top1": none, "top2": none}
    traces = [
        Trace(
            id=str(k),
            index=k,
            seed=k,
            version=0,
            text=answers[-1],
            finished=True,
            turns=tuple(
                Turn(role="retry" if n else "attempt", tokens=(0, 0), text=answer, answer=answer)
                for n, answer in enumerate(answers)
            ),
            **empty,
        )
        for k, answers in enumerate(episodes)
    ]
    prompt = Prompt(id="p", messages=(("user", "1 / 2 ="),), task="t", key="k", check=check)
    group = Group(
        id="g", round=-1, sequence=0, version=0, prompt=prompt, prompt_ids=empty["token_ids"], traces=tuple(traces)
    )
    with AnswerChecker() as checker:
        return judge_episodes(group, ProbePrompt(prompt=prompt, gold="0.5"), checker)


def test_answers_that_the_task_calls_equal_are_one_in_the_vote() -> None:
    """0.5 and 1/2 outvote a 3 that is written twice; the words of a check that reads texts stay apart."""
    same = written(None, ("3",), ("4", "0.5"), ("1/2",), ("3",), (".50",))
    assert shares(same)["voted_tries"] == 1.0
    tied = written(None, ("0.5", "3"), ("3", "1/2"))
    assert shares(tied)["voted_tries"] == 0.0  # 3 is the first of the last answers
    exact = Check(kind="exact", data={"accepted": ["0.5", "1/2"]})
    apart = written(exact, ("3",), ("0.5",), ("1/2",), ("3",))
    assert shares(apart)["voted_tries"] == 0.0
