"""The guard's vitals of groups made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlsf_ray.records import Answer, Group, Prompt, Trace
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.vitals import repetition, take_vitals


def trace(index: int, answer: str | None, prob: float = 0.5, tokens: int = 4) -> Trace:
    found = Answer(text=answer, chars=(0, 1), tokens=(0, 1)) if answer else None
    return Trace(
        id=str(index),
        index=index,
        seed=index,
        version=0,
        text=answer or "",
        token_ids=np.arange(tokens, dtype=np.int32),
        logprob=np.full(tokens, np.log(prob), dtype=np.float32),
        top1=np.full(tokens, prob, dtype=np.float32),
        top2=np.zeros(tokens, dtype=np.float32),
        finished=answer is not None,
        answer=found,
    )


def group(name: str, *traces: Trace) -> Group:
    prompt = Prompt(id=name, messages=(("user", name),), task="t", key=name)
    ids = np.zeros(1, dtype=np.int32)
    return Group(id=name, round=-1, sequence=0, version=0, prompt=prompt, prompt_ids=ids, traces=traces)


def test_vitals_by_hand() -> None:
    groups = [
        group("a", trace(0, "4", 0.5), trace(1, "4", 0.25), trace(2, "5", 0.5, tokens=6), trace(3, None)),
        group("b", trace(0, "4.0"), trace(1, None), trace(2, None), trace(3, None)),
        group("c", trace(0, None), trace(1, None), trace(2, None), trace(3, None)),
    ]
    with AnswerChecker() as checker:
        found = take_vitals(groups, checker)
    assert found.agreement == pytest.approx((1 / 3 + 1 / 3) / 12)
    assert found.answer_prob == pytest.approx((0.5 + 0.25 + 0.5 + 0.5) / 4)
    assert found.votes == {"a": "4", "b": "4.0"}
    assert found.commonest == pytest.approx(1 / 3)  # "4" and "4.0" are told apart as texts; c has no vote
    assert found.distinct == pytest.approx((2 + 1 + 0) / 3)
    assert found.length == pytest.approx((11 * 4 + 6) / 12)
    assert found.surprisal == pytest.approx((46 * np.log(2) + 4 * np.log(4)) / 50, rel=1e-5)
    assert found.parsed == pytest.approx(4 / 12)
    assert found.repetition == 0.0


def test_repetition_is_the_share_of_grams_seen_before() -> None:
    assert repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4], dtype=np.int32)) == pytest.approx(1 / 5)
    assert repetition(np.array([7] * 13, dtype=np.int32)) == pytest.approx(9 / 10)
    assert repetition(np.array([1, 2], dtype=np.int32)) == 0.0
