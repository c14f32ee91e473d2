"""Base and adapter as one sum: nothing of a small adapter is lost to bfloat16, and gradients are those of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_config

from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.lora import sum_at_once, sums_at_once

SIZE = 256


class Layer(torch.nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(SIZE, SIZE, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def wrapped(dtype: torch.dtype, scale: float, *, bias: bool = False) -> Any:
    """A layer whose output is near 1, with an adapter (float32, as in training) that adds about `scale`."""
    torch.manual_seed(0)
    made = get_peft_model(Layer(bias=bias).to(dtype), LoraConfig(r=4, lora_alpha=4, target_modules=["inner"]))
    inner = made.base_model.model.inner
    inner.base_layer.weight.data = torch.randn(SIZE, SIZE).to(dtype) / SIZE**0.5
    inner.lora_A["default"].weight.data = torch.randn(4, SIZE) / SIZE**0.5
    inner.lora_B["default"].weight.data = scale / 2 * torch.randn(SIZE, 4)
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_in_float32_both_ways_and_their_gradients_are_equal(bias: bool) -> None:
    x, results = torch.randn(3, 5, SIZE), []
    for at_once in (True, False):
        model = wrapped(torch.float32, 0.1, bias=bias)
        sum_at_once(model, at_once=at_once)
        out = model(x)
        out.square().sum().backward()
        inner = model.base_model.model.inner
        results.append([out, inner.lora_A["default"].weight.grad, inner.lora_B["default"].weight.grad])
        assert inner.base_layer.weight.grad is None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_small_adapter_is_lost_after_rounding_and_kept_before(bias: bool) -> None:
    """Outputs near 1 have steps of 1/128; the adapter adds about 0.001."""
    x, shares = torch.randn(200, SIZE).bfloat16(), {}
    for at_once in (True, False):
        model = wrapped(torch.bfloat16, 0.001, bias=bias)
        inner = model.base_model.model.inner
        sum_at_once(model, at_once=at_once)
        with torch.no_grad():
            expected = inner.lora_B["default"](inner.lora_A["default"](x.float())).double()
            moved = model(x).double()
            with model.disable_adapter():
                moved -= model(x).double()
        shares[at_once] = float((moved * expected).sum() / expected.square().sum())
    assert shares[True] == pytest.approx(1.0, abs=0.15)
    assert shares[False] < 0.7


def test_training_sums_at_once_and_reads_for_generators_as_they_do(tiny: Path) -> None:
    config = tiny_config(tiny, cluster={"generators": {"threads": 0}}, engine="vllm", swap="adapter")
    learner = Learner(config.model_copy(update={"model": ModelConfig(name=str(tiny), dtype="bfloat16")}))
    draw = np.random.default_rng(0)
    learner.set_adapter(
        {
            n: draw.normal(0, 0.02, a.shape).astype(np.float32) if ".lora_B." in n else a
            for n, a in learner.adapter().items()
        }
    )
    texts = [(np.arange(3, 9, dtype=np.int32), np.arange(5, 25, dtype=np.int32))]
    own, like = (learner.logprobs(texts, like_generators=way)[0] for way in (False, True))
    assert (own != like).any()
    assert (learner.logprobs(texts)[0] == own).all(), "afterwards it sums at once again"
    assert not sums_at_once(config)
    assert sums_at_once(config.model_copy(update={"swap": "merged"}))
    assert sums_at_once(tiny_config(tiny))
