"""One self-contained HTML page of a run: no scripts, no links to elsewhere, and honest about what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template

from rlsf_ray import __version__, plots
from rlsf_ray.config import RunConfig
from rlsf_ray.judging import between_judges
from rlsf_ray.records import Json
from rlsf_ray.report_course import accounting, time, training
from rlsf_ray.report_parts import examples, facts, figure, missing, number, section, signed, swaps, table, verdict
from rlsf_ray.report_signs import DRAWN, beside, guard, judges, mix, thought
from rlsf_ray.report_turns import read_talks, turns
from rlsf_ray.run_store import RunStore
from rlsf_ray.timeline import chrome_trace
from rlsf_ray.wording import CONFIDENCES, METRICS, STATISTICS, TRIES, duration

NUM_EXAMPLES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What the page is made of, as read from the run directory."""

    root: str
    config: RunConfig
    summary: Json
    evals: list[Json]  # by version, of those measured on the probe set
    vitals: list[Json]  # {"version", **vitals}, of those that wrote for the calibration prompts
    mix: Json | None
    judged: Sequence[Json]  # by round: how far two judges agree
    watched: Json  # {"verdicts", "rolled_back", "training_vitals"} of the guard
    train: list[Json]  # by step
    stages: list[Json]
    talks: list[Json]  # of the first and the last round, where they have several turns

    @property
    def ends(self) -> tuple[Json | None, Json | None]:
        """The first and the last evaluation over the whole probe set: before and after (None: not measured)."""
        largest = max((e["num_questions"] for e in self.evals), default=0)
        whole = [e for e in self.evals if e["num_questions"] == largest]
        before = whole[0] if whole and whole[0]["version"] == 0 else None
        after = whole[-1] if whole and whole[-1]["version"] > 0 else None
        return before, after


def write_report(store: RunStore, others: Sequence[RunStore] = ()) -> str:
    """Write `report.html` from what the run directory holds now, compared with `others`; returns its path.

    Beside it `trace.json`, where the run has stage events. A part whose data is missing says so. Raises `StorageError`
    for files that are damaged or cannot be written.
    """
    run = read_run(store)
    if run.stages:
        store.write_json("trace.json", chrome_trace(run.stages))
    return store.write_text("report.html", render(run, [read_run(other) for other in others]))


def read_run(store: RunStore) -> RunData:
    """All that the report shows. After a resume a step can be there twice: the later one is the run's."""
    evals = [store.read_json(f"eval/{name}") for name in store.names("eval") if name.startswith("version-")]
    train = {row["step"]: row for row in store.read_metrics("train")}
    evals.sort(key=lambda e: e["version"])
    return RunData(
        root=store.root,
        config=store.config,
        summary=store.read_json("summary.json") or {},
        evals=[e for e in evals if e["num_questions"]],
        vitals=[{"version": e["version"], **e["vitals"]} for e in evals if e.get("vitals")],
        mix=store.read_json("mix.json"),
        judged=between_judges(store),
        watched=store.read_json("state.json") or {},
        train=[train[step] for step in sorted(train)],
        stages=store.read_metrics("stages"),
        talks=read_talks(store),
    )


def render(run: RunData, others: Sequence[RunData] = ()) -> str:
    """The page as text."""
    lasts = [(f"{r.config.recipe}, seed {r.config.seed}", r.ends[1]) for r in (run, *others)]
    learned = "pairs" if run.config.advantages is None else "examples (pairs of the reward model, credited traces)"
    parts = (
        section("results", "Before and after", _results(run)),
        section("reliability", "Does confidence mean what it says?", _reliability(run)),
        section("versions", "By version", _versions(run)),
        section("others", "Beside other runs", beside(lasts)),
        section(
            "guard", "Signs of collapse", guard(run.vitals, run.summary.get("guard") or run.watched, run.config.guard)
        ),
        section("thought", "How it reasons", thought(run.evals)),
        section("turns", "Turn by turn", turns(run.talks, run.config)),
        section("judges", "Live and frozen judge", judges(run.judged)),
        section("mix", "Between the base model and the adapter", mix(run.mix)),
        section("training", "Training", training(run.train, learned)),
        section("time", "Where the time went", time(run.stages)),
        section("swaps", "Did every version reach the generators?", swaps(run.stages)),
        section("accounting", "What became of each prompt", accounting(run.summary)),
        section("examples", "Examples", _examples(run)),
    )
    template = Template((resources.files("rlsf_ray") / "report_template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{run.config.recipe} on {run.config.model.name}, seed {run.config.seed}"),
        header=_header(run),
        sections="\n".join(parts),
        footer=f"rlsf-ray {escape(__version__)} &middot; run directory <code>{escape(run.root)}</code>",
    )


def _header(run: RunData) -> str:
    summary, seconds = run.summary, run.summary.get("seconds", {})
    began = min((row["start"] for row in run.stages), default=None)
    memory = summary.get("peak_memory_gb")
    rows = {
        "Model": run.config.model.name,
        "Seed": run.config.seed,
        "Date": datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M UTC") if began else "not recorded",
        "Duration": duration(seconds["total"]) if "total" in seconds else "not recorded",
        "Peak memory": f"{memory:.1f} GB" if memory is not None else "not recorded",
        "Rounds": f"{run.config.rounds} of {run.config.prompts_per_round} prompts",
    }
    status = summary.get("status", "no summary yet")
    return (
        f'<h1>{escape(run.config.recipe)} <span class="badge">{escape(str(status))}</span></h1>'
        f'<p class="headline">{_headline(run)}</p>' + facts(rows)
    )


def _headline(run: RunData) -> str:
    before, after = run.ends
    if not before or not after:
        return "This run has no measurement both before and after training."
    old, new = (e["metrics"].get("sampled_accuracy") for e in (before, after))
    interval = _interval(run, "sampled_accuracy")
    if old is None or new is None:
        return "Sampled accuracy was not measured."
    moved = "rose" if new > old else "fell"
    change = f"{moved} from <b>{number(old)}</b> to <b>{number(new)}</b>" if new != old else f"stayed {number(old)}"
    span = f", 95&nbsp;% interval of the difference {signed(interval[1])} to {signed(interval[2])}" if interval else ""
    return f"Sampled accuracy on {after['num_questions']} held-out questions {change}{span}."


def _interval(run: RunData, metric: str) -> Sequence[float] | None:
    """(mean, low, high) of the paired difference, for metrics that have one."""
    return (run.summary.get("difference") or {}).get(metric)


def _results(run: RunData) -> str:
    before, after = run.ends
    if before is None and after is None:
        return missing("Nothing was measured: the run has no probe set, or it stopped before its first evaluation.")
    old, new = (e["metrics"] if e else {} for e in (before, after))
    rows = []
    for key, name, direction, digits in (*METRICS, *TRIES):
        if old.get(key) is None and new.get(key) is None:
            continue  # not asked for
        change = verdict(old.get(key), new.get(key), direction)
        if interval := _interval(run, key):
            covers = " (includes 0)" if interval[1] <= 0 <= interval[2] else ""
            change += f'<span class="small">95 %: {signed(interval[1])} to {signed(interval[2])}{covers}</span>'
        rows.append((escape(name), _value(old, key, digits), _value(new, key, digits), change))
    measured = after or before or {}
    note = f"{measured['num_questions']} questions, {measured['num_samples']} samples each."
    if not (before and after):
        note += f" {'Version 0' if before is None else 'A version after training'} was not measured on them."
    return table(("", "before", "after", "change"), rows) + f'<p class="note">{note}</p>'


def _value(metrics: Json, key: str, digits: int) -> str:
    text = number(metrics.get(key), digits)
    if metrics.get(f"{key}_low") is None or metrics.get(f"{key}_high") is None:
        return text
    return f'{text}<span class="small">{number(metrics[f"{key}_low"])} to {number(metrics[f"{key}_high"])}</span>'


def _reliability(run: RunData) -> str:
    before, after = run.ends
    if before is None and after is None:
        return missing("No evaluation, so no confidences to compare with the truth.")
    figures = []
    for key in DRAWN:
        old, new = ((e or {}).get("reliability", {}).get(key) for e in (before, after))
        if old is None and new is None:
            continue
        alt = f"Reliability diagram of the {CONFIDENCES[key].lower()}, before and after training"
        figures.append(figure(CONFIDENCES[key], plots.reliability(old, new), alt))
    note = (
        "On the dashed line confidence equals accuracy; below it the model is over-confident. Calibrated: told from one"
        " trace by a map that was fitted on unlabelled prompts to the agreement of their traces, those of the version"
        " before included. Brier skill: above 0 the confidence says more than the accuracy alone. Risk-coverage: share"
        " of wrong answers among the surest, mean over all shares that one may keep."
    )
    old, new = (e["metrics"] if e else {} for e in (before, after))
    return f'<div class="grid">{"".join(figures)}</div>{_confidences(old, new)}<p class="note">{note}</p>'


def _confidences(old: Json, new: Json) -> str:
    """Every statistic of every confidence, before and after."""
    rows = []
    for key, name in CONFIDENCES.items():
        for when, metrics in (("before", old), ("after", new)):
            if metrics.get(f"ece_{key}") is not None:
                values = (number(metrics.get(f"{kind}_{key}")) for kind, _, _ in STATISTICS)
                rows.append((f"{escape(name)}, {when}", *values))
    return table(("", *(name for _, name, _ in STATISTICS)), rows)


def _versions(run: RunData) -> str:
    if not run.evals:
        return missing("No version was evaluated.")
    accuracy = {f"{kind}_accuracy": kind for kind in ("sampled", "greedy", "majority")}
    ece = {f"ece_{key}": CONFIDENCES[key].lower() for key in DRAWN}
    figures = (
        figure("Accuracy", plots.by_version(run.evals, accuracy), "Accuracy of each version"),
        figure("ECE (lower is better)", plots.by_version(run.evals, ece), "Calibration error of each version"),
    )
    counts = sorted({e["num_questions"] for e in run.evals})
    note = "Bars are 95 % intervals over questions."
    if len(counts) > 1:
        note += f" Versions in between were measured on {counts[0]} of the {counts[-1]} questions."
    return f'<div class="grid">{"".join(figures)}</div><p class="note">{note}</p>'


def _examples(run: RunData) -> str:
    before, after = run.ends
    if before is None and after is None:
        return missing("No evaluation, so no held-out answers to show.")
    return examples(before, after, NUM_EXAMPLES)
