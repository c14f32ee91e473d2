"""Statistics in tiles against the whole array, on a vocabulary that no tile divides."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlsf_ray.algorithms.signals import TOP
from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.engines import distribution
from rlsf_ray.engines.lora import Head
from rlsf_ray.engines.models import load_model
from rlsf_ray.engines.packing import Row, trace_logprobs

SMALL_PEAK = """
import numpy as np, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from rlsf_ray.engines.distribution import read_distributions
from rlsf_ray.engines.packing import Row

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=150_000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
    max_position_embeddings=4096, tie_word_embeddings=True,
)).eval()
ids = np.arange(2048, dtype=np.int32)
read_distributions(model, [Row(ids[:4], [ids[:4]])])  # what torch itself takes at first
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, and not that of whoever started us
before = peak()
read_distributions(model, [Row(ids[:4], [ids])])
print(peak() - before)
"""


def whole(logits: torch.Tensor, chosen: torch.Tensor) -> np.ndarray:
    """The same statistics [N, 7] from all logits [N, V] at once, in float64."""
    logs = logits.double().log_softmax(-1)
    p = logs.exp()
    top = logs.topk(TOP).values.log_softmax(-1)
    pair = p.topk(2).values
    return torch.stack(
        [
            logs.gather(1, chosen[:, None])[:, 0],
            pair[:, 0],
            pair[:, 1],
            -(p * logs).sum(1),
            -(logs.mean(1)) - math.log(logs.shape[1]),  # KL(U || p) = -log V - mean log p
            -(top.exp() * top).sum(1),
            -(top.mean(1)) - math.log(TOP),
        ],
        dim=1,
    ).numpy()


@pytest.mark.parametrize("tile", [7, 64, 1000])
@pytest.mark.parametrize("scale", [0.1, 30.0])  # nearly uniform; nearly sure
def test_tiles_give_what_the_whole_array_gives(monkeypatch: pytest.MonkeyPatch, tile: int, scale: float) -> None:
    monkeypatch.setattr(distribution, "TILE_COLUMNS", tile)
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(131, 8, generator=generator), torch.randn(131, generator=generator), 50.0)
    hidden = scale * torch.randn(9, 8, generator=generator)
    chosen = torch.tensor([0, 130, 6, 7, 63, 64, 127, 128, 100])  # on both sides of the tiles' borders
    found = distribution._tile_statistics(head, hidden, chosen).double().numpy()
    np.testing.assert_allclose(found, whole(head(hidden), chosen), rtol=2e-4, atol=2e-5)


def test_reading_a_model_gives_each_trace_its_own_statistics(tiny: Path) -> None:
    model = load_model(ModelConfig(name=str(tiny), dtype="float32"), device="cpu")
    prompt, traces = (
        np.array([5, 6, 7], dtype=np.int32),
        [np.array(ids, dtype=np.int32) for ids in ([8, 9], [10, 11, 12])],
    )
    rows = [Row(prompt, traces), Row(traces[1], traces[:1])]
    found = distribution.read_distributions(model, rows)
    assert [[len(one.entropy) for one in row] for row in found] == [[2, 3], [2]]
    with torch.inference_mode():
        expected = trace_logprobs(model, rows)
        logits = model(torch.tensor([[5, 6, 7, 10, 11, 12]])).logits[0, 2:5].float()
    for row, logprobs in zip(found, expected, strict=True):
        for one, values in zip(row, logprobs, strict=True):
            np.testing.assert_allclose(one.logprob, values.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.stack(found[0][1], axis=1), whole(logits, torch.tensor([10, 11, 12])), atol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_vocabulary_of_150_000_takes_little_memory() -> None:
    """2048 tokens x 150,000 in float32 are 1.2 GB; the peak may rise by a fifth, attention included."""
    done = subprocess.run([sys.executable, "-c", SMALL_PEAK], capture_output=True, text=True, check=True, timeout=240)
    assert 0 < int(done.stdout) < 240_000, f"the peak rose by {int(done.stdout)} kB"
