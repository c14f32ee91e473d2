"""What vLLM is asked for, and how its answers are read."""

from __future__ import annotations

from typing import Any

import numpy as np

TOP = 2  # likeliest tokens whose probability is kept for each position


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
