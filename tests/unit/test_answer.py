"""Answers for users: how many traces they take, who wins, what the confidence is, when they abstain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config

from rlsf_ray.algorithms.agreement import FEATURES, AgreementMap
from rlsf_ray.answer import Answerer, read_questions
from rlsf_ray.engines.base import Completion, Request
from rlsf_ray.errors import InputError
from rlsf_ray.records import IntArray, Prompt, Reply
from rlsf_ray.run_store import RunStore

# A map that gives back the answer's probability: its first feature is the logit of that
IDENTITY = AgreementMap((0.0,) * 4, (1.0,) * 4, (1.0, 0.0, 0.0, 0.0, 0.0), 50)


class Scripted:
    """Gives the answers of `script` one after the other: (answer, probability)."""

    def __init__(self, *script: tuple[str, float]) -> None:
        self.script, self.calls, self.prompts = list(script), list[int](), list[Prompt]()

    def encode(self, prompt: Prompt) -> IntArray:
        self.prompts.append(prompt)
        return np.array([1], dtype=np.int32)

    def generate(self, requests: list[Request], version: int) -> list[list[Completion]]:
        self.calls.append(len(requests[0].seeds))
        return [[self._write(*self.script.pop(0)) for _ in request.seeds] for request in requests]

    def _write(self, answer: str, prob: float) -> Completion:
        size = len(answer) + 1  # a token a character, and the end
        logprob = np.zeros(size, dtype=np.float32)
        logprob[0] = np.log(prob)
        return Completion(
            token_ids=np.arange(size, dtype=np.int32),
            logprob=logprob,
            top1=np.full(size, 0.5, dtype=np.float32),
            top2=np.zeros(size, dtype=np.float32),
            text=answer,
            char_spans=np.array([[min(i, len(answer)), min(i + 1, len(answer))] for i in range(size)], dtype=np.int32),
            finished=True,
        )


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    made = RunStore.create_or_resume(str(tmp_path / "run"), tiny_config(Path("model")))
    made.write_json("versions/0001/calibration.json", IDENTITY.to_json())
    return made


def ask(store: RunStore, engine: Any, **options: Any) -> Reply:
    (reply,) = Answerer(store, 1, engine)(["What is 2 + 2?"], **options)
    return reply


def test_a_sure_trace_is_enough(store: RunStore) -> None:
    engine = Scripted(("4", 0.9))
    reply = ask(store, engine)
    assert (reply.answer, reply.traces, reply.version) == ("4", 1, 1)
    assert reply.confidence == pytest.approx(0.9)


def test_an_unsure_one_is_put_to_the_vote_of_more(store: RunStore) -> None:
    """1, then 2, then 4 traces: 5 with .3; then 4 with .5; then twice 4 with .9: (0 + .5 + .9 + .9) / 4."""
    engine = Scripted(("5", 0.3), ("4", 0.5), ("4", 0.9), ("4", 0.9))
    reply = ask(store, engine, sure=0.55)
    assert engine.calls == [1, 1, 2]
    assert (reply.answer, reply.traces) == ("4", 4)
    assert reply.confidence == pytest.approx(2.3 / 4)


def test_no_more_is_written_once_the_vote_is_settled(store: RunStore) -> None:
    """Of 3 at most, two agree with .95 each: 1.9 ahead, and the one left weighs 1 at most."""
    engine = Scripted(("4", 0.95), ("4", 0.95))
    reply = ask(store, engine, sure=1.0, most=3)
    assert (engine.calls, reply.traces) == ([1, 1], 2)


def test_a_run_on_choices_reads_letters(tmp_path: Path) -> None:
    source = {"kind": "commonsenseqa", "path": "choices.jsonl"}
    config = tiny_config(Path("model"))
    data = config.data.model_validate(config.data.model_dump() | {"train": [source]})
    made = RunStore.create_or_resume(str(tmp_path / "run"), config.model_copy(update={"data": data}))
    made.write_json("versions/0001/calibration.json", IDENTITY.to_json())
    (reply,) = Answerer(made, 1, Scripted(("(B)", 0.9)))(["Which?\n(A) 1\n(B) 2"])
    assert reply.answer == "B"


def test_a_map_of_another_package_version_is_an_input_error(store: RunStore) -> None:
    store.write_json("versions/0001/calibration.json", IDENTITY.to_json() | {"features": ["length"]})
    with pytest.raises(InputError, match="measure the version again"):
        Answerer(store, 1, Scripted())


def test_questions_of_several_lines_come_from_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('"Which?\\n(A) 1"\n\n"2 + 2?"\n')
    assert read_questions([], file) == ["Which?\n(A) 1", "2 + 2?"]
    for text, message in (
        ("\n{", r"jsonl:2: not JSON"),
        ('{"question": "x"}', "expected a question as a JSON text"),
        ('[{"role": "system", "content": "Be brief."}]', "ends with a user message"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_questions([], file)


def test_a_chat_keeps_its_system_message(store: RunStore, tmp_path: Path) -> None:
    file, engine = tmp_path / "chats.jsonl", Scripted(("4", 0.9))
    file.write_text('[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]')
    (reply,) = Answerer(store, 1, engine)(read_questions([], file))
    assert (reply.question, reply.answer) == ("2 + 2?", "4")
    (prompt,) = engine.prompts
    assert prompt.messages[0] == ("system", "Be brief.")
    assert prompt.messages[1][1].startswith("2 + 2?")


def test_traces_end_at_the_most(store: RunStore) -> None:
    engine = Scripted(("1", 0.3), ("2", 0.3), ("3", 0.3))
    assert ask(store, engine, most=3).traces == 3


def test_below_the_threshold_it_abstains(store: RunStore) -> None:
    reply = ask(store, Scripted(("4", 0.4)), least=0.5, most=1)
    assert reply.answer is None
    assert reply.confidence == pytest.approx(0.4)


def test_without_an_answer_nothing_is_sure(store: RunStore) -> None:
    reply = ask(store, Scripted(("none", 0.9), ("none", 0.9)), most=2)
    assert (reply.answer, reply.confidence, reply.traces) == (None, 0.0, 2)


def test_only_unsettled_questions_go_on(store: RunStore) -> None:
    engine = Scripted(("4", 0.9), ("7", 0.3), ("7", 0.9))
    first, second = Answerer(store, 1, engine)(["2 + 2?", "3 + 4?"], most=2)
    assert (first.traces, second.traces) == (1, 2)


def test_a_version_without_calibration_is_refused(store: RunStore) -> None:
    with pytest.raises(InputError, match=r"version 2 has no calibration.json.*needs 50 answered traces"):
        Answerer(store, 2, Scripted())


@pytest.mark.parametrize("options", [{"sure": 1.5}, {"least": -0.1}, {"most": 0}])
def test_options_outside_their_range_are_refused(store: RunStore, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        ask(store, Scripted(), **options)


def test_questions_come_from_arguments_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text("2 + 2?\n\n 3 + 3? \n")
    assert read_questions(["1 + 1?"], None) == ["1 + 1?"]
    with pytest.raises(InputError, match="as arguments and --file"):
        read_questions(["1 + 1?"], file)
    with pytest.raises(InputError, match="question 2 is ' ', expected"):
        read_questions(["1 + 1?", " "], None)
    with pytest.raises(InputError, match=r"question 1 is 'a\\ud800', expected a text in UTF-8"):
        read_questions(["a\ud800"], None)
    assert read_questions([], file) == ["2 + 2?", "3 + 3?"]
    file.write_text("\n")
    with pytest.raises(InputError, match="no question"):
        read_questions([], file)
    with pytest.raises(InputError, match="cannot be read"):
        read_questions([], tmp_path / "missing")


def test_the_map_of_these_tests_is_one_of_this_package() -> None:
    assert len(IDENTITY.mean) == len(FEATURES)
