"""The map from one trace to its agreement: the fit against scikit-learn, and what it must not depend on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rlsf_ray.algorithms import agreement
from rlsf_ray.algorithms.agreement import AgreementMap, fit, leave_one_out, over_two_versions


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features, and 0/1 agreement that follows two of them."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(count, 4)) * [3.0, 1.0, 0.2, 5.0] + [1.0, 0.0, 4.0, 2.0]
    chance = 1 / (1 + np.exp(-(rows[:, 0] - 0.5 * rows[:, 3])))
    return rows, (draw.random(count) < chance).astype(float)


def test_the_fit_is_that_of_scikit_learn() -> None:
    """For 0/1 targets: the same penalty on standardised features, C = 1."""
    rows, target = drawn(300)
    ours = fit(rows, target)
    standard = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(standard, target)
    assert np.allclose(ours.weights[:-1], theirs.coef_[0], atol=2e-3)
    assert np.allclose(ours(rows), theirs.predict_proba(standard)[:, 1], atol=2e-3)


def test_shares_are_soft_labels() -> None:
    """A share of 1/4 weighs like one agreement and three disagreements of the same trace."""
    rows, _ = drawn(80)
    share = np.random.default_rng(1).integers(0, 5, size=80) / 4
    repeated = np.repeat(rows, 4, axis=0)
    hard = np.array([float(k < 4 * s) for s in share for k in range(4)])
    theirs = LogisticRegression(C=0.25, tol=1e-10, max_iter=1000).fit(
        (repeated - rows.mean(axis=0)) / rows.std(axis=0), hard
    )
    assert np.allclose(np.array(fit(rows, share).weights[:-1]), theirs.coef_[0], atol=5e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_agreements_that_are_all_alike_give_a_map_near_them(value: float) -> None:
    rows, _ = drawn(60)
    assert np.abs(fit(rows, np.full(60, value))(rows) - value).max() < 0.1


def test_a_feature_that_never_varies_does_no_harm() -> None:
    rows, target = drawn(100)
    rows[:, 2] = 7.0
    assert np.isfinite(fit(rows, target)(rows)).all()


def test_a_map_comes_back_from_json_as_it_was() -> None:
    rows, target = drawn(100)
    made = fit(rows, target)
    again = AgreementMap.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    with pytest.raises(ValueError, match="measure the version again"):
        AgreementMap.from_json(made.to_json() | {"features": ["length"]})


def test_agreement_leaves_the_trace_itself_out() -> None:
    assert leave_one_out([0, 0, 1, -1, -1]).tolist() == [0.25, 0.25, 0.0, 0.0, 0.0]
    assert leave_one_out([0]).tolist() == [0.0]


def test_agreement_over_two_versions_by_hand() -> None:
    """Five traces of this version, then five of the one before."""
    found = over_two_versions([0, 0, 1, -1, 2, 0, 1, 0, -1, 3], 5)
    assert found.tolist() == [(0.25 + 0.25) / 2, (0.25 + 0.5) / 2, (0.0 + 0.25) / 2, 0.0, 0.0]
    with pytest.raises(ValueError, match="got 3 traces of a version and 1 of the one before"):
        over_two_versions([0, 0, 1, 0], 3)


def test_a_version_that_has_not_changed_agrees_as_it_agrees_with_itself() -> None:
    labels = [0, 0, 1, -1, 2, 0, 1]
    assert over_two_versions(labels * 2, 7).tolist() == leave_one_out(labels).tolist()
    assert over_two_versions(labels, 7).tolist() == leave_one_out(labels).tolist()


def test_features_by_hand() -> None:
    logprob = np.log(np.array([0.5, 0.8, 0.5], dtype=np.float32))
    top1, top2 = np.array([0.6, 0.8, 0.5], dtype=np.float32), np.array([0.3, 0.1, 0.3], dtype=np.float32)
    found = agreement.features(logprob, top1, top2, slice(1, 3))
    prob, gap = np.log(0.4 / 0.6), np.log(0.45 / 0.55)  # 0.8 * 0.5; mean of 0.7 and 0.2
    assert found == pytest.approx([prob, gap, np.log(3), prob * gap], abs=1e-5)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"got 0 and 0"):
        fit(np.zeros((0, 4)), np.zeros(0))
    with pytest.raises(ValueError, match=r"shares in \[0, 1\]"):
        fit(np.zeros((2, 4)), np.array([0.0, 1.5]))
