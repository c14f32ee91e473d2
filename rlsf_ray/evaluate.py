"""Probe set x version -> metrics. The only place, with the tasks, where gold answers are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from rlsf_ray.algorithms import agreement
from rlsf_ray.algorithms.agreement import AgreementMap
from rlsf_ray.algorithms.answers import label_answers, mentions
from rlsf_ray.algorithms.thought import transition_rate
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.build import build_engine
from rlsf_ray.measures import difference, measure, reliability
from rlsf_ray.records import Group, Json, ProbePrompt, Trace
from rlsf_ray.rollouts.programs import write_calibration_groups, write_probe_groups
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.guard import Vitals
from rlsf_ray.tasks.checks import equality, is_right
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.sources import PromptSets
from rlsf_ray.tries import judge_episodes
from rlsf_ray.vitals import take_vitals

Item = TypeVar("Item")
LEAST_TRACES = 50  # answered traces that a map of four features needs


def evaluate_version(
    engine: Any,
    sets: PromptSets,
    config: RunConfig,
    version: int,
    earlier: Json | None = None,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> Json:
    """Write and judge the whole probe set in this process; the calibration prompts first.

    `earlier`: the calibration answers of the version before this one, where there is one.
    """
    with AnswerChecker() as checker:
        unlabelled, rows = look_at(_calibration_groups(engine, sets, config, version), earlier, checker), list[Json]()
        for start, chunk in _chunks(sets.probe, config.probe_prompts_per_call):
            prompts = [item.prompt for item in chunk]
            written = write_probe_groups(engine, prompts, config=config, version=version, first_sequence=start)
            rows += judge_groups(written, chunk, checker)
            on_chunk(start + len(chunk))
    return summarise(rows, version, config, unlabelled)


def measure_version(
    store: RunStore | None,
    config: RunConfig,
    sets: PromptSets,
    version: int,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> Json:
    """Start the engine of `config` and measure a version of a run; without a run, the base model (version 0)."""
    with closing(build_engine(config)) as engine:
        adapter = store.read_adapter(version)[0] if store and version else None
        earlier = answers_before(engine, store, config, sets, version) if store else None
        if adapter is not None:
            engine.load_version(version, adapter)
        return evaluate_version(engine, sets, config, version, earlier, on_chunk)


def answers_before(engine: Any, store: RunStore, config: RunConfig, sets: PromptSets, version: int) -> Json | None:
    """{prompt: answers} that the version before `version` writes for the calibration prompts.

    An answer is None where a trace has none; all is None for the base model, and without calibration prompts.
    """
    before = store.version_before(version)
    if before is None or not sets.calibration:
        return None
    if before:
        engine.load_version(before, store.read_adapter(before)[0])
    written = _answers(_calibration_groups(engine, sets, config, before))
    if before:
        engine.forget_version(before)
    return written


def _calibration_groups(engine: Any, sets: PromptSets, config: RunConfig, version: int) -> list[Group]:
    return [
        group
        for start, prompts in _chunks(sets.calibration, config.cluster.prompts_per_call)
        for group in write_calibration_groups(engine, prompts, config=config, version=version, first_sequence=start)
    ]


def _answers(groups: Sequence[Group]) -> Json:
    return {group.prompt.id: [trace.answer_text for trace in group.traces] for group in groups}


def _chunks(items: Sequence[Item], size: int) -> Iterator[tuple[int, Sequence[Item]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """What the calibration prompts tell of a version. No gold answer comes near."""

    map: AgreementMap | None  # None: too few answered traces
    vitals: Vitals | None  # None: there are no calibration prompts
    answers: Json  # {prompt: answers}, for the version after this one


def look_at(groups: Sequence[Group], earlier: Json | None, checker: AnswerChecker) -> Unlabelled:
    """Fit the map from one trace's features to its agreement with the others, and take the guard's vitals.

    The others are this version's, and the `earlier` version's answers to the same prompts where there are any.
    """
    said, written = _answers(groups), dict[str, Any]()
    if not groups:
        return Unlabelled(None, None, written)
    rows, shares, labels = list[list[float]](), list[float](), list[list[int]]()
    for group in groups:
        own, before = said[group.prompt.id], (earlier or {}).get(group.prompt.id, [])
        classes = label_answers([*own, *before], equality(group.prompt, checker))
        labels.append(classes[: len(own)])
        # An answer keeps the notation it had before: 1/2 in place of 0.5 is no other vote
        notation = dict(zip(reversed([*classes[len(own) :], *labels[-1]]), reversed([*before, *own]), strict=True))
        written[group.prompt.id] = [notation[label] for label in labels[-1]]
        for trace, share in zip(group.traces, agreement.over_two_versions(classes, len(own)), strict=True):
            if trace.answer:
                rows.append(trace_features(trace))
                shares.append(float(share))
    fitted = agreement.fit(np.array(rows), np.array(shares)) if len(rows) >= LEAST_TRACES else None
    return Unlabelled(fitted, take_vitals(groups, labels, written), written)


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
                "samples": _judge_all(groups["sampled"], item, checker),
                "greedy": _judged(groups["greedy"].traces[0], item, checker),
                "branches": _judge_all(groups["branches"], item, checker) if "branches" in groups else [],
            }
            | ({"episodes": judge_episodes(groups["episodes"], item, checker)} if "episodes" in groups else {})
        )
    return rows


def _judge_all(group: Group, item: ProbePrompt, checker: AnswerChecker) -> list[Json]:
    labels = label_answers([trace.answer_text for trace in group.traces], equality(item.prompt, checker))
    shares = agreement.leave_one_out(labels)
    return [
        _judged(trace, item, checker)
        | {
            "agreement": float(shares[k]),
            "label": labels[k],
            "features": trace_features(trace) if trace.answer else None,
        }
        for k, trace in enumerate(group.traces)
    ]


def _judged(trace: Trace, item: ProbePrompt, checker: AnswerChecker) -> Json:
    answer = trace.answer
    found = is_right(trace.answer_text, item, checker)
    correct = bool(found)
    span = slice(*answer.tokens) if answer else slice(0)
    return {
        "text": trace.text,
        "answer": trace.answer_text,
        "answer_chars": list(answer.chars) if answer else None,
        "correct": correct,
        "unchecked": found is None,
        "anyhow": correct or mentions(trace.text, item.gold, item.prompt.answer_format, item.prompt.messages[-1][1]),
        "transitions": transition_rate(trace.text),
        "surprisal": float(-trace.logprob.mean()),
        "answer_prob": trace.answer_prob,
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
    """What one evaluation file holds: metrics, reliability bins, judged answers, calibration.json, vitals, answers."""
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
        "calibration_answers": unlabelled.answers,
        "metrics": measure(rows) if rows else {},
        "reliability": reliability(rows) if rows else {},
        "questions": list(rows),
    }


def _with_confidence(sample: Json, fitted: AgreementMap) -> Json:
    found = sample["features"]
    return sample | {"calibrated": fitted.of_one(found) if found else 0.0}


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
