"""Rows with named columns (files, the hub, GSM8K, CommonsenseQA) as questions."""

from __future__ import annotations

import json
from typing import Any

from rlsf_ray.config_sections import SourceConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Json
from rlsf_ray.tasks.checks import LABELS, validate
from rlsf_ray.tasks.files import Rows, check_columns, file_stem, read_rows
from rlsf_ray.tasks.questions import (
    Messages,
    Question,
    as_user,
    canonical_key,
    cell_text,
    first_duplicate,
    key_of_messages,
    optional_module,
)


def row_questions(source: SourceConfig, *, labelled: bool) -> list[Question]:
    """All questions of a file or hub source, in its own order; gold answers are read only if `labelled`.

    Raises InputError: see `files.read_rows`; also duplicate ids, empty cells, missing gold answers, a hub data set
    that cannot be loaded.
    """
    if source.kind == "hub":
        stem = str(source.name).rsplit("/", maxsplit=1)[-1]
        return _from_rows(source, _hub_rows(source), f"hub data set {source.name}", stem, labelled)
    path = str(source.path)
    return _from_rows(
        source, read_rows(path, _columns(source, labelled)), f"data file {path}", file_stem(path), labelled
    )


def _columns(source: SourceConfig, labelled: bool) -> list[str]:
    if source.kind == "commonsenseqa":
        columns = ["question", *(["answerKey"] if labelled else [])]
    else:
        columns = [source.messages or source.question]
        if labelled:
            if source.answer is None:
                raise InputError(
                    f"source {source.path or source.name}: a probe source needs gold answers, got answer: null;"
                    " set answer: <column>"
                )
            columns.append(source.answer)
    return [*columns, *filter(None, (source.id, source.check))]


def _hub_rows(source: SourceConfig) -> Rows:
    """Rows of a hub data set; `options` go to `datasets.load_dataset` (`split` is train unless given)."""
    datasets = optional_module("datasets", "pip install datasets")
    options = {"split": "train", **source.options}
    try:
        rows = datasets.load_dataset(source.name, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"hub data set {source.name!r} cannot be loaded with {options}: {type(error).__name__}: {error};"
            " check the name, the options and the network"
        ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(
                f"hub data set {source.name!r}: got several splits, expected one; set options: {{split: train}}"
            )
        yield number, row


def _from_rows(source: SourceConfig, rows: Rows, where: str, stem: str, labelled: bool) -> list[Question]:
    columns = _columns(source, labelled)
    questions, numbers = [], []
    for number, row in rows:
        at = f"{where}, row {number}"
        check_columns(columns, row, at)
        item_id = cell_text(row[source.id], at, source.id) if source.id else f"{stem}-{number}"
        questions.append(_ROW_READERS[source.kind](source, row, at, item_id, stem, labelled))
        numbers.append(number)
    if duplicate := first_duplicate([question.id for question in questions]):
        item_id, first, second = duplicate
        raise InputError(
            f"{where}: the id {item_id!r} stands in row {numbers[first]} and in row {numbers[second]};"
            " every prompt needs its own id"
        )
    return questions


def _plain_row(source: SourceConfig, row: Json, at: str, item_id: str, task: str, labelled: bool) -> Question:
    if source.messages:
        messages = read_messages(row[source.messages], f"{at}: column {source.messages!r}")
    else:
        messages = as_user(cell_text(row[source.question], at, source.question))
    gold = cell_text(row[str(source.answer)], at, str(source.answer)) if labelled else None
    check = _check(row[source.check], at, source.check) if source.check else None
    if check and check.kind in LABELS and not (labelled or source.labels):
        raise InputError(
            f"{at}: a check of kind {check.kind} holds the wanted answer, which is a label, got labels: false; set"
            " labels: true for this source, and the run is no longer label-free"
        )
    return Question(id=item_id, messages=messages, task=task, key=key_of_messages(messages), gold=gold, check=check)


def _gsm8k_row(source: SourceConfig, row: Json, at: str, item_id: str, task: str, labelled: bool) -> Question:
    """GSM8K (Cobbe et al., arXiv 2110.14168): the gold number stands after the last "####" of the worked answer."""
    question, gold = cell_text(row[source.question], at, source.question), None
    if labelled:
        worked = cell_text(row[str(source.answer)], at, str(source.answer))
        _, mark, gold = worked.rpartition("####")
        gold = gold.strip().replace(",", "")
        if not mark or not gold:
            raise InputError(f"{at}: no gold number after '####' in column {source.answer!r}; expected '... #### 42'")
    return Question(id=item_id, messages=as_user(question), task="gsm8k", key=canonical_key(question), gold=gold)


def _commonsenseqa_row(source: SourceConfig, row: Json, at: str, item_id: str, task: str, labelled: bool) -> Question:
    """CommonsenseQA (Talmor et al., arXiv 1811.00937): stem and lettered choices; the answer is a letter."""
    try:
        stem = row["question"]["stem"]
        choices = {str(choice["label"]): str(choice["text"]) for choice in row["question"]["choices"]}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{at}: not in CommonsenseQA form ({type(error).__name__}: {error}); expected question.stem and"
            " question.choices with label and text"
        ) from error
    text = "\n".join([cell_text(stem, at, "question.stem"), *(f"({label}) {text}" for label, text in choices.items())])
    gold = cell_text(row["answerKey"], at, "answerKey") if labelled else None
    if gold is not None and gold not in choices:
        raise InputError(f"{at}: answerKey is {gold!r}, expected one of {', '.join(choices)}; correct the row")
    key = canonical_key(text)
    return Question(
        id=item_id, messages=as_user(text), task="commonsenseqa", key=key, gold=gold, answer_format="choice"
    )


def _check(value: Any, at: str, column: str) -> Check:
    if isinstance(value, dict) and isinstance(value.get("kind"), str) and isinstance(value.get("data"), dict):
        check = Check(kind=value["kind"], data=value["data"])
        validate(check)
        return check
    raise InputError(
        f'{at}: column {column!r} is {value!r:.200}, expected {{"kind": ..., "data": {{...}}}}; correct the row'
    )


_ROW_READERS = {
    "file": _plain_row,
    "hub": _plain_row,
    "gsm8k": _gsm8k_row,
    "commonsenseqa": _commonsenseqa_row,
}


def read_messages(value: Any, what: str) -> Messages:
    """A chat as JSON holds it. Raises InputError, which begins with `what` it is, for anything else."""
    if isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        messages = tuple((turn["role"], turn["content"]) for turn in value)
        if messages and messages[-1][0] == "user":
            return messages
    raise InputError(
        f"{what} is {json.dumps(value, default=str)[:200]}, expected a list of"
        ' {"role": ..., "content": ...} that ends with a user message; correct the row'
    )
