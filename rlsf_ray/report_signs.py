"""Sections of the report that compare: with other runs, versions by signs of collapse, the base with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rlsf_ray import plots
from rlsf_ray.measures import difference
from rlsf_ray.records import Json
from rlsf_ray.report_parts import figure, missing, number, signed, table
from rlsf_ray.wording import CONFIDENCES, way_back

DRAWN = ("answer_prob", "calibrated", "agreement")
COMPARED = {
    "greedy_accuracy": "greedy",
    "sampled_accuracy": "sampled",
    "majority_accuracy": "majority",
    "ece_answer_prob": "ECE, answer prob.",
    "ece_calibrated": "ECE, calibrated",
}


RISES = {f"{kind}_accuracy": f"difference, {kind}" for kind in ("sampled", "greedy", "majority")}


def beside(lasts: Sequence[tuple[str, Json | None]]) -> str:
    """This run's last version (the first of the names and evaluations) and those of others, such as controls."""
    (_, ours), *others = lasts
    if not others:
        return missing("Not compared; `rlsf report RUN --beside OTHER` sets it beside other runs, such as controls.")
    rows = []
    for name, last in lasts:
        values = [number(last["metrics"].get(key)) if last else "n/a" for key in COMPARED]
        rises = [""] * len(RISES)
        if last and ours and last is not ours:
            found = difference(last, ours)
            rises = [_rise(found.get(key)) for key in RISES]
        rows.append((escape(name), *values, *rises))
    head = ("run", *COMPARED.values(), *RISES.values())
    note = (
        "Differences are this run's figure less the other's, paired over the questions that both were measured on, with"
        " 95 % intervals."
    )
    return table(head, rows) + f'<p class="note">{note}</p>'


def _rise(found: Sequence[float] | None) -> str:
    return f"{signed(found[0])} ({signed(found[1])} to {signed(found[2])})" if found else "no shared questions"


def guard(vitals: Sequence[Json], watched: Json, mode: str) -> str:
    """What the guard (`mode`: the config's) saw, and the signs by version. `vitals`: {"version", ...} each."""
    if not vitals:
        return missing("Nothing was watched: the recipe sets no calibration prompts aside (data.calibration).")
    rows = [
        (str(one["version"]), escape(one["action"]), "<br>".join(map(escape, one["reasons"])))
        for one in watched.get("verdicts") or ()
    ]
    none = "The guard was off." if mode == "off" else "The guard saw no such sign."
    text = table(("version", "verdict", "why"), rows) if rows else f'<p class="note">{none}</p>'
    if back := watched.get("rolled_back"):
        text += f'<p class="worse">The run went back: version {back["version"]} is {way_back(back)}.</p>'
    trained = watched.get("training_vitals") or {}
    points = [{"version": v["version"], "metrics": v | trained.get(str(v["version"]), {})} for v in vitals]
    curves = {
        "Agreement and confidence": {"agreement": "agreement", "answer_prob": "answer probability", "parsed": "parsed"},
        "Sameness": {"commonest": "commonest answer of all prompts", "repetition": "repeated 4-grams"},
        "Entropy (nats a token)": {"surprisal": "mean -log p of written tokens"},
        "Length (tokens)": {"length": "tokens of a trace"},
    }
    if trained:
        curves["Distances (nats a token)"] = {"kl": "KL to the base model", "logprob_gap": "trainer to generators"}
    figures = (figure(n, plots.by_version(points, keys), f"{n} of each version") for n, keys in curves.items())
    note = (
        "Told without labels, from what each version writes for the same calibration prompts; the distances are of the"
        " traces that it was trained on."
    )
    return text + f'<div class="grid">{"".join(figures)}</div><p class="note">{note}</p>'


def mix(found: Json | None) -> str:
    """Curves along base + alpha x adapter, from mix.json."""
    if found is None:
        return missing("Not measured; `rlsf mix RUN` measures models along base + alpha x adapter.")
    points = [
        {"alpha": p["alpha"], **p["metrics"], **{f"vital_{k}": v for k, v in (p["vitals"] or {}).items()}}
        for p in found["points"]
    ]
    accuracy = {f"{kind}_accuracy": kind for kind in ("sampled", "greedy", "majority")}
    ece = {f"ece_{key}": CONFIDENCES[key].lower() for key in DRAWN}
    curves = {
        "Accuracy": accuracy,
        "ECE (lower is better)": ece,
        "Entropy (nats a token)": {"vital_surprisal": "mean -log p of written tokens"},
        "Length (tokens)": {"mean_length": "tokens of a trace"},
    }
    figures = (figure(n, plots.by_alpha(points, keys), f"{n} along alpha") for n, keys in curves.items())
    note = f"Version {found['version']} on {found['num_questions']} questions; alpha 0 is the base model."
    return f'<div class="grid">{"".join(figures)}</div><p class="note">{note}</p>'


def thought(evals: Sequence[Json]) -> str:
    """RLIF's diagnosis (2506.17219): is a rise format or reasoning, and does the model think less as it grows surer?"""
    if not any("anyhow_accuracy" in one["metrics"] for one in evals):
        return missing("Not measured.")
    curves = {
        "Right": {"anyhow_accuracy": "the right answer stands in the text", "sampled_accuracy": "and is the answer"},
        "Entropy (nats a token)": {"surprisal": "mean -log p of written tokens"},
        "Turns of thought": {"transitions": '"but", "wait", ... for each word'},
        "Length (tokens)": {"mean_length": "tokens of a trace"},
    }
    figures = (figure(name, plots.by_version(evals, keys), f"{name} of each version") for name, keys in curves.items())
    note = (
        "On the probe set. Where the lower line of the first picture nears the upper one, a model has learned to state"
        " answers rather than to find them. Where rollout.temperature is 1, the mean -log p estimates the entropy."
    )
    return f'<div class="grid">{"".join(figures)}</div><p class="note">{note}</p>'


def judges(rows: Sequence[Json]) -> str:
    """How far the second judge's scores agree with the first's, by round."""
    if not rows:
        return missing("One judge; `judges: [live, frozen]` sets the base model's scores beside the version's own.")
    lines = [(str(r["round"]), str(r["groups"]), number(r["rank_correlation"]), signed(r["gap"])) for r in rows]
    note = (
        "Rank correlation (Spearman) of the two scores among the traces of a prompt, mean over prompts; the gap is the"
        " first judge's score less the second's, mean over traces."
    )
    return table(("round", "prompts", "rank correlation", "gap"), lines) + f'<p class="note">{note}</p>'
