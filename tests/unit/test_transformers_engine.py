"""Generation: statistics are the model's own, seeds repeat, versions are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsf_ray.config_sections import LearnerConfig, ModelConfig
from rlsf_ray.engines import packing
from rlsf_ray.engines import transformers_engine as module
from rlsf_ray.engines.base import Completion, Request, Sampling
from rlsf_ray.engines.lora import adapter_arrays
from rlsf_ray.engines.models import load_model, load_tokenizer
from rlsf_ray.engines.tokens import token_characters
from rlsf_ray.engines.transformers_engine import TransformersEngine
from rlsf_ray.errors import EngineError, InputError, WeightsError
from rlsf_ray.records import Prompt

SAMPLE = Sampling(method="sample", max_tokens=16, temperature=1.0)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> TransformersEngine:
    return TransformersEngine(ModelConfig(name=str(tiny), dtype="float32"), LearnerConfig(lora_rank=4))


def prompt(text: str) -> Prompt:
    return Prompt(id=text, messages=(("user", text),), task="t", key=text)


def requests(
    engine: TransformersEngine, texts: list[str], seeds: int = 3, sampling: Sampling = SAMPLE
) -> list[Request]:
    ids = [engine.encode(prompt(text)) for text in texts]
    return [Request(prompt_ids=own, seeds=tuple(range(seeds)), sampling=sampling) for own in ids]


def grown(engine: TransformersEngine, scale: float) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    arrays = adapter_arrays(engine._model)
    return {name: scale * generator.standard_normal(a.shape).astype(np.float32) for name, a in arrays.items()}


def logprobs(engine: TransformersEngine, request: Request, completion: Completion) -> torch.Tensor:
    with torch.no_grad():
        return packing.trace_logprobs(engine._model, [packing.Row(request.prompt_ids, [completion.token_ids])])[0][0]


def test_statistics_are_the_raw_distribution_of_a_teacher_forced_pass(engine: TransformersEngine, tiny: Path) -> None:
    hot = Sampling(method="sample", max_tokens=16, temperature=1.7)
    made = requests(engine, ["1 + 2 =", "a much longer question about 17 + 25 and more"], sampling=hot)
    base = load_model(ModelConfig(name=str(tiny), dtype="float32"))
    for request, group in zip(made, engine.generate(made, 0), strict=True):
        for completion in group:
            ids = torch.tensor(np.concatenate([request.prompt_ids, completion.token_ids])[None].astype(np.int64))
            with torch.no_grad():
                logits = base(input_ids=ids).logits[0]
            rows = logits[len(request.prompt_ids) - 1 : -1].log_softmax(-1)
            chosen = rows.gather(1, torch.tensor(completion.token_ids, dtype=torch.long)[:, None])[:, 0]
            top = rows.exp().topk(2, dim=-1).values
            np.testing.assert_allclose(completion.logprob, chosen.numpy(), atol=1e-4)
            np.testing.assert_allclose(np.stack([completion.top1, completion.top2], 1), top.numpy(), atol=1e-4)


def test_a_trace_depends_on_its_seed_and_not_on_its_batch(engine: TransformersEngine) -> None:
    made = requests(engine, ["1 + 2 =", "30 + 4 =", "a longer question: 5 + 6 ="])
    together = engine.generate(made, 0)
    for request, group in zip(made, together, strict=True):
        alone = engine.generate([request], 0)[0]
        assert [c.token_ids.tolist() for c in alone] == [c.token_ids.tolist() for c in group]
    texts = {tuple(c.token_ids) for c in together[0]}
    assert len(texts) == 3, "different seeds gave the same trace"


def test_samples_follow_the_distribution(engine: TransformersEngine) -> None:
    """4000 one-token samples against the model's own probabilities: every likely token within 5 sigma."""
    begun = np.concatenate([engine.encode(prompt("7 + 8 =")), engine.encode_text("The answer is")])
    one = Sampling(method="sample", max_tokens=1, temperature=1.0)
    many = Request(prompt_ids=begun, seeds=tuple(range(4000)), sampling=one)
    tokens = [int(c.token_ids[0]) for c in engine.generate([many], 0)[0]]
    with torch.no_grad(), engine._model.disable_adapter():
        ids = torch.tensor(begun[None].astype(np.int64))
        expected = engine._model(input_ids=ids).logits[0, -1].softmax(-1).numpy()
    found = np.bincount(tokens, minlength=len(expected)) / len(tokens)
    likely = expected > 0.01
    sigma = np.sqrt(expected * (1 - expected) / len(tokens))
    assert likely.sum() >= 3
    assert (np.abs(found - expected)[likely] < 5 * sigma[likely]).all()


def test_greedy_takes_the_likeliest_token_everywhere(engine: TransformersEngine) -> None:
    made = requests(engine, ["1 + 2 ="], 1, Sampling(method="greedy", max_tokens=8))
    greedy = engine.generate(made, 0)[0][0]
    np.testing.assert_allclose(np.exp(greedy.logprob), greedy.top1, rtol=1e-5)


def test_branches_start_with_the_likeliest_first_tokens_and_go_on_greedily(engine: TransformersEngine) -> None:
    request = requests(engine, ["1 + 2 ="], 5, Sampling(method="branch", max_tokens=6))[0]
    branches = engine.generate([request], 0)[0]
    with torch.no_grad(), engine._model.disable_adapter():
        logits = engine._model(input_ids=torch.tensor(request.prompt_ids[None].astype(np.int64))).logits[0, -1]
    assert [int(c.token_ids[0]) for c in branches] == logits.topk(5).indices.tolist()
    for completion in branches:
        np.testing.assert_allclose(np.exp(completion.logprob[1:]), completion.top1[1:], rtol=1e-5)


def test_each_request_of_a_batch_is_written_in_its_own_way(engine: TransformersEngine) -> None:
    """Sampled hot and cool, greedy and branching, with other limits, of the same prompt and of another: as if alone."""
    ways = [
        SAMPLE,
        Sampling(method="greedy", max_tokens=4),
        Sampling(method="sample", max_tokens=9, temperature=0.3),
        Sampling(method="branch", max_tokens=12),
    ]
    mixed = [made for way in ways for made in requests(engine, ["1 + 2 =", "a longer one: 30 + 4 ="], 3, way)]
    together = engine.generate(mixed, 0)
    for request, group in zip(mixed, together, strict=True):
        alone = engine.generate([request], 0)[0]
        assert [c.token_ids.tolist() for c in alone] == [c.token_ids.tolist() for c in group]
        assert [c.finished for c in alone] == [c.finished for c in group]
        assert max(len(c.token_ids) for c in group) <= request.sampling.max_tokens


def test_small_token_budget_changes_nothing(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(engine, ["1 + 2 =", "30 + 4 =", "5 + 6 ="])
    whole = engine.generate(made, 0)
    monkeypatch.setattr(module, "TOKEN_BUDGET", 10)
    split = engine.generate(made, 0)
    assert [[c.text for c in g] for g in whole] == [[c.text for c in g] for g in split]


def test_versions_are_swapped_in_place_and_version_0_is_the_base(engine: TransformersEngine) -> None:
    made = requests(engine, ["1 + 2 ="])
    base = engine.generate(made, 0)[0]
    engine.load_version(1, grown(engine, 0.3))
    engine.load_version(2, grown(engine, -0.5))
    first, second = engine.generate(made, 1)[0], engine.generate(made, 2)[0]
    assert base[0].logprob[0] != first[0].logprob[0] != second[0].logprob[0]
    again = engine.generate(made, 0)[0]
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in base]
    engine._activate(1)
    np.testing.assert_allclose(first[1].logprob, logprobs(engine, made[0], first[1]).numpy(), atol=1e-4)


def test_an_unknown_version_and_a_wrong_adapter_are_named(engine: TransformersEngine) -> None:
    with pytest.raises(EngineError, match="version 99 is not loaded"):
        engine.generate(requests(engine, ["1 + 2 ="]), 99)
    adapter = grown(engine, 1.0)
    name = sorted(adapter)[0]
    with pytest.raises(WeightsError, match="expected shape"):
        engine.load_version(7, adapter | {name: adapter[name][:1]})
    del adapter[name]
    with pytest.raises(WeightsError, match="does not fit the model"):
        engine.load_version(7, adapter)


def test_a_prompt_longer_than_the_context_is_an_input_error(engine: TransformersEngine) -> None:
    with pytest.raises(InputError, match="do not fit the model's context of 512"):
        engine.generate([Request(prompt_ids=np.ones(500, dtype=np.int32), seeds=(0,), sampling=SAMPLE)], 0)


@pytest.mark.parametrize("text", ["17 + 25 = 42", "caf\u00e9 \u4f60\u597d \U0001f600!", ""])
def test_token_characters_cover_the_text(tiny: Path, text: str) -> None:
    tokenizer: Any = load_tokenizer(ModelConfig(name=str(tiny)))
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found, spans = token_characters(tokenizer, ids)
    assert found == text
    covered = {i for start, end in spans for i in range(start, end)}
    assert covered == set(range(len(text)))
    assert spans[-1].tolist() == [len(text), len(text)], "the end token covers nothing"


def test_tokens_of_one_character_share_its_range(tiny: Path) -> None:
    tokenizer: Any = load_tokenizer(ModelConfig(name=str(tiny)))
    ids = tokenizer("\u4f60", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3, "three bytes, three tokens"
    assert token_characters(tokenizer, ids)[1].tolist() == [[0, 1]] * 3
