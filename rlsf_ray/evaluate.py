"""Probe set x version -> metrics. The only place, with the tasks, where gold answers are read."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlsf_ray import __version__, measures, vitals
from rlsf_ray.algorithms import agreement, answers, calibration, voting
from rlsf_ray.algorithms.agreement import AgreementMap
from rlsf_ray.algorithms.answers import label_answers
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.models import cache_root, find_model
from rlsf_ray.measures import difference, measure, reliability
from rlsf_ray.records import Group, Json, ProbePrompt, Trace
from rlsf_ray.rollouts import programs
from rlsf_ray.rollouts.programs import write_calibration_groups, write_probe_groups
from rlsf_ray.stream.guard import Vitals
from rlsf_ray.tasks import equality
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.sources import PromptSets
from rlsf_ray.vitals import take_vitals

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
JUDGES = (agreement, answers, calibration, equality, measures, programs, vitals, voting)  # what a measure rests on
LEAST_TRACES = 50  # answered traces that a map of four features needs


def evaluate_version(
    engine: Any,
    sets: PromptSets,
    config: RunConfig,
    version: int,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> Json:
    """Write and judge the whole probe set in this process; the calibration prompts first."""
    with AnswerChecker() as checker:
        groups, rows = list[Group](), list[Json]()
        for start, prompts in _chunks(sets.calibration, config.cluster.prompts_per_call):
            groups += write_calibration_groups(engine, prompts, config=config, version=version, first_sequence=start)
        unlabelled = look_at(groups, checker)
        for start, chunk in _chunks(sets.probe, config.probe_prompts_per_call):
            prompts = [item.prompt for item in chunk]
            written = write_probe_groups(engine, prompts, config=config, version=version, first_sequence=start)
            rows += judge_groups(written, chunk, checker)
            on_chunk(start + len(chunk))
    return summarise(rows, version, config, unlabelled)


def _chunks(items: Sequence[Item], size: int) -> Iterator[tuple[int, Sequence[Item]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """What the calibration prompts tell of a version. No gold answer comes near."""

    map: AgreementMap | None  # None: too few answered traces
    vitals: Vitals | None  # None: there are no calibration prompts


def look_at(groups: Sequence[Group], checker: AnswerChecker) -> Unlabelled:
    """Fit the map from one trace's features to its agreement with the others, and take the guard's vitals."""
    if not groups:
        return Unlabelled(None, None)
    rows, shares = list[list[float]](), list[float]()
    labels = [label_answers([trace.answer_text for trace in group.traces], checker.equal) for group in groups]
    for group, classes in zip(groups, labels, strict=True):
        for trace, share in zip(group.traces, agreement.leave_one_out(classes), strict=True):
            if trace.answer:
                rows.append(trace_features(trace))
                shares.append(float(share))
    fitted = agreement.fit(np.array(rows), np.array(shares)) if len(rows) >= LEAST_TRACES else None
    return Unlabelled(fitted, take_vitals(groups, labels))


def judge_groups(
    written: Mapping[str, Sequence[Group]], probe: Sequence[ProbePrompt], checker: AnswerChecker
) -> list[Json]:
    """One row for each question: all its traces, as `write_probe_groups` gives them, judged against the gold answer."""
    rows = []
    for index, item in enumerate(probe):
        groups = {kind: found[index] for kind, found in written.items()}
        rows.append(
            {
                "id": item.prompt.id,
                "question": item.prompt.messages[-1][1],
                "task": item.prompt.task,
                "gold": item.gold,
                "samples": _judge_all(groups["sampled"], item.gold, checker),
                "greedy": _judged(groups["greedy"].traces[0], item.gold, checker),
                "branches": _judge_all(groups["branches"], item.gold, checker) if "branches" in groups else [],
            }
        )
    return rows


def _judge_all(group: Group, gold: str, checker: AnswerChecker) -> list[Json]:
    labels = label_answers([trace.answer_text for trace in group.traces], checker.equal)
    shares = agreement.leave_one_out(labels)
    return [
        _judged(trace, gold, checker)
        | {
            "agreement": float(shares[k]),
            "label": labels[k],
            "features": trace_features(trace) if trace.answer else None,
        }
        for k, trace in enumerate(group.traces)
    ]


def _judged(trace: Trace, gold: str, checker: AnswerChecker) -> Json:
    answer = trace.answer
    span = slice(*answer.tokens) if answer else slice(0)
    return {
        "text": trace.text,
        "answer": trace.answer_text,
        "answer_chars": list(answer.chars) if answer else None,
        "correct": bool(answer and checker.equal(answer.text, gold)),
        "answer_prob": float(np.exp(trace.logprob[span].sum())) if answer else 0.0,
        "disparity": float((trace.top1 - trace.top2)[span].mean()) if answer else 0.0,
        "length": len(trace.token_ids),
        "finished": trace.finished,
    }


def trace_features(trace: Trace) -> list[float]:
    """What the map looks at in an answered trace."""
    assert trace.answer is not None, "features are those of an answered trace"
    found = agreement.features(trace.logprob, trace.top1, trace.top2, slice(*trace.answer.tokens))
    return [float(value) for value in found]


def summarise(rows: Sequence[Json], version: int, config: RunConfig, unlabelled: Unlabelled) -> Json:
    """What one evaluation file holds: metrics, reliability bins, every answer, calibration.json and the vitals."""
    fitted = unlabelled.map
    if fitted is not None:
        rows = [
            row | {kind: [_with_confidence(s, fitted) for s in row[kind]] for kind in ("samples", "branches")}
            for row in rows
        ]
    return {
        "version": version,
        "num_questions": len(rows),
        "num_samples": config.eval.samples,
        "calibration": fitted.to_json() if fitted else None,
        "vitals": asdict(unlabelled.vitals) if unlabelled.vitals else None,
        "metrics": measure(rows) if rows else {},
        "reliability": reliability(rows) if rows else {},
        "questions": list(rows),
    }


def _with_confidence(sample: Json, fitted: AgreementMap) -> Json:
    found = sample["features"]
    return sample | {"calibrated": float(fitted(np.array([found]))[0]) if found else 0.0}


def cached_base(config: RunConfig, sets: PromptSets) -> Json | None:
    """An earlier evaluation of the same base model on the same probe set with the same settings."""
    path = _cache_path(config, sets)
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def store_base(config: RunConfig, sets: PromptSets, evaluation: Json) -> None:
    """Keep the base model's evaluation for later runs."""
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
    """All that the base model's measure depends on."""
    return {
        "judges": [hashlib.sha256(Path(str(part.__file__)).read_bytes()).hexdigest() for part in JUDGES],
        "package": __version__,
        "engine": [config.engine, config.engine_args],
        "model": config.model.model_dump(),
        "files": _fingerprint(find_model(config.model.name)),
        "probe": [[item.prompt.id, item.prompt.messages, item.prompt.answer_format, item.gold] for item in sets.probe],
        "calibration": [[p.id, p.messages, p.answer_format] for p in sets.calibration] + [config.rollout.traces],
        "sampling": [config.rollout.temperature, config.rollout.max_tokens, config.eval.samples, config.eval.branches],
        "batch": config.probe_prompts_per_call,
    }


def _fingerprint(folder: Path) -> list[tuple[str, int, str]]:
    """Name, size and a hash of the first and last megabyte of each weights and config file."""
    found = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja")):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, size - (1 << 20)))
            found.append((path.name, size, hashlib.sha256(head + file.read()).hexdigest()))
    return found


def run_summary(store: Any, *, accounting: Json, seconds: float, **more: Any) -> Json:
    """Gather what a run has measured into summary.json, and return it. `more`: further keys of the summary."""
    config = store.config
    found = [store.read_json(f"eval/{name}") for name in sorted(store.names("eval"))]
    found = [one for one in found if one["num_questions"]]  # without a probe set there are calibrations only
    versions = [{"version": one["version"], "metrics": one["metrics"]} for one in found]
    summary: Json = {
        "run": store.root,
        "recipe": config.recipe,
        "seed": config.seed,
        "model": config.model.name,
        "status": "done",
        "rounds": config.rounds,
        "versions": versions,
        "before": None,
        "after": None,
        "difference": None,
        "accounting": accounting,
        "seconds": {"total": seconds},
        "packages": store.read_json("packages.json"),
    }
    if len(found) > 1:
        summary |= {"before": found[0]["metrics"], "after": found[-1]["metrics"]}
        summary["difference"] = difference(found[0], found[-1]) or None
    summary |= more
    store.write_json("summary.json", summary)
    return summary
