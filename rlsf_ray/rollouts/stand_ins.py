"""What stands in for a check where a task has none: the model's own opinion, which can be wrong, and is named so.

`rollout.check: majority` asks whether an answer is the one that most of VOTERS samples give; `rollout.check: p_true`
whether the model, asked, holds it for true.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from rlsf_ray.algorithms.answers import find_answer, normalise
from rlsf_ray.engines.base import Request, Sampling
from rlsf_ray.engines.tokens import asked_if_true
from rlsf_ray.records import Prompt
from rlsf_ray.rollouts.seeds import trace_seed
from rlsf_ray.tasks.verdict import Verdict

if TYPE_CHECKING:
    from rlsf_ray.rollouts.desk import Desk

VOTERS = 8


async def vote(desk: Desk, prompt: Prompt) -> str | None:
    """The commonest answer of VOTERS samples, in its canonical form. TTRL 2504.16084.

    None on a tie, and where no two agree: one voice is no majority.
    """
    ids, settings = desk.engine.encode(prompt), desk.config.rollout
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature)
    seeds = [trace_seed(desk.salt, prompt.id, f"voter/{k}") for k in range(VOTERS)]
    requests = [Request(prompt_ids=ids, seeds=(seed,), sampling=sampling) for seed in seeds]
    written = await asyncio.gather(*map(desk.complete, requests))
    spans = [(one.text, find_answer(one.text, prompt.answer_format)) for one in written if one.finished]
    common = Counter(normalise(text[slice(*span)]) for text, span in spans if span).most_common(2)
    tied = len(common) == 2 and common[0][1] == common[1][1]
    return common[0][0] if common and common[0][1] > 1 and not tied else None


async def by_majority(desk: Desk, prompt: Prompt, answer: str | None) -> Verdict:
    """Is the answer that of the vote? Without a vote nothing can be said."""
    if prompt.id not in desk.votes:
        desk.votes[prompt.id] = asyncio.ensure_future(vote(desk, prompt))
    winner = await desk.votes[prompt.id]
    if winner is None:
        return Verdict(None, "no answer has most votes")
    right = answer is not None and normalise(answer) == winner
    return Verdict(right, "" if right else f"most votes are for {winner}")


async def by_p_true(desk: Desk, prompt: Prompt, answer: str | None) -> Verdict:
    """Does the model hold the answer for true: is "True" a likelier reply than "False"? P(True) 2207.05221."""
    if answer is None:
        return Verdict(False, "no answer")
    asked = desk.engine.encode(asked_if_true(prompt, answer))
    words = [desk.engine.encode_text(word) for word in ("True", "False")]
    true, false = await asyncio.gather(*(desk.read(asked, word) for word in words))
    odds = float(np.sum(true) - np.sum(false))
    return Verdict(odds > 0, "" if odds > 0 else f"held for false, by {-odds:.2f} nats")
