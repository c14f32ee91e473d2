"""benchmarks/rlif.py without its runs: the committed page is that of the committed rows, and says no more."""

from __future__ import annotations

import pytest
import rlif
from evidence_markdown import README

from rlsf_ray.records import Json


def row(*sampled: float, since: tuple[float, float, float], failed: str | None = None) -> Json:
    """A row of three versions with these accuracies, and what became of them since the best."""
    points = [{"version": 3 * k, "sampled_accuracy": value} for k, value in enumerate(sampled)]
    best = max(points, key=lambda point: point["sampled_accuracy"])["version"]
    steps = [{"num_examples": 100, "reward": 0.5}, {"num_examples": 30, "reward": None}]
    return {
        "points": points,
        "best": best,
        "since_best": dict.fromkeys(rlif.WAYS, since),
        "steps": steps,
        "traces": 512,
        "temperature": 0.6,
        "failed": failed,
    }


@pytest.mark.parametrize(
    ("found", "says", "not_said"),
    [
        (row(0.1, 0.3, 0.1, since=(-0.2, -0.3, -0.1)), "sampled -0.200 [-0.300, -0.100]: it has fallen", "no fall"),
        (row(0.1, 0.3, 0.2, since=(-0.1, -0.3, 0.1)), "no fall is shown", "it has fallen"),
        (row(0.1, 0.2, 0.3, since=(0.0, 0.0, 0.0)), "No fall: of the versions measured the last", "it has fallen"),
        (row(0.1, 0.2, since=(0.0, 0.0, 0.0), failed="NoPairsError: none"), "It ended early: NoPairsError", "fallen"),
    ],
)
def test_a_fall_is_said_where_it_is_beyond_chance(found: Json, says: str, not_said: str) -> None:
    told = " ".join(rlif.verdict(found))
    assert says in told
    assert not_said not in told
    assert "2 steps, 100 of 512 traces with an advantage. Drawn at temperature 0.6." in told


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    found = rlif.committed()
    assert rlif.PAGE.read_text() == rlif.page(found)
    readme = README.read_text()
    shown = readme[readme.index(rlif.MARKS[0]) + len(rlif.MARKS[0]) : readme.index(rlif.MARKS[1])]
    assert shown.strip().splitlines() == rlif.summary(found)
