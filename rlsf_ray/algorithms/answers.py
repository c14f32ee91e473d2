"""Where the final answer of a trace stands, and when two answers are the same.

Pure text and numbers. Spans are half-open: [start, end). T: tokens of one trace.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
Span = tuple[int, int]

ANSWERING = ("attempt", "retry")  # roles of the turns that answer the prompt
FORMATS = ("number", "boxed", "phrase", "choice", "regex:<pattern>")

# A sign counts only where it cannot be an operator ("= -3", but not in "5-3"); "12." is 12 at the end of a sentence.
_SIGN = "[-+\u2212]"
_NUMBER = re.compile(
    rf"(?:(?<![\w)\].]){_SIGN})?(?:(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)
# "so it is 18 + 89" ends in a sum nobody worked out: 89 is an operand and not an answer. Without this rule a policy is
# paid for copying the question, which it does with great confidence (benchmarks/results/log.md).
_OPERATOR_BEFORE = re.compile("[0-9)\\]]\\s*[-+*/x^\u2212\u00d7\u00f7]\\s*$")
_PLAIN_NUMBER = re.compile(rf"({_SIGN})?([0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]*)(?:\.([0-9]*))?")
_BOXED = re.compile(r"\\boxed\s*\{")
_PHRASE = re.compile(r"\bthe answer is\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
# "A" before a lower-case word is the article ("A dog"), unless that word is a verb or a reason ("A is right").
_CHOICE = re.compile(
    r"(?<![\w'-])(?:[B-E]|A(?!\s+(?!is\b|because\b|since\b|as\b)[a-z])|(?<=is\s)A)(?![\w'-])|(?<=\()[a-e](?=\))"
)
_QUOTING = " \t\r\n*`$\"'"


def find_answer(text: str, answer_format: str) -> Span | None:
    r"""Characters of the final answer in `text`, None if there is none. The last occurrence wins.

    Formats: `number` (thousands commas, sign, decimals; no operand of an open sum), `boxed` (inside the last complete
    \boxed{...}), `phrase` (after the last "the answer is", to the end of the sentence or line), `choice` (stand-alone
    letter A-E), `regex:<pattern>` (group 1 if the pattern has one, else the whole match).
    Raises ValueError for an unknown format or a broken pattern.
    """
    if answer_format.startswith("regex:"):
        return _last(_regex_spans(answer_format.removeprefix("regex:"), text))
    if answer_format == "number":
        return _final_number(text)
    if answer_format == "boxed":
        return _last(_boxed_spans(text))
    if answer_format == "phrase":
        return _phrase_span(text)
    if answer_format == "choice":
        return _last(match.span() for match in _CHOICE.finditer(text))
    raise ValueError(f"unknown answer format {answer_format!r}; use one of {', '.join(FORMATS)}")


def _final_number(text: str) -> Span | None:
    span = _last(match.span() for match in _NUMBER.finditer(text))
    return None if span is None or _OPERATOR_BEFORE.search(text[: span[0]]) else span


def locate(elicited: str, text: str) -> Span | None:
    """RLSF's own way (2507.21931, section 3): the last place where the elicited answer stands in the trace.

    `elicited` is what the model wrote after "So the answer is"; spaces and a closing full stop are not part of it.
    It must stand alone: "2" is not found in "12" or "2.5".
    """
    wanted = elicited.strip().rstrip(".").strip()
    if not wanted:
        return None
    left = r"(?<!\w)(?<![0-9]\.)" if _is_word(wanted[0]) else ""
    right = r"(?!\w)(?!\.[0-9])" if _is_word(wanted[-1]) else ""
    return _last(match.span() for match in re.finditer(left + re.escape(wanted) + right, text))


def mentions(text: str, gold: str, answer_format: str, question: str = "") -> bool:
    """Does the right answer stand anywhere in `text`, whatever is its last word? For numbers and choices.

    A number that stands in the question says nothing: "3 + 0" is restated with it. An option that is only considered
    counts. Other formats: the text of `gold` itself.
    """
    if question and answer_format == "number" and mentions(question, gold, answer_format):
        return False
    if answer_format in ("number", "choice"):
        pattern = _NUMBER if answer_format == "number" else _CHOICE
        return any(normalise(match.group()) == normalise(gold) for match in pattern.finditer(text))
    return locate(gold, text) is not None


def token_span(char_spans: IntArray, chars: Span) -> Span:
    """Tokens that overlap the characters `chars`. `char_spans` [T, 2] holds the characters of each token.

    The pieces of one multi-byte character share its range, so all of them are in or out together.
    Raises ValueError if no token overlaps: then the spans belong to another text.
    """
    start, end = chars
    hits = np.flatnonzero((char_spans[:, 0] < end) & (char_spans[:, 1] > start))
    if hits.size == 0:
        raise ValueError(f"no token of {len(char_spans)} covers the characters {chars}; are the spans of this text?")
    return int(hits[0]), int(hits[-1]) + 1


def normalise(text: str) -> str:
    """Canonical form: a plain number without sign of plus, commas and idle zeros; other text stripped, case-folded."""
    return _canonical_number(text) or text.strip().casefold()


def label_answers(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> list[int]:
    """Number the distinct answers by first occurrence; None (no answer) gets -1.

    Equal canonical forms are equal and two different plain numbers are not; `equal` is asked only about the rest.
    """
    labels: list[int] = []
    firsts: list[str] = []  # first answer of each class
    label_of: dict[str, int] = {}  # canonical form -> class
    for answer in answers:
        if answer is None:
            labels.append(-1)
            continue
        key = normalise(answer)
        if key not in label_of:
            label_of[key] = _class_of(answer, firsts, equal)
            if label_of[key] == len(firsts):
                firsts.append(answer)
        labels.append(label_of[key])
    return labels


def _class_of(answer: str, firsts: Sequence[str], equal: Callable[[str, str], bool]) -> int:
    is_number = _canonical_number(answer) is not None
    for label, first in enumerate(firsts):
        if is_number and _canonical_number(first) is not None:
            continue
        if equal(answer, first):
            return label
    return len(firsts)


def _canonical_number(text: str) -> str | None:
    match = _PLAIN_NUMBER.fullmatch(text.strip())
    if match is None or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").lstrip("0") or "0"
    fraction = (match[3] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    negative = match[1] in ("-", "\u2212") and number != "0"
    return f"-{number}" if negative else number


def _regex_spans(pattern: str, text: str) -> Iterator[Span]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"broken answer pattern {pattern!r}: {error}; correct the regular expression") from error
    group = min(1, compiled.groups)
    return (match.span(group) for match in compiled.finditer(text))


def _boxed_spans(text: str) -> Iterator[Span]:
    for match in _BOXED.finditer(text):
        end = _closing_brace(text, match.end())
        if end is not None:
            yield _trim(text, match.end(), end, " \t\r\n")


def _closing_brace(text: str, start: int) -> int | None:
    depth, position = 1, start
    while position < len(text):
        if text[position] == "\\":  # an escaped brace does not count
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def _phrase_span(text: str) -> Span | None:
    start = _last(match.span() for match in _PHRASE.finditer(text))
    if start is None:
        return None
    end = _SENTENCE_END.search(text, start[1])
    return _last([_trim(text, start[1], end.start() if end else len(text), _QUOTING)])


def _trim(text: str, start: int, end: int, characters: str) -> Span:
    while start < end and text[start] in characters:
        start += 1
    while start < end and text[end - 1] in characters:
        end -= 1
    return start, end


def _last(spans: Iterator[Span] | list[Span]) -> Span | None:
    """The last span that holds at least one character."""
    return next((span for span in reversed(list(spans)) if span[0] < span[1]), None)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
