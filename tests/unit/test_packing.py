"""A group read as one row gives the log-probs of its traces read one by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.engines import packing
from rlsf_ray.engines.lora import check_logits
from rlsf_ray.engines.models import load_model
from rlsf_ray.engines.packing import Row
from rlsf_ray.errors import InputError

PROMPT = np.arange(5, 17, dtype=np.int32)
TRACES = [np.array(ids, dtype=np.int32) for ids in ([9, 8, 7], [3], [50, 60, 70, 80, 90, 100])]
ROWS = [Row(PROMPT, TRACES), Row(PROMPT[:5], TRACES[1:]), Row(PROMPT[3:], TRACES[:1])]  # three groups, padded


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load_model(ModelConfig(name=str(tiny), dtype="float32"))


def one_by_one(model: Any) -> list[torch.Tensor]:
    """The textbook way: one forward pass for each trace, log-softmax, pick the tokens."""
    found = []
    for prompt, trace in [(row.prompt_ids, trace) for row in ROWS for trace in row.traces]:
        ids = torch.tensor(np.concatenate([prompt, trace])[None].astype(np.int64))
        logprob = model(input_ids=ids).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) - 1 + len(trace))
        found.append(torch.stack([logprob[row, token] for row, token in zip(rows, trace.tolist(), strict=True)]))
    return found


def flat(found: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [trace for row in found for trace in row]


@torch.no_grad()
def test_shared_row_equals_one_row_each(model: Any) -> None:
    assert packing.can_share_prompt(model)
    for ours, expected in zip(flat(packing.trace_logprobs(model, ROWS)), one_by_one(model), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_plain_rows_equal_one_row_each(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "can_share_prompt", lambda model: False)
    for ours, expected in zip(flat(packing.trace_logprobs(model, ROWS)), one_by_one(model), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"layer_types": ["full_attention", "full_attention"]}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"sliding_window": 4096}, False),
        ({"_attn_implementation": "flash_attention_2"}, False),
        ({"model_type": "mamba2"}, False),
    ],
)
def test_only_full_attention_models_share_the_prompt(settings: dict[str, Any], shares: bool) -> None:
    config = SimpleNamespace(**({"_attn_implementation": "sdpa", "model_type": "llama"} | settings))
    assert packing.can_share_prompt(SimpleNamespace(config=config)) is shares


@torch.no_grad()
def test_a_trace_does_not_see_its_neighbours(model: Any) -> None:
    alone = packing.trace_logprobs(model, [Row(PROMPT, TRACES[2:])])[0][0]
    with_others = packing.trace_logprobs(model, [Row(PROMPT, TRACES)])[0][2]
    torch.testing.assert_close(alone, with_others, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_prompt_is_read_once(model: Any) -> None:
    """The longest row: 12 prompt tokens and 3 + 1 + 6 trace tokens are 22 positions, not 3 * 12 + 10."""
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, i, output: seen.append(output.shape[1]))
    packing.trace_logprobs(model, ROWS)
    handle.remove()
    assert seen == [22]


def test_an_unknown_last_step_on_the_logits_is_refused(model: Any) -> None:
    check_logits(model)
    head = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = head(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    try:
        with pytest.raises(InputError, match="does not know"):
            check_logits(model)
    finally:
        model.forward = head


@pytest.mark.parametrize("max_tokens", [1, 20, 10_000])
def test_texts_read_in_small_passes_give_the_same(model: Any, max_tokens: int) -> None:
    texts = [(row.prompt_ids, trace) for row in ROWS for trace in row.traces]
    for ours, expected in zip(packing.read_texts(model, texts, max_tokens), one_by_one(model), strict=True):
        np.testing.assert_allclose(ours, expected.detach().numpy(), atol=2e-5)
