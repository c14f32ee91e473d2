"""Measuring versions through the generator pool: the probe set, the calibration prompts, the guard."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from ray.exceptions import ObjectLostError

from actors.journal import Journal
from actors.pool import LOST, GeneratorPool, GivenUp
from actors.watch import Watch
from rlsf_ray.config import RunConfig
from rlsf_ray.errors import ServiceError
from rlsf_ray.records import Json, Prompt
from rlsf_ray.stream.guard import Action
from rlsf_ray.stream.run_state import RunState

logger = logging.getLogger(__name__)

TRAINING, EVALUATION = 0, 1  # lanes of the generator pool, most urgent first


class Collapse(Exception):
    """The guard wants to go back to an earlier version."""


class Measuring:
    """Evaluations of one life of a run. `start_task` runs a coroutine beside us."""

    def __init__(
        self,
        state: RunState,
        journal: Journal,
        evaluator: Any,
        pool: GeneratorPool,
        watch: Watch,
        config: RunConfig,
        probe: Sequence[Prompt],
        calibration: Sequence[Prompt],
    ) -> None:
        self._state, self._journal, self._evaluator = state, journal, evaluator
        self._pool, self._watch, self._config = pool, watch, config
        self._probe, self._calibration = probe, calibration
        self._beside: dict[int, asyncio.Task[None]] = {}  # version -> its evaluation beside the rounds

    async def evaluate(self, version: int, questions: int | None = None) -> None:
        """Have `judge` look at a version. Raises Collapse if the guard finds it bad."""
        if await self.judge(version, questions) == "stop":
            raise Collapse

    async def judge(self, version: int, questions: int | None = None) -> Action:
        """Measure a version on the first `questions` of the probe set (None: all), unless that is known.

        Returns what the guard says of it. Raises GuardError if that is to end the run.
        """
        probe = self._probe[:questions]
        if not probe and not self._calibration:
            return "go_on"
        known, vitals = await self._watch.answer(self._evaluator.known.remote(version, len(probe)), "evaluator")
        if not known:
            if questions is None:  # else it goes on beside the next round, whose message stays
                self._state.message = f"evaluating version {version}"
            vitals = await self._measure(version, probe)
        action = self._state.judged(version, vitals)
        await self._journal.save()
        return action

    async def _measure(self, version: int, probe: Sequence[Prompt]) -> Json | None:
        """Have a version write for the calibration prompts and for `probe`; returns the guard's vitals."""
        batches = [
            self._batch(*methods, version, first, prompts[first : first + size])
            for methods, prompts, size in (
                (("calibrate", "collect"), self._calibration, self._config.cluster.prompts_per_call),
                (("probe", "judge"), probe, self._config.probe_prompts_per_call),
            )
            for first in range(0, len(prompts), size)
        ]
        await asyncio.gather(*batches)
        vitals: Json | None = await self._watch.answer(self._evaluator.finish.remote(version), "evaluator")
        return vitals

    def beside(self) -> None:
        """Measure each version once while the rounds go on, on `eval.during` questions: all but the run's last.

        An earlier life may have ended before it measured its versions; the guard has to hear of them in order.
        """
        admission = self._state.admission
        last = admission.newest if admission.rounds_ended >= self._config.rounds else None
        for _, version in admission.made():
            if version != last and version not in self._beside:
                self._beside[version] = self._pool.start_task(self._after_others(version, list(self._beside.values())))

    async def _after_others(self, version: int, others: Sequence[asyncio.Task[None]]) -> None:
        await asyncio.gather(*others)
        await self.evaluate(version, self._config.eval.during)

    async def ended(self) -> None:
        """Return once nothing is measured any more: the evaluator keeps the rows of a version in one place."""
        await asyncio.gather(*self._beside.values())

    async def _batch(self, write: str, take: str, version: int, first: int, prompts: Sequence[Prompt]) -> None:
        for _ in range(self._config.cluster.attempts):
            try:
                groups, event = await self._pool.call(
                    write, prompts, first, priority=(EVALUATION, version, first), least_version=0, version=version
                )
            except GivenUp as error:
                raise _unmeasured(version, error.reason) from error
            self._journal.record(event)
            self._watch.moved()
            taken = getattr(self._evaluator, take).remote([groups], version, first)
            try:
                self._journal.record(await self._watch.answer(taken, "evaluator"))
                self._watch.moved()
                return
            except ObjectLostError as error:  # the generator's node went before they were read
                logger.warning("version %d: the traces from question %d on are lost: %s", version, first, error)
        raise _unmeasured(version, LOST)


def _unmeasured(version: int, reason: str) -> ServiceError:
    return ServiceError(f"version {version} cannot be evaluated: {reason} too often; see the log")
