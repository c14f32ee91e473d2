"""Find a named function in a plain dict, or a user's own as `package.module:function`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import TypeVar

from rlsf_ray.errors import InputError

T = TypeVar("T")


def choose(table: Mapping[str, T], name: str, key: str) -> T:
    """The entry `name` of `table`, or the object that `package.module:function` names.

    `key` is the config key, for the message. Raises InputError for an unknown name.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"unknown {key}: got {name!r}, expected one of {', '.join(sorted(table))} or package.module:function{hint}"
        )
    module_name, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{key}={name!r} cannot be imported ({error}); install the module where the workers run, or fix the name"
        ) from error
