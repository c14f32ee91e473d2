"""A run on the terminal: a live panel while it goes on, or plain lines where there is none; a table at its end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlsf_ray.records import Json, Reply
from rlsf_ray.stream.run_state import NEARLY_FULL
from rlsf_ray.wording import CONFIDENCES, METRICS, STATISTICS, TRIES, duration, way_back


class Progress:
    """Shows each status it is called with. A context manager, because a live panel must be taken down again."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic, every_s: float = 10.0) -> None:
        self._console = console
        self._clock = clock
        self._every_s = every_s
        self._last_line_s = float("-inf")
        self._last_state = ""
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, status: Json) -> None:
        """Redraw the panel; or print a line if the last one is `every_s` old or the state has changed."""
        if self._live is not None:
            self._live.update(panel(status))
            return
        now_s, state = self._clock(), str(status.get("state", ""))
        if state == self._last_state and now_s - self._last_line_s < self._every_s:
            return
        self._last_line_s, self._last_state = now_s, state
        self._console.print(line(status), soft_wrap=True, highlight=False, markup=False)


def line(status: Json) -> str:
    """The status in one line; what is not known yet is left out."""
    parts = [str(status.get("state", "")) or "running"]
    if status.get("rounds"):
        parts.append(_round(status))
    if status.get("prompts_total"):
        parts.append(f"prompts {status.get('prompts_done', 0)}/{status['prompts_total']}")
    parts.append(f"traces {status.get('traces', 0)} ({float(status.get('traces_per_s') or 0.0):.1f}/s)")
    parts += [*_examples(status), f"steps {status.get('steps', 0)}", f"version {status.get('version', 0)}"]
    parts += _fleet(status)
    if status.get("swaps"):
        parts.append(_swaps(status))
    if status.get("verdicts"):
        parts.append(_guard(status["verdicts"][-1]))
    parts += [*_effort(status), *_disk(status)]
    if status.get("eta_s") is not None:
        parts.append(f"ETA {duration(status['eta_s'])}")
    if status.get("message"):
        parts.append(str(status["message"]))
    return " | ".join(parts)


def _examples(status: Json) -> list[str]:
    """What the run learns from, with how many there were."""
    names = [name for name in ("pairs", "credited traces") if name in status] or ["pairs"]
    return [f"{name} {status.get(name, 0)}" for name in names]


def panel(status: Json) -> Panel:
    """The status as a compact panel that fits 80 columns."""
    done, total = int(status.get("prompts_done") or 0), int(status.get("prompts_total") or 0)
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(justify="right")
    bar.add_row(ProgressBar(total=max(total, 1), completed=done), f"{done}/{total} prompts")
    eta = "" if status.get("eta_s") is None else f"   ETA {duration(status['eta_s'])}"
    rows = [
        f"{_round(status)}   version {status.get('version', 0)}{eta}",
        f"traces {status.get('traces', 0)} ({float(status.get('traces_per_s') or 0.0):.1f}/s)   "
        f"{'   '.join(_examples(status))}   steps {status.get('steps', 0)}",
    ]
    rows += _fleet(status)
    if status.get("swaps"):
        rows.append(_swaps(status))
    if status.get("verdicts"):
        rows.append(_guard(status["verdicts"][-1]))
    if effort := _effort(status):
        rows.append(" | ".join(effort))
    rows += _disk(status)
    counts = {name: n for name, n in (status.get("accounting") or {}).items() if isinstance(n, int)}
    dim = ["   ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items()), str(status.get("message") or "")]
    texts = [Text(row) for row in rows] + [Text(row, style="dim") for row in dim if row]
    title = Text(f"{status.get('run', '')}: {status.get('state', '')}")
    return Panel(Group(bar, *texts), title=title, title_align="left", width=80)


def _fleet(status: Json) -> list[str]:
    """Generators by state, and by name those that are not healthy."""
    by_state: dict[str, list[str]] = {}
    for name, state in (status.get("fleet") or {}).items():
        by_state.setdefault(state, []).append(name)
    told = [
        f"{len(names)} {state}" + ("" if state == "healthy" else f" ({', '.join(names)})")
        for state, names in by_state.items()
    ]
    return ["generators: " + ", ".join(told)] if told else []


def _effort(status: Json) -> list[str]:
    """Who was idle for how long in this life, and what a pair costs."""
    told = ", ".join(f"{role} {share:.0%}" for role, share in (status.get("idle") or {}).items())
    parts = [f"idle: {told}"] if told else []
    if (cost := status.get("device_s_per_example")) is not None:
        parts.append(f"{cost:.1f} device-seconds a {_examples(status)[0].rpartition(' ')[0].removesuffix('s')}")
    return parts


def _swaps(status: Json) -> str:
    """What the generators' last swaps have proved, for the newest version that any of them holds."""
    newest = max(swap["version"] for swap in status["swaps"].values())
    verdicts = Counter(swap["verdict"] for swap in status["swaps"].values() if swap["version"] == newest)
    behind = f"; staleness {status['staleness']}" if status.get("staleness") else ""
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return f"version {newest} in generators: {told}{behind}"


def _disk(status: Json) -> list[str]:
    """A word on the run directory's disk where it is nearly full."""
    used = status.get("disk_used")
    return [f"DISK {used:.0%} FULL"] if used is not None and used >= NEARLY_FULL else []


def _guard(verdict: Json) -> str:
    """The guard's last word."""
    return f"guard: {verdict['action']} at version {verdict['version']}: {'; '.join(verdict['reasons'])}"


def _round(status: Json) -> str:
    """Rounds count from 0 inside; people count from 1."""
    rounds = int(status.get("rounds") or 0)
    return f"round {min(int(status.get('round') or 0) + 1, rounds)}/{rounds}"


def print_before_after(console: Console, summary: Json) -> None:
    """The table of the probe set before and after, from summary.json; says so where nothing was measured."""
    before, after = summary.get("before"), summary.get("after")
    if not before or not after:
        console.print("no before/after table: the run has not measured two versions on a probe set", highlight=False)
        return
    table = Table(title="Probe set, before and after", title_justify="left", width=80)
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, name, direction, digits in (*METRICS, *TRIES):
        if before.get(key) is None and after.get(key) is None:
            continue
        values = [_value(metrics, key, digits) for metrics in (before, after)]
        table.add_row(name, *values, _change(before, after, key, direction, digits))
    console.print(table)
    guard = summary.get("guard") or {}
    for verdict in guard.get("verdicts") or ():
        console.print(_guard(verdict), highlight=False, markup=False)
    if back := guard.get("rolled_back"):
        console.print(f"version {back['version']} is {way_back(back)}", highlight=False)
    rise = (summary.get("difference") or {}).get("sampled_accuracy")
    if rise:
        mean, low, high = rise
        text = f"sampled accuracy, same questions: {mean:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]"
        console.print(text, highlight=False, markup=False)


def print_metrics(console: Console, title: str, metrics: Json) -> None:
    """One version's metrics on the probe set; every statistic of every confidence in a table of their own."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right", no_wrap=True)
    for key, name, _, digits in (*METRICS, *TRIES):
        if metrics.get(key) is None:
            continue
        table.add_row(name, _value(metrics, key, digits))
    console.print(table)
    known = [key for key in CONFIDENCES if metrics.get(f"ece_{key}") is not None]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("Of the confidence", no_wrap=True)
    for key in known:
        table.add_column(key.replace("_", " "), justify="right", min_width=max(map(len, key.split("_"))))
    for kind, name, _ in STATISTICS:
        table.add_row(name, *(_number(metrics.get(f"{kind}_{key}")) for key in known))
    console.print(table)


MIXED = (
    ("greedy_accuracy", "greedy"),
    ("sampled_accuracy", "sampled"),
    ("majority_accuracy", "majority"),
    ("ece_answer_prob", "ECE, answer prob."),
    ("ece_calibrated", "ECE, calibrated"),
    ("mean_length", "length"),
)


def print_mix(console: Console, result: Json) -> None:
    """The points of `rlsf mix`, an alpha a line."""
    table = Table(title=f"base + alpha x version {result['version']}, {result['num_questions']} questions")
    for name in ("alpha", *(title for _, title in MIXED), "surprisal"):
        table.add_column(name, justify="right")
    for point in result["points"]:
        values = [point["metrics"].get(key) for key, _ in MIXED] + [(point["vitals"] or {}).get("surprisal")]
        table.add_row(f"{point['alpha']:g}", *("-" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    console.print("`rlsf report` draws it", highlight=False)


def print_between(console: Console, found: Json, picture: Path | None) -> None:
    """The mixtures of two models, an alpha a line."""
    table = Table(title=f"(1 - alpha) {found['a']} + alpha {found['b']}, {found['num_questions']} questions")
    for name in ("alpha", "entropy", "sampled", "after training"):
        table.add_column(name, justify="right")
    for point in found["points"]:
        values = [point["metrics"].get("surprisal"), point["metrics"]["sampled_accuracy"]]
        values.append((point["after"] or {}).get("sampled_accuracy"))
        table.add_row(f"{point['alpha']:g}", *("-" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    drawn = f"; drawn in {picture}" if picture else ""
    console.print(f"entropy: mean -log p of a written token, in nats{drawn}", highlight=False)
    for point in found["points"]:
        if point["error"]:
            console.print(f"alpha {point['alpha']:g} was not trained: {point['error']}", highlight=False)


def print_replies(console: Console, replies: Sequence[Reply]) -> None:
    """A question a line; a confidence of 0 is that of no answer at all."""
    table = Table()
    for name, side in (("question", "left"), ("answer", "right"), ("confidence", "right"), ("traces", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for reply in replies:
        answer = reply.answer or ("abstains" if reply.confidence else "no answer")
        table.add_row(Text(reply.question), Text(answer), f"{reply.confidence:.2f}", str(reply.traces))
    console.print(table)
    console.print(f"answered by version {replies[0].version}", highlight=False)


def _number(value: float | None) -> str:
    """To three digits; a dash for what there is not."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _value(metrics: Json, key: str, digits: int) -> Text:
    value = metrics.get(key)
    if value is None or math.isnan(value):
        return Text("-")
    text = f"{value:.{digits}f}"
    if f"{key}_low" in metrics:
        text += f" [{metrics[f'{key}_low']:.{digits - 1}f}, {metrics[f'{key}_high']:.{digits - 1}f}]"
    return Text(text)


def _change(before: Json, after: Json, key: str, direction: int, digits: int) -> Text:
    old, new = before.get(key), after.get(key)
    if old is None or new is None or math.isnan(new - old):
        return Text("-")
    change = new - old
    style = "green" if change * direction > 0 else "red" if change * direction < 0 else ""
    return Text(f"{change:+.{digits}f}", style=style)
