"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlsf_ray.algorithms.advantages import RULES, TINY, Credit, credit

ALL = np.ones(4, dtype=bool)


def advantages(rule: str, *scores: float) -> Credit:
    return credit(np.array(scores), np.ones(len(scores), dtype=bool), RULES[rule])


def test_group_norm_is_in_standard_deviations_of_the_sample() -> None:
    # 1, 1, 1, 5: mean 2, sample variance (1 + 1 + 1 + 9) / 3 = 4
    found = advantages("group_norm", 1.0, 1.0, 1.0, 5.0)
    assert found.advantages == pytest.approx([-1 / (2 + TINY)] * 3 + [3 / (2 + TINY)])


def test_leave_one_out_is_the_distance_from_the_others_mean() -> None:
    # the others' means: (1 + 1 + 5) / 3 = 7/3 for a 1, and 1 for the 5
    found = advantages("leave_one_out", 1.0, 1.0, 1.0, 5.0)
    assert found.advantages == pytest.approx([1 - 7 / 3] * 3 + [4.0])


@pytest.mark.parametrize("rule", RULES)
def test_absent_scores_take_no_part(rule: str) -> None:
    found = advantages(rule, 1.0, math.nan, 3.0)
    assert math.isnan(found.advantages[1])
    assert [found.advantages[0], found.advantages[2]] == pytest.approx(list(advantages(rule, 1.0, 3.0).advantages))
    assert np.nansum(found.advantages) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("scores", "finished", "reason"),
    [
        ([math.nan, math.nan], [False, False], "all_cut_off"),
        ([math.nan, 1.0], [True, True], "too_few_scores"),
        ([math.nan, math.nan], [True, True], "too_few_scores"),  # majority: a tie
        ([0.5, 0.5, math.nan], [True, True, False], "equal_scores"),
    ],
)
def test_a_group_that_says_nothing_has_one_reason(scores: list[float], finished: list[bool], reason: str) -> None:
    found = credit(np.array(scores), np.array(finished), RULES["group_norm"])
    assert found == Credit(reason=reason)
