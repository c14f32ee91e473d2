"""Rollouts of several turns: what programs get from the desk, token by token, and how they share the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import SEVERAL_TURNS
from rlsf_ray.engines.base import Completion, Request
from rlsf_ray.engines.tokens import asked_if_true, encode_prompt
from rlsf_ray.engines.transformers_engine import TransformersEngine
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Group, Prompt
from rlsf_ray.rollouts.desk import Desk, Talk, turn_sampling
from rlsf_ray.rollouts.programs import write_groups
from rlsf_ray.rollouts.several import PROGRAMS, REFLECT, RETRY
from rlsf_ray.tasks.checks import CHECKS
from rlsf_ray.tasks.verdict import Verdict


class Counting(TransformersEngine):
    """Notes how many requests each call of `generate` had."""

    calls: list[int]

    def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
        self.calls.append(len(requests))
        return super().generate(requests, version)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Counting:
    config = tiny_config(tiny)
    made = Counting(config.model, config.learner, threads=1)
    made.calls = []
    return made


def several(tiny: Path, name: str, **rollout: Any) -> RunConfig:
    return tiny_config(tiny, signal="passed", rollout={"name": name, "traces": 3, "max_tokens": 8, **rollout})


def prompts(count: int, target: int = 1000) -> list[Prompt]:
    check = Check(kind="countdown", data={"numbers": [1, 2], "target": target})
    return [
        Prompt(
            id=f"p{n}", messages=(("user", f"State the final answer: {n} + 3 ="),), task="t", key=str(n), check=check
        )
        for n in range(count)
    ]


def write(engine: TransformersEngine, config: RunConfig, prompts: Sequence[Prompt]) -> list[Group]:
    return write_groups(engine, prompts, config=config, round=0, first_sequence=0, version=0)


def test_a_failed_attempt_is_shared_by_reflections_that_differ(engine: Counting, tiny: Path) -> None:
    (group,) = write(engine, several(tiny, "reflect_retry", temperature=2.0), prompts(1))
    assert [trace.id for trace in group.traces] == ["r0/p0/0", "r0/p0/1", "r0/p0/2"]
    firsts, reflections = ([trace.turns[n].text for trace in group.traces] for n in (0, 1))
    assert len(set(firsts)) == 1
    assert len(set(reflections)) == 3
    assert [[turn.role for turn in trace.turns] for trace in group.traces] == [["attempt", "reflection", "retry"]] * 3
    for trace in group.traces:
        assert trace.turns[0].passed == 0.0
        assert np.isnan(trace.turns[1].passed)
        assert trace.turns[2].passed == 0.0
        assert trace.text == trace.turns[2].text
        assert [turn.said for turn in trace.turns] == ["", REFLECT, RETRY]


def test_the_tokens_between_turns_are_those_of_the_chat_template(engine: Counting, tiny: Path) -> None:
    """The whole trace is what the template makes of the same talk, and every written token is marked as such."""
    config = several(tiny, "reflect_retry")
    (group,) = write(engine, config, prompts(1))
    tokenizer = engine._tokenizer
    for trace in group.traces:
        texts = [turn.text for turn in trace.turns]
        ended = [int(trace.token_ids[turn.tokens[1] - 1]) == tokenizer.eos_token_id for turn in trace.turns]
        assert all(ended), "raise max_tokens: this test wants whole turns"
        talk = [*group.prompt.messages, ("assistant", texts[0])]
        reflect = tokenizer.decode(trace.token_ids[trace.turns[0].tokens[1] : trace.turns[1].tokens[0]])
        talk += [("user", reflect.removeprefix("<|user|>").partition("<|end|>")[0]), ("assistant", texts[1])]
        talk += [("user", RETRY)]
        asked = Prompt(id="", messages=tuple(talk), task="t", key="")
        whole = encode_prompt(tokenizer, config.model, asked)
        start = trace.turns[2].tokens[0]
        np.testing.assert_array_equal(np.concatenate([group.prompt_ids, trace.token_ids[:start]]), whole)
        mask = trace.written()
        assert mask.sum() == sum(end - begin for begin, end in (turn.tokens for turn in trace.turns))
        assert (trace.logprob[~mask] == 0.0).all()
        assert (trace.logprob[mask] < 0.0).all()
        (begin, end) = trace.turns[1].tokens
        assert np.flatnonzero(trace.written(["reflection"])).tolist() == list(range(begin, end))


def test_a_turn_that_was_cut_off_is_ended_before_the_reply(engine: Counting, tiny: Path) -> None:
    """One that ended by itself has its end token already: either way the template's text stands between."""
    for tokens in (1, 8):
        (group,) = write(engine, several(tiny, "reflect_retry", max_tokens=tokens), prompts(1))
        trace = group.traces[0]
        first, second = trace.turns[0].tokens, trace.turns[1].tokens
        between = engine._tokenizer.decode(trace.token_ids[first[1] - 1 : second[0]])
        assert between.count("<|end|>") == 2, between  # the turn's own and the user's


def test_the_statistics_are_those_of_the_whole_text_read_at_once(engine: Counting, tiny: Path) -> None:
    (group,) = write(engine, several(tiny, "reflect_retry"), prompts(1))
    for trace in group.traces:
        (read,) = engine.logprobs([(group.prompt_ids, trace.token_ids)], 0)
        mask = trace.written()
        np.testing.assert_allclose(read[mask], trace.logprob[mask], atol=2e-4)


def test_turns_that_are_not_credited_may_be_greedy(engine: Counting, tiny: Path) -> None:
    config = tiny_config(
        tiny,
        signal="passed",
        rollout={"name": "reflect_retry", "traces": 3, "max_tokens": 8, "uncredited_temperature": 0.0},
        advantages={"turns": ["reflection"]},
    )
    roles = ("attempt", "reflection", "retry")
    assert [turn_sampling(config, role).method for role in roles] == ["greedy", "sample", "greedy"]
    (group,) = write(engine, config, prompts(1))
    for trace in group.traces:
        for turn in trace.turns[::2]:
            spread = slice(*turn.tokens)
            np.testing.assert_allclose(np.exp(trace.logprob[spread]), trace.top1[spread], rtol=1e-5)


def test_all_programs_of_a_batch_are_served_together(engine: Counting, tiny: Path) -> None:
    engine.calls.clear()
    write(engine, several(tiny, "reflect_retry"), prompts(5))
    assert engine.calls == [5, 15, 15]


def test_hundreds_of_programs_run_at_once_over_one_engine(engine: Counting, tiny: Path) -> None:
    engine.calls.clear()
    groups = write(engine, several(tiny, "reflect_retry", max_tokens=4), prompts(300))
    assert engine.calls == [300, 900, 900]
    assert [group.prompt.id for group in groups] == [f"p{n}" for n in range(300)]
    assert all(trace.id.startswith(f"r0/{group.prompt.id}/") for group in groups for trace in group.traces)


def test_the_same_batch_gives_the_same_traces_again_and_forks_their_own(engine: Counting, tiny: Path) -> None:
    config = several(tiny, "try_again", tries=3)
    one, two = (write(engine, config, prompts(3)) for _ in range(2))
    texts = [[turn.text for group in groups for trace in group.traces for turn in trace.turns] for groups in (one, two)]
    assert texts[0] == texts[1]
    assert all(len(trace.turns) == 3 for group in one for trace in group.traces)


def test_an_attempt_that_passes_ends_the_talk(engine: Counting, tiny: Path) -> None:
    (group,) = write(engine, several(tiny, "reflect_retry"), prompts(1))
    answer = group.traces[0].turns[0].answer
    assert answer is not None
    check = Check(kind="countdown", data={"numbers": [int(answer)], "target": int(answer)})
    asked = Prompt(id="p0", messages=group.prompt.messages, task="t", key="0", check=check)
    (passed,) = write(engine, several(tiny, "reflect_retry"), [asked])
    assert [[turn.passed for turn in trace.turns] for trace in passed.traces] == [[1.0]]


def test_the_first_error_of_a_program_ends_the_batch_and_leaves_nobody_waiting(engine: Counting, tiny: Path) -> None:
    ended = list[str]()

    async def program(desk: Desk, prompt: Prompt) -> list[Talk]:
        talk = desk.begin(prompt)
        try:
            await talk.write("attempt")
            if prompt.id == "p1":
                raise InputError("a fault of the program")
            talk.say("Again.")
            await talk.write("attempt")
        finally:
            ended.append(prompt.id)
        return [talk]

    with pytest.raises(InputError, match="a fault of the program"):
        Desk(engine, tiny_config(tiny), version=0, salt="").run(program, prompts(3))
    assert sorted(ended) == ["p0", "p1", "p2"]


def test_a_program_that_waits_for_something_of_its_own_is_waited_for_but_not_for_ever(
    engine: Counting, tiny: Path
) -> None:
    async def program(desk: Desk, prompt: Prompt) -> list[Talk]:
        await asyncio.sleep(0.2 if prompt.id == "p0" else 0.0)
        talk = desk.begin(prompt)
        await talk.write("attempt")
        return [talk]

    desk = Desk(engine, tiny_config(tiny), version=0, salt="")
    assert [len(talks) for talks in desk.run(program, prompts(2))] == [1, 1]

    async def stuck(desk: Desk, prompt: Prompt) -> list[Talk]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(InputError, match=r"deadline_s=0\.3"):
        Desk(engine, tiny_config(tiny, cluster={"deadline_s": 0.3}), version=0, salt="").run(stuck, prompts(2))


def test_turns_without_a_reply_between_and_replies_without_a_turn_are_refused(engine: Counting, tiny: Path) -> None:
    async def twice(desk: Desk, prompt: Prompt) -> list[Talk]:
        talk = desk.begin(prompt)
        await talk.write("attempt")
        await talk.write("attempt")
        return [talk]

    async def deaf(desk: Desk, prompt: Prompt) -> list[Talk]:
        talk = desk.begin(prompt)
        await talk.write("attempt")
        talk.say("One.")
        talk.say("Two.")
        return [talk]

    for program, message in ((twice, "call say"), (deaf, "call write")):
        with pytest.raises(InputError, match=message):
            Desk(engine, tiny_config(tiny), version=0, salt="").run(program, prompts(1))


def test_an_answer_that_could_not_be_checked_is_not_called_wrong(
    engine: Counting, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(text: str) -> Verdict:
        raise RuntimeError("out of order")

    monkeypatch.setitem(CHECKS, "breaks", breaks)
    asked = Prompt(id="p", messages=prompts(1)[0].messages, task="t", key="0", check=Check(kind="breaks", data={}))
    for name in ("reflect_retry", "try_again"):
        (group,) = write(engine, several(tiny, name), [asked])
        assert all(len(trace.turns) == 1 and np.isnan(trace.turns[0].passed) for trace in group.traces)


def test_a_prompt_without_a_check_is_refused(engine: Counting, tiny: Path) -> None:
    bare = Prompt(id="p", messages=(("user", "1 + 1 ="),), task="t", key="1")
    with pytest.raises(InputError, match="prompt p has no check"):
        write(engine, several(tiny, "reflect_retry"), [bare])


def test_a_model_without_turns_is_refused(engine: Counting, tiny: Path) -> None:
    config = several(tiny, "reflect_retry")
    plain = TransformersEngine(config.model.model_copy(update={"chat": "plain"}), config.learner, threads=1)
    with pytest.raises(InputError, match=r"model\.chat: template"):
        write(plain, config, prompts(1))


def test_the_config_knows_every_program() -> None:
    assert tuple(PROGRAMS) == SEVERAL_TURNS
    assert all(asyncio.iscoroutinefunction(program) for program in PROGRAMS.values())


def test_a_refined_answer_stands_for_itself_as_if_it_answered_the_prompt(engine: Counting, tiny: Path) -> None:
    config = tiny_config(tiny, rollout={"name": "refine", "traces": 4, "max_tokens": 8})
    (group,) = write(engine, config, prompts(1))
    assert [trace.turns[0].role for trace in group.traces] == ["attempt", "retry"] * 2
    assert [trace.index for trace in group.traces] == [0, 1, 2, 3]
    for trace in group.traces:
        (read,) = engine.logprobs([(group.prompt_ids, trace.token_ids)], 0)
        np.testing.assert_allclose(read, trace.logprob, atol=2e-4)
        assert trace.written().all()
        assert trace.turns[0].said == ""


def test_a_verdict_of_no_is_followed_by_a_retry_and_one_of_yes_is_the_end(tiny: Path) -> None:
    """The script says yes in the first fork, no in the second; the check wants 7."""

    class Scripted(Counting):
        def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
            written = super().generate(requests, version)
            texts = next(self.script)
            return [[_says(one, text)] for (one,), text in zip(written, texts, strict=True)]

    config = tiny_config(tiny, signal="passed", rollout={"name": "verify_revise", "traces": 2, "max_tokens": 8})
    scripted = Scripted(config.model, config.learner, threads=1)
    scripted.calls, scripted.script = [], iter([["It is 5"], ["Yes.", "No"], ["It is 7"]])  # type: ignore[attr-defined]
    check = Check(kind="countdown", data={"numbers": [7], "target": 7})
    asked = Prompt(id="p", messages=(("user", "3 + 4 ="),), task="t", key="3+4", check=check)
    (group,) = write(scripted, config, [asked])
    kept, mended = group.traces
    assert [turn.role for turn in kept.turns] == ["attempt", "verdict"]
    assert [turn.role for turn in mended.turns] == ["attempt", "verdict", "retry"]
    assert (kept.answer_text, mended.answer_text) == ("5", "7")
    assert (kept.turns[0].passed, mended.turns[2].passed) == (0.0, 1.0)
    assert kept.answer is not None
    assert kept.answer.tokens[1] <= kept.turns[0].tokens[1]  # the verdict's tokens are no answer


def _says(one: Completion, text: str) -> Completion:
    """`one` as if it were this text, a token for each character and the end."""
    size = len(text) + 1
    spans = np.array([[min(i, len(text)), min(i + 1, len(text))] for i in range(size)], dtype=np.int32)
    values = np.full(size, 0.5, dtype=np.float32)
    ids = np.append(np.full(len(text), 50, dtype=np.int32), one.token_ids[-1])
    return Completion(
        token_ids=ids.astype(np.int32),
        logprob=np.log(values),
        top1=values,
        top2=values,
        text=text,
        char_spans=spans,
        finished=True,
    )


def test_votes_stand_in_for_a_check_and_are_asked_for_once_a_prompt(tiny: Path) -> None:
    class Scripted(Counting):
        def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
            written = super().generate(requests, version)
            return [[_says(one, text)] for (one,), text in zip(written, next(self.script), strict=True)]

    settings = {"name": "second_try", "traces": 2, "max_tokens": 8, "check": "majority"}
    config = tiny_config(tiny, signal="passed", rollout=settings)
    scripted = Scripted(config.model, config.learner, threads=1)
    votes = ["It is 7"] * 4 + ["It is 5"] * 3 + ["No idea"]
    scripted.calls = []
    scripted.script = iter([["It is 5", "It is 7"], votes, ["It is 7.0", "None"]])  # type: ignore[attr-defined]
    bare = Prompt(id="p", messages=(("user", "3 + 4 ="),), task="t", key="3+4")
    (group,) = write(scripted, config, [bare])
    assert scripted.calls == [2, 8, 2]
    assert [[turn.passed for turn in trace.turns] for trace in group.traces] == [[0.0, 1.0], [1.0, 0.0]]
    scripted.script = iter([["It is 5", "It is 7"], ["It is 7", "It is 5"] * 4, ["It is 7", "It is 7"]])  # type: ignore[attr-defined]
    (tied,) = write(scripted, config, [bare])
    scripted.script = iter([["It is 5", "It is 7"], ["It is 7"] + ["No idea"] * 7, ["It is 7", "It is 7"]])  # type: ignore[attr-defined]
    (alone,) = write(scripted, config, [bare])
    assert all(np.isnan(turn.passed) for trace in (*tied.traces, *alone.traces) for turn in trace.turns)


def test_the_model_s_own_opinion_stands_in_for_a_check(engine: Counting, tiny: Path) -> None:
    settings = {"name": "second_try", "traces": 2, "max_tokens": 8, "check": "p_true"}
    config = tiny_config(tiny, signal="passed", rollout=settings)
    bare = Prompt(id="p", messages=(("user", "State the final answer: 3 + 4 ="),), task="t", key="3+4")
    (group,) = write(engine, config, [bare])
    for trace in group.traces:
        for turn in trace.turns:
            assert turn.answer is not None
            asked = engine.encode(asked_if_true(bare, turn.answer))
            true, false = engine.logprobs([(asked, engine.encode_text(word)) for word in ("True", "False")], 0)
            assert turn.passed == float(true.sum() > false.sum())
