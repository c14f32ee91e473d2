"""Section of the report on rollouts of several turns: who speaks, what passed, and what was credited."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from rlsf_ray.config_sections import AdvantagesConfig
from rlsf_ray.records import Json
from rlsf_ray.report_parts import missing, number, signed

GROUPS, TRACES = 3, 3


def turns(rows: Sequence[Json], settings: AdvantagesConfig | None) -> str:
    """`rows` of the table of traces, of one round, with the pairs that each is `chosen` and `rejected` in.

    `settings`: None where the run learns from pairs.
    """
    talks = [list(group) for _, group in groupby(rows, key=lambda row: row["group_id"]) if rows[0].get("turns")]
    if not talks:
        return missing("Traces of one turn: see the examples.")
    talks.sort(key=lambda group: group[0]["reason"] is not None)
    learned = sum(group[0]["reason"] is None for group in talks)
    note = (
        f"The last round: {learned} of {len(talks)} prompts are learned from. A green bar: every token of the turn is"
        " made likelier; a red one: less likely; none: it is masked. What the user says is never learned from."
    )
    shown = "".join(_group(group, settings) for group in talks[:GROUPS])
    return f'<p class="note">{note}</p>{shown}'


def _group(traces: Sequence[Json], settings: AdvantagesConfig | None) -> str:
    ended = "learned from" if traces[0]["reason"] is None else traces[0]["reason"]
    columns = "".join(_trace(trace, settings) for trace in traces[:TRACES])
    name = f'<p class="question"><b>{escape(traces[0]["prompt_id"])}</b> <span class="note">{escape(ended)}</span></p>'
    return f'<div class="example">{name}<div class="grid">{columns}</div></div>'


def _trace(trace: Json, settings: AdvantagesConfig | None) -> str:
    sides = ", ".join(f"{side} in {trace[side]}" for side in ("chosen", "rejected") if trace[side])
    head = f"trace {trace['index']}: score {number(trace['score'], 2)}" + (f", {sides}" if sides else "")
    return (
        f"<div><h3>{head}</h3>{''.join(_turn(turn, *_credit(turn, trace, settings)) for turn in trace['turns'])}</div>"
    )


def _credit(turn: Json, trace: Json, settings: AdvantagesConfig | None) -> tuple[float, str]:
    """(which way its tokens are pushed, what each of them counts, in words)."""
    if settings is None:
        return float(trace["chosen"] - trace["rejected"]), "in the loss" if trace["chosen"] or trace[
            "rejected"
        ] else "masked"
    if trace["advantage"] is not None and turn["role"] in settings.held_turns:
        return 0.0, "held: KL penalty only"
    if trace["advantage"] is None or (settings.turns and turn["role"] not in settings.turns):
        return 0.0, "masked"
    return trace["advantage"], f"{signed(trace['advantage'], 2)} each"


def _turn(turn: Json, push: float, credit: str) -> str:
    passed = {None: "", 1.0: ' <span class="better">passes</span>', 0.0: ' <span class="worse">fails</span>'}
    size = turn["tokens"][1] - turn["tokens"][0]
    sign = " up" if push > 0 else " down" if push < 0 else ""
    said = f'<p class="note">User: {escape(turn["said"])}</p>' if turn.get("said") else ""
    return said + (
        f'<div class="turn {escape(turn["role"])}{sign}"><span class="small">{escape(turn["role"])}, {size} tokens,'
        f" {credit}{passed.get(turn['passed'], '')}</span>{escape(turn['text'].strip())}</div>"
    )
