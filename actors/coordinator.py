"""The one detached actor of a run: creates the others, lets `Rounds` run, answers questions, cleans up."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any, Literal

import ray

from actors.gauges import Gauges
from actors.job import Job, check_source
from actors.journal import Journal
from actors.leftovers import free_left_groups
from actors.notices import Notices
from actors.rounds import Rounds
from actors.spawn import Crew
from actors.watch import Watch, plain
from rlsf_ray.errors import DrainedError, RlsfError, ServiceError, StorageError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.effort import Effort, devices
from rlsf_ray.stream.limits import NO_LIMITS, Limits
from rlsf_ray.stream.run_state import RunState

logger = logging.getLogger(__name__)

Word = Literal["go on", "wait", "stop"]

STOP_S = 14.0  # the trainer may take so long to end its step
REMOVE_S = 5.0  # and the actors so long to disappear: together under the promised 20 s
LINGER_S = 10.0  # how long the outcome waits for a driver to read it
LEAVE_S = 2.0  # for the answer to be on its way
ALONE_S = 60.0  # how long a coordinator that no driver has started stays
LOOK_S = 1.0  # how often limits are looked at and news are told
LOOKS_A_TELLING, LOOKS_LEFT, LOOKS_A_DISK = 5, 10, 60  # every so many: metrics, what was left behind, the disk


class Coordinator:
    """Async: every method returns at once, the run goes on in one task."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._work: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._ended, self._read, self._in_haste = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._summary: Json | None = None
        self._error: RlsfError | None = None
        self._state: RunState | None = None
        self._journal: Journal | None = None
        self._effort: Effort | None = None
        self._rounds: Rounds | None = None
        self._crew: Crew | None = None
        self._watch: Watch | None = None
        self._limits, self._notices = NO_LIMITS, Notices(job.run, None)
        self._stage: Literal["begins", "goes on", "ends"] = "begins"
        self._lock = ExitStack()  # of the run directory
        self._idle_cpu_s = time.process_time()  # spent on imports, before any work
        self._alone = threading.Timer(ALONE_S, self._give_up)  # no event loop runs yet
        self._alone.daemon = True
        self._alone.start()

    def _give_up(self) -> None:
        """End this actor: its driver was killed before it could say `start`."""
        if self._work is None:
            ray.kill(self._job.actor("coordinator"))

    async def start(self, source: str, limits: Limits, webhook: str | None) -> None:
        """Begin the run, or join one that has begun; limits that are given hold from now on, a webhook from the start.

        Raises ServiceError if the sources differ.
        """
        try:
            check_source(source, f"the coordinator of run {self._job.run}")
        except ServiceError:
            self._leaving = asyncio.create_task(self._leave(LEAVE_S))
            raise
        if limits != NO_LIMITS:
            logger.info("from now on: %s", limits)
            self._limits = limits
        if self._work is None:
            self._notices = Notices(self._job.run, webhook)
            self._alone.cancel()
            self._stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._work = asyncio.create_task(self._run())

    async def status(self, peak_memory_gb: float | None = None) -> Json:
        """The keys of loop.py's status, "root", "ending" (no way back to work) and "ended".

        The driver of an embedded run tells its memory here.
        """
        if self._state and peak_memory_gb:
            self._state.peak_memory_gb = max(peak_memory_gb, self._state.peak_memory_gb or 0.0)
        status = self._state.status() if self._state else {"run": self._job.run, "state": "starting"}
        ending = self._leaving is not None or (self._work is not None and self._stop.done())
        if self._rounds and self._state and self._effort:
            examples = self._state.examples - self._examples_before
            spent = {"idle": self._effort.idle(), "device_s_per_example": self._effort.per_example(examples)}
            status |= spent | {"fleet": self._rounds.fleet(), "staleness": self._state.staleness}
        return status | {"root": self._job.root, "ending": ending, "ended": self._ended.is_set()}

    async def outcome(self) -> tuple[Json | None, RlsfError | None]:
        """(summary, None) or (None, error), once the run has ended and everything is torn down."""
        await self._ended.wait()
        self._read.set()
        return self._summary, self._error

    async def drain(self, now: bool = False) -> bool:
        """Stop soon, resumable; `now`: without waiting for the optimiser step. `outcome` tells when it is done.

        Returns False where the run ends by itself just now.
        """
        if now:
            self._in_haste.set()
        if self._stage == "ends":
            return self._stop.done()
        self._end(DrainedError(f"run {self._job.run} was asked to stop; the same command resumes it"))
        return True

    async def hold(self, held: bool) -> None:
        """Pause: no batch and no optimiser step begins; or go on. Raises ServiceError if the run is not going on."""
        state, rounds = self._ordered()
        rounds.hold(held)
        logger.info("%s by an operator", "paused" if held else "resumed")
        state.state = "paused" if held else "running"
        if self._journal is not None:
            await self._journal.save()  # an order that was taken outlives this process

    async def roll_back(self, version: int) -> None:
        """End the run on the content of an older version. Raises ServiceError or InputError where that cannot be."""
        state, rounds = self._ordered()
        state.ask_back(version)
        logger.info("an operator wants to go back to version %d", version)
        state.state = "running"
        rounds.go_back()
        if self._journal is not None:
            await self._journal.save()  # an order that was taken outlives this process

    async def feed(self, name: str, data: bytes) -> Json:
        """Take a file's prompts into the run: {"prompts", "known", "first_round", "room": of the rounds from there on}.

        Raises InputError for a bad file, ServiceError if the run is not going on.
        """
        state, rounds = self._ordered()
        feed = await rounds.feed(name, data)
        logger.info("fed with %d prompts of %s from round %d on", len(feed.prompts), name, feed.first_round + 1)
        told = {"prompts": len(feed.prompts), "known": feed.known, "first_round": feed.first_round}
        return told | {"room": state.room(feed.first_round)}

    def _ordered(self) -> tuple[RunState, Rounds]:
        """What an order changes. Raises ServiceError where it would come too early or too late."""
        if self._stage != "goes on" or self._state is None or self._rounds is None or self._stop.done():
            stage = "begins" if self._stage == "begins" else "ends"
            cure = "try again in a moment" if stage == "begins" else "the same `rlsf run` resumes what is not done"
            raise ServiceError(f"run {self._job.run} {stage} just now, expected one that goes on; {cure}")
        return self._state, self._rounds

    async def train_failed(self, error: RlsfError) -> None:
        """A training worker met an error that no retry can cure."""
        self._end(error)

    async def trainer_ready(self, record: Json | None, boxed: list[Any]) -> None:
        """The trainer has begun, from the checkpoint of `record` or from nothing."""
        if self._rounds is not None:
            self._rounds.committed(record, boxed)

    async def committed(self, record: Json, boxed: list[Any]) -> None:
        """Ray Train has saved the checkpoint of `record`."""
        if self._rounds is not None:
            self._rounds.committed(record, boxed)

    async def stepped(self, done: Json, step: int) -> None:
        """One optimiser step is done (`done`: its stage event)."""
        if self._state is not None and self._watch is not None and self._journal is not None:
            self._state.counts["steps"] = step
            self._watch.moved()
            self._journal.record(done)

    async def word(self) -> Word:
        """May the trainer begin a step?"""
        if self._stop.done() or (self._rounds is not None and not self._rounds.may_train):
            return "stop"
        return "wait" if self._watch is not None and self._watch.held else "go on"

    def _end(self, error: RlsfError) -> None:
        if self._work is not None and not self._stop.done():
            self._stop.set_exception(error)

    async def _run(self) -> None:
        try:
            self._summary = await self._life()
        except (Exception, asyncio.CancelledError) as error:  # supervision: every failure becomes the outcome
            logger.warning("run %s ends: %s", self._job.run, error, exc_info=not isinstance(error, DrainedError))
            self._error = plain(error)
        try:
            await self._close()
        except Exception as error:
            logger.exception("run %s: clean-up failed", self._job.run)
            self._error = self._error or ServiceError(f"clean-up failed: {error}; see the coordinator's log")
        finally:
            self._lock.close()
        if self._state is not None:
            self._notices.tell([*self._state.news, {"event": self._state.state, "text": self._state.last_words}])
        self._ended.set()
        await self._notices.ended()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._read.wait(), LINGER_S)
        await self._leave(LEAVE_S)

    async def _leave(self, seconds: float) -> None:
        """End this actor, unless it has work by then."""
        await asyncio.sleep(seconds)
        if self._work is None or self._ended.is_set():
            ray.kill(ray.get_runtime_context().current_actor)

    async def _life(self) -> Json:
        store = await asyncio.to_thread(self._job.enter, "coordinator")
        await asyncio.to_thread(self._lock.enter_context, store.storage.lock())
        saved = await asyncio.to_thread(store.read_json, "state.json")
        summary: Json | None = await asyncio.to_thread(store.read_json, "summary.json")
        self._state = RunState(self._job.run, store.config, saved)
        self._effort, self._examples_before = Effort(devices(self._job.gpus)), self._state.examples
        self._journal = Journal(store, self._state, self._effort)
        if summary is not None and self._state.state == "done":
            return summary
        held = self._state.state == "paused"  # by an operator, in a life that was killed
        self._state.state = "running"
        self._watch = Watch(store.config.cluster.deadline_s)
        self._crew = await asyncio.to_thread(Crew, self._job, store.config)
        self._rounds = Rounds(store, self._state, self._journal, self._crew, self._watch)
        supervision = asyncio.create_task(self._supervise(self._state, store))
        self._stage = "goes on"
        try:
            if held and not self._stop.done():
                await self.hold(True)
            await self._rounds.run(self._stop)
        finally:
            self._stage = "ends"
            supervision.cancel()
        return await self._finish(self._state, self._journal, self._crew, self._watch)

    async def _supervise(self, state: RunState, store: RunStore) -> None:
        """Tell what is new and how things stand, and drain the run at a limit."""
        gauges = Gauges(self._job.run)
        for look in itertools.count():
            await asyncio.sleep(LOOK_S)
            if reached := self._limits.reached(state.seconds, state.counts["tokens"]):
                self._end(DrainedError(f"run {self._job.run} {reached}; the same command with a higher limit resumes"))
            try:
                store.storage.check_lock()
            except StorageError as error:
                self._end(error)
            try:
                await self._tell(look, gauges, state, store)
            # Supervision: of Ray's tables, a disk, a package of metrics. The limits above must go on being looked at
            except Exception:
                logger.exception("a look at the run has failed; the run goes on")

    async def _tell(self, look: int, gauges: Gauges, state: RunState, store: RunStore) -> None:
        """One look: metrics, the disk, what other lives have left, and the news to the webhook."""
        news, state.news = state.news, []
        self._notices.tell(news)
        if look % LOOKS_LEFT == 0:  # a coordinator before us may have been killed
            await asyncio.to_thread(free_left_groups)
        if look % LOOKS_A_TELLING == 0:
            gauges.tell(await self.status())
        if look % LOOKS_A_DISK == 0:
            state.on_disk(await asyncio.to_thread(store.storage.used))

    async def _finish(self, state: RunState, journal: Journal, crew: Crew, watch: Watch) -> Json:
        """Have the summary, with what control has cost in this life of the run, and the report written."""
        state.message = "writing the report"
        await journal.save()  # the report reads the stage events
        buffer_s = await watch.answer(crew.buffer.processor_time.remote(), "pair_buffer")
        coordinator_s = time.process_time() - self._idle_cpu_s
        share = (coordinator_s + buffer_s) / state.seconds_of_this_life
        control = {"coordinator_s": coordinator_s, "buffer_s": buffer_s, "share": share}
        measured = state.measured() | {"control": control}
        summary: Json = await watch.answer(crew.evaluator.summary.remote(measured), "evaluator")
        state.state, state.message = "done", ""
        await journal.save()
        return summary

    async def _close(self) -> None:
        """Let the trainer end its step, then remove every actor and the placement group, within a deadline."""
        if self._error is not None and self._state is not None:
            self._state.stopped(self._error)
        if self._crew is not None and self._rounds is not None:
            ended = True
            if self._rounds.fit is not None and self._summary is None:
                ended = await self._stop_training(self._crew, self._rounds.fit)
            await self._crew.dismiss(REMOVE_S, leaves_group=not ended)
        if self._error is not None and self._journal is not None:
            await self._journal.save()

    async def _stop_training(self, crew: Crew, fit: Any) -> bool:
        """Returns whether the trainer has ended by itself."""
        self._end(DrainedError("the run ends"))  # `word` says no from now on
        crew.stop_generating()
        crew.buffer.close.remote()
        haste = asyncio.create_task(self._in_haste.wait())
        fitted = asyncio.ensure_future(fit)
        await asyncio.wait({fitted, haste}, timeout=STOP_S, return_when=asyncio.FIRST_COMPLETED)
        haste.cancel()
        return fitted.done()
