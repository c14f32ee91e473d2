"""The config as a run directory keeps it, with the packages that ran it."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

import yaml
from pydantic import ValidationError

from rlsf_ray.config import RunConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import Json
from rlsf_ray.storage import Storage, damaged

SCHEMA = 1  # of the run directory: raised where older code could not read it; CONTRIBUTING.md has the rule


def read_config(storage: Storage) -> Json | None:
    """The keys of `config.yaml`, None where there is none. Raises `StorageError` if it is damaged."""
    data = storage.read("config.yaml")
    if data is None:
        return None
    try:
        values = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise damaged(storage.path("config.yaml"), error, needed=False) from error
    if not isinstance(values, dict):
        raise damaged(storage.path("config.yaml"), f"expected keys, got {type(values).__name__}", needed=False)
    return values


def with_defaults(values: Json) -> Json:
    """A kept config with the keys that it did not know yet; as it is where this version cannot read it."""
    try:
        return RunConfig.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def check_schema(storage: Storage) -> None:
    """Raises `InputError` for a run directory of a later form than this version knows. All earlier ones are read."""
    data = storage.read("packages.json")
    try:
        values = json.loads(data or b"{}")
        schema, made_by = int(values.get("schema", 1)), values.get("packages", {}).get("rlsf-ray", "a later one")
    except (ValueError, AttributeError, TypeError) as error:
        raise damaged(storage.path("packages.json"), error, needed=False) from error
    if schema > SCHEMA:
        raise InputError(
            f"{storage.root} is a run directory of form {schema}, expected at most {SCHEMA}; open it with the rlsf-ray"
            f" that made it ({made_by})"
        )


def differences(theirs: Json, ours: Json) -> str:
    """One line for each differing key, as a dotted path: what was asked for now, what the run has."""
    old, new = _flat(theirs), _flat(ours)
    keys = [key for key in {**old, **new} if old.get(key, "absent") != new.get(key, "absent")]
    return "\n".join(f"  {key}: got {new.get(key, 'absent')}, expected {old.get(key, 'absent')}" for key in keys)


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Leaves by their dotted path; an empty list or section is a leaf."""
    if not value or not isinstance(value, dict | list):
        return {path: repr(value)}
    flat: dict[str, str] = {}
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        flat |= _flat(part, f"{path}.{name}" if path else str(name))
    return flat


def packages() -> Json:
    """Versions of Python and of every installed package."""
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "packages": dict(sorted(installed.items(), key=lambda p: p[0].lower())),
    }
