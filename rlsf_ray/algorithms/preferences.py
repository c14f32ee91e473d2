"""Pair rules: the scored traces of one group -> preference pairs, or the one named reason why there are none.

K traces of a group. A rule is a chain of hurdles; its reason names the hurdle that removed the last candidates:

    all_cut_off        every trace (reversed: every trace to be chosen) hit the token limit
    no_answers         no finished trace has an answer
    one_answer         all traces agree, and pairs within an answer are off
    all_answered       (format_only) every trace has an answer
    tie                the scores prefer nothing
    below_min_chosen   no trace (voted: no answer) is sure enough to be chosen
    gap_too_small      the two scores of each pair are too close
    length_ratio       the two lengths of each pair are too far apart

A trace that was cut off has no answer and is never chosen. It may be rejected: an absent score (nan) ranks lowest and
counts 0 in a gap. Where scores are those of checks, traces whose check could not be made do not come to the rule, and a
group of such traces alone has the reason `check_failed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlsf_ray.algorithms import voting

PairRow = tuple[int, int, float, float]  # chosen, rejected, weight, margin


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The traces of one group: score (nan: absent), answer class (-1: none), length in tokens, finished; all [K]."""

    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64]
    finished: NDArray[np.bool_]

    def __post_init__(self) -> None:
        sizes = [len(self.scores), len(self.labels), len(self.lengths), len(self.finished)]
        if len(set(sizes)) != 1:
            raise ValueError(f"scores, labels, lengths, finished must have one length, got {sizes}")

    @property
    def answers(self) -> NDArray[np.int64]:
        """Answer classes [K] with -1 for traces that were cut off."""
        return np.where(self.finished, self.labels, -1)

    @property
    def ranks(self) -> NDArray[np.float64]:
        """Scores [K] to rank by: absent is lowest."""
        return np.nan_to_num(self.scores, nan=-np.inf)

    def gap(self, chosen: int, rejected: int) -> float:
        """Score of `chosen` minus score of `rejected`; absent counts 0."""
        filled = np.nan_to_num(self.scores, nan=0.0)
        return float(filled[chosen] - filled[rejected])


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Numbers of a pair rule. `min_chosen` and `min_gap` of 0, and None elsewhere, set no limit."""

    max_pairs: int | None = None
    min_chosen: float = 0.0
    min_gap: float = 0.0
    same_answer: bool = False
    max_length_ratio: float | None = None
    weight: Literal["one", "gap", "exp_gap"] = "one"


@dataclass(frozen=True, slots=True)
class Decision:
    """Pairs of (chosen, rejected, weight, margin), or the reason why there are none.

    `sure`: the score of the surest chosen trace (voted: the weight of the answer), by which prompts are compared.
    """

    pairs: tuple[PairRow, ...] = ()
    reason: str | None = None
    sure: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.pairs) == (self.reason is not None):
            raise ValueError(f"a decision needs either pairs or a reason, got {self.pairs} and {self.reason}")


Rule = Callable[[Candidates, Limits, np.random.Generator], Decision]


def best_worst(candidates: Candidates, limits: Limits, rng: np.random.Generator) -> Decision:
    """One pair: the best-scored trace over the worst one with another answer. RLSF 2507.21931, our reading of 1.2."""
    answers, ranks = candidates.answers, candidates.ranks
    able = _able(candidates)
    if not len(able):
        return _unanswered(candidates)
    best = int(able[np.argmax(ranks[able])])
    if _below(float(ranks[best]), limits.min_chosen):
        return Decision(reason="below_min_chosen")
    others = [j for j in range(len(ranks)) if j != best and (limits.same_answer or answers[j] != answers[best])]
    if not others:
        return Decision(reason="one_answer")
    worst = min(others, key=lambda j: ranks[j])
    if ranks[worst] >= ranks[best]:
        return Decision(reason="tie")
    return _within_limits([(best, worst)], candidates, limits, sure=float(ranks[best]))


def all_above(candidates: Candidates, limits: Limits, rng: np.random.Generator) -> Decision:
    """Every ordered pair with a sure chosen trace and a lower score; widest gap first where a cap cuts.

    The rule of the RLSF authors' code: min_chosen 0.9, same answers allowed, no cap. There a trace whose answer is
    not found keeps the score 0, so it can only be rejected; so it is here.
    """
    answers, ranks = candidates.answers, candidates.ranks
    able = _able(candidates)
    if not len(able):
        return _unanswered(candidates)
    sure = [int(i) for i in able if not _below(float(ranks[i]), limits.min_chosen)]
    if not sure:
        return Decision(reason="below_min_chosen")
    pairs = [
        (i, j) for i in sure for j in range(len(ranks)) if i != j and (limits.same_answer or answers[i] != answers[j])
    ]
    if not pairs:
        return Decision(reason="one_answer")
    pairs = [(i, j) for i, j in pairs if ranks[i] > ranks[j]]
    if not pairs:
        return Decision(reason="tie")
    pairs.sort(key=lambda pair: -candidates.gap(*pair))
    return _within_limits(pairs[: limits.max_pairs], candidates, limits, sure=float(ranks[sure].max()))


def voted(candidates: Candidates, limits: Limits, rng: np.random.Generator) -> Decision:
    """Traces of the heaviest answer, surest first, over all others, least sure first; each trace at most once.

    An answer weighs the sum of its traces' scores, so the signal must not be negative; `min_chosen` holds for that
    sum. The aggregation is CoT-decoding's (2402.10200); the pairs are this project's.
    """
    sides = _vote_sides(candidates, limits)
    if isinstance(sides, Decision):
        return sides
    winners, others, weight = sides
    pairs = _matched(winners, others, candidates.lengths, limits.max_length_ratio)
    if not pairs:
        return Decision(reason="length_ratio")
    return _within_limits(pairs[: limits.max_pairs], candidates, limits, sure=weight)


def reversed_voted(candidates: Candidates, limits: Limits, rng: np.random.Generator) -> Decision:
    """Control: `voted` with chosen and rejected swapped and its margins negated, but no cut-off trace is chosen."""
    sides = _vote_sides(candidates, limits)
    if isinstance(sides, Decision):
        return sides
    winners, others, weight = sides
    complete = [j for j in others if candidates.finished[j]]
    if not complete:
        return Decision(reason="all_cut_off")
    pairs = list(zip(winners, complete, strict=False))
    voted_way = _within_limits(pairs[: limits.max_pairs], candidates, limits, sure=weight)
    swapped = tuple((j, i, weight, 0.0 - margin) for i, j, weight, margin in voted_way.pairs)
    return Decision(swapped, voted_way.reason, weight)


def final_over_first(candidates: Candidates, limits: Limits, rng: np.random.Generator) -> Decision:
    """Every second trace, a refined answer, over the one before it, its draft, where it scores higher.

    For the rollout `refine`: EVOLVE 2502.05605.
    """
    answers, ranks = candidates.answers, candidates.ranks
    both = [(j + 1, j) for j in range(0, len(answers) - 1, 2) if answers[j + 1] >= 0]
    if not both:
        return _unanswered(candidates)
    changed = [(i, j) for i, j in both if limits.same_answer or answers[i] != answers[j]]
    if not changed:
        return Decision(reason="one_answer")
    better = [(i, j) for i, j in changed if ranks[i] > ranks[j] and not _below(float(ranks[i]), limits.min_chosen)]
    if not better:
        return Decision(reason="tie")
    better.sort(key=lambda pair: -candidates.gap(*pair))
    sure = float(max(ranks[i] for i, _ in better))
    return _within_limits(better[: limits.max_pairs], candidates, limits, sure=sure)


def random_pairs(candidates: Candidates, limits: Limits, rng: np.random.Generator) -> Decision:
    """Control: distinct pairs in a random direction, whatever the scores; one pair where there is no cap.

    Only a finished trace may be chosen. Every weight is 1, and limits on scores do not apply.
    """
    answers, lengths = candidates.answers, candidates.lengths
    if not (answers >= 0).any():
        return _unanswered(candidates)
    able, size = np.flatnonzero(candidates.finished), len(answers)
    pairs = [
        (int(i), j) for i in able for j in range(size) if i != j and (limits.same_answer or answers[i] != answers[j])
    ]
    if not pairs:
        return Decision(reason="one_answer")
    pairs = [pair for pair in pairs if _similar_lengths(lengths[list(pair)], limits.max_length_ratio)]
    if not pairs:
        return Decision(reason="length_ratio")
    drawn: dict[frozenset[int], PairRow] = {}
    for k in rng.permutation(len(pairs)):
        drawn.setdefault(frozenset(pairs[k]), (*pairs[k], 1.0, candidates.gap(*pairs[k])))
    return Decision(tuple(drawn.values())[: limits.max_pairs or 1])


def format_only(candidates: Candidates, limits: Limits, rng: np.random.Generator) -> Decision:
    """Control: traces with an answer over traces without one, in a random order; scores count for nothing."""
    has_answer = candidates.answers >= 0
    answered, silent = rng.permutation(np.flatnonzero(has_answer)), rng.permutation(np.flatnonzero(~has_answer))
    if not len(answered):
        return _unanswered(candidates)
    if not len(silent):
        return Decision(reason="all_answered")
    pairs = [(int(i), int(j)) for i, j in zip(answered, silent, strict=False)][: limits.max_pairs]
    lengths = candidates.lengths
    kept = [pair for pair in pairs if _similar_lengths(lengths[list(pair)], limits.max_length_ratio)]
    rows = tuple((i, j, 1.0, candidates.gap(i, j)) for i, j in kept)
    return Decision(rows) if rows else Decision(reason="length_ratio")


RULES: dict[str, Rule] = {
    "best_worst": best_worst,
    "all_above": all_above,
    "voted": voted,
    "random": random_pairs,
    "reversed": reversed_voted,
    "format_only": format_only,
    "final_over_first": final_over_first,
}


def _matched(
    winners: list[int], others: list[int], lengths: NDArray[np.int64], max_ratio: float | None
) -> list[tuple[int, int]]:
    """Each winner with the first of the others that is left and of similar length; each trace at most once."""
    pairs, left = [], list(others)
    for i in winners:
        fit = next((j for j in left if _similar_lengths(lengths[[i, j]], max_ratio)), None)
        if fit is not None:
            left.remove(fit)
            pairs.append((i, fit))
    return pairs


def _vote_sides(candidates: Candidates, limits: Limits) -> Decision | tuple[list[int], list[int], float]:
    """(traces of the winning answer, all others, both in order of use; its weight), or the reason against a vote."""
    answers, ranks = candidates.answers, candidates.ranks
    sums = voting.tally(answers, candidates.scores)
    if not sums:
        return _unanswered(candidates)
    winner = max(sums, key=lambda label: sums[label])
    if sum(math.isclose(weight, sums[winner]) for weight in sums.values()) > 1:
        return Decision(reason="tie")
    if _below(sums[winner], limits.min_chosen):
        return Decision(reason="below_min_chosen")
    if (answers == winner).all():
        return Decision(reason="one_answer")
    rising = [int(i) for i in np.argsort(ranks, kind="stable")]
    falling = [int(i) for i in np.argsort(-ranks, kind="stable")]
    others = [j for j in rising if answers[j] != winner]
    return [i for i in falling if answers[i] == winner], others, sums[winner]


def _within_limits(
    pairs: Iterable[tuple[int, int]], candidates: Candidates, limits: Limits, *, sure: float
) -> Decision:
    """Give each pair its margin and weight; keep the pairs with gap enough and similar lengths."""
    rows = [(i, j, _weight(candidates.gap(i, j), limits.weight), candidates.gap(i, j)) for i, j in pairs]
    rows = [row for row in rows if row[2] > 0.0 and not _below(row[3], limits.min_gap)]
    if not rows:
        return Decision(reason="gap_too_small")
    lengths = candidates.lengths
    rows = [row for row in rows if _similar_lengths(lengths[[row[0], row[1]]], limits.max_length_ratio)]
    return Decision(tuple(rows), sure=sure) if rows else Decision(reason="length_ratio")


def _weight(gap: float, kind: str) -> float:
    if kind == "exp_gap":
        return math.exp(gap)
    return gap if kind == "gap" else 1.0


def _below(value: float, least: float) -> bool:
    return least > 0.0 and value < least


def _similar_lengths(lengths: NDArray[np.int64], max_ratio: float | None) -> bool:
    return max_ratio is None or bool(lengths.max() <= max_ratio * lengths.min())


def _able(candidates: Candidates) -> NDArray[np.int64]:
    """Traces that may be chosen by score: finished, answered and scored."""
    return np.flatnonzero((candidates.answers >= 0) & ~np.isnan(candidates.scores))


def _unanswered(candidates: Candidates) -> Decision:
    return Decision(reason="no_answers" if candidates.finished.any() else "all_cut_off")
