"""Every ratio that the benchmarks have measured on one page: its spread, its target, its command.

    python benchmarks/speed.py         # results/speed.md, from the results that are there
    python benchmarks/speed.py --run   # measure everything before (`make bench`): some hours on two cores

After measuring it fails where a ratio has fallen by more than 15 % from what the results held before.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench_common import Ratio

from rlsf_ray.records import Json

RESULTS = Path(__file__).parent / "results"
BENCHES = ("bench_learner", "bench_end_to_end", "bench_scale", "bench_plan", "bench_vllm", "bench_swap")
FALL = 0.15


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure if asked to, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run every benchmark before")
    options = parser.parse_args(arguments)
    before = read_results()
    if options.run:
        for name in BENCHES:
            subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py"))], check=True)
    found = read_results()
    page = as_page(found)
    (RESULTS / "speed.md").write_text(page)
    print(page)
    pairs = [(ratios_of(name, old), ratios_of(name, found[name])) for name, old in before.items()]
    if lines := [line for old, new in pairs for line in fallen(old, new)]:
        sys.exit("\n".join(lines))


def read_results() -> dict[str, Json]:
    """What is there of each benchmark."""
    files = {name: RESULTS / f"{name}.json" for name in BENCHES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def ratios_of(name: str, result: Json) -> list[Ratio]:
    """The ratios that a benchmark's result holds."""
    found: list[Ratio] = importlib.import_module(name).ratios(result)
    return found


def fallen(before: Sequence[Ratio], now: Sequence[Ratio]) -> list[str]:
    """A line for each ratio whose median is more than `FALL` below what it was; a new one has nothing to fall from."""
    was = {ratio.what: ratio.median for ratio in before}
    return [
        f"{ratio.what}: {ratio.median:.2f}, before {was[ratio.what]:.2f}: more than {FALL:.0%} less"
        for ratio in now
        if ratio.median < (1 - FALL) * was.get(ratio.what, 0.0)
    ]


def as_page(found: Mapping[str, Json]) -> str:
    """speed.md."""
    lines = [
        "# Speed",
        "",
        "Written by `python benchmarks/speed.py`. Ratios of two things measured in turns in one run, as seconds say"
        " nothing of another machine. Median [least, most] of the turns; one figure: one turn. *Met*: by the median; by"
        " every turn, where it says so. What was done where, case by case, stands in the JSON file of each command.",
    ]
    for name, result in found.items():
        machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
        lines += ["", f"## `python benchmarks/{name}.py`", "", f"Measured with {machine}.", ""]
        lines += ["| ratio | measured | target | met |", "|---|---|---|---|"]
        lines += [_line(ratio) for ratio in ratios_of(name, result)]
    return "\n".join(lines) + "\n"


def _line(ratio: Ratio) -> str:
    spread = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.low != ratio.high else ""
    if ratio.target is None:
        return f"| {ratio.what} | {ratio.median:.2f}{spread} | - | - |"
    met = "yes, by every turn" if ratio.low >= ratio.target else "yes" if ratio.median >= ratio.target else "no"
    return f"| {ratio.what} | {ratio.median:.2f}{spread} | at least {ratio.target:g} | {met} |"


if __name__ == "__main__":
    main()
