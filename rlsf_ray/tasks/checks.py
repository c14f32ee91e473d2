"""Checks that need no model: does a text solve its task? Pure functions, safe on whatever a model writes.

A check says right or wrong with the reason; a text that it cannot even read is wrong. That a check could not be made at
all (its own data is bad) is an InputError, never a wrong answer.
"""

from __future__ import annotations

import ast
import inspect
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from rlsf_ray.algorithms.answers import normalise
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Json, ProbePrompt, Prompt
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.sandbox import check_tests, run_tests
from rlsf_ray.tasks.verdict import Verdict

LONGEST = 2000  # characters of a text that is read as code
PATTERN_S = 1.0
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-"})
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_OPENING = re.compile(r"[\[{]")
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "float": (float, int),
    "number": (float, int),
    "boolean": (bool,),
    "array": (list, tuple),
    "tuple": (list, tuple),
    "dict": (dict,),
    "object": (dict,),
}


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
    tree = _parsed(_without_strays(text.translate(_SIGNS)))
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
    bare = text.strip(" \t\n*`.")
    while bare.endswith(")") and bare.count(")") > bare.count("("):
        bare = bare[:-1].rstrip()
    while bare.startswith("(") and bare.count("(") > bare.count(")"):
        bare = bare[1:].lstrip()
    return bare


def function_call(text: str, functions: Sequence[Json], expected: Sequence[Json]) -> Verdict:
    """Is `text` the one call that is wanted? BFCL's simple calls: `name(arg=value, ...)`, or JSON with its name.

    `functions` describes what may be called (name, parameters with properties and required); `expected` is BFCL's
    ground truth [{name: {argument: [values that count]}}], where "" among them means that it may be left out. Values
    have the described type (an integer counts as a float); texts are equal but for case, spaces and punctuation.
    """
    (wanted,) = expected
    ((name, accepted),) = wanted.items()
    described = {one["name"]: one["parameters"] for one in functions}
    if name not in described:
        raise InputError(f"the wanted function {name} is not among those described, {sorted(described)}; mend the data")
    properties = described[name]["properties"]
    call = _python_call(text, list(properties)) or _json_call(text)  # a Python argument may look like a JSON call
    if call is None:
        return Verdict(False, "no call")
    called, given = call
    if called != name:
        return Verdict(False, f"calls {called}, expected {name}")
    if odd := sorted(given.keys() - (properties.keys() & accepted.keys())):
        return Verdict(False, f"unknown argument {odd[0]}")
    for argument, values in accepted.items():
        if argument not in given:
            if argument in described[name].get("required", ()) or "" not in values:
                return Verdict(False, f"lacks {argument}")
        elif not _has_type(given[argument], properties[argument]["type"]):
            return Verdict(False, f"{argument} is no {properties[argument]['type']}")
        elif not any(_same(given[argument], value) for value in values):
            return Verdict(False, f"{argument} is {given[argument]!r}")
    return Verdict(True)


def fits_schema(text: str, schema: Json) -> Verdict:
    """Does the last JSON object or array in `text` fit the JSON Schema? Raises InputError for a schema that is none.

    A pattern that takes longer than PATTERN_S on a text breaks the check, and holds up nobody (one for the names of
    properties has no such limit).
    """
    kind = _validator(schema)
    found = list(_json_values(text))
    if not found:
        return Verdict(False, "no JSON")
    problem = next(kind(schema).iter_errors(found[-1]), None)
    return Verdict(problem is None, problem.message if problem else "")


def code(text: str, tests: str) -> Verdict:
    """Does the text's last Python block (or all of it) pass the tests, which are assertions? Run apart: sandbox.py."""
    blocks = _BLOCK.findall(text)
    return run_tests(blocks[-1] if blocks else text, tests)


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
    "function_call": ("`expected`, a list of one call", lambda data: _one_call(data["expected"])),
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


def _parsed(text: str) -> ast.expr | None:
    if len(text) > LONGEST:
        return None
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what a parser says of hostile text
        return None


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


def _json_values(text: str) -> Iterator[Any]:
    """Every JSON object or array in a text that does not lie inside another."""
    decoder, at = json.JSONDecoder(), 0
    while (match := _OPENING.search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, match.start())
            yield value
        except (ValueError, RecursionError):
            at = match.start() + 1


def _json_call(text: str) -> tuple[str, dict[str, Any]] | None:
    for value in _json_values(text):
        one = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(one, dict) and isinstance(one.get("name"), str):
            arguments = one.get("arguments", one.get("parameters", {}))
            if isinstance(arguments, dict):
                return one["name"], arguments
    return None


def _python_call(text: str, order: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The first line that is a call of literals; arguments without a name are taken in the order described."""
    for line in text.strip().strip("`").splitlines():
        node = _parsed(line.strip().strip("`").removeprefix("[").removesuffix("]"))
        if not isinstance(node, ast.Call) or len(node.args) > len(order):
            continue
        try:
            given = {name: ast.literal_eval(value) for name, value in zip(order, node.args, strict=False)}
            given |= {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return ast.unparse(node.func), given
    return None


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind in ("boolean", "any")
    return kind == "any" or isinstance(value, _TYPES.get(kind, (object,)))


def _same(given: Any, value: Any) -> bool:
    """Equal as BFCL compares: texts loosely, a dict by the list of values that count for each key, lists in order."""
    if isinstance(given, str) and isinstance(value, str):
        return _plain(given) == _plain(value)
    if isinstance(given, list | tuple) and isinstance(value, list | tuple):
        return len(given) == len(value) and all(_same(a, b) for a, b in zip(given, value, strict=True))
    if isinstance(given, dict) and isinstance(value, Mapping):
        return given.keys() <= value.keys() and all(_counts(given, key, values) for key, values in value.items())
    return type(given) is not str and bool(given == value)


def _counts(given: Mapping[str, Any], key: str, values: Any) -> bool:
    accepted = values if isinstance(values, list) else [values]
    return any(_same(given[key], value) for value in accepted) if key in given else "" in accepted


def _plain(text: str) -> str:
    return re.sub(r"[\s,./\-_*^'\"]", "", text).casefold()
