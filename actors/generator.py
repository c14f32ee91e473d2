"""Writes groups with an engine, each call pinned to a version of the weights."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import ray

from actors.cores import Cores, give_memory_back
from actors.job import Job, device, event
from rlsf_ray.engines.base import Engine, logprob_noise
from rlsf_ray.engines.build import build_engine
from rlsf_ray.errors import EngineError, WeightsError
from rlsf_ray.records import Canary, Group, Json, Prompt, WeightsVersion
from rlsf_ray.rollouts.programs import write_calibration_groups, write_groups, write_probe_groups
from rlsf_ray.stream.delivery import Delivery, judge

logger = logging.getLogger(__name__)


class Generator:
    """One engine. With vLLM many calls run at once, and a version is loaded while older ones still write."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._name = job, name
        self._engine: Any = None
        self._cores: Any = None
        self._versions: list[int] = []
        self._using = Counter[int]()  # version -> calls that write with it
        self._counting, self._loading = threading.Lock(), threading.Lock()
        self._changing = threading.RLock()  # held from when a version goes in until calls may write with it

    def prepare(self, version: int) -> Json | None:
        """Build the engine and load `version`."""
        return self.load_version(version)

    def _build(self) -> None:
        """Build the engine if there is none: at the first call, or at the first call after a restart."""
        if self._engine is None:
            store = self._job.enter(self._name, threads=0)
            self._config = store.config
            pool = self._config.cluster.generators
            self._cores = self._cores or Cores(pool)
            self._engine = build_engine(self._config, threads=pool.threads, device=device(pool))

    def load_version(self, version: int) -> Json | None:
        """Fetch `version` from the WeightStore and prove that the engine writes with it; None if it is held already.

        Every batch begins here, so a generator that Ray restarted while nobody watched comes back by itself.
        Returns a stage event with the proof. Raises WeightsError if a second load proves nothing better.
        """
        with self._loading:
            self._build()
            try:
                return self._take_in(version)
            except EngineError:
                self._drop_if_dead()
                raise

    def _take_in(self, version: int) -> Json | None:
        if version == 0 or version in self._versions:
            return None
        start = time.time()
        weights, before, adapter, canaries = self._fetch(version)
        with self._kept(before) as held, ExitStack() as changing:
            new = [(weights, adapter)] if held else [self._fetch(before)[::2], (weights, adapter)]
            for loads in (1, 2):
                try:
                    delivery = self._load_and_prove(new, before, canaries, changing)
                    break
                except WeightsError as error:
                    logger.warning("version %d has not arrived: %s", version, error)
                    for unproved, _ in new:
                        self._engine.forget_version(unproved.version)
                    if loads == 2:
                        raise WeightsError(f"{self._name} took version {version} in twice, in vain: {error}") from error
            arrived = {loaded.version for loaded, _ in new}
            self._versions = sorted({*self._versions, *arrived})  # from here on calls may write with them
        swapped = event("generator", self._name, "swap", version - 1, start)
        return swapped | {"version": version, "loads": loads, **asdict(delivery)}

    def _load_and_prove(
        self, new: Sequence[tuple[WeightsVersion, Any]], before: int, canaries: Sequence[Canary], changing: ExitStack
    ) -> Delivery:
        """Load adapters, the last of which is to be proved; `changing` keeps new batches waiting while it goes in.

        Raises WeightsError, with the numbers, if the proof fails.
        """
        for weights, adapter in new:
            self._load(weights, adapter)
        version = new[-1][0].version
        delivery = self._prove(version, before, canaries, changing)
        if delivery.verdict == "failed":
            raise WeightsError(
                f"the engine does not write with version {version}: its log-probs on {len(canaries)} canaries"
                f" {delivery}; look at the generator's log, run the same command again"
            )
        return delivery

    def _drop_if_dead(self) -> None:
        """An engine whose process has died is built anew at the next call."""
        if self._engine is not None and not self._engine.alive():
            self._engine.close()
            self._engine, self._versions = None, []

    def _fetch(self, version: int) -> tuple[WeightsVersion, int, Any, list[Canary]]:
        """(name and checksum, version before, adapter, canaries)."""
        deadline_s = self._config.cluster.deadline_s
        weights, before, boxed = ray.get(self._job.actor("weight_store").get.remote(version), timeout=deadline_s)
        return weights, before, *ray.get(boxed[0], timeout=deadline_s)

    def _load(self, weights: WeightsVersion, adapter: Any) -> None:
        """Make room and load. Raises WeightsError if what arrived is not what was published."""
        for version in self._versions[: -(self._config.cluster.max_staleness + 1)]:
            self._forget(version)
        held = self._engine.load_version(weights.version, adapter)
        if held != weights.checksum:
            raise WeightsError(
                f"{self._name} loaded version {weights.version} with checksum {held}, expected {weights.checksum};"
                " the weights changed on their way, run the same command again"
            )

    def _forget(self, version: int) -> None:
        """Drop a version, unless somebody writes with it."""
        with self._counting:
            if self._using[version]:
                return
            self._versions.remove(version)
        self._engine.forget_version(version)

    def _prove(self, version: int, before: int, canaries: Sequence[Canary], changing: ExitStack) -> Delivery:
        if not canaries:  # a version of an older run
            return judge([], [], [], [], logprob_noise(self._config))
        texts = [(canary.prompt_ids, canary.token_ids) for canary in canaries]
        with self._cores.turn():
            old = self._engine.logprobs(texts, before)  # among what is being written
            changing.enter_context(self._changing)
            new = self._engine.logprobs(texts, version)
        trained_old, trained_new = [canary.before for canary in canaries], [canary.after for canary in canaries]
        return judge(old, new, trained_old, trained_new, logprob_noise(self._config))

    def _newest(self, version: int) -> int:
        """`version`; where only one can be in, the newest, even if it is still on its way: nobody swaps back for us."""
        engine = self._engine
        if engine is None or not engine.one_version:
            return version
        with self._changing:
            return max([version, *self._versions])

    @contextmanager
    def _writing(self, version: int) -> Iterator[tuple[Engine, Json]]:
        """(engine with `version` loaded, {"swap": the event of loading it, if that was needed}), at this actor's turn.

        The version stays while it is in use.
        """
        with self._kept(version) as held:
            engine = self._engine if held else None  # another version may be on its way in: no need to wait for it
            swap = None
            if engine is None:
                swap = self.load_version(version)
                engine = self._engine
            if engine is None:
                raise EngineError(f"{self._name}: the engine died while version {version} was asked for")
            try:
                with self._cores.turn():
                    yield engine, {"swap": swap} if swap else {}
            except EngineError:
                with self._loading:
                    self._drop_if_dead()
                raise

    @contextmanager
    def _kept(self, version: int) -> Iterator[bool]:
        """`version` is not dropped meanwhile; yields whether it is held now."""
        with self._counting:
            self._using[version] += 1
            held = version in (0, *self._versions)
        try:
            yield held
        finally:
            with self._counting:
                self._using[version] -= 1

    def write(
        self, prompts: Sequence[Prompt], round: int, first_sequence: int, version: int
    ) -> tuple[list[Group], Json]:
        """(groups, stage event) for one batch of training prompts, by `version` or a newer one."""
        version = self._newest(version)
        with self._writing(version) as (engine, news):
            start = time.time()
            groups = write_groups(
                engine, prompts, config=self._config, round=round, first_sequence=first_sequence, version=version
            )
            done = event("generator", self._name, "generate", round, start, num_tokens(groups)) | engine.usage() | news
            give_memory_back()
        return groups, done

    def probe(
        self, prompts: Sequence[Prompt], first_sequence: int, version: int
    ) -> tuple[dict[str, list[Group]], Json]:
        """(groups of each kind, stage event) for one batch of probe prompts."""
        groups, done = self._measure(write_probe_groups, prompts, first_sequence, version)
        tokens = sum(num_tokens(part) for part in groups.values())
        return groups, done | {"tokens": tokens}

    def calibrate(self, prompts: Sequence[Prompt], first_sequence: int, version: int) -> tuple[list[Group], Json]:
        """(groups, stage event) for one batch of calibration prompts."""
        groups, done = self._measure(write_calibration_groups, prompts, first_sequence, version)
        return groups, done | {"tokens": num_tokens(groups)}

    def _measure(self, write: Any, prompts: Sequence[Prompt], first_sequence: int, version: int) -> tuple[Any, Json]:
        with self._writing(version) as (engine, news):
            start = time.time()
            written = write(engine, prompts, config=self._config, version=version, first_sequence=first_sequence)
            done = event("generator", self._name, "probe", max(0, version - 1), start) | engine.usage() | news
            give_memory_back()
        return written, done


def num_tokens(groups: Sequence[Group]) -> int:
    """Tokens written."""
    return sum(len(trace.token_ids) for group in groups for trace in group.traces)
