"""A run whose model is simulated: it takes its time without computing, and writes drawn tokens. All else is real.

Every actor begins with `Job.enter`. That of `SimulatedJob` puts the parts below in place of those that would load the
model, in the actor's own process; `service.run` inside `simulated` is then the service as it is, down to its files:
coordinator, pools, buffer, store, training job, and proofs of delivery that fail if a version does not arrive.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from actors.job import Job
from rlsf_ray import service
from rlsf_ray.adapters import checksum, from_peft, to_bytes
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Adapter, Completion, Request
from rlsf_ray.records import Canary, FloatArray, Group, IntArray, Json, Prompt, StepReport, TrainingGroup
from rlsf_ray.run_store import RunStore

FOLDER = Path(__file__).parent
TOKENS, CHARACTERS = 33, 4  # of a trace, the mean of bench_vllm.json; of a token
ANSWERS = 3  # so many different ones are drawn
CANARIES = 16
STEP = 1e-3  # nats by which a step moves the log-prob of every token: ten times the noise of float32
ADAPTER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
SHAPES = {"A": (16, 1024), "B": (1024, 16)}  # 128 KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedJob(Job):
    """A job whose generators take `service_s` for a batch, and work on so many at once."""

    service_s: float
    slots: int

    def enter(self, role: str, *, threads: int | None = None) -> RunStore:
        """See `Job.enter`. Nobody computes here: torch, which only its threads would load, stays out of generators."""
        store = Job.enter(self, role)
        match role.partition("-")[0]:
            case "coordinator":
                from actors.spawn import MOST_SLOTS

                MOST_SLOTS[store.config.engine] = self.slots
            case "generator":
                import actors.generator

                actors.generator.build_engine = lambda config, **place: SimulatedEngine(self.service_s)
            case "scorer":
                from rlsf_ray.engines.judge import Judge

                Judge.load, Judge.reference = (lambda judge: None), drawn_reference
            case "trainer":
                import actors.trainer

                actors.trainer.Learner = SimulatedLearner
        return store


@contextmanager
def simulated(service_s: float, slots: int) -> Iterator[None]:
    """Runs that `service.run` begins in the block are simulated ones; their actors find this module."""
    job = partial(SimulatedJob, service_s=service_s, slots=slots)
    paths = os.pathsep.join([str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    with patch.object(service, "Job", job), patch.dict(os.environ, PYTHONPATH=paths):
        yield


class SimulatedEngine:
    """What the rollout `sample` asks of an `Engine`. Drawing the tokens is a part of the service time."""

    one_version = False

    def __init__(self, service_s: float) -> None:
        self._service_s, self._moves = service_s, {0: 0.0}

    def encode(self, prompt: Prompt) -> IntArray:
        """A token for each character."""
        return np.frombuffer(prompt.messages[-1][1].encode(), dtype=np.uint8).astype(np.int32)

    def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
        """Drawn completions, after the service time."""
        until = time.monotonic() + self._service_s
        move = self._moves[version]
        written = [[drawn_completion(seed, move) for seed in request.seeds] for request in requests]
        time.sleep(max(0.0, until - time.monotonic()))
        return written

    def load_version(self, version: int, adapter: Adapter) -> str:
        """Take the move out of the arrays that have arrived."""
        self._moves[version] = move_of(adapter)
        return checksum(adapter)

    def forget_version(self, version: int) -> None:
        self._moves.pop(version, None)

    def logprobs(self, texts: Sequence[tuple[IntArray, IntArray]], version: int) -> list[FloatArray]:
        """See `logprobs_of`."""
        return [logprobs_of(trace, self._moves[version]) for _, trace in texts]

    def usage(self) -> Json:
        """There is room for every batch that the pool may send."""
        return {"kv_usage": 0.0}

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        pass


class SimulatedLearner:
    """What a training worker asks of a `Learner`. A step takes no time and moves every log-prob by STEP."""

    def __init__(self, config: RunConfig, **place: Any) -> None:
        self.steps = 0

    def train_step(
        self, groups: Sequence[TrainingGroup], *, size: Any, round: int, pass_index: int, **more: Any
    ) -> StepReport:
        """One step."""
        self.steps += 1
        sums = {"loss": float(size.examples)}
        return StepReport(
            round=round, step=self.steps, pass_index=pass_index, num_examples=size.examples, sums=sums, grad_norm=1.0
        )

    def adapter(self) -> dict[str, np.ndarray]:
        """Arrays in PEFT's form that hold the move."""
        return {
            ADAPTER.format(side): np.full(shape, STEP * self.steps, dtype=np.float32) for side, shape in SHAPES.items()
        }

    def canaries(self, groups: Sequence[TrainingGroup], before: Adapter) -> list[Canary]:
        """Of the first traces of the round."""
        texts = [(group.prompt_ids, trace.token_ids) for group in groups[:CANARIES] for trace in group.traces]
        old, new = move_of(before), move_of(self.adapter())
        return [
            Canary(prompt_ids=prompt, token_ids=trace, before=logprobs_of(trace, old), after=logprobs_of(trace, new))
            for prompt, trace in texts[:CANARIES]
        ]

    def state_bytes(self) -> bytes:
        """See `load_state_bytes`."""
        return to_bytes({"step": np.array([self.steps])})

    def load_state_bytes(self, state: bytes) -> None:
        """Go on from what `state_bytes` gave."""
        self.steps = int(from_peft(state)["step"][0])


def move_of(adapter: Mapping[str, np.ndarray]) -> float:
    """By how much the model with this adapter is from the base model, in nats a token."""
    return float(adapter[ADAPTER.format("B")][0, 0])


def logprobs_of(token_ids: IntArray, move: float) -> FloatArray:
    """What the simulated model gives to tokens [T]: -1 to -2, and the adapter's move."""
    return (move - 1.0 - token_ids % 16 / 16).astype(np.float32)


def drawn_completion(seed: int, move: float) -> Completion:
    """A trace of TOKENS drawn tokens that ends with a drawn digit."""
    draw = np.random.default_rng(seed)
    token_ids = draw.integers(0, 1000, TOKENS, dtype=np.int32)
    top1 = draw.uniform(0.5, 1.0, TOKENS).astype(np.float32)
    starts = CHARACTERS * np.arange(TOKENS, dtype=np.int32)
    return Completion(
        token_ids=token_ids,
        logprob=logprobs_of(token_ids, move),
        top1=top1,
        top2=1 - top1,
        text=("and so on " * TOKENS)[: CHARACTERS * TOKENS - 2] + f" {draw.integers(ANSWERS)}",
        char_spans=np.stack([starts, starts + CHARACTERS], axis=1),
        finished=True,
    )


def drawn_reference(judge: Any, group: Group, used: Sequence[int]) -> list[FloatArray]:
    """In place of the scorer's pass over the frozen base model: its log-probs are those without a move."""
    return [logprobs_of(group.traces[index].token_ids, 0.0) for index in used]
