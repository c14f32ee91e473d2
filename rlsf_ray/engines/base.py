"""What an engine promises: the Protocol behind which transformers (and later vLLM) stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from rlsf_ray.records import FloatArray, IntArray, Prompt

Adapter = Mapping[str, np.ndarray]  # PEFT parameter name -> float32 array


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

    def encode(self, prompt: Prompt) -> IntArray:
        """Token ids [P] of the prompt, through the model's chat template or the plain one."""
        ...

    def load_version(self, version: int, adapter: Adapter) -> str:
        """Keep `adapter` under `version`; returns the checksum of what was loaded."""
        ...

    def generate(self, requests: Sequence[Request], version: int) -> list[list[Completion]]:
        """One list of K completions for each request, written by `version` (0: the base model)."""
        ...
