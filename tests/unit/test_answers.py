"""Where the final answer stands, and when two answers are the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsf_ray.algorithms.answers import find_answer, label_answers, locate, normalise, token_span


def found(text: str, answer_format: str) -> str | None:
    span = find_answer(text, answer_format)
    return None if span is None else text[slice(*span)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 times 4 is 12.", "12"),
        ("The total is 1,234,567.50 dollars", "1,234,567.50"),
        ("So it is $-7.", "-7"),
        ("7 - 9 = -2", "-2"),
        ("we compute 5-3", None),  # an open sum is not an answer
        ("(2)-3", None),
        ("so it is 8 + 2 =.", None),
        ("6 x 9 = 54", "54"),
        ("the max 9", "9"),
        ("it is \u22125", "\u22125"),
        ("about .5", ".5"),
        ("the numbers 1,2,3", "3"),
        ("**42**", "42"),
        ("5.Therefore", "5"),
        ("12,34", "34"),
        ("no digits here", None),
        ("", None),
    ],
)
def test_number_is_the_last_one_without_a_closing_stop(text: str, answer: str | None) -> None:
    assert found(text, "number") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1} then \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{}", None),
        ("12", None),
    ],
)
def test_boxed_is_the_last_complete_box(text: str, answer: str | None) -> None:
    assert found(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 3. No, the answer is 3.5. Done", "3.5"),
        ("THE ANSWER IS: **blue whale**.\nMore", "blue whale"),
        ("the answer is\n12", "12"),
        ("the answer is", None),
        ("I do not know", None),
    ],
)
def test_phrase_ends_with_the_sentence_or_line(text: str, answer: str | None) -> None:
    assert found(text, "phrase") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I first thought (A), but (B)", "B"),
        ("B.", "B"),
        ("The answer is A because water is wet", "A"),
        ("It is C. A dog would not", "C"),
        ("A is right", "A"),
        ("so (d)", "d"),
        ("CAB or BED", None),
        ("I think F", None),
    ],
)
def test_choice_is_the_last_letter_that_stands_alone(text: str, answer: str | None) -> None:
    assert found(text, "choice") == answer


def test_regex_takes_group_one_else_the_whole_match_and_the_last_of_them() -> None:
    assert found("#### 4 then #### 18", r"regex:#### (\d+)") == "18"
    assert found("x1 x22", r"regex:x\d+") == "x22"
    assert found("a=1 b", r"regex:a=(\d)|b") == "1"  # the last match has no group 1


def test_unknown_format_and_broken_pattern_are_named() -> None:
    with pytest.raises(ValueError, match="unknown answer format 'numbr'"):
        find_answer("1", "numbr")
    with pytest.raises(ValueError, match="broken answer pattern"):
        find_answer("1", "regex:(")


def test_locate_finds_the_last_place_where_the_elicited_text_stands_alone() -> None:
    text = "12 x 2 = 24, so 24."
    assert locate(" 24.\n", text) == (16, 18)
    assert locate("2", text) == (5, 6)  # neither in 12 nor in 24
    assert locate("3", "it is 3.5") is None
    assert locate("3.5", "it is 3.5") == (6, 9)
    assert locate(" . ", text) is None


def test_token_span_covers_a_number_split_over_tokens() -> None:
    # "is 1234." as "is", " 12", "34", "."
    spans = np.array([[0, 2], [2, 5], [5, 7], [7, 8]], dtype=np.int32)
    assert find_answer("is 1234.", "number") == (3, 7)
    assert token_span(spans, (3, 7)) == (1, 3)


def test_token_span_takes_all_pieces_of_a_multi_byte_character() -> None:
    # "=\u2212 7": a two-token minus sign shares the characters (1, 2); the end-of-text token is empty
    spans = np.array([[0, 1], [1, 2], [1, 2], [2, 4], [4, 4]], dtype=np.int32)
    assert token_span(spans, (1, 2)) == (1, 3)
    assert token_span(spans, (1, 4)) == (1, 4)
    assert token_span(spans, (3, 4)) == (3, 4)


def test_token_span_rejects_characters_that_no_token_covers() -> None:
    with pytest.raises(ValueError, match="no token of 1 covers"):
        token_span(np.array([[0, 2]], dtype=np.int32), (2, 3))


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("007", "7"),
        ("1,000.50", "1000.5"),
        ("+3.", "3"),
        ("-0", "0"),
        ("-0.00", "0"),
        (".5", "0.5"),
        ("\u22127", "-7"),
        (" Blue Whale ", "blue whale"),
        ("1,00", "1,00"),
        ("-", "-"),
        (".", "."),
        ("", ""),
    ],
)
def test_normalise_gives_the_canonical_form(text: str, form: str) -> None:
    assert normalise(text) == form


@given(st.integers(-(10**12), 10**12))
def test_every_way_to_write_an_integer_has_one_form(value: int) -> None:
    assert {normalise(form) for form in (f"{value}", f"{value:,}", f"{value}.0", f" {value}. ")} == {str(value)}


@given(st.decimals(-(10**6), 10**6, places=3))
def test_a_number_at_the_end_of_a_sentence_is_found_whole(value: object) -> None:
    assert found(f"so it is {value}.", "number") == f"{value}"


def test_labels_number_the_answers_by_first_occurrence() -> None:
    asked: list[tuple[str, str]] = []

    def equal(a: str, b: str) -> bool:
        asked.append((a, b))
        return {a, b} == {"1/2", "0.5"}

    assert label_answers(["0.5", None, "7", "1/2", "007", "1/2", ".50", "x"], equal) == [0, -1, 1, 0, 1, 0, 0, 2]
    # "7" against "0.5" is settled by the numbers; "1/2" is asked once, "x" about both classes
    assert asked == [("1/2", "0.5"), ("x", "0.5"), ("x", "7")]


def test_no_answers_have_no_labels() -> None:
    assert label_answers([None, None], lambda a, b: True) == [-1, -1]
