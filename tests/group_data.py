"""Groups made by hand."""

from __future__ import annotations

import numpy as np

from rlsf_ray.records import Answer, Group, Prompt, Trace, TrainingGroup, TrainingTrace


def trace(index: int, answer: str | None, sure: float, *, finished: bool = True) -> Trace:
    """Four tokens; the answer is the third, with top-1 probability `sure` and top-2 of 0.1."""
    top1 = np.array([0.5, 0.5, sure, 0.5], dtype=np.float32)
    return Trace(
        id=f"r0/p/{index}",
        index=index,
        seed=index,
        version=3,
        text=f"It is {answer}",
        token_ids=np.array([10 + index, 20, 30 + index, 0], dtype=np.int32),
        logprob=np.log(top1),
        top1=top1,
        top2=np.full(4, 0.1, dtype=np.float32),
        finished=finished,
        answer=Answer(text=answer, chars=(6, 6 + len(answer)), tokens=(2, 3)) if answer else None,
    )


def group(*traces: Trace) -> Group:
    prompt = Prompt(id="p", messages=(("user", "1 + 1 ="),), task="t", key="1 + 1")
    ids = np.array([5, 6, 7], dtype=np.int32)
    return Group(id="r0/p", round=0, sequence=4, version=3, prompt=prompt, prompt_ids=ids, traces=traces)


def advantage_group(index: int, num_traces: int) -> TrainingGroup:
    """Traces of 3, 4, ... tokens with advantages that sum to 0, written by version 0."""
    draw = np.random.default_rng(index)
    advantages = np.linspace(-1.0, 1.0, num_traces)
    traces = tuple(
        TrainingTrace(
            id=f"{index}/{k}",
            seed=k,
            version=0,
            score=float(k),
            answer=None,
            token_ids=draw.integers(4, 300, 3 + k).astype(np.int32),
            logprob=np.full(3 + k, -5.0, dtype=np.float32),
            reference_logprob=np.full(3 + k, -5.0, dtype=np.float32),
            credit=np.full(3 + k, advantages[k], dtype=np.float32),
        )
        for k in range(num_traces)
    )
    return TrainingGroup(
        id=str(index),
        round=0,
        sequence=index,
        prompt_id=str(index),
        signal="self_certainty",
        prompt_ids=draw.integers(4, 300, 5).astype(np.int32),
        traces=traces,
        pairs=(),
    )
