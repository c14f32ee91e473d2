"""How many generators can one coordinator, one buffer and one store steer, and where does that break?

    python benchmarks/bench_scale.py [--generators N,N,...] [--service-s S] [--sweep N] [--set KEY=VALUE]... [--json]

A run of the whole service with a simulated model (simulated.py) for each number of logical generators: at most 16
processes, each of which works on several batches at once. A batch takes as long as in bench_vllm.json, unless
`--service-s` says another time. Where the machine has few cores, what generators and scorers compute themselves is the
limit long before the control is: a longer time, such as the 10 to 60 s of a batch on a GPU, asks less of them.
Efficiency: groups/s over N times those of one generator, from the first batch of round 2 (two rounds are written while
the trainer starts) to the first of the last round. Processor time is sampled meanwhile, and each role's said apart.
`--sweep N` halves the service time until the efficiency is under a half.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_common import Ratio, machine_facts, own_ray, write_result
from bench_swap import quantiles
from scale_samples import Sample, busy, memory
from simulated import simulated

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

RESULTS = Path(__file__).parent / "results"
OUT, MEASURED = RESULTS / "bench_scale.json", RESULTS / "bench_vllm.json"
PROCESSES = 16
LEAST_S = 1.0  # a shorter service time is for the sweep only
ROUND_S = 4.0  # of work at least in a round: to end one takes a second, whatever it holds
WARM = 2  # rounds that may be written before anything is trained
HALVINGS = 8  # of the sweep at most
TARGETS = {64: 0.95, 256: 0.85}
BROKEN = 0.5
GENERATORS_A_SCORER = 128
CONTROL = ("coordinator", "pair_buffer", "weight_store")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = _options(arguments)
    service_s = options.service_s or measured_service_s(json.loads(MEASURED.read_text()))
    sizes = [1, *(size for size in options.generators if size != 1)]
    points = [measure(size, service_s, options) for size in sizes]
    result = {
        "machine": machine_facts(),
        "settings": _settings(options, service_s),
        "points": with_efficiency(points),
        "sweep": sweep(options.sweep, service_s, options) if options.sweep else [],
    }
    write_result(result, options.out, None if options.json else as_text(result))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    counts = [1, 4, 16, 64, 256]
    parser.add_argument("--generators", type=_counts, default=counts, metavar="N,...", help="[default: 1,4,16,64,256]")
    parser.add_argument("--service-s", type=_at_least_a_second, metavar="S", help="of a batch [default: as measured]")
    parser.add_argument("--rounds", type=int, default=6, choices=range(WARM + 2, 100), metavar="N", help="[default: 6]")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="of a generator in a round [default: 4]")
    parser.add_argument("--processes", type=int, default=PROCESSES, metavar="N", help="at most [default: 16]")
    parser.add_argument("--sweep", type=int, metavar="N", help="halve the service time at so many generators")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file [default: benchmarks/results]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    for size in (*options.generators, options.sweep or 1):
        try:
            layout(size, options.processes)
        except ValueError as error:
            parser.error(str(error))
    return options


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _at_least_a_second(text: str) -> float:
    if not float(text) >= LEAST_S:
        raise argparse.ArgumentTypeError(f"expected at least {LEAST_S:g} s, got {text}; --sweep goes below")
    return float(text)


def measured_service_s(vllm: Json) -> float:
    """Seconds that a batch took behind the generator pool with vLLM, by the middle one of its turns."""
    turns, settings = vllm["writers"]["pool, vllm"], vllm["settings"]
    seconds = statistics.median(t / rate for t, rate in zip(turns["tokens"], turns["tokens_per_s"], strict=True))
    return max(LEAST_S, seconds / math.ceil(settings["prompts"] / settings["prompts_per_call"]))


def layout(generators: int, most: int) -> tuple[int, int]:
    """(processes, batches at once in each) of so many generators. Raises ValueError where they do not divide."""
    processes = min(generators, most)
    if generators < 1 or generators % processes:
        raise ValueError(f"{generators} generators do not divide into {processes} processes; choose a multiple")
    return processes, generators // processes


def scale_config(generators: int, batches: int, options: argparse.Namespace, questions: Path) -> RunConfig:
    """The recipe `rlsf` over so many logical generators, without a probe set, where every prompt may give a pair."""
    processes, _ = layout(generators, options.processes)
    pool = {"cpus": 0, "gpus": 0, "threads": 1}
    own = {
        "recipe": "bench_scale",
        "rounds": options.rounds,
        "model.dtype": "float32",
        "data.train": [{"kind": "file", "path": str(questions)}],
        "data.probe": [],
        "data.calibration": 0,
        "pairs.min_chosen": 0,
        "pairs.surest": None,
        "learner.epochs": 1,
        "learner.pairs_per_step": 64,
        "cluster.max_staleness": 1,
        "cluster.generators": {**pool, "count": processes},
        "cluster.scorers": {**pool, "count": math.ceil(generators / GENERATORS_A_SCORER)},
        "cluster.trainers": {**pool, "cpus": 1},
    }
    config = load_config("rlsf", [*(f"{key}={json.dumps(value)}" for key, value in own.items()), *options.set])
    prompts = generators * config.cluster.prompts_per_call
    cluster = config.cluster.model_copy(update={"buffer_groups": max(config.cluster.buffer_groups, prompts)})
    return config.model_copy(update={"prompts_per_round": prompts * batches, "cluster": cluster})


def measure(generators: int, service_s: float, options: argparse.Namespace) -> Json:
    """One run: its figures, without the efficiency."""
    from rlsf_ray import service

    batches = max(options.batches, math.ceil(ROUND_S / service_s))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        questions, root, samples = Path(folder, "questions.jsonl"), os.path.join(folder, "run"), list[Sample]()
        config = scale_config(generators, batches, options, questions)
        rows = (json.dumps({"question": f"What is {number} times two?"}) for number in range(config.prompts_per_round))
        questions.write_text("\n".join(rows) + "\n")
        name = f"bench-scale-{os.getpid()}"
        with own_ray(), simulated(service_s, layout(generators, options.processes)[1]):
            service.run(config, root=root, run_name=name, on_status=lambda status: samples.append(Sample.now()))
        store = RunStore.open(root)
        point = figures(store.read_metrics("stages"), samples, config)
        point["staleness"] = staleness([store.read_table("traces", r) for r in range(WARM, options.rounds)])
    processes, slots = layout(generators, options.processes)
    return {"generators": generators, "processes": processes, "slots": slots, "service_s": service_s, **point}


def figures(stages: Sequence[Json], samples: Sequence[Sample], config: RunConfig) -> Json:
    """What one run's stage rows and samples say of its steady part."""
    start, end = steady(stages, config.rounds)
    groups = (config.rounds - 1 - WARM) * config.prompts_per_round
    cores = busy(samples, start, end)
    cost = {role: cores[role]["cores"] * (end - start) / groups for role in CONTROL if role in cores}
    return {
        "steady_s": end - start,
        "groups_per_s": groups / (end - start),
        "batches_per_s": groups / config.cluster.prompts_per_call / (end - start),
        "cores": cores,
        "control_cores": sum(cores[role]["cores"] for role in cost),
        "control_s_per_group": cost,
        "groups_per_control_s": {role: 1 / s if s else None for role, s in cost.items()},
        "memory_mb": memory(samples),
        "swap": swaps(stages),
    }


def steady(stages: Sequence[Json], rounds: int) -> tuple[float, float]:
    """[start, end) in which exactly the batches of the rounds from WARM to the last but one began."""
    begun = {
        round: [row["start"] for row in stages if row["stage"] == "generate" and row["round"] == round]
        for round in (WARM, rounds - 1)
    }
    return min(begun[WARM]), min(begun[rounds - 1])


def swaps(stages: Sequence[Json]) -> Json:
    """Seconds that a generator takes to fetch, load and prove a version, and from the first to the last of them."""
    rows = [row for row in stages if row["stage"] == "swap"]
    spans = [
        max(row["end"] for row in rows if row["version"] == version)
        - min(row["start"] for row in rows if row["version"] == version)
        for version in sorted({row["version"] for row in rows})
    ]
    verdicts = [row["verdict"] for row in rows]
    return {
        "one_s": quantiles([row["end"] - row["start"] for row in rows]),
        "all_s": quantiles(spans),
        "verdicts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
    }


def staleness(tables: Sequence[Any]) -> Json:
    """{age: groups}: by how many versions the trainer was ahead when it trained a group. Round r trains version r."""
    ages = list[int]()
    for table in tables:
        columns = (table.column(name).to_pylist() for name in ("group_id", "round", "version"))
        ages += {group: round - version for group, round, version in zip(*columns, strict=True)}.values()
    return {str(age): ages.count(age) for age in sorted(set(ages))}


def with_efficiency(points: Sequence[Json]) -> list[Json]:
    """Each point with its groups/s over N times those of the first, which has one generator."""
    one = points[0]["groups_per_s"]
    return [
        {
            **point,
            "efficiency": point["groups_per_s"] / (point["generators"] * one),
            "target": TARGETS.get(point["generators"]),
        }
        for point in points
    ]


def ratios(result: Json) -> list[Ratio]:
    """What speed.py shows."""
    return [
        Ratio(f"efficiency at {point['generators']} generators, simulated", *[point["efficiency"]] * 3, point["target"])
        for point in result["points"][1:]
    ]


def sweep(generators: int, service_s: float, options: argparse.Namespace) -> list[Json]:
    """Ever shorter service times until the efficiency is under BROKEN: the last says who was busiest there."""
    found = list[Json]()
    for halved in range(1, HALVINGS + 1):
        pair = [measure(size, service_s / 2**halved, options) for size in (1, generators)]
        found.append(with_efficiency(pair)[1])
        if found[-1]["efficiency"] < BROKEN:
            break
    return found


def _settings(options: argparse.Namespace, service_s: float) -> Json:
    config = scale_config(1, options.batches, options, Path("questions.jsonl"))
    return {
        "service_s": service_s,
        "service_from": "--service-s" if options.service_s else MEASURED.name,
        "prompts_per_call": config.cluster.prompts_per_call,
        "traces": config.rollout.traces,
        "rounds": config.rounds,
        "batches": options.batches,
        "set": options.set,
    }


def as_text(result: Json) -> str:
    """The result for a terminal."""
    settings = result["settings"]
    lines = [
        ", ".join(f"{name} {value}" for name, value in result["machine"].items()),
        f"a batch of {settings['prompts_per_call']} prompts takes {settings['service_s']:.2f} s"
        f" ({settings['service_from']}); the model is simulated, all else is real",
        "",
        *_table(result["points"]),
    ]
    if result["sweep"]:
        lines += ["", f"shorter service times, until the efficiency is under {BROKEN}:", *_table(result["sweep"])]
    return "\n".join(lines)


def _table(points: Sequence[Json]) -> list[str]:
    head = (
        f"{'N':>4}{'processes':>10}{'service s':>10}{'groups/s':>9}{'efficiency':>11}{'target':>7}"
        f"{'coordinator':>12}{'buffer':>8}{'busiest process':>22}{'stale':>14}{'swap s':>7}"
    )
    return [head, "-" * len(head), *(_row(point) for point in points)]


def _row(point: Json) -> str:
    cores, target = point["cores"], point["target"]
    role = max(cores, key=lambda one: cores[one]["busiest"])
    busiest = f"{role} {100 * cores[role]['busiest']:.0f} %"
    shares = [f"{100 * cores[one]['cores']:.0f} %" if one in cores else "?" for one in ("coordinator", "pair_buffer")]
    ages = " ".join(f"{age}:{count}" for age, count in point["staleness"].items())
    return (
        f"{point['generators']:>4}{point['processes']:>7} x{point['slots']:<2}{point['service_s']:>9.2f}"
        f"{point['groups_per_s']:>9.2f}{point['efficiency']:>11.3f}{target if target else '':>7}"
        f"{shares[0]:>12}{shares[1]:>8}{busiest:>22}{ages:>14}"
        f"{point['swap']['all_s']['p50']:>7.2f}"
    )


if __name__ == "__main__":
    main()
