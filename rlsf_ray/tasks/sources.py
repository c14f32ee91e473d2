"""Prompts: the training set and the probe set of a run, and which prompts a round takes.

Training gets `Prompt` records, which have no field for a gold answer; for training sources the gold is not even read.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import SourceConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import ProbePrompt, Prompt
from rlsf_ray.tasks.bfcl import bfcl_questions
from rlsf_ray.tasks.files import file_stem
from rlsf_ray.tasks.gym import gym_questions
from rlsf_ray.tasks.questions import Question, first_duplicate, spread_seed, to_prompt
from rlsf_ray.tasks.rows import row_questions

logger = logging.getLogger(__name__)

PROBE_SEED = 2507_21931  # the probe set is the same for every run seed


class PromptSets(NamedTuple):
    """A run's prompts; no two sets share a canonical key, and none repeats one."""

    train: list[Prompt]
    probe: list[ProbePrompt]
    calibration: list[Prompt]  # unlabelled like those to train on, and never trained on


def load_prompts(source: SourceConfig, *, seed: int, suffix: str, answer_format: str) -> list[ProbePrompt]:
    """Up to `source.count` distinct prompts with their gold answers, chosen by `seed`.

    Raises InputError for a source that cannot be read or lacks a gold answer.
    """
    questions = _take(source, seed=seed, labelled=True, taken=set())
    return [_probe(question, suffix, answer_format) for question in questions]


def load_sets(config: RunConfig) -> PromptSets:
    """Training prompts, probe set, calibration prompts.

    The probe set comes first, then `data.calibration` prompts out of the training sources; neither depends on
    `config.seed`. The training prompts and their order do. Each set holds *up to* the counts asked for: a small family
    may not have more, and calibration takes half of the training prompts at most. A source that is also one of the
    probe set gives calibration prompts like those, easy and hard ones in the same shares.
    Raises InputError for bad sources, for ids that two sources of a set share, and when no training prompt is left.
    """
    data = config.data
    taken: set[str] = set()
    labelled = _draw_probe(data.probe, taken)
    calibration = _set_aside(config, taken)
    unlabelled = [q for source in data.train for q in _take(source, seed=config.seed, labelled=False, taken=taken)]
    _refuse_shared_ids(unlabelled, "train")
    if not unlabelled:
        raise InputError(
            f"no training prompt is left: every prompt of data.train is among the {len(labelled)} of the probe set;"
            " add training data or make the probe set smaller"
        )
    if len(unlabelled) < config.prompts_per_round:
        logger.warning(
            "prompts_per_round is %d but only %d distinct training prompts exist; rounds will be smaller",
            config.prompts_per_round,
            len(unlabelled),
        )
    random.Random(config.seed).shuffle(unlabelled)
    random.Random(PROBE_SEED).shuffle(labelled)  # so that the first n are a fair part of all sources
    return PromptSets(
        train=[to_prompt(question, suffix=data.suffix, answer_format=data.answer) for question in unlabelled],
        probe=[_probe(question, data.suffix, data.answer) for question in labelled],
        calibration=[to_prompt(question, suffix=data.suffix, answer_format=data.answer) for question in calibration],
    )


def _draw_probe(sources: Sequence[SourceConfig], taken: set[str]) -> list[Question]:
    """The probe set's questions; their keys are added to `taken`.

    Of each source a random half of twice as many, so that the other half is as hard: a family's few easy questions
    come early and only once.
    """
    questions = []
    for source in sources:
        twice = source.count and 2 * source.count
        drawn = _take(source, twice, seed=PROBE_SEED, labelled=True, taken=set(taken))
        random.Random(PROBE_SEED).shuffle(drawn)
        questions += drawn[: source.count]
        taken |= {question.key for question in drawn[: source.count]}
    _refuse_shared_ids(questions, "probe")
    return questions


def _set_aside(config: RunConfig, taken: set[str]) -> list[Question]:
    """Calibration prompts from all training sources; their keys are added to `taken`.

    From a source of the probe set they come out of the half that the probe set has left, in the probe set's shares.
    """
    if not config.data.calibration:
        return []
    held_out = {_identity(source): source.count for source in config.data.probe}
    seen, candidates, available = set(taken), list[Question](), 0
    for source in config.data.train:
        found = _take(source, seed=PROBE_SEED, labelled=False, taken=seen)
        available += len(found)
        candidates += found[: held_out.get(_identity(source), len(found))]
    random.Random(PROBE_SEED).shuffle(candidates)
    kept = candidates[: min(config.data.calibration, available // 2)]
    taken |= {question.key for question in kept}
    return kept


def prompts_of_round(
    train: Sequence[Prompt],
    round: int,
    prompts_per_round: int,
    seed: int,
    feeds: Sequence[tuple[int, Sequence[Prompt]]] = (),
) -> list[Prompt]:
    """The prompts of round 0, 1, ...: the next window of the endlessly repeated training set, in a shuffled order.

    No prompt stands twice in a round, so a round holds min(prompts_per_round, len(train)) prompts.
    `feeds`: (round, prompts) in the order of the rounds; from that round on these belong to the training set, and
    their turn comes before that of the others.
    """
    since, size = 0, min(prompts_per_round, len(train))
    for at, fed in feeds:
        if at <= round:
            done = (at - since) * size % len(train)
            train = [*fed, *train[done:], *train[:done]]
            since, size = at, min(prompts_per_round, len(train))
    window = [train[((round - since) * size + i) % len(train)] for i in range(size)]
    random.Random(spread_seed(f"round {round}", seed)).shuffle(window)
    return window


def _refuse_shared_ids(questions: Sequence[Question], section: str) -> None:
    if duplicate := first_duplicate([question.id for question in questions]):
        raise InputError(
            f"two sources of data.{section} use the id {duplicate[0]!r}; give the sources distinct ids or file names"
        )


def _take(
    source: SourceConfig, count: int | None = None, *, seed: int, labelled: bool, taken: set[str]
) -> list[Question]:
    """The first `count` questions (None: `source.count`) whose keys are not in `taken`; their keys are added to it."""
    questions = []
    count = count or source.count
    for question in _read(source, seed=seed, labelled=labelled):
        if question.key not in taken:
            taken.add(question.key)
            questions.append(question)
        if len(questions) == count:
            break
    if source.count and len(questions) < source.count:
        logger.info("%s: %d of %d prompts found", source.name or source.path, len(questions), source.count)
    return questions


def _read(source: SourceConfig, *, seed: int, labelled: bool) -> Iterator[Question]:
    """Questions in an order that the seed and the source's identity decide."""
    seed = spread_seed(_identity(source), seed)
    if source.kind == "reasoning_gym":
        return gym_questions(source, seed=seed, labelled=labelled)
    read = bfcl_questions if source.kind == "bfcl" else row_questions
    questions = read(source, labelled=labelled)
    random.Random(seed).shuffle(questions)
    return iter(questions)


def _identity(source: SourceConfig) -> str:
    """What questions a source has; its count and folder do not matter."""
    return json.dumps([source.kind, source.name, file_stem(source.path or ""), source.options], default=str)


def _probe(question: Question, suffix: str, answer_format: str) -> ProbePrompt:
    assert question.gold is not None, f"{question.id} was read without its gold answer"
    return ProbePrompt(prompt=to_prompt(question, suffix=suffix, answer_format=answer_format), gold=question.gold)
