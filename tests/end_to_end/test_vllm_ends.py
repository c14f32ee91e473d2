"""However a run with vLLM ends, its engines' processes end too: listed in a process namespace of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import VLLM
from private_cluster import Sandbox, free_ports, unavailable

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(700),
    VLLM,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]
UP_S, GONE_S = 240.0, 45.0
SETTINGS = ("engine=vllm", "engine_args={max_model_len: 1024}", "rollout.traces=2")
SETTINGS += ("data.probe=[]", "data.calibration=0")
SETTINGS += ("prompts_per_round=64", "cluster.prompts_per_call=4")  # traces lie there soon, and many are still to come


@pytest.fixture
def box(tmp_path: Path) -> Iterator[tuple[Sandbox, str, str]]:
    """(sandbox, address, dashboard) of a Ray that stands by itself."""
    port, dashboard, agent = free_ports(3)
    with Sandbox(tmp_path / "box") as sandbox:
        ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        code, output = sandbox.run("ray", "start", "--head", "--num-cpus=4", *ports, seconds=120)
        assert code == 0, output
        yield sandbox, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"


def _until(ready: Callable[[], Any], seconds: float, what: Callable[[], Any]) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"nothing within {seconds:g} s: {what()}"
        time.sleep(0.2)


def test_no_process_of_an_engine_outlives_a_stop_from_the_shell_or_of_the_job(
    box: tuple[Sandbox, str, str], tmp_path: Path
) -> None:
    """`rlsf stop` while it writes; the same job again, ended by `ray job stop`."""
    sandbox, address, dashboard = box
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    entry = ["python", "-m", "rlsf_ray", "run", "rlsf", "--run", "ends", "--root", str(tmp_path), *settings]

    def engines() -> list[str]:
        return [line for line in sandbox.processes() if "VLLM" in line or "ray::Generator" in line]

    def works() -> bool:
        return any("VLLM" in line for line in engines()) and (tmp_path / "ends/traces").exists()

    ways = (
        ("first", ("rlsf", "stop", "ends", "--address", address)),
        ("second", ("ray", "job", "stop", "--address", dashboard, "second")),
    )
    for name, end in ways:
        submit = ["ray", "job", "submit", "--address", dashboard, f"--submission-id={name}", "--no-wait"]
        code, output = sandbox.run(*submit, "--", *entry)
        assert code == 0, output
        _until(works, UP_S, sandbox.processes)
        code, output = sandbox.run(*end)
        assert code == 0, output
        _until(lambda: not engines(), GONE_S, engines)


def test_sigterm_ends_the_engine_that_a_command_has_started(tmp_path: Path) -> None:
    with Sandbox(tmp_path / "box") as sandbox:
        settings = [part for setting in (*SETTINGS[:2], "data.calibration=0") for part in ("--set", setting)]
        command = sandbox.start("rlsf", "eval", "smollm2", *settings)
        command.until(lambda: any("VLLM::Worker" in line for line in sandbox.processes()), UP_S)
        command.terminate()
        command.wait(GONE_S)
        _until(lambda: not any("VLLM" in line for line in sandbox.processes()), GONE_S, sandbox.processes)
