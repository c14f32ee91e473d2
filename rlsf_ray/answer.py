"""Answers of a trained model with a confidence that means something.

One trace is enough where the model is sure; else it writes more, and the traces vote, weighed by their confidence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsf_ray.algorithms import voting
from rlsf_ray.algorithms.agreement import AgreementMap
from rlsf_ray.algorithms.answers import label_answers
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.build import build_engine
from rlsf_ray.errors import InputError
from rlsf_ray.evaluate import LEAST_TRACES, trace_features
from rlsf_ray.records import Prompt, Reply, Trace
from rlsf_ray.rollouts.programs import write_answers
from rlsf_ray.run_store import CALIBRATION_FILE, RunStore
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.questions import Messages, Question, as_user, key_of_messages, question_id, to_prompt
from rlsf_ray.tasks.rows import read_messages

Asked = str | Messages  # a question, or a whole chat that ends with one


def read_questions(given: Sequence[str], file: Path | None) -> list[Asked]:
    """Questions from the arguments, or from a file, else from standard input; a line each.

    A file that ends in .jsonl has a JSON text a line, for questions of several lines, or a list of messages, for those
    with a system message. Raises InputError if there are none, if one is empty or no Unicode text, or if the file
    cannot be read.
    """
    if given and file:
        raise InputError("got questions as arguments and --file; leave one of the two out")
    questions: list[Asked] = list(given) or _read_lines(file)
    for number, question in enumerate(map(_words, questions), 1):
        if not question.strip() or _broken(question):
            raise InputError(f"question {number} is {question[:80]!r}, expected a text in UTF-8 that is not empty")
    return questions


def _words(asked: Asked) -> str:
    """What the user says last."""
    return asked if isinstance(asked, str) else asked[-1][1]


def _broken(text: str) -> bool:
    """Does it hold bytes that were no UTF-8?"""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_lines(file: Path | None) -> list[Asked]:
    try:
        text = file.read_text(encoding="utf-8") if file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{f'--file: {file}' if file else 'standard input'} cannot be read ({error}); expected text in UTF-8, a"
            " question a line"
        ) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    questions: list[Asked] = [line for _, line in lines]
    if file and file.suffix == ".jsonl":
        questions = [_from_json(line, f"{file}:{number}") for number, line in lines]
    if not questions:
        raise InputError("no question: got an empty input; give questions as arguments, in --file, or line by line")
    return questions


def _from_json(line: str, at: str) -> Asked:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f'{at}: not JSON ({error}); expected a question as a JSON text, such as "What is 2 + 2?", or messages'
        ) from error
    if isinstance(found, list):
        return read_messages(found, f"{at}: the question")
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{at}: got {line[:80]}, expected a question as a JSON text or a list of messages")
    return found


class Answerer:
    """Answers questions with one version of a run. Close it after use."""

    def __init__(self, store: RunStore, version: int, engine: Any = None) -> None:
        """`engine` holds the version; None: the run's own is started, which takes long.

        Raises InputError if the version has no calibration: it was never measured.
        """
        self._config: RunConfig = store.config
        self._map, self._version = _read_map(store, version), version
        self._engine = engine or _open_engine(store, version)

    def close(self) -> None:
        self._engine.close()

    def __call__(
        self, questions: Sequence[Asked], *, sure: float = voting.SURE, least: float = 0.0, most: int = 8
    ) -> list[Reply]:
        """One reply a question: a text, or a chat that ends in it (ask a run that knows a system message with that).

        A question is settled at confidence `sure`, when no further trace could change the vote, or after `most` traces;
        below `least` the reply abstains. `sure` and `least` lie in [0, 1]. Raises InputError for other values.
        """
        if not (0.0 <= sure <= 1.0 and 0.0 <= least <= 1.0 and most >= 1):
            raise InputError(f"sure and least lie between 0 and 1, most is 1 or more; got {sure}, {least}, {most}")
        prompts = [self._prompt(question) for question in questions]
        written: list[list[Trace]] = [[] for _ in prompts]
        with AnswerChecker() as checker:
            votes = [_vote([], self._map, checker) for _ in prompts]
            for upto in voting.rounds(most):
                going = [
                    i for i, v in enumerate(votes) if not voting.settled(v[1:], len(written[i]), sure=sure, most=most)
                ]
                if not going:
                    break
                have = len(written[going[0]])  # all that go on have as many
                for i, traces in zip(going, self._more([prompts[i] for i in going], have, upto), strict=True):
                    written[i] += traces
                    votes[i] = _vote(written[i], self._map, checker)
        return [
            Reply(
                question=_words(question),
                answer=answer if share >= least else None,
                confidence=share,
                traces=len(traces),
                version=self._version,
            )
            for question, (answer, share, _), traces in zip(questions, votes, written, strict=True)
        ]

    def _prompt(self, question: Asked) -> Prompt:
        messages = as_user(question) if isinstance(question, str) else question
        data, key = self._config.data, key_of_messages(messages)
        asked = Question(id=question_id("asked", key), messages=messages, task="asked", key=key, gold=None)
        choices = all(source.kind == "commonsenseqa" for source in data.train)  # its questions ask for a letter
        return to_prompt(asked, suffix=data.suffix, answer_format="choice" if choices else data.answer)

    def _more(self, prompts: Sequence[Prompt], have: int, upto: int) -> list[tuple[Trace, ...]]:
        groups = write_answers(
            self._engine, prompts, config=self._config, version=self._version, first=have, count=upto - have
        )
        return [group.traces for group in groups]


def _read_map(store: RunStore, version: int) -> AgreementMap:
    found = store.read_json(f"versions/{version:04d}/{CALIBRATION_FILE}")
    if found is None:
        raise InputError(
            f"{store.root}: version {version} has no {CALIBRATION_FILE}, so nobody knows what its confidence means;"
            f" it needs {LEAST_TRACES} answered traces of data.calibration prompts: ask another version, or begin a"
            " run with more of them"
        )
    try:
        return AgreementMap.from_json(found)
    except ValueError as error:
        raise InputError(f"{store.root}: version {version} has {error}") from error


def _open_engine(store: RunStore, version: int) -> Any:
    adapter = store.read_adapter(version)[0] if version else None
    engine = build_engine(store.config)
    if adapter is not None:
        engine.load_version(version, adapter)
    return engine


def confidence(traces: Sequence[Trace], fitted: AgreementMap) -> list[float]:
    """What each trace alone says of its answer; 0 without one."""
    return [fitted.of_one(trace_features(trace)) if trace.answer else 0.0 for trace in traces]


def _vote(traces: Sequence[Trace], fitted: AgreementMap, checker: AnswerChecker) -> tuple[str | None, float, float]:
    """(the winning answer, its confidence, how many votes it is ahead)."""
    texts = [trace.answer_text for trace in traces]
    labels = label_answers(texts, checker.equal)
    winner, share, ahead = voting.calibrated(labels, confidence(traces, fitted))
    return (texts[labels.index(winner)] if winner >= 0 else None), share, ahead
