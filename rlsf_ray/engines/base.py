"""What an engine promises: the Protocol behind which transformers and vLLM stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from rlsf_ray.config import RunConfig
from rlsf_ray.records import FloatArray, IntArray, Json, Prompt

# Standard deviation of an engine's log-prob of a token around the trainer's, by number type (benchmarks/results/log.md)
LOGPROB_NOISE = {"bfloat16": 0.06, "float32": 1e-4}
QUANTISED_NOISE = 0.3  # not measured: large, so that a swap is rather "unproven" than a false alarm
Adapter = Mapping[str, np.ndarray]  # PEFT parameter name -> float32 array


def logprob_noise(config: RunConfig) -> float:
    """Noise of the engine that `config` asks for, in nats a token."""
    quantised = config.engine_args.keys() & {"quantization", "kv_cache_dtype", "dtype"}
    return QUANTISED_NOISE if quantised else LOGPROB_NOISE[config.model.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to write. `branch` is CoT-decoding: the K likeliest first tokens, each continued greedily (2402.10200)."""

    method: Literal["sample", "greedy", "branch"] = "sample"
    max_tokens: int = 80
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """K completions of one prompt; one seed for each."""

    prompt_ids: IntArray
    seeds: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Tokens with statistics [T], the text, and the characters [T, 2] each token covers (start, end)."""

    token_ids: IntArray
    logprob: FloatArray
    top1: FloatArray
    top2: FloatArray
    text: str
    char_spans: IntArray
    finished: bool


class Engine(Protocol):
    """Generates with a named version of the adapter over one frozen base model."""

    one_version: bool  # calls with another version wait until those before them have ended

    def encode_text(self, text: str) -> IntArray:
        """Token ids of plain text that continues a trace (no special tokens)."""
        ...

    def encode_reply(self, text: str, last: int) -> IntArray:
        """Token ids between a written turn that ends with the token `last` and the next one: the user says `text`."""
        ...

    def encode(self, prompt: Prompt) -> IntArray:
        """Token ids [P] of the prompt, through the model's chat template or the plain one."""
        ...

    def load_version(self, version: int, adapter: Adapter) -> str:
        """Keep `adapter` under `version`; returns the checksum of what was loaded."""
        ...

    def logprobs(self, texts: Sequence[tuple[IntArray, IntArray]], version: int) -> list[FloatArray]:
        """For each (prompt ids, trace ids): the log-probs [T] that `version` gives to the trace's tokens."""
        ...

    def forget_version(self, version: int) -> None:
        """Drop an adapter that is no longer needed, if it is held."""
        ...

    def usage(self) -> Json:
        """{"kv_usage": largest share of the KV cache in use since the last call}, {} where there is no such limit."""
        ...

    def alive(self) -> bool:
        """False once nothing will be written any more: a process of the engine has died."""
        ...

    def close(self) -> None:
        """Give back what would outlive this object."""
        ...

    def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
        """One list of K completions for each request, written by `version` (0: the base model)."""
        ...
