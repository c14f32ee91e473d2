"""Calibration metrics against scikit-learn, tables worked out by hand, and their symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss, precision_recall_curve, roc_auc_score

from rlsf_ray.algorithms.calibration import (
    aurc,
    auroc,
    brier,
    brier_skill,
    ece,
    ece_equal_mass,
    fit_temperature,
    nll,
    overconfidence,
    ratio_interval,
    ratio_rise,
    reliability,
    scale,
    share_interval,
    share_rise,
)

# Six answers. Bins: [0, .1) holds 0.0 wrong; [.3, .4) 0.3 right; [.9, 1] 0.9 right, 0.9 wrong, 1.0 right, 1.0 right
CONFIDENCE = [0.0, 0.3, 0.9, 0.9, 1.0, 1.0]
CORRECT = [0, 1, 1, 0, 1, 1]

samples = st.lists(st.tuples(st.integers(0, 100).map(lambda n: n / 100), st.booleans()), min_size=1, max_size=30)


def drawn(size: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=size).round(2)  # with ties
    return confidence, (rng.uniform(size=size) < confidence**2).astype(float)


def test_ece_by_hand() -> None:
    # (|0 - 0| + |1 - 0.3| + |3 - 3.8|) / 6 = (0.7 + 0.8) / 6
    assert ece(CONFIDENCE, CORRECT) == pytest.approx(0.25)


def test_bins_hold_their_lower_edge_and_the_last_one_holds_certainty() -> None:
    counts = [row[2] for row in reliability([b / 10 for b in range(11)], [1] * 11)]
    assert counts == [1] * 9 + [2]


def test_reliability_by_hand_with_nothing_in_empty_bins() -> None:
    rows = reliability(CONFIDENCE, CORRECT)
    assert rows[0] == (0.0, 0.0, 1)
    assert rows[3] == (0.3, 1.0, 1)
    assert rows[9] == (pytest.approx(0.95), 0.75, 4)
    assert [rows[b] for b in (1, 2, 4, 5, 6, 7, 8)] == [(None, None, 0)] * 7


def test_reliability_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)  # no confidence on an edge, where scikit-learn's bins differ
    confidence, correct = rng.uniform(size=300), rng.integers(0, 2, size=300)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=10)
    rows = reliability(confidence, correct)
    np.testing.assert_allclose([row[0] for row in rows], mean)
    np.testing.assert_allclose([row[1] for row in rows], accuracy)


def test_equal_mass_ece_by_hand() -> None:
    # three bins of two: (0.0 wrong, 0.3 right), (0.9 right, 0.9 wrong), (1.0 right, 1.0 right)
    # (|1 - 0.3| + |1 - 1.8| + |2 - 2|) / 6
    assert ece_equal_mass(CONFIDENCE, CORRECT, bins=3) == pytest.approx(0.25)
    # two bins of three cut through the tie at 0.9, whose accuracy is shared: (|1.5 - 1.2| + |2.5 - 2.9|) / 6
    assert ece_equal_mass(CONFIDENCE, CORRECT, bins=2) == pytest.approx(0.7 / 6)


def test_brier_nll_and_auroc_agree_with_scikit_learn() -> None:
    confidence, correct = drawn()
    assert brier(confidence, correct) == pytest.approx(brier_score_loss(correct, confidence))
    clipped = np.clip(confidence, 1e-6, 1 - 1e-6)
    assert nll(confidence, correct) == pytest.approx(log_loss(correct, clipped))
    assert auroc(confidence, correct) == pytest.approx(roc_auc_score(correct, confidence))


def test_auroc_counts_ties_half_and_is_nan_for_one_class() -> None:
    # right 0.5, 0.9; wrong 0.5, 0.1: half + one + one + one of four
    assert auroc([0.5, 0.9, 0.5, 0.1], [1, 1, 0, 0]) == 0.875
    assert math.isnan(auroc([0.1, 0.2], [1, 1]))
    assert math.isnan(auroc([0.1, 0.2], [0, 0]))


def test_risk_coverage_by_hand_with_ties_shared() -> None:
    # surest first: 1.0 right, 1.0 right, then 0.9 right and 0.9 wrong (half each), 0.3 right, 0.0 wrong:
    # errors so far 0, 0, .5, 1, 1, 2 of 1, 2, 3, 4, 5, 6
    expected = (0 + 0 + 0.5 / 3 + 1 / 4 + 1 / 5 + 2 / 6) / 6
    assert aurc(CONFIDENCE, CORRECT) == pytest.approx(expected)


def test_risk_coverage_of_distinct_confidences_is_the_mean_of_scikit_learn_precisions() -> None:
    """The share of right answers among the k surest is the precision of calling these right."""
    rng = np.random.default_rng(5)
    confidence, correct = rng.uniform(size=100), rng.integers(0, 2, size=100)
    precision, _, _ = precision_recall_curve(correct, confidence, drop_intermediate=False)
    # its thresholds are the 100 confidences; the last point (recall 0) is by convention
    assert aurc(confidence, correct) == pytest.approx(1 - np.mean(precision[:-1]))


def test_brier_skill_is_measured_against_the_accuracy_itself() -> None:
    assert brier_skill([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0.0)
    assert brier_skill([1.0, 1.0, 1.0, 0.0], [1, 1, 1, 0]) == 1.0
    assert brier_skill([0.0] * 4, [1, 1, 1, 0]) == pytest.approx(1 - 0.75 / 0.1875)
    assert math.isnan(brier_skill([0.3], [1]))


def test_a_temperature_fitted_with_labels_undoes_a_known_one() -> None:
    rng = np.random.default_rng(3)
    true = rng.uniform(0.02, 0.98, size=4000)
    correct = (rng.uniform(size=4000) < true).astype(int)
    sharpened = scale(true, 1 / 2.5)
    assert fit_temperature(sharpened, correct) == pytest.approx(2.5, rel=0.1)
    assert scale([0.0, 0.5, 1.0], 3.0).tolist() == [0.0, 0.5, 1.0]


def test_overconfidence_is_signed() -> None:
    assert overconfidence([0.9, 0.7], [1, 0]) == pytest.approx(0.3)
    assert overconfidence([0.1, 0.3], [1, 0]) == pytest.approx(-0.3)


@given(samples)
def test_auroc_does_not_change_under_a_rising_map(rows: list[tuple[float, bool]]) -> None:
    confidence, correct = zip(*rows, strict=True)
    mapped = [c**3 / 2 for c in confidence]
    np.testing.assert_allclose(auroc(mapped, correct), auroc(confidence, correct))


@given(samples, st.randoms(use_true_random=False))
def test_metrics_lie_in_their_range_and_ignore_the_order(rows: list[tuple[float, bool]], random: Random) -> None:
    confidence, correct = zip(*rows, strict=True)
    shuffled = list(rows)
    random.shuffle(shuffled)
    for metric in (ece, ece_equal_mass, brier, aurc):
        value = metric(confidence, correct)
        assert 0.0 <= value <= 1.0
        assert metric(*zip(*shuffled, strict=True)) == pytest.approx(value, abs=1e-12)
    assert ece(confidence, correct) >= abs(overconfidence(confidence, correct)) - 1e-12


@pytest.mark.parametrize(
    "metric", [ece, ece_equal_mass, brier, brier_skill, nll, auroc, aurc, reliability, overconfidence]
)
def test_bad_input_is_named(metric: Callable[[list[float], list[int]], object]) -> None:
    for confidence, correct, message in (
        ([], [], "not empty"),
        ([0.5], [1, 0], "one length"),
        ([1.5], [1], "must lie in"),
        ([math.nan], [1], "must lie in"),
        ([0.5], [2], "0 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            metric(confidence, correct)


def test_bootstrap_draws_questions_not_samples() -> None:
    # Two questions, all samples alike within each: a draw of two gives a mean of 0, 0.5 or 1 (1/4, 1/2, 1/4).
    assert ratio_interval([0, 100], [100, 100]) == (0.5, 0.0, 1.0)
    # Without a difference between questions there is no width.
    assert ratio_interval([1] * 5, [2] * 5) == (0.5, 0.5, 0.5)


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    # 400 questions, half 0 and half 1: standard error 0.5 / 20 = 0.025, so 0.5 -+ 1.96 * 0.025 = 0.451, 0.549
    part, whole = np.arange(400) % 2, np.ones(400)
    estimate, low, high = ratio_interval(part, whole)
    assert estimate == 0.5
    assert (low, high) == (pytest.approx(0.451, abs=0.006), pytest.approx(0.549, abs=0.006))
    assert ratio_interval(part, whole) == (estimate, low, high)  # same seed


def test_a_share_of_none_or_all_has_wilson_s_interval_over_questions() -> None:
    """0 of 20 questions: z^2 / (20 + z^2) with z = 1.96, whatever the number of samples; 5 of 20 is bootstrapped."""
    away = 3.8415 / 23.8415
    assert share_interval([0] * 20, [4] * 20) == pytest.approx((0.0, 0.0, away), abs=1e-4)
    assert share_interval([4] * 20, [4] * 20) == pytest.approx((1.0, 1 - away, 1.0), abs=1e-4)
    assert share_interval([0] * 25, [4] * 20 + [0] * 5)[2] == pytest.approx(away, abs=1e-4)  # five say nothing
    some = [[0] * 15 + [4] * 5, [4] * 20]
    assert share_interval(*some) == ratio_interval(*some)
    assert np.isnan(share_interval([0, 0], [0, 0])).all()


def test_the_rise_of_a_share_is_paired() -> None:
    """Each question gains one of four: the rise is sure, though either share alone is not."""
    before, whole = np.random.default_rng(0).integers(0, 3, 30), np.full(30, 4)
    assert share_rise((before, whole), (before + 1, whole)) == pytest.approx((0.25, 0.25, 0.25))
    rise, low, high = share_rise((before, whole), (before[::-1], whole))
    assert rise == 0.0
    assert low < -0.05 < 0.05 < high


def test_the_rise_from_none_is_as_wide_as_both_shares_allow() -> None:
    none, some, whole = [0] * 20, [0] * 10 + [4] * 10, [4] * 20
    away = 3.8415 / 23.8415
    assert share_rise((none, whole), (none, whole)) == pytest.approx((0.0, -away, away), abs=1e-4)
    share, low, high = share_interval(some, whole)
    rise = share_rise((none, whole), (some, whole))
    assert rise == pytest.approx((0.5, 0.5 - np.hypot(share - low, away), high), abs=1e-4)
    assert np.isnan(ratio_rise(([0], [0]), ([1], [4]))).all()
