"""Checks that need no model: does a text solve its task? Pure functions, safe on whatever a model writes.

A check says right or wrong with the reason; a text that it cannot even read is wrong. That a check could not be made at
all (its own data is bad) is an InputError, never a wrong answer.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from rlsf_ray.algorithms.answers import normalise
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Json, ProbePrompt, Prompt
from rlsf_ray.tasks.calls import function_call
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.reading import asked_for, json_values, parsed
from rlsf_ray.tasks.sandbox import check_tests, run_tests
from rlsf_ray.tasks.verdict import Verdict

PATTERN_S = 1.0
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-"})


def check_answer(check: Check, answer: str | None) -> Verdict:
    """Does the answer pass? A check that breaks says so, which is no wrong answer. Raises InputError for bad data."""
    validate(check)
    if answer is None:
        return Verdict(False, "no answer")
    try:
        return CHECKS[check.kind](answer, **check.data)
    except InputError:
        raise
    except Exception as error:  # whatever a model's text does to a check
        return Verdict(None, f"the check broke: {type(error).__name__}: {error}")


def validate(check: Check) -> None:
    """Raise InputError for a kind that is not there, or data that it does not take."""
    if check.kind not in CHECKS:
        raise InputError(f"no check is called {check.kind!r}; expected one of {', '.join(CHECKS)}")
    try:
        inspect.signature(CHECKS[check.kind]).bind("", **check.data)
    except TypeError as error:
        raise InputError(
            f"the check {check.kind} does not take {sorted(check.data)}: {error}; correct its data"
        ) from error
    expected, good = _DATA.get(check.kind, ("", lambda data: True))
    if not good(check.data):
        raise InputError(f"the check {check.kind} needs {expected}, got {check.data!r:.200}; correct its data")


def is_right(answer: str | None, item: ProbePrompt, checker: AnswerChecker) -> bool | None:
    """By the task's own check where it has one (a countdown has many right answers), else by the gold answer.

    None where the check could not be made.
    """
    if item.prompt.check is not None:
        return check_answer(item.prompt.check, answer).right
    return answer is not None and checker.equal(answer, item.gold)


def equality(prompt: Prompt, checker: AnswerChecker) -> Callable[[str, str], bool]:
    """When two answers to a prompt are one: by their value, or as texts where a check reads more than the value.

    1 + 22 and 23 are the same number, but only one of them is an expression.
    """
    if prompt.check is None:
        return checker.equal
    return _same_expression if prompt.check.kind == "countdown" else operator.eq


def countdown(text: str, numbers: Sequence[int], target: int) -> Verdict:
    """Is `text` an expression of + - * / that uses each of `numbers` exactly once and equals `target`, exactly?

    As reasoning-gym asks it; its own scorer evaluates the text as Python, which is no check for what a model writes.
    """
    tree = parsed(_without_strays(text.translate(_SIGNS)))
    if tree is None:
        return Verdict(False, "no expression")
    used: list[int] = []
    try:
        value = _value(tree, used)
    except ZeroDivisionError:
        return Verdict(False, "divides by zero")
    except RecursionError:
        return Verdict(False, "too deep")
    except ValueError as error:
        return Verdict(False, str(error))
    if sorted(used) != sorted(numbers):
        return Verdict(False, f"uses {sorted(used)}, expected {sorted(numbers)}")
    return Verdict(value == target, "" if value == target else f"is {value}, expected {target}")


def _without_strays(text: str) -> str:
    """An expression without what stands around it in a sentence: bold type, a full stop, the bracket it ends."""
    bare = text.strip(" \t\n*`").rstrip(" \t\n*`.")
    while bare.endswith(")") and bare.count(")") > bare.count("("):
        bare = bare[:-1].rstrip()
    while bare.startswith("(") and bare.count("(") > bare.count(")"):
        bare = bare[1:].lstrip()
    return bare


def fits_schema(text: str, schema: Json | bool) -> Verdict:
    """Does the JSON in `text` fit the JSON Schema? Raises InputError for a schema that is none.

    Read is the last block fenced as json, else the last without a name, else the whole text. In it counts the last
    object or array (that of them which the schema's `type` names) that lies in no other brackets, be these JSON or
    prose. Where a bracket stays open there is no JSON: the text was cut short. A pattern that takes longer than
    PATTERN_S on a text breaks the check, and holds up nobody (one for the names of properties has no such limit).
    """
    kind = _validator(schema)
    wanted = schema.get("type") if isinstance(schema, dict) else None
    found = [
        value
        for value in json_values(asked_for(text, "json"))
        if isinstance(value, {"object": dict, "array": list}.get(str(wanted), dict | list))
    ]
    if not found:
        return Verdict(False, "no JSON")
    problem = next(kind(schema).iter_errors(found[-1]), None)
    return Verdict(problem is None, problem.message if problem else "")


def code(text: str, tests: str) -> Verdict:
    """Does the text's code pass the tests, which are assertions? Run apart: sandbox.py.

    That is its last block fenced as python, else the last without a name, else the whole text.
    """
    return run_tests(asked_for(text, "python", "python3", "py"), tests)


def exact(text: str, accepted: Sequence[str]) -> Verdict:
    """Is it one of the accepted answers, in canonical form? Where they come from decides whether that is a label."""
    right = normalise(text) in {normalise(one) for one in accepted}
    return Verdict(right, "" if right else f"is {text.strip()!r:.80}")


CHECKS: dict[str, Callable[..., Verdict]] = {
    "countdown": countdown,
    "exact": exact,
    "function_call": function_call,
    "schema": fits_schema,
    "code": code,
}


# kind -> what its data must be, in words and as a test
_DATA: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "countdown": (
        "`numbers`, a list of whole numbers, and `target`, one",
        lambda data: isinstance(data["numbers"], list | tuple) and _whole(*data["numbers"], data["target"]),
    ),
    "exact": ("`accepted`, a list of texts", lambda data: _texts(data["accepted"])),
    "function_call": (
        "`expected`, a list of one call, and `functions` that describe it: name, parameters with properties",
        lambda data: _one_call(data["expected"]) and _describes(data["functions"], *data["expected"][0]),
    ),
    "schema": ("`schema`, a JSON Schema", lambda data: _accepts(_validator, data["schema"])),
    "code": ("`tests`, Python code", lambda data: _accepts(check_tests, data["tests"])),
}
LABELS = ("exact", "function_call")  # kinds whose data hold the wanted answer


def _same_expression(a: str, b: str) -> bool:
    """Equal but for spaces that part no two digits."""
    a, b = (re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text) for text in (a, b))
    return a == b


def _texts(found: Any) -> bool:
    return isinstance(found, list | tuple) and bool(found) and all(isinstance(one, str) for one in found)


def _whole(*found: Any) -> bool:
    return all(type(one) is int for one in found)


def _describes(functions: Any, wanted: str) -> bool:
    """Every function by a name and parameters with properties, and the wanted one among them."""
    if not isinstance(functions, list | tuple) or not all(isinstance(one, Mapping) for one in functions):
        return False
    parameters = {one.get("name"): one.get("parameters") for one in functions}
    good = all(isinstance(p, Mapping) and isinstance(p.get("properties"), Mapping) for p in parameters.values())
    return good and wanted in parameters


def _one_call(found: Any) -> bool:
    calls = found if isinstance(found, list | tuple) else ()
    return len(calls) == 1 and isinstance(calls[0], Mapping) and len(calls[0]) == 1


def _accepts(check: Callable[[Any], object], found: Any) -> bool:
    """Does `check` raise no InputError?"""
    try:
        check(found)
    except InputError:
        return False
    return True


def _validator(schema: Any) -> Any:
    """jsonschema's class for a schema, with a deadline for patterns. Raises InputError for what is no JSON Schema."""
    import jsonschema

    try:
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except (jsonschema.SchemaError, AttributeError, TypeError) as error:
        raise InputError(f"not a JSON Schema: {getattr(error, 'message', error)}; correct it") from error
    return jsonschema.validators.extend(kind, {"pattern": _pattern})


def _pattern(validator: Any, pattern: str, instance: Any, schema: Json) -> Iterator[Any]:
    """JSON Schema's `pattern`, with a deadline, which Python's own `re` has not. Raises TimeoutError."""
    import jsonschema
    import regex

    if isinstance(instance, str) and not regex.search(pattern, instance, timeout=PATTERN_S):
        yield jsonschema.ValidationError(f"{instance[:80]!r} does not match {pattern!r}")


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The exact value; the whole numbers in it are added to `used`. Raises ValueError for anything but arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, used)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError(f"holds {type(node).__name__}, expected whole numbers and + - * /")
