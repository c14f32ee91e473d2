"""BFCL's simple calls (Berkeley Function-Calling Leaderboard, Patil et al.): a question, one function, the call wanted.

The wanted calls lie in a file of their own, which is opened for probe sources, and for training sources that say
`labels: true`: a check that knows the wanted call is a label.
"""

from __future__ import annotations

import json
import posixpath
from typing import Any

from rlsf_ray.config_sections import SourceConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Json
from rlsf_ray.tasks.files import read_rows
from rlsf_ray.tasks.questions import Question, as_user, canonical_key, cell_text

_ASKED = "{question}\n\nYou can call this function:\n{function}\n\nReply with one call, as name(argument=value), only."


def bfcl_questions(source: SourceConfig, *, labelled: bool) -> list[Question]:
    """Every question of the file `source.path`; the wanted calls from `possible_answer/` beside it.

    Raises InputError: files missing or of another form; a training source without `labels: true`.
    """
    path = str(source.path)
    if not (labelled or source.labels):
        raise InputError(
            f"data file {path}: whether a call is right is known from the wanted calls only, which are labels, got"
            " labels: false; set labels: true for this source, and the run is no longer label-free"
        )
    folder, name = posixpath.split(path)
    wanted = {row["id"]: row["ground_truth"] for _, row in read_rows(_answers(folder, name), ["id", "ground_truth"])}
    return [
        _question(row, wanted, f"data file {path}, row {number}", labelled)
        for number, row in read_rows(path, ["id", "question", "function"])
    ]


def _answers(folder: str, name: str) -> str:
    return posixpath.join(folder, "possible_answer", name)


def _question(row: Json, wanted: Json, at: str, labelled: bool) -> Question:
    try:
        asked, functions, expected = row["question"][0][-1]["content"], row["function"], wanted[row["id"]]
        (call,) = expected
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"{at}: not one of BFCL's simple calls ({type(error).__name__}: {error}); expected id, question, function,"
            " and one wanted call of that id in possible_answer/"
        ) from error
    text = _ASKED.format(question=cell_text(asked, at, "question"), function=json.dumps(functions[0]))
    return Question(
        id=cell_text(row["id"], at, "id"),
        messages=as_user(text),
        task="bfcl",
        key=canonical_key(text),
        gold=_written(call) if labelled else None,
        check=Check(kind="function_call", data={"functions": functions, "expected": expected}),
    )


def _written(call: dict[str, dict[str, list[Any]]]) -> str:
    """A wanted call as text, with the first of the values that count; for people to read."""
    ((name, arguments),) = call.items()
    given = ", ".join(f"{key}={values[0]!r}" for key, values in arguments.items() if values[0] != "")
    return f"{name}({given})"
