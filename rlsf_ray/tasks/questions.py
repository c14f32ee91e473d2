"""A question as a source yields it, its canonical key and its id."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from types import ModuleType
from typing import Any

from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Prompt

Messages = tuple[tuple[str, str], ...]  # (role, content)

_NUMBER = r"-?\d+(?:\.\d+)?"
_CHAIN = re.compile(rf"{_NUMBER}(?:\s*[-+*/]\s*{_NUMBER})+")
_TERM = re.compile(rf"({_NUMBER})\s*([-+*/]?)\s*")
_ARITHMETIC = re.compile(r"(?=.*\d)(?=.*[-+*/])[\d\s.()+*/-]+")
_READABLE = re.compile(r"[-+*.\d]{1,40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row of a source. `gold` is None where the source was read for training."""

    id: str
    messages: Messages
    task: str
    key: str
    gold: str | None
    answer_format: str | None = None  # None: the run's `data.answer`
    check: Check | None = None


def canonical_key(text: str) -> str:
    """The form in which equal questions are equal.

    Arithmetic loses its spaces, brackets around the whole and a final "=" or "?"; the operands of a pure sum or a pure
    product are sorted, so "3 * 4" and "(4 * 3)" share the key "3*4" while "7 - 2" stays ordered. Other text is
    case-folded and its white space collapsed.
    """
    text = " ".join(text.casefold().split())
    bare = text.rstrip("=? ")
    while is_arithmetic(bare) and _in_brackets(bare):
        bare = bare[1:-1].strip()
    if _CHAIN.fullmatch(bare):
        terms = _TERM.findall(bare)
        numbers = [format(Decimal(number).normalize(), "f") for number, _ in terms]
        operators = [operator for _, operator in terms[:-1]]
        if set(operators) in ({"+"}, {"*"}):
            return operators[0].join(sorted(numbers, key=Decimal))
        return "".join(n + o for n, o in zip(numbers, [*operators, ""], strict=True))
    return bare.replace(" ", "") if is_arithmetic(bare) else text


def _in_brackets(text: str) -> bool:
    """Does the first bracket open at the beginning and close at the end?"""
    depths = list(accumulate((letter == "(") - (letter == ")") for letter in text))
    return text.startswith("(") and depths[-1] == 0 and 0 not in depths[:-1]


def is_arithmetic(text: str) -> bool:
    """Is `text` nothing but numbers, + - * / and brackets?"""
    return _ARITHMETIC.fullmatch(text.strip()) is not None


def key_of_messages(messages: Messages) -> str:
    """Key of a chat: of its one user message, or of all its turns. System messages do not make a question new."""
    turns = [(role, content) for role, content in messages if role != "system"]
    if len(turns) == 1:
        return canonical_key(turns[0][1])
    return canonical_key("\n".join(f"{role}: {content}" for role, content in turns))


def question_id(task: str, key: str) -> str:
    """A stable id: `products-3x4` for plain arithmetic, else the task and 12 hex digits of the key's SHA-256."""
    if _READABLE.fullmatch(key):
        return f"{task}-{key.replace('*', 'x')}"
    return f"{task}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def as_user(question: str) -> Messages:
    return (("user", question),)


def with_suffix(messages: Messages, suffix: str) -> Messages:
    """`suffix` after the last user message, with a space between unless the suffix starts with white space."""
    if not suffix:
        return messages
    last = max(i for i, (role, _) in enumerate(messages) if role == "user")
    joint = "" if suffix[0].isspace() else " "
    return tuple(
        (role, f"{content}{joint}{suffix}") if i == last else (role, content)
        for i, (role, content) in enumerate(messages)
    )


_WHOLE = r"regex:(?s)\s*(.*\S)\s*"
# What a check reads of a text. An expression is the last on one line: not a number alone, nor a part of a decimal or of
# a power.
READS = {
    "countdown": r"regex:(?<![\d.])[-−–]?(?:\([ \t]*)*(?<![\d.])\d(?:[\d \t()]*[\d)])?"
    r"(?:[ \t]*[-+*/×÷−–][ \t(]*[-−–]?[ \t(]*\d(?:[\d \t()]*[\d)])?)+(?![\d^]|\.\d)",
    "function_call": _WHOLE,
    "schema": _WHOLE,
    "code": _WHOLE,
}


def _format_of(question: Question, of_run: str) -> str:
    """By the question itself; where the run looks for numbers, and the check reads something else, by the check."""
    if question.check is not None and of_run == "number":
        of_run = READS.get(question.check.kind, of_run)
    return question.answer_format or of_run


def to_prompt(question: Question, *, suffix: str, answer_format: str) -> Prompt:
    """The prompt of a question; its gold answer stays behind."""
    return Prompt(
        id=question.id,
        messages=with_suffix(question.messages, suffix),
        task=question.task,
        key=question.key,
        answer_format=_format_of(question, answer_format),
        check=question.check,
    )


def first_duplicate(ids: Sequence[str]) -> tuple[str, int, int] | None:
    """(id, first position, second position) of the first id that stands twice, or None."""
    seen: dict[str, int] = {}
    for position, item in enumerate(ids):
        if item in seen:
            return item, seen[item], position
        seen[item] = position
    return None


def cell_text(value: Any, at: str, column: str) -> str:
    """A string or a number as text; InputError for anything else and for nothing."""
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if not text:
        raise InputError(f"{at}: column {column!r} is {value!r}, expected a non-empty text or number; fill it in")
    return text


def spread_seed(text: str, seed: int) -> int:
    """A 48-bit seed far from its neighbours: reasoning-gym seeds item i with seed + i, so near seeds share items."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:6], "big")


def optional_module(name: str, cure: str) -> ModuleType:
    """Import a package that only some runs need; InputError with the cure where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"the package {name!r} is needed but not installed ({error}); cure: {cure}") from error
