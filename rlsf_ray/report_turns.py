"""Section of the report on rollouts of several turns: who speaks, what passed, and what was credited."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from rlsf_ray.records import Json
from rlsf_ray.report_parts import missing, number, signed

GROUPS, TRACES = 3, 3


def turns(rows: Sequence[Json], credited: Sequence[str]) -> str:
    """`rows` of the table of traces, of one round; `credited`: roles that learn (none: all)."""
    talks = [list(group) for _, group in groupby(rows, key=lambda row: row["group_id"]) if rows[0].get("turns")]
    if not talks:
        return missing("Traces of one turn: see the examples.")
    talks.sort(key=lambda group: group[0]["reason"] is not None)
    learned = sum(group[0]["reason"] is None for group in talks)
    note = (
        f"The last round: {learned} of {len(talks)} prompts are learned from. Where it learns from"
        " advantages, turns with a green or red bar are credited, each token with the trace's; the others are not."
    )
    return f'<p class="note">{note}</p>' + "".join(_group(group, credited) for group in talks[:GROUPS])


def _group(traces: Sequence[Json], credited: Sequence[str]) -> str:
    ended = "learned from" if traces[0]["reason"] is None else traces[0]["reason"]
    columns = "".join(_trace(trace, credited) for trace in traces[:TRACES])
    name = f'<p class="question"><b>{escape(traces[0]["prompt_id"])}</b> <span class="note">{escape(ended)}</span></p>'
    return f'<div class="example">{name}<div class="grid">{columns}</div></div>'


def _trace(trace: Json, credited: Sequence[str]) -> str:
    advantage, score = trace["advantage"], trace["score"]
    head = f"trace {trace['index']}: score {number(score, 2)}" + (
        f", advantage {signed(advantage, 2)}" if advantage is not None else ""
    )
    return f"<div><h3>{head}</h3>{''.join(_turn(turn, advantage, credited) for turn in trace['turns'])}</div>"


def _turn(turn: Json, advantage: float | None, credited: Sequence[str]) -> str:
    learns = advantage is not None and (not credited or turn["role"] in credited)
    passed = {None: "", 1.0: ' <span class="better">passes</span>', 0.0: ' <span class="worse">fails</span>'}
    size = turn["tokens"][1] - turn["tokens"][0]
    sign = " up" if learns and advantage and advantage > 0 else " down" if learns and advantage else ""
    said = f'<p class="note">User: {escape(turn["said"])}</p>' if turn.get("said") else ""
    return said + (
        f'<div class="turn {escape(turn["role"])}{sign}"><span class="small">{escape(turn["role"])}, {size} tokens'
        f"{passed.get(turn['passed'], '')}</span>{escape(turn['text'].strip())}</div>"
    )
