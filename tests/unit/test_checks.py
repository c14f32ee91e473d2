"""Checks on texts as models write them, and on every call of BFCL's simple set."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsf_ray.algorithms.answers import find_answer, label_answers
from rlsf_ray.config_loading import load_config
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Prompt
from rlsf_ray.tasks.checks import check_answer, countdown, equality, fits_schema, function_call, validate
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.questions import Question, as_user, to_prompt
from rlsf_ray.tasks.verdict import Verdict

DATA = Path(os.environ.get("RLSF_DATA") or Path(__file__).parents[3] / "shared" / "data") / "bfcl"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("94*4 - 61 - 6", ""),
        ("(94 × 4) − (61 + 6).", ""),
        ("94*4 - 61", "uses [4, 61, 94], expected [4, 6, 61, 94]"),
        ("94*4 - 61 - 6 - 6 + 6", "uses [4, 6, 6, 6, 61, 94]"),
        ("94*4 - 61 + 6", "is 321, expected 309"),
        ("94/(4 - 4) - 61 - 6", "divides by zero"),
        ("94*4 - 61 - 6 = 309", "no expression"),
        ("__import__('os').system('true')", "holds Call"),
        ("94**4 - 61 - 6", "holds BinOp"),
        ("94.0*4 - 61 - 6", "holds Constant"),
        ("True*94*4 - 61 - 6", "holds Constant"),
        ("(" * 5000, "no expression"),
        ("-" * 1500 + "4", None),  # deep, and no crash
        ("", "no expression"),
    ],
)
def test_countdown(text: str, reason: str | None) -> None:
    found = countdown(text, [6, 61, 94, 4], 309)
    assert found.right is (reason == "")
    assert reason is None or reason in found.reason


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("**5 + 3 * 2**", True),
        ("- 5 + 3 * 2", True),  # a list's dash is no sign
        ("I use 5 + 3 * 2 (which equals 11).", True),
        ("(which is 5 + 3 * 2)", True),
        ("5 + 3 * 2 = 11", True),
        ("5 + 3 * 2 - done", True),
        ("2 * 3 + 4\n\n5 + 3 × 2", True),  # the last line's
        ("5 + (3 * 2)", True),
        ("-(5 - 3 * 2)", False),  # is 1
        ("5 + 3 − 2", False),
        ("The answer is 11.", False),
        ("1.5 + 3 * 2", False),
        ("5 + 3 * 2^1", False),
        ("5 + 3 * 2.0", False),
    ],
)
def test_the_recipe_reads_an_expression_as_it_stands_in_a_text(text: str, right: bool) -> None:
    check = Check(kind="countdown", data={"numbers": [5, 3, 2], "target": 11})
    assert verdict_of_the_recipe(check, text) is right


def verdict_of_the_recipe(check: Check, text: str) -> bool | None:
    """What the recipe as it is makes of a text, from finding the answer on."""
    question = Question(id="q", messages=as_user("q"), task="t", key="q", gold=None, check=check)
    prompt = to_prompt(question, suffix="", answer_format=load_config("reflect_retry_reward").data.answer)
    span = find_answer(text, prompt.answer_format)
    return check_answer(check, text[slice(*span)] if span else None).right


def test_the_recipe_as_it_is_reads_calls_json_and_code() -> None:
    call = Check(kind="function_call", data={"functions": [AREA], "expected": WANTED})
    assert verdict_of_the_recipe(call, "Sure: geo.area(base=10)\n")
    assert not verdict_of_the_recipe(call, "geo.area(base=12)")
    schema = Check(kind="schema", data={"schema": {"type": "object", "required": ["a"]}})
    assert verdict_of_the_recipe(schema, 'Here:\n{"a": 1}\n')
    assert verdict_of_the_recipe(
        Check(kind="code", data={"tests": "assert f(1) == 2"}), "def f(x):\n    return x + 1\n"
    )


def test_countdown_is_exact() -> None:
    assert countdown("8/(3 - 8/3)", [3, 3, 8, 8], 24).right  # floating point gives 23.999999999999993
    assert not countdown("1/3*3", [1, 3, 3], 2).right


AREA: dict[str, Any] = {
    "name": "geo.area",
    "parameters": {
        "properties": {
            "base": {"type": "float"},
            "unit": {"type": "string"},
            "exact": {"type": "boolean"},
            "where": {"type": "dict"},
            "sides": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["base"],
    },
}
WANTED: list[dict[str, Any]] = [
    {
        "geo.area": {
            "base": [10, 10.5],
            "unit": ["New York", ""],
            "exact": [True, ""],
            "where": [{"x": [1, 2]}, ""],
            "sides": [[1, 2], ""],
        }
    }
]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("geo.area(base=10)", ""),
        ("geo.area(10, 'new-york')", ""),
        ("Sure:\n```\ngeo.area(base=10.5, exact=True)\n```", ""),
        ('{"name": "geo.area", "arguments": {"base": 10, "where": {"x": 2}}}', ""),
        ("geo.area(base=11)", "base is 11"),
        ("geo.area(base='10')", "base is no float"),
        ("geo.area(base=True)", "base is no float"),
        ("geo.area(base=10, where={'y': 1})", "where is {'y': 1}"),
        ("geo.area(unit='New York')", "lacks base"),
        ("geo.area(base=10, colour='red')", "unknown argument colour"),
        ("geo.volume(base=10)", "calls geo.volume"),
        ("geo.area(base=open('x'))", "no call"),
        ("I cannot call anything", "no call"),
        ("geo.area(\n    base=10,\n    unit='New York',  # it's there\n)", ""),
        ("`geo.area(base=10)`", ""),
        ("I call `geo.area(base=10)` for this.", ""),
        ("```python\nresult = geo.area(base=10)\n```", ""),
        ("The geo.area() function is right here:\n```\ngeo.area(base=10)\n```", ""),  # fenced, that alone is read
        ("result = geo.area(base=10)", ""),
        ("[geo.area(base=10)]", ""),
        ("I use geo.area(base, unit), which takes a base (in m):\ngeo.area(base=10)", ""),
        ("geo.area(10, unit='[(New) \"York')", "unit is"),
        ('[{"name": "geo.area", "arguments": {"base": 10}}]', ""),
        ('<tool_call>\n{"name": "geo.area", "arguments": {"base": 10}}\n</tool_call>', ""),
        ("geo.area(base=10)\ngeo.area(base=11)", "2 calls, expected one"),
        ("[geo.area(base=10), geo.volume()]", "2 calls, expected one"),
        ("```\ngeo.area(base=10)\n```\nor\n```\ngeo.area(base=11)\n```", "2 calls, expected one"),
        ('[{"name": "geo.area", "arguments": {"base": 10}}, {"name": "geo.area"}]', "2 calls, expected one"),
        ("geo.area(11, base=10)", "gives base twice"),
        ("geo.area(base=11, base=10)", "gives base twice"),
        ("geo.area(10, 'New York', True, {'x': 1}, [1, 2], 5)", "no call"),
        ("geo.area(base=geo.area(base=10))", "no call"),
        ("geo.area(**{'base': 10})", "no call"),
        ("geo.area(base=10", "no call"),
        ('{"name": "geo.area", "arguments": {"base": 10}', "no call"),
        ("geo.area(base=10, exact=1)", "exact is no boolean"),
        ("geo.area(base=10, sides=[1, 2])", ""),
        ("geo.area(base=10, sides=[True, 2])", "sides is no array of integer"),
        ("geo.area(base=10, sides=[1.0, 2])", "sides is no array of integer"),
        ("geo.area(base=10, where={'x': True})", "where is {'x': True}"),
        ("geo.area(\n    base=10,  # (metres, don't ask\n)", ""),
        ('{"name": "geo.area", "arguments": {"base": 11, "base": 10}}', "no call"),
        ("def geo.area(base=10): pass", "no call"),
        ("geo.area(base=10)(1)", "no call"),
        ("geo.area(base=10).x", "no call"),
        ("geo.area(base=10).", ""),
        ("geo.area(base=10, unit='-')", "unit is '-'"),  # "" among the values: it may be left out, no more
        ("geo.area(base=10, unit='')", ""),
        ('{"type": "function", "function": {"name": "geo.area", "arguments": "{\\"base\\": 10}"}}', ""),
        ('{"tool_calls": [{"function": {"name": "geo.area", "arguments": {"base": 10}}}]}', ""),
    ],
)
def test_function_calls_by_name_required_arguments_types_and_values(text: str, reason: str) -> None:
    found = function_call(text, [AREA], WANTED)
    assert (found.right, found.reason == "") == (reason == "", reason == "")
    assert reason in found.reason


def test_hostile_texts_take_no_time() -> None:
    start = time.monotonic()
    for text in ("f(" * 4000, "[{" * 4000, "f(" * 4000 + ")" * 4000, "f(" + '\\"' * 20_000, "[" + '\\"' * 20_000):
        assert function_call(text, [AREA], WANTED).reason == "no call"
        assert fits_schema(text, {}).reason == "no JSON"
    assert time.monotonic() - start < 10.0  # looked at from each quote anew, the last two alone take longer


def test_texts_with_brackets_and_quotes_are_arguments_like_others() -> None:
    say = {"name": "say", "parameters": {"properties": {"what": {"type": "string"}}, "required": ["what"]}}
    for text in ("a) b(c", "[1]", 'he said "no"', "it's", "a, b=c)", "```", "{", "print(1)"):
        wanted = [{"say": {"what": [text]}}]
        for call in (
            f"say(what={text!r})",
            f"x = say({text!r})",
            json.dumps({"name": "say", "arguments": {"what": text}}),
        ):
            assert function_call(call, [say], wanted) == Verdict(True), call
        assert not function_call(f"say(what={text + 'z'!r})", [say], wanted).right


def test_data_that_wants_a_function_it_does_not_describe_is_no_wrong_answer() -> None:
    with pytest.raises(InputError, match=r"geo\.area is not among those described"):
        function_call("geo.area(base=10)", [], WANTED)


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there (set RLSF_DATA to its parent)")
def test_every_wanted_call_of_bfcl_passes_and_a_spoilt_one_does_not() -> None:
    rows = [json.loads(line) for line in (DATA / "BFCL_v4_simple_python.json").read_text().splitlines()]
    lines = (DATA / "possible_answer" / "BFCL_v4_simple_python.json").read_text().splitlines()
    truth = {one["id"]: one["ground_truth"] for one in map(json.loads, lines)}

    def first(value: Any) -> Any:
        """A value in place of the lists of those that count, as a model would give it."""
        if isinstance(value, list):
            return [first(one) for one in value]
        return {k: first(v[0]) for k, v in value.items() if v[0] != ""} if isinstance(value, dict) else value

    for row in rows:
        ((name, accepted),) = truth[row["id"]][0].items()
        required = row["function"][0]["parameters"].get("required", ())
        given = {  # one row lets a required argument be left out; required it is
            argument: first(next(value for value in values if value != ""))
            for argument, values in accepted.items()
            if values[0] != "" or argument in required
        }
        python = f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
        for text in (python, json.dumps({"name": name, "arguments": given})):
            found = function_call(text, row["function"], truth[row["id"]])
            assert found.right, (row["id"], text, found.reason)
        assert not function_call(f"other_{python}", row["function"], truth[row["id"]]).right
        for argument in required:
            fewer = {k: v for k, v in given.items() if k != argument}
            text = json.dumps({"name": name, "arguments": fewer})
            assert not function_call(text, row["function"], truth[row["id"]]).right, (row["id"], argument)
    assert len(rows) == 400


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('Here it is: {"n": 3}', ""),
        ('First {"n": "x"}, no: {"n": 3}', ""),  # the last one counts
        ('{"n": 3}, no: {"n": "x"}', "'x' is not of type 'integer'"),
        ('{"n": "3"}', "is not of type 'integer'"),
        ("n = 3", "no JSON"),
        ("{" * 5000, "no JSON"),
        ("[" * 5000 + "]" * 5000, "no JSON"),
        ('{"a": {"n": 3}', "no JSON"),  # cut short: what lies inside is not the answer
        ('{"n": 3}, or {"n": 4', "no JSON"),
        ('{"a": "}", "b": {"n": 3}', "no JSON"),
        ('{"a": {"n": 3},}', "no JSON"),
        ('{such as {"n": 3}}', "no JSON"),
        ('[for example {"n": 3}]', "no JSON"),
        ('[see below] {"n": 3}', ""),
        ('{"n": 3}, as told in [1].', ""),  # the schema wants an object
        ('Sure {as asked}:\n```json\n{"n": 3}\n```\nIt has {"n": "x"} no more.', ""),
        ('```json\n{"n": "x"}\n```\nBetter:\n```json\n{"n": 3}\n```', ""),
        ('```json\n{"n": 3}\n```\nBetter:\n```json\n{"n": "x"}\n```', "is not of type"),
        ('```json\n{"n": 3}\n```\nSend it:\n```\ncurl -d {} there\n```', ""),
        ('```python\nx = {"n": "x"}\n```\nprints\n```\n{"n": 3}\n```', ""),
        ('```json\n{"n": 3\n```', "no JSON"),
        ('```JSON\r\n{"n": 3}\r\n```', ""),
        ('```json {"n": 3}```', ""),
        ('```json\n{"n": 3}', ""),  # the fence is open, the JSON is whole
    ],
)
def test_json_fits_its_schema(text: str, reason: str) -> None:
    found = fits_schema(text, SCHEMA)
    assert found.right is (reason == "")
    assert reason in found.reason


def test_a_schema_says_whether_an_object_or_an_array_is_read() -> None:
    assert fits_schema('[1, 2] for {"n": 3}', {"type": "array", "items": {"type": "integer"}}).right
    assert fits_schema('[1, 2] for {"n": 3}', {"required": ["n"]}).right
    assert fits_schema('{"n": 3}', True).right
    with pytest.raises(InputError, match="not a JSON Schema"):
        fits_schema("{}", {"type": "number?"})


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("countdown", {"numbers": "abc", "target": 3}),
        ("countdown", {"numbers": [1, 2], "target": "3"}),
        ("exact", {"accepted": "12"}),
        ("exact", {"accepted": []}),
        ("function_call", {"functions": [AREA], "expected": []}),
        ("function_call", {"functions": [], "expected": WANTED}),
        ("function_call", {"functions": None, "expected": WANTED}),
        ("function_call", {"functions": [{"name": "geo.area"}], "expected": WANTED}),
        ("function_call", {"functions": [AREA | {"name": "geo.volume"}], "expected": WANTED}),
        ("schema", {"schema": {"type": "number?"}}),
        ("schema", {"schema": 3}),
        ("code", {"tests": "assert f(1 =="}),
        ("code", {"tests": None}),
    ],
)
def test_data_that_a_check_cannot_use_is_found_before_any_answer(kind: str, data: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"the check {kind} needs `.*correct its data"):
        validate(Check(kind=kind, data=data))


def test_a_pattern_that_never_ends_breaks_the_check_and_holds_up_nobody() -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string", "pattern": "^(a|aa)+$"}}}
    assert fits_schema('{"s": "aaa"}', schema).right
    assert "does not match" in fits_schema('{"s": "ab"}', schema).reason
    start = time.monotonic()
    found = check_answer(Check(kind="schema", data={"schema": schema}), json.dumps({"s": "a" * 60 + "b"}))
    assert found.right is None, found
    assert "TimeoutError" in found.reason
    assert time.monotonic() - start < 30.0  # the deadline is a second of a machine that may be busy


def test_answers_to_a_task_with_a_check_are_one_as_texts_and_others_by_their_value() -> None:
    check = Check(kind="countdown", data={"numbers": [5, 4, 3], "target": 23})
    asked = Prompt(id="p", messages=(("user", "?"),), task="t", key="k", check=check)
    answers = ["(5*4)+3", "( 5 * 4 ) + 3", "5*4+3", "23"]
    with AnswerChecker() as checker:
        assert label_answers(answers, equality(asked, checker)) == [0, 0, 1, 2]
        assert label_answers(["1 2+3", "12+3", "12 + 3"], equality(asked, checker)) == [0, 1, 1]
        code = replace(asked, check=Check(kind="code", data={"tests": ""}))
        assert label_answers(["for x in s:\n    t\n  r", "for x in s:\n    t\n    r"], equality(code, checker)) == [
            0,
            1,
        ]
        assert label_answers(answers, equality(replace(asked, check=None), checker)) == [0, 0, 0, 0]


def test_an_argument_that_looks_like_a_json_call_and_one_that_nobody_wanted() -> None:
    greet = {"name": "greet", "parameters": {"properties": {"who": {"type": "dict"}, "loud": {"type": "boolean"}}}}
    wanted = [{"greet": {"who": [{"name": ["Bob"]}]}}]
    assert function_call('greet(who={"name": "Bob"})', [greet], wanted).right is True
    assert function_call('greet(who={"name": "Bob"}, loud=True)', [greet], wanted).reason == "unknown argument loud"
