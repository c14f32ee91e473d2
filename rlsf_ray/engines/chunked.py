"""Log-probs and entropies of tokens from hidden states, chunk by chunk: no [tokens, vocabulary] array stands.

What a token's values owe to its hidden state is found with them, in the forward pass, while its logits are there: the
head is frozen, so this is all that the backward pass needs. N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlsf_ray.engines.lora import Head

LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}  # of a chunk; on a CPU 16 MiB of float32, which a cache may hold
Values = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]  # (states [N, D], targets [N]) -> [N] each


def token_logprobs(head: Head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs [N] of `targets` [N] by hidden states [N, D], with gradients to these; float32, or float64 of such."""

    def values(part: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor]:
        return (-torch.nn.functional.cross_entropy(_logits(head, part, temperature), chosen, reduction="none"),)

    return _in_chunks(head, hidden, targets, values, gradients=1)[0]


def token_logprobs_and_entropies(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and the entropy [N] of each distribution in nats; `gradient`: of the entropies too."""

    def values(part: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logs = _logits(head, part, temperature).log_softmax(-1)
        return logs.gather(1, chosen[:, None])[:, 0], -(logs.exp() * logs).sum(-1)

    logprobs, entropies = _in_chunks(head, hidden, targets, values, gradients=2 if gradient else 1)
    return logprobs, entropies


def _logits(head: Head, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _in_chunks(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, values: Values, gradients: int
) -> tuple[torch.Tensor, ...]:
    """What `values` gives for all tokens; the first so many of them with gradients, where these are enabled."""
    size = max(1, LOGITS[hidden.device.type] // head.weight.shape[0])
    if not torch.is_grad_enabled() or not hidden.requires_grad:
        return _joined(values(*part) for part in zip(hidden.split(size), targets.split(size), strict=True))
    assert not head.weight.requires_grad, "the head's own gradient is not reckoned"
    found: tuple[torch.Tensor, ...] = _Chunked.apply(hidden, targets, size, values, gradients)
    return found


class _Chunked(torch.autograd.Function):
    """No token's value depends on another's state, so the gradient of a chunk's sum has each one's own in its row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, size: int, values: Values, gradients: int
    ) -> tuple[torch.Tensor, ...]:
        found, slopes = [], []
        for part, chosen in zip(hidden.split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                here = values(part, chosen)
                sums = [value.sum() for value in here[:gradients]]
                slopes.append([torch.autograd.grad(s, part, retain_graph=s is not sums[-1])[0] for s in sums])
            found.append([value.detach() for value in here])
        ctx.save_for_backward(*_joined(slopes))
        return _joined(found)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes = ctx.saved_tensors
        parts = [gradient[:, None] * slope for gradient, slope in zip(upstream, slopes, strict=False)]
        return torch.stack(parts).sum(0).to(slopes[0].dtype), None, None, None, None


def _joined(parts: Any) -> tuple[torch.Tensor, ...]:
    """Tuples of one chunk each -> one tuple of all tokens."""
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))
