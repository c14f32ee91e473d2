"""Studies of the map from one trace to its confidence, judged with gold answers afterwards.

    python benchmarks/confidence_study.py features          # features, on families that evidence.py does not report
    python benchmarks/confidence_study.py others RUN...     # whose traces count, on the probe questions of runs

The map is fitted without labels on a part of the questions and judged on the others. Each figure is ECE / Brier skill.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from rlsf_ray.algorithms import agreement, calibration
from rlsf_ray.algorithms.agreement import leave_one_out
from rlsf_ray.algorithms.answers import label_answers
from rlsf_ray.cli import exit_on_sigterm
from rlsf_ray.config_loading import load_config
from rlsf_ray.engines.build import build_engine
from rlsf_ray.evaluate import trace_features
from rlsf_ray.records import Group, ProbePrompt, Trace
from rlsf_ray.rollouts.programs import write_groups
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.sources import load_sets

ENGINE = ["engine=vllm", "engine_args={max_model_len: 1024}"]
QUESTIONS = 40
DIGIT = "min_digits: 1, max_digits: 1"
FAMILIES = {
    "chain_sum": f"min_terms: 3, max_terms: 3, {DIGIT}",
    "lcm": "min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 40",
    "leg_counting": "min_animals: 1, max_animals: 2, min_instances: 1, max_instances: 5",
    "letter_counting": "min_words: 1, max_words: 3",
    "number_sequence": "min_terms: 4, max_terms: 5, min_value: 0, max_value: 20, max_complexity: 1",
    "decimal_chain_sum": f"min_terms: 2, max_terms: 2, {DIGIT}, min_decimal_places: 1, max_decimal_places: 1",
    "count_bits": "min_n: 1, max_n: 1000",
    "calendar_arithmetic": "",
    "gsm_symbolic": "",
    "number_filtering": "",
}
SHIPPED = ("prob", "disparity", "length", "prob*disparity")
SETS = {
    "shipped": SHIPPED,
    "prob": ("prob",),
    "disparity": ("disparity",),
    "+mean": (*SHIPPED, "mean"),
    "+before": (*SHIPPED, "before"),
    "+tokens": (*SHIPPED, "tokens"),
    "+all": (*SHIPPED, "mean", "before", "least", "tokens", "start"),
}
Numbers = np.ndarray


@dataclass
class Question:
    """The answered traces of one question: what a map sees, the share it is to tell, and whether they are right."""

    rows: Numbers  # [N, F]
    shares: Numbers  # [N]
    right: Numbers  # [N]


def judged(fitted: Callable[[Numbers], Numbers], questions: Sequence[Question]) -> tuple[float, float]:
    """(ECE, Brier skill) of a confidence on the traces of these questions."""
    told = np.concatenate([fitted(one.rows) for one in questions if len(one.rows)])
    right = np.concatenate([one.right for one in questions if len(one.rows)])
    return calibration.ece(told, right), calibration.brier_skill(told, right)


def cross_judged(questions: Sequence[Question], parts: int, repeats: int, *, fit_on_one: bool) -> tuple[float, float]:
    """Mean of `judged` over splits into `parts`: fitted on one part (or on all but one), judged on the rest."""
    found = []
    for repeat in range(repeats):
        order = np.random.default_rng(repeat).permutation(len(questions))
        for part in np.array_split(order, parts):
            inside = [questions[i] for i in part if len(questions[i].rows)]
            outside = [questions[i] for i in order if i not in part and len(questions[i].rows)]
            fitting, judging = (inside, outside) if fit_on_one else (outside, inside)
            rows, shares = (np.concatenate([getattr(q, name) for q in fitting]) for name in ("rows", "shares"))
            found.append(judged(agreement.fit(rows, shares), judging))
    return tuple(np.nanmean(found, axis=0).tolist())


def right(group: Group, gold: str, checker: AnswerChecker) -> Numbers:
    return np.array([float(checker.equal(t.answer.text, gold)) for t in group.traces if t.answer])


def statistics(trace: Trace) -> dict[str, float]:
    """All that might tell something of an answered trace."""
    assert trace.answer is not None
    span = slice(*trace.answer.tokens)
    prob, disparity, length, both = trace_features(trace)
    before = trace.logprob[: max(1, span.start)]
    return {
        "prob": prob,
        "disparity": disparity,
        "length": length,
        "prob*disparity": both,
        "mean": float(trace.logprob.mean()),
        "before": float(before.mean()),
        "least": float(before.min()),
        "tokens": float(np.log(span.stop - span.start)),
        "start": span.start / len(trace.logprob),
    }


def study_features() -> None:
    """Each family: the base model's answer probability, its agreement, and maps over each set of features."""
    with closing(build_engine(load_config("rlsf", ENGINE))) as engine, AnswerChecker() as checker:
        print(
            "family".ljust(20), "right", *(name.rjust(14) for name in ("answer prob.", "agreement", *SETS)), flush=True
        )
        table = []
        for family, options in FAMILIES.items():
            source = f"[{{kind: reasoning_gym, name: {family}, count: {QUESTIONS}, options: {{{options}}}}}]"
            config = load_config("rlsf", [*ENGINE, f"data.probe={source}", "data.calibration=0"])
            probe = load_sets(config).probe
            groups = write_groups(
                engine, [p.prompt for p in probe], config=config, round=0, first_sequence=0, version=0
            )
            line = list(features_judged(groups, probe, checker))
            table.append([found for _, found in line])
            print(family.ljust(20), f"{line[0][0]:.3f}", *(f"{e:.3f} /{s:+7.2f}" for _, (e, s) in line), flush=True)
        means = np.nanmean(np.array(table), axis=0)
        print("mean".ljust(20), "     ", *(f"{e:.3f} /{s:+7.2f}" for e, s in means))


def features_judged(
    groups: Sequence[Group], probe: Sequence[ProbePrompt], checker: AnswerChecker
) -> Iterator[tuple[float, tuple[float, float]]]:
    """(accuracy of answered traces, (ECE, skill)) of the answer probability, of agreement, of each set of features."""
    judgements = [right(group, item.gold, checker) for group, item in zip(groups, probe, strict=True)]
    accuracy = float(np.concatenate(judgements).mean())
    everything = []
    for group, is_right in zip(groups, judgements, strict=True):
        labels = label_answers([trace.answer_text for trace in group.traces], checker.equal)
        share = leave_one_out(labels)[[trace.answer is not None for trace in group.traces]]
        everything.append(([statistics(t) for t in group.traces if t.answer], share, is_right))
    probs = [np.array([t.answer_prob for t in g.traces if t.answer]) for g in groups]
    for told in (probs, [share for _, share, _ in everything]):
        bare = [Question(c[:, None], c, is_right) for c, (_, _, is_right) in zip(told, everything, strict=True)]
        yield accuracy, judged(lambda rows: rows[:, 0], bare)
    for names in SETS.values():
        questions = [
            Question(np.array([[each[name] for name in names] for each in found]), share, is_right)
            for found, share, is_right in everything
        ]
        yield accuracy, cross_judged(questions, 2, 10, fit_on_one=False)


def study_others(path: str) -> None:
    """Each version of a run: maps to the share of its own, of other versions' and of both's traces that agree."""
    store = RunStore.open(path)
    config, written = store.config, dict[int, list[Group]]()
    probe = load_sets(config).probe
    with closing(build_engine(config)) as engine, AnswerChecker() as checker:
        for version in (0, *store.versions()):
            if version:
                engine.load_version(version, store.read_adapter(version)[0])
            prompts = [item.prompt for item in probe]
            written[version] = write_groups(
                engine, prompts, config=config, round=version, first_sequence=0, version=version
            )
            before = store.version_before(version)
            found = [
                "{} {:.3f} / {:+.2f}".format(name, *cross_judged(questions, 4, 5, fit_on_one=True))
                for name, questions in targets(written, version, before or 0, probe, checker).items()
            ]
            print(f"{path} version {version}: {'   '.join(found)}", flush=True)
            if version:
                engine.forget_version(version)


def targets(
    written: Mapping[int, Sequence[Group]],
    version: int,
    before: int,
    probe: Sequence[ProbePrompt],
    checker: AnswerChecker,
) -> dict[str, list[Question]]:
    """The answered traces of `version` with each share that a map could learn."""
    found: dict[str, list[Question]] = {}
    for index, item in enumerate(probe):
        group = written[version][index]
        kept = np.array([trace.answer is not None for trace in group.traces])
        if not kept.any():
            continue
        rows = np.array([trace_features(trace) for trace in group.traces if trace.answer])
        is_right = right(group, item.gold, checker)
        texts = [[trace.answer_text for trace in written[other][index].traces] for other in written]
        labels = np.array(label_answers([text for each in texts for text in each], checker.equal))
        of = dict(zip(written, np.split(labels, np.cumsum([len(each) for each in texts])[:-1]), strict=True))
        own = leave_one_out(of[version].tolist())
        share = {other: (of[version][:, None] == of[other][None, :]).mean(axis=1) for other in written}
        share[version] = own
        shares = {
            "itself": own,
            "itself and before": (own + share[before]) / 2,
            "all": np.mean(list(share.values()), axis=0),
            "before": share[before],
            "base": share[0],
        }
        for name, value in shares.items():
            found.setdefault(name, []).append(Question(rows, value[kept], is_right))
    return found


def main() -> None:
    """Entry point."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=["features", "others"])
    parser.add_argument("runs", nargs="*", help="of `others`: finished run directories")
    options = parser.parse_args()
    if options.study == "features":
        study_features()
    for run in options.runs:
        study_others(run)


if __name__ == "__main__":
    main()
