"""Do vLLM, the transformers engine and the trainer mean the same? Greedy tokens, and log-probs of the same tokens.

    python benchmarks/bench_agreement.py runs/rlsf-seed0 [--prompts 32] [--dtype float32] [--swap adapter] [--out FILE]

Compares base model and newest adapter of a finished run on its probe prompts. The standard deviation of an engine's
log-probs around the trainer's is the noise that the proof of delivery reckons with (engines/base.py: LOGPROB_NOISE).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlsf_ray.engines.base import Engine, Request, Sampling
from rlsf_ray.records import FloatArray, IntArray, Json
from rlsf_ray.run_store import RunStore

OUT = Path(__file__).parent / "results" / "bench_agreement.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="run directory with at least one version")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="instead of the run's own")
    parser.add_argument("--swap", choices=("adapter", "merged"), help="how vLLM takes the version in")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    store = RunStore.open(options.run)
    model = store.config.model.model_copy(update={"dtype": options.dtype or store.config.model.dtype})
    store.config = store.config.model_copy(update={"model": model, "swap": options.swap})
    found = compare(store, options.prompts)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    print(f"written to {options.out}")


def compare(store: RunStore, num_prompts: int) -> Json:
    """{version: {"equal_tokens", "vllm - trainer": {...}, "transformers - trainer": {...}, ...}}."""
    from rlsf_ray.engines.build import build_engine
    from rlsf_ray.engines.learner import Learner
    from rlsf_ray.tasks.sources import load_sets

    config = store.config
    prompts = [item.prompt for item in load_sets(config).probe[:num_prompts]]
    engines: dict[str, Engine] = {
        name: build_engine(config.model_copy(update={"engine": name})) for name in ("transformers", "vllm")
    }
    trainer, newest = Learner(config), store.versions()[-1]
    adapters = {0: {name: np.zeros_like(array) for name, array in trainer.adapter().items()}}
    adapters[newest] = store.read_adapter(newest)[0]
    greedy = Sampling(method="greedy", max_tokens=config.rollout.max_tokens)
    sampled = Sampling(max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature)
    found: Json = {"prompts": len(prompts), "run": config.recipe, "dtype": config.model.dtype, "swap": config.swap}
    for version, adapter in adapters.items():
        trainer.set_adapter(adapter)
        written = {}
        for name, engine in engines.items():
            if version:
                engine.load_version(version, adapter)
            asked = [Request(prompt_ids=engine.encode(p), seeds=(0,), sampling=greedy) for p in prompts]
            written[name] = [group[0].token_ids for group in engine.generate(asked, version)]
        asked = [Request(prompt_ids=r.prompt_ids, seeds=(0, 1), sampling=sampled) for r in asked]
        groups = engines["vllm"].generate(asked, version)
        texts = [(r.prompt_ids, t.token_ids) for r, group in zip(asked, groups, strict=True) for t in group]
        read = {name: np.concatenate(engine.logprobs(texts, version)) for name, engine in engines.items()}
        read["trainer"] = np.concatenate(trainer.logprobs(texts))
        read["vllm, while writing"] = np.concatenate([t.logprob for group in groups for t in group])
        found[f"version {version}"] = {"greedy": equal(written["vllm"], written["transformers"])} | {
            f"{name} - {to}": spread(read[name] - read[to])
            for name, to in (
                ("vllm", "trainer"),
                ("transformers", "trainer"),
                ("vllm", "transformers"),
                ("vllm, while writing", "trainer"),
            )
        }
    engines["vllm"].close()
    return found


def equal(ours: Sequence[IntArray], theirs: Sequence[IntArray]) -> Json:
    """Share of texts that are wholly equal, and of tokens that stand before the first difference."""
    before, total, whole = 0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        length = min(len(a), len(b))
        differ = np.flatnonzero(a[:length] != b[:length])
        same = int(differ[0]) if len(differ) else length
        before, total, whole = before + same, total + max(len(a), len(b)), whole + (same == len(a) == len(b))
    return {"equal_texts": whole / len(ours), "equal_tokens": before / total}


def spread(differences: FloatArray) -> Json:
    """How log-probs differ, in nats."""
    size = np.abs(differences)
    result: dict[str, Any] = {"tokens": len(size), "mean": differences.mean(), "std": differences.std()}
    result |= {"median_size": np.median(size), "p99_size": np.quantile(size, 0.99), "max_size": size.max()}
    return {key: round(float(value), 5) if key != "tokens" else value for key, value in result.items()}


if __name__ == "__main__":
    main()
