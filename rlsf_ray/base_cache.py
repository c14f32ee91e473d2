"""The base model's measure is the same for every run with the same probe set and settings: it is kept between runs."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from dataclasses import asdict
from pathlib import Path

from rlsf_ray import __version__, evaluate, measures, records, tries, vitals
from rlsf_ray.algorithms import agreement, answers, calibration, thought, voting
from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import SEVERAL_TURNS
from rlsf_ray.engines import tokens
from rlsf_ray.engines.models import cache_root, find_model
from rlsf_ray.records import Json
from rlsf_ray.rollouts import desk, programs, seeds, several, stand_ins
from rlsf_ray.tasks import calls, checks, equality, math_helper, reading, sandbox, verdict
from rlsf_ray.tasks.sources import PromptSets

logger = logging.getLogger(__name__)

# What a measure rests on; a test holds that nothing of ours is missing that these import
JUDGES = (
    agreement,
    answers,
    calibration,
    calls,
    checks,
    desk,
    equality,
    evaluate,
    math_helper,
    measures,
    programs,
    reading,
    records,
    sandbox,
    seeds,
    several,
    stand_ins,
    thought,
    tokens,
    tries,
    verdict,
    vitals,
    voting,
)


def cached_base(config: RunConfig, sets: PromptSets) -> Json | None:
    """An earlier evaluation of the same base model on the same probe set with the same settings."""
    if ":" in config.rollout.name:  # a user's own program: what it does is not in the key
        return None
    path = _cache_path(config, sets)
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def store_base(config: RunConfig, sets: PromptSets, evaluation: Json) -> None:
    """Keep the base model's evaluation for later runs."""
    if ":" in config.rollout.name:
        return
    path = _cache_path(config, sets)
    half_made = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half_made.write_text(json.dumps(evaluation))
        half_made.replace(path)
    except OSError as error:  # a cache that cannot be written costs time later, and not this run
        logger.warning("the base model's evaluation is not kept for other runs: %s", error)


def _cache_path(config: RunConfig, sets: PromptSets) -> Path:
    digest = hashlib.sha256(json.dumps(measure_key(config, sets), sort_keys=True).encode()).hexdigest()[:32]
    return cache_root() / "evaluations" / f"{digest}.json"


def measure_key(config: RunConfig, sets: PromptSets) -> Json:
    """All of ours that the base model's measure depends on, but for the engine's own code."""
    return {
        "judges": [hashlib.sha256(Path(str(part.__file__)).read_bytes()).hexdigest() for part in JUDGES],
        "package": __version__,
        "engine": [config.engine, config.engine_args],
        "model": config.model.model_dump(),
        "files": fingerprint(find_model(config.model.name)),
        "probe": [[item.prompt.id, item.prompt.messages, item.prompt.answer_format, item.gold] for item in sets.probe],
        "calibration": [[p.id, p.messages, p.answer_format] for p in sets.calibration],
        "sampling": [config.rollout.temperature, config.rollout.max_tokens, config.eval.samples, config.eval.branches],
        "rollout": _of_turns(config) if config.rollout.name in SEVERAL_TURNS else {},
        "checks": [asdict(item.prompt.check) for item in sets.probe if item.prompt.check],
        "batch": config.probe_prompts_per_call,
    }


def _of_turns(config: RunConfig) -> Json:
    """How episodes are drawn: turns that are credited in another way than the others."""
    learned = config.advantages
    return config.rollout.model_dump() | {"learned": [learned.turns, learned.held_turns] if learned else None}


def fingerprint(folder: Path) -> list[tuple[str, int, str]]:
    """Name, size and a hash of the first and last megabyte of each weights and config file."""
    found = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja")):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, size - (1 << 20)))
            found.append((path.name, size, hashlib.sha256(head + file.read()).hexdigest()))
    return found
