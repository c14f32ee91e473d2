"""Does the proof of delivery cry wolf? Fifty small swaps of three kinds, each loaded and proved by a real generator.

    python benchmarks/bench_false_alarms.py [--model NAME] [--set KEY=VALUE]... [--swaps N] [--json] [--out PATH]

    B = 0           adapters that equal the base model: another A each time
    warm-up step    one optimiser step at a fifth of the recipe's learning rate between two versions
    5e-7            one optimiser step at the learning rate 5e-7 between two versions

Generator, engine, trainer and canaries are those of a run; only Ray is left out. An alarm is a load that had to be
repeated, or one that failed. Small moves may be "unproven"; larger ones should be "proved".
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import base_parser, machine_facts, parse, prompts_of, small_config, write_result

from actors.cores import Cores
from actors.generator import Generator
from rlsf_ray.adapters import checksum
from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import PoolConfig
from rlsf_ray.engines.base import Adapter
from rlsf_ray.engines.build import build_engine
from rlsf_ray.engines.learner import Learner
from rlsf_ray.engines.scorer import Scorer
from rlsf_ray.engines.steps import StepSize, training_steps
from rlsf_ray.errors import WeightsError
from rlsf_ray.records import Canary, Json, TrainingGroup, WeightsVersion
from rlsf_ray.rollouts.programs import write_groups

OUT = Path(__file__).parent / "results" / "bench_false_alarms.json"
ANY_PAIRS = [
    "pairs.rule=random",
    "pairs.surest=null",
    "pairs.min_chosen=0.0",
    "pairs.same_answer=true",
    "learner.warmup_steps=0",
    "rollout.max_tokens=40",  # shorter texts say less: harder for the proof, and faster
]
Version = tuple[Adapter, list[Canary]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    config = small_config(options.model, ["engine=vllm", *ANY_PAIRS, *options.set], 16, "bench_false_alarms")
    engine = build_engine(config)
    try:
        kinds = measure(config, engine, options.swaps)
    finally:
        engine.close()
    settings = {"model": Path(config.model.name).name, "engine": config.engine, "swaps": options.swaps}
    result = {"machine": machine_facts("vllm"), "settings": settings | {"set": options.set}, "kinds": kinds}
    write_result(result, options.out, None if options.json else as_text(result))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser(__doc__, OUT)
    parser.add_argument("--swaps", type=int, default=50, metavar="N", help="swaps of each kind [default: 50]")
    return parse(parser, arguments)


def measure(config: RunConfig, engine: Any, swaps: int) -> Json:
    """{kind: how its swaps ended}."""
    groups = _groups(config, engine)
    rate = config.learner.learning_rate
    kinds = {
        "B = 0": _equal_to_the_base(config, groups),
        "warm-up step": _steps(config, groups, rate / 5),
        "5e-7": _steps(config, groups, 5e-7),
    }
    found: Json = {}
    for name, versions in kinds.items():
        generator = Direct(config, engine)
        for number in range(1, swaps + 1):
            generator.take_in(number, *next(versions))
        generator.forget_all()
        found[name] = generator.result()
        print(f"{name}: {found[name]}", flush=True)
    return found


def _groups(config: RunConfig, engine: Any) -> list[TrainingGroup]:
    prompts = prompts_of(config, 0)
    scorer = Scorer(config)
    try:
        written = write_groups(engine, prompts, config=config, round=0, first_sequence=0, version=0)
        return scorer.training_groups(scorer.score(written))
    finally:
        scorer.close()


def _equal_to_the_base(config: RunConfig, groups: Sequence[TrainingGroup]) -> Iterator[Version]:
    learner, before, seed = Learner(config), None, 0
    while True:
        draw = np.random.default_rng(seed := seed + 1)
        own = learner.adapter()
        adapter = {
            name: (own[name] * draw.uniform(0.5, 2.0) if ".lora_A." in name else np.zeros_like(own[name]))
            for name in sorted(own)
        }
        learner.set_adapter(adapter)
        yield adapter, learner.canaries(groups, before or adapter)
        before = adapter


def _steps(config: RunConfig, groups: Sequence[TrainingGroup], rate: float) -> Iterator[Version]:
    changed = config.learner.model_copy(update={"learning_rate": rate})
    learner = Learner(config.model_copy(update={"learner": changed}))
    while True:
        for step in training_steps(groups, config.learner.pairs_per_step):
            before = learner.adapter()
            learner.train_step(step, size=StepSize.of(step), round=0, pass_index=0)
            yield learner.adapter(), learner.canaries(groups, before)


class Direct(Generator):
    """A generator in this process: versions come from here instead of from the WeightStore."""

    def __init__(self, config: RunConfig, engine: Any) -> None:
        super().__init__(None, "generator-0")  # type: ignore[arg-type]
        self._config, self._engine, self._cores = config, engine, Cores(PoolConfig(threads=1))
        self._known: dict[int, Version] = {}
        self._verdicts, self._moves, self._shares, self._again = Counter[str](), list[float](), list[float](), 0

    def _build(self) -> None:
        pass

    def _fetch(self, version: int) -> tuple[WeightsVersion, int, Any, list[Canary]]:
        adapter, canaries = self._known[version]
        return WeightsVersion(version=version, checksum=checksum(adapter), path=""), version - 1, adapter, canaries

    def take_in(self, version: int, adapter: Adapter, canaries: list[Canary]) -> None:
        """One swap, as in a run."""
        self._known[version] = adapter, canaries
        self._known.pop(version - 3, None)
        try:
            swap = self.load_version(version) or {}
        except WeightsError:
            self._verdicts["failed"] += 1
            return
        self._verdicts[swap["verdict"]] += 1
        self._again += swap["loads"] - 1
        self._moves.append(swap["expected_move"])
        if swap["verdict"] == "proved":
            self._shares.append(swap["share"])

    def forget_all(self) -> None:
        """Make room for the next kind."""
        for version in list(self._versions):
            self._forget(version)

    def result(self) -> Json:
        """How the swaps ended. Moves in nats a token."""
        found = {"verdicts": dict(self._verdicts), "loaded_again": self._again}
        found["move"] = [round(float(q), 4) for q in np.quantile(self._moves, [0, 0.5, 1])] if self._moves else []
        return found | {"share": [round(min(self._shares), 2), round(max(self._shares), 2)] if self._shares else []}


def as_text(result: Json) -> str:
    """The result for a terminal."""
    lines = [", ".join(f"{name} {value}" for name, value in result["machine"].items()), ""]
    for name, kind in result["kinds"].items():
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in kind["verdicts"].items())
        low, middle, high = kind["move"]
        lines.append(
            f"{name}: {verdicts}, {kind['loaded_again']} loaded again; the trainer moved {low}-{high} (median {middle})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
