"""The run itself: admits rounds, sends batches on their way, commits, publishes, evaluates. Control only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, astuple
from typing import Any

from actors.batches import Batches
from actors.journal import Journal
from actors.measuring import Collapse, Measuring
from actors.pool import LOST, GeneratorPool
from actors.scorers import ScorerPool
from actors.spawn import MOST_SLOTS, Crew, most_batches
from actors.watch import Watch
from rlsf_ray.errors import InputError, ServiceError, StorageError
from rlsf_ray.feeds import Feed
from rlsf_ray.records import Json, Outcome, Prompt
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.ledger import FAILED, FILTERED, IN_FLIGHT, PAIRS
from rlsf_ray.stream.run_state import RunState
from rlsf_ray.tasks.sources import prompts_of_round
from rlsf_ray.wording import way_back

logger = logging.getLogger(__name__)


class Rounds:
    """One life of a run, from what the run directory holds to the last round."""

    def __init__(self, store: RunStore, state: RunState, journal: Journal, crew: Crew, watch: Watch) -> None:
        self._store, self._state, self._journal, self._crew, self._watch = store, state, journal, crew, watch
        self._config = store.config
        cluster = self._config.cluster
        self._size = cluster.prompts_per_call
        slots = MOST_SLOTS[self._config.engine]
        hands = crew.hands("generators")
        self._pool = GeneratorPool(crew.generators, hands, watch, cluster.attempts, self._start, self._swapped, slots)
        self._scorers = ScorerPool(crew.scorers, crew.hands("scorers"), watch, cluster.attempts, self._start)
        self._batches = Batches(state, journal, crew, self._pool, self._scorers, watch, cluster.attempts)
        self._permits = asyncio.Semaphore(most_batches(self._config))
        self._commits: asyncio.Queue[tuple[Json | None, list[Any]]] = asyncio.Queue()
        self._trainer_at: int | None = None  # the round that the trainer goes on with
        self._feeds: list[Feed] | None = None  # None: not read yet
        self._feeding = asyncio.Lock()  # no round takes its prompts while some come in
        self.fit: Any = None
        self.may_train = True

    async def run(self, stop: asyncio.Future[None]) -> None:
        """Every round that is left, then the last version's measure. `stop` ends it at any moment by its exception.

        Raises NoPairsError, counting the reasons, if no round gave a pair, ServiceError if that is because all failed,
        GuardError if the guard is to stop the run.
        """
        resumed = bool(self._state.ledger.size(0))
        if not self._state.ends_early:
            try:
                async with self._working(stop):
                    await self._prepare()
                    await self._learn(resumed)
                    await self._measuring.evaluate(self._state.admission.newest)
                return
            except ExceptionGroup as errors:
                if errors.split(Collapse)[1] is not None:
                    raise
        async with self._working(stop):
            await self._end_training()
            if self._state.rolled_back is None:
                await self._roll_back()
            while await self._measuring.judge(self._state.admission.newest) == "stop":
                await self._roll_back()

    @asynccontextmanager
    async def _working(self, stop: asyncio.Future[None]) -> AsyncIterator[None]:
        """Time in which tasks may run beside; one that fails ends them all."""
        async with asyncio.TaskGroup() as self._tasks:
            generators, scorers = self._config.cluster.generators, self._config.cluster.scorers
            keeping = self._pool.keep(generators.at_most, generators.idle_s)
            scoring = self._scorers.keep(scorers.at_most, scorers.idle_s)
            tasks = (_forward(stop), self._journal.keep_saving(), self._take_commits(), keeping, scoring)
            beside = [self._start(work) for work in tasks]
            yield
            for task in beside:
                task.cancel()

    async def _learn(self, resumed: bool) -> None:
        """All rounds, with a training job beside them."""
        self.fit = self._crew.driver.fit.remote()  # takes long to start: the base model is measured meanwhile
        fitting = self._start(self._fit())
        if resumed:
            self._say("waiting for the trainer")
            await self._watch.until(lambda: self._trainer_at is not None, "the trainer")
        await self._measuring.evaluate(0)
        await self._all_rounds()
        self._say("waiting for the trainer to end")
        await fitting
        if self._state.admission.newest == 0:
            raise self._state.nothing_trained()
        await self._measuring.ended()

    async def _end_training(self) -> None:
        """No step begins any more. What an earlier life of the run has made is taken up."""
        self.may_train = False
        self._say("going back")
        if self.fit is None:  # an earlier life of the run has come so far
            await self._prepare()
        else:
            self._crew.buffer.close.remote()
            done, _ = await asyncio.wait({asyncio.ensure_future(self.fit)}, timeout=self._config.cluster.deadline_s)
            if not done:
                logger.warning("the trainer has not ended its step; it ends with the run")

    async def _roll_back(self) -> None:
        """The last good version and a part of the step that was too much, or none of it, becomes a new version."""
        back = self._state.way_back()
        self._say(f"going back to {way_back(asdict(back))}")
        call = self._crew.weights.roll_back.remote(*astuple(back), self._state.admission.newest)
        made = await self._watch.answer(call, "weight_store")
        self._state.roll_back(made)
        await self._journal.save()
        await self._pool.prepare(made)

    def fleet(self) -> dict[str, str]:
        """Each generator's state by its name."""
        return self._pool.states()

    def hold(self, held: bool) -> None:
        """Let nothing new begin, or go on."""
        self._watch.hold(held)
        self._pool.hold(held)

    def go_back(self) -> None:
        """End the rounds, as if the guard had said so."""
        self.hold(False)
        self._start(_collapse())

    async def feed(self, name: str, data: bytes) -> Feed:
        """More prompts, from the next round on that has none yet.

        Raises InputError if no such round is left, or for a bad file, ServiceError before the first round.
        """
        async with self._feeding:
            rounds, ledger = self._config.rounds, self._state.ledger
            if self._state.ends_early:
                raise InputError(f"this run goes back to an earlier version and ends; feed the next run with {name}")
            if self._feeds is None:
                raise ServiceError(f"this run begins just now; feed it {name} again in a moment")
            first = next((round for round in range(rounds) if not ledger.size(round)), None)
            if first is None:
                raise InputError(f"all {rounds} rounds of this run have their prompts; feed the next run with {name}")
            feed: Feed = await self._watch.answer(self._crew.evaluator.feed.remote(name, data, first), "evaluator")
            self._feeds.append(feed)
            self._state.prompts_per_round = len(self._prompts(first))
        return feed

    def committed(self, record: Json | None, boxed: list[Any]) -> None:
        """A checkpoint is saved, or (with `record` None) the trainer begins without one."""
        self._commits.put_nowait((record, boxed))

    async def _prepare(self) -> None:
        """Start every actor; take up what an earlier life has left."""
        self._say("starting actors")
        answer, crew, admission = self._watch.answer, self._crew, self._state.admission
        ended = admission.rounds_ended
        await answer(crew.weights.prepare.remote(), "weight_store")  # generators ask it for weights
        _, recovered, (self._train, probe, calibration, self._feeds) = await asyncio.gather(
            self._pool.prepare(admission.newest),
            answer(crew.buffer.prepare.remote(ended, self._without(ended)), "pair_buffer"),
            answer(crew.evaluator.prepare.remote(), "evaluator"),
        )
        self._measuring = Measuring(
            self._state, self._journal, crew.evaluator, self._pool, self._watch, self._config, probe, calibration
        )
        # Not beside the generators: vLLM takes what others load on its GPU while it starts for its own
        await self._scorers.prepare()
        self._state.prompts_per_round = len(self._prompts(0))
        for round, found in recovered.items():
            self._recover(round, found)
        self._state.work_begins()
        for round, without in self._without(ended).items():  # the new buffer must not wait for these
            await answer(crew.buffer.give_up.remote(round, without), "pair_buffer")

    def _without(self, ended: int) -> dict[int, list[int]]:
        """Prompts without pairs of the rounds that are not over."""
        ledger = self._state.ledger
        rounds = range(ended, self._config.rounds)
        found = {r: [*ledger.sequences(r, FILTERED), *ledger.sequences(r, FAILED)] for r in rounds if ledger.size(r)}
        return {round: sequences for round, sequences in found.items() if sequences}

    def _swapped(self, swap: Json) -> None:
        self._journal.record(swap)
        self._state.swapped(swap)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self._tasks.create_task(work)

    def _prompts(self, round: int) -> list[Prompt]:
        feeds = [(feed.first_round, feed.prompts) for feed in self._feeds or ()]
        return prompts_of_round(self._train, round, self._config.prompts_per_round, self._config.seed, feeds)

    def _recover(self, round: int, found: Sequence[Outcome]) -> None:
        """Book what the run directory says about a round in progress.

        A batch counts whole or not at all, or it would be written anew beside what the buffer holds of it: where that
        is something, prompts without traces had failed.
        """
        size, outcomes = len(self._prompts(round)), {outcome.sequence: outcome for outcome in found}
        ledger = self._state.ledger
        ledger.admit(round, size)
        for start in range(0, size, self._size):
            batch = range(start, min(start + self._size, size))
            there = [outcomes[sequence] for sequence in batch if sequence in outcomes]
            if len(there) == len(batch) or any(outcome.num_examples for outcome in there):
                self._state.recovered(round, there)
                lost = set(ledger.sequences(round, IN_FLIGHT)) & set(batch)
                ledger.failed(round, sorted(lost), LOST)

    async def _fit(self) -> None:
        await self._watch.answer_while_moving(self.fit, "the trainer")
        # `committed` and this answer are two messages, and the last commit may still be read from the checkpoint
        until = asyncio.get_running_loop().time() + self._watch.deadline_s
        while self._state.admission.rounds_ended < self._config.rounds:
            if asyncio.get_running_loop().time() > until:
                raise ServiceError(
                    "the trainer ended before the last round; see its log, run the same command to resume"
                )
            await asyncio.sleep(0.1)

    # --- rounds -------------------------------------------------------------------------------------------------

    async def _all_rounds(self) -> None:
        admission = self._state.admission
        self._measuring.beside()  # an earlier life may have ended before it could
        for round in range(admission.rounds_ended, self._config.rounds):
            await self._watch.until(lambda round=round: admission.may_admit(round), "the trainer")  # type: ignore[misc]
            await self._check_reward(round)
            self._state.round = round
            self._say(f"round {round + 1}: generating and scoring")
            await self._admit(round)
        await self._watch.until(lambda: admission.rounds_ended >= self._config.rounds, "the trainer")

    async def _check_reward(self, round: int) -> None:
        """Raises NoPairsError where the policy's rounds begin and those of the reward model had no pairs."""
        settings = self._config.reward_model
        if settings and round == settings.rounds and await asyncio.to_thread(self._store.reward_round, round) is None:
            raise self._state.nothing_trained()

    async def _admit(self, round: int) -> None:
        """Send the batches of a round on their way, in order, as permits come free.

        The earliest unfinished batch always holds a permit, so what the trainer waits for is always being made.
        """
        ledger = self._state.ledger
        async with self._feeding:
            prompts = self._prompts(round)
            ledger.admit(round, len(prompts))
        await self._journal.save()
        waiting, batches = set(ledger.sequences(round, IN_FLIGHT)), []
        for part, first in enumerate(range(0, len(prompts), self._size)):
            if first in waiting:
                await self._permits.acquire()
                batches.append(self._start(self._batch(round, part, first, prompts[first : first + self._size])))
        self._start(self._close(round, batches, len(prompts)))

    async def _batch(self, round: int, part: int, first: int, prompts: Sequence[Prompt]) -> None:
        """One batch on its way, which has a permit."""
        try:
            await self._batches.run(round, part, first, prompts)
        finally:
            self._permits.release()

    async def _close(self, round: int, batches: Sequence[asyncio.Task[None]], size: int) -> None:
        """Every batch of the round has ended: the buffer learns its size. Without pairs the round is over."""
        await asyncio.gather(*batches)
        await self._watch.answer(self._crew.buffer.close_round.remote(round, size), "pair_buffer")
        self._say(f"round {round + 1}: training")
        if not self._state.ledger.sequences(round, PAIRS):
            await self._watch.until(lambda: self._state.admission.rounds_ended == round, "the trainer")
            self._state.had_no_pairs(round)
            await self._over(round)
        self._watch.moved()

    async def _over(self, round: int) -> None:
        """Keep that a round has ended."""
        await self._journal.save()
        await self._watch.answer(self._crew.buffer.end_rounds.remote(round + 1), "pair_buffer")
        if most_gb := self._config.cluster.tables_gb:
            self._start(self._drop_rounds(most_gb))

    async def _drop_rounds(self, most_gb: float) -> None:
        """Make room beside the rounds that go on; what stays this time goes next time."""
        try:
            dropped = await asyncio.to_thread(self._store.drop_rounds, most_gb, self._state.admission.rounds_ended)
        except StorageError as error:
            logger.warning("no old round could be removed: %s", error)
            return
        for round in dropped:
            logger.info("the traces and pairs of round %d are removed: beyond cluster.tables_gb", round + 1)

    # --- commits ------------------------------------------------------------------------------------------------

    async def _take_commits(self) -> None:
        while True:
            record, boxed = await self._commits.get()
            await self._check_checkpoint(record["round"] if record else -1)
            if record is not None:
                await self._commit(record, boxed)
            self._trainer_at = record["round"] + 1 if record else 0
            self._watch.moved()

    async def _check_checkpoint(self, round: int) -> None:
        """Raises StorageError unless the trainer's checkpoint, of `round`, has all that was trained and no gap before.

        -1: it finds none.
        """
        admission, ledger = self._state.admission, self._state.ledger
        over, reward = admission.rounds_ended, None
        if self._config.reward_model:
            reward = await asyncio.to_thread(self._store.reward_round, over)
        last = max([made for made, _ in admission.made()], default=-1 if reward is None else reward)
        missing = [r for r in range(over, round) if not ledger.size(r) or ledger.sequences(r, PAIRS)]
        if (round >= last and not missing) or not self.may_train:  # the run goes back: nothing is trained any more
            return
        found = f"the checkpoint of round {round + 1}" if round >= 0 else "no checkpoint"
        raise StorageError(
            f"{self._store.path('state.json')}: {over} rounds are over, round {last + 1} was the last that was trained,"
            f" but the trainer finds {found} in {self._store.path('checkpoints')}; expected that round's or the next."
            " Restore both from one copy, or begin a new run"
        )

    async def _commit(self, record: Json, boxed: list[Any]) -> None:
        """Publish the version of a saved checkpoint. Being told twice changes nothing."""
        round, version = record["round"], record["version"]
        if round < self._state.admission.rounds_ended or not self.may_train:  # the run goes back: too late
            return
        keep = self._crew.weights.publish_reward if version is None else self._crew.weights.publish
        await self._watch.answer(keep.remote(record, boxed), "weight_store")
        if self._state.rolled_back is not None:  # meanwhile
            return
        self._state.committed(round, version, record["sequences"], record["vitals"], dict(record["left_out"]))
        await self._over(round)
        logger.info("round %d is over: %s", round + 1, "the reward model" if version is None else f"version {version}")
        if version is not None:
            self._pool.publish(version)
            if self.may_train:
                self._measuring.beside()

    def _say(self, message: str) -> None:
        self._state.message = message


async def _collapse() -> None:
    raise Collapse


async def _forward(stop: asyncio.Future[None]) -> None:
    """Raise inside the task group what `stop` holds, without letting its cancellation reach `stop`."""
    await asyncio.shield(stop)
