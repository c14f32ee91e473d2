"""The table of the evidence: committed cells -> evidence.md and evidence.json."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence_markdown import METRICS, WAYS, lines_of

from rlsf_ray.algorithms import calibration, voting
from rlsf_ray.measures import STATISTICS
from rlsf_ray.records import Json
from rlsf_ray.stream.guard import Guard, Vitals

DRAWS = 2000  # of a bootstrap
SHARES = (*WAYS, "parsed", "cut_off")
COMMAND = "python benchmarks/evidence.py --table"
CONFIDENCES = (
    "answer_prob",
    "temperature_scaled",
    "disparity",
    "calibrated",
    "agreement",
    "voted",
    "answered",
    "vote_share",
)


def write_table(folder: Path) -> Json:
    """Write evidence.md and evidence.json beside `folder` from its cells, print the table, and return its figures."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    tasks: dict[str, dict[str, list[Json]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        task, row, _ = cell["cell"].split("/")
        tasks[task][row].append(cell)
    table = {task: table_of(rows) for task, rows in tasks.items()}
    machines = _distinct(cell["machine"] for cell in cells)
    facts = {"command": COMMAND, "machines": machines, "again": _repeated(folder), "tasks": table}
    text = "\n".join(lines_of(facts))
    (folder.parent / "evidence.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    (folder.parent / "evidence.md").write_text(text + "\n")
    print(text)
    return facts


def _repeated(folder: Path) -> list[Json]:
    """Cells that were run a second time (`evidence.py --again`): in how many questions they differ, and
    {metric: [first, low, high, again]}.
    """
    found = []
    for path in sorted((folder / "again").glob("*.json")):
        second, first = json.loads(path.read_text()), json.loads((folder / path.name).read_text())
        names = [f"{way}_accuracy" for way in ("sampled", "greedy", "majority")]
        metrics = {
            name: [*(first["metrics"][name + end] for end in ("", "_low", "_high")), second["metrics"][name]]
            for name in names
        }
        differ = sum(a != b for a, b in zip(first["questions"], second["questions"], strict=True))
        found.append({"cell": second["cell"], "of": len(first["questions"]), "differ": differ, "metrics": metrics})
    return found


def table_of(rows: dict[str, list[Json]]) -> Json:
    """{row: seeds, mean and spread of each metric, paired differences from the base model and from random pairs}."""
    sweep = [cells for name, cells in rows.items() if name == "base" or name.startswith("base-t")]
    best = max(sweep, key=lambda cells: cells[0]["metrics"]["sampled_accuracy"]) if len(sweep) > 1 else None
    found: Json = {}
    for name, cells in rows.items():
        entry: Json = {"seeds": len(cells), "minutes": [cell["minutes"] for cell in cells]}
        entry["metrics"] = {metric: _figure(cells, metric) for metric in METRICS | WAYS}
        entry["pairs"] = _spread([_pairs(cell) for cell in cells])
        for against, others in (("base", rows.get("base")), ("best", best), ("random_pairs", rows.get("random_pairs"))):
            if others and others is not cells:
                kinds = ("sampled", "greedy", "majority")
                entry[f"from_{against}"] = {kind: difference(others, cells, kind) for kind in kinds}
                each = [difference(others, [cell], "sampled")[0] for cell in cells]
                entry[f"from_{against}"]["sampled_by_seed"] = each if len(each) > 1 else None
        if name == "rlsf" and {"base", "random_pairs"} <= rows.keys():
            entry |= above(rows["base"], cells, rows["random_pairs"])
        if "base" in rows and _calibrated(cells):
            entry["against_base"] = calibration_against(rows["base"], cells)
        entry["confidence"] = confidence_of(cells)
        entry["runs"] = [_run(cell) for cell in cells]
        entry["verdicts"] = [_verdicts(cell) for cell in cells]
        entry["commits"] = _distinct(cell.get("commit") for cell in cells)
        found[name] = entry
    return found


def _run(cell: Json) -> Json:
    """What a cell's run measured and what its guard did: sampled accuracy by version, verdicts, the way back."""
    guard = (cell["training"] or {}).get("guard") or {}
    seed, versions = int(cell["cell"].split("/")[2]), cell.get("sampled_by_version") or {}
    return {
        "seed": seed,
        "by_version": versions,
        "said": guard.get("verdicts"),
        "rolled_back": guard.get("rolled_back"),
    }


def _figure(cells: Sequence[Json], metric: str) -> list[float] | None:
    """[mean, smallest, largest] over the seeds; of one seed [value, low, high] over questions. None: not measured."""
    if len(cells) > 1:
        return _spread([cell["metrics"].get(metric) for cell in cells])
    value, questions = cells[0]["metrics"].get(metric), len(cells[0]["questions"])
    if metric in SHARES and value in (0.0, 1.0):  # some of the cells were run before these had an interval
        return list(calibration.share_interval([value] * questions, [1.0] * questions))
    found = [cells[0]["metrics"].get(f"{metric}{end}") for end in ("", "_low", "_high")]
    return _spread(found[:1]) if None in found else found


def _calibrated(cells: Sequence[Json]) -> bool:
    return all(
        "calibrated" in sample for cell in cells for question in cell["questions"] for sample in question["samples"]
    )


def calibration_against(base: Sequence[Json], ours: Sequence[Json]) -> Json:
    """{"ece_ratio", "skill", "skill_gain"}: [value, low, high] with questions drawn alike for both, and seeds.

    Our calibrated confidence against the base model's answer probability: the ratio of the ECEs, our Brier skill, and
    how far it lies above the base's; ECEs and skills are means over the seeds.
    """
    old = [_confidence(cell, "answer_prob") for cell in base]
    new = [_confidence(cell, "calibrated") for cell in ours]
    shared = sorted(set.intersection(*(set(found) for found in (*old, *new))))
    drawn = np.random.default_rng(0)
    rows: list[tuple[float, float, float]] = []
    for draw in [np.arange(len(shared)), *drawn.integers(len(shared), size=(500, len(shared)))]:
        names = [shared[q] for q in draw]
        sides = [[side[s] for s in drawn.integers(len(side), size=len(side))] if rows else side for side in (old, new)]
        before, after = (np.mean([_ece_and_skill(found, names) for found in side], axis=0) for side in sides)
        rows.append((after[0] / (before[0] or np.nan), after[1], after[1] - before[1]))
    low, high = np.nanquantile(rows[1:], [0.025, 0.975], axis=0)
    kinds = ("ece_ratio", "skill", "skill_gain")
    found = {kind: [float(rows[0][k]), float(low[k]), float(high[k])] for k, kind in enumerate(kinds)}
    return {name: values for name, values in found.items() if np.isfinite(values).all()}


def _ece_and_skill(found: dict[str, Any], questions: Sequence[str]) -> tuple[float, float]:
    told = np.concatenate([found[question] for question in questions])
    return calibration.ece(told[:, 0], told[:, 1]), calibration.brier_skill(told[:, 0], told[:, 1])


def _confidence(cell: Json, name: str) -> dict[str, Any]:
    """{question: its samples as rows (confidence, right)}."""
    return {
        question["id"]: np.array([(sample[name], sample["right"]) for sample in question["samples"]], dtype=float)
        for question in cell["questions"]
    }


def _pairs(cell: Json) -> float | None:
    counts = (cell["training"] or {}).get("training")
    return counts["pairs"] if counts else None


def difference(before: Sequence[Json], after: Sequence[Json], kind: str) -> list[float]:
    """[mean, low, high] of the rise, a bootstrap over the questions, the same for both, and over each side's seeds."""
    old, new = _accuracies((before, after), kind)
    return _interval(new - old)


def above(base: Sequence[Json], ours: Sequence[Json], chance: Sequence[Json]) -> Json:
    """Of sampled accuracy, [value, low, high] each, drawn alike for all three.

    {"times": ours over the base's, "chance_above_third": what chance gains beyond a third of what we gain}.
    """
    old, new, drawn = _accuracies((base, ours, chance), "sampled")
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"times": _interval(new / old), "chance_above_third": _interval(drawn - old - (new - old) / 3)}
    return {name: values for name, values in found.items() if np.isfinite(values).all()}


def _accuracies(sides: Sequence[Sequence[Json]], kind: str) -> list[Any]:
    """[1 + DRAWS] of each side: its mean, and that of questions drawn alike for all sides and of its drawn seeds."""
    found = [
        [{question["id"]: _right(question, kind) for question in cell["questions"]} for cell in cells]
        for cells in sides
    ]
    shared = sorted(set.intersection(*(set(one) for side in found for one in side)))
    drawn = np.random.default_rng(0)
    questions = drawn.multinomial(len(shared), [1 / len(shared)] * len(shared), size=DRAWS) / len(shared)
    means = []
    for side in found:
        right = np.array([[one[question] for question in shared] for one in side])  # [seeds, questions]
        seeds = drawn.multinomial(len(side), [1 / len(side)] * len(side), size=DRAWS) / len(side)
        means.append(np.append(right.mean(), np.einsum("ds,sq,dq->d", seeds, right, questions)))
    return means


def _interval(drawn: Any) -> list[float]:
    """[estimate, low, high] of an estimate and its draws."""
    return [float(drawn[0]), *np.quantile(drawn[1:], [0.025, 0.975]).tolist()]


def _right(question: Json, kind: str) -> float:
    samples = question["samples"]
    if kind == "greedy":
        return float(question["greedy"])
    if kind == "sampled":
        return float(np.mean([sample["right"] for sample in samples]))
    winner, _ = voting.majority([sample["label"] for sample in samples])
    return _is_right(samples, winner)


def _is_right(samples: Sequence[Json], label: int) -> float:
    """Of an answer that was elected; -1: none was."""
    return float(label >= 0 and next(sample["right"] for sample in samples if sample["label"] == label))


def confidence_of(cells: Sequence[Json]) -> Json:
    """Each statistic of each confidence: mean over the seeds."""
    found: Json = {}
    for name in CONFIDENCES:
        values = [_statistics(cell, name) for cell in cells]
        if all(values):
            found[name] = {kind: _mean([value.get(kind) for value in values]) for kind in STATISTICS}
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a seed has no such figure: with no right answer, say, there is no AUROC."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if len(known) == len(values) else None


def _statistics(cell: Json, name: str) -> Json:
    if name == "temperature_scaled":
        return _temperature_scaled(cell["questions"])
    if name in ("voted", "answered"):  # from the samples: an older program has told it otherwise
        return _voted(cell["questions"], one_by_one=name == "answered") if _calibrated([cell]) else {}
    return {k: cell["metrics"][f"{k}_{name}"] for k in STATISTICS if cell["metrics"].get(f"{k}_{name}") is not None}


def _temperature_scaled(questions: Sequence[Json]) -> Json:
    """The answer probability with a temperature fitted WITH labels on the other half of the questions (1706.04599)."""
    halves = [questions[0::2], questions[1::2]]
    confidence, correct = [], []
    for fitted_on, used_on in (halves, halves[::-1]):
        temperature = calibration.fit_temperature(*_samples(fitted_on))
        prob, right = _samples(used_on)
        confidence.append(calibration.scale(prob, temperature))
        correct.append(right)
    c, y = np.concatenate(confidence), np.concatenate(correct)
    return {kind: statistic(c, y) for kind, statistic in STATISTICS.items()}


def _voted(questions: Sequence[Json], *, one_by_one: bool) -> Json:
    """The confidence of the answer that all samples elect; `one_by_one`: as `rlsf answer --most` asks for them."""
    told = []
    for question in questions:
        samples, most = question["samples"], len(question["samples"])
        for upto in voting.rounds(most) if one_by_one else [most]:
            seen = samples[:upto]
            label, *vote = voting.calibrated([s["label"] for s in seen], [s["calibrated"] for s in seen])
            if voting.settled((vote[0], vote[1]), upto, sure=voting.SURE, most=most):
                break
        told.append((vote[0], _is_right(seen, label)))
    confidence, right = np.array(told).T
    return {kind: statistic(confidence, right) for kind, statistic in STATISTICS.items()}


def _samples(questions: Sequence[Json]) -> tuple[Any, Any]:
    samples = [sample for question in questions for sample in question["samples"]]
    return np.array([s["answer_prob"] for s in samples]), np.array([float(s["right"]) for s in samples])


def _verdicts(cell: Json) -> list[Json]:
    """What the guard as it is now says of the versions that the cell's run made, where it has something to say."""
    guard, found = Guard(), []
    for one in cell.get("guard_saw") or ():
        verdict = guard.observe(one["version"], Vitals.from_json(one["vitals"]), one.get("since"))
        if verdict.action != "go_on":
            found.append({"version": one["version"], "found": verdict.action, "reasons": list(verdict.reasons)})
    return found


def _spread(values: Sequence[float | None]) -> list[float] | None:
    """[mean, smallest, largest] over the seeds."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return [float(np.mean(known)), min(known), max(known)] if known else None


def _distinct(items: Any) -> list[Json]:
    found: list[Json] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found
