"""Judged answers of the probe set -> every metric with its interval, computed on the same traces.

Q questions of n samples each. An answer that cannot be read counts as wrong with confidence 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlsf_ray.algorithms import calibration, voting
from rlsf_ray.records import Json
from rlsf_ray.tries import MEANS, counts_of_tries, rises_of_tries

Floats = NDArray[np.float64]

CONFIDENCES = (
    "answer_prob",
    "disparity",
    "agreement",
    "calibrated",
    "voted",
    "vote_share",
)  # two: where there is a map
STATISTICS: dict[str, Callable[[Floats, Floats], float]] = {
    "ece": calibration.ece,
    "ece_mass": calibration.ece_equal_mass,
    "brier": calibration.brier,
    "brier_skill": calibration.brier_skill,
    "nll": calibration.nll,
    "auroc": calibration.auroc,
    "aurc": calibration.aurc,
    "overconfidence": calibration.overconfidence,
}
NOT_SHARES = ("mean_length", "surprisal", "transitions", *MEANS)
RESAMPLES = 500
LEVEL = 0.95


def measure(rows: Sequence[Json]) -> Json:
    """{metric: value, metric_low, metric_high}: percentile intervals over questions, drawn alike for every metric."""
    draws = np.random.default_rng(0).integers(len(rows), size=(RESAMPLES, len(rows)))
    metrics: Json = {}
    each, one = _by_question(rows), np.ones(len(rows))
    right, parsed = (
        np.array([sum(map(read, row["samples"])) for row in rows], dtype=float) for read in (_right, _parsed)
    )
    ratios = {name: (values, one) for name, values in each.items()} | {"accuracy_given_parsed": (right, parsed)}
    for name, counts in (ratios | (counts_of_tries(rows) if "episodes" in rows[0] else {})).items():
        interval = calibration.ratio_interval if name in NOT_SHARES else calibration.share_interval
        _put_interval(metrics, name, *interval(*counts, resamples=RESAMPLES))
    for name in known_confidences(rows):
        confidence, correct = confidences(rows, name)
        for kind, statistic in STATISTICS.items():
            spread = [statistic(confidence[draw].ravel(), correct[draw].ravel()) for draw in draws]
            _put(metrics, f"{kind}_{name}", statistic(confidence.ravel(), correct.ravel()), spread)
    return metrics


def known_confidences(rows: Sequence[Json]) -> list[str]:
    """The confidences that these rows hold."""
    of_samples, has_map = rows[0]["samples"][0], "calibrated" in rows[0]["samples"][0]
    return [n for n in CONFIDENCES if n == "vote_share" or n in of_samples or (n == "voted" and has_map)]


def confidences(rows: Sequence[Json], name: str) -> tuple[Floats, Floats]:
    """(confidence, correct), each [Q, n]; [Q, 1] for those of a vote, of which a question has one."""
    if name == "vote_share":
        votes = [vote(row["samples"]) for row in rows]
        return np.array([[share] for share, _ in votes]), np.array([[float(right)] for _, right in votes])
    if name == "voted":
        found = [voted(row["samples"]) for row in rows]
        return np.array([[share] for share, _ in found]), np.array([[float(right)] for _, right in found])
    samples = [row["samples"] for row in rows]
    confidence = np.array([[sample[name] for sample in many] for many in samples], dtype=float)
    return confidence, np.array([[float(sample["correct"]) for sample in many] for many in samples])


def vote(samples: Sequence[Json]) -> tuple[float, bool]:
    """(share of the commonest answer, is it right?). Ties go to the answer written first."""
    label, share = voting.majority([sample["label"] for sample in samples])
    return share, _is_right(samples, label)


def voted(samples: Sequence[Json]) -> tuple[float, bool]:
    """(confidence, is it right?) of the answer that all samples elect, as `rlsf answer` gives it."""
    labels, alone = [sample["label"] for sample in samples], [sample["calibrated"] for sample in samples]
    label, share, _ = voting.calibrated(labels, alone)
    return share, _is_right(samples, label)


def reliability(rows: Sequence[Json]) -> dict[str, list[list[float | int | None]]]:
    """{confidence: [mean confidence, accuracy, count] of each bin}."""
    found = {}
    for name in known_confidences(rows):
        confidence, correct = confidences(rows, name)
        found[name] = [list(bin_) for bin_ in calibration.reliability(confidence.ravel(), correct.ravel())]
    return found


def difference(before: Json, after: Json) -> Json:
    """Paired rises over the questions both evaluations hold: {metric: [mean, low, high]}; {} if they share none.

    Of the accuracies and, where both have written episodes, of the shares of tries.
    """
    first, last = ({row["id"]: row for row in one["questions"]} for one in (before, after))
    shared = sorted(first.keys() & last.keys())
    if not shared:
        return {}
    rows = [[found[i] for i in shared] for found in (first, last)]
    old, new = map(_by_question, rows)
    names, one = ("sampled_accuracy", "greedy_accuracy", "majority_accuracy"), np.ones(len(shared))
    rises = {name: list(calibration.share_rise((old[name], one), (new[name], one))) for name in names}
    tries = all("episodes" in row for of in rows for row in of)
    return rises | (rises_of_tries(*map(counts_of_tries, rows)) if tries else {})


def _by_question(rows: Sequence[Json]) -> dict[str, Floats]:
    """Metrics that are means over questions, [Q] each."""
    samples = [row["samples"] for row in rows]
    found: dict[str, list[float]] = {
        "greedy_accuracy": [float(row["greedy"]["correct"]) for row in rows],
        "sampled_accuracy": [_mean(map(_right, many)) for many in samples],
        "majority_accuracy": [float(vote(many)[1]) for many in samples],
        "borda_accuracy": [float(_heaviest(many, voting.borda)) for many in samples],
        "parsed": [_mean(map(_parsed, many)) for many in samples],
        "cut_off": [_mean(not sample["finished"] for sample in many) for many in samples],
        "mean_length": [_mean(sample["length"] for sample in many) for many in samples],
        "anyhow_accuracy": [_mean(sample["anyhow"] for sample in many) for many in samples],
        "transitions": [_mean(sample["transitions"] for sample in many) for many in samples],
        "surprisal": [_a_token(many) for many in samples],
    }
    if any(sample.get("unchecked") for many in samples for sample in many):  # they count as wrong
        found["unchecked"] = [_mean(sample.get("unchecked", False) for sample in many) for many in samples]
    if rows and rows[0].get("branches"):
        branches = [row["branches"] for row in rows]
        found["cot_max_accuracy"] = [float(_surest(many)) for many in branches]
        found["cot_aggregated_accuracy"] = [float(_heaviest(many, voting.weighted)) for many in branches]
    return {name: np.array(values) for name, values in found.items()}


def _a_token(samples: Sequence[Json]) -> float:
    """Mean of -log p over the tokens of all samples, in nats: an estimate of the entropy, drawn at temperature 1."""
    lengths = [sample["length"] for sample in samples]
    return float(np.average([sample["surprisal"] for sample in samples], weights=lengths)) if any(lengths) else 0.0


def _right(sample: Json) -> bool:
    return bool(sample["correct"])


def _parsed(sample: Json) -> bool:
    return sample["answer"] is not None


def _mean(values: object) -> float:
    return float(np.mean(list(values)))  # type: ignore[call-overload]


def _heaviest(samples: Sequence[Json], rule: Callable[..., tuple[int, float]]) -> bool:
    """Is the answer right that `rule` elects, each trace weighed by the disparity over its answer?"""
    label, _ = rule([sample["label"] for sample in samples], [sample["disparity"] for sample in samples])
    return _is_right(samples, label)


def _surest(samples: Sequence[Json]) -> bool:
    """CoT-decoding, max: is the answer right whose disparity is largest (2402.10200, section 2.2)?"""
    return bool(max(samples, key=lambda sample: sample["disparity"])["correct"])


def _is_right(samples: Sequence[Json], label: int) -> bool:
    return label >= 0 and next(bool(sample["correct"]) for sample in samples if sample["label"] == label)


def _put(metrics: Json, name: str, value: float, drawn: Sequence[float] | Floats) -> None:
    metrics[name] = value
    tail = (1.0 - LEVEL) / 2.0
    known = np.asarray(drawn)[~np.isnan(drawn)]
    if len(known):
        metrics[f"{name}_low"], metrics[f"{name}_high"] = (float(q) for q in np.quantile(known, [tail, 1.0 - tail]))


def _put_interval(metrics: Json, name: str, value: float, low: float, high: float) -> None:
    metrics[name] = value
    if not np.isnan(value):  # it is of something
        metrics[f"{name}_low"], metrics[f"{name}_high"] = low, high
