"""Statistics of the whole next-token distribution, in tiles: no [tokens, vocabulary] array is ever held.

Logits are made for a tile of tokens and of the vocabulary at a time and folded into running sums, as in online softmax
(1805.02867). Letters in shapes: N completion tokens of all rows, D hidden size, V vocabulary, S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlsf_ray.algorithms.signals import TOP, Distribution
from rlsf_ray.engines.lora import Head, body_and_head
from rlsf_ray.engines.packing import Row, by_trace, hidden_states

TILE_TOKENS, TILE_COLUMNS = 512, 8192  # 16 MiB of float32


@torch.inference_mode()
def read_distributions(model: Any, rows: Sequence[Row]) -> list[list[Distribution]]:
    """For each row, for each trace: statistics of the distributions that its tokens were drawn from, in one pass."""
    hidden, targets = hidden_states(model, rows)
    _, head = body_and_head(model)
    parts = zip(hidden.split(TILE_TOKENS), targets.split(TILE_TOKENS), strict=True)
    values = torch.cat([_tile_statistics(head, part, chosen) for part, chosen in parts])
    return [[Distribution(*trace.T.cpu().numpy()) for trace in row] for row in by_trace(values, rows)]


def _tile_statistics(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[tokens, S], in the order of `Distribution`'s fields.

    Kept from one vocabulary tile to the next, with m the largest logit so far: the sums over the vocabulary of
    exp(l - m), of (l - m) exp(l - m) and of l, the largest logits, and the chosen token's.
    """
    size, rows = head.weight.shape[0], torch.arange(len(hidden), device=hidden.device)
    highest = torch.full((len(hidden),), -math.inf, device=hidden.device)
    mass, energy, total = (torch.zeros(len(hidden), device=hidden.device) for _ in range(3))
    top, chosen = hidden.new_empty((len(hidden), 0), dtype=torch.float32), torch.zeros_like(mass)
    for start in range(0, size, TILE_COLUMNS):
        logits = head(hidden, slice(start, start + TILE_COLUMNS)).float()
        before, highest = highest, torch.maximum(highest, logits.amax(1))
        shift = torch.where(mass > 0, before - highest, torch.zeros_like(highest))  # of the sums so far
        total += logits.sum(1)
        here = (targets >= start) & (targets < start + logits.shape[1])
        chosen = torch.where(here, logits[rows, (targets - start).clamp(0, logits.shape[1] - 1)], chosen)
        top = torch.cat([top, logits.topk(min(TOP, logits.shape[1])).values], 1)
        top = top.topk(min(TOP, top.shape[1])).values
        logits -= highest[:, None]
        weights = logits.exp()
        energy = (energy + shift * mass) * shift.exp() + (weights * logits).sum(1)
        mass = mass * shift.exp() + weights.sum(1)
    log_sum = highest + mass.log()
    pair = (top[:, :2] - log_sum[:, None]).exp()
    within = top.log_softmax(1)  # the largest, made to sum to 1
    return torch.stack(
        [
            chosen - log_sum,
            pair[:, 0],
            pair[:, 1],
            mass.log() - energy / mass,
            log_sum - total / size - math.log(size),
            -(within.exp() * within).sum(1),
            -within.mean(1) - math.log(top.shape[1]),
        ],
        dim=1,
    )
