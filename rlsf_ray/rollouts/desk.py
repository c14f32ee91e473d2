"""Where rollouts of several turns ask: many programs run at once, and one engine answers all of them together.

A program is `async def program(desk, prompt) -> list[Talk]`. It writes turns, says what the user replies, forks, and
asks whether an answer is right; it knows nothing of batches, of other prompts or of Ray. The desk lets every program
run until all of them wait, hands what they ask for to the engine in one call, and goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlsf_ray.algorithms.answers import ANSWERING, find_answer, token_span
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Completion, Engine, Request, Sampling
from rlsf_ray.errors import InputError
from rlsf_ray.records import Answer, FloatArray, IntArray, Prompt, Trace, Turn
from rlsf_ray.rollouts.seeds import trace_seed
from rlsf_ray.rollouts.stand_ins import by_majority, by_p_true
from rlsf_ray.tasks.checks import check_answer
from rlsf_ray.tasks.verdict import Verdict

STAND_INS = {"majority": by_majority, "p_true": by_p_true}
Program = Callable[["Desk", Prompt], Awaitable[list["Talk"]]]
LOOK_S = 0.05
QUIET = 8  # turns of the event loop without news, after which every program waits: one wake-up passes through a few


def turn_sampling(config: RunConfig, role: str) -> Sampling:
    """How a turn is drawn. One that is not credited is no sample of the policy: it may be drawn closer."""
    settings, learning = config.rollout, config.advantages
    credited = not (learning and learning.turns) or role in (*learning.turns, *learning.held_turns)
    closer = settings.temperature if settings.uncredited_temperature is None else settings.uncredited_temperature
    temperature = settings.temperature if credited else closer
    if temperature == 0.0:
        return Sampling(method="greedy", max_tokens=settings.max_tokens)
    return Sampling(method="sample", max_tokens=settings.max_tokens, temperature=temperature)


class Desk:
    """Serves the programs of one batch of prompts by one version of the weights."""

    def __init__(self, engine: Engine, config: RunConfig, *, version: int, salt: str) -> None:
        self.engine, self.config, self.version, self.salt = engine, config, version, salt
        self._asked: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._read: list[tuple[IntArray, IntArray, asyncio.Future[FloatArray]]] = []
        self._checks: set[asyncio.Future[Verdict]] = set()
        self._moved = 0.0  # when something last came of waiting
        self.votes: dict[str, asyncio.Future[str | None]] = {}  # by prompt, where votes stand in for a check

    def run(self, program: Program, prompts: Sequence[Prompt]) -> list[list[Talk]]:
        """The talks of each prompt. The first error of a program ends them all."""
        return asyncio.run(self._run(program, prompts))

    def begin(self, prompt: Prompt, index: int = 0) -> Talk:
        """The empty trace `index` of a prompt."""
        return Talk(self, prompt, index, self.engine.encode(prompt))

    async def complete(self, request: Request) -> Completion:
        """What the engine writes for a request of one seed."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._asked.append((request, future))
        return await future

    async def read(self, prompt_ids: IntArray, token_ids: IntArray) -> FloatArray:
        """The log-probs [T] of tokens after a prompt, whatever they were written after."""
        future: asyncio.Future[FloatArray] = asyncio.get_running_loop().create_future()
        self._read.append((prompt_ids, token_ids, future))
        return await future

    async def check(self, prompt: Prompt, answer: str | None) -> Verdict:
        """Whether the answer passes: by the task's own check, in a thread, or by what stands in (`rollout.check`)."""
        if (stand_in := STAND_INS.get(self.config.rollout.check)) is not None:
            return await stand_in(self, prompt, answer)
        if prompt.check is None:
            raise InputError(
                f"prompt {prompt.id} has no check, and rollout.name={self.config.rollout.name} needs one; use a source"
                " with checks (such as reasoning_gym's countdown), or rollout.check: majority"
            )
        running = asyncio.ensure_future(asyncio.to_thread(check_answer, prompt.check, answer))
        self._checks.add(running)
        running.add_done_callback(self._checked)
        return await running

    def _checked(self, done: asyncio.Future[Verdict]) -> None:
        self._checks.discard(done)
        self._moved = time.monotonic()

    async def _run(self, program: Program, prompts: Sequence[Prompt]) -> list[list[Talk]]:
        tasks = [asyncio.ensure_future(program(self, prompt)) for prompt in prompts]
        name, deadline_s = self.config.rollout.name, self.config.cluster.deadline_s
        self._moved = time.monotonic()
        try:
            while waiting := [task for task in tasks if not task.done()]:
                await self._settle()
                if (self._asked or self._read) and not self._checks:
                    self._answer()
                    self._moved = time.monotonic()
                else:
                    watched: set[asyncio.Future[Any]] = {*waiting, *self._checks}
                    await asyncio.wait(watched, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                    if time.monotonic() > self._moved + deadline_s:
                        raise InputError(
                            f"rollout {name} has waited for a check or something of its own for more"
                            f" than cluster.deadline_s={deadline_s:g}; give its waits a deadline"
                        )
                for task in tasks:
                    if task.done():
                        task.result()  # raises its error now, and not when the others have ended
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _settle(self) -> None:
        """Let the programs run until each waits: for the engine, for a check or for something of its own."""
        quiet = 0
        while quiet < QUIET:
            before = self._waiting
            await asyncio.sleep(0)
            quiet = quiet + 1 if before == self._waiting else 0

    @property
    def _waiting(self) -> tuple[int, int, int]:
        return len(self._asked), len(self._read), len(self._checks)

    def _answer(self) -> None:
        """One call of the engine for all that is asked; the programs are standing still meanwhile."""
        asked, self._asked = self._asked, []
        read, self._read = self._read, []
        if asked:
            written = self.engine.generate([request for request, _ in asked], self.version)
            for (_, future), found in zip(asked, written, strict=True):
                if not future.done():
                    future.set_result(found[0])
        if read:
            values = self.engine.logprobs([(prompt_ids, token_ids) for prompt_ids, token_ids, _ in read], self.version)
            for (*_, waiting), logprob in zip(read, values, strict=True):
                if not waiting.done():
                    waiting.set_result(logprob)


@dataclass
class Talk:
    """A trace in the making: what was written so far, and what was said in between."""

    desk: Desk
    prompt: Prompt
    index: int
    prompt_ids: IntArray
    written: list[Completion] = field(default_factory=list)
    said: list[IntArray] = field(default_factory=list)  # before each written turn: none before the first
    turns: list[Turn] = field(default_factory=list)
    reply: str = ""  # the last of `said`, as text

    def fork(self, index: int) -> Talk:
        """The trace `index`, which begins like this one."""
        return replace(self, index=index, written=[*self.written], said=[*self.said], turns=[*self.turns])

    def say(self, text: str) -> None:
        """The user replies to the last written turn. Raises InputError if nothing has been written since."""
        if not self.written or len(self.said) > len(self.written):
            raise InputError("a program may reply only to what was written: call write() before each say()")
        self.said.append(self.desk.engine.encode_reply(text, int(self.written[-1].token_ids[-1])))
        self.reply = text

    async def direct(self, index: int) -> Talk:
        """The last turn alone, as if it answered the prompt itself: the trace `index`, with log-probs read anew.

        Where the largest probabilities are not known, the token's own stands for them.
        """
        one, turn = self.written[-1], self.turns[-1]
        logprob = await self.desk.read(self.prompt_ids, one.token_ids)
        prob, none = np.exp(logprob), np.zeros(0, dtype=np.int32)
        alone = replace(one, logprob=logprob, top1=prob, top2=np.zeros_like(prob))
        first = replace(turn, tokens=(0, len(one.token_ids)), said="")
        return replace(self, index=index, written=[alone], said=[none], turns=[first])

    async def write(self, role: str) -> Turn:
        """The model's next turn. Its random stream is made of run seed, round, prompt, trace and turn."""
        if self.written and len(self.said) == len(self.written):
            raise InputError("a program's second turn needs a reply before it: call say() before write()")
        if not self.written:
            self.said.append(np.zeros(0, dtype=np.int32))
        sampling = turn_sampling(self.desk.config, role)
        context = np.concatenate([self.prompt_ids, self._token_ids(), self.said[-1]])
        seed = trace_seed(self.desk.salt, self.prompt.id, f"{self.index}/{len(self.turns)}")
        one = await self.desk.complete(Request(prompt_ids=context, seeds=(seed,), sampling=sampling))
        start = len(context) - len(self.prompt_ids)
        self.written.append(one)
        chars = self._find(one)
        answer = one.text[slice(*chars)] if chars else None
        span = (start, start + len(one.token_ids))
        turn = Turn(role=role, tokens=span, text=one.text, said=self.reply, answer=answer)
        self.turns.append(turn)
        return turn

    async def check(self) -> bool | None:
        """Does the answer of the last turn pass? Kept with the turn; None where the check itself could not be made."""
        found = await self.desk.check(self.prompt, self.turns[-1].answer)
        self.turns[-1] = replace(self.turns[-1], passed=float("nan") if found.right is None else float(found.right))
        return found.right

    def trace(self, name: str) -> Trace:
        """What has been written, as a record of that id."""
        answered = self._answered()
        last, turn = self.written[answered], self.turns[answered]
        seed = trace_seed(self.desk.salt, self.prompt.id, self.index)
        return Trace(
            id=name,
            index=self.index,
            seed=seed,
            version=self.desk.version,
            text=turn.text,
            token_ids=self._token_ids(),
            **{name: self._statistic(name) for name in ("logprob", "top1", "top2")},
            finished=last.finished,
            answer=self._answer(last, turn),
            turns=tuple(self.turns),
            char_ends=self._joined(lambda one: one.char_spans[:, 1], np.int32(0)),
        )

    def _token_ids(self) -> IntArray:
        parts = [part for said, one in zip(self.said, self.written, strict=False) for part in (said, one.token_ids)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def _statistic(self, name: str) -> np.ndarray:
        """Of each token; of those that nobody drew: certain."""
        return self._joined(lambda one: getattr(one, name), np.float32(0.0 if name in ("logprob", "top2") else 1.0))

    def _joined(self, values: Callable[[Completion], np.ndarray], idle: Any) -> np.ndarray:
        """[T]: the `values` of the written turns, and `idle` for what was said between."""
        parts = zip(self.said, self.written, strict=False)
        return np.concatenate([x for said, one in parts for x in (np.full(len(said), idle), values(one))])

    def _answered(self) -> int:
        """The last turn that answers the prompt; the last of all if none does."""
        return max((n for n, turn in enumerate(self.turns) if turn.role in ANSWERING), default=len(self.turns) - 1)

    def _find(self, one: Completion) -> tuple[int, int] | None:
        """The characters of its answer; what was cut off has none."""
        return find_answer(one.text, self.prompt.answer_format) if one.finished else None

    def _answer(self, last: Completion, turn: Turn) -> Answer | None:
        chars = self._find(last)
        if chars is None:
            return None
        first, end = token_span(last.char_spans, chars)
        start = turn.tokens[0]
        return Answer(text=last.text[slice(*chars)], chars=chars, tokens=(start + first, start + end))
