"""How fast is each stage alone, how fast are they together, how long does each wait, and what does the control cost?

    python benchmarks/bench_stages.py [--model NAME] [--set KEY=VALUE]... [--prompts N] [--out PATH]

Alone: engine, scorer and learner called directly in one process on the prompts of the recipe `rlsf`, in turns, so that
whatever else the machine does meets all three; the first turn warms up and is not counted.
Together: one short run on a Ray of its own, without evaluation; its metrics/stages.jsonl says who worked when. Here
round 0 warms up: the scorer loads its model within its first batch.
Tokens: generator, those written; scorer, those of the traces it scored; trainer, those read in forward passes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_common import base_parser, machine_facts, write_result

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.records import Group, Json, TrainingGroup
from rlsf_ray.run_store import RunStore
from rlsf_ray.timeline import RoleShare, make_timeline

ROLES = ("generator", "scorer", "trainer")
TURNS = 3  # counted turns of the stages alone
OUT = Path(__file__).parent / "results" / "bench_stages.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = _options(arguments)
    config = bench_config(options.model, options.set, options.prompts)
    together = measure_together(config)  # first: it needs the memory that three models in one process would take
    alone = measure_alone(config)
    result = {
        "machine": machine_facts(),
        "settings": _settings(config, options.set),
        "alone": alone,
        "together": together,
    }
    write_result(result, options.out, as_text(result))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser(__doc__, OUT)
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="prompts in each round [default: 32]")
    return parser.parse_args(arguments)


def bench_config(model: str, overrides: Sequence[str], prompts: int) -> RunConfig:
    """The recipe `rlsf` with three rounds and without a probe set, so that only the three stages run."""
    own = [
        f"model.name={model}",
        "rounds=3",
        f"prompts_per_round={prompts}",
        "data.probe=[]",
        "data.calibration=0",
        "recipe=bench_stages",
    ]
    return load_config("rlsf", [*own, *overrides])


def measure_alone(config: RunConfig) -> Json:
    """Tokens/s of each stage by itself: {role: {"median", "low", "high", "turns"}}; None where nothing was done."""
    from rlsf_ray.engines.build import build_engine
    from rlsf_ray.engines.learner import Learner
    from rlsf_ray.engines.scorer import Scorer
    from rlsf_ray.rollouts.programs import write_groups
    from rlsf_ray.tasks.sources import load_sets, prompts_of_round

    cluster, train = config.cluster, load_sets(config).train
    engine = build_engine(config, threads=cluster.generators.threads)
    scorer, learner = Scorer(config, threads=cluster.scorers.threads), Learner(config)
    rates: dict[str, list[float]] = {role: [] for role in ROLES}
    for turn in range(1 + TURNS):
        prompts = prompts_of_round(train, turn, min(config.prompts_per_round, cluster.prompts_per_call), config.seed)
        began = time.perf_counter()
        groups = write_groups(engine, prompts, config=config, round=turn, first_sequence=0, version=0)
        written = time.perf_counter()
        training = scorer.training_groups(scorer.score(groups))
        scored = time.perf_counter()
        read = _train(learner, training, config, turn)
        trained = time.perf_counter()
        work = (_num_tokens(groups), written - began), (_num_tokens(groups), scored - written), (read, trained - scored)
        for role, (tokens, seconds) in zip(ROLES, work, strict=True):
            if turn and tokens:  # a turn without a pair has nothing to train
                rates[role].append(tokens / seconds)
    scorer.close()
    engine.close()
    return {role: _spread(found) for role, found in rates.items()}


def _train(learner: Any, groups: Sequence[TrainingGroup], config: RunConfig, turn: int) -> int:
    """One pass over the groups; returns the tokens it read."""
    from rlsf_ray.engines.steps import StepSize, training_steps

    for step in training_steps(groups, config.learner.pairs_per_step):
        learner.train_step(step, size=StepSize.of(step), round=turn, pass_index=0)
    return sum(group.num_tokens for group in groups)


def _num_tokens(groups: Sequence[Group]) -> int:
    return sum(len(trace.token_ids) for group in groups for trace in group.traces)


def _spread(rates: Sequence[float]) -> Json | None:
    if not rates:
        return None
    return {"median": statistics.median(rates), "low": min(rates), "high": max(rates), "turns": len(rates)}


def measure_together(config: RunConfig) -> Json:
    """One run on Ray: tokens/s and idle share of each stage, and the share of the run time that control took."""
    from rlsf_ray import service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = os.path.join(folder, "run")
        summary = service.run(config, root=root, run_name=f"bench-stages-{os.getpid()}")
        stages = RunStore.open(root).read_metrics("stages")
    return from_run(stages, summary)


def from_run(stages: Sequence[Json], summary: Json) -> Json:
    """The numbers of one run from its stage rows and its summary; `run_s` counts from the coordinator's start.

    A stage counts from the first work on round 1 to the last work of all, so starting actors and loading models is not
    in it. Control is the processor time of the coordinator's and the buffer's process over the whole run.
    """
    work = [row for row in stages if row["role"] in ROLES]
    warm = min(row["start"] for row in work if row["round"] > 0)
    counted = make_timeline([row for row in work if row["start"] >= warm])
    shares = {share.role: share for share in counted.shares()}
    return {
        "run_s": summary["seconds"]["total"],
        "counted_s": counted.length_s,
        "stages": {role: _share(shares.get(role), counted.length_s) for role in ROLES},
        "control": summary["control"],
    }


def _share(share: RoleShare | None, counted_s: float) -> Json | None:
    """One role's numbers; None where the run has no rows of it."""
    if share is None:
        return None
    return {
        "num_actors": share.num_actors,
        "tokens": share.tokens,
        "busy_s": share.busy_s,
        "tokens_per_busy_s": share.tokens / share.busy_s,
        "tokens_per_counted_s": share.tokens / counted_s,
        "idle": share.idle,
    }


def _settings(config: RunConfig, overrides: Sequence[str]) -> Json:
    return {
        "model": Path(config.model.name).name,
        "dtype": config.model.dtype,
        "rounds": config.rounds,
        "prompts_per_round": config.prompts_per_round,
        "prompts_per_call": config.cluster.prompts_per_call,
        "traces": config.rollout.traces,
        "max_tokens": config.rollout.max_tokens,
        "max_staleness": config.cluster.max_staleness,
        "epochs": config.learner.epochs,
        "set": list(overrides),
    }


def as_text(result: Json) -> str:
    """The result for a terminal."""
    facts, together = result["machine"], result["together"]
    head = f"{'stage':<11}{'alone, tokens/s':>24}{'together, while busy':>23}{'over the run':>14}{'idle':>8}"
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()), "", head, "-" * len(head)]
    for role in ROLES:
        alone, share = result["alone"][role], together["stages"][role]
        rate = f"{alone['median']:.0f} ({alone['low']:.0f}-{alone['high']:.0f})" if alone else "nothing done"
        row = f"{role:<11}{rate:>24}"
        if share is None:
            lines.append(f"{row}{'not recorded':>23}")
            continue
        busy, over = share["tokens_per_busy_s"], share["tokens_per_counted_s"]
        lines.append(f"{row}{busy:>23.0f}{over:>14.0f}{100 * share['idle']:>6.0f} %")
    control = together["control"]
    lines += [
        "",
        f"run {together['run_s']:.1f} s, of which counted after the warm-up {together['counted_s']:.1f} s",
        f"control: coordinator {control['coordinator_s']:.2f} s, buffer {control['buffer_s']:.2f} s ="
        f" {100 * control['share']:.2f} % of the run",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
