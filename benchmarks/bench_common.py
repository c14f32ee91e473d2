"""What the benchmarks share: facts of the machine, and generators on a Ray of their own without the rest of a run."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from actors.job import NAMESPACE, Job, source_hash
from actors.pool import GeneratorPool, GivenUp
from actors.spawn import ENVIRONMENT, MOST_SLOTS, Crew
from actors.watch import Watch
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.engines.base import Adapter
from rlsf_ray.placement import gpu_shares, placed
from rlsf_ray.records import Json, Prompt
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets, prompts_of_round


class Ratio(NamedTuple):
    """A figure of a benchmark that holds on other machines too; speed.py shows it. Higher is better."""

    what: str
    median: float
    low: float  # of its turns; of one turn all three are the same
    high: float
    target: float | None = None  # at least


def spread(values: Sequence[float]) -> Json:
    """The middle, the least and the most of some turns, as `Ratio` has them."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


LEAVE_S = 20.0
ROOT = Path(__file__).parents[1]


def base_parser(doc: str | None, out: Path) -> argparse.ArgumentParser:
    """The options that every benchmark has; `doc` is the module's, `out` where its result is kept."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder or a hub id")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    parser.add_argument("--out", type=Path, default=out, help="JSON file [default: benchmarks/results]")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `--json`; as a program (`arguments` None) in the actors' environment from here on."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if arguments is None:
        _with_environment()
    return options


def _with_environment() -> None:
    """Begin this program again with the actors' environment, unless it has it: both sides of a comparison need it."""
    wanted = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if os.environ.get("RLSF_BENCH") is None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted | {"RLSF_BENCH": "1"})


def machine_facts(*modules: str) -> Json:
    """What the numbers depend on, without a name of the machine; `modules` are said by the packages that bring them."""
    import torch

    return {
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "python": platform.python_version(),
        **{
            name: metadata.version(name)
            for name in ("torch", "ray", "transformers", *(name for module in modules for name in _that_bring(module)))
        },
    }


def _that_bring(module: str) -> list[str]:
    """Names of the installed packages that bring `module`."""
    return metadata.packages_distributions().get(module, [])


def commit() -> str | None:
    """The source that a result was made with, with a "+" where it had been changed; None outside a repository."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def take_up(run: Path, *, anew: bool) -> str | None:
    """The commit of the code that is about to go on with `run`; what other code has begun there is removed.

    So is everything where `anew`, or where the source has changes: of these nobody can say whether they are the same.
    """
    source, begun_with = commit(), run.with_name(f"{run.name}.commit")
    same = source and not source.endswith("+") and begun_with.exists() and begun_with.read_text() == source
    if anew or not same:
        shutil.rmtree(run, ignore_errors=True)
        begun_with.parent.mkdir(parents=True, exist_ok=True)
        begun_with.write_text(str(source))
    return source


def code_of(result: Json) -> str:
    """The commit of a result, for a page."""
    return (result.get("commit") or "not noted")[:9]


def write_result(result: Json, out: Path, text: str | None) -> None:
    """Print `text`, or the whole result as JSON if there is none, and keep the result in a file."""
    print(text if text is not None else json.dumps(result, indent=2))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}", file=sys.stderr)


@contextmanager
def own_ray() -> Iterator[None]:
    """A Ray for the length of the block, with the actors' environment."""
    settings: Json = {"env_vars": {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}}
    ray.init("local", namespace=NAMESPACE, include_dashboard=False, log_to_driver=False, runtime_env=settings)
    try:
        yield
    finally:
        ray.shutdown()


def small_config(model: str, overrides: Sequence[str], prompts: int, recipe: str) -> RunConfig:
    """The recipe `rlsf` with `prompts` in a round, one version ahead and without a probe set."""
    own = [
        f"model.name={model}",
        f"prompts_per_round={prompts}",
        "data.probe=[]",
        "data.calibration=0",
        f"recipe={recipe}",
    ]
    return load_config("rlsf", [*own, "cluster.max_staleness=1", *overrides])


def prompts_of(config: RunConfig, round: int) -> list[Prompt]:
    """What the run would write in that round."""
    return prompts_of_round(load_sets(config).train, round, config.prompts_per_round, config.seed)


def drawn_adapter(config: RunConfig) -> dict[str, np.ndarray]:
    """An adapter that changes what is written a little; A as PEFT draws it, B drawn here."""
    from rlsf_ray.engines.learner import Learner

    draw = np.random.default_rng(0)
    return {
        name: (draw.normal(0.0, 0.01, array.shape) if ".lora_B." in name else array).astype(np.float32)
        for name, array in sorted(Learner(config).adapter().items())
    }


def version_files(config: RunConfig, adapter: Adapter, folder: Path) -> None:
    """What a vLLM engine of `config` loads for a version: the whole merged weights, or an adapter in PEFT's form."""
    import torch

    from rlsf_ray.adapters import to_peft
    from rlsf_ray.engines.lora import merges, write_merged
    from rlsf_ray.engines.models import find_model

    if merges(config.swap):
        dtype = getattr(torch, config.model.dtype)
        write_merged(find_model(config.model.name), adapter, config.learner.lora_alpha, dtype, folder)
        return
    files = to_peft(adapter, base_model=config.model.name, lora_alpha=config.learner.lora_alpha)
    for name, data in files.items():
        (folder / name).write_bytes(data)


class BenchPool:
    """Generators with their store of versions. Made by `bench_pool`."""

    def __init__(self, pool: GeneratorPool, crew: Crew, store: RunStore) -> None:
        self._pool, self.crew, self.store = pool, crew, store
        self.publish, self.failures, self.batches = pool.publish, 0, 0

    async def write(self, prompts: Sequence[Prompt], round: int = 0) -> tuple[int, list[Any]]:
        """All of `prompts`, in batches as a run makes them: (tokens written, a reference for each batch's groups)."""
        size = self.store.config.cluster.prompts_per_call
        firsts = range(0, len(prompts), size)
        done = await asyncio.gather(*(self._batch(prompts[first : first + size], round, first) for first in firsts))
        return sum(event["tokens"] for _, event in done), [groups for groups, _ in done]

    async def _batch(self, prompts: Sequence[Prompt], round: int, first: int) -> tuple[Any, Json]:
        while True:
            try:
                place: Json = {"priority": (0, round, first), "least_version": 0}
                done = await self._pool.call("write", prompts, round, first, **place)
                self.batches += 1
                return done
            except GivenUp:
                self.failures += 1


@asynccontextmanager
async def bench_pool(
    config: RunConfig, versions: Sequence[Adapter], swapped: Callable[[Json], None] = lambda swap: None
) -> AsyncIterator[BenchPool]:
    """The pool that `config` asks for, holding the last of `versions` (which are numbered from 1)."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = RunStore.create_or_resume(str(Path(folder, "run")), config)
        for version, adapter in enumerate(versions, 1):
            store.write_adapter(version, adapter, config.model.name, config)
        gpus = gpu_shares(config, ray.cluster_resources().get("GPU", 0.0))
        job = Job(run=f"{config.recipe}-{config.engine}", root=store.root, source=source_hash(), gpus=gpus)
        crew = Crew(job, placed(config, gpus))
        async with asyncio.TaskGroup() as tasks:
            pool = GeneratorPool(
                crew.generators,
                crew.hands("generators"),
                Watch(config.cluster.deadline_s),
                1,  # each failure counts
                tasks.create_task,
                swapped,
                MOST_SLOTS[config.engine],
            )
            await crew.weights.prepare.remote()
            await pool.prepare(len(versions))
            yield BenchPool(pool, crew, store)
        await crew.dismiss(LEAVE_S, leaves_group=False)
