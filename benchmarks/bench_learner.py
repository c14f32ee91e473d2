"""Our learner against TRL's trainers on the same groups: how much faster, where from, and is it the same training?

    python benchmarks/bench_learner.py [--model NAME] [--only CASE] [--turns 3]

Both sides start from the same adapter and see the same pairs in the same order in each optimiser step, one side after
the other in processes of their own. DPOTrainer has its reference log-probs made before; of GRPOTrainer it is the loss,
without its generation. The traces are written by the model for the recipe's training prompts; cases with lengths are
drawn tokens, and vary one length at a time. The cases called equal are in float32: there the adapters agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_common import ROOT, Ratio, base_parser, machine_facts, parse, spread, write_result
from safetensors.numpy import load_file

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.engines.models import load_tokenizer
from rlsf_ray.records import Json, Pair, TrainingGroup, TrainingTrace
from rlsf_ray.tables import encode, group_to_row

OUT = Path(__file__).parent / "results" / "bench_learner.json"
SIDES = ("ours", "trl")
LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Groups of `traces` traces each: written by the model, or (with lengths) drawn; all ordered pairs, or one."""

    groups: int
    traces: int = 8
    all_pairs: bool = True
    step: int  # pairs, or traces, of an optimiser step
    lengths: tuple[int, int] | None = None  # tokens of the prompt, and of a trace on average
    grpo: bool = False
    dtype: str = "bfloat16"
    turns: int | None = 1  # None: as --turns says
    target: float | None = None


REGRESSION = "6 pairs of one prompt"  # what a test measures anew
CASES = {
    "28 pairs a prompt": Case(groups=4, step=56, turns=None, target=30.0),
    "one pair a prompt": Case(groups=24, traces=2, all_pairs=False, step=8, turns=None, target=3.0),
    REGRESSION: Case(groups=1, traces=4, step=6, turns=None),
    "GRPO": Case(groups=4, step=16, grpo=True, turns=None, target=1.5),
    "equal, 28 pairs a prompt": Case(groups=2, step=56, dtype="float32"),
    "equal, one pair a prompt": Case(groups=16, traces=2, all_pairs=False, step=8, dtype="float32"),
    "one pair, equal lengths": Case(groups=16, traces=2, all_pairs=False, step=8, lengths=(40, 64)),
    "prompt 64, traces 64": Case(groups=2, step=56, lengths=(64, 64)),
    "prompt 256, traces 64": Case(groups=2, step=56, lengths=(256, 64)),
    "prompt 64, traces 16": Case(groups=2, step=56, lengths=(64, 16)),
    "prompt 64, traces 256": Case(groups=2, step=56, lengths=(64, 256)),
    "2 traces": Case(groups=8, traces=2, step=8, lengths=(64, 64)),
    "4 traces": Case(groups=4, traces=4, step=24, lengths=(64, 64)),
    "16 traces": Case(groups=1, traces=16, step=120, lengths=(64, 64)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = base_parser(__doc__, OUT)
    parser.add_argument("--only", choices=list(CASES), help="this case, beside the results that are there")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of the first four cases")
    options = parse(parser, arguments)
    cases = {options.only: CASES[options.only]} if options.only else CASES
    known: Json = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    result = {"machine": machine_facts("trl", "peft"), "cases": known.get("cases", {})}
    for name, case in cases.items():
        result["cases"][name] = measure(case, options, case.turns or options.turns)
        print(f"{name}: {line(name, result['cases'][name])}", file=sys.stderr, flush=True)
    write_result(result, options.out, None if options.json else as_text(result))


def config_of(case: Case, model: str, overrides: Sequence[str]) -> RunConfig:
    """What both sides train with: plain DPO or GRPO, a constant learning rate."""
    recipe = "rlif_majority" if case.grpo else "rlsf"
    own = [f"learner.pairs_per_step={case.step}", "loss.nll=0"]
    if case.grpo:
        own = [f"advantages.traces_per_step={case.step}"]
    same = [
        "learner.warmup_steps=0",
        "rollout.temperature=1",
        f"model.dtype={case.dtype}",
        f"model.name={model}",
    ]
    return load_config(recipe, [*same, *own, f"rollout.traces={case.traces}", *overrides])


def measure(case: Case, options: argparse.Namespace, turns: int) -> Json:
    """Both sides in turns; the ratios are of the same turn."""
    config = config_of(case, options.model, options.set)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = made(case, config)
        half = len(groups) // 2
        for file, part in (("groups", groups[:half]), ("held_out", groups[half:])):
            (folder / f"{file}.parquet").write_bytes(encode("groups", [group_to_row(group) for group in part]))
        job = {
            "config": config.model_dump(mode="json"),
            "threads": os.cpu_count(),
            **{file: str(folder / f"{file}.parquet") for file in ("groups", "held_out")},
        }
        (folder / "job.json").write_text(json.dumps(job))
        found = [_turn(folder / "job.json", turn) for turn in range(turns)]
        adapters = [load_file(found[-1][side]["adapter"]) for side in SIDES]
    return {
        "turns": [{side: turn[side] | {"margins": None, "adapter": None} for side in SIDES} for turn in found],
        "trained": {
            "pairs or traces": sum(g.num_examples for g in groups[:half]),
            "tokens": sum(g.num_tokens for g in groups[:half]),
        },
        "speed": _ratio(found, ("train",)),
        "speed with references": None if case.grpo else _ratio(found, ("train", "reference")),
        "memory": statistics.median(turn["ours"]["peak_gb"] / turn["trl"]["peak_gb"] for turn in found),
        "target": case.target,
        "same": _same(found[-1], adapters),
    }


def _turn(job: Path, number: int) -> dict[str, Json]:
    """Both sides, who is first in turns."""
    return {side: _side(side, job) for side in (SIDES if number % 2 == 0 else SIDES[::-1])}


def _side(side: str, job: Path) -> Json:
    command = [sys.executable, str(Path(__file__).with_name("learner_sides.py")), side, str(job)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: Json = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _ratio(found: Sequence[Json], parts: Sequence[str]) -> Json:
    """How many times as fast we are: the median over the turns, the least and the most."""
    ratios = [
        sum(turn["trl"]["seconds"][part] for part in parts) / sum(turn["ours"]["seconds"][part] for part in parts)
        for turn in found
    ]
    return spread(ratios)


def _same(turn: Json, adapters: Sequence[dict[str, np.ndarray]]) -> Json:
    """How far apart the two trainings end, beside how far they have come."""
    ours, theirs = adapters
    margins = [np.asarray(turn[side]["margins"]) for side in SIDES]
    steps = [np.asarray(turn[side]["losses"]) for side in SIDES]
    moved = {name: array for name, array in ours.items() if ".lora_B." in name}  # zero at first
    return {
        "largest difference of weights": float(max(np.abs(ours[name] - theirs[name]).max() for name in ours)),
        "largest weight that was zero": float(max(np.abs(array).max() for array in moved.values())),
        "largest difference of losses": float(np.abs(steps[0] - steps[1]).max()),
        "mean held-out margin": [float(values.mean()) if len(values) else None for values in margins],
        "largest difference of held-out margins": float(np.abs(margins[0] - margins[1]).max(initial=0.0)),
    }


def made(case: Case, config: RunConfig) -> list[TrainingGroup]:
    """Twice the case's groups: the second half is held out."""
    draw = np.random.default_rng(0)
    texts = drawn(case, draw, len(load_tokenizer(config.model))) if case.lengths else written(case, config)
    return [_group(number, prompt, traces, case, draw) for number, (prompt, traces) in enumerate(texts)]


Trace = tuple[np.ndarray, np.ndarray]  # tokens [T], and their log-probs by who wrote them
Texts = list[tuple[np.ndarray, list[Trace]]]  # a prompt's tokens, and its traces


def drawn(case: Case, draw: np.random.Generator, vocabulary: int) -> Texts:
    """Tokens by chance; traces of half to one and a half times the length, where there are several pairs of them."""
    prompt, trace = case.lengths or (0, 0)
    spread = trace // 2 if case.all_pairs else 0
    sizes = draw.integers(trace - spread, trace + spread + 1, (2 * case.groups, case.traces)).tolist()

    def tokens(size: int) -> np.ndarray:
        return draw.integers(vocabulary // 2, vocabulary, size).astype(np.int32)

    return [(tokens(prompt), [(tokens(size), np.zeros(size)) for size in row]) for row in sizes]


def written(case: Case, config: RunConfig) -> Texts:
    """Traces that the model writes for the recipe's own training prompts."""
    from rlsf_ray.engines.build import build_engine
    from rlsf_ray.rollouts.programs import write_groups
    from rlsf_ray.tasks.sources import load_sets

    prompts = load_sets(config).train[: 2 * case.groups]
    with closing(build_engine(config)) as engine:
        groups = write_groups(engine, prompts, config=config, round=0, first_sequence=0, version=0)
    return [(group.prompt_ids, [(trace.token_ids, trace.logprob) for trace in group.traces]) for group in groups]


def _group(
    number: int, prompt: np.ndarray, traces: Sequence[Trace], case: Case, draw: np.random.Generator
) -> TrainingGroup:
    """Pairs in the order of the traces, or advantages by chance. Each side makes its own reference log-probs."""
    ordered = [(i, j) for i in range(len(traces)) for j in range(i + 1, len(traces))]
    pairs = tuple(Pair(chosen=i, rejected=j) for i, j in (ordered if case.all_pairs else ordered[:1]))
    return TrainingGroup(
        id=f"g{number}",
        round=0,
        sequence=number,
        prompt_id=f"p{number}",
        signal="",
        prompt_ids=prompt,
        traces=tuple(
            TrainingTrace(
                id=f"g{number}-{k}",
                seed=0,
                version=0,
                score=0.0,
                answer=None,
                token_ids=ids,
                logprob=logprob.astype(np.float32),
                reference_logprob=logprob.astype(np.float32),
                credit=np.full(len(ids), draw.normal(), np.float32) if case.grpo else None,
            )
            for k, (ids, logprob) in enumerate(traces)
        ),
        pairs=() if case.grpo else pairs,
    )


def ratios(result: Json) -> list[Ratio]:
    """What speed.py shows."""
    return [
        Ratio(f"learner against TRL, {name}", **found["speed"], target=found["target"])
        for name, found in result["cases"].items()
    ]


def line(name: str, found: Json) -> str:
    """A case as a row of the table."""
    speed, with_references, same = found["speed"], found["speed with references"], found["same"]
    seconds = [statistics.median(turn[side]["seconds"]["train"] for turn in found["turns"]) for side in SIDES]
    cells = [
        name,
        f"{found['trained']['pairs or traces']}",
        f"{seconds[0]:.1f}",
        f"{seconds[1]:.1f}",
        f"{speed['median']:.1f} ({speed['low']:.1f} to {speed['high']:.1f})",
        f"{found['target']:g}" if found["target"] else "-",
        f"{with_references['median']:.1f}" if with_references else "-",
        f"{found['memory']:.2f}",
        f"{same['largest difference of weights']:.1g} of {same['largest weight that was zero']:.1g}",
        f"{same['largest difference of losses']:.1g}",
    ]
    return "| " + " | ".join(cells) + " |"


def as_text(result: Json) -> str:
    """The table."""
    head = [
        "case", "pairs or traces", "ours, s", "TRL, s", "times as fast", "target", "with references",
        "our memory / TRL's", "weights differ by", "losses by",
    ]  # fmt: skip
    rows = [line(name, found) for name, found in result["cases"].items()]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows])


if __name__ == "__main__":
    main()
