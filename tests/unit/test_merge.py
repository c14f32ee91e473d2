"""Folding an adapter into weights: what rounding may and may not do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config

from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.lora import rounded, write_merged
from rlsf_ray.errors import WeightsError


def test_rounding_keeps_the_mean_of_what_is_less_than_half_a_step() -> None:
    """Above 1, bfloat16 has steps of 1/128: 1 + 1/512 is 1 three times of four, and 1 + 1/128 once."""
    values = torch.full((200, 500), 1 + 1 / 512)
    found = rounded(values, torch.bfloat16, "layer")
    assert set(found.float().unique().tolist()) == {1.0, 1 + 1 / 128}
    assert found.double().mean().item() == pytest.approx(1 + 1 / 512, abs=1e-4)
    assert rounded(-values, torch.bfloat16, "layer").double().mean().item() == pytest.approx(-1 - 1 / 512, abs=1e-4)
    assert (values.bfloat16() == 1.0).all(), "rounded to the nearest, all of it would be gone"


def test_what_bfloat16_can_hold_stays_and_float32_is_left_alone() -> None:
    held = torch.randn(50, 50).bfloat16()
    assert (rounded(held.float(), torch.bfloat16, "a") == held).all()
    values = torch.randn(50, 50)
    assert (rounded(values, torch.float32, "a") == values).all()


def test_rounding_is_the_same_each_time_and_differs_from_layer_to_layer() -> None:
    values = torch.randn(50, 50)
    once, again, other = (rounded(values, torch.bfloat16, name) for name in ("a", "a", "b"))
    assert (once == again).all()
    assert (once != other).any()


def test_a_merged_file_is_base_and_adapter_in_the_type_asked_for(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny)
    adapter = Learner(config).adapter()
    draw = np.random.default_rng(0)
    adapter = {n: draw.normal(0, 0.1, a.shape).astype(np.float32) if ".lora_B." in n else a for n, a in adapter.items()}
    base = load_file(tiny / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        write_merged(tiny, adapter, 8.0, dtype, tmp_path / "merged")
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        name = next(n for n in adapter if n.endswith(".lora_A.weight"))
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
        up = adapter[name.replace(".lora_A.", ".lora_B.")]
        expected = base[layer].to(dtype).float() + 8.0 / 4 * torch.tensor(up @ adapter[name])
        assert merged[layer].dtype == dtype
        off = (merged[layer].float() - expected).abs() / expected.abs()
        assert off.max() < (1 / 128 if dtype == torch.bfloat16 else 1e-5)


def test_an_adapter_that_is_not_finite_is_refused(tiny: Path, tmp_path: Path) -> None:
    adapter = Learner(tiny_config(tiny)).adapter()
    name = next(iter(adapter))
    adapter[name] = np.full_like(adapter[name], np.nan)
    with pytest.raises(WeightsError, match=r"holds nan or inf"):
        write_merged(tiny, adapter, 8.0, torch.float32, tmp_path / "merged")
