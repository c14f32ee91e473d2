"""Records as rows of Parquet tables, each with its full provenance. No row has room for a gold answer.

traces   one row a trace, with its scores and why its prompt gave no pairs
pairs    one row a pair, with both traces' seeds, versions, answers and scores
groups   one row a `TrainingGroup`, exact: what the learner is fed, and fed again after a crash
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlsf_ray.records import Json, Outcome, Pair, ScoredGroup, TrainingGroup, TrainingTrace

_TOKENS, _FLOATS, _SPAN = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.int32())
_SEED = pa.uint64()

_TURN = {
    "role": pa.string(),
    "tokens": _SPAN,
    "text": pa.string(),
    "said": pa.string(),
    "answer": pa.string(),
    "passed": pa.float64(),
}
_TRACES = {
    "group_id": pa.string(),
    "prompt_id": pa.string(),
    "round": pa.int32(),
    "sequence": pa.int64(),
    "trace_id": pa.string(),
    "index": pa.int32(),
    "seed": _SEED,
    "version": pa.int32(),
    "text": pa.string(),
    "token_ids": _TOKENS,
    "logprob": _FLOATS,
    "top1": _FLOATS,
    "top2": _FLOATS,
    "finished": pa.bool_(),
    "answer": pa.string(),
    "answer_chars": _SPAN,
    "answer_tokens": _SPAN,
    "turns": pa.list_(pa.struct(list(_TURN.items()))),
    "char_ends": _TOKENS,
    "label": pa.int32(),
    "signal": pa.string(),
    "score": pa.float64(),
    "second_score": pa.float64(),
    "advantage": pa.float64(),
    "reason": pa.string(),
}

_SIDE = {
    "trace_id": pa.string(),
    "seed": _SEED,
    "version": pa.int32(),
    "answer": pa.string(),
    "score": pa.float64(),
}
_PAIRS = {
    "group_id": pa.string(),
    "prompt_id": pa.string(),
    "round": pa.int32(),
    "signal": pa.string(),
    **{f"{side}_{name}": kind for side in ("chosen", "rejected") for name, kind in _SIDE.items()},
    "weight": pa.float64(),
    "margin": pa.float64(),
}

_TRAINING_TRACE = {
    "id": pa.string(),
    "seed": _SEED,
    "version": pa.int32(),
    "score": pa.float64(),
    "answer": pa.string(),
    "token_ids": _TOKENS,
    "logprob": _FLOATS,
    "reference_logprob": _FLOATS,
    "credit": _FLOATS,
}
_PAIR = {"chosen": pa.int32(), "rejected": pa.int32(), "weight": pa.float64(), "margin": pa.float64()}
_GROUPS = {
    "id": pa.string(),
    "round": pa.int32(),
    "sequence": pa.int64(),
    "prompt_id": pa.string(),
    "signal": pa.string(),
    "sure": pa.float64(),
    "prompt_ids": _TOKENS,
    "traces": pa.list_(pa.struct(list(_TRAINING_TRACE.items()))),
    "pairs": pa.list_(pa.struct(list(_PAIR.items()))),
}

SCHEMAS = {
    "traces": pa.schema(list(_TRACES.items())),
    "pairs": pa.schema(list(_PAIRS.items())),
    "groups": pa.schema(list(_GROUPS.items())),
}


def trace_rows(scored: ScoredGroup) -> list[Json]:
    """One row for each trace of a scored group; an absent score is null."""
    group = scored.group
    shared = {
        "group_id": group.id,
        "prompt_id": group.prompt.id,
        "round": group.round,
        "sequence": group.sequence,
        "signal": scored.signal,
        "reason": scored.reason,
    }
    rows = []
    absent = (math.nan,) * len(group.traces)
    numbers = (scored.scores, scored.second_scores or absent, scored.advantages or absent)
    for trace, label, *found in zip(group.traces, scored.labels, *numbers, strict=True):
        own = {name: getattr(trace, name) for name in ("index", "seed", "version", "text", "finished")}
        arrays = {name: getattr(trace, name) for name in ("token_ids", "logprob", "top1", "top2", "char_ends")}
        answer = trace.answer
        span = {
            "answer": answer and answer.text,
            "answer_chars": answer and answer.chars,
            "answer_tokens": answer and answer.tokens,
        }
        turns = [asdict(turn) | {"passed": _or_null(turn.passed)} for turn in trace.turns]
        judged = dict(zip(("score", "second_score", "advantage"), map(_or_null, found), strict=True))
        rows.append({**shared, "trace_id": trace.id, **own, **arrays, **span, "turns": turns, "label": label, **judged})
    return rows


def rows_to_outcome(rows: Sequence[Json], num_examples: int) -> Outcome:
    """How a group ended, from its rows in the table of traces."""
    return Outcome(
        group_id=rows[0]["group_id"],
        sequence=rows[0]["sequence"],
        num_traces=len(rows),
        num_tokens=sum(len(row["token_ids"] or ()) for row in rows),
        num_cut_off=sum(not row["finished"] for row in rows),
        num_parsed=sum(row["answer"] is not None for row in rows),
        num_examples=num_examples,
        reason=rows[0]["reason"],
    )


def pair_rows(group: TrainingGroup) -> list[Json]:
    """One row for each pair of a training group."""

    def side(name: str, trace: TrainingTrace) -> Json:
        values = (trace.id, trace.seed, trace.version, trace.answer, _or_null(trace.score))
        return {f"{name}_{key}": value for key, value in zip(_SIDE, values, strict=True)}

    shared = {"group_id": group.id, "prompt_id": group.prompt_id, "round": group.round, "signal": group.signal}
    return [
        {
            **shared,
            **side("chosen", group.traces[pair.chosen]),
            **side("rejected", group.traces[pair.rejected]),
            "weight": pair.weight,
            "margin": pair.margin,
        }
        for pair in group.pairs
    ]


def group_to_row(group: TrainingGroup) -> Json:
    """A training group as one row of the `groups` table; `row_to_group` gives it back exactly."""
    row = {name: getattr(group, name) for name in _GROUPS}
    row["traces"] = [
        {name: getattr(trace, name) for name in _TRAINING_TRACE} | {"score": _or_null(trace.score)}
        for trace in group.traces
    ]
    row["pairs"] = [{name: getattr(pair, name) for name in _PAIR} for pair in group.pairs]
    return row


def row_to_group(row: Json) -> TrainingGroup:
    """The training group of one row, as `group_to_row` or `Table.to_pylist` gives it."""
    traces = tuple(
        TrainingTrace(
            **{
                **trace,
                "score": math.nan if trace["score"] is None else trace["score"],
                "token_ids": np.asarray(trace["token_ids"], np.int32),
                "logprob": np.asarray(trace["logprob"], np.float32),
                "reference_logprob": np.asarray(trace["reference_logprob"], np.float32),
                "credit": None if trace["credit"] is None else np.asarray(trace["credit"], np.float32),
            }
        )
        for trace in row["traces"]
    )
    pairs = tuple(Pair(**pair) for pair in row["pairs"])
    return TrainingGroup(
        **{**row, "prompt_ids": np.asarray(row["prompt_ids"], np.int32), "traces": traces, "pairs": pairs}
    )


def encode(kind: str, rows: Sequence[Json]) -> bytes:
    """Rows as the bytes of one Parquet file. Raises ValueError for an unknown kind or a column too many."""
    schema = _schema(kind)
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise ValueError(f"rows of {kind} have unknown columns {sorted(unknown)}; expected {schema.names}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def decode(data: bytes) -> Any:
    """The `pyarrow.Table` of one Parquet file. Raises ValueError if the bytes are not a whole file."""
    try:
        return pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a whole Parquet file: {error}") from error


def concat(kind: str, tables: Sequence[Any]) -> Any:
    """One table of many parts; no parts give an empty table of the kind's columns."""
    schema = _schema(kind)
    if not tables:
        return pa.Table.from_pylist([], schema=schema)
    return pa.concat_tables(tables, promote_options="default")


def _schema(kind: str) -> Any:
    if kind not in SCHEMAS:
        raise ValueError(f"unknown table {kind!r}; expected one of {', '.join(SCHEMAS)}")
    return SCHEMAS[kind]


def _or_null(score: float) -> float | None:
    return None if math.isnan(score) else score
