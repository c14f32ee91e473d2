"""The figures of the evidence as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsf_ray.measures import STATISTICS
from rlsf_ray.records import Json
from rlsf_ray.wording import way_back

METRICS = {
    "greedy_accuracy": "greedy",
    "sampled_accuracy": "sampled",
    "majority_accuracy": "majority",
    "ece_answer_prob": "ECE, answer prob.",
    "ece_calibrated": "ECE, calibrated",
    "brier_skill_answer_prob": "skill, answer prob.",
    "brier_skill_calibrated": "skill, calibrated",
    "parsed": "parsed",
    "cut_off": "cut off",
    "accuracy_given_parsed": "right if parsed",
    "mean_length": "length",
}
WAYS = {
    "greedy_accuracy": "greedy",
    "sampled_accuracy": "sampled",
    "majority_accuracy": "majority",
    "borda_accuracy": "Borda",
    "cot_max_accuracy": "CoT-decoding (10), max",
    "cot_aggregated_accuracy": "CoT-decoding (10), aggregated",
}
DIFFERENCES = (
    ("base", "sampled"),
    ("base", "greedy"),
    ("base", "majority"),
    ("best", "sampled"),
    ("random_pairs", "sampled"),
)
README = Path(__file__).parents[1] / "README.md"
MARKS = ("<!-- evidence -->", "<!-- end of the evidence -->")
ANSWERS = ("greedy", "majority", "sampled")
COMPARED = {"base": "base", "best": "base at its best temperature", "random_pairs": "random pairs"}


def lines_of(facts: Json) -> list[str]:
    lines = [
        "# Evidence",
        "",
        f"Written by `{facts['command']}` from `results/evidence/`. A figure of several seeds is",
    ]
    lines[-1] += (
        " the mean [smallest, largest], one of a single seed has its 95 % interval. Differences are paired over"
        " the questions, and their intervals draw questions and seeds. A bootstrap draws fewer different questions,"
        " which makes a calibration error look larger: its intervals lie high. Three seeds, drawn anew, spread by"
        " about a fifth too little: that part of an interval is narrow. The base model has one seed: every trace"
        " has a seed of its own, whatever the run's. `voted` is the confidence of the answer that four samples elect,"
        " `answered` that of `rlsf answer --most 4`. *Cut off*: traces that reached the limit of 80 tokens, which is"
        " the same for every row; they count as wrong, and are most of what `rlsf_paper` loses. *Guard would stop*:"
        " seeds in which the guard as it is now finds a version to stop at; a run of an earlier day may have had other"
        " limits."
    )
    lines += [
        "",
        "A cell again, beside its result: `python benchmarks/evidence.py --again TASK/ROW/SEED`; rows of one seed have"
        " seed 0. *Code*: the commits that a row's cells were run with, `+` where files had been changed since; the"
        " oldest cells did not keep it.",
    ]
    for machine in facts["machines"]:
        lines += ["", "Measured with " + ", ".join(f"{key} {value}" for key, value in machine.items()) + "."]
    lines += ["", "## Summary", "", *summary(facts), "", "## What was aimed at, and what was reached", ""]
    lines += targets(facts["tasks"])
    if facts["again"]:
        lines += ["", "## Run again by its command", "", *_again(facts["again"])]
    for task, rows in facts["tasks"].items():
        lines += [
            "",
            f"## {task}",
            "",
            *_main(rows),
            "",
            *_differences(rows),
            "",
            *_ways(rows),
            "",
            *_confidences(rows),
        ]
        if ended := _ended(rows):
            lines += ["", "### Runs driven to collapse, and those that the guard ended", "", *_versions(ended)]
    return lines


def summary(facts: Json) -> list[str]:
    """A line a task, base -> rlsf, and what training on random pairs does. The README shows it as it is."""
    head = ["task", "sampled", "greedy", "majority", "rise, sampled", "rise with random pairs"]
    head += ["ECE, answer prob.", "ECE, calibrated", "calibrated / base's answer prob.", "skill, calibrated"]
    lines = [_line(head), _line(["---"] * len(head))]
    for task, rows in facts["tasks"].items():
        if "base" in rows and "rlsf" in rows:
            old, new = (rows[name]["metrics"] for name in ("base", "rlsf"))
            kinds = ("sampled_accuracy", "greedy_accuracy", "majority_accuracy")
            changes = [_change(old, new, kind) for kind in (*kinds, "ece_answer_prob", "ece_calibrated")]
            rises = [_rise(rows.get(name, {}).get("from_base") or {}) for name in ("rlsf", "random_pairs")]
            against = rows["rlsf"].get("against_base") or {}
            ends = (_number(against.get("ece_ratio"), 2), _number(against.get("skill")))
            lines.append(_line([task, *changes[:3], *rises, *changes[3:], *ends]))
    return lines


def targets(tasks: Json) -> list[str]:
    """What `rlsf` was to reach on each task, and whether it has."""
    lines = [_line(["task", "aim", "reached", "met"]), _line(["---"] * 4)]
    for task, rows in tasks.items():
        if {"base", "rlsf", "random_pairs"} <= rows.keys():
            first = "from_best" in rows["rlsf"]  # the temperatures were swept on this task
            aims = _rises(rows) if first else _no_falls(rows)
            aims += _calibrations(rows, 0.5 if first else 1.0)
            aims += _guarded(rows["collapse_guarded"]["runs"]) if "collapse_guarded" in rows else []
            aims += _stretches(rows) if first else []
            lines += [_line([task, aim, _number(value), _met(value, bound, way)]) for aim, value, bound, way in aims]
    return lines


# (what, [value, low, high], bound, 1: above it is good, -1: below, 0: not wholly below)
Aim = tuple[str, list[float] | None, float, int]


def _rises(rows: Json) -> list[Aim]:
    ours = rows["rlsf"]
    aims: list[Aim] = [(f"{way} accuracy rises", ours["from_base"][way], 0.0, 1) for way in ANSWERS]
    aims.append(("sampled accuracy above the base model at its best", ours["from_best"]["sampled"], 0.0, 1))
    return [*aims, ("what random pairs gain, less a third of the gain, at most 0", ours["chance_above_third"], 0.0, -1)]


def _no_falls(rows: Json) -> list[Aim]:
    return [(f"{way} accuracy does not fall", rows["rlsf"]["from_base"][way], 0.0, 0) for way in ANSWERS]


def _calibrations(rows: Json, most: float) -> list[Aim]:
    found = rows["rlsf"].get("against_base") or {}
    return [
        (f"ECE, calibrated / base's answer prob., at most {most:g}", found.get("ece_ratio"), most, -1),
        ("skill, calibrated, above 0", found.get("skill"), 0.0, 1),
        ("and above that of the base's answer prob., by", found.get("skill_gain"), 0.0, 1),
    ]


def _guarded(runs: Sequence[Json]) -> list[Aim]:
    """Of runs driven to collapse with the guard on: how far each one's last version lies below its best."""
    title = "guarded, seed {seed}: last version below the best of all that were made, at most 0.03"
    return [(title.format(**run), [_lost(run["by_version"])] * 3, 0.03, -1) for run in runs]


def _lost(by_version: Json, newest: int | None = None) -> float:
    """Sampled accuracy of the last version below the best one's; `newest`: the last that may be the best."""
    known = {int(version): value for version, value in by_version.items()}
    best = max(value for version, value in known.items() if newest is None or version <= newest)
    return float(best - known[max(known)])


def _stretches(rows: Json) -> list[Aim]:
    old, new = rows["base"]["metrics"], rows["rlsf"]["metrics"]
    aims: list[Aim] = [("stretch: sampled accuracy 2.2 times the base's", rows["rlsf"].get("times"), 2.2, 1)]
    if raw := old["ece_answer_prob"]:
        title = f"stretch: ECE, answer prob., over the seeds, no higher than the base's, {raw[0]:.3f}"
        aims.append((title, new["ece_answer_prob"], raw[0], -1))
    return aims


def _met(value: list[float] | None, bound: float, way: int) -> str:
    """Does the figure, and its whole interval, lie above (`way` 1) or below (-1) the bound? 0: not wholly below it."""
    if value is None:
        return "-"
    mean, low, high = value
    if way == 0:
        return "no" if high < bound else "yes" if mean >= bound else "within its interval"
    near, far = (low, mean) if way > 0 else (high, mean)
    if (near - bound) * way >= 0:
        return "yes"
    return "not to the end of its interval" if (far - bound) * way >= 0 else "no"


def _rise(differences: Json) -> str:
    """With its interval over questions, and with each seed's own."""
    seeds = differences.get("sampled_by_seed")
    return signed(differences.get("sampled")) + (f"; {', '.join(f'{s:+.3f}' for s in seeds)}" if seeds else "")


def put_between(marks: tuple[str, str], lines: Sequence[str], page: Path = README) -> None:
    """Write lines between the two marks of a page."""
    text = page.read_text()
    start, end = (text.index(mark) for mark in marks)
    page.write_text(text[: start + len(marks[0])] + "\n\n" + "\n".join(lines) + "\n\n" + text[end:])


def _change(old: Json, new: Json, metric: str) -> str:
    values = [of[metric][0] if of.get(metric) else None for of in (old, new)]
    return " → ".join("-" if value is None else f"{value:.3f}" for value in values)


def _again(found: Sequence[Json]) -> list[str]:
    """Each cell that was run a second time: is it the same, or inside the first one's interval over questions?"""
    head = ["cell", "questions that differ", "metric", "first", "again", "inside"]
    lines = [_line(head), _line(["---"] * len(head))]
    for one in found:
        for metric, (first, low, high, again) in one["metrics"].items():
            inside = "yes" if low <= again <= high else "no"
            differ = f"{one['differ']} of {one['of']}"
            lines.append(_line([one["cell"], differ, metric, _number([first, low, high]), f"{again:.3f}", inside]))
    return lines


def _ended(rows: Json) -> list[tuple[str, Json]]:
    """(name, run) of the runs driven to collapse without the guard, and of each that the guard ended."""
    return [
        (f"{name}, seed {run['seed']}" if row["seeds"] > 1 else name, run)
        for name, row in rows.items()
        for run in row["runs"]
        if run["by_version"] and (name == "collapse" or run["rolled_back"])
    ]


def _versions(ended: Sequence[tuple[str, Json]]) -> list[str]:
    """Sampled accuracy of each version of these runs, and what the guard said in them."""
    versions = sorted({int(version) for _, run in ended for version in run["by_version"]})
    head = ["sampled accuracy", *(f"version {v}" for v in versions)]
    head += ["last below the best of all", "below the best that was trained"]
    lines = [_line(head), _line(["---"] * len(head))]
    for name, run in ended:
        known = {int(version): value for version, value in run["by_version"].items()}
        shown = [f"{known[version]:.3f}" if version in known else "-" for version in versions]
        newest = (run["rolled_back"] or {}).get("from")  # later ones the guard has made
        lost = (_lost(run["by_version"]), _lost(run["by_version"], newest))
        lines.append(_line([name, *shown, *(f"{value:.3f}" for value in lost)]))
    for name, run in ended:
        for verdict in run["said"] or ():
            reasons = "; ".join(verdict["reasons"])
            lines += ["", f"- {name}, version {verdict['version']}, {verdict['found']}: {reasons}"]
        if back := run["rolled_back"]:
            tried = "; versions after {from} are the guard's tries".format(**back) if back.get("share") else ""
            lines += ["", f"- {name}: version {back['version']} is {way_back(back)}{tried}"]
    return lines


def _stops(row: Json) -> int:
    """Seeds in which the guard would stop the run."""
    return sum(any(verdict["found"] == "stop" for verdict in verdicts) for verdicts in row["verdicts"])


def _main(rows: Json) -> list[str]:
    head = ["row", "seeds", "pairs", *METRICS.values(), "guard would stop", "code"]
    lines = [_line(head), _line(["---"] * len(head))]
    for name, row in rows.items():
        values = [_number(row["metrics"].get(metric), 1 if metric == "mean_length" else 3) for metric in METRICS]
        code = ", ".join(commit[:7] + "+" * commit.endswith("+") if commit else "-" for commit in row["commits"])
        lines.append(_line([name, row["seeds"], _number(row["pairs"], 0), *values, _stops(row), code]))
    return lines


def _differences(rows: Json) -> list[str]:
    """Rises of accuracy, and the calibrated confidence against the base model's answer probability."""
    head = [f"{kind} - {COMPARED[other]}" for other, kind in DIFFERENCES]
    lines = [_line(["row", *head, "share of the gain of rlsf", "ECE, calibrated / base's answer prob.", "skill"])]
    lines.append(_line(["---"] * (len(head) + 4)))
    whole = ((rows.get("rlsf") or {}).get("from_base") or {}).get("sampled")
    for name, row in rows.items():
        rises = [(row.get(f"from_{other}") or {}).get(kind) for other, kind in DIFFERENCES]
        share = f"{rises[0][0] / whole[0]:.2f}" if rises[0] and whole and whole[1] > 0 else "-"
        against = row.get("against_base") or {}
        ends = (_number(against.get("ece_ratio"), 2), _number(against.get("skill")))
        lines.append(_line([name, *map(signed, rises), share, *ends]))
    return lines


def _ways(rows: Json) -> list[str]:
    """Every way to answer, where the base model has them all."""
    names = [name for name in ("base", "rlsf") if name in rows]
    lines = [_line(["accuracy", *names]), _line(["---"] * (1 + len(names)))]
    for metric, title in WAYS.items():
        lines.append(_line([title, *(_number(rows[name]["metrics"].get(metric)) for name in names)]))
    return lines


def _confidences(rows: Json) -> list[str]:
    lines = [_line(["confidence", *STATISTICS]), _line(["---"] * (1 + len(STATISTICS)))]
    for name in ("base", "rlsf", "random_pairs"):
        for confidence, values in (rows[name]["confidence"] if name in rows else {}).items():
            lines.append(
                _line(
                    [
                        f"{name}: {confidence}",
                        *("-" if values[kind] is None else f"{values[kind]:.3f}" for kind in STATISTICS),
                    ]
                )
            )
    return lines


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _number(value: list[float] | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    mean, low, high = value
    return f"{mean:.{digits}f}" if low == high else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def signed(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:+.3f} [{value[1]:+.3f}, {value[2]:+.3f}]"
