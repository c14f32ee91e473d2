"""Programs that turn prompts into groups through an engine: plain sampling and CoT-decoding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlsf_ray.algorithms.answers import find_answer, locate, token_span
from rlsf_ray.choices import choose
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Completion, Request, Sampling
from rlsf_ray.records import Answer, Group, Prompt, Trace

Rollout = Callable[[RunConfig], Sampling]

ELICIT = " So the answer is"  # RLSF 1.1, step 3
ELICIT_TOKENS = 12


def sample(config: RunConfig) -> Sampling:
    """K independent samples at the configured temperature."""
    return Sampling(method="sample", max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature)


def cot_decoding(config: RunConfig) -> Sampling:
    """The K likeliest first tokens, each continued greedily (2402.10200, section 2.2; RLSF 1.1, step 2)."""
    return Sampling(method="branch", max_tokens=config.rollout.max_tokens)


ROLLOUTS: dict[str, Rollout] = {"sample": sample, "cot_decoding": cot_decoding}


def write_groups(
    engine: Any, prompts: Sequence[Prompt], *, config: RunConfig, round: int, first_sequence: int, version: int
) -> list[Group]:
    """One group of K traces for each prompt, with answers found."""
    sampling = choose(ROLLOUTS, config.rollout.name, "rollout.name")(config)
    salt = f"{config.seed}/round-{round}"
    return _write(engine, prompts, config, sampling, config.rollout.traces, salt, round, first_sequence, version)


def write_probe_groups(
    engine: Any, prompts: Sequence[Prompt], *, config: RunConfig, version: int, first_sequence: int
) -> tuple[list[Group], list[Group]]:
    """For evaluation: groups of `eval.samples` sampled traces, and groups of one greedy trace.

    The seeds do not depend on the run's seed, so that every run measures the base model alike.
    """
    tokens = config.rollout.max_tokens
    sampled = Sampling(method="sample", max_tokens=tokens, temperature=config.rollout.temperature)
    greedy = Sampling(method="greedy", max_tokens=tokens)
    return (
        _write(engine, prompts, config, sampled, config.eval.samples, "probe", -1, first_sequence, version),
        _write(engine, prompts, config, greedy, 1, "greedy", -1, first_sequence, version),
    )


def _write(
    engine: Any,
    prompts: Sequence[Prompt],
    config: RunConfig,
    sampling: Sampling,
    num_traces: int,
    salt: str,
    round: int,
    first_sequence: int,
    version: int,
) -> list[Group]:
    ids = [group_id(prompt, round) for prompt in prompts]
    requests = [
        Request(
            prompt_ids=engine.encode(prompt),
            seeds=tuple(trace_seed(salt, prompt.id, k) for k in range(num_traces)),
        )
        for prompt in prompts
    ]
    completions = engine.generate(requests, sampling, version)
    groups = []
    for sequence, (prompt, request, written) in enumerate(zip(prompts, requests, completions, strict=True)):
        traces = [
            _trace(f"{ids[sequence]}/{k}", k, request.seeds[k], version, completion)
            for k, completion in enumerate(written)
        ]
        spans = _answers(engine, prompt, request, written, version)
        groups.append(
            Group(
                id=ids[sequence],
                round=round,
                sequence=first_sequence + sequence,
                version=version,
                prompt=prompt,
                prompt_ids=request.prompt_ids,
                traces=tuple(_with_answer(t, c, span) for t, c, span in zip(traces, written, spans, strict=True)),
            )
        )
    return groups


def group_id(prompt: Prompt, round: int) -> str:
    """Names one (prompt, round)."""
    return f"r{round}/{prompt.id}" if round >= 0 else f"probe/{prompt.id}"


def trace_seed(salt: str, prompt_id: str, index: int) -> int:
    """Each trace has its own random stream, made of run seed, round, prompt and trace index."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{prompt_id}/{index}".encode()).digest()[:8], "big") >> 1


def _answers(
    engine: Any, prompt: Prompt, request: Request, completions: Sequence[Completion], version: int
) -> list[tuple[int, int] | None]:
    """Character span of each completion's final answer; a completion that was cut off has none."""
    if prompt.answer_format != "elicit":
        return [find_answer(c.text, prompt.answer_format) if c.finished else None for c in completions]
    tail = engine.encode_text(ELICIT)
    requests = [
        Request(prompt_ids=np.concatenate([request.prompt_ids, _without_end(c), tail]), seeds=(0,)) for c in completions
    ]
    greedy = Sampling(method="greedy", max_tokens=ELICIT_TOKENS)
    elicited = [found[0].text for found in engine.generate(requests, greedy, version)]
    return [locate(e, c.text) if c.finished else None for e, c in zip(elicited, completions, strict=True)]


def _without_end(completion: Completion) -> np.ndarray:
    return completion.token_ids[:-1] if completion.finished else completion.token_ids


def _trace(name: str, index: int, seed: int, version: int, completion: Completion) -> Trace:
    return Trace(
        id=name,
        index=index,
        seed=seed,
        version=version,
        text=completion.text,
        token_ids=completion.token_ids,
        logprob=completion.logprob,
        top1=completion.top1,
        top2=completion.top2,
        finished=completion.finished,
    )


def _with_answer(trace: Trace, completion: Completion, chars: tuple[int, int] | None) -> Trace:
    if chars is None:
        return trace
    from dataclasses import replace

    tokens = token_span(completion.char_spans, chars)
    return replace(trace, answer=Answer(text=trace.text[chars[0] : chars[1]], chars=chars, tokens=tokens))
