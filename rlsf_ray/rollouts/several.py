"""Rollouts of several turns: small programs, each a paper's way of letting a model have another go.

Each returns the traces of one prompt, by their index. What a turn is worth is not their business: a signal and
`advantages.turns` (or a pair rule) decide that.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Engine
from rlsf_ray.records import Group, Prompt
from rlsf_ray.rollouts.desk import Desk, Program, Talk, turn_sampling
from rlsf_ray.rollouts.seeds import group_id

REFLECT = (
    "That answer is wrong. In one or two short sentences, say what went wrong and what to do better next time."
    " Do not answer the task yet."
)
RETRY = "Keep that in mind and answer the task again."
AGAIN = "That is not right. Try again."
REVISE = "There may be a mistake in your answer. Look at it again, mend it if need be, and give your answer once more."
CRITIQUE = "Say in one or two short sentences what is weak or wrong in your answer."
REFINE = "Now write the best answer that you can."
VERIFY = "Is your answer correct? Reply with one word, yes or no."


async def attempts(desk: Desk, prompt: Prompt) -> list[Talk]:
    """K attempts, each checked: which prompts does the model fail? One where they are greedy: all would be the same."""

    async def episode(talk: Talk) -> None:
        await talk.write("attempt")
        await talk.check()

    greedy = turn_sampling(desk.config, "attempt").method == "greedy"
    return await _independent(desk, prompt, episode, 1 if greedy else desk.config.rollout.traces)


async def reflect_retry(desk: Desk, prompt: Prompt) -> list[Talk]:
    """Attempt; where that fails, K reflections on it and a retry after each. Reflect, Retry, Reward 2505.24726.

    An attempt that passes, or that could not be checked, leaves one trace, from which nothing is learned.
    """
    first = desk.begin(prompt)
    await first.write("attempt")
    if await first.check() is not False:
        return [first]
    first.say(REFLECT)

    async def once_more(talk: Talk) -> None:
        await talk.write("reflection")
        talk.say(RETRY)
        await talk.write("retry")
        await talk.check()

    return await _forked(first, once_more)


async def try_again(desk: Desk, prompt: Prompt) -> list[Talk]:
    """K episodes of up to `rollout.tries` attempts, told only that the last one failed. UFO 2507.14295."""

    async def episode(talk: Talk) -> None:
        for left in reversed(range(desk.config.rollout.tries)):
            await talk.write("attempt")
            if await talk.check() is not False or not left:
                return
            talk.say(AGAIN)

    return await _independent(desk, prompt, episode)


async def second_try(desk: Desk, prompt: Prompt) -> list[Talk]:
    """K episodes of an attempt and a second one, whether the first was right or not. SCoRe 2409.12917."""

    async def episode(talk: Talk) -> None:
        await talk.write("attempt")
        await talk.check()
        talk.say(REVISE)
        await talk.write("retry")
        await talk.check()

    return await _independent(desk, prompt, episode)


async def refine(desk: Desk, prompt: Prompt) -> list[Talk]:
    """K / 2 attempts, each followed by what a critique made of it as a direct answer; unchecked. EVOLVE 2502.05605.

    For the pair rule final_over_first. The paper also trains the refining itself, on answers given a draft. One trace
    alone (an episode, to be measured) is the whole talk.
    """

    async def episode(index: int) -> list[Talk]:
        talk = desk.begin(prompt, index)
        await talk.write("attempt")
        draft = talk.fork(index)
        talk.say(CRITIQUE)
        await talk.write("critique")
        talk.say(REFINE)
        await talk.write("retry")
        return [draft, await talk.direct(index + 1)] if desk.config.rollout.traces > 1 else [talk]

    found = await asyncio.gather(*map(episode, range(0, max(1, desk.config.rollout.traces - 1), 2)))
    return [talk for both in found for talk in both]


async def verify_revise(desk: Desk, prompt: Prompt) -> list[Talk]:
    """One attempt; K times a verdict on it and, where that is no, a retry. Self-rewarding correction 2502.19613."""
    first = desk.begin(prompt)
    await first.write("attempt")
    await first.check()
    first.say(VERIFY)

    async def judged(talk: Talk) -> None:
        if says_yes((await talk.write("verdict")).text):
            return
        talk.say(RETRY)
        await talk.write("retry")
        await talk.check()

    return await _forked(first, judged)


async def verify_refine(desk: Desk, prompt: Prompt) -> list[Talk]:
    """K long chains of critique and retry side by side, for a vote over their ends; unchecked. DSER 2510.17498.

    A chain goes on whatever it says: what counts is where many chains end up.
    """

    async def chain(talk: Talk) -> None:
        await talk.write("attempt")
        for _ in range(desk.config.rollout.tries - 1):
            talk.say(CRITIQUE)
            await talk.write("critique")
            talk.say(REFINE)
            await talk.write("retry")

    return await _independent(desk, prompt, chain)


PROGRAMS: dict[str, Program] = {
    "reflect_retry": reflect_retry,
    "try_again": try_again,
    "second_try": second_try,
    "refine": refine,
    "verify_revise": verify_revise,
    "verify_refine": verify_refine,
}


_YES = re.compile(r"[\W_]*(?:yes|(?:(?:it|this|that|(?:the|my|your) (?:final )?answer) is )?correct)(?![\w'])", re.I)


def says_yes(text: str) -> bool:
    """Does a verdict begin by calling the answer correct?"""
    return _YES.match(text) is not None


async def _independent(
    desk: Desk, prompt: Prompt, episode: Callable[[Talk], Awaitable[None]], count: int | None = None
) -> list[Talk]:
    talks = [desk.begin(prompt, k) for k in range(count or desk.config.rollout.traces)]
    await asyncio.gather(*map(episode, talks))
    return talks


async def _forked(first: Talk, rest: Callable[[Talk], Awaitable[None]]) -> list[Talk]:
    talks = [first.fork(k) for k in range(first.desk.config.rollout.traces)]
    await asyncio.gather(*map(rest, talks))
    return talks


def write_talks(
    program: Program,
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    config: RunConfig,
    round: int,
    sequences: Sequence[int],
    version: int,
) -> list[Group]:
    """One group for each prompt, by a program."""
    desk = Desk(engine, config, version=version, salt=f"{config.seed}/round-{round}" if round >= 0 else "probe")
    found = desk.run(program, prompts)
    return [
        _group(prompt, round, sequence, talks, [f"{group_id(prompt, round)}/{talk.index}" for talk in talks])
        for prompt, sequence, talks in zip(prompts, sequences, found, strict=True)
    ]


def write_episodes(
    program: Program, engine: Engine, prompts: Sequence[Prompt], *, config: RunConfig, version: int, first_sequence: int
) -> list[Group]:
    """For evaluation, `eval.samples` whole episodes of each prompt, which share no turn; every run draws them alike."""
    alone = config.model_copy(update={"rollout": config.rollout.model_copy(update={"traces": 1})})
    desk, count = Desk(engine, alone, version=version, salt="episode"), config.eval.samples
    copies = [replace(prompt, id=f"{prompt.id}/{k}") for prompt in prompts for k in range(count)]
    found = [talks[0] for talks in desk.run(program, copies)]
    return [
        _group(prompt, -1, first_sequence + index, talks, [group_id(talk.prompt, -1) for talk in talks])
        for index, prompt in enumerate(prompts)
        for talks in [found[index * count : (index + 1) * count]]
    ]


def _group(prompt: Prompt, round: int, sequence: int, talks: Sequence[Talk], names: Sequence[str]) -> Group:
    """The talks of a prompt, as traces of these names."""
    return Group(
        id=group_id(prompt, round),
        round=round,
        sequence=sequence,
        version=talks[0].desk.version,
        prompt=prompt,
        prompt_ids=talks[0].prompt_ids,
        traces=tuple(talk.trace(name) for talk, name in zip(talks, names, strict=True)),
    )
