"""Probe set x version -> metrics. The only place, with the tasks, where gold answers are read."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlsf_ray import __version__
from rlsf_ray.algorithms import answers, calibration
from rlsf_ray.algorithms.answers import label_answers
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.models import cache_root, find_model
from rlsf_ray.records import Group, Json, ProbePrompt, Trace
from rlsf_ray.rollouts.programs import write_probe_groups
from rlsf_ray.tasks import equality
from rlsf_ray.tasks.equality import AnswerChecker

logger = logging.getLogger(__name__)

CONFIDENCES = ("answer_prob", "agreement")


def evaluate_version(
    engine: Any,
    probe: Sequence[ProbePrompt],
    config: RunConfig,
    version: int,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> Json:
    """Write, judge and summarise the whole probe set in this process."""
    checker, rows, size = AnswerChecker(), [], config.probe_prompts_per_call
    for start in range(0, len(probe), size):
        chunk = probe[start : start + size]
        prompts = [item.prompt for item in chunk]
        sampled, greedy = write_probe_groups(engine, prompts, config=config, version=version, first_sequence=start)
        rows += judge_groups(sampled, greedy, chunk, checker)
        on_chunk(start + len(chunk))
    checker.close()
    return summarise(rows, version, config)


def judge_groups(
    sampled: Sequence[Group], greedy: Sequence[Group], probe: Sequence[ProbePrompt], checker: AnswerChecker
) -> list[Json]:
    """One row for each question: every sampled trace and the greedy one, judged against the gold answer."""
    gold = {item.prompt.id: item.gold for item in probe}
    rows = []
    for many, one in zip(sampled, greedy, strict=True):
        right = gold[many.prompt.id]
        texts = [trace.answer.text if trace.answer else None for trace in many.traces]
        labels = label_answers(texts, checker.equal)
        samples = [
            _judged(trace, right, checker) | {"agreement": _agreement(labels, k), "label": labels[k]}
            for k, trace in enumerate(many.traces)
        ]
        rows.append(
            {
                "id": many.prompt.id,
                "question": many.prompt.messages[-1][1],
                "task": many.prompt.task,
                "gold": right,
                "samples": samples,
                "greedy": _judged(one.traces[0], right, checker),
            }
        )
    return rows


def _judged(trace: Trace, gold: str, checker: AnswerChecker) -> Json:
    answer = trace.answer
    return {
        "text": trace.text,
        "answer": answer.text if answer else None,
        "answer_chars": list(answer.chars) if answer else None,
        "correct": bool(answer and checker.equal(answer.text, gold)),
        "answer_prob": float(np.exp(trace.logprob[slice(*answer.tokens)].sum())) if answer else 0.0,
        "length": len(trace.token_ids),
        "finished": trace.finished,
    }


def _agreement(labels: Sequence[int], index: int) -> float:
    """Share of the OTHER traces of the prompt with the same answer; 0 without an answer."""
    if labels[index] < 0 or len(labels) < 2:
        return 0.0
    return (labels.count(labels[index]) - 1) / (len(labels) - 1)


def summarise(rows: Sequence[Json], version: int, config: RunConfig) -> Json:
    """Metrics with intervals over questions. Unparsed traces count as wrong with confidence 0."""
    samples = [sample for row in rows for sample in row["samples"]]
    correct = np.array([sample["correct"] for sample in samples], dtype=float)
    by_question = [[float(sample["correct"]) for sample in row["samples"]] for row in rows]
    _, low, high = calibration.bootstrap_interval(by_question)
    metrics = {
        "greedy_accuracy": float(np.mean([row["greedy"]["correct"] for row in rows])),
        "sampled_accuracy": float(correct.mean()),
        "sampled_accuracy_low": low,
        "sampled_accuracy_high": high,
        "majority_accuracy": float(np.mean([_majority_correct(row["samples"]) for row in rows])),
        "parsed": float(np.mean([sample["answer"] is not None for sample in samples])),
        "cut_off": float(np.mean([not sample["finished"] for sample in samples])),
        "mean_length": float(np.mean([sample["length"] for sample in samples])),
    }
    reliability = {}
    for name in CONFIDENCES:
        confidence = np.array([sample[name] for sample in samples])
        metrics[f"ece_{name}"] = calibration.ece(confidence, correct)
        metrics[f"brier_{name}"] = calibration.brier(confidence, correct)
        metrics[f"auroc_{name}"] = calibration.auroc(confidence, correct)
        reliability[name] = [list(bin_) for bin_ in calibration.reliability(confidence, correct)]
    return {
        "version": version,
        "num_questions": len(rows),
        "num_samples": config.eval.samples,
        "metrics": metrics,
        "reliability": reliability,
        "questions": list(rows),
    }


def _majority_correct(samples: Sequence[Json]) -> bool:
    """Is the commonest answer right? Ties go to the answer written first."""
    votes = Counter(sample["label"] for sample in samples if sample["label"] >= 0)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return next(bool(sample["correct"]) for sample in samples if sample["label"] == winner)


def difference(before: Json, after: Json) -> Json:
    """Paired rise of sampled accuracy over the questions both evaluations hold: [mean, low, high]."""
    first, last = _correct_by_question(before), _correct_by_question(after)
    shared = sorted(first.keys() & last.keys())
    old, new = [first[i] for i in shared], [last[i] for i in shared]
    rise, low, high = calibration.paired_interval(old, new)
    return {"sampled_accuracy": [rise, low, high]}


def _correct_by_question(evaluation: Json) -> dict[str, list[float]]:
    return {row["id"]: [float(sample["correct"]) for sample in row["samples"]] for row in evaluation["questions"]}


def cached_base(config: RunConfig, probe: Sequence[ProbePrompt]) -> Json | None:
    """An earlier evaluation of the same base model on the same probe set with the same settings."""
    path = _cache_path(config, probe)
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def store_base(config: RunConfig, probe: Sequence[ProbePrompt], evaluation: Json) -> None:
    """Keep the base model's evaluation for later runs."""
    path = _cache_path(config, probe)
    half_made = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half_made.write_text(json.dumps(evaluation))
        half_made.replace(path)
    except OSError as error:  # a cache that cannot be written costs time later, and not this run
        logger.warning("the base model's evaluation is not kept for other runs: %s", error)


def _cache_path(config: RunConfig, probe: Sequence[ProbePrompt]) -> Path:
    key = {
        "judges": [hashlib.sha256(Path(str(part.__file__)).read_bytes()).hexdigest() for part in (answers, equality)],
        "package": __version__,
        "engine": [config.engine, config.engine_args],
        "model": config.model.model_dump(),
        "files": _fingerprint(find_model(config.model.name)),
        "probe": [[item.prompt.id, item.prompt.messages, item.prompt.answer_format, item.gold] for item in probe],
        "sampling": [config.rollout.temperature, config.rollout.max_tokens, config.eval.samples],
        "batch": config.probe_prompts_per_call,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_root() / "evaluations" / f"{digest}.json"


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
        summary["difference"] = difference(found[0], found[-1])
    summary |= more
    store.write_json("summary.json", summary)
    return summary
