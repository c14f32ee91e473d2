"""Losses: log-probabilities of traces -> a loss with its sums. Source: DPO 2305.18290, IPO 2310.12036, GRPO 2402.03300.

Pair losses: N pairs over K traces; a log-probability is the sum over a trace's completion tokens, in nats. Losses of
advantages: N completion tokens of all traces. Both are sums: the caller divides by the size of its whole step, so a
step may be cut into passes at will.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO loss of each pair [N] from summed log-probabilities [N]; TRL's loss_type "sigmoid".

    With label smoothing e (conservative DPO): (1 - e) * loss + e * loss of the swapped pair.
    """
    margin = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    return -(1.0 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """IPO loss of each pair [N] from MEAN token log-probabilities [N], which is what TRL's "ipo" takes.

    The squared distance of the log-ratio gap from 1 / (2 beta); equation 17 of the paper, with beta for tau.
    """
    gap = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return (gap - 1.0 / (2.0 * beta)) ** 2


def pair_loss(
    name: str,
    trace_logprob_K: Tensor,
    reference_logprob_K: Tensor,
    lengths_K: Tensor,
    chosen_N: Tensor,
    rejected_N: Tensor,
    weights_N: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    nll: float,
) -> tuple[Tensor, dict[str, float]]:
    """Sum over pairs of weight * (loss + nll * mean token NLL of the chosen trace), and sums to report.

    `chosen_N` and `rejected_N` index the K traces; `lengths_K` counts their completion tokens. The sums are over
    pairs and unweighted, but for `loss`: rewards are beta * log-ratio, `margin` their difference, `accuracy` the
    number of positive margins, `nll` the anchor. Raises ValueError for an unknown name, or smoothing with ipo.
    """
    policy, reference = trace_logprob_K, reference_logprob_K
    if name == "dpo":
        sides = (policy[chosen_N], policy[rejected_N], reference[chosen_N], reference[rejected_N])
        losses = dpo(*sides, beta=beta, label_smoothing=label_smoothing)
    elif name == "ipo":
        if label_smoothing:
            raise ValueError(f"ipo has no label smoothing, got {label_smoothing}; set loss.label_smoothing to 0")
        mean_policy, mean_reference = policy / lengths_K, reference / lengths_K
        losses = ipo(
            mean_policy[chosen_N],
            mean_policy[rejected_N],
            mean_reference[chosen_N],
            mean_reference[rejected_N],
            beta=beta,
        )
    else:
        raise ValueError(f"unknown loss {name!r}; use dpo or ipo")
    anchors = -(policy / lengths_K)[chosen_N]
    loss = (weights_N * (losses + nll * anchors)).sum()
    return loss, _sums(loss, beta * (policy - reference), anchors, chosen_N, rejected_N)


FARTHEST = 80.0  # nats between two policies' log-probs of a token, above which their ratio is no float32 any more


def policy_gradient(policy_N: Tensor, old_N: Tensor, advantages_N: Tensor, *, clip: float, clip_high: float) -> Tensor:
    """Clipped policy-gradient loss of each token [N]: PPO 1707.06347, GRPO 2402.03300, "clip-higher" DAPO 2503.14476.

    min(r A, clamp(r, 1 - clip, 1 + clip_high) A) with r = exp(policy - old), negated.
    """
    ratio = (policy_N - old_N).clamp(max=FARTHEST).exp()  # beyond it is inf, and nothing (A = 0) times inf is nan
    return -torch.minimum(ratio * advantages_N, ratio.clamp(1.0 - clip, 1.0 + clip_high) * advantages_N)


def importance_weights(policy_N: Tensor, written_N: Tensor, *, most: float) -> Tensor:
    """exp(policy - written), at most `most`, without a gradient: for what an older version wrote. IMPALA 1802.01561."""
    return (policy_N.detach() - written_N).exp().clamp(max=most)


def kl_penalty(policy_N: Tensor, reference_N: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(policy || reference) at each token [N] that the policy drew, in nats. Schulman's k1, k2, k3.

    With d = reference - policy: k1 = -d (its gradient is 0 in expectation: a measure, not a pull), k2 = d^2 / 2 (the
    gradient of the true KL), k3 = exp(d) - 1 - d (never negative, unbiased; GRPO's).
    """
    gap = (reference_N - policy_N).clamp(max=FARTHEST)  # k3 of more is inf
    if estimator == "k1":
        return -gap
    return gap.square() / 2 if estimator == "k2" else gap.exp() - 1.0 - gap


def _sums(loss: Tensor, rewards_K: Tensor, anchors: Tensor, chosen_N: Tensor, rejected_N: Tensor) -> dict[str, float]:
    with torch.no_grad():
        chosen, rejected = rewards_K[chosen_N], rewards_K[rejected_N]
        sums = {
            "loss": loss,
            "margin": (chosen - rejected).sum(),
            "accuracy": (chosen > rejected).sum(),
            "chosen_reward": chosen.sum(),
            "rejected_reward": rejected.sum(),
            "nll": anchors.sum(),
        }
        values = torch.stack([value.double() for value in sums.values()]).tolist()  # one copy off the device
    return dict(zip(sums, values, strict=True))
