"""Small plots for the report, each one an SVG picture as a data URI. Needs no display and no global state."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlsf_ray.records import Json

BEFORE, AFTER, THIRD, GREY = "#8a94a3", "#2f6db3", "#c07a2c", "#c9ced6"

_STYLE = {
    "font.size": 9,
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": "#444b55",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "xtick.color": "#5c6570",
    "ytick.color": "#5c6570",
    "legend.frameon": False,
    "svg.hashsalt": "rlsf-ray",
}
Bins = Sequence[Sequence[float | None]]  # (mean confidence, accuracy, count) of each bin


def reliability(before: Bins | None, after: Bins | None) -> str:
    """Accuracy against confidence, above the number of samples in each bin. The diagonal is perfect calibration."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 4.2), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        for name, bins, colour, shift in (("before", before, BEFORE, -0.5), ("after", after, AFTER, 0.5)):
            if bins is None:
                continue
            filled = [(c, a) for c, a, n in bins if n and c is not None and a is not None]
            if filled:
                top.plot(*zip(*filled, strict=True), marker="o", markersize=4, color=colour, label=name)
            width = 0.4 / len(bins)
            centres = (np.arange(len(bins)) + 0.5) / len(bins) + shift * width
            bottom.bar(centres, [n or 0 for _, _, n in bins], width, color=colour)
        if top.get_legend_handles_labels()[0]:
            top.legend(loc="upper left")
        top.set(xlim=(0, 1), ylim=(0, 1), ylabel="share right")
        bottom.set(xlabel="confidence", ylabel="samples")
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        return _svg(figure)


def by_version(evals: Sequence[Json], metrics: dict[str, str]) -> str:
    """Metrics (key -> label) over the version, with their `_low` and `_high` where they are known."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _one_panel()
        _lines(axes, [e["version"] for e in evals], [e["metrics"] for e in evals], metrics)
        axes.set(xlabel="version", ylim=(min(0, axes.get_ylim()[0]), None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return _svg(figure)


def by_alpha(points: Sequence[Json], metrics: dict[str, str]) -> str:
    """Metrics (key -> label) over the share of the adapter; the base model and the adapter are marked."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _one_panel()
        for mark in (0, 1):
            axes.axvline(mark, color=BEFORE, linestyle=":", linewidth=1.2)
        _lines(axes, [p["alpha"] for p in points], points, metrics)
        axes.set(xlabel="alpha", ylim=(0, None))
        return _svg(figure)


def by_entropy(points: Sequence[Json]) -> str:
    """What each mixture of two models gained by training, over the entropy it began with."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _one_panel()
        entropy, gains = _column(points, "entropy"), _column(points, "gain")
        axes.axhline(0, color=GREY, linewidth=1)
        axes.plot(entropy, gains, "o", color=AFTER)
        for point, x, y in zip(points, entropy, gains, strict=True):
            axes.annotate(f"{point['alpha']:g}", (x, y), textcoords="offset points", xytext=(5, 4))
        axes.margins(0.15)
        axes.set(xlabel="entropy before training, nats a token", ylabel="rise of sampled accuracy")
        return _svg(figure)


def _lines(axes: Any, at: Sequence[float], rows: Sequence[Json], metrics: dict[str, str]) -> None:
    for (key, label), colour in zip(metrics.items(), (AFTER, THIRD, BEFORE), strict=False):
        values = _column(rows, key)
        if np.isnan(values).all():
            continue
        axes.plot(at, values, marker="o", markersize=4, color=colour, label=label)
        low, high = (_column(rows, f"{key}_{end}") for end in ("low", "high"))
        if not np.isnan(low).all():
            ends = np.maximum(0.0, [values - low, high - values])  # rounding may leave -1e-17
            axes.errorbar(at, values, ends, color=colour, capsize=3, linewidth=1)
    axes.margins(x=0.08)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def curve(rows: Sequence[Json], key: str, label: str) -> str:
    """One training metric over steps: each step thin, its running mean thick, a dotted line where a round begins."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _one_panel(width=3.6)
        steps, values = _column(rows, "step"), _column(rows, key)
        rounds = _column(rows, "round")
        for step in steps[1:][np.diff(rounds) > 0]:
            axes.axvline(step - 0.5, color=BEFORE, linestyle=":", linewidth=1.2)
        window = max(1, len(rows) // 12)
        axes.plot(steps, values, color=AFTER, linewidth=1, alpha=0.35)
        axes.plot(steps, _running_mean(values, window), color=AFTER, linewidth=1.8)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure)


def _one_panel(width: float = 4.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, 2.9), layout="constrained")
    return figure, figure.subplots()


def _column(rows: Sequence[Json], key: str) -> np.ndarray:
    """Float64 values of one key; nan where there is none."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values that are there."""
    starts = np.maximum(0, np.arange(len(values)) - window + 1)
    parts = [values[start : end + 1] for end, start in enumerate(starts)]
    return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
