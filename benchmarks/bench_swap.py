"""What does a swap cost? Blocks of the same work, every other one with a new version in the midst of it.

    python benchmarks/bench_swap.py [--model NAME] [--set KEY=VALUE]... [--prompts N] [--swaps N] [--json] [--out PATH]

The trainer's part is made beforehand: the versions, and the log-probs of each on some traces. A swap is then what it
is in a run: the WeightStore publishes a saved checkpoint, the pool tells each generator, which fetches the version,
loads it and proves that it writes with it, while all of them write. `--set swap=adapter` or `swap=merged` chooses how.
A block is as many prompts as a round of a run would have, or fewer: with fewer, swaps come more often than in a run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
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
from safetensors.numpy import save

from actors.weight_store import ADAPTER_FILE
from rlsf_ray.adapters import CANARY_FILE, canaries_to_bytes, checksum
from rlsf_ray.config import RunConfig
from rlsf_ray.engines.base import Adapter
from rlsf_ray.engines.lora import merges
from rlsf_ray.records import Canary, Group, Json

CANARIES = 16
LOOK_S = 0.005
OUT = Path(__file__).parent / "results" / "bench_swap.json"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    config = small_config(
        options.model, ["engine=vllm", "cluster.prompts_per_call=4", *options.set], options.prompts, "bench_swap"
    )
    with own_ray(), tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(measure(config, options.swaps, Path(folder)))
    settings = {"model": Path(config.model.name).name, "prompts": options.prompts, "swaps": options.swaps}
    settings["swap"] = "merged" if merges(config.swap) else "adapter"
    result = {"machine": machine_facts("vllm"), "settings": settings | {"set": options.set}, **measured}
    write_result(result, options.out, None if options.json else as_text(result))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser(__doc__, OUT)
    parser.add_argument("--prompts", type=int, default=48, metavar="N", help="prompts in each block [default: 48]")
    parser.add_argument("--swaps", type=int, default=20, metavar="N", help="swaps [default: 20]")
    return parse(parser, arguments)


async def measure(config: RunConfig, swaps: int, folder: Path) -> Json:
    """Blocks in turn without and with a swap, after one that warms up."""
    ways, swapped = TwoVersions(config), Swaps(config.cluster.generators.count)
    async with bench_pool(config, [ways.adapter(1)], swapped.proved) as pool:
        prompts = prompts_of(config, 0)
        _, references = await pool.write(prompts)
        ways.read(ray.get(references[0]))
        checkpoints = [ways.checkpoint(version, folder) for version in range(2, swaps + 2)]
        quiet: list[tuple[int, float]] = []
        loud: list[tuple[int, float]] = []
        for checkpoint in checkpoints:
            quiet.append(await _block(pool, prompts, None, swapped))
            loud.append(await _block(pool, prompts, checkpoint, swapped))
    rates = {
        name: sum(t for t, _ in part) / sum(s for _, s in part) for name, part in (("without", quiet), ("with", loud))
    }
    extra = (sum(s for _, s in loud) - sum(t for t, _ in loud) / rates["without"]) / swaps
    return {
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["with"] / rates["without"], 3),
        "block_s": round(sum(s for _, s in quiet) / len(quiet), 2),
        "lost_s_each_swap": round(extra, 2),
        "publish_to_proved_s": quantiles(swapped.seconds),
        "verdicts": swapped.verdicts,
        "failed_requests": pool.failures,
        **moved(config, ways.adapter(1), folder),
    }


async def _block(pool: BenchPool, prompts: Sequence[Any], checkpoint: Any, swaps: Swaps) -> tuple[int, float]:
    """(tokens, seconds) of one block; a swap begins when a quarter of it is written, and is over when it is."""
    start = time.perf_counter()
    writing = asyncio.create_task(pool.write(prompts))
    if checkpoint is not None:
        quarter = pool.batches + len(prompts) // pool.store.config.cluster.prompts_per_call // 4
        while pool.batches < quarter:  # until everything writes
            await asyncio.sleep(LOOK_S)
        assert not writing.done(), "the block is too small: all was written before the swap"
        record, saved = checkpoint
        swaps.begin()
        await pool.crew.weights.publish.remote(record, [saved])
        pool.publish(record["version"])
        await swaps.all_proved.wait()
    tokens, _ = await writing
    return tokens, time.perf_counter() - start


class Swaps:
    """How long each swap took until all generators had proved it."""

    def __init__(self, generators: int) -> None:
        self._generators, self._left = generators, 0
        self.all_proved, self.seconds = asyncio.Event(), list[float]()
        self.verdicts: dict[str, int] = {}
        self.begin()
        self._counts = False

    def begin(self) -> None:
        """A version is about to be published."""
        self._start, self._left, self._counts = time.perf_counter(), self._generators, True
        self.all_proved.clear()

    def proved(self, swap: Json) -> None:
        """A generator holds the version."""
        if not self._counts:  # the version that the pool begins with
            return
        self.verdicts[swap["verdict"]] = self.verdicts.get(swap["verdict"], 0) + 1
        self._left -= 1
        if not self._left:
            self.seconds.append(time.perf_counter() - self._start)
            self.all_proved.set()


class TwoVersions:
    """Odd versions are a drawn adapter, even ones four times that: a swap moves log-probs far more than noise does."""

    def __init__(self, config: RunConfig) -> None:
        from rlsf_ray.engines.learner import Learner

        self._learner, drawn = Learner(config), drawn_adapter(config)
        larger = {name: array * 4 if ".lora_B." in name else array for name, array in drawn.items()}
        self._adapters: dict[int, Adapter] = {1: drawn, 0: larger}

    def adapter(self, version: int) -> Adapter:
        """The weights of `version`."""
        return self._adapters[version % 2]

    def read(self, groups: Sequence[Group]) -> None:
        """Let the trainer read traces of `groups` with both adapters."""
        texts = [(group.prompt_ids, trace.token_ids) for group in groups for trace in group.traces]
        self._texts = texts[:CANARIES]
        self._read = {}
        for parity, adapter in self._adapters.items():
            self._learner.set_adapter(adapter)
            self._read[parity] = self._learner.logprobs(self._texts, like_generators=True)

    def checkpoint(self, version: int, folder: Path) -> tuple[Json, Any]:
        """(record, checkpoint) as a training worker reports them."""
        from ray.train import Checkpoint

        adapter, old, new = self.adapter(version), self._read[(version + 1) % 2], self._read[version % 2]
        canaries = [
            Canary(prompt_ids=prompt, token_ids=trace, before=before, after=after)
            for (prompt, trace), before, after in zip(self._texts, old, new, strict=True)
        ]
        place = folder / f"checkpoint-{version}"
        place.mkdir()
        (place / ADAPTER_FILE).write_bytes(save({name: np.ascontiguousarray(a) for name, a in adapter.items()}))
        (place / CANARY_FILE).write_bytes(canaries_to_bytes(canaries))
        record = {"round": version - 1, "version": version, "checksum": checksum(adapter)}
        return record, Checkpoint.from_directory(str(place))


def moved(config: RunConfig, adapter: Adapter, folder: Path) -> Json:
    """Bytes that one generator takes in at a swap, and how long writing a file of that size takes."""
    place = folder / "moved"
    place.mkdir()
    version_files(config, adapter, place)
    sizes = {
        "adapter": sum(array.nbytes for array in adapter.values()),
        "file": sum(f.stat().st_size for f in place.iterdir()),
    }
    return {"bytes": sizes, "plain_write_s": round(min(_writes(sum(sizes.values()), place)), 4)}


def _writes(size: int, folder: Path) -> Iterator[float]:
    source = os.urandom(1 << 20) * (size >> 20) + bytes(size % (1 << 20))
    for attempt in range(3):
        start = time.perf_counter()
        (folder / f"written-{attempt}").write_bytes(source)
        yield time.perf_counter() - start


def quantiles(seconds: Sequence[float]) -> Json:
    """{"p50", "p95", "max"}"""
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return {name: round(float(value), 2) for name, value in (("p50", p50), ("p95", p95), ("max", max(seconds)))}


def ratios(result: Json) -> list[Ratio]:
    """What speed.py shows."""
    what = f"tokens/s with a swap in each block of {result['block_s']:.0f} s over without"
    return [Ratio(what, *[result["ratio"]] * 3)]


def as_text(result: Json) -> str:
    """The result for a terminal."""
    rates, waits, size = result["tokens_per_s"], result["publish_to_proved_s"], result["bytes"]
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in result["verdicts"].items())
    return "\n".join(
        [
            ", ".join(f"{name} {value}" for name, value in result["machine"].items()),
            "",
            f"tokens/s without a swap {rates['without']:.0f}, with one in each block of {result['block_s']:.0f} s"
            f" {rates['with']:.0f}: ratio {result['ratio']:.3f}",
            f"each swap costs {result['lost_s_each_swap']:.2f} s of writing",
            f"publish to proved everywhere: p50 {waits['p50']:.2f} s, p95 {waits['p95']:.2f} s ({verdicts})",
            f"failed requests: {result['failed_requests']}",
            f"bytes: adapter {size['adapter'] / 1e6:.1f} MB, files {size['file'] / 1e6:.1f} MB;"
            f" writing as much takes {result['plain_write_s']:.3f} s",
        ]
    )


if __name__ == "__main__":
    main()
