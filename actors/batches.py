"""One batch of prompts, from the generator pool to the buffer, whoever dies on the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from ray.exceptions import ObjectLostError

from actors.journal import Journal
from actors.measuring import TRAINING
from actors.pool import LOST, GeneratorPool, GivenUp
from actors.scorers import ScorerPool
from actors.spawn import Crew
from actors.watch import Watch
from rlsf_ray.records import Outcome, Prompt
from rlsf_ray.stream.run_state import RunState

logger = logging.getLogger(__name__)


class Batches:
    """Has prompts written and scored, and books how each has ended."""

    def __init__(
        self,
        state: RunState,
        journal: Journal,
        crew: Crew,
        pool: GeneratorPool,
        scorers: ScorerPool,
        watch: Watch,
        attempts: int,
    ) -> None:
        self._state, self._journal, self._crew = state, journal, crew
        self._pool, self._scorers, self._watch, self._attempts = pool, scorers, watch, attempts
        self._alone = asyncio.Lock()  # held by the batch whose prompts are tried one by one

    async def run(self, round: int, part: int, first: int, prompts: Sequence[Prompt]) -> None:
        """See the class."""
        outcomes, failed = await self._generate_and_score(round, part, first, prompts)
        held = list[Outcome]()
        if failed:
            given_up = self._crew.buffer.give_up.remote(round, list(failed))
            held = await self._watch.answer(given_up, "pair_buffer")  # of a scorer that died after it had put them
        self._state.scored(round, outcomes)  # and what follows at once: a batch is saved whole or not at all
        self._state.recovered(round, held)
        for sequence in failed.keys() - {outcome.sequence for outcome in held}:
            self._state.ledger.failed(round, [sequence], failed[sequence])
        await self._journal.save()
        self._watch.moved()

    async def _generate_and_score(
        self, round: int, part: int, first: int, prompts: Sequence[Prompt]
    ) -> tuple[list[Outcome], dict[int, str]]:
        """(outcomes, {sequence: why it was given up}). Traces go from generator to scorer as references."""
        failed, reason = dict[int, str](), LOST
        for _ in range(self._attempts):
            boxed, failed = await self._generate(round, first, prompts)
            if not boxed:
                return [], failed
            try:
                outcomes, event = await self._scorers.score(boxed, round, part)
                self._journal.record(event)
                # they may be of an earlier attempt, which others of the prompts have failed
                rest = set(range(first, first + len(prompts))) - {outcome.sequence for outcome in outcomes}
                return outcomes, {sequence: failed.get(sequence, reason) for sequence in sorted(rest)}
            except ObjectLostError as error:
                logger.warning("round %d: the traces from prompt %d on are lost: %s", round, first, error)
            except GivenUp as error:
                reason = error.reason
                break
        return [], dict.fromkeys(range(first, first + len(prompts)), reason) | failed

    async def _generate(self, round: int, first: int, prompts: Sequence[Prompt]) -> tuple[list[Any], dict[int, str]]:
        """(references of groups, {sequence: why it was given up}).

        A batch that is given up is tried again prompt by prompt, of all such batches one prompt at a time: one that
        kills its generator takes none along that was given up beside it.
        """
        try:
            return [await self._write(round, first, prompts)], {}
        except GivenUp as error:
            logger.warning("round %d: %s; prompts %d to %d alone", round, error, first, first + len(prompts) - 1)
        boxed, failed = list[Any](), dict[int, str]()
        async with self._alone:
            for sequence, prompt in enumerate(prompts, first):
                try:
                    boxed.append(await self._write(round, sequence, [prompt]))
                except GivenUp as error:
                    failed[sequence] = error.reason
        return boxed, failed

    async def _write(self, round: int, first: int, prompts: Sequence[Prompt]) -> Any:
        """The reference of the groups of some prompts. Raises GivenUp."""
        groups, event = await self._pool.call(
            "write",
            prompts,
            round,
            first,
            priority=(TRAINING, round, first),
            least_version=self._state.admission.least_version(round),
        )
        self._journal.record(event)
        self._watch.moved()
        return groups
