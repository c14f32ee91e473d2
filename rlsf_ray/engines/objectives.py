"""What a step minimises: groups, read by the model, -> a loss summed over examples, and the sums to report.

Everything is a sum, over pairs or over traces: the caller divides by the size of the whole step, over all its passes
and workers. N completion tokens of K traces, of those that the loss sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from rlsf_ray.algorithms.losses import importance_weights, kl_penalty, pair_loss, policy_gradient
from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import AdvantagesConfig, LossConfig, RolloutConfig
from rlsf_ray.engines.packing import Row, by_trace, hidden_states, trace_logprobs, trace_logprobs_and_entropies
from rlsf_ray.engines.steps import StepSize
from rlsf_ray.records import TrainingGroup

GAP_SQUARES, GAP_TOKENS = "gap_squares", "gap_tokens"  # sums over tokens, unlike the others of a step
Sums = dict[str, float]


class Objective(Protocol):
    """The loss of one forward pass."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sums that it reports."""
        ...

    def __call__(
        self, model: Any, groups: Sequence[TrainingGroup], size: StepSize, newest: int
    ) -> tuple[torch.Tensor, Sums]:
        """(loss, sums) of `groups`, a part of a step of that size, trained on the version `newest`."""
        ...


def objective_of(config: RunConfig) -> Objective:
    """What the run's trainer minimises."""
    if config.advantages is not None:
        return PolicyGradient(config.advantages, config.rollout)
    return Preferences(config.loss)


class Preferences:
    """A pair loss; see `losses.pair_loss`. Each trace is read once however many pairs it stands in."""

    names = ("accuracy", "chosen_reward", "loss", "margin", "nll", "rejected_reward", GAP_SQUARES, GAP_TOKENS)

    def __init__(self, settings: LossConfig) -> None:
        self._settings = settings

    def __call__(
        self, model: Any, groups: Sequence[TrainingGroup], size: StepSize, newest: int
    ) -> tuple[torch.Tensor, Sums]:
        settings = self._settings
        read = [trace for row in trace_logprobs(model, rows_of(groups)) for trace in row]
        learned = [torch.from_numpy(trace.learned).to(read[0].device) for group in groups for trace in group.traces]
        policy = [values[mask] for values, mask in zip(read, learned, strict=True)]
        first = np.cumsum([0, *(len(group.traces) for group in groups)])  # of each group among all traces
        traces = [trace for group in groups for trace in group.traces]
        pairs = [(start, pair) for start, group in zip(first, groups, strict=False) for pair in group.pairs]
        device = policy[0].device
        loss, sums = pair_loss(
            settings.name,
            torch.stack([values.sum() for values in policy]),
            torch.tensor([float(t.reference_logprob[t.learned].sum(dtype=np.float64)) for t in traces], device=device),
            torch.tensor([len(values) for values in policy], device=device),
            torch.tensor([start + pair.chosen for start, pair in pairs], device=device),
            torch.tensor([start + pair.rejected for start, pair in pairs], device=device),
            torch.tensor([pair.weight for _, pair in pairs], device=device),
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            nll=settings.nll,
        )
        return loss, sums | _gap(torch.cat(policy), _tokens(groups, "logprob", device))


class PolicyGradient:
    """Clipped policy gradient with a KL penalty and an entropy bonus at each token (GRPO 2402.03300 and its kin).

    For traces of the newest version the clip is around the log-probs of the policy that wrote them. For those of an
    older one truncated importance weights correct its age, and nothing is clipped. All log-probs are of the temperature
    that the traces were drawn with.
    """

    names = ("clipped", "entropy", "kl", "loss", "reward", "weight", GAP_SQUARES, GAP_TOKENS)

    def __init__(self, settings: AdvantagesConfig, rollout: RolloutConfig) -> None:
        self._settings, self._rollout = settings, rollout

    def __call__(
        self, model: Any, groups: Sequence[TrainingGroup], size: StepSize, newest: int
    ) -> tuple[torch.Tensor, Sums]:
        settings = self._settings
        found, entropy = trace_logprobs_and_entropies(
            model, rows_of(groups), self._rollout.temperature, gradient=bool(settings.entropy_bonus)
        )
        traces = [trace for group in groups for trace in group.traces]
        learned = torch.from_numpy(np.concatenate([trace.learned for trace in traces])).to(entropy.device)
        policy, entropy = torch.cat([trace for row in found for trace in row])[learned], entropy[learned]
        lengths, device = [int(trace.learned.sum()) for trace in traces], policy.device

        def spread(values: Sequence[float]) -> torch.Tensor:
            """One value a trace -> one a token [N]."""
            return torch.tensor(np.repeat(values, lengths), dtype=torch.float32, device=device)

        written, reference = _tokens(groups, "logprob", device), _tokens(groups, "reference_logprob", device)
        fresh = spread([trace.version == newest for trace in traces]) > 0
        advantages = _tokens(groups, "credit", device)
        weights = torch.where(fresh, 1.0, importance_weights(policy, written, most=settings.max_weight))
        old = torch.where(fresh, written, policy.detach())
        clip, clip_high = settings.clip, settings.clip_high
        losses = weights * policy_gradient(policy, old, advantages, clip=clip, clip_high=clip_high)
        kl = kl_penalty(policy, reference, settings.kl_estimator)
        share = spread([self._share(length, size) for length in lengths])
        loss = (share * (losses + settings.kl * kl - settings.entropy_bonus * entropy)).sum()
        with torch.no_grad():
            ratio, mean = (policy - old).exp(), spread([1.0 / length for length in lengths])
            idle = torch.where(advantages > 0, ratio > 1 + clip_high, ratio < 1 - clip)
            sums = {"loss": loss, "entropy": (mean * entropy).sum(), "kl": (mean * kl).sum()}
            sums |= {"clipped": (mean * idle).sum(), "weight": (mean * weights).sum()}
            values = torch.stack([value.double() for value in sums.values()]).tolist()
        reward = sum(trace.score for trace in traces)
        return loss, dict(zip(sums, values, strict=True)) | {"reward": reward} | _gap(policy, written)

    def _share(self, length: int, size: StepSize) -> float:
        """What a token counts, so that the sum over a step, divided by its traces, is normalised as asked."""
        if self._settings.normalise == "token":
            return size.examples / size.tokens
        return 1.0 / (length if self._settings.normalise == "trace" else self._rollout.max_tokens)


class BradleyTerry:
    """-log sigmoid(reward of the chosen - reward of the rejected trace): RLSF 2507.21931 section 3.

    The reward of a trace is a linear function of the hidden state that predicts its last token, the end of the text.
    """

    names = ("accuracy", "loss", "margin")

    def __call__(
        self, model: Any, groups: Sequence[TrainingGroup], size: StepSize, newest: int
    ) -> tuple[torch.Tensor, Sums]:
        rewards = rewards_of(model, model.reward_head.weight[0], rows_of(groups))
        pairs = [(row, pair) for row, group in zip(rewards, groups, strict=True) for pair in group.pairs]
        margins = torch.stack([row[pair.chosen] - row[pair.rejected] for row, pair in pairs])
        weights = torch.tensor([pair.weight for _, pair in pairs], device=margins.device)
        loss = -(weights * torch.nn.functional.logsigmoid(margins)).sum()
        sums = {"loss": float(loss.detach()), "margin": float(margins.detach().sum())}
        return loss, sums | {"accuracy": float((margins > 0).sum())}


def rewards_of(model: Any, head: torch.Tensor, rows: Sequence[Row]) -> list[torch.Tensor]:
    """The reward of each trace by the head [D]: for each row [K]."""
    hidden, _ = hidden_states(model, rows)
    return [torch.stack([trace[-1].float() for trace in row]) @ head for row in by_trace(hidden, rows)]


def rows_of(groups: Sequence[TrainingGroup]) -> list[Row]:
    """Each group with its traces, as the model reads them."""
    return [Row(group.prompt_ids, [trace.token_ids for trace in group.traces]) for group in groups]


def _tokens(groups: Sequence[TrainingGroup], name: str, device: Any) -> torch.Tensor:
    """A field [T] of every trace, of the tokens that the loss sees, as one [N]."""
    found = [getattr(trace, name)[trace.learned] for group in groups for trace in group.traces]
    return torch.from_numpy(np.concatenate(found)).to(device)


def _gap(policy: torch.Tensor, written: torch.Tensor) -> Sums:
    """How far the trainer's log-probs lie from the generators'."""
    gap = (policy.detach() - written).double()
    return {GAP_SQUARES: float(gap @ gap), GAP_TOKENS: float(len(gap))}
