"""Metrics of a probe set against tables worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlsf_ray.algorithms import calibration
from rlsf_ray.measures import CONFIDENCES, STATISTICS, confidences, difference, measure


def sample(label: int, correct: bool, disparity: float, prob: float = 0.5, agreement: float = 0.0) -> dict[str, Any]:
    answer = None if label < 0 else str(label)
    shared = {"answer": answer, "label": label, "correct": correct, "finished": True, "length": 10}
    shared |= {"anyhow": correct, "transitions": 0.0, "surprisal": 0.5}
    return shared | {"answer_prob": prob if answer else 0.0, "disparity": disparity, "agreement": agreement}


def question(name: str, *samples: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": name, "samples": list(samples), "greedy": samples[0], "branches": [], **more}


# a: answers 0 0 1 1, the sure ones (label 1) right; b: none, then 0 three times, right; c: 0 right, else none
ROWS = [
    question("a", sample(0, False, 0.1), sample(0, False, 0.2), sample(1, True, 0.9), sample(1, True, 0.3)),
    question("b", sample(-1, False, 0.0), sample(0, True, 0.5), sample(0, True, 0.6), sample(0, True, 0.7)),
    question("c", sample(0, True, 0.4), sample(-1, False, 0.0), sample(-1, False, 0.0), sample(-1, False, 0.0)),
]


def test_accuracies_of_every_way_to_answer_by_hand() -> None:
    found = measure(ROWS)
    assert found["greedy_accuracy"] == pytest.approx(1 / 3)
    assert found["sampled_accuracy"] == pytest.approx(6 / 12)
    assert found["majority_accuracy"] == pytest.approx(2 / 3)  # a: a tie, the first answer is wrong
    # Borda (p = 1/2) for a: ranks by disparity .9 .3 .2 .1: label 1 has sqrt 4 + sqrt 3, label 0 sqrt 2 + sqrt 1
    assert found["borda_accuracy"] == 1.0
    assert found["parsed"] == pytest.approx(8 / 12)
    assert found["accuracy_given_parsed"] == pytest.approx(6 / 8)
    assert "cot_max_accuracy" not in found


def test_branches_are_judged_by_the_surest_and_by_the_sum() -> None:
    """Sums of disparity: label 0 .5 + .4 beats label 1's .8, which is the surest single one."""
    branches = [sample(0, False, 0.5), sample(1, True, 0.8), sample(0, False, 0.4), sample(-1, False, 0.0)]
    found = measure([row | {"branches": branches} for row in ROWS])
    assert found["cot_max_accuracy"] == 1.0
    assert found["cot_aggregated_accuracy"] == 0.0


def test_the_vote_share_is_one_confidence_for_a_question() -> None:
    confidence, correct = confidences(ROWS, "vote_share")
    assert confidence.ravel().tolist() == [0.5, 0.75, 0.25]
    assert correct.ravel().tolist() == [0.0, 1.0, 1.0]


def test_every_confidence_has_every_statistic_with_an_interval_around_it() -> None:
    draw = np.random.default_rng(2)
    rows = []
    for q in range(40):
        many = [
            sample(int(draw.integers(3)), bool(draw.random() < 0.4), draw.random(), draw.random(), draw.random())
            for _ in range(4)
        ]
        rows.append(question(str(q), *[one | {"calibrated": draw.random()} for one in many]))
    found = measure(rows)
    for name in CONFIDENCES:
        for kind in STATISTICS:
            assert found[f"{kind}_{name}_low"] <= found[f"{kind}_{name}"] + 0.02 <= found[f"{kind}_{name}_high"] + 0.04
    confidence, correct = confidences(rows, "disparity")
    assert found["nll_disparity"] == calibration.nll(confidence.ravel(), correct.ravel())
    assert 0.05 < found["sampled_accuracy_high"] - found["sampled_accuracy_low"] < 0.4


def test_where_no_trace_has_an_answer_nothing_is_given_parsed() -> None:
    found = measure([question("a", *[sample(-1, False, 0.0)] * 4)])
    assert np.isnan(found["accuracy_given_parsed"])
    assert "accuracy_given_parsed_low" not in found


def test_rises_are_paired_over_shared_questions() -> None:
    """Question a gains one sample of four; d stands in one evaluation only."""
    better = [question(name, *[sample(0, True, 0.5)] * 3, sample(1, False, 0.5)) for name in "ad"]
    rises = difference({"questions": ROWS}, {"questions": better})
    assert rises["sampled_accuracy"] == [0.25, 0.25, 0.25]
    assert rises["greedy_accuracy"][0] == rises["majority_accuracy"][0] == 1.0


def test_all_right_or_none_is_no_certainty() -> None:
    """Wilson's interval of 2 of 2 questions, and Newcombe's of the rise to it from none; a length has no such limit."""
    none, everything = ([question(name, *[sample(0, right, 0.5)] * 4) for name in "ab"] for right in (False, True))
    away, found = 3.8415 / 5.8415, measure(everything)
    for name in ("greedy_accuracy", "sampled_accuracy", "parsed"):
        assert [found[f"{name}_low"], found[f"{name}_high"]] == pytest.approx([1 - away, 1], abs=1e-4)
    assert found["mean_length_low"] == found["mean_length_high"] == 10
    rises = difference({"questions": none}, {"questions": everything})
    assert rises["greedy_accuracy"] == pytest.approx([1.0, 1 - np.hypot(away, away), 1.0 + 0.0], abs=1e-4)


def told(name: str, *tries: list[bool]) -> dict[str, Any]:
    """A question with episodes of such tries."""
    episodes = [
        [
            {
                "role": "retry" if n else "attempt",
                "answer": str(right),
                "label": int(right),
                "right": right,
                "length": 3,
            }
            for n, right in enumerate(one)
        ]
        for one in tries
    ]
    return question(name, sample(0, True, 0.5), episodes=episodes)


def test_rises_of_tries_are_paired_and_none_of_them_is_no_certainty() -> None:
    """Of the failed tries 0, then 2 of 4 are mended. Nothing was right at first, so nothing could go wrong."""
    failed = [told(name, [False, False], [False, False]) for name in "ab"]
    mended = [told(name, [False, True], [False, False]) for name in "ab"]
    metrics = measure(failed)
    away = 3.8415 / 5.8415  # Wilson's for 0 of 2 questions
    assert [metrics[f"wrong_to_right{end}"] for end in ("", "_low", "_high")] == pytest.approx([0, 0, away], abs=1e-4)
    rises = difference({"questions": failed}, {"questions": mended})
    assert rises["wrong_to_right"] == rises["last_try"] == pytest.approx([0.5, 0.5 - away, 0.5], abs=1e-4)
    assert rises["first_try"] == pytest.approx([0.0, -away, away], abs=1e-4)
    assert "right_to_wrong" not in rises
    assert "last_try" not in difference({"questions": failed}, {"questions": [question("a", sample(0, True, 0.5))]})
