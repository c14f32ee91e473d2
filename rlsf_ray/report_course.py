"""Sections of the report on the run's course: its training, its time, and what became of its prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from rlsf_ray import plots
from rlsf_ray.records import Json
from rlsf_ray.report_parts import figure, missing, table
from rlsf_ray.timeline import Timeline, make_timeline, merge
from rlsf_ray.wording import duration

MAX_LANES = 32


def training(steps: Sequence[Json], what: str) -> str:
    """Curves over the optimiser steps; `what` they learned from."""
    if not steps:
        return missing("No training step was recorded.")
    names = {
        "loss": "loss",
        "margin": "reward margin",
        "accuracy": "share of pairs ranked right",
        "reward": "reward",
        "entropy": "entropy (nats a token)",
        "kl": "KL to the base model (nats a token)",
        "clipped": "share of clipped tokens",
        "logprob_gap": "log-prob gap (nats)",
    }
    figures = (
        figure(name.capitalize(), plots.curve(steps, key, name), f"{name} over training steps")
        for key, name in names.items()
        if any(row.get(key) is not None for row in steps)
    )
    examples = sum(row.get("num_examples") or 0 for row in steps)
    note = (
        f"Steps: {len(steps)}; {what} over all passes: {examples}. Dotted lines: a new round begins. Log-prob gap:"
        " of the trainer to the generator on the tokens it wrote; with fresh weights only the engines' rounding, then"
        " it grows within a round as the trainer moves on."
    )
    return f'<div class="grid">{"".join(figures)}</div><p class="note">{note}</p>'


def time(stages: Sequence[Json]) -> str:
    """What each actor did when, and the idle share of each role."""
    line = make_timeline(stages)
    if not line.length_s:
        return missing("No stage was timed.")
    rows = [
        (escape(s.role), str(s.num_actors), duration(s.busy_s), f"{100 * s.idle:.0f} %", f"{s.tokens:,}")
        for s in line.shares()
    ]
    axis = f'<div class="axis"><span>0</span><span>{duration(line.length_s)}</span></div>'
    notes = []
    if len(line.lanes) > MAX_LANES:
        notes.append(f"The first {MAX_LANES} of {len(line.lanes)} actors are drawn.")
    if line.pause_s > 0:
        notes.append(f"{duration(line.pause_s)} in which nothing ran (the run was resumed) are left out.")
    notes.append("<code>trace.json</code> beside this page holds every piece of work: ui.perfetto.dev opens it.")
    note = f'<p class="note">{" ".join(notes)}</p>'
    head = ("role", "actors", "busy", "idle", "tokens")
    return "".join(_lanes(line)) + f'<div class="lane"><span></span>{axis}</div>' + note + table(head, rows)


def accounting(summary: Json) -> str:
    """Where every admitted prompt ended, and why."""
    counts = summary.get("accounting")
    if not counts:
        return missing("The run has not written its summary, so its prompts are not counted yet.")
    ends = {name: counts.get(name, 0) for name in ("trained", "filtered", "failed")}
    ends |= {name.replace("_", " "): counts[name] for name in ("rolled_back", "in_flight") if counts.get(name)}
    equation = " + ".join(f"<b>{count}</b> {name}" for name, count in ends.items())
    text = f'<p class="equation"><b>{counts["admitted"]}</b> admitted = {equation}</p>'
    if sum(ends.values()) != counts["admitted"]:
        open_ones = counts["admitted"] - sum(ends.values())
        text += f'<p class="worse">These do not add up: {open_ones} prompts have no end (a run that stopped early).</p>'
    training = summary.get("training") or {}
    if training.get("traces"):
        parsed, cut_off = (f"{100 * training[f'share_{name}']:.0f} %" for name in ("parsed", "cut_off"))
        text += (
            f'<p class="note">Of {training["traces"]} training traces {parsed} hold an answer, and {cut_off} were cut'
            " off at the token limit.</p>"
        )
    reasons = sorted((counts.get("reasons") or {}).items(), key=lambda item: -item[1])
    if not reasons:
        return text + '<p class="note">No prompt was filtered.</p>'
    most = max(1, reasons[0][1])
    rows = [
        (
            f"<code>{escape(name)}</code>",
            str(count),
            f'<span class="bar" style="width:{100 * count / most:.0f}%"></span>',
        )
        for name, count in reasons
    ]
    return text + table(("why filtered", "prompts", ""), rows, wide_last=True)


def _lanes(line: Timeline) -> Iterable[str]:
    scale = 100 / line.length_s
    for lane in line.lanes[:MAX_LANES]:
        # Gaps too small to be seen are closed, so that a long run stays a small page.
        spans = merge(lane.spans, gap_s=line.length_s / 1000)
        role = escape(lane.role)
        name = lane.actor if lane.role in lane.actor else f"{lane.role}: {lane.actor}"
        bars = "".join(
            f'<i class="{role}" style="left:{scale * start:.2f}%;width:{scale * (end - start):.2f}%"></i>'
            for start, end in spans
        )
        yield f'<div class="lane"><span>{escape(name)}</span><div class="track">{bars}</div></div>'
