"""Where does a run's time go? Every second of one run, by what was at work, or by what everybody waited for.

    python benchmarks/bench_profile.py [--model NAME] [--set KEY=VALUE]... [--out PATH]
    python benchmarks/bench_profile.py --page    # results/profile.md from the committed result

The run is the recipe `rlsf` with vLLM through the service on a Ray of its own. A second in which several actors work
counts for each in equal parts. With `--keep FOLDER` the run stays there: its `trace.json` opens in ui.perfetto.dev.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench_common import base_parser, machine_facts, parse, write_result

from rlsf_ray import service
from rlsf_ray.config_loading import load_config
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

OUT = Path(__file__).parent / "results" / "bench_profile.json"
PAGE = OUT.with_name("profile.md")
MOST = 10
WORK = {
    ("generator", "generate"): "writing traces to learn from",
    ("generator", "probe"): "writing traces to measure",
    ("generator", "swap"): "swaps: loading a version and proving it",
    ("scorer", "score"): "scores, pairs and reference log-probs",
    ("trainer", "train"): "training steps",
    ("evaluator", "judge"): "judging answers to the probe set",
    ("evaluator", "collect"): "reading the calibration prompts' traces",
}
WAITED = {
    "generate": "nobody works before traces are written",
    "probe": "nobody works before a version is measured",
    "train": "nobody works before the trainer begins",
}
AROUND = "before the first and after the last work: actors, models, vLLM; the report"
OUTSIDE = "Ray's start, everybody's end"
# What was done about each, in the words of the page
NOTES: dict[str, str] = {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write; or write the page."""
    parser = base_parser(__doc__, OUT)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the run stays")
    parser.add_argument("--page", action="store_true", help="write the page from the result that is there")
    options = parse(parser, arguments)
    if options.page:
        PAGE.write_text(as_page(json.loads(options.out.read_text())))
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        found = measure(options.model, options.set, options.keep or Path(folder))
    result = {"machine": machine_facts("vllm"), "settings": {"set": options.set}} | found
    write_result(result, options.out, None if options.json else as_text(result))


def measure(model: str, overrides: Sequence[str], folder: Path) -> Json:
    """{"total_s", "costs": {what: seconds}, "control"} of one run."""
    config = load_config("rlsf", [f"model.name={model}", "engine=vllm", "recipe=bench_profile", *overrides])
    root, began = str(folder.absolute() / "run"), time.monotonic()
    summary = service.run(config, root=root, run_name=f"bench-profile-{os.getpid()}")
    total = time.monotonic() - began
    found = costs(RunStore.open(root).read_metrics("stages"), summary["seconds"]["total"])
    found[OUTSIDE] = total - summary["seconds"]["total"]
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return {"total_s": total, "costs": dict(ordered), "control": summary["control"]}


def costs(stages: Sequence[Json], run_s: float) -> dict[str, float]:
    """Seconds of a run of `run_s` by what they went to."""
    found: dict[str, float] = {}
    for start, end in itertools.pairwise(sorted({row[edge] for row in stages for edge in ("start", "end")})):
        at_work = [row for row in stages if row["start"] <= start and row["end"] >= end]
        following = min((row for row in stages if row["start"] >= end), key=lambda row: row["start"], default=None)
        names = [WORK[row["role"], row["stage"]] for row in at_work]
        for name in names or [WAITED.get(following["stage"], "nobody works") if following else "nobody works"]:
            found[name] = found.get(name, 0.0) + (end - start) / max(1, len(names))
    return found | {AROUND: run_s - sum(found.values())}


def as_text(result: Json) -> str:
    """The costs as a table, the largest first."""
    lines = ["| | seconds | share |", "|---|---|---|"]
    for what, seconds in result["costs"].items():
        lines.append(f"| {what} | {seconds:.1f} | {seconds / result['total_s']:.1%} |")
    return "\n".join([*lines, f"| whole run | {result['total_s']:.1f} | |"])


def as_page(result: Json) -> str:
    """profile.md: the ten largest costs, and what was done about each."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    control = result["control"]
    lines = [
        "# Where a run's time goes",
        "",
        "Written by `python benchmarks/bench_profile.py --page` from what the same without `--page` has measured: one"
        f" run of the recipe `rlsf` with vLLM, {result['total_s']:.0f} s, with {machine}.",
        "",
        "| | cost | seconds | share | what was done about it |",
        "|---|---|---|---|---|",
    ]
    for number, (what, seconds) in enumerate(list(result["costs"].items())[:MOST], 1):
        share = seconds / result["total_s"]
        lines.append(f"| {number} | {what} | {seconds:.1f} | {share:.1%} | {NOTES.get(what, '-')} |")
    lines += [
        "",
        f"Control beside all this: {control['coordinator_s']:.1f} s of processor time of the coordinator and"
        f" {control['buffer_s']:.1f} s of the buffer, {control['share']:.1%} of the run.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
