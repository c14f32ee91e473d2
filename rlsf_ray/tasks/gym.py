"""Procedural questions from the package reasoning-gym."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import count
from typing import Any

from rlsf_ray.config_sections import SourceConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, Json
from rlsf_ray.tasks.questions import (
    Question,
    as_user,
    canonical_key,
    cell_text,
    is_arithmetic,
    optional_module,
    question_id,
    spread_seed,
)

_CHUNK = 256  # questions made from one seed
_UNORDERED = ("gcd", "lcm")  # families that ask the same whatever the order of their numbers
_PATIENCE = 1000  # draws without a new question after which a family counts as exhausted


def gym_questions(source: SourceConfig, *, seed: int, labelled: bool) -> Iterator[Question]:
    """Distinct questions of the family `source.name`, without end unless the family is small.

    A family ends after 1000 draws in a row without a new key. Of the 55 unordered products of two digits the rarest
    (a square) comes with probability 1/100 a draw, so it is missed with probability 0.99^1000 = 4e-5.
    Raises InputError: package missing, unknown family, options it refuses.
    """
    name, seen, barren = str(source.name), set[str](), 0
    for chunk in count():
        for item in _gym_dataset(name, source.options, spread_seed(f"chunk {chunk}", seed)):
            question = _gym_question(item, name, labelled)
            barren = barren + 1 if question.key in seen else 0
            if barren == 0:
                seen.add(question.key)
                yield question
            elif barren == _PATIENCE:
                return


def _gym_question(item: Json, name: str, labelled: bool) -> Question:
    question = str(item["question"])
    key = _key(item, name, question)
    gold = cell_text(item["answer"], f"reasoning-gym {name}", "answer") if labelled else None
    check = None
    if name == "countdown":  # what the question itself says
        check = Check(kind=name, data={part: item["metadata"][part] for part in ("numbers", "target")})
    return Question(id=question_id(name, key), messages=as_user(question), task=name, key=key, gold=gold, check=check)


def _key(item: Json, name: str, question: str) -> str:
    if name in _UNORDERED:
        return f"{name} of {sorted(item['metadata']['numbers'])}"
    # Only an expression that the question shows is the question; some families (countdown) keep the solution there.
    expression = str(item["metadata"].get("expression", ""))
    return canonical_key(expression if is_arithmetic(expression) and expression in question else question)


def _gym_dataset(name: str, options: Json, seed: int) -> Any:
    gym = optional_module("reasoning_gym", "pip install 'rlsf-ray[demo]'")
    names = sorted(gym.factory.DATASETS)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise InputError(
            f"unknown reasoning-gym data set: got {name!r}, expected one of its {len(names)} names"
            + (f"; did you mean {near[0]!r}?" if near else "; see reasoning_gym.factory.DATASETS")
        )
    if own := {"seed", "size"} & options.keys():
        raise InputError(f"options of {name} may not set {sorted(own)}; use `count` and the run's `seed`")
    try:
        return gym.create_dataset(name, size=_CHUNK, seed=seed, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"reasoning-gym refuses the options of {name}: {error}; got {options}, it knows "
            + ", ".join(k for k in gym.factory.DATASETS[name][1].__dataclass_fields__ if k not in ("seed", "size"))
        ) from error
