"""A prompt that kills its generator each time, among others in one call, and one at which a generator hangs."""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from running import alive, wait_for

from rlsf_ray.config import RunConfig
from rlsf_ray.records import Json

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]


def test_one_prompt_fails_by_name_and_a_hung_generator_comes_back(
    launch: Callable[[RunConfig, Path], "Future[Json]"],
    small: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # own_parts.py lies there
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(ours))
    questions = [f"State the final answer: {n} + 1 =" for n in range(8)]
    questions[2] += " poison"
    questions[5] += f" hang {tmp_path / 'marker'}"
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps({"question": question}) for question in questions))
    config = small(
        rounds=1,
        data={"train": [{"kind": "file", "path": str(file), "answer": None, "id": None}], "probe": []},
        rollout={"name": "own_parts:spoilt"},
        cluster={"prompts_per_call": 4, "deadline_s": 45, "attempts": 2},
    )
    life = launch(config, tmp_path / "spoilt")
    wait_for(lambda: (tmp_path / "marker").exists(), life=life)
    summary = life.result()
    counts = summary["accounting"]
    assert (counts["admitted"], counts["failed"], counts["in_flight"]) == (8, 1, 0)
    assert counts["reasons"]["GeneratorDied"] == 1
    assert counts["trained"] + counts["filtered"] == 7
    told = "".join(path.read_text() for path in (tmp_path / "spoilt" / "logs").iterdir())
    assert "generator-0 is ended and starts again: generator-0 (write) has not answered" in told
    wait_for(lambda: not alive("spoilt"))
