"""Reflect, Retry, Reward: what are a second try and a trained reflection worth? First and last try, before and after.

    python benchmarks/reflect.py sums                 # a task made so that a good reflection is all that is needed
    python benchmarks/reflect.py countdown            # of three numbers, as the recipe has it
    python benchmarks/reflect.py countdown_two        # of two numbers, which SmolLM2 solves now and then
    python benchmarks/reflect.py bfcl                 # ../shared/data/bfcl; the wanted calls are labels
    python benchmarks/reflect.py --table              # reflect.md from the committed results

`sums`: of a number up to 20 and one up to 9. SmolLM2-135M fails most, and its retry repeats what its reflection ends
in: whoever works the sum out again in the reflection is right. The answers are the check, so it has labels.

First the prompts are found that the model fails, attempted as the run does (greedily, once); only those are trained on.
The committed result is older: of eight samples each it took those that mostly fail. Forgetting: sampled accuracy on
the evidence's gcd, of which nothing was trained, before and after.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from bench_common import code_of, machine_facts, take_up
from evidence import DATA, PACKAGES, SHARED, measure
from evidence import TASKS as EVIDENCE_TASKS

from rlsf_ray import loop
from rlsf_ray.cli import exit_on_sigterm
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.errors import NoPairsError
from rlsf_ray.failures import find_failures
from rlsf_ray.measures import difference
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.ledger import Ledger
from rlsf_ray.tries import counts_of_tries, rises_of_tries
from rlsf_ray.wording import TRIES

RESULTS = Path(__file__).parent / "results" / "reflect"
PAGE = Path(__file__).parent / "results" / "reflect.md"
BFCL = DATA / "bfcl" / "BFCL_v4_simple_python.json"
TASKS = ("sums", "countdown", "countdown_two", "bfcl")
TWO_NUMBERS = "min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 20, min_target: 1, max_target: 40"


def main() -> None:
    """Entry point."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", nargs="?", choices=TASKS, default="sums")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", action="store_true", help="take up what an earlier call has left")
    parser.add_argument("--table", action="store_true", help="write reflect.md from the committed results")
    parser.add_argument("--runs", type=Path, default=Path("runs/reflect"), help="where the run directories lie")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for trials: nothing is kept")
    options = parser.parse_args()
    if options.table:
        PAGE.write_text(page())
        print(PAGE.read_text())
        return
    folder = options.runs.absolute() / f"{options.task}-{options.seed}"
    source = take_up(folder, anew=not options.go_on)
    folder.mkdir(parents=True, exist_ok=True)
    kept = run_task(options.task, options.seed, folder, options.set) | {"commit": source}
    if not options.set:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{options.task}-{options.seed}.json").write_text(json.dumps(kept) + "\n")
    print("\n".join(lines_of(kept)))


def run_task(task: str, seed: int, folder: Path, changes: list[str]) -> Json:
    """Train `reflect_retry_reward` on the task; what is kept of it."""
    start, resumed = time.time(), (folder / "hard.jsonl.judged").exists()
    settings = [*SHARED, f"seed={seed}", "eval.samples=4", "guard=warn", *settings_of(task, folder), *changes]
    every = load_config("reflect_retry_reward", [*settings, "data.calibration=0"])
    kept, judged = find_failures(every, folder / "hard.jsonl", most=0.5)
    source = f"kind: file, path: {folder / 'hard.jsonl'}, messages: messages, check: check, id: id, labels: true"
    config = load_config("reflect_retry_reward", [*settings, f"data.train=[{{{source}}}]"])
    before, after, counts = train(config, folder / "run")
    elsewhere = load_config("rlsf", [*EVIDENCE_TASKS["gcd"], *SHARED])
    forgot = difference(measure(elsewhere, None), measure(elsewhere, folder / "run"))
    names = [key for key, *_ in TRIES]
    return {
        "task": task,
        "seed": seed,
        "command": f"python benchmarks/reflect.py {task} --seed {seed}",
        "machine": machine_facts(*PACKAGES),
        "minutes": round((time.time() - start) / 60, 1),
        "resumed": resumed,
        "failed": [kept, judged],
        "accounting": counts,
        "forgetting": forgot["sampled_accuracy"],
        **{
            when: {name + end: one["metrics"].get(name + end) for name in names for end in ("", "_low", "_high")}
            for when, one in (("before", before), ("after", after))
        },
        "by_question": {"before": by_question(before), "after": by_question(after)},
    }


def by_question(evaluation: Json) -> Json:
    """{metric: [counts, of how many]} of every question, in the order of their ids: what a paired interval needs."""
    counts = counts_of_tries(sorted(evaluation["questions"], key=lambda row: str(row["id"])))
    return {name: [[round(count, 6) for count in column.tolist()] for column in both] for name, both in counts.items()}


def train(config: RunConfig, run: Path) -> tuple[Json, Json, Json]:
    """(evaluation before, after, how the prompts ended). Where no reflection ever helped, nothing changes."""
    try:
        loop.run(config, str(run))
    except NoPairsError as error:
        print(f"nothing to learn from: {error}", flush=True)
    store = RunStore.open(str(run))
    before, after = (store.read_json(f"eval/version-{v:04d}.json") for v in (0, max(store.versions(), default=0)))
    return before, after, Ledger.from_json(store.read_json("state.json")["ledger"]).totals()


def settings_of(task: str, folder: Path) -> list[str]:
    """Where the task's prompts come from, as settings."""
    if task == "countdown":
        return ["rounds=3", "data.train.0.count=180"]
    if task == "countdown_two":
        source = f"kind: reasoning_gym, name: countdown, options: {{{TWO_NUMBERS}}}"
        return [f"data.train=[{{{source}, count: 280}}]", f"data.probe=[{{{source}, count: 100}}]"]
    if task == "bfcl":
        source = f"kind: bfcl, path: {BFCL}"
        return [
            f"data.train=[{{{source}, count: 250, labels: true}}]",
            f"data.probe=[{{{source}, count: 100}}]",
            "rounds=5",
        ]
    train, probe = write_sums(folder)
    source = "kind: file, check: check, path:"
    return [
        f"data.train=[{{{source} {train}, labels: true}}]",
        f"data.probe=[{{{source} {probe}}}]",
        "data.calibration=20",
        "rollout.max_tokens=40",
    ]


def write_sums(folder: Path) -> tuple[Path, Path]:
    """120 sums to train, 60 to probe; each with its answer as a check."""
    rows = []
    for a, b in np.random.default_rng(0).permutation([(a, b) for a in range(1, 21) for b in range(1, 10)]).tolist():
        check = {"kind": "exact", "data": {"accepted": [str(a + b)]}}
        rows.append(json.dumps({"question": f"What is {a} + {b}?", "answer": str(a + b), "check": check}))
    paths = folder / "train.jsonl", folder / "probe.jsonl"
    for path, part in zip(paths, (rows[:120], rows[120:]), strict=True):
        path.write_text("\n".join(part) + "\n")
    return paths


def lines_of(kept: Json) -> list[str]:
    """One result as a section of reflect.md."""
    took = f"{'its last call ' if kept.get('resumed') else ''}{kept['minutes']} min, code {code_of(kept)}"
    head = [
        "",
        f"## {kept['task']}, seed {kept['seed']}",
        "",
        f"`{kept['command']}`, {took}.",
        "",
    ]
    counts = ", ".join(f"{count} {name}" for name, count in kept["accounting"].items() if isinstance(count, int))
    trained = kept["accounting"]["trained"]
    rises = rises_of_tries(*kept["by_question"].values()) if trained and "by_question" in kept else {}
    rows = [
        f"| {name} | {_shown(kept['before'], key, digits)} | {_shown(kept['after'], key, digits)} |"
        f" {_rise(rises.get(key), digits)} |"
        for key, name, _, digits in TRIES
    ]
    table = ["| | before | after | rise, paired |", "| --- | --- | --- | --- |", *rows, ""]
    change, low, high = kept["forgetting"]
    elsewhere = f"Sampled accuracy on gcd, of which nothing was trained: {change:+.3f} [{low:+.3f}, {high:+.3f}]."
    failed = "{} of {} prompts are failed; those not set aside for calibration are trained on".format(*kept["failed"])
    notes = [f"{failed}: {counts}. {elsewhere}"]
    if not trained:
        notes.append("Nothing was learned, as no prompt had reflections that helped and others: after is before.")
    if "by_question" not in kept:
        notes.append(
            "The rises of this run are not known with an interval: it was made before counts were kept by question."
        )
    return [*head, *table, " ".join(notes)]


def _shown(metrics: Json, key: str, digits: int) -> str:
    """With its interval, but for one that a bootstrap has drawn of none or all (of results kept before Wilson's)."""
    value, low, high = (metrics.get(key + end) for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low != high else "")


def _rise(found: list[float] | None, digits: int) -> str:
    """A rise of 0 too has its interval."""
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*found, d=digits) if found else "-"


def page() -> str:
    """reflect.md."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines = [
        "# Reflect, Retry, Reward on SmolLM2-135M",
        "",
        "Written by `python benchmarks/reflect.py --table` from `results/reflect/`. Four episodes of each probe"
        " question; 95 % intervals over questions, Wilson's where none or all are. First tries are never rewarded.",
    ]
    lines += [line for kept in found for line in lines_of(kept)]
    if missing := [task for task in TASKS if task not in {kept["task"] for kept in found}]:
        lines += ["", f"Without a result, as no run of theirs has ended: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
