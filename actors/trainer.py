"""What the workers of the training job do: lease groups, train, one checkpoint a round."""

from __future__ import annotations

import errno
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from actors.cores import Cores, give_memory_back
from actors.job import Job, event
from actors.weight_store import ADAPTER_FILE
from rlsf_ray.adapters import CANARY_FILE, canaries_to_bytes, checksum, to_bytes
from rlsf_ray.engines.base import logprob_noise
from rlsf_ray.engines.learner import Learner, steps_in
from rlsf_ray.engines.steps import StepSize, pass_order, surest, training_steps
from rlsf_ray.errors import DrainedError, NonFiniteLossError, StorageError, WeightsError
from rlsf_ray.loop import step_row
from rlsf_ray.records import Json, TrainingGroup
from rlsf_ray.run_store import TRAINED_FILE
from rlsf_ray.vitals import training_vitals

logger = logging.getLogger(__name__)

WAIT_S = 5.0  # rank 0 tells the others "nothing yet" this often, which keeps collectives far from their time-out
HOLD_S = 1.0  # a paused run is asked again this often
WIDE = 3.0  # times the engine's noise: a gap of log-probs that weights which should be equal do not explain
LEASE = 16  # groups a lease may hold
STATE_FILE, RECORD_FILE = "learner.safetensors", "record.json"


class Worker:
    """One rank. Rank 0 leases groups and leads; every rank trains its share of each step."""

    def __init__(self, job: Job) -> None:
        context = ray.train.get_context()
        self._rank, self._world = context.get_world_rank(), context.get_world_size()
        self._store = job.enter(f"trainer-{self._rank}", threads=0)
        self._config = self._store.config
        self._coordinator, self._buffer = job.actor("coordinator"), job.actor("pair_buffer")
        pool = self._config.cluster.trainers
        self._cores = Cores(pool)
        where = str(ray.train.torch.get_device()) if pool.gpus else "cpu"
        self._new_learner = partial(Learner, self._config, threads=pool.threads, device=where)
        self._learner: Learner
        self._versions = [0]  # published before the round in work
        self._before: dict[str, np.ndarray] = {}  # the adapter at the beginning of the round
        self._left_out: list[tuple[int, int]] = []  # (sequence, pairs) of the round in work
        self._times = Counter[str]()  # how often each example of the round in work was trained
        self._round_size = 0  # prompts of the round in work, once all have been leased
        self._gap: float | None = None  # to the generators' log-probs at the round's first step

    def run(self) -> None:
        """Every round from the last checkpoint on."""
        first = self._resume()
        for round in range(first, self._config.rounds):
            if self._config.reward_model and round == self._config.reward_model.rounds > first:
                steps = self._learner.steps
                del self._learner  # the reward model's: one at a time in memory
                self._learner = self._new_learner(steps_before=steps)
            self._before, self._gap, self._left_out = self._learner.adapter(), None, []
            self._times.clear()
            trained = self._lead(round) if self._rank == 0 else self._follow()
            if trained:
                self._report(round, trained)

    def _resume(self) -> int:
        """Load the newest checkpoint if there is one; returns the round to go on with."""
        checkpoint, record, state = ray.train.get_checkpoint(), None, b""
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                record = json.loads((Path(folder) / RECORD_FILE).read_text())
                state = (Path(folder) / STATE_FILE).read_bytes()
            self._versions = record["versions"]
        first = record["round"] + 1 if record else 0
        of_reward = self._config.trains_reward(first)
        policy_begins = record is not None and not of_reward and record["version"] is None
        self._learner = self._new_learner(reward=of_reward, steps_before=steps_in(state) if policy_begins else 0)
        if record is not None and not policy_begins:
            self._learner.load_state_bytes(state)
        if self._rank == 0:
            ready = self._coordinator.trainer_ready.remote(record, [checkpoint])
            ray.get(ready, timeout=self._config.cluster.deadline_s)
        return first

    def _lead(self, round: int) -> list[TrainingGroup]:
        """Rank 0's round: lease, send each step to the others, train. Returns the groups that it has trained.

        The first pass trains as groups arrive, unless only the surest of the round are to be trained.
        """
        groups: list[TrainingGroup] = []
        size = self._config.examples_per_step(round)
        try:
            arriving: Iterable[TrainingGroup] = self._leased(round, groups)
            if self._config.keeps_surest(round):
                known = list(arriving)
                groups, others = surest(known, self._config.most_prompts(round, self._round_size))
                self._left_out = [(group.sequence, group.num_examples) for group in others]
                arriving = groups
            for pass_index in range(self._config.epochs(round)):
                order = arriving if pass_index == 0 else pass_order(groups, self._config.seed, round, pass_index)
                for step in training_steps(order, size):
                    self._may_step()
                    self._send(("step", step, round, pass_index))
                    self._step(step, round, pass_index)
        except DrainedError:
            self._send(("drain",))
            raise
        self._send(("end", bool(groups)))
        return groups

    def _follow(self) -> bool:
        """Another rank's round: train what rank 0 sends. Returns whether the round had groups."""
        while True:
            kind, *content = self._receive()
            if kind == "step":
                self._step(*content)
            elif kind == "end":
                return bool(content[0])
            elif kind == "drain":
                raise DrainedError("the run is draining")

    def _leased(self, round: int, taken: list[TrainingGroup]) -> Iterator[TrainingGroup]:
        """The round's groups as they arrive, in admission order; they are added to `taken`."""
        first, deadline_s = 0, self._config.cluster.deadline_s
        while True:
            lease = ray.get(self._buffer.lease.remote(round, first, LEASE, WAIT_S), timeout=WAIT_S + deadline_s)
            if lease is None:
                raise DrainedError("the run is draining")
            for group in lease.groups:
                self._check_age(group)
                taken.append(group)
                yield group
            first = self._round_size = lease.next_sequence
            if lease.ended:
                return
            if not lease.groups:  # a generator or scorer computes
                give_memory_back()
            self._send(("nothing yet",))

    def _check_age(self, group: TrainingGroup) -> None:
        written = min(trace.version for trace in group.traces)
        age = sum(version > written for version in self._versions)
        if age > self._config.cluster.max_staleness:
            raise WeightsError(
                f"group {group.id} was written by version {written}, {age} versions ago; expected at most"
                f" max_staleness={self._config.cluster.max_staleness}; this is a fault of admission"
            )

    def _step(self, step: Sequence[TrainingGroup], round: int, pass_index: int) -> None:
        """One optimiser step, which rank 0 records."""
        alone = self._cores.turn() if self._world == 1 else nullcontext()  # ranks wait for each other
        try:
            with alone:
                start = time.time()
                report = self._learner.train_step(
                    step[self._rank :: self._world],
                    size=StepSize.of(step),
                    round=round,
                    pass_index=pass_index,
                    newest=self._versions[-1],
                    all_reduce=_sum_over_ranks if self._world > 1 else None,
                )
        except NonFiniteLossError as error:
            found: Json = {"round": round, "pass": pass_index, "rank": self._rank, "error": str(error)}
            self._store.write_json("nonfinite.json", found | {"groups": [group.id for group in step]})
            raise
        self._times.update(example for group in step for example in group.example_ids)
        if self._rank == 0:
            self._store.append_metrics("train", [step_row(report)])
            self._look_at_gap(step, report.logprob_gap)
            tokens = sum(group.num_tokens for group in step)
            done = event("trainer", "trainer-0", "train", round, start, tokens)
            self._coordinator.stepped.remote(done, report.step)

    def _may_step(self) -> None:
        """Return once a step may begin: not while the run is paused. Raises DrainedError if it is to end."""
        deadline_s = self._config.cluster.deadline_s
        while (word := ray.get(self._coordinator.word.remote(), timeout=deadline_s)) == "wait":
            self._send(("nothing yet",))
            time.sleep(HOLD_S)
        if word == "stop":
            raise DrainedError("the run is draining")

    def _look_at_gap(self, step: Sequence[TrainingGroup], gap: float) -> None:
        """Warn if the generators' log-probs are far from ours under weights that should be the same."""
        fresh = self._gap is None
        if fresh:
            self._gap = gap
        same = all(trace.version == self._versions[-1] for group in step for trace in group.traces)
        noise = logprob_noise(self._config)
        if fresh and same and gap > WIDE * noise:
            logger.warning(
                "version %d: log-probs of the trainer are %.3g nats a token from the generators' (expected about %.3g"
                " from rounding): look at the swaps of this version in the report, and at engine_args",
                self._versions[-1],
                gap,
                noise,
            )

    def _report(self, round: int, groups: list[TrainingGroup] | bool) -> None:
        """Save the learner, the adapter of the next version and what it was trained on as one checkpoint."""
        of_reward = self._config.trains_reward(round)  # that makes no version: the policy is still the base model
        version = None if of_reward else round + 1
        if not of_reward:
            self._versions = [*self._versions, round + 1]
        if self._rank != 0 or isinstance(groups, bool):
            ray.train.report({})
            return
        adapter = self._learner.adapter()
        record = {
            "round": round,
            "version": version,
            "versions": self._versions,
            "checksum": checksum(adapter),
            "sequences": [group.sequence for group in groups],
            "left_out": self._left_out,
            "vitals": training_vitals(groups, self._gap or 0.0),
        }
        with self._cores.turn():
            canaries = b"" if of_reward else canaries_to_bytes(self._learner.canaries(groups, self._before))
            give_memory_back()
        with tempfile.TemporaryDirectory() as folder:
            with room_in(folder):
                Path(folder, ADAPTER_FILE).write_bytes(to_bytes(adapter))
                Path(folder, STATE_FILE).write_bytes(self._learner.state_bytes())
                Path(folder, CANARY_FILE).write_bytes(canaries)
                Path(folder, RECORD_FILE).write_text(json.dumps(record))
                trained = {"from": checksum(self._before), "times": self._times}
                Path(folder, TRAINED_FILE).write_text(json.dumps(trained))
            with room_in(self._store.path("checkpoints")):
                ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _send(self, message: tuple[Any, ...]) -> None:
        if self._world > 1:
            dist.broadcast_object_list([message], src=0)

    def _receive(self) -> Any:
        box = [None]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def room_in(folder: str) -> Iterator[None]:
    """Raises StorageError that names `folder` when a disk is full or a quota used up."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"no room for a checkpoint in {folder} ({error}); expected space for the adapter and three times as much"
            " for the optimiser: free space there (old runs first), then run the same command to resume"
        ) from error


def _sum_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Sum tensors of one type over the ranks in place, in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if dist.get_backend() == "nccl":
        flat = flat.cuda()
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
