"""RLIF's partial equivalences (2506.17219), through this project's own statistics and signals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rlsf_ray.algorithms.signals import SIGNALS, Distribution, TraceStats
from rlsf_ray.engines.distribution import _tile_statistics
from rlsf_ray.engines.lora import Head

END, SIZE, LONGEST = 0, 4, 3


def stats_of(logits: torch.Tensor, tokens: list[int]) -> TraceStats:
    """A trace drawn from these logits [T, V], as the scorer reads it: an identity head makes them of hidden states."""
    values = _tile_statistics(Head(torch.eye(logits.shape[1]), None, None), logits, torch.tensor(tokens))
    seen = Distribution(*values.T.numpy())
    return TraceStats(
        logprob=seen.logprob, top1=seen.top1, top2=seen.top2, span=None, label=-1, finished=True, distribution=seen
    )


def signal(name: str, trace: TraceStats) -> float:
    return float(SIGNALS[name].fn([trace])[0])


def test_entropy_and_trajectory_rewards_are_equal_in_expectation_where_they_are_not_divided_by_length() -> None:
    """E[-log p(trace)] = E[sum of its tokens' entropies], over every trace of a Markov model of up to three tokens."""
    logits = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))  # by the token before
    surprise = entropy = mean_surprise = mean_entropy = whole = 0.0
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(SIZE), repeat=length):
            ends = tokens[-1] == END or length == LONGEST
            if not ends or END in tokens[:-1]:
                continue
            trace = stats_of(logits[[END, *tokens[:-1]]], list(tokens))
            p = math.exp(signal("trajectory_logprob", trace))
            whole += p
            surprise -= p * signal("trajectory_logprob", trace)
            entropy -= p * signal("token_entropy", trace) * length
            mean_surprise -= p * signal("mean_logprob", trace)
            mean_entropy -= p * signal("token_entropy", trace)
    assert whole == pytest.approx(1.0, abs=1e-5)
    assert surprise == pytest.approx(entropy, abs=1e-5)
    assert abs(mean_surprise - mean_entropy) > 0.01  # the rewards of the recipes, divided by length: other objectives


def test_self_certainty_is_the_other_direction_of_kl_and_ruled_by_the_tail() -> None:
    """A token without weight made e^40 times less likely: KL(U || p) rises by 40 / V, all else stays."""
    size = 50
    logits = torch.zeros(1, size)
    logits[0, 0], logits[0, 1] = 20.0, -20.0
    lower = logits.clone()
    lower[0, 1] -= 40.0
    before, after = (stats_of(values, [0]) for values in (logits, lower))
    assert signal("self_certainty", after) - signal("self_certainty", before) == pytest.approx(40 / size, abs=1e-4)
    for name in ("token_entropy", "top_entropy", "top_certainty"):
        assert signal(name, after) == pytest.approx(signal(name, before), abs=1e-6)
    p = logits[0].softmax(0).double().numpy()
    uniform = np.full(size, 1 / size)
    assert signal("self_certainty", before) == pytest.approx(float((uniform * np.log(uniform / p)).sum()), abs=1e-4)
    forward = float((p * np.log(p / uniform)).sum())  # KL(p || U) = log V - entropy
    assert signal("token_entropy", before) == pytest.approx(forward - math.log(size), abs=1e-4)
