"""The benchmark of the stages, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import bench_stages
import pytest

SMALL = [
    "model.dtype=float32",
    "rollout.max_tokens=12",
    "rollout.traces=4",
    "data.suffix=''",
    "pairs.rule=random",
    "pairs.surest=null",
    "pairs.min_chosen=0.0",
    "cluster.prompts_per_call=4",
    "cluster.deadline_s=180",
    *(f"cluster.{pool}={{cpus: 0.5, threads: 1}}" for pool in ("generators", "scorers", "trainers")),
]


def row(role: str, start: float, end: float, tokens: int = 0, round: int = 1) -> dict[str, object]:
    times = {"start": start, "end": end}
    return {"role": role, "actor": f"{role}-0", "stage": "work", "round": round, "tokens": tokens, **times}


def test_the_numbers_of_a_run_come_from_its_stage_rows_after_the_warm_up() -> None:
    stages = [
        row("generator", 90.0, 95.0, 50, round=0),
        row("scorer", 95.0, 100.0, 50, round=0),
        row("generator", 100.0, 104.0, 400),
        row("trainer", 104.0, 105.0, 100, round=0),  # the overlap of a round that began before
        row("scorer", 104.0, 105.0, 400),
        row("trainer", 105.0, 107.0, 500),
        row("generator", 108.0, 110.0, 200, round=2),
    ]
    summary = {"seconds": {"total": 25.0}, "control": {"coordinator_s": 0.1, "buffer_s": 0.2, "share": 0.012}}
    found = bench_stages.from_run(stages, summary)
    assert found["counted_s"] == pytest.approx(10.0)  # 100 to 110
    generator = found["stages"]["generator"]
    assert generator["tokens_per_busy_s"] == pytest.approx(600 / 6)
    assert generator["tokens_per_counted_s"] == pytest.approx(600 / 10)
    assert [found["stages"][role]["idle"] for role in bench_stages.ROLES] == pytest.approx([0.4, 0.9, 0.7])
    assert found["control"]["share"] == 0.012


@pytest.mark.cluster
def test_the_benchmark_measures_every_stage_alone_and_together(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "bench.json"
    overrides = [part for value in SMALL for part in ("--set", value)]
    bench_stages.main(["--model", str(tiny), "--prompts", "8", "--out", str(out), *overrides])
    result = json.loads(out.read_text())
    assert result.keys() == {"machine", "settings", "alone", "together"}
    assert result["machine"].keys() == {"cores", "device", "python", "torch", "ray", "transformers"}
    assert result["together"].keys() == {"run_s", "counted_s", "stages", "control"}
    for role in ("generator", "scorer", "trainer"):
        alone, together = result["alone"][role], result["together"]["stages"][role]
        assert 0 < alone["low"] <= alone["median"] <= alone["high"]
        assert alone["turns"] == bench_stages.TURNS
        assert together["tokens"] > 0
        assert together["tokens_per_busy_s"] >= together["tokens_per_counted_s"] > 0
        assert 0.0 <= together["idle"] <= 1.0
    assert 0.0 < result["together"]["control"]["share"] <= 1.0
    printed = capsys.readouterr().out
    assert "control: coordinator" in printed
    assert "not recorded" not in printed
