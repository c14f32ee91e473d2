"""From a recipe's name or a YAML file, and `--set a.b=c`, to a validated `RunConfig`; and back to YAML.

Every mistake is an `InputError` that names the dotted key, what was got and expected, and the nearest known name.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import SourceConfig, nearest
from rlsf_ray.errors import InputError
from rlsf_ray.records import Json

_Location = Sequence[int | str]


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = resources.files("rlsf_ray.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe that ships with the package."""
    return resources.files("rlsf_ray.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_config(recipe_or_file: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a recipe or YAML file describes, with `a.b=c` overrides applied in order.

    Relative data and model folders count from the working directory and become absolute, because the workers of a
    cluster have working directories of their own.
    """
    raw = _read(recipe_or_file, seen=())
    raw.setdefault("recipe", Path(recipe_or_file).stem)
    for override in overrides:
        _apply(raw, override)
    config = _with_absolute_paths(parse_config(raw, recipe_or_file))
    idle = {"loss"} if config.advantages else set()
    idle |= set() if config.has_pairs(0) else {"pairs", "learner.pairs_per_step"}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in idle or key.partition(".")[0] in idle:
            raise InputError(
                f"--set {override}: {recipe_or_file} learns from advantages, where {key} does nothing; set a key of"
                " `advantages` instead, or advantages=null to learn from pairs"
            )
    return config


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with `a.b=c` overrides applied."""
    raw = config.model_dump(mode="json")
    for override in overrides:
        _apply(raw, override)
    return _with_absolute_paths(parse_config(raw, config.recipe))


def parse_config(raw: Json, where: str) -> RunConfig:
    """Validate plain data; `where` names its origin in the error."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [_readable(dict(problem)) for problem in error.errors()]
        raise InputError("\n".join([f"{where} is not a valid run:", *(f"  {line}" for line in lines)])) from None


def dump_config(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(recipe_or_file: str, *, seen: tuple[str, ...]) -> Json:
    if recipe_or_file in seen:
        raise InputError(f"`base` goes round in a circle: {' -> '.join((*seen, recipe_or_file))}; remove one of them")
    raw = _parse_yaml(_text_of(recipe_or_file), recipe_or_file)
    if not isinstance(raw, dict):
        raise InputError(f"{recipe_or_file}: expected a mapping of keys, got {type(raw).__name__}; see `rlsf recipes`")
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise InputError(f"{recipe_or_file}: base: expected a recipe or a file, got {base!r}")
    beside = Path(recipe_or_file).parent / base
    below = _read(str(beside) if beside.is_file() else base, seen=(*seen, recipe_or_file))
    below.pop("recipe", None)
    return _merge(below, raw)


def _text_of(recipe_or_file: str) -> str:
    if recipe_or_file in recipe_names():
        return recipe_text(recipe_or_file)
    path = Path(recipe_or_file)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {recipe_or_file}: {error}; expected a YAML text file") from error
    names = recipe_names()
    raise InputError(
        f"no recipe and no file is called {recipe_or_file!r}; recipes: {', '.join(names)}{nearest(path.stem, names)}"
    )


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}; correct it there") from error


def _merge(below: Json, above: Json) -> Json:
    """`above` over `below`: mappings merge key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(raw: Json, override: str) -> None:
    """Set one `a.b.0.c=value` in place."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set: expected key=value such as loss.beta=0.2, got {override!r}")
    holder: Any = raw
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth])
        if isinstance(holder, list):
            if not key.isdecimal() or int(key) >= len(holder):
                raise InputError(
                    f"--set {override}: {here} is a list of {len(holder)}, expected an index from 0 to"
                    f" {len(holder) - 1}, got {key!r}"
                )
        elif not isinstance(holder, dict):
            raise InputError(f"--set {override}: {here} is a single value and has no key {key!r}; set {here} itself")
        index = int(key) if isinstance(holder, list) else key
        if depth == len(keys) - 1:
            holder[index] = _parse_yaml(text, f"--set {override}")
        elif isinstance(holder, dict):
            holder = holder.setdefault(index, {})
        else:
            holder = holder[index]


def _readable(problem: Json) -> str:
    """One pydantic problem as `dotted.key: what, expected, got`."""
    location: _Location = problem["loc"]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        word = str(location[-1])
        return f"unknown key {key}: expected one of {', '.join(known)}{nearest(word, known)}"
    if problem["type"] == "missing":
        return f"{key}: is missing; give it a value"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own checks say what was got themselves
        return f"{key}: {message}" if key else message
    got = problem["input"]
    hint = ""
    if problem["type"] == "literal_error" and isinstance(got, str):
        hint = nearest(got, _choices(problem))
    return f"{key}: {message[:1].lower()}{message[1:]}, got {got!r}{hint}"


def _choices(problem: Json) -> list[str]:
    return [word.strip(" '") for word in str(problem["ctx"]["expected"]).replace(" or ", ", ").split(",")]


def _keys_at(location: _Location) -> list[str]:
    """The keys that the section at `location` knows."""
    section: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (tuple, Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _sections(inner)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    def absolute(source: SourceConfig) -> SourceConfig:
        if source.path is None or "://" in source.path:
            return source
        return source.model_copy(update={"path": os.path.abspath(os.path.expanduser(source.path))})

    data = config.data.model_copy(
        update={
            "train": tuple(absolute(source) for source in config.data.train),
            "probe": tuple(absolute(source) for source in config.data.probe),
        }
    )
    folder = os.path.abspath(os.path.expanduser(config.model.name))
    is_folder = config.model.name != "smollm2" and os.path.isdir(folder)
    model = config.model.model_copy(update={"name": folder}) if is_folder else config.model
    return config.model_copy(update={"data": data, "model": model})
