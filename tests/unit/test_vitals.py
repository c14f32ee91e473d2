"""The guard's vitals of groups made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlsf_ray.algorithms.answers import label_answers
from rlsf_ray.records import Answer, Group, Json, Prompt, Trace, TrainingGroup, TrainingTrace
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.vitals import repetition, take_vitals, training_vitals


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


def test_the_distance_from_the_base_model_is_the_mean_over_tokens() -> None:
    def written(logprob: list[float], reference: list[float]) -> TrainingTrace:
        arrays: Json = {"logprob": np.array(logprob, np.float32), "reference_logprob": np.array(reference, np.float32)}
        ids = np.zeros(len(logprob), np.int32)
        return TrainingTrace(id="", seed=0, version=1, score=0.5, answer="4", token_ids=ids, **arrays)

    traces = (written([-0.5, -0.25, -0.25], [-1.0, -0.75, -0.25]), written([-2.0], [-1.0]))
    place: Json = {"id": "a", "round": 0, "sequence": 0, "prompt_id": "a", "signal": "disparity"}
    one = TrainingGroup(**place, prompt_ids=np.zeros(1, np.int32), traces=traces, pairs=())
    assert training_vitals([one], 0.25) == {"kl": 0.0, "logprob_gap": 0.25}
    two = training_vitals([replace(one, traces=traces[:1])], 0.25)
    assert two["kl"] == pytest.approx(1.0 / 3)


def texts(groups: list[Group]) -> Json:
    return {group.prompt.id: [trace.answer_text for trace in group.traces] for group in groups}


def test_vitals_by_hand() -> None:
    groups = [
        group("a", trace(0, "4", 0.5), trace(1, "4", 0.25), trace(2, "5", 0.5, tokens=6), trace(3, None)),
        group("b", trace(0, "4.0"), trace(1, None), trace(2, None), trace(3, None)),
        group("c", trace(0, None), trace(1, None), trace(2, None), trace(3, None)),
    ]
    with AnswerChecker() as checker:
        labels = [label_answers([trace.answer_text for trace in group.traces], checker.equal) for group in groups]
    found = take_vitals(groups, labels, texts(groups))
    assert found.agreement == pytest.approx((1 / 3 + 1 / 3) / 12)
    assert found.answer_prob == pytest.approx((0.5 + 0.25 + 0.5 + 0.5) / 4)
    assert found.votes == {}  # two of four traces settle nothing
    assert found.commonest == pytest.approx(2 / 3)  # "4" and "4.0"; c has no vote
    assert found.prompts == 3
    assert found.distinct == pytest.approx((2 + 1 + 0) / 3)
    assert found.length == pytest.approx((11 * 4 + 6) / 12)
    assert found.surprisal == pytest.approx((46 * np.log(2) + 4 * np.log(4)) / 50, rel=1e-5)
    assert found.parsed == pytest.approx(4 / 12)
    assert found.cut_off == pytest.approx(8 / 12)
    assert found.repetition == 0.0
    assert found.agreed == pytest.approx(2 / 6)  # of a's ordered pairs; b and c have none


def test_three_of_four_traces_settle_a_vote() -> None:
    groups = [
        group("a", *[trace(k, answer) for k, answer in enumerate(("4", "5", "4", "4.0"))]),
        group("b", *[trace(k, answer) for k, answer in enumerate(("4", "4", "5", "5"))]),
        group("c", *[trace(k, answer) for k, answer in enumerate(("4", "4", "4", None))]),
    ]
    labels = [[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, -1]]
    assert take_vitals(groups, labels, texts(groups)).votes == {"a": "4", "c": "4"}


def test_answers_that_few_prompts_have_agree_as_often_as_they_do() -> None:
    """A third of the traces is answered, all of one prompt; taken as spread evenly, all nine of nine would agree."""
    groups = [
        group("a", *[trace(k, "4") for k in range(3)]),
        *(group(name, *map(trace, range(3), [None] * 3)) for name in "bc"),
    ]
    found = take_vitals(groups, [[0, 0, 0], [-1] * 3, [-1] * 3], texts(groups))
    assert found.agreed == 1.0
    one_each = [group(name, *map(trace, range(3), ["4", None, None])) for name in "abc"]
    assert take_vitals(one_each, [[0, -1, -1]] * 3, texts(one_each)).agreed != 0.0  # unknown


def test_repetition_is_the_share_of_grams_seen_before() -> None:
    assert repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4], dtype=np.int32)) == pytest.approx(1 / 5)
    assert repetition(np.array([7] * 13, dtype=np.int32)) == pytest.approx(9 / 10)
    assert repetition(np.array([1, 2], dtype=np.int32)) == 0.0
