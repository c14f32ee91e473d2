"""The three ways to run, for real: a Ray of its own, a Ray that is there, and jobs on a cluster with the wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import private_cluster
import pytest
from private_cluster import Sandbox, free_ports
from tiny import tiny_config

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import dump_config
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets, prompts_of_round

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
END_S = 240.0  # the longest a tiny run may take on a busy machine
DRAINED_S = 30.0  # promised: 20 s
SUMS = {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


@pytest.fixture(scope="module", autouse=True)
def _private() -> None:
    if reason := private_cluster.unavailable():
        pytest.skip(reason)


def write_config(folder: Path, config: RunConfig) -> str:
    path = folder / f"seed{config.seed}.yaml"
    path.write_text(dump_config(config))
    return str(path)


def test_embedded_from_the_shell(config: RunConfig, tiny: Path, tmp_path: Path) -> None:
    """`rlsf run` with a Ray of its own; again: done at once; with another seed: refused, naming the key."""
    file, run = write_config(tmp_path, config), tmp_path / "runs" / "a"
    with Sandbox(tmp_path / "box") as sandbox:
        command = ["rlsf", "run", file, "--root", str(tmp_path / "runs"), "--run", "a"]
        code, output = sandbox.run(*command, seconds=END_S)
        assert code == 0, output
        assert "Probe set, before and after" in output
        assert str(run / "report.html") in output
        assert json.loads((run / "summary.json").read_text())["status"] == "done"
        assert (run / "report.html").stat().st_size > 10_000
        assert sandbox.processes() == []
        _adapter_loads(tiny, run)

        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
        code, again = sandbox.run(*command, seconds=30)
        assert code == 0, again
        assert again.partition("run directory")[2] == output.partition("run directory")[2]
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before

        code, output = sandbox.run(*command, "--seed", "1", seconds=30)
        assert code == 2, output
        assert "seed: got 1, expected 0" in output


def _adapter_loads(tiny: Path, run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), run / "versions" / "0002")
    trained = {name: value for name, value in model.named_parameters() if "lora_B" in name}
    assert trained
    assert all(value.abs().max() > 0 for value in trained.values())  # lora_B begins at zero


def test_an_address_where_no_ray_answers_is_refused(config: RunConfig, tmp_path: Path) -> None:
    file = write_config(tmp_path, config)
    with Sandbox(tmp_path / "box") as sandbox:
        code, output = sandbox.run("rlsf", "run", file, "--address", f"127.0.0.1:{free_ports(1)[0]}", seconds=60)
        assert code == 2, output
        assert "no Ray answers at 127.0.0.1:" in output
        assert sandbox.processes() == []


def test_a_folder_that_a_node_does_not_see_is_refused(config: RunConfig, tmp_path: Path) -> None:
    """The second node has an empty file system of its own where the run root lies."""
    file, root, port = write_config(tmp_path, config), tmp_path / "runs", free_ports(1)[0]
    root.mkdir()
    head = f"ray start --head --num-cpus=8 --include-dashboard=false --node-ip-address=127.0.0.1 --port={port}"
    node = f"mount -t tmpfs none {root} && ray start --address=127.0.0.1:{port} --node-ip-address=127.0.0.1"
    with Sandbox(tmp_path / "box") as sandbox:
        for command in (["sh", "-c", head], ["unshare", "-m", "sh", "-c", node]):
            code, output = sandbox.run(*command)
            assert code == 0, output
        code, output = sandbox.run("rlsf", "run", file, "--root", str(root), "--address", f"127.0.0.1:{port}")
        assert code == 2, output
        assert re.search(r"is not on shared storage: \S+ cannot see it;", " ".join(output.split()))


# --- a cluster with the wheel installed ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """`ray start --head` in a sandbox, whose Python has the wheel; the repository's own source is not on its path."""

    sandbox: Sandbox
    address: str
    dashboard: str

    def api(self, path: str) -> Any:
        request = urllib.request.Request(f"{self.dashboard}{path}", headers=self.sandbox.bearer)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def living(self, run: str) -> list[str]:
        """Actors of a run, and all placement groups, that are not gone."""
        actors = self.api("/api/v0/actors?limit=10000")["data"]["result"]["result"]
        groups = self.api("/api/v0/placement_groups?limit=10000")["data"]["result"]["result"]
        names = [a["name"] for a in actors if a["state"] != "DEAD" and (a["name"] or "").startswith(f"{run}/")]
        return names + [g["placement_group_id"] for g in groups if g["state"] != "REMOVED"]

    def submit(self, *command: str) -> tuple[str, ...]:
        return ("ray", "job", "submit", "--address", self.dashboard, *command)


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with a wheel of this project, and this environment's packages behind it.

    The wheel's source has one comment more than the repository's, so that a mix of the two is a mix of sources.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("rlsf_ray", "actors"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    with (source / "actors" / "job.py").open("a") as file:
        file.write("# of the wheel\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(wheel, check=True, capture_output=True)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(next(folder.glob("*.whl")))]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "behind.pth").write_text(os.pathsep.join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    (python.parent / "ray").write_text(f"#!{python}\nfrom ray.scripts.scripts import main\nmain()\n")
    (python.parent / "ray").chmod(0o755)
    return python


@pytest.fixture(scope="module")
def cluster(wheel_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port, dashboard, agent = free_ports(3)
    with Sandbox(tmp_path_factory.mktemp("cluster"), python=str(wheel_python)) as sandbox:
        sandbox.env.pop("PYTHONPATH", None)
        ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        code, output = sandbox.run("ray", "start", "--head", "--num-cpus=8", *ports, seconds=120)
        assert code == 0, output
        yield Cluster(sandbox, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")


def run_command(config: RunConfig, folder: Path, name: str) -> list[str]:
    return ["run", write_config(folder, config), "--root", str(folder), "--run", name]


def test_a_shell_and_a_job_share_a_cluster_and_do_not_meet(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    """`rlsf run --address` and `ray job submit -- rlsf run` at once; `rlsf status` for both from another shell."""
    sandbox, configs = cluster.sandbox, [tiny_config(tiny, seed=seed, data={"probe": []}) for seed in (0, 1)]
    shell = sandbox.start(
        "rlsf",
        *run_command(configs[0], tmp_path, "shell"),
        "--address",
        cluster.address,
        env={"RAY_ADDRESS": "127.0.0.1:1"},  # --address comes first
    )
    job = sandbox.start(*cluster.submit("--", "rlsf", *run_command(configs[1], tmp_path, "job")))
    for name, command in (("shell", shell), ("job", job)):
        command.until((tmp_path / name / "state.json").exists, END_S)
    asked = [sandbox.start("rlsf", "status", "shell", "--address", "auto")]
    asked.append(sandbox.start("rlsf", "status", "job", env={"RAY_ADDRESS": cluster.address}))
    for status in asked:
        assert status.wait(60) == 0, status.output
        assert "accounting: admitted" in status.output
    assert shell.wait(END_S) == 0, shell.output
    assert job.wait(END_S) == 0, job.output
    for name, config in zip(("shell", "job"), configs, strict=True):
        _holds_only_its_own_prompts(RunStore.open(str(tmp_path / name)), config)
    assert "run directory" in job.output  # `ray job submit` shows what the driver says


def _holds_only_its_own_prompts(store: RunStore, config: RunConfig) -> None:
    train = load_sets(config).train
    for round in range(config.rounds):
        prompts = prompts_of_round(train, round, config.prompts_per_round, config.seed)
        rows = store.read_table("traces", round).to_pylist()
        assert [row["prompt_id"] for row in rows[:: config.rollout.traces]] == [prompt.id for prompt in prompts]
    count = store.read_json("summary.json")["accounting"]
    assert count["admitted"] == 16 == count["trained"] + count["filtered"]


def test_a_job_that_is_stopped_drains_and_the_same_job_resumes_it(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    """`--working-dir . -- python -m rlsf_ray run`, the way for development: every actor runs the shipped source."""
    sums = [SUMS | {"count": 40}]
    config = tiny_config(
        tiny,
        prompts_per_round=24,
        data={"train": sums, "probe": []},
        cluster={"prompts_per_call": 1},
        learner={"epochs": 4},
    )
    entry = ["python", "-m", "rlsf_ray", *run_command(config, tmp_path, "dev")]
    first = cluster.sandbox.start(
        *cluster.submit("--submission-id=first", "--no-wait", f"--working-dir={ROOT}", "--", *entry)
    )
    assert first.wait(60) == 0, first.output
    _until(lambda: '"round": 1,' in _text(tmp_path / "dev/metrics/train.jsonl"), END_S)
    code, output = cluster.sandbox.run("ray", "job", "stop", "--address", cluster.dashboard, "first")
    assert code == 0, output
    _until(lambda: not cluster.living("dev"), DRAINED_S)
    store = RunStore.open(str(tmp_path / "dev"))
    assert store.read_json("state.json")["state"] == "drained"
    assert store.versions() == [1]
    assert "dev drains on the cluster" in cluster.api("/api/jobs/first/logs")["logs"]

    code, output = cluster.sandbox.run(*cluster.submit(f"--working-dir={ROOT}", "--", *entry), seconds=END_S)
    assert code == 0, output
    count = store.read_json("summary.json")["accounting"]
    assert count["admitted"] == 48 == count["trained"] + count["filtered"]
    groups = store.read_table("groups").to_pylist()
    assert len({group["id"] for group in groups}) == len(groups) == count["trained"]
    assert store.versions() == [1, 2]


def test_nobody_without_the_token_may_submit_a_job(cluster: Cluster) -> None:
    job = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/", job, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=30)
    code, output = cluster.sandbox.run("env", f"RAY_AUTH_TOKEN={'0' * 64}", *cluster.submit("--", "true"))
    assert code != 0, output
    assert "Invalid authentication token" in output, output


def test_a_job_ends_with_the_exit_code_of_its_run(cluster: Cluster, tmp_path: Path) -> None:
    command = cluster.submit("--submission-id=typo", "--", "rlsf", "run", "rslf", "--root", str(tmp_path))
    code, output = cluster.sandbox.run(*command)
    assert code != 0
    assert "did you mean 'rlsf'" in output
    assert cluster.api("/api/jobs/typo")["driver_exit_code"] == 2


def test_a_driver_of_other_source_than_the_cluster_s_is_refused(cluster: Cluster, tiny: Path, tmp_path: Path) -> None:
    """The repository's source drives, the cluster has the wheel's."""
    driver = [sys.executable, "-m", "rlsf_ray", *run_command(tiny_config(tiny), tmp_path, "mix")]
    code, output = cluster.sandbox.run(*driver, "--address", cluster.address)
    assert code == 4, output
    assert "runs other source than the driver" in output
    _until(lambda: not cluster.living("mix"), DRAINED_S)


def _until(ready: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"nothing within {seconds:g} s"
        time.sleep(0.05)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
