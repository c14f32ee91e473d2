"""A group made by hand."""

from __future__ import annotations

import numpy as np

from rlsf_ray.records import Answer, Group, Prompt, Trace


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
