"""What vLLM is asked for, and how its answers are read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlsf_ray.engines.base import Request
from rlsf_ray.records import FloatArray

TOP = 2  # likeliest tokens whose probability is kept for each position


class Ask(NamedTuple):
    """One request: token ids, and vLLM's parameters."""

    ids: list[int]
    params: Any


@dataclass
class Branch:
    """A trace of CoT-decoding that has its first token (2402.10200); the rest follows greedily."""

    prompt: list[int]
    ids: list[int]
    values: FloatArray  # [T, 3] as in `read_output`
    finished: bool
    left: int  # tokens that may follow

    @property
    def goes_on(self) -> bool:
        return not self.finished and self.left > 0

    @property
    def ask(self) -> Ask:
        return Ask([*self.prompt, *self.ids], sampling_params(self.left))

    def add(self, ids: list[int], values: FloatArray, finished: bool) -> None:
        """Take in the greedy continuation."""
        self.ids, self.values, self.finished = [*self.ids, *ids], np.concatenate([self.values, values]), finished


def sampling_params(max_tokens: int, *, temperature: float = 0.0, seed: int = 0, top: int = TOP, **more: Any) -> Any:
    """vLLM's parameters of one completion; `top` likeliest tokens come with each position."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        logprobs=top,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **more,
    )


def read_output(output: Any) -> tuple[list[int], np.ndarray, bool]:
    """(token ids, [T, 3] log-prob of the chosen token with the two largest probabilities, ended by itself)."""
    values = np.empty((len(output.token_ids), 3), dtype=np.float32)
    for position, (token, likely) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        largest = sorted((one.logprob for one in likely.values()), reverse=True)[:TOP]
        values[position] = [likely[token].logprob, *np.exp(largest)]
    return list(output.token_ids), values, output.finish_reason == "stop"


def first_asks(request: Request) -> list[Ask]:
    """What vLLM is asked first: one completion for each seed; of CoT-decoding the likeliest first tokens."""
    sampling, prompt = request.sampling, request.prompt_ids.tolist()
    if sampling.method == "branch":
        return [Ask(prompt, sampling_params(1, top=max(TOP, len(request.seeds))))]
    temperature = sampling.temperature if sampling.method == "sample" else 0.0
    return [
        Ask(prompt, sampling_params(sampling.max_tokens, temperature=temperature, seed=seed)) for seed in request.seeds
    ]


def begun(request: Request, output: Any, eos: Collection[int]) -> list[Branch]:
    """A branch for each seed, the likeliest first token first."""
    ranked = sorted(output.logprobs[0].items(), key=lambda item: item[1].rank)[: len(request.seeds)]
    best = np.exp([alternative.logprob for _, alternative in ranked[:TOP]])
    return [
        Branch(
            prompt=request.prompt_ids.tolist(),
            ids=[token],
            values=np.array([[alternative.logprob, *best]], dtype=np.float32),
            finished=token in eos,
            left=request.sampling.max_tokens - 1,
        )
        for token, alternative in ranked
    ]


def read_prompt(output: Any, ids: list[int], start: int) -> FloatArray:
    """Log-probs [T] of what was asked for from `start` on."""
    read = [output.prompt_logprobs[place][ids[place]].logprob for place in range(start, len(ids))]
    return np.asarray(read, dtype=np.float32)
