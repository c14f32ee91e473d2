"""Settings tried against each other on development questions: none is among those of the evidence.

    python benchmarks/recipe_study.py ""                                         # the recipe `rlsf` as it is
    python benchmarks/recipe_study.py "" "loss.nll=1.0" "loss.name=ipo loss.beta=0.5" --seed 11
    python benchmarks/recipe_study.py "" "pairs.min_chosen=3.0" --task gcd

Each argument is one run: a quoted list of KEY=VALUE, which change the recipe. A line per run: accuracies, calibration
errors and the Brier skill of the calibrated confidence, of the untrained model (first) and of the last version.
"""

from __future__ import annotations

import argparse
import re
import shlex
import time
from pathlib import Path

import numpy as np
from evidence import SHARED, TASKS
from vote_precision import gold_answers

from rlsf_ray import loop
from rlsf_ray.cli import exit_on_sigterm
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.records import Json, ProbePrompt
from rlsf_ray.tasks.sources import PromptSets, load_sets

QUESTIONS, CALIBRATION = 150, 120
COLUMNS = {
    "sampled": "sampled_accuracy",
    "greedy": "greedy_accuracy",
    "majority": "majority_accuracy",
    "ECE answer prob.": "ece_answer_prob",
    "ECE calibrated": "ece_calibrated",
    "skill": "brier_skill_calibrated",
    "length": "mean_length",
}


def main() -> None:
    """Entry point."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("changes", nargs="+", metavar="SETTINGS", help='KEY=VALUE ..., "" for the recipe as it is')
    parser.add_argument("--recipe", default="rlsf")
    parser.add_argument("--task", default="arithmetic", choices=[name for name in TASKS if name != "commonsenseqa"])
    parser.add_argument("--seed", type=int, default=10, help="the evidence has 0, 1, 2")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe_study"), help="where the run directories lie")
    options = parser.parse_args()
    loop.load_sets = development_sets
    print(" | ".join(["settings", *COLUMNS, "pairs", "minutes"]), flush=True)
    for changes in options.changes:
        start = time.time()
        config = load_config(options.recipe, [*_shared(options.task), f"seed={options.seed}", *shlex.split(changes)])
        root = options.runs.absolute() / options.task / f"{options.recipe} {changes} {options.seed}".replace("/", "-")
        summary = loop.run(config, str(root))
        first, *_, last = summary["versions"]
        cells = [f"{_shown(first, name)} -> {_shown(last, name)}" for name in COLUMNS.values()]
        minutes = f"{(time.time() - start) / 60:.1f}"
        print(" | ".join([changes or options.recipe, *cells, str(summary["training"]["pairs"]), minutes]), flush=True)


def development_sets(config: RunConfig) -> PromptSets:
    """Training prompts, some of them taken out as the probe set and the calibration prompts.

    So the questions are as hard as those that are trained on. The evidence's probe set has more of the easy ones, of
    which there are few: what is left of that draw would be too hard.
    """
    prompts, gold = load_sets(config).train, gold_answers(config)
    order = np.random.default_rng(0).permutation(len(prompts))
    probe, calibration, train = np.split(order, [QUESTIONS, QUESTIONS + CALIBRATION])
    return PromptSets(
        train=[prompts[index] for index in sorted(train)],
        probe=[ProbePrompt(prompt=prompts[index], gold=gold[prompts[index].id]) for index in sorted(probe)],
        calibration=[prompts[index] for index in sorted(calibration)],
    )


def _shared(task: str) -> list[str]:
    train, probe = TASKS[task]
    *_, last = re.finditer(r"count: (\d+)", train)
    wider = f"{train[: last.start(1)]}{int(last[1]) + QUESTIONS + CALIBRATION}{train[last.end(1) :]}"
    return [wider, probe, *SHARED, "guard=warn"]


def _shown(version: Json, name: str) -> str:
    value = version["metrics"].get(name)
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
