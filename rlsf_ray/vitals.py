"""How a version writes, told without labels: groups of the calibration prompts -> the guard's vitals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from rlsf_ray.algorithms import voting
from rlsf_ray.algorithms.agreement import leave_one_out
from rlsf_ray.algorithms.answers import normalise
from rlsf_ray.records import Group, IntArray, Json, TrainingGroup
from rlsf_ray.stream.guard import Vitals

GRAM = 4
SETTLED = 0.75  # share of the traces with the voted answer


def take_vitals(
    groups: Sequence[Group], labels: Sequence[Sequence[int]], answers: Mapping[str, Sequence[str | None]]
) -> Vitals:
    """Means over all traces of `groups`, which must not be empty; `labels` as `label_answers` gives them, by group.

    `answers`: by prompt, the texts under which the guard compares a vote with that of the version before.
    """
    traces = [trace for group in groups for trace in group.traces]
    votes, settled, distinct, shares = [], {}, [], list[float]()
    same = both = 0  # pairs of answered traces of a prompt, in order: with one answer, and all of them
    for group, classes in zip(groups, labels, strict=True):
        winner, share = voting.majority(classes)
        if winner >= 0:
            votes.append(normalise(str(answers[group.prompt.id][classes.index(winner)])))
            if share >= SETTLED:
                settled[group.prompt.id] = votes[-1]
        distinct.append(len(set(classes) - {-1}))
        shares += leave_one_out(classes).tolist()
        counts = Counter(label for label in classes if label >= 0)
        same += sum(count * (count - 1) for count in counts.values())
        both += counts.total() * (counts.total() - 1)
    commonest = Counter(votes).most_common(1)
    probs = [trace.answer_prob for trace in traces if trace.answer]
    return Vitals(
        agreement=float(np.mean(shares)),
        answer_prob=float(np.mean(probs)) if probs else 0.0,
        commonest=commonest[0][1] / len(groups) if commonest else 0.0,
        distinct=float(np.mean(distinct)),
        surprisal=float(-np.concatenate([trace.logprob for trace in traces]).mean()),
        length=float(np.mean([len(trace.token_ids) for trace in traces])),
        repetition=float(np.mean([repetition(trace.token_ids) for trace in traces])),
        parsed=float(np.mean([trace.answer is not None for trace in traces])),
        cut_off=float(np.mean([not trace.finished for trace in traces])),
        votes=settled,
        prompts=len(groups),
        agreed=same / both if both else math.nan,
    )


def training_vitals(groups: Sequence[TrainingGroup], logprob_gap: float) -> Json:
    """{"kl", "logprob_gap"} of a round: what was drawn from the policy tells its KL divergence from the base model.

    The mean of log p(policy) - log p(base) over the tokens written, in nats; `logprob_gap` is of the first step.
    """
    traces = [trace for group in groups for trace in group.traces]
    ratios = [(trace.logprob - trace.reference_logprob)[trace.learned] for trace in traces]
    return {"kl": float(np.concatenate(ratios).mean(dtype=np.float64)), "logprob_gap": logprob_gap}


def repetition(token_ids: IntArray) -> float:
    """Share of the 4-grams of a trace that stood in it before; 0 for a trace of fewer tokens."""
    grams = [tuple(token_ids[i : i + GRAM]) for i in range(len(token_ids) - GRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
