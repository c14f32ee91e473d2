"""A run whose generator is vLLM, on a real Ray: versions are proved, a killed generator comes back, nothing stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
from needs import VLLM
from running import alive, our_processes, wait_for

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.errors import EngineError, InputError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    VLLM,
]
SETTINGS = (
    "engine=vllm",
    "engine_args={max_model_len: 1024}",
    "rounds=2",
    "prompts_per_round=8",
    "rollout.traces=4",
    "rollout.max_tokens=40",
    "pairs.rule=random",
    "pairs.surest=null",
    "pairs.min_chosen=0.0",
    "pairs.same_answer=true",
    "learner.epochs=2",
    "learner.learning_rate=2e-4",
    "learner.warmup_steps=0",
    "data.probe=[]",
    "data.calibration=0",
    "cluster.prompts_per_call=2",
)
Launch = Callable[[RunConfig, Path], "Future[Json]"]


def engine_processes() -> list[psutil.Process]:
    """vLLM's own processes under this one."""
    return our_processes(lambda process: process.name().startswith("VLLM") or "VLLM::" in " ".join(process.cmdline()))


def test_a_killed_vllm_generator_comes_back_proves_its_version_and_leaves_no_process(
    launch: Launch, tmp_path: Path
) -> None:
    life = launch(load_config("rlsf", SETTINGS), tmp_path / "vllm")
    wait_for((tmp_path / "vllm/versions/0001/version.json").exists, 300, life=life)
    first = wait_for(engine_processes, 30)
    killed = time.time()
    os.kill(_generator(), signal.SIGKILL)
    wait_for(lambda: not any(_lives(process) for process in first), 30)
    summary = life.result()
    assert summary["accounting"]["admitted"] == 16
    assert summary["accounting"]["in_flight"] == summary["accounting"]["failed"] == 0
    store = RunStore.open(str(tmp_path / "vllm"))
    assert store.versions() == [1, 2]
    traces = store.read_table("traces", 1).to_pylist()
    assert {row["version"] for row in traces} == {1}
    swaps = [row for row in store.read_metrics("stages") if row["stage"] == "swap"]
    assert any(row["version"] == 1 and row["start"] > killed for row in swaps), swaps
    assert {row["verdict"] for row in swaps} <= {"proved", "unproven"}
    wait_for(lambda: not alive("vllm") and not engine_processes(), 30)


def _lives(process: psutil.Process) -> bool:
    """Also as a zombie, unless that is left to the system's first process."""
    try:
        return bool(process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.ppid() != 1))
    except psutil.NoSuchProcess:
        return False


def _generator() -> int:
    (generator,) = our_processes(lambda process: " ".join(process.cmdline()).startswith("ray::Generator"))
    return int(generator.pid)


@pytest.mark.parametrize(
    ("setting", "expected", "message"),
    [
        ("engine_args={load_format: nonsense}", EngineError, r"(?s)vLLM did not start.*last errors.*nonsense"),
        # room in the KV cache for one block only
        (
            "engine_args={num_gpu_blocks_override: 1}",
            EngineError,
            r"(?s)vLLM did not start.*last errors.*No available memory",
        ),
        ("model.name=/nowhere/model", InputError, "/nowhere/model"),
    ],
)
def test_an_engine_that_cannot_start_ends_the_run_with_its_last_errors(
    launch: Launch, tmp_path: Path, setting: str, expected: type[Exception], message: str
) -> None:
    config = load_config("rlsf", [*SETTINGS, setting])
    with pytest.raises(expected, match=message):
        launch(config, tmp_path / "broken").result()
    wait_for(lambda: not alive("broken") and not engine_processes(), 30)
