"""benchmarks/reflect.py without its runs: settings that load, and a page that claims no more than was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reflect

from rlsf_ray.config_loading import load_config
from rlsf_ray.records import Json

QUESTIONS = 30


def kept(trained: int = 9, **more: Json) -> Json:
    """A result: no first try is right, and after training a third of the questions are mended."""
    (old,) = reflect.RESULTS.glob("sums-0.json")
    none, mended, whole = [0.0] * QUESTIONS, [4.0, 0.0, 0.0] * (QUESTIONS // 3), [4.0] * QUESTIONS
    before, after = (
        {"first_try": [none, whole], "last_try": [last, whole], "wrong_to_right": [last, whole]}
        | {"right_to_wrong": [none, none]}
        for last in (none, mended)
    )
    found = {"accounting": {"admitted": 60, "trained": trained}, "by_question": {"before": before, "after": after}}
    result: Json = json.loads(old.read_text()) | found | more
    return result


def row(lines: list[str], name: str) -> str:
    (found,) = (line for line in lines if line.startswith(f"| {name} "))
    return found.strip("|").split("|")[-1].strip()


@pytest.mark.parametrize("task", reflect.TASKS)
def test_the_settings_of_every_task_load(task: str, tmp_path: Path) -> None:
    config = load_config("reflect_retry_reward", reflect.settings_of(task, tmp_path))
    assert config.data.train[0].count != 600, "the recipe's own"
    assert config.rounds == {"countdown": 3, "bfcl": 5}.get(task, 10)


def test_a_rise_has_its_paired_interval() -> None:
    lines = reflect.lines_of(kept())
    rise, low, high = map(float, row(lines, "Last try").replace("[", "").replace("]", "").replace(",", "").split())
    assert rise == pytest.approx(1 / 3, abs=1e-3)
    assert 0.0 < low < 0.2 < 0.4 < high < 0.6
    assert row(lines, "First try") == "+0.000 [-0.114, +0.114]"  # none of 30: z^2 / (30 + z^2) either way
    assert row(lines, "Right to wrong") == "-"


def test_a_run_that_learned_nothing_and_one_that_was_resumed_say_so() -> None:
    lines = reflect.lines_of(kept(trained=0, resumed=True))
    assert row(lines, "Last try") == "-"
    assert "after is before" in lines[-1]
    assert "its last call 56.5 min" in lines[3]


def test_the_page_is_that_of_the_committed_results_and_names_what_is_missing() -> None:
    page = reflect.page()
    assert reflect.PAGE.read_text() == page
    done = {json.loads(path.read_text())["task"] for path in reflect.RESULTS.glob("*.json")}
    missing = [task for task in reflect.TASKS if task not in done]
    assert not missing or f"no run of theirs has ended: {', '.join(missing)}." in page
