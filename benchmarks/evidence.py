"""Does it work? Recipes and controls x seeds on fixed tasks, measured on the same held-out questions.

    python benchmarks/evidence.py                           # every cell that has no result yet; says first how long
    python benchmarks/evidence.py --only arithmetic/rlsf    # the cells whose name begins so
    python benchmarks/evidence.py --cell arithmetic/rlsf/0  # one cell, again
    python benchmarks/evidence.py --again arithmetic/rlsf/0 # the same beside its result, which stays: is it alike?
    python benchmarks/evidence.py --table                   # evidence.md, evidence.json and README's table from them

A cell trains with a recipe (or not at all: the base model) and then measures the last version on the task's probe set.
It is kept under results/evidence/ when it is done, so an interrupted call goes on where it stopped. The train and the
probe set of a task share no question, not even with operands swapped; the probe set is the same for every cell.
A cell computes on one core (the first it may use; `taskset` says which), as sums depend on how many threads share them:
on processors of one kind a cell that is run again gives the same traces.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_common import machine_facts, take_up
from evidence_markdown import MARKS, put_between, summary
from evidence_table import write_table

from rlsf_ray.cli import exit_on_sigterm
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.errors import NoPairsError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

RESULTS = Path(__file__).parent / "results" / "evidence"
ARITHMETIC = "{{kind: reasoning_gym, name: {name}, count: {count}, options: {{{options}}}}}"
CELL_S = 5400.0  # the longest that one may take
END_S = 60.0  # to end when it is asked to
ONE_DIGIT = "min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1"
TWO_DIGITS = "min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2"
PLAIN = f"{TWO_DIGITS}, allow_parentheses: false, allow_negation: false"  # -(3 + 4) is nearly 3 + 4
TO_FIFTY = "min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 50"
DATA = Path(os.environ.get("RLSF_DATA") or Path(__file__).parents[2] / "shared" / "data")
CSQA = str(DATA.absolute() / "commonsenseqa")  # its two files as the authors publish them, 1811.00937
LETTER = "\\nThink in one or two short sentences, then give the letter of the answer."
SHARED = ("engine=vllm", "engine_args={max_model_len: 1024}", "eval.samples=4", "eval.during=0")
PACKAGES = ("vllm", "peft", "reasoning_gym")


def gym(*families: tuple[str, int, str]) -> str:
    """Sources of reasoning-gym as a config value."""
    return "[" + ", ".join(ARITHMETIC.format(name=n, count=c, options=o) for n, c, o in families) + "]"


TASKS: dict[str, list[str]] = {
    "arithmetic": [
        "data.train=" + gym(("products", 30, ONE_DIGIT), ("chain_sum", 355, TWO_DIGITS)),
        "data.probe=" + gym(("products", 25, ONE_DIGIT), ("chain_sum", 175, TWO_DIGITS)),
    ],
    "gcd": ["data.train=" + gym(("gcd", 360, TO_FIFTY)), "data.probe=" + gym(("gcd", 200, TO_FIFTY))],
    "basic_arithmetic": [  # sums, differences, products and quotients of two numbers, in other words
        "data.train=" + gym(("basic_arithmetic", 360, PLAIN)),
        "data.probe=" + gym(("basic_arithmetic", 200, PLAIN)),
    ],
    "commonsenseqa": [
        f"data.train=[{{kind: commonsenseqa, path: {CSQA}_train.jsonl, count: 360}}]",
        f"data.probe=[{{kind: commonsenseqa, path: {CSQA}_dev.jsonl, count: 200}}]",
        f'data.suffix="{LETTER}"',
    ],
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what is trained (recipe None: nothing), with which settings, on which tasks and seeds."""

    recipe: str | None
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] = ("arithmetic",)


EVERY = tuple(TASKS)
# Driven to collapse, with nothing that holds the pairs back; each version measured
TOO_FAR = ("rounds=5", "learner.learning_rate=4e-4", "eval.during=200", "pairs.surest=null")
FEW = ("prompts_per_round=37", "guard=roll_back")
TEMPERATURES = (0.3, 0.45, 0.8, 1.0)  # 0.6 is what every other row is sampled with
ROWS = {
    "base": Row(None, ("eval.branches=10",), tasks=EVERY),
    **{f"base-t{t}": Row(None, (f"rollout.temperature={t}",)) for t in TEMPERATURES},
    "rlsf": Row("rlsf", ("guard=roll_back", "eval.during=200"), seeds=(0, 1, 2), tasks=EVERY),  # as it ships
    "random_pairs": Row("random_pairs", seeds=(0, 1, 2), tasks=EVERY),
    "random_few": Row("random_pairs", FEW),  # as many pairs as rlsf has, and its guard
    "rlsf_best_worst": Row("rlsf_best_worst", seeds=(0, 1, 2)),
    "rlsf_paper": Row("rlsf_paper", seeds=(0, 1, 2)),
    "majority_pairs": Row("majority_pairs"),
    "reversed_pairs": Row("reversed_pairs"),
    "length_matched": Row("length_matched"),
    "format_only": Row("format_only"),
    "collapse": Row("rlsf", TOO_FAR),
    "collapse_guarded": Row("rlsf", (*TOO_FAR, "guard=roll_back"), seeds=(0, 1)),
}
# A cell; others as below
MINUTES = {"rlsf_paper": 40.0, "collapse": 40.0, "collapse_guarded": 30.0, "rlsf_best_worst": 25.0}
MINUTES_UNTRAINED, MINUTES_OF_A_RUN = 4.0, 15.0


def cells(only: str = "") -> list[str]:
    """Names of all cells that begin with `only`, the base model first."""
    found = [f"{task}/{row}/{seed}" for row, of in ROWS.items() for task in of.tasks for seed in of.seeds]
    return [name for name in found if name.startswith(only)]


def lacks_data(cell: str) -> bool:
    """Does the cell's task need a file that is not there?"""
    files = (Path(f"{CSQA}_{part}.jsonl") for part in ("train", "dev"))
    return cell.startswith("commonsenseqa/") and not all(file.exists() for file in files)


def path_of(cell: str) -> Path:
    return RESULTS / (cell.replace("/", "-") + ".json")


def minutes_of(row: str) -> float:
    """About how long a cell of this row takes."""
    return MINUTES.get(row, MINUTES_OF_A_RUN if ROWS[row].recipe else MINUTES_UNTRAINED)


def settings_of(cell: str, *, training: bool) -> tuple[str | None, list[str]]:
    """(recipe, overrides) of a cell: for its training, or for measuring, which is alike for every row of a task.

    A training run knows the probe set, to keep away from it. The guard of a control only warns: its collapse must show.
    """
    task, name, seed = cell.split("/")
    row = ROWS[name]
    if training:
        return row.recipe, [*TASKS[task], *SHARED, f"seed={seed}", "guard=warn", *row.settings]
    return "rlsf", [*TASKS[task], *SHARED, *(row.settings if row.recipe is None else ())]


def run_cell(cell: str, runs: Path, *, anew: bool, to: Path = RESULTS) -> None:
    """Train, measure, keep in the folder `to`. `anew`: from the beginning, whatever is there."""
    start, run = time.time(), runs / cell
    source = take_up(run, anew=anew)
    recipe, overrides = settings_of(cell, training=True)
    summary: Json = {}
    if recipe is not None:
        from rlsf_ray import loop

        try:
            summary = loop.run(load_config(recipe, overrides), str(run), on_status=_tell(cell))
        except NoPairsError as error:  # a result too: the model stays what it was
            print(f"{cell}: {error}", file=sys.stderr)
            summary = {"training": {"pairs": 0}}
    judge, measuring = settings_of(cell, training=False)
    result = measure(load_config(str(judge), measuring), run if recipe else None)
    kept = {
        "cell": cell,
        "command": f"python benchmarks/evidence.py --cell {cell}",
        "recipe": recipe,
        "settings": [text.replace(f"{DATA.absolute()}/", "") for text in (overrides if recipe else measuring)],
        "machine": machine_facts(*PACKAGES),
        "commit": source,
        "minutes": round(summary.get("seconds", {"total": time.time() - start})["total"] / 60, 1),
        "training": {key: summary.get(key) for key in ("accounting", "guard", "training")} if summary else None,
        "guard_saw": RunStore.open(str(run)).read_json("state.json")["guard"] if recipe else None,
        "sampled_by_version": {v["version"]: v["metrics"]["sampled_accuracy"] for v in summary.get("versions", ())},
        **{key: result[key] for key in ("version", "metrics", "reliability", "calibration", "vitals")},
        "questions": [_short(row) for row in result["questions"]],
    }
    to.mkdir(parents=True, exist_ok=True)
    file = to / path_of(cell).name
    half_made = file.with_suffix(".tmp")
    half_made.write_text(json.dumps(kept) + "\n")
    half_made.replace(file)


def measure(config: RunConfig, run: Path | None) -> Json:
    """The last version of `run` (None: the base model) on the probe set of `config`.

    What the run has measured itself is taken as it is, if it was measured in the same way.
    """
    from rlsf_ray.base_cache import measure_key
    from rlsf_ray.evaluate import measure_version
    from rlsf_ray.tasks.sources import load_sets

    sets, store, version = load_sets(config), None, 0
    if run is not None:
        store = RunStore.open(str(run))
        version = max(store.versions(), default=0)
        own = store.measured(version, len(sets.probe))
        if own is not None and measure_key(store.config, load_sets(store.config)) == measure_key(config, sets):
            return own
    return measure_version(store, config, sets, version)


def _short(row: Json) -> Json:
    """What the table needs of a question: no texts."""
    names = ("answer_prob", "disparity", "agreement", "calibrated")
    samples = [
        {"right": int(s["correct"]), "parsed": s["answer"] is not None, "label": s["label"], "length": s["length"]}
        | {name: float(f"{s[name]:.8g}") for name in names if name in s}
        for s in row["samples"]
    ]
    return {"id": row["id"], "task": row["task"], "greedy": int(row["greedy"]["correct"]), "samples": samples}


def _tell(cell: str) -> Callable[[Json], None]:
    seen: list[str] = []

    def show(status: Json) -> None:
        line = f"{cell}: round {status['round'] + 1}, {status['message']}"
        if status["message"] and line not in seen:
            seen.append(line)
            print(line, file=sys.stderr, flush=True)

    return show


def run_missing(names: Sequence[str], runs: Path) -> None:
    """Each cell without a result, in a process of its own."""
    missing = [name for name in names if not path_of(name).exists() and not lacks_data(name)]
    if without := {name.split("/")[0] for name in names if lacks_data(name)}:
        print(
            f"left out, as {CSQA}_*.jsonl is not there (set RLSF_DATA to its folder): {', '.join(without)}", flush=True
        )
    minutes = sum(minutes_of(name.split("/")[1]) for name in missing)
    print(f"{len(missing)} of {len(names)} cells to run, about {minutes / 60:.1f} h", flush=True)
    for name in missing:
        start = time.time()
        command = [sys.executable, str(Path(__file__)), "--cell", name, "--runs", str(runs), "--go-on"]
        if failed := _failure(command):
            print(f"{name}: FAILED ({failed}); again with: {shlex.join(command)}", flush=True)
        else:
            print(f"{name}: done in {(time.time() - start) / 60:.1f} min", flush=True)
    if left := [name for name in missing if not path_of(name).exists()]:
        sys.exit(f"{len(left)} cells failed: {' '.join(left)}")


def _failure(command: Sequence[str]) -> str | None:
    """Why the program failed. One that takes too long is asked to end first: killed, it would leave its engine."""
    child = subprocess.Popen(command)
    try:
        code = child.wait(CELL_S)
        return f"exit status {code}" if code else None
    except subprocess.TimeoutExpired as error:
        return str(error)
    finally:
        child.terminate()
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()


def main() -> None:
    """Entry point."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="the cells whose name begins so")
    parser.add_argument("--cell", help="run this cell now, whether it has a result or not")
    parser.add_argument("--again", metavar="CELL", help="run a cell once more, beside its result")
    parser.add_argument(
        "--go-on", action="store_true", help="take up what an earlier call of a cell has left, if it was of this commit"
    )
    parser.add_argument("--table", action="store_true", help="write the table from the committed results")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="where the run directories lie")
    options = parser.parse_args()
    for name in filter(None, (options.cell, options.again)):
        if name not in cells():
            parser.error(f"got cell {name!r}, expected one of: {' '.join(cells())}")
    if not cells(options.only):
        parser.error(f"no cell begins with {options.only!r}, expected a part of one of: {' '.join(cells())}")
    if options.cell or options.again:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.table:
        put_between(MARKS, summary(write_table(RESULTS)))
    elif options.cell:
        run_cell(options.cell, options.runs.absolute(), anew=not options.go_on)
    elif options.again:
        run_cell(options.again, options.runs.absolute() / "again", anew=not options.go_on, to=RESULTS / "again")
    else:
        run_missing(cells(options.only), options.runs.absolute())


if __name__ == "__main__":
    main()
