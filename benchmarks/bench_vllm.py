"""What do the actors cost? The same texts by bare `vllm.LLM`, through the generator pool, and by transformers.

    python benchmarks/bench_vllm.py [--model NAME] [--set KEY=VALUE]... [--prompts N] [--turns N] [--json] [--out PATH]

In turns on one machine: every writer writes the same prompts with the same sampling parameters, seeds, log-probs and
adapter; the first turn warms up and is not counted. Bare vLLM gets the same engine arguments, and the version in the
same way: as an adapter, or folded into its weights. `--set swap=adapter` chooses. The pool also finds answers and
hands its groups to Ray's object store. The ratio is of the turn's neighbours; its median is the result.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from bench_common import (
    BenchPool,
    Ratio,
    base_parser,
    bench_pool,
    drawn_adapter,
    machine_facts,
    own_ray,
    parse,
    prompts_of,
    small_config,
    version_files,
    write_result,
)

from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Adapter
from rlsf_ray.engines.lora import merges
from rlsf_ray.plan import local_resources
from rlsf_ray.records import Json, Prompt

# On one GPU three writers stand side by side, and nothing else
SIDE_BY_SIDE = ["cluster.generators.gpus=0.3", "engine_args={gpu_memory_utilization: 0.27}"]
OUT = Path(__file__).parent / "results" / "bench_vllm.json"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    overrides = ["engine=vllm", *(SIDE_BY_SIDE if local_resources()["GPU"] else []), *options.set]
    config = small_config(options.model, overrides, options.prompts, "bench_vllm")
    writers = measure(config, options.turns)
    result = {
        "machine": machine_facts("vllm"),
        "settings": _settings(config, options),
        "writers": writers,
        "pool_over_bare": ratio(writers, "pool, vllm", "bare vllm"),
        "pool_over_transformers": ratio(writers, "pool, vllm", "pool, transformers"),
    }
    write_result(result, options.out, None if options.json else as_text(result))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser(__doc__, OUT)
    parser.add_argument("--prompts", type=int, default=48, metavar="N", help="prompts in each turn [default: 48]")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="counted turns [default: 3]")
    return parse(parser, arguments)


def _settings(config: RunConfig, options: argparse.Namespace) -> Json:
    rollout = {"traces": config.rollout.traces, "max_tokens": config.rollout.max_tokens}
    size = {"prompts": options.prompts, "prompts_per_call": config.cluster.prompts_per_call, "turns": options.turns}
    size["swap"] = "merged" if merges(config.swap) else "adapter"
    return {"model": Path(config.model.name).name, "dtype": config.model.dtype, **rollout, **size, "set": options.set}


def measure(config: RunConfig, turns: int) -> Json:
    """{writer: {"tokens": [...], "tokens_per_s": [...]} with an entry for each counted turn}."""
    adapter = drawn_adapter(config)
    with own_ray(), tempfile.TemporaryDirectory() as folder:
        bare = BareVLLM(config, adapter, Path(folder))
        try:
            return asyncio.run(_in_turns(config, adapter, bare, turns))
        finally:
            bare.close()


async def _in_turns(config: RunConfig, adapter: Adapter, bare: BareVLLM, turns: int) -> Json:
    plain = config.model_copy(update={"engine": "transformers", "engine_args": {}, "swap": None})
    found: Json = {}
    async with AsyncExitStack() as stack:
        pools = [await stack.enter_async_context(bench_pool(one, [adapter])) for one in (config, plain)]
        writers: dict[str, Callable[[Sequence[Prompt], int], Any]] = {
            "bare vllm": bare.write,
            "pool, vllm": _through(pools[0]),
            "pool, transformers": _through(pools[1]),
        }
        for turn in range(1 + turns):
            prompts = prompts_of(config, turn)
            for name in sorted(writers, reverse=turn % 2 == 0):  # who comes first has no lasting advantage
                start = time.perf_counter()
                tokens = await writers[name](prompts, turn)
                rate = tokens / (time.perf_counter() - start)
                if turn:
                    row = found.setdefault(name, {"tokens": [], "tokens_per_s": []})
                    row["tokens"].append(tokens)
                    row["tokens_per_s"].append(round(rate, 1))
    return found


def _through(pool: BenchPool) -> Callable[[Sequence[Prompt], int], Any]:
    async def write(prompts: Sequence[Prompt], round: int) -> int:
        return (await pool.write(prompts, round))[0]

    return write


class BareVLLM:
    """`vllm.LLM` with the engine's own arguments, and one version of the weights."""

    def __init__(self, config: RunConfig, adapter: Adapter, folder: Path) -> None:
        from rlsf_ray.engines.models import context_length, find_model, load_tokenizer
        from rlsf_ray.engines.vllm_start import engine_arguments, set_environment

        set_environment()
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._config, model = config, find_model(config.model.name)
        self._tokenizer = load_tokenizer(config.model)
        context, merged = context_length(model), merges(config.swap)
        held = None if merged else config.cluster.max_staleness + 2
        chosen = engine_arguments(config.model, config.learner, model, context=context, max_versions=held)
        self._llm: Any = LLM(**(chosen | config.engine_args))
        version_files(config, adapter, folder)
        if merged:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._lora = None if merged else LoRARequest(lora_name="version-1", lora_int_id=1, lora_path=str(folder))

    async def write(self, prompts: Sequence[Prompt], round: int) -> int:
        """Tokens written."""
        from rlsf_ray.engines.tokens import encode_prompt
        from rlsf_ray.engines.vllm_params import sampling_params
        from rlsf_ray.rollouts.programs import trace_seed

        rollout, salt = self._config.rollout, f"{self._config.seed}/round-{round}"
        asked, params = [], []
        for prompt in prompts:
            ids = encode_prompt(self._tokenizer, self._config.model, prompt).tolist()
            for k in range(rollout.traces):
                asked.append({"prompt_token_ids": ids})
                seed = trace_seed(salt, prompt.id, k)
                params.append(sampling_params(rollout.max_tokens, temperature=rollout.temperature, seed=seed))
        outputs = self._llm.generate(asked, params, lora_request=self._lora, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.llm_engine.engine_core.shutdown()


def ratio(writers: Json, one: str, other: str) -> Json:
    """tokens/s of `one` over those of `other`, turn by turn: {"median", "low", "high"}."""
    pairs = zip(writers[one]["tokens_per_s"], writers[other]["tokens_per_s"], strict=True)
    found = [a / b for a, b in pairs]
    return {"median": round(statistics.median(found), 3), "low": round(min(found), 3), "high": round(max(found), 3)}


def ratios(result: Json) -> list[Ratio]:
    """What speed.py shows."""
    names = {"pool_over_bare": ("bare vLLM", 0.9), "pool_over_transformers": ("a pool with transformers", None)}
    return [
        Ratio(f"tokens/s of the generator pool with vLLM over {other}", **result[key], target=target)
        for key, (other, target) in names.items()
    ]


def as_text(result: Json) -> str:
    """The result for a terminal."""
    lines = [", ".join(f"{name} {value}" for name, value in result["machine"].items()), ""]
    lines.append(f"{'writer':<20}{'tokens/s, each turn':>36}{'tokens':>24}")
    for name, row in result["writers"].items():
        rates, tokens = (", ".join(f"{value:.0f}" for value in row[key]) for key in ("tokens_per_s", "tokens"))
        lines.append(f"{name:<20}{rates:>36}{tokens:>24}")
    for key, what in (("pool_over_bare", "bare vllm"), ("pool_over_transformers", "transformers")):
        found = result[key]
        lines.append(f"pool over {what}: {found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
