"""Advantage rules: the scores of one group -> an advantage for each trace, or the one named reason why there is none.

K traces of a group. An absent score (nan) gets an absent advantage: that trace takes no part. Reasons:

    all_cut_off      every trace hit the token limit
    too_few_scores   fewer than two traces have a score (majority: no vote)
    equal_scores     all scores are the same: the group says nothing

A rollout of several turns may leave one trace, from which there is nothing to learn (engines/scorer.py):

    passed_at_once   the first answer passed its check, and no further turn was needed
    check_failed     the check of the first answer could not be made
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
TINY = 1e-4  # added to the standard deviation, as TRL does


@dataclass(frozen=True, slots=True)
class Credit:
    """Advantages [K] (nan: absent), or the reason why there are none."""

    advantages: tuple[float, ...] = ()
    reason: str | None = None

    def __post_init__(self) -> None:
        if bool(self.advantages) == (self.reason is not None):
            raise ValueError(f"needs either advantages or a reason, got {self.advantages} and {self.reason}")


Rule = Callable[[Scores], Scores]


def group_norm(scores: Scores) -> Scores:
    """Distance from the group's mean in standard deviations (of a sample, K - 1). GRPO 2402.03300."""
    return (scores - scores.mean()) / (scores.std(ddof=1) + TINY)


def leave_one_out(scores: Scores) -> Scores:
    """Score less the mean of the other traces' scores. RLOO 2402.14740; Dr. GRPO 2503.20783 up to (K - 1) / K."""
    return (scores - scores.mean()) * (len(scores) / (len(scores) - 1))


RULES: dict[str, Rule] = {"group_norm": group_norm, "leave_one_out": leave_one_out}


def credit(scores: Scores, finished: NDArray[np.bool_], rule: Rule) -> Credit:
    """The advantages of a group's traces by `rule`, which sees the scores that are there."""
    if not finished.any():
        return Credit(reason="all_cut_off")
    scored = ~np.isnan(scores)
    if scored.sum() < 2:
        return Credit(reason="too_few_scores")
    if np.ptp(scores[scored]) == 0.0:
        return Credit(reason="equal_scores")
    advantages = np.full(len(scores), np.nan)
    advantages[scored] = rule(scores[scored])
    return Credit(tuple(advantages.tolist()))
