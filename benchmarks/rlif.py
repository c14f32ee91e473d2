"""RLIF's question: does a reward for being sure help, and for how long? Each reward, measured as it trains.

    python benchmarks/rlif.py              # every reward that has no result yet; says first how long
    python benchmarks/rlif.py --only rlif_majority --seed 1 --go-on
    python benchmarks/rlif.py --table      # rlif.md and rlif.svg from the committed results

The evidence's arithmetic task and probe set; 15 rounds of four steps of 16 prompts x 8 traces (`rlsf_reward_model`: two
of the rounds train the reward model). Every third version is measured on the whole probe set.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from bench_common import machine_facts
from evidence import PACKAGES, SHARED, TASKS
from matplotlib.figure import Figure

from rlsf_ray import loop
from rlsf_ray.cli import exit_on_sigterm
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.engines.build import build_engine
from rlsf_ray.evaluate import evaluate_version
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets
from rlsf_ray.wording import way_back

RESULTS = Path(__file__).parent / "results" / "rlif"
PAGE = Path(__file__).parent / "results" / "rlif.md"
CURVES = ("sampled", "right in any form", "ECE answer prob.", "entropy", "length", "turns of thought")
EVERY = 3  # versions between two measurements
MINUTES = 35.0  # of one on two cores without a GPU
# name -> (recipe, settings)
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rlif_self_certainty": ("rlif_self_certainty", ()),
    "rlif_token_entropy": ("rlif_token_entropy", ()),
    "rlif_trajectory_entropy": ("rlif_trajectory_entropy", ()),
    "rlif_majority": ("rlif_majority", ()),
    "rlsf_reward_model": ("rlsf_reward_model", ()),
    "rlif_token_entropy, fast": ("rlif_token_entropy", ("learner.learning_rate=4e-4",)),
    "rlif_token_entropy, fast, guarded": ("rlif_token_entropy", ("learner.learning_rate=4e-4", "guard=roll_back")),
}
COLUMNS = {
    "sampled": "sampled_accuracy",
    "greedy": "greedy_accuracy",
    "right in any form": "anyhow_accuracy",
    "ECE answer prob.": "ece_answer_prob",
    "ECE calibrated": "ece_calibrated",
    "entropy": "surprisal",
    "length": "mean_length",
    "turns of thought": "transitions",
    "parsed": "parsed",
}


def main() -> None:
    """Entry point."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(ROWS), help="this reward now, whether it has a result or not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", action="store_true", help="take up what an earlier call has left")
    parser.add_argument("--table", action="store_true", help="write rlif.md and rlif.svg from the committed results")
    parser.add_argument("--runs", type=Path, default=Path("runs/rlif"), help="where the run directories lie")
    options = parser.parse_args()
    if options.table:
        found = committed()
        PAGE.write_text(page(found))
        draw(found, PAGE.with_suffix(".svg"))
        print(PAGE.read_text())
        return
    seed = options.seed
    names = [options.only] if options.only else [name for name in ROWS if not path_of(name, seed).exists()]
    print(f"{len(names)} of {len(ROWS)} to run, about {len(names) * MINUTES / 60:.1f} h on two cores", flush=True)
    for name in names:
        run_row(name, seed, options.runs.absolute() / path_of(name, seed).stem, anew=not options.go_on)


def config_of(name: str, seed: int) -> RunConfig:
    """What a row trains."""
    recipe, settings = ROWS[name]
    return load_config(recipe, [*TASKS["arithmetic"], *SHARED, f"seed={seed}", "guard=warn", *settings])


def path_of(name: str, seed: int) -> Path:
    return RESULTS / f"{name.replace(', ', '-')}-{seed}.json"


def run_row(name: str, seed: int, run: Path, *, anew: bool) -> None:
    """Train, measure every third version and the last, keep."""
    if anew:
        shutil.rmtree(run, ignore_errors=True)
    start, config = time.time(), config_of(name, seed)
    summary = loop.run(config, str(run))
    store = RunStore.open(str(run))
    points = [point(0, summary["before"])]
    known = store.versions()
    wanted = [version for version in known if version % EVERY == 0 and version != known[-1]]
    points += [point(version, found) for version, found in measured(store, config, wanted)]
    points.append(point(known[-1], summary["after"]))
    kept = {
        "name": name,
        "seed": seed,
        "command": f'python benchmarks/rlif.py --only "{name}" --seed {seed}',
        "machine": machine_facts(*PACKAGES),
        "minutes": round((time.time() - start) / 60, 1),
        "guard": summary.get("guard"),
        "accounting": summary["accounting"],
        "points": points,
        "steps": [
            {key: row.get(key) for key in ("step", "round", "entropy", "kl", "reward", "loss", "clipped")}
            for row in store.read_metrics("train")
        ],
    }
    path_of(name, seed).parent.mkdir(parents=True, exist_ok=True)
    path_of(name, seed).write_text(json.dumps(kept) + "\n")
    print(f"{name}: done in {kept['minutes']} min", flush=True)


def point(version: int, metrics: Json) -> Json:
    ends = ("", "_low", "_high")
    return {"version": version} | {k + e: metrics.get(k + e) for k in COLUMNS.values() for e in ends}


def measured(store: RunStore, config: RunConfig, versions: list[int]) -> list[tuple[int, Json]]:
    """(version, metrics) on the whole probe set, with one engine."""
    sets, found = load_sets(config), []
    engine = build_engine(config)
    try:
        for version in versions:
            engine.load_version(version, store.read_adapter(version)[0])
            earlier = store.earlier_answers(version)
            found.append((version, evaluate_version(engine, sets, config, version, earlier)["metrics"]))
            engine.forget_version(version)
    finally:
        engine.close()
    return found


def committed() -> list[Json]:
    """Every result, in the order of ROWS."""
    order, found = list(ROWS), [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return sorted(found, key=lambda one: (order.index(one["name"]), one["seed"]))


def draw(found: list[Json], to: Path) -> None:
    """Each reward's curves over the versions."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, name in zip(panels.flat, CURVES, strict=True):
        for one in found:
            at, values = zip(*((p["version"], p[COLUMNS[name]]) for p in one["points"]), strict=True)
            axes.plot(at, values, marker="o", markersize=3, label=f"{one['name']}, seed {one['seed']}")
        axes.set(title=name, xlabel="version", ylim=(0, None))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(to, metadata={"Date": None})


def page(kept: list[Json]) -> str:
    """rlif.md."""
    lines = [
        "# Rewards for being sure",
        "",
        "Written by `python benchmarks/rlif.py --table` from `results/rlif/`: the evidence's arithmetic task and its"
        " 200 probe questions, four traces each at temperature 1; 16 prompts x 8 traces a step, four steps a round."
        " Accuracies with 95 % intervals over questions.",
    ]
    if kept:
        facts = ", ".join(f"{key} {value}" for key, value in kept[0]["machine"].items())
        lines += ["", f"Measured with {facts}.", "", "![Each reward's curves over the versions](rlif.svg)"]
    for one in kept:
        lines += ["", f"## {one['name']}, seed {one['seed']}", "", f"`{one['command']}`, {one['minutes']} min.", ""]
        lines += ["| version | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
        lines += [
            f"| {p['version']} | " + " | ".join(shown(p, key) for key in COLUMNS.values()) + " |" for p in one["points"]
        ]
        for verdict in (one["guard"] or {}).get("verdicts") or ():
            lines.append(f"\n- version {verdict['version']}, {verdict['action']}: {'; '.join(verdict['reasons'])}")
        if back := (one["guard"] or {}).get("rolled_back"):
            lines.append(f"\n- went back from version {back['from']}: version {back['version']} is {way_back(back)}")
    return "\n".join(lines) + "\n"


def shown(point: Json, key: str) -> str:
    value = point.get(key)
    if value is None:
        return "-"
    text = f"{value:.3f}" if key != "mean_length" else f"{value:.1f}"
    if key.endswith("_accuracy") and point.get(f"{key}_low") is not None:
        text += f" [{point[f'{key}_low']:.3f}, {point[f'{key}_high']:.3f}]"
    return text


if __name__ == "__main__":
    main()
