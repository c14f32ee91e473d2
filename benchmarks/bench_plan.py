"""Does `rlsf plan --like` tell the truth? A short run, what it says of a longer one, and the longer one.

    python benchmarks/bench_plan.py [--model NAME] [--set KEY=VALUE]... [--out PATH]

The short run is one round of the recipe `rlsf`; the longer one has more rounds of more prompts with other passes and
more questions. Both run through the service on a Ray of their own. A ratio is measured / expected.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench_common import Ratio, base_parser, machine_facts, parse, write_result

from rlsf_ray import service
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.forecast import NAMES, Forecast, busy_seconds, forecast, rates_of
from rlsf_ray.plan import check_input, local_resources
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

OUT = Path(__file__).parent / "results" / "bench_plan.json"
NEAR = 0.8  # the smaller over the larger: within 25 %
SHORT = ("rounds=1", "prompts_per_round=16", "eval.during=0", "data.calibration=20")
LONG = ("rounds=3", "prompts_per_round=48", "eval.during=20", "data.calibration=40", "learner.epochs=2")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(base_parser(__doc__, OUT), arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        found = measure(options, Path(folder))
    result = {"machine": machine_facts(), "settings": {"short": SHORT, "long": LONG, "set": options.set}} | found
    write_result(result, options.out, None if options.json else as_text(result))


def measure(options: argparse.Namespace, folder: Path) -> Json:
    """{quantity: {"expected", "measured", "ratio"}}, the longer run's."""
    short, long = (config_of(options, own, name) for own, name in ((SHORT, "short"), (LONG, "long")))
    there = local_resources()
    stores = {}
    for name, config in (("short", short), ("long", long)):
        service.run(config, root=str(folder / name), run_name=f"bench-plan-{name}-{os.getpid()}")
        stores[name] = RunStore.open(str(folder / name))
    expected = forecast(check_input(long), rates_of(stores["short"], long, there), there)
    return {"quantities": compared(expected, stores["long"])}


def config_of(options: argparse.Namespace, own: Sequence[str], name: str) -> RunConfig:
    return load_config("rlsf", [f"model.name={options.model}", *own, f"recipe=bench_plan_{name}", *options.set])


def compared(expected: Forecast, store: RunStore) -> Json:
    """The run in `store` beside what was expected of it."""
    summary, stages = store.read_json("summary.json"), store.read_metrics("stages")
    busy = busy_seconds(stages)
    read = sum(row["tokens"] for row in stages if row["stage"] == "train")
    pairs = {
        "seconds, whole run": (expected.total_s, summary["seconds"]["total"]),
        "tokens written": (expected.tokens["generate"], summary["training"]["tokens"]),
        "tokens read in training": (expected.tokens["train"], read),
        "pairs": (expected.examples, summary["training"]["pairs"]),
        **{f"seconds of {name}": (expected.device_s[stage], busy[stage]) for stage, name in NAMES.items()},
    }
    return {
        name: {"expected": round(told, 1), "measured": round(found, 1), "ratio": round(found / max(told, 1e-9), 3)}
        for name, (told, found) in pairs.items()
    }


def ratios(result: Json) -> list[Ratio]:
    """What speed.py shows: the smaller of measured and expected over the larger."""
    found = {name: row["ratio"] for name, row in result["quantities"].items()}
    near = {name: min(ratio, 1 / ratio) if ratio else 0.0 for name, ratio in found.items()}
    return [Ratio(f"`rlsf plan --like`: {name}, expected against measured", *[x] * 3, NEAR) for name, x in near.items()]


def as_text(result: Json) -> str:
    """The table."""
    lines = ["| | expected | measured | ratio | within 25 % |", "|---|---|---|---|---|"]
    for name, row in result["quantities"].items():
        within = "yes" if NEAR <= row["ratio"] <= 1 / NEAR else "no"
        lines.append(f"| {name} | {row['expected']:,} | {row['measured']:,} | {row['ratio']:.2f} | {within} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
