"""Cells of the evidence from training to table, on the tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_common
import evidence
import pytest
from evidence_table import table_of, write_table

from rlsf_ray import loop

SUMS = "{kind: reasoning_gym, name: chain_sum, count: %d, options: {min_terms: 2, max_terms: 2, max_digits: 1}}"


@pytest.fixture
def small(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small task; two rows, one of which never finds a pair. Returns the folder of results."""
    task = [f"data.train=[{SUMS % 12}]", f"data.probe=[{SUMS % 6}]", "data.suffix=''", "data.calibration=0"]
    size = ("rounds=1", "prompts_per_round=8", "rollout.traces=4", "rollout.max_tokens=12", "eval.samples=2")
    monkeypatch.setattr(evidence, "TASKS", {"t": task})
    monkeypatch.setattr(evidence, "SHARED", (f"model.name={tiny}", "model.dtype=float32", "eval.during=0", *size))
    learns = evidence.Row("rlsf", ("pairs.min_chosen=0.0", "pairs.surest=null"))
    monkeypatch.setattr(
        evidence,
        "ROWS",
        {"base": evidence.Row(None), "rlsf": learns, "none": evidence.Row("rlsf", ("pairs.min_gap=9",))},
    )
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results" / "evidence")
    return tmp_path / "results" / "evidence"


def kept(folder: Path, name: str) -> Any:
    return json.loads((folder / f"t-{name}-0.json").read_text())


def test_a_cell_is_trained_measured_kept_and_taken_up_where_it_stopped(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_common, "commit", lambda: "abcdef012345")
    for name in ("base", "rlsf", "none"):
        evidence.run_cell(f"t/{name}/0", tmp_path / "runs", anew=True, to=small)
    base, ours, none = (kept(small, name) for name in ("base", "rlsf", "none"))
    assert (base["version"], ours["version"], none["version"]) == (0, 1, 0)
    assert ours["training"]["training"]["pairs"] > 0
    assert ours["sampled_by_version"].keys() == {"0", "1"}
    assert none["training"]["training"] == {"pairs": 0}
    assert none["metrics"] == base["metrics"], "a model that nothing was learned for is the base model"
    assert [len(question["samples"]) for question in ours["questions"]] == [2] * 6

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(loop, "train_round", never)
    evidence.run_cell("t/rlsf/0", tmp_path / "runs", anew=False, to=small / "again")
    again = json.loads((small / "again" / "t-rlsf-0.json").read_text())
    assert again["metrics"] == ours["metrics"]
    table = write_table(small)
    assert table["again"][0]["metrics"]["sampled_accuracy"][0] == table["again"][0]["metrics"]["sampled_accuracy"][3]
    assert table["again"][0]["differ"] == 0
    assert "| t/rlsf/0 | 0 of 6 | sampled_accuracy |" in (small.parent / "evidence.md").read_text()
    with pytest.raises(AssertionError, match="trained again"):
        evidence.run_cell("t/rlsf/0", tmp_path / "runs", anew=True, to=small)
    for other in ("0123456789ab", "abcdef012345+"):  # of a tree with changes nobody can say whether it is the same
        monkeypatch.setattr(bench_common, "commit", lambda source=other: source)
        with pytest.raises(AssertionError, match="trained again"):
            evidence.run_cell("t/rlsf/0", tmp_path / "runs", anew=False, to=small / "again")


def test_a_cell_that_takes_too_long_is_asked_to_end_before_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    program = f"import pathlib, signal, sys, time; signal.signal(15, lambda *_: (pathlib.Path({str(told)!r}).touch(), "
    assert evidence._failure([sys.executable, "-c", "raise SystemExit(3)"]) == "exit status 3"
    assert evidence._failure([sys.executable, "-c", ""]) is None
    monkeypatch.setattr(evidence, "CELL_S", 3.0)
    assert "timed out" in str(evidence._failure([sys.executable, "-c", program + "sys.exit(1))); time.sleep(60)"]))
    assert told.exists()


@pytest.mark.parametrize("task", evidence.TASKS)
def test_the_committed_table_is_that_of_the_committed_cells(task: str) -> None:
    results = Path(evidence.__file__).parent / "results"
    cells = [json.loads(path.read_text()) for path in sorted((results / "evidence").glob(f"{task}-*.json"))]
    rows: dict[str, list[Any]] = {}
    for cell in cells:
        rows.setdefault(cell["cell"].split("/")[1], []).append(cell)
    committed = json.loads((results / "evidence.json").read_text())["tasks"][task]
    assert json.loads(json.dumps(table_of(rows))) == committed
