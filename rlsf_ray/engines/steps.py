"""Cutting a stream of training groups: into optimiser steps, and a step into forward/backward passes.

An example is what a loss is a sum over: a pair, or (with advantages) a trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlsf_ray.records import TrainingGroup


@dataclass(frozen=True, slots=True)
class StepSize:
    """What the whole of a step holds, over all workers."""

    examples: int
    tokens: int  # of the traces, that the loss sees

    @classmethod
    def of(cls, step: Sequence[TrainingGroup]) -> StepSize:
        """The size of a whole step."""
        lengths = (int(trace.learned.sum()) for group in step for trace in group.traces)
        return cls(sum(group.num_examples for group in step), sum(lengths))


def surest(groups: Iterable[TrainingGroup], most: int | None) -> tuple[list[TrainingGroup], list[TrainingGroup]]:
    """(the `most` groups that the pair rule is surest of, the others), both in the order given; None: all are kept.

    Of equally sure ones the earlier is kept.
    """
    known = list(groups)
    order = sorted(known, key=lambda group: (-group.sure, group.sequence))
    kept = {group.sequence for group in order[:most]}
    return [group for group in known if group.sequence in kept], [g for g in known if g.sequence not in kept]


def training_steps(groups: Iterable[TrainingGroup], examples: int) -> Iterator[list[TrainingGroup]]:
    """Cut a stream of groups into optimiser steps: a step closes once it holds so many examples."""
    step: list[TrainingGroup] = []
    for group in groups:
        step.append(group)
        if sum(member.num_examples for member in step) >= examples:
            yield step
            step = []
    if step:
        yield step


def pass_order(groups: Sequence[TrainingGroup], seed: int, round: int, pass_index: int) -> list[TrainingGroup]:
    """Pass 0 goes in admission order, as the groups arrive; later passes are shuffled by seed, round and pass."""
    ordered = sorted(groups, key=lambda group: group.sequence)
    if pass_index == 0:
        return ordered
    digest = hashlib.sha256(f"{seed}/{round}/{pass_index}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(ordered))
    return [ordered[i] for i in order]


def passes(groups: Sequence[TrainingGroup], max_tokens: int) -> Iterator[list[TrainingGroup]]:
    """Cut a step into forward/backward passes of at most `max_tokens` tokens with padding (one example at least).

    Groups of similar length go together; the order within a step does not change its gradient.
    """
    parts = [part for group in groups for part in split_group(group, max_tokens)]
    batch: list[TrainingGroup] = []
    for part in sorted(parts, key=lambda part: part.num_tokens):
        if batch and (len(batch) + 1) * part.num_tokens > max_tokens:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def split_group(group: TrainingGroup, max_tokens: int) -> list[TrainingGroup]:
    """Split a group's examples so that each part reads at most `max_tokens` tokens (one example at least).

    The loss is a sum over examples, so the parts add up to the group; a trace of several pairs may be read in several.
    """
    if group.num_tokens <= max_tokens:
        return [group]
    parts: list[list[int]] = []
    for example in range(group.num_examples):
        if parts and _only(group, [*parts[-1], example]).num_tokens <= max_tokens:
            parts[-1].append(example)
        else:
            parts.append([example])
    return [_only(group, part) for part in parts]


def _only(group: TrainingGroup, examples: Sequence[int]) -> TrainingGroup:
    """The group with only these of its examples, and the traces in them."""
    if not group.pairs:
        return replace(group, traces=tuple(group.traces[k] for k in examples))
    kept = [group.pairs[index] for index in examples]
    used = sorted({index for pair in kept for index in (pair.chosen, pair.rejected)})
    pairs = [replace(p, chosen=used.index(p.chosen), rejected=used.index(p.rejected)) for p in kept]
    return replace(group, traces=tuple(group.traces[k] for k in used), pairs=tuple(pairs))
