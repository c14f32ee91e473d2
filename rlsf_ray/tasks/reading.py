"""What a model writes around what it was asked for: fenced blocks, JSON and expressions found in its text.

Nothing here raises, whatever the text, and nothing looks into a bracket again that it has passed.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

LONGEST = 2000  # characters of a text that is read as code
# Brackets and what hides them: comments, and quoted text, which ends with its line or the text where its end is missing
JSON_MARKS = re.compile(r'"(?:[^"\\\n]|\\.)*(?:"|(?=\n)|\\?\Z)|[\[\]{}]', re.DOTALL)
PYTHON_MARKS = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\\?\Z)'
    r"|'''(?:[^\\]|\\.)*?(?:'''|\\?\Z)"
    r'|"(?:[^"\\\n]|\\.)*(?:"|(?=\n)|\\?\Z)'
    r"|'(?:[^'\\\n]|\\.)*(?:'|(?=\n)|\\?\Z)"
    r"|#[^\n]*"
    r"|[()\[\]{}]",
    re.DOTALL,
)
_FENCED = re.compile(r"(?<!\S)```(?:(\w*)[ \t]*\r?\n)?(.*?)(?:```|\Z)", re.DOTALL)
_OPENING = re.compile(r"[\[{]")
_DECODER = json.JSONDecoder()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_once)


def fenced(text: str) -> list[tuple[str, str]]:
    """(name in lower case, content) of each block between ``` and ```; the last may lack its end."""
    return [(name.casefold(), content) for name, content in _FENCED.findall(text)]


def asked_for(text: str, *names: str) -> str:
    """The last fenced block of one of these names, else the last without a name, else the whole text."""
    blocks = fenced(text)
    for wanted in (names, ("",)):
        if found := [content for name, content in blocks if name in wanted]:
            return found[-1]
    return text


def closing(text: str, start: int, marks: re.Pattern[str]) -> int | None:
    """The end of what the bracket at `start` opens, None if it stays open."""
    depth = 0
    for mark in marks.finditer(text, start):
        depth += (mark[0] in "([{") - (mark[0] in ")]}")
        if not depth:
            return mark.end()
    return None


def json_at(text: str, start: int, *, strict: bool = False) -> Any:
    """The JSON value whose bracket stands at `start`, else None; `strict`: None too where a key stands twice."""
    try:
        return (_STRICT if strict else _DECODER).raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def json_values(text: str) -> list[Any]:
    """The JSON objects and arrays of a text that lie in no other brackets, be these JSON or prose.

    None at all if a bracket stays open: the text was cut short, and what it holds so far is not what it was to say.
    """
    found, at = [], 0
    while (match := _OPENING.search(text, at)) is not None:
        end = closing(text, match.start(), JSON_MARKS)
        if end is None:
            return []
        if (value := json_at(text, match.start())) is not None:
            found.append(value)
        at = end
    return found


def parsed(text: str) -> ast.expr | None:
    """Python's reading of an expression; None for what is none, or longer than LONGEST."""
    if len(text) > LONGEST:
        return None
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what a parser says of hostile text
        return None
