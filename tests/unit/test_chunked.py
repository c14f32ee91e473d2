"""Log-probs in chunks: the whole array's values and gradients, without the array."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsf_ray.engines import chunked
from rlsf_ray.engines.chunked import token_logprobs, token_logprobs_and_entropies
from rlsf_ray.engines.lora import Head

TOKENS, SIZE, VOCABULARY = 13, 8, 131
TEMPERATURE = 0.7


def drawn(dtype: torch.dtype, *, cap: float | None = 20.0) -> tuple[Head, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(head, hidden states, targets, what the loss weighs each token with)."""
    draw = torch.Generator().manual_seed(0)
    head = Head(torch.randn(VOCABULARY, SIZE, generator=draw).to(dtype), torch.randn(VOCABULARY).to(dtype), cap)
    hidden = (3 * torch.randn(TOKENS, SIZE, generator=draw)).to(dtype).requires_grad_()
    return head, hidden, torch.randint(VOCABULARY, (TOKENS,), generator=draw), torch.randn(TOKENS, generator=draw)


def whole(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook way, over all logits at once."""
    logits = head(hidden)
    logs = (logits if logits.dtype == torch.float64 else logits.float()).div(TEMPERATURE).log_softmax(-1)
    return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(1)


@pytest.fixture(params=[1, 5, TOKENS + 1], ids=lambda size: f"{size} tokens a chunk")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunked, "LOGITS", {"cpu": request.param * VOCABULARY})
    return int(request.param)


@pytest.mark.usefixtures("chunk")
def test_values_and_gradients_are_those_of_the_whole_array() -> None:
    """In float64 to the last digits: of log-probs alone, and of log-probs and entropies in one loss."""
    head, hidden, targets, weights = drawn(torch.float64)
    expected, entropy = whole(head, hidden, targets)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), hidden, retain_graph=True)
    found = token_logprobs(head, hidden, targets, TEMPERATURE)
    (slope,) = torch.autograd.grad((weights * found).sum(), hidden)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(slope, wanted, atol=1e-12, rtol=1e-12)
    both = token_logprobs_and_entropies(head, hidden, targets, TEMPERATURE, gradient=True)
    torch.testing.assert_close(both, (expected, entropy), atol=1e-13, rtol=1e-13)
    (slope,) = torch.autograd.grad((weights * both[0] - 0.3 * both[1]).sum(), hidden)
    (wanted,) = torch.autograd.grad((weights * expected - 0.3 * entropy).sum(), hidden)
    torch.testing.assert_close(slope, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("chunk")
def test_entropies_that_are_only_looked_at_have_no_gradient() -> None:
    head, hidden, targets, _ = drawn(torch.float64)
    logprobs, entropy = token_logprobs_and_entropies(head, hidden, targets, TEMPERATURE, gradient=False)
    (slope,) = torch.autograd.grad((logprobs + entropy).sum(), hidden)
    (alone,) = torch.autograd.grad(whole(head, hidden, targets)[0].sum(), hidden)
    torch.testing.assert_close(slope, alone)


@pytest.mark.usefixtures("chunk")
def test_in_bfloat16_the_gradient_is_off_by_less_than_a_hundredth() -> None:
    head, hidden, targets, weights = drawn(torch.bfloat16, cap=None)
    found, expected = token_logprobs(head, hidden, targets, TEMPERATURE), whole(head, hidden, targets)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (slope,) = torch.autograd.grad((weights * found).sum(), hidden)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), hidden)
    assert (slope - wanted).float().norm() < 0.01 * wanted.float().norm()
    assert slope.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_no_array_of_tokens_by_vocabulary_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LOGITS", {"cpu": 2 * VOCABULARY})
    head, hidden, targets, weights = drawn(torch.float32)
    with Largest() as seen:
        (weights * token_logprobs(head, hidden, targets, TEMPERATURE)).sum().backward()
    assert 0 < seen.numbers <= VOCABULARY * max(2, SIZE)  # the head's own weights
    with Largest() as seen:
        (weights * whole(head, hidden, targets)[0]).sum().backward()
    assert seen.numbers == TOKENS * VOCABULARY
