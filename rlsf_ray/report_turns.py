"""Section of the report on rollouts of several turns: who speaks, what passed, and what every token counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby, takewhile

import numpy as np

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import ROLLOUT_NAMES, AdvantagesConfig
from rlsf_ray.records import FloatArray, Json
from rlsf_ray.report_parts import missing, number, signed
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.ledger import FILTERED, LESS_SURE, Ledger

GROUPS, TRACES = 3, 3  # of a round, of a group
KINDS = {
    "up": "made likelier",
    "down": "made less likely",
    "held": "held at the base model",
    "idle": "counts nothing",
}
COLUMNS = ("group_id", "prompt_id", "sequence", "trace_id", "index", "turns", "score", "advantage", "reason")


def read_talks(store: RunStore) -> list[Json]:
    """Of the first and the last round that are kept: {"round", "groups", "learned", "shown"}; [] without turns.

    `shown`: the rows of a few groups, each with its "credit" [T].
    """
    rounds, config = store.rounds("traces"), store.config
    if not rounds or config.rollout.name in ROLLOUT_NAMES:
        return []
    return [_read_round(store, round, config) for round in sorted({rounds[0], rounds[-1]})]


def _read_round(store: RunStore, round: int, config: RunConfig) -> Json:
    table = store.read_table("traces", round)
    left_out = _less_sure(store, round)
    rows = [
        row | ({"reason": LESS_SURE} if row["reason"] is None and row["sequence"] in left_out else {})
        for row in table.select([*COLUMNS, "token_ids", "char_ends"]).to_pylist()
    ]
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["group_id"])]
    groups = [group for group in groups if group[0]["turns"]]
    learned = [group for group in groups if group[0]["reason"] is None]
    pairs = store.read_table("pairs", round).to_pylist() if learned else []
    shown = []
    for group in (learned or groups)[:GROUPS]:
        if config.advantages is not None:
            credit = [credit_by_advantage(row, config.advantages) for row in group]
        else:
            credit = credit_of_pairs(group, [pair for pair in pairs if pair["group_id"] == group[0]["group_id"]])
        shown.append(_telling([row | {"credit": each} for row, each in zip(group, credit, strict=True)]))
    return {"round": round, "groups": len(groups), "learned": len(learned), "shown": shown}


def _less_sure(store: RunStore, round: int) -> set[int]:
    """Sequences of the groups that have pairs, but were left out for surer ones."""
    state = store.read_json("state.json") or {}
    return set(Ledger.from_json(state.get("ledger", {})).sequences(round, FILTERED))


def credit_by_advantage(row: Json, settings: AdvantagesConfig) -> FloatArray:
    """What each token of a row of the table of traces counts [T], as the trainer sees it; nan: masked."""
    credit = np.full(len(row["token_ids"]), np.nan, dtype=np.float32)
    for turn in row["turns"] if row["advantage"] is not None else ():
        if turn["role"] in settings.held_turns:
            credit[slice(*turn["tokens"])] = 0.0
        elif not settings.turns or turn["role"] in settings.turns:
            credit[slice(*turn["tokens"])] = row["advantage"]
    return credit


def credit_of_pairs(group: Sequence[Json], pairs: Sequence[Json]) -> list[FloatArray]:
    """For each row of a group: the weight of the pairs that chose each token, less those that rejected it [T].

    nan: masked. Until its two sides part, a pair holds the same text twice, which it moves neither way: that counts 0.
    """
    place = {row["trace_id"]: k for k, row in enumerate(group)}
    credit = [np.full(len(row["token_ids"]), np.nan, dtype=np.float32) for row in group]
    for pair in pairs:
        chosen, rejected = (place[pair[f"{side}_trace_id"]] for side in ("chosen", "rejected"))
        both = zip(group[chosen]["token_ids"], group[rejected]["token_ids"], strict=False)
        parted = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], both))
        for k, weight in ((chosen, pair["weight"]), (rejected, -pair["weight"])):
            for turn in group[k]["turns"]:
                at = np.arange(*turn["tokens"])
                credit[k][at] = np.nan_to_num(credit[k][at]) + weight * (at >= parted)
    return credit


def _telling(group: Sequence[Json]) -> list[Json]:
    """The traces that count most, and the one that counts least; the first ones where nothing is learned."""
    counting = [row for row in group if not np.isnan(row["credit"]).all()]
    ordered = sorted(counting, key=lambda row: float(np.nanmean(row["credit"])), reverse=True) or list(group)
    return ordered if len(ordered) <= TRACES else [*ordered[: TRACES - 1], ordered[-1]]


def turns(talks: Sequence[Json], config: RunConfig) -> str:
    """What `read_talks` has found."""
    if not any(talk["shown"] for talk in talks):
        return missing("Traces of one turn: see the examples.")
    rounds = "".join(_round(talk, config) for talk in talks)
    return f'<p class="legend">{_legend(talks, config)}</p><p class="note">{_note(config)}</p>{rounds}'


def _note(config: RunConfig) -> str:
    counts = "What each token counts in the loss stands above the text of its turn and where the pointer rests: "
    if config.advantages is not None:
        return counts + "the advantage of its trace, in turns that are credited. What the user says is masked."
    counts += "the pairs that chose its trace less those that rejected it, by weight. Where both sides of a pair begin"
    counts += " alike, the pair moves neither way"
    if config.loss.name == "ipo":
        counts += ", if they are of one length"
    if config.loss.nll:
        counts += f"; there loss.nll={config.loss.nll:g} alone makes the chosen side likelier"
    return f"{counts}. What the user says is masked."


def _legend(talks: Sequence[Json], config: RunConfig) -> str:
    """The roles that occur, and how tokens look by what they count."""
    turns = [turn for talk in talks for group in talk["shown"] for trace in group for turn in trace["turns"]]
    roles = (escape(role) for role in dict.fromkeys(turn["role"] for turn in turns))
    kinds = {kind: name for kind, name in KINDS.items() if kind != "held" or _held(config)}
    return "".join(f'<span class="turn key {role}">{role}</span>' for role in roles) + "".join(
        f'<span><span class="{kind}">text</span> {name}</span>' for kind, name in kinds.items()
    )


def _held(config: RunConfig) -> Sequence[str]:
    return config.advantages.held_turns if config.advantages else ()


def _round(talk: Json, config: RunConfig) -> str:
    counts = f"{talk['learned']} of {talk['groups']} prompts are learned from, {len(talk['shown'])} shown"
    head = f"Round {talk['round'] + 1} of {config.rounds}: {counts}"
    return f"<h3>{head}</h3>" + "".join(_group(group, config) for group in talk["shown"])


def _group(traces: Sequence[Json], config: RunConfig) -> str:
    ended = "learned from" if traces[0]["reason"] is None else traces[0]["reason"]
    columns = "".join(_trace(trace, config) for trace in traces)
    name = f'<p class="question"><b>{escape(traces[0]["prompt_id"])}</b> <span class="note">{escape(ended)}</span></p>'
    return f'<div class="example">{name}<div class="grid">{columns}</div></div>'


def _trace(trace: Json, config: RunConfig) -> str:
    head = f"trace {trace['index']}: score {number(trace['score'], 2)}"
    if trace["advantage"] is not None:
        head += f", advantage {signed(trace['advantage'], 2)}"
    shown = "".join(_turn(turn, trace, turn["role"] in _held(config)) for turn in trace["turns"])
    return f"<div><h3>{head}</h3>{shown}</div>"


def _turn(turn: Json, trace: Json, held: bool) -> str:
    passed = {None: "", 1.0: '; <span class="better">passes</span>', 0.0: '; <span class="worse">fails</span>'}
    said = ""
    if turn.get("said"):
        said = f'<p class="note idle" title="masked: said by the user">User: {escape(turn["said"])}</p>'
    parts = list(_parts(turn, trace, held))
    counts = "; ".join(words for _, _, words in parts)
    kinds = " ".join(sorted({kind for kind, _, _ in parts if kind != "idle"}))
    text = "".join(f'<span class="{kind}" title="{words}">{escape(part)}</span>' for kind, part, words in parts if part)
    role = escape(turn["role"])
    return said + (
        f'<div class="turn {role} {kinds}"><span class="small">{role}: {counts}'
        f"{passed.get(turn['passed'], '')}</span>{text}</div>"
    )


def _parts(turn: Json, trace: Json, held: bool) -> Iterator[tuple[str, str, str]]:
    """(kind, text, in words) of each stretch of a turn's tokens that count alike."""
    (begin, end), text = turn["tokens"], turn["text"].rstrip()
    values = [None if np.isnan(value) else round(float(value), 6) for value in trace["credit"][begin:end]]
    ends, start = trace.get("char_ends"), 0
    stretches = [(value, len(list(same))) for value, same in groupby(values)]
    for n, (value, size) in enumerate(stretches, 1):
        begin += size
        stop = len(text) if n == len(stretches) else ends[begin - 1] if ends else start
        yield _kind(value, held), text[start:stop], f"{size} token{'s' * (size > 1)}, {_words(value, held)}"
        start = stop


def _kind(value: float | None, held: bool) -> str:
    if held and value is not None:
        return "held"
    return "up" if value and value > 0 else "down" if value and value < 0 else "idle"


def _words(value: float | None, held: bool) -> str:
    if value is None:
        return "masked"
    return "held: KL penalty only" if held else f"{signed(value, 2)} each" if value else "0 each"
