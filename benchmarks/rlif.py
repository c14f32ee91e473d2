"""RLIF's question: does a reward for being sure help, and for how long? Each reward, measured as it trains.

    python benchmarks/rlif.py              # every reward that has no result yet; says first how long
    python benchmarks/rlif.py --only rlif_majority --seed 1 --go-on
    python benchmarks/rlif.py --table      # rlif.md and rlif.svg from the committed results

The evidence's arithmetic task and probe set; 15 rounds of 64 prompts x 8 traces (`rlsf_reward_model`: two of the rounds
train the reward model), a step for each 128 traces that have an advantage. Every third version is measured on the whole
probe set. A row that fails keeps what it has measured, and why.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib
from bench_common import code_of, machine_facts, take_up
from evidence import PACKAGES, SHARED, TASKS
from evidence_markdown import put_between, signed
from matplotlib.figure import Figure

from rlsf_ray import loop
from rlsf_ray.cli import exit_on_sigterm
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.engines.build import build_engine
from rlsf_ray.errors import RlsfError
from rlsf_ray.evaluate import evaluate_version
from rlsf_ray.measures import difference, measure
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets
from rlsf_ray.wording import way_back

RESULTS = Path(__file__).parent / "results" / "rlif"
PAGE = Path(__file__).parent / "results" / "rlif.md"
MARKS = ("<!-- rlif -->", "<!-- end of rlif -->")
SURPRISAL = "-log p a token"  # drawn at temperature 1 it estimates the entropy
CURVES = (
    "sampled",
    "greedy",
    "right in any form",
    "ECE answer prob.",
    SURPRISAL,
    "length",
    "cut off",
    "turns of thought",
)
WAYS = ("sampled_accuracy", "greedy_accuracy")
EVERY = 3  # versions between two measurements
MINUTES = 60.0  # of one on two cores without a GPU
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
    SURPRISAL: "surprisal",
    "length": "mean_length",
    "cut off": "cut_off",
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
        put_between(MARKS, summary(found))
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
    """Train, measure the base model, every third version and the last, keep."""
    source = take_up(run, anew=anew)
    start, config = time.time(), config_of(name, seed)
    summary: Json = {}
    failed = None
    try:
        summary = loop.run(config, str(run))
    except RlsfError as error:
        failed = f"{type(error).__name__}: {error}"
    store = RunStore.open(str(run))
    found = measured(store, config)
    last, best = max(found), max(found, key=lambda version: found[version]["metrics"][WAYS[0]])
    kept = {
        "name": name,
        "seed": seed,
        "command": f'python benchmarks/rlif.py --only "{name}" --seed {seed}',
        "machine": machine_facts(*PACKAGES),
        "commit": source,
        "minutes": round((time.time() - start) / 60, 1),
        "failed": failed,
        "guard": summary.get("guard"),
        "accounting": summary.get("accounting"),
        "traces": config.rounds * config.prompts_per_round * config.rollout.traces,
        "temperature": config.rollout.temperature,
        "points": [point(version, one, found[0]) for version, one in found.items()],
        "best": best,
        "since_best": difference(found[best], found[last]),
        "steps": [
            {
                key: row.get(key)
                for key in ("step", "round", "num_examples", "entropy", "kl", "reward", "loss", "clipped")
            }
            for row in store.read_metrics("train")
        ],
    }
    path_of(name, seed).parent.mkdir(parents=True, exist_ok=True)
    path_of(name, seed).write_text(json.dumps(kept) + "\n")
    print(f"{name}: {failed or 'done'} after {kept['minutes']} min", flush=True)


def point(version: int, found: Json, base: Json) -> Json:
    """A version's figures, with the rises from version 0, paired over the questions."""
    ends, metrics = ("", "_low", "_high"), found["metrics"]
    figures = {key + end: metrics.get(key + end) for key in COLUMNS.values() for end in ends}
    return {"version": version, "rises": difference(base, found)} | figures


def measured(store: RunStore, config: RunConfig) -> dict[int, Json]:
    """{version: its evaluation on the whole probe set}; one engine measures what the run itself has not."""
    sets, known = load_sets(config), store.versions()
    wanted = sorted({0, *(version for version in known if version % EVERY == 0), *known[-1:]})
    found = {version: store.measured(version, len(sets.probe)) for version in wanted}
    for own in filter(None, found.values()):  # an earlier program may have reckoned otherwise
        own["metrics"] |= measure(own["questions"])
    if all(found.values()):
        return found
    engine = build_engine(config)
    try:
        for version in (version for version, own in found.items() if own is None):
            if version:
                engine.load_version(version, store.read_adapter(version)[0])
            earlier = store.earlier_answers(version)
            found[version] = evaluate_version(engine, sets, config, version, earlier)
            if version:
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
    figure = Figure(figsize=(14, 6), layout="constrained")
    panels = figure.subplots(2, 4)
    for axes, name in zip(panels.flat, CURVES, strict=True):
        for one in found:
            at, values = zip(*((p["version"], p[COLUMNS[name]]) for p in one["points"]), strict=True)
            drawn = "" if one["temperature"] == 1.0 else f", drawn at {one['temperature']:g}"
            axes.plot(at, values, marker="o", markersize=3, label=f"{one['name']}, seed {one['seed']}{drawn}")
        axes.set(title=name, xlabel="version", ylim=(0, None))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "rlif"}):  # else its ids differ each time
        figure.savefig(to, metadata={"Date": None})


def page(kept: list[Json]) -> str:
    """rlif.md."""
    lines = [
        "# Rewards for being sure",
        "",
        "Written by `python benchmarks/rlif.py --table` from `results/rlif/`: the evidence's arithmetic task and its"
        " 200 probe questions, four traces each, drawn as in training (temperature 1 where nothing else is said); 64"
        " prompts x 8 traces a round, a step for each 128 traces with an advantage. Intervals are over questions,"
        " rises paired. The best version is picked from those measured, which makes a fall from it likely by chance"
        " alone. Traces that reach the limit of 80 tokens take no part in rewards over a trace's tokens. A round's last"
        " step is of what its other steps have left. -log p is of temperature 1: of texts drawn at temperature 1 it"
        " estimates the entropy, of those drawn closer it lies below it, and their sampled accuracy is higher from the"
        " start.",
    ]
    machines = list(dict.fromkeys(", ".join(f"{key} {v}" for key, v in one["machine"].items()) for one in kept))
    if kept:
        lines += [
            "",
            f"Measured with {'; '.join(machines)}.",
            "",
            "![Each reward's curves over the versions](rlif.svg)",
        ]
    for one in kept:
        lines += [
            "",
            f"## {one['name']}, seed {one['seed']}",
            "",
            f"`{one['command']}`, {one['minutes']} min in its last call, code {code_of(one)}.",
            "",
        ]
        lines += ["| version | " + " | ".join(COLUMNS) + " | rise, sampled |", "|" + " --- |" * (len(COLUMNS) + 2)]
        for p in one["points"]:
            figures = " | ".join(shown(p, key) for key in COLUMNS.values())
            lines.append(f"| {p['version']} | {figures} | {signed(p['rises'].get(WAYS[0]))} |")
        lines += ["", *verdict(one)]
        for found in (one["guard"] or {}).get("verdicts") or ():
            would = "" if found["found"] == found["action"] else f" (would {found['found']})"
            lines.append(f"\n- version {found['version']}, {found['action']}{would}: {'; '.join(found['reasons'])}")
        if back := (one["guard"] or {}).get("rolled_back"):
            lines.append(f"\n- went back from version {back['from']}: version {back['version']} is {way_back(back)}")
    return "\n".join(lines) + "\n"


def summary(kept: list[Json]) -> list[str]:
    """README's table: first and last version of every row."""
    names = ("sampled", "greedy", "ECE answer prob.", SURPRISAL, "length", "cut off", "parsed")
    lines = ["| reward | drawn at | " + " | ".join(names) + " | best version, sampled | the guard would stop at |"]
    lines.append("|" + " --- |" * (len(names) + 4))
    for one in kept:
        first, last = one["points"][0], one["points"][-1]
        best = next(point for point in one["points"] if point["version"] == one["best"])
        ends = [f"{_plain(first, COLUMNS[name])} → {_plain(last, COLUMNS[name])}" for name in names]
        stops = [found["version"] for found in (one["guard"] or {}).get("verdicts") or () if found["found"] == "stop"]
        top = f"{best['version']}: {_plain(best, COLUMNS['sampled'])}"
        cells = [one["name"], f"{one['temperature']:g}", *ends, top, str(min(stops)) if stops else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plain(point: Json, key: str) -> str:
    """A figure without its interval."""
    return shown(point, key).partition(" ")[0]


def verdict(one: Json) -> list[str]:
    """What became of the accuracies, and how much was learned from."""
    credited = sum(step["num_examples"] for step in one["steps"] if step["reward"] is not None)
    drawn = "" if one["temperature"] == 1.0 else f" Drawn at temperature {one['temperature']:g}."
    texts = []
    for way in WAYS:
        since, name = one["since_best"].get(way), way.removesuffix("_accuracy")
        word = "no fall is shown" if since is None or since[2] >= 0 else "it has fallen"
        texts.append(f"{name} {signed(since)}: {word}")
    last = one["points"][-1]["version"]
    told = f"Version {last} against version {one['best']}, whose sampled accuracy is the best: {'; '.join(texts)}."
    if last == one["best"]:
        told = "No fall: of the versions measured the last has the best sampled accuracy."
    learned = f" {len(one['steps'])} steps, {credited} of {one['traces']} traces with an advantage.{drawn}"
    return [told + learned, *(["", f"It ended early: {one['failed']}"] if one["failed"] else [])]


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
