"""Programs that turn prompts into groups through an engine: plain sampling and CoT-decoding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlsf_ray.algorithms.answers import find_answer, locate, token_span
from rlsf_ray.choices import choose
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Completion, Request, Sampling
from rlsf_ray.errors import InputError
from rlsf_ray.records import Answer, Group, IntArray, Prompt, Trace
from rlsf_ray.rollouts.seeds import group_id, trace_seed
from rlsf_ray.rollouts.several import PROGRAMS, write_episodes, write_talks

Rollout = Callable[[RunConfig], Sampling]
Span = tuple[int, int]

ELICIT = " So the answer is"  # RLSF 1.1, step 3
ELICIT_TOKENS = 12
CALIBRATION_TRACES = 4  # of one prompt: prompts differ more than the traces of a prompt, so many with few say more


def sample(config: RunConfig) -> Sampling:
    """K independent samples at the configured temperature."""
    return _sampled(config)


def cot_decoding(config: RunConfig) -> Sampling:
    """The K likeliest first tokens, each continued greedily (2402.10200, section 2.2; RLSF 1.1, step 2)."""
    return Sampling(method="branch", max_tokens=config.rollout.max_tokens)


ROLLOUTS: dict[str, Rollout] = {"sample": sample, "cot_decoding": cot_decoding}


def choose_rollout(config: RunConfig) -> Any:
    """How the run's traces are written: a `Rollout`, or (an async function) a program of several turns."""
    return choose({**ROLLOUTS, **PROGRAMS}, config.rollout.name, "rollout.name")


def write_groups(
    engine: Any, prompts: Sequence[Prompt], *, config: RunConfig, round: int, first_sequence: int, version: int
) -> list[Group]:
    """One group of K traces for each prompt, with answers found.

    Raises InputError if the run learns from advantages and its rollout draws otherwise than the trainer will reckon.
    """
    rollout = choose_rollout(config)
    sequences = range(first_sequence, first_sequence + len(prompts))
    if inspect.iscoroutinefunction(rollout):
        return write_talks(rollout, engine, prompts, config=config, round=round, sequences=sequences, version=version)
    sampling = rollout(config)
    _check_drawn(config, sampling)
    salt, count = f"{config.seed}/round-{round}", config.rollout.traces
    requests = [_request(prompt, engine.encode(prompt), sampling, count, salt) for prompt in prompts]
    return _write(engine, prompts, requests, round, sequences, version)


def _check_drawn(config: RunConfig, sampling: Sampling) -> None:
    """A ratio of probabilities needs those that the traces were drawn with; only a user's own rollout can differ."""
    told = config.rollout.temperature
    if config.advantages and (sampling.method, sampling.temperature) != ("sample", told):
        raise InputError(
            f"rollout.name={config.rollout.name} gives method={sampling.method!r} at temperature"
            f" {sampling.temperature:g}, expected 'sample' at rollout.temperature={told:g}: advantages are learned from"
            " what the policy draws there; take both from the config"
        )


def write_probe_groups(
    engine: Any, prompts: Sequence[Prompt], *, config: RunConfig, version: int, first_sequence: int
) -> dict[str, list[Group]]:
    """For evaluation, a group of each kind for each prompt: {"sampled": `eval.samples` traces, "greedy": one trace,
    "branches": `eval.branches` traces of CoT-decoding, no such kind if that is 0, "episodes": `eval.samples` traces of
    a rollout of several turns, no such kind for others}.

    The seeds do not depend on the run's seed, so that every run measures the base model alike. Nor do the samples on
    whether branches are written: those are a call of their own, as bfloat16 sums depend on what a batch holds beside.
    """
    tokens, many = config.rollout.max_tokens, config.eval.branches
    kinds = {
        "sampled": (_sampled(config), config.eval.samples, "probe"),
        "greedy": (Sampling(method="greedy", max_tokens=tokens), 1, "greedy"),
    }
    written = _write_kinds(engine, prompts, kinds, first_sequence, version)
    if many:
        branches = {"branches": (Sampling(method="branch", max_tokens=tokens), many, "branches")}
        written |= _write_kinds(engine, prompts, branches, first_sequence, version)
    rollout = choose_rollout(config)
    if inspect.iscoroutinefunction(rollout):
        written["episodes"] = write_episodes(
            rollout, engine, prompts, config=config, version=version, first_sequence=first_sequence
        )
    return written


def write_calibration_groups(
    engine: Any, prompts: Sequence[Prompt], *, config: RunConfig, version: int, first_sequence: int
) -> list[Group]:
    """A group of samples for each prompt; their seeds depend neither on the run's seed nor on the version."""
    kinds = {"calibration": (_sampled(config), CALIBRATION_TRACES, "calibration")}
    return _write_kinds(engine, prompts, kinds, first_sequence, version)["calibration"]


def write_answers(
    engine: Any, prompts: Sequence[Prompt], *, config: RunConfig, version: int, first: int, count: int
) -> list[Group]:
    """For questions of users: traces `first` to `first + count` of each prompt, so that more can be asked for later."""
    requests = []
    for prompt in prompts:
        seeds = tuple(trace_seed("answer", prompt.id, k) for k in range(first, first + count))
        requests.append(Request(prompt_ids=engine.encode(prompt), seeds=seeds, sampling=_sampled(config)))
    return _write(engine, prompts, requests, -1, range(len(prompts)), version)


def _sampled(config: RunConfig) -> Sampling:
    return Sampling(method="sample", max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature)


def _write_kinds(
    engine: Any,
    prompts: Sequence[Prompt],
    kinds: Mapping[str, tuple[Sampling, int, str]],
    first_sequence: int,
    version: int,
) -> dict[str, list[Group]]:
    """Groups of each kind (sampling, traces, salt of the seeds), all in one call: fuller batches."""
    ids, size = [engine.encode(prompt) for prompt in prompts], len(prompts)
    requests = [_request(p, i, *kind) for kind in kinds.values() for p, i in zip(prompts, ids, strict=True)]
    sequences = list(range(first_sequence, first_sequence + size)) * len(kinds)
    groups = _write(engine, list(prompts) * len(kinds), requests, -1, sequences, version)
    return {kind: groups[n * size : (n + 1) * size] for n, kind in enumerate(kinds)}


def _request(prompt: Prompt, prompt_ids: IntArray, sampling: Sampling, num_traces: int, salt: str) -> Request:
    seeds = tuple(trace_seed(salt, prompt.id, k) for k in range(num_traces))
    return Request(prompt_ids=prompt_ids, seeds=seeds, sampling=sampling)


def _write(
    engine: Any,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    round: int,
    sequences: Sequence[int],
    version: int,
) -> list[Group]:
    completions = engine.generate(requests, version)
    spans = _answers(engine, prompts, requests, completions, version)
    return [
        Group(
            id=name,
            round=round,
            sequence=sequences[index],
            version=version,
            prompt=prompts[index],
            prompt_ids=requests[index].prompt_ids,
            traces=tuple(
                _trace(f"{name}/{k}", k, requests[index].seeds[k], version, completion, spans[index][k])
                for k, completion in enumerate(completions[index])
            ),
        )
        for index, name in enumerate(group_id(prompt, round) for prompt in prompts)
    ]


def _answers(
    engine: Any,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    completions: Sequence[Sequence[Completion]],
    version: int,
) -> list[list[Span | None]]:
    """Character span of each completion's final answer; a completion that was cut off has none."""
    elicited = _elicit(engine, prompts, requests, completions, version)

    def span(index: int, k: int, completion: Completion) -> Span | None:
        if not completion.finished:
            return None
        if (index, k) in elicited:
            return locate(elicited[index, k], completion.text)
        return find_answer(completion.text, prompts[index].answer_format)

    return [[span(index, k, c) for k, c in enumerate(written)] for index, written in enumerate(completions)]


def _elicit(
    engine: Any,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    completions: Sequence[Sequence[Completion]],
    version: int,
) -> dict[tuple[int, int], str]:
    """What the model writes after its own trace and "So the answer is", for prompts with the format `elicit`."""
    asked = {
        (index, k): completion
        for index, written in enumerate(completions)
        for k, completion in enumerate(written)
        if prompts[index].answer_format == "elicit" and completion.finished
    }
    if not asked:
        return {}
    tail = engine.encode_text(ELICIT)
    greedy = Sampling(method="greedy", max_tokens=ELICIT_TOKENS)
    follow_ups = [
        Request(
            prompt_ids=np.concatenate([requests[index].prompt_ids, c.token_ids[:-1], tail]), seeds=(0,), sampling=greedy
        )
        for (index, _), c in asked.items()
    ]
    written = engine.generate(follow_ups, version)
    return {key: found[0].text for key, found in zip(asked, written, strict=True)}


def _trace(name: str, index: int, seed: int, version: int, completion: Completion, chars: Span | None) -> Trace:
    answer = None
    if chars is not None:
        tokens = token_span(completion.char_spans, chars)
        answer = Answer(text=completion.text[slice(*chars)], chars=chars, tokens=tokens)
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
        answer=answer,
    )
