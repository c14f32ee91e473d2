"""What further tries are worth: whole episodes of the probe set, judged turn by turn, and the shares told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rlsf_ray.algorithms.answers import ANSWERING, label_answers
from rlsf_ray.algorithms.calibration import ratio_rise, share_rise
from rlsf_ray.records import Group, Json, ProbePrompt
from rlsf_ray.tasks.checks import equality, is_right
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.vitals import repetition

Counts = tuple[NDArray[np.float64], NDArray[np.float64]]  # (counts [Q], of how many [Q])
MEANS = ("thought_length", "thought_repetition")  # the others are shares


def judge_episodes(group: Group, item: ProbePrompt, checker: AnswerChecker) -> list[list[Json]]:
    """The turns of each episode; `right` is None for those that do not answer the prompt or could not be checked.

    `label` numbers the distinct answers of all episodes (-1: no answer).
    """
    answers = [turn.answer if turn.role in ANSWERING else None for trace in group.traces for turn in trace.turns]
    labels = iter(label_answers(answers, equality(item.prompt, checker)))
    return [
        [
            {
                "role": turn.role,
                "text": turn.text,
                "answer": turn.answer,
                "label": next(labels),
                "right": is_right(turn.answer, item, checker) if turn.role in ANSWERING else None,
                "length": turn.tokens[1] - turn.tokens[0],
                "repetition": repetition(trace.token_ids[slice(*turn.tokens)]),
            }
            for turn in trace.turns
        ]
        for trace in group.traces
    ]


def counts_of_tries(rows: Sequence[Json]) -> dict[str, Counts]:
    """{metric: (counts [Q], of how many [Q])}: a share is the sum of the one over the sum of the other.

    `wrong_to_right` is of episodes that went on after a wrong first answer (pass on the second try given failure),
    `right_to_wrong` of those that went on after a right one; `voted_tries`: is the commonest last answer right?
    `thought_` is of all turns that are no answer; `unchecked_tries`: episodes with a try that could not be checked,
    which stand in no other share of tries (in the accuracies of single answers they count as wrong).
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, pair in _of_question(row["episodes"]).items():
            found.setdefault(name, []).append(pair)
    columns = {name: np.array(pairs, dtype=float).T for name, pairs in found.items()}
    return {name: (part, whole) for name, (part, whole) in columns.items()}


def rises_of_tries(before: Mapping[str, Counts], after: Mapping[str, Counts]) -> Json:
    """Paired rises of the counts of the same questions: {metric: [rise, low, high]}, without those of nothing."""
    shared = [name for name in before if name in after and np.any(before[name][1]) and np.any(after[name][1])]
    return {name: list((ratio_rise if name in MEANS else share_rise)(before[name], after[name])) for name in shared}


def _of_question(episodes: Sequence[Sequence[Json]]) -> dict[str, tuple[float, float]]:
    answered = [[turn for turn in turns if turn["role"] in ANSWERING] for turns in episodes]
    answered = [turns for turns in answered if turns]  # a program of one's own may have other roles
    whole = len(answered)
    answered = [turns for turns in answered if all(turn["right"] is not None for turn in turns)]
    tries = [[bool(turn["right"]) for turn in turns] for turns in answered]
    again = [one for one in tries if len(one) > 1]
    failed, passed = [one for one in again if not one[0]], [one for one in again if one[0]]
    thoughts = [turn for turns in episodes for turn in turns if turn["role"] not in ANSWERING]
    return {
        "first_try": (sum(one[0] for one in tries), len(tries)),
        "last_try": (sum(one[-1] for one in tries), len(tries)),
        "voted_tries": (_voted([turns[-1] for turns in answered]), min(1, len(answered))),
        "unchecked_tries": (whole - len(answered), whole),
        "wrong_to_right": (sum(one[-1] for one in failed), len(failed)),
        "right_to_wrong": (sum(not one[-1] for one in passed), len(passed)),
        "thought_length": (sum(turn["length"] for turn in thoughts), len(thoughts)),
        "thought_repetition": (sum(turn["repetition"] for turn in thoughts), len(thoughts)),
    }


def _voted(lasts: Sequence[Json]) -> bool:
    """Is the commonest answer right? Of equally common ones the first counts."""
    given = [turn for turn in lasts if turn["answer"] is not None]
    labels = [turn["label"] for turn in given]
    if not labels:
        return False
    winner, _ = Counter(labels).most_common(1)[0]
    return bool(given[labels.index(winner)]["right"])
