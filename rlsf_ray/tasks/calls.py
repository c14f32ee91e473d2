"""Is a text the one function call that is wanted? BFCL's simple calls (Berkeley Function-Calling Leaderboard)."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlsf_ray.errors import InputError
from rlsf_ray.records import Json
from rlsf_ray.tasks.reading import JSON_MARKS, PYTHON_MARKS, closing, fenced, json_at, parsed
from rlsf_ray.tasks.verdict import Verdict

Call = tuple[str, list[tuple[str, Any]]]  # name, arguments in their order: a name may stand there twice

_OPENING = re.compile(r"(?<![\w.])(?<!def )(?<!class )[^\W\d]\w*(?:\.[^\W\d]\w*)*\(|\[\s*\{|\{")
_GOES_ON = re.compile(r"[(\[]|\.[^\W\d]")  # what is called or looked up is then what a call gives
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


def function_call(text: str, functions: Sequence[Json], expected: Sequence[Json]) -> Verdict:
    """Does `text` hold the call that is wanted, and no other?

    `functions` describes what may be called (name, parameters with properties and required); `expected` is BFCL's
    ground truth [{name: {argument: [values that count]}}], where "" among them means that it may be left out.
    Read: Python calls of literals, `name(...)` without a space, over any number of lines, but no definition and
    nothing that is called or looked up further; and JSON objects {name, arguments}, alone, in an array, or as
    OpenAI's chats hold them. Prose, backticks, an assignment or square brackets may stand around them; where blocks
    are fenced, only these are read. Two calls are wrong, even if one of them is the right one, and so is an argument
    given twice; a mention, `name()` in the prose, is a call too. A call with anything but literals, `**`, too many
    arguments or an open bracket is none. Arguments without a name (which BFCL does not take) are in the order
    described. Values have the described type, as have the items of an array: an integer counts as a float, never a
    boolean as a number. Texts are equal but for case, spaces and punctuation.
    """
    (wanted,) = expected
    ((name, accepted),) = wanted.items()
    described = {one["name"]: one["parameters"] for one in functions}
    if name not in described:
        raise InputError(f"the wanted function {name} is not among those described, {sorted(described)}; mend the data")
    calls = _calls(text, list(described[name]["properties"]))
    if len(calls) != 1:
        return Verdict(False, f"{len(calls)} calls, expected one" if calls else "no call")
    ((called, arguments),) = calls
    if called != name:
        return Verdict(False, f"calls {called}, expected {name}")
    fault = _fault(arguments, described[name], accepted)
    return Verdict(not fault, fault)


def _fault(arguments: Sequence[tuple[str, Any]], described: Json, accepted: Mapping[str, Any]) -> str:
    """What is wrong with the arguments; empty where nothing is."""
    properties, given = described["properties"], dict(arguments)
    if len(given) < len(arguments):
        names = [argument for argument, _ in arguments]
        return f"gives {next(one for one in names if names.count(one) > 1)} twice"
    if odd := sorted(given.keys() - (properties.keys() & accepted.keys())):
        return f"unknown argument {odd[0]}"
    for argument, values in accepted.items():
        if argument not in given:
            if argument in described.get("required", ()) or "" not in values:
                return f"lacks {argument}"
        elif not _has_type(given[argument], properties[argument]):
            return f"{argument} is no {_type_name(properties[argument])}"
        elif not any(_same(given[argument], value) if value != "" else given[argument] == "" for value in values):
            return f"{argument} is {given[argument]!r}"
    return ""


def _calls(text: str, order: Sequence[str]) -> list[Call]:
    """Every call in the fenced blocks of a text, or in all of it where there are none; none inside another."""
    text = "\n".join(content for _, content in fenced(text)) or text
    found: list[Call] = []
    at = 0
    while (match := _OPENING.search(text, at)) is not None:
        in_python = match[0].endswith("(")
        start = match.end() - 1 if in_python else match.start()
        end = closing(text, start, PYTHON_MARKS if in_python else JSON_MARKS)
        if end is None:
            break
        if not in_python:
            found += _json_calls(json_at(text, start, strict=True))
        elif not _GOES_ON.match(text, end):
            found += _python_call(text[match.start() : end], order)
        at = end
    return found


def _json_calls(value: Any) -> list[Call]:
    """{name, arguments}, alone or in an array; also as OpenAI's chats hold them: in `function`, in `tool_calls`."""
    calls: list[Call] = []
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict):
            continue
        if isinstance(one.get("tool_calls"), list):
            calls += _json_calls(one["tool_calls"])
            continue
        one = one["function"] if isinstance(one.get("function"), dict) else one
        arguments = one.get("arguments", one.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json_at(arguments.strip(), 0, strict=True)
        if isinstance(one.get("name"), str) and isinstance(arguments, dict):
            calls.append((one["name"], list(arguments.items())))
    return calls


def _python_call(text: str, order: Sequence[str]) -> list[Call]:
    """The call of literals that the text is, if it is one; arguments without a name are taken in that order."""
    node = parsed(text)
    if not isinstance(node, ast.Call) or len(node.args) > len(order) or not all(word.arg for word in node.keywords):
        return []
    pairs = [*zip(order, node.args, strict=False), *((str(word.arg), word.value) for word in node.keywords)]
    try:
        return [(ast.unparse(node.func), [(name, ast.literal_eval(value)) for name, value in pairs])]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return []


def _has_type(value: Any, described: Json) -> bool:
    kind = described.get("type", "any")
    if isinstance(value, bool):
        return kind in ("boolean", "any")
    if kind != "any" and not isinstance(value, _TYPES.get(kind, (object,))):
        return False
    items = described.get("items")
    return not (items and isinstance(value, list | tuple)) or all(_has_type(one, items) for one in value)


def _type_name(described: Json) -> str:
    items = described.get("items")
    return f"{described.get('type')} of {_type_name(items)}" if items else str(described.get("type"))


def _same(given: Any, value: Any) -> bool:
    """Equal as BFCL compares: texts loosely, a dict by the list of values that count for each key, lists in order."""
    if isinstance(given, bool) or isinstance(value, bool):
        return given is value
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
