"""From prompts to trained pairs: how fast are we beside TRL's OnlineDPO, and what does overlap give?

    python benchmarks/bench_end_to_end.py [--model NAME] [--only ROW] [--turns 3] [--prompts 32]

Both sides write two traces for each of the same prompts, have them judged alike (end_to_end_judge.py) and train one
pair a prompt, once, from the same adapter and in steps of 8 pairs. Each side runs in processes of its own, one after
the other; every second turn goes the other way round. As many prompts as are counted come before them, so that actors
start and models load while those are written. The seconds go from the first counted prompt to the end of the last
step. TRL writes the prompts of each step with the weights of the step before. We write a round with those of the
round before; in the row "version a step" a round is one step. With overlap on, the time holds the rest of that round
too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_common import ROOT, Ratio, base_parser, machine_facts, parse, spread, write_result

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.records import Json

OUT = Path(__file__).parent / "results" / "bench_end_to_end.json"
LIMIT_S = 3600.0
STEP = 8  # pairs of an optimiser step
TARGET = 2.5  # times as fast as TRL
STAGES = ("generator", "scorer", "trainer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to the same number of pairs; `rounds` are counted, each of all prompts or of one step's."""

    side: str = "service"  # service, loop or trl
    engine: str = "vllm"
    traces: int = 2
    rounds: int = 1
    version_a_step: bool = False
    max_staleness: int = 0
    against: str | None = "TRL"  # the row whose seconds are divided by this one's


ROWS = {
    "TRL": Row(side="trl", engine="transformers", against=None),
    "service, vllm": Row(),
    "service, transformers": Row(engine="transformers"),
    "loop, vllm": Row(side="loop"),
    "loop, transformers": Row(side="loop", engine="transformers"),
    "service, vllm, version a step": Row(version_a_step=True),
    "service, vllm, K = 8": Row(traces=8, against=None),
    "overlap off": Row(rounds=4, against=None),
    "overlap on": Row(rounds=4, max_staleness=1, against="overlap off"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = base_parser(__doc__, OUT)
    only = [name for name in ROWS if name != "TRL"]
    parser.add_argument("--only", choices=only, help="this row and the one it is compared with")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of every row [default: 3]")
    parser.add_argument("--prompts", type=int, default=32, metavar="N", help="that are counted [default: 32]")
    options = parse(parser, arguments)
    if options.turns < 1 or options.prompts < 1 or options.prompts % min(STEP, options.prompts):
        parser.error(f"expected turns and whole steps of {STEP}, got {options.turns} turns, {options.prompts} prompts")
    names = [name for name in ROWS if options.only in (None, name) or name == ROWS[options.only].against]
    known: Json = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    rows = known.get("rows", {}) | measure(names, options)
    result = {"machine": machine_facts("trl", "peft", "vllm"), "rows": rows}
    write_result(result, options.out, None if options.json else as_text(result))


def config_of(row: Row, options: argparse.Namespace) -> RunConfig:
    """The recipe `rlsf` with the judge, one pass and nothing but the loss that TRL has; warm-up rounds come first."""
    step = min(STEP, options.prompts)
    size = step if row.version_a_step else options.prompts
    own = [
        "recipe=bench_end_to_end",
        f"model.name={options.model}",
        f"engine={row.engine}",
        f"rounds={(1 + row.rounds) * options.prompts // size}",
        f"prompts_per_round={size}",
        "data.probe=[]",
        "data.calibration=0",
        f"rollout.traces={row.traces}",
        "rollout.temperature=0.9",  # TRL's default
        "signal=end_to_end_judge:longer",
        "pairs.rule=end_to_end_judge:outer_pairs",
        "pairs.surest=null",
        "loss.nll=0",
        f"learner.pairs_per_step={step}",
        "learner.epochs=1",
        "learner.warmup_steps=0",
        f"cluster.max_staleness={row.max_staleness}",
    ]
    return load_config("rlsf", [*own, *options.set])


def measure(names: Sequence[str], options: argparse.Namespace) -> Json:
    """The named rows in turns; ratios are of the same turn."""
    found: dict[str, list[Json]] = {name: [] for name in names}
    for number in range(options.turns):
        for name in names if number % 2 == 0 else names[::-1]:
            found[name].append(run_row(ROWS[name], options))
            print(f"turn {number + 1}, {name}: {found[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        check_same({name: turns[-1] for name, turns in found.items()})
    return {name: summed(name, found) for name in names}


def run_row(row: Row, options: argparse.Namespace) -> Json:
    """One row once, in a process of its own."""
    config = config_of(row, options)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        job = {
            "side": row.side,
            "config": config.model_dump(mode="json"),
            "root": str(Path(folder, "run")),
            "warm": options.prompts // config.prompts_per_round,
            "stages": row.rounds > 1,
        }
        file = Path(folder, "job.json")
        file.write_text(json.dumps(job))
        sides = Path(__file__).with_name("end_to_end_sides.py")
        paths = os.pathsep.join([str(ROOT), str(sides.parent)])  # the actors need the judge too
        began = time.time()
        done = subprocess.run(
            [sys.executable, str(sides), str(file)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env=os.environ | {"PYTHONPATH": paths},
            check=False,
        )
        if done.returncode:
            sys.exit(f"{row} failed:\n{done.stderr[-3000:]}")
        found: Json = json.loads(file.with_name("found.json").read_text())
    first, counted, last = (found.pop(name) for name in ("first", "counted", "last"))
    return {"start_s": first - began, "warm_s": counted - first, "seconds": last - counted, **found}


def check_same(turn: Mapping[str, Json]) -> None:
    """Exit where a row has trained on other prompts, or another number of pairs, than the one it is compared with."""
    for name, found in turn.items():
        other = turn.get(ROWS[name].against or "")
        for what in ("pairs", "prompts"):
            if other is not None and found[what] != other[what]:
                sys.exit(f"{name}: {what} are {found[what]}, expected {other[what]} as in {ROWS[name].against}")


def summed(name: str, found: Mapping[str, Sequence[Json]]) -> Json:
    """A row's turns and, where there is what it is compared with, how many times as fast it is."""
    turns, row = found[name], ROWS[name]
    others = found.get(row.against or "")
    ratios = [other["seconds"] / own["seconds"] for own, other in zip(turns, others or turns, strict=True)]
    return {
        "turns": [turn | {"prompts": len(turn["prompts"])} for turn in turns],
        "pairs_per_s": statistics.median(turn["pairs"] / turn["seconds"] for turn in turns),
        "against": row.against if others else None,
        "speed": spread(ratios) if others else None,
        "target": TARGET if row.against == "TRL" else None,
        "overlap": overlap(turns) if turns[0]["stages"] else None,
    }


def overlap(turns: Sequence[Json]) -> Json:
    """Busy seconds and idle share of each stage, and the least that the counted time could be; medians of the turns.

    `bound_s` is max(Tg, Tt), of stages with devices of their own; on shared cores it is `sum_s`.
    """
    runs = [turn["stages"] for turn in turns]
    busy, idle = (
        {role: statistics.median(run["stages"][role][what] for run in runs) for role in STAGES}
        for what in ("busy_s", "idle")
    )
    return {
        "counted_s": statistics.median(run["counted_s"] for run in runs),
        "busy_s": busy,
        "idle": idle,
        "bound_s": max(busy["generator"], busy["trainer"]),
        "sum_s": sum(busy.values()),
    }


def ratios(result: Json) -> list[Ratio]:
    """What speed.py shows."""
    return [
        Ratio(f"{name}, against {row['against']}", **row["speed"], target=row["target"])
        for name, row in result["rows"].items()
        if row["speed"]
    ]


def line(name: str, row: Json) -> str:
    """A row of the first table."""

    def median(key: str) -> str:
        return f"{statistics.median(turn[key] for turn in row['turns']):.1f}"

    speed = row["speed"]
    cells = [
        name,
        f"{row['turns'][0]['pairs']}",
        f"{statistics.median(turn['tokens'] for turn in row['turns']):.0f}",
        median("seconds"),
        f"{row['pairs_per_s']:.2f}",
        f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})" if speed else "-",
        row["against"] or "-",
        f"{row['target']:g}" if row["target"] else "-",
        median("start_s"),
        median("warm_s"),
    ]
    return "| " + " | ".join(cells) + " |"


def overlap_line(name: str, found: Json) -> str:
    """A row of the second table."""
    stages = [f"{found['busy_s'][role]:.1f} ({100 * found['idle'][role]:.0f} %)" for role in STAGES]
    times = [f"{found[key]:.1f}" for key in ("counted_s", "bound_s", "sum_s")]
    return "| " + " | ".join([name, times[0], *stages, *times[1:]]) + " |"


def as_text(result: Json) -> str:
    """Two tables in Markdown."""
    head = [
        "row", "pairs", "tokens written", "seconds", "pairs/s", "times as fast", "as", "target", "start-up, s",
        "warm-up, s",
    ]  # fmt: skip
    second = ["row", "seconds", *(f"{role} busy, s (idle)" for role in STAGES), "max(Tg, Tt), s", "sum, s"]
    rows = result["rows"].items()
    overlapping = [overlap_line(name, row["overlap"]) for name, row in rows if row["overlap"]]
    lines = table(head, [line(name, row) for name, row in rows])
    return "\n".join([*lines, "", *table(second, overlapping)] if overlapping else lines)


def table(head: Sequence[str], rows: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]


if __name__ == "__main__":
    main()
