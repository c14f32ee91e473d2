"""A run over three nodes: what steers on the head, generators and scorers on one, the training worker on another."""

from __future__ import annotations

import json
import re
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from metadata import Metadata
from private_cluster import Sandbox, free_ports, unavailable
from tiny import tiny_config

from rlsf_ray.config_loading import dump_config

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]


def test_each_role_stands_on_the_nodes_that_are_marked_for_it(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_config(tiny, data={"probe": []})))
    port, dashboard, *agents = free_ports(5)
    with Sandbox(tmp_path / "box") as sandbox:
        ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agents[0]}"]
        code, output = sandbox.run("ray", "start", "--head", "--num-cpus=0", *ports, seconds=120)
        assert code == 0, output
        for role, agent in zip(("rlsf_generator", "rlsf_trainer"), agents[1:], strict=True):
            more = [f'--resources={{"{role}": 1}}', "--num-cpus=4", f"--dashboard-agent-listen-port={agent}"]
            code, output = sandbox.run("ray", "start", f"--address=127.0.0.1:{port}", *more, seconds=120)
            assert code == 0, output
        command = ["rlsf", "run", str(tmp_path / "tiny.yaml"), "--root", str(tmp_path), "--run", "three"]
        code, output = sandbox.run(*command, "--address", f"127.0.0.1:{port}", seconds=300)
        assert code == 0, output

        def ask(path: str) -> Any:
            request = urllib.request.Request(f"http://127.0.0.1:{dashboard}{path}", headers=sandbox.bearer)
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)

        nodes = ask("/api/v0/nodes?limit=100")["data"]["result"]["result"]
        role_of = {
            n["node_id"]: next((r for r in n["resources_total"] if r.startswith("rlsf_")), "head") for n in nodes
        }
        assert sorted(role_of.values()) == ["head", "rlsf_generator", "rlsf_trainer"]
        actors = ask("/api/v0/actors?limit=10000")["data"]["result"]["result"]
        with Metadata() as service:
            service.aws = json.dumps(
                {"action": "terminate", "time": f"{datetime.now(UTC) + timedelta(minutes=2):%FT%TZ}"}
            )
            command = ["python", "-m", "rlsf_ray.spot", "aws"]
            code, output = sandbox.run(*command, env={"RLSF_METADATA": service.url, "RAY_ADDRESS": f"127.0.0.1:{port}"})
    assert code == 0, output
    assert re.search(r"this machine goes in 1[01]\d s: Ray drains node [0-9a-f]{56}", output)
    stood = {(a["name"] or a["class_name"]).removeprefix("three/"): role_of.get(a["node_id"]) for a in actors}
    assert stood["generator-0"] == stood["scorer-0"] == "rlsf_generator"
    assert stood["coordinator"] == stood["pair_buffer"] == stood["weight_store"] == stood["train_driver"] == "head"
    assert {node for name, node in stood.items() if "TrainWorker" in name} == {"rlsf_trainer"}
