"""Where the time went: rows of `metrics/stages.jsonl` -> busy spans of each actor, idle shares, a trace to look at.

Seconds throughout. A stage whose name begins with `wait` or `idle` is not work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rlsf_ray.records import Json

Span = tuple[float, float]
ROLES = ("generator", "scorer", "trainer", "evaluator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The work of one actor: spans [start, end) that do not touch, and the tokens it handled."""

    role: str
    actor: str
    spans: tuple[Span, ...]
    tokens: int

    @property
    def busy_s(self) -> float:
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleShare:
    """One role over the whole run. `idle` is the share of its actors' time without work."""

    role: str
    num_actors: int
    busy_s: float
    idle: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Lanes that begin at 0 and end by `length_s`; pauses in which nobody worked are cut out."""

    lanes: tuple[Lane, ...]
    length_s: float
    pause_s: float

    def shares(self) -> list[RoleShare]:
        """One entry for each role, in the order of the data flow."""
        shares = []
        for role in dict.fromkeys(lane.role for lane in self.lanes):
            lanes = [lane for lane in self.lanes if lane.role == role]
            busy = sum(lane.busy_s for lane in lanes)
            idle = 1.0 - busy / (self.length_s * len(lanes)) if self.length_s else 0.0
            tokens = sum(lane.tokens for lane in lanes)
            shares.append(RoleShare(role=role, num_actors=len(lanes), busy_s=busy, idle=idle, tokens=tokens))
        return shares


def make_timeline(stages: Sequence[Json], *, longest_pause_s: float = 300.0) -> Timeline:
    """Lanes of all actors that worked. Longer pauses than `longest_pause_s` lie between two sessions of a run."""
    rows: dict[tuple[str, str], list[Json]] = {}
    for row in stages:
        if not str(row["stage"]).startswith(("wait", "idle")):
            rows.setdefault((row["role"], str(row["actor"])), []).append(row)
    lanes = [
        Lane(
            role=role,
            actor=actor,
            spans=merge((row["start"], row["end"]) for row in own),
            tokens=sum(row.get("tokens") or 0 for row in own),
        )
        for (role, actor), own in rows.items()
    ]
    lanes.sort(key=lambda lane: (ROLES.index(lane.role) if lane.role in ROLES else len(ROLES), lane.role, lane.actor))
    # One span of these is one session: everything that lies nearer together than the longest pause.
    sessions = merge((span for lane in lanes for span in lane.spans), gap_s=longest_pause_s)
    length = sum(end - start for start, end in sessions)
    whole = sessions[-1][1] - sessions[0][0] if sessions else 0.0
    moved = (replace(lane, spans=tuple(_move(span, sessions) for span in lane.spans)) for lane in lanes)
    return Timeline(lanes=tuple(moved), length_s=length, pause_s=whole - length)


def chrome_trace(stages: Sequence[Json]) -> Json:
    """The rows in the form that ui.perfetto.dev and chrome://tracing open: a process for each role, a track for each
    actor, and more tracks for what it does at the same time. Complete events of Chrome's "Trace Event Format",
    microseconds since the first work.
    """
    began, roles = min((row["start"] for row in stages), default=0.0), list(dict.fromkeys(r["role"] for r in stages))
    free: dict[str, list[float]] = {}  # when each track of an actor is free again
    tracks: dict[tuple[str, str], int] = {}  # (role, what the track is called) -> its number
    events = list[Json]()
    for row in sorted(stages, key=lambda row: (row["start"], row["end"])):
        taken = free.setdefault(row["actor"], [])
        track = next((i for i, until in enumerate(taken) if until <= row["start"]), len(taken))
        taken[track : track + 1] = [row["end"]]
        name = f"{row['actor']} ({track + 1})" if track else row["actor"]
        place = {"pid": roles.index(row["role"]), "tid": tracks.setdefault((row["role"], name), len(tracks))}
        times = {"ts": 1e6 * (row["start"] - began), "dur": 1e6 * (row["end"] - row["start"])}
        more = {key: value for key, value in row.items() if key not in ("time", "role", "actor", "start", "end")}
        events.append({"ph": "X", "name": row["stage"], "cat": row["role"], "args": more} | place | times)
    for number, role in enumerate(roles):
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": role}})
    for (role, name), number in tracks.items():
        place = {"pid": roles.index(role), "tid": number}
        events.append({"ph": "M", "name": "thread_name", "args": {"name": name}} | place)
    return {"traceEvents": events}


def merge(spans: Iterable[Span], *, gap_s: float = 0.0) -> tuple[Span, ...]:
    """Sorted spans; those that overlap, or lie at most `gap_s` apart, become one."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + gap_s:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _move(span: Span, sessions: Sequence[Span]) -> Span:
    """The span on a clock that stands still between sessions."""
    before = 0.0
    for start, end in sessions:
        if span[0] <= end:
            return (before + span[0] - start, before + span[1] - start)
        before += end - start
    raise ValueError(f"span {span} lies in none of the sessions {sessions}")
