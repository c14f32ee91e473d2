"""SmolLM2-135M-Instruct in bfloat16: one small round in one process, and the learner's way of reading a group."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needs import REAL_MODEL

from rlsf_ray import loop
from rlsf_ray.config_loading import load_config
from rlsf_ray.engines import packing
from rlsf_ray.engines.models import load_model, load_tokenizer
from rlsf_ray.engines.packing import Row
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets

pytestmark = [
    pytest.mark.real_model,
    REAL_MODEL,
]

# One round of 4 prompts x 4 traces. Random pairs: whether the model can be right is not the question here.
SMALL = (
    "rounds=1",
    "prompts_per_round=4",
    "data.probe=[]",
    "data.calibration=0",
    "rollout.traces=4",
    "rollout.max_tokens=48",
    "pairs.rule=random",
    "pairs.surest=null",
    "pairs.min_chosen=0.0",
    "pairs.same_answer=true",
    "learner.epochs=1",
    "learner.pairs_per_step=4",
    "learner.warmup_steps=0",
)


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """conftest.py sets one thread for the tiny model; this one is large enough for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(threads: None, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The run directory of the small round."""
    root = str(tmp_path_factory.mktemp("real") / "run")
    loop.run(load_config("rlsf", SMALL), root)
    return RunStore.open(root)


@pytest.fixture(scope="module")
def rows(store: RunStore) -> list[Row]:
    """Two of its groups as the learner reads them: the prompt, then four traces."""
    tokenizer = load_tokenizer(store.config.model)
    prompts = {prompt.id: prompt for prompt in load_sets(store.config).train}
    groups: dict[str, list[Json]] = {}
    for trace in store.read_table("traces").to_pylist():
        groups.setdefault(trace["prompt_id"], []).append(trace)
    rows = []
    for name, traces in list(groups.items())[:2]:
        messages = [{"role": role, "content": content} for role, content in prompts[name].messages]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        rows.append(Row(np.asarray(prompt, np.int32), [np.asarray(t["token_ids"], np.int32) for t in traces]))
    return rows


@pytest.fixture(scope="module")
def model(store: RunStore) -> Any:
    return load_model(store.config.model, device="cpu")


def test_a_small_round_leaves_a_whole_run_directory(store: RunStore) -> None:
    summary = store.read_json("summary.json")
    count = summary["accounting"]
    assert (summary["status"], summary["model"]) == ("done", "smollm2")
    assert count["admitted"] == 4 == count["trained"] + count["filtered"]
    assert count["trained"] > 0
    traces = store.read_table("traces").to_pylist()
    assert len(traces) == 16
    assert all(len(trace["logprob"]) == len(trace["token_ids"]) <= 48 for trace in traces)
    assert all(0 < top1 <= 1 for trace in traces for top1 in trace["top1"])
    assert sum(trace["answer"] is not None for trace in traces) > 4, "most traces state a number"
    assert all(np.isfinite(row["loss"]) for row in store.read_metrics("train"))
    assert store.versions() == [1]


def read(model: Any, rows: list[Row]) -> torch.Tensor:
    """Log-probs of all tokens of all traces, one after the other."""
    return torch.cat([trace for row in packing.trace_logprobs(model, rows) for trace in row])


@torch.no_grad()
def test_one_row_for_a_group_equals_one_row_for_each_trace_within_bfloat16(
    model: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the two agree to 1e-3. In bfloat16 (8 bits: a logit near 20 is rounded by up to 0.06, and each layer
    rounds again) both are off, by 0.03 on the mean token; the shared row may be off by at most twice as much.
    """
    exact = copy.deepcopy(model).float()
    assert packing.can_share_prompt(model)
    shared, exact_shared = read(model, rows), read(exact, rows)
    monkeypatch.setattr(packing, "can_share_prompt", lambda model: False)
    separate, truth = read(model, rows), read(exact, rows)
    assert len(shared) == sum(len(trace) for row in rows for trace in row.traces) > 50
    torch.testing.assert_close(exact_shared, truth, atol=1e-3, rtol=1e-4)
    off_shared, off_separate = (shared - truth).abs().mean(), (separate - truth).abs().mean()
    assert off_shared < 2 * off_separate
    assert (shared - separate).abs().mean() < 0.1


@torch.no_grad()
def test_the_published_adapter_loads_with_peft_and_changes_log_probs(
    store: RunStore, model: Any, rows: list[Row]
) -> None:
    from peft import PeftModel

    before = read(model, rows)
    adapted = PeftModel.from_pretrained(model, Path(store.path("versions/0001")))
    assert (read(adapted, rows) - before).abs().mean() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(read(adapted, rows), before)
