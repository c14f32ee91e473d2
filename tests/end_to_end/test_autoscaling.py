"""Generators on nodes that come and go: 0 to 4 and back, two lost at once, one told to go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from autoscaled import Autoscaled
from private_cluster import Sandbox, unavailable
from tiny import tiny_config

from rlsf_ray.config_loading import dump_config

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]
MOST = 4


def test_generators_come_with_nodes_are_lost_with_them_and_go(tiny: Path, tmp_path: Path) -> None:
    slow = {"rollout": {"name": "own_parts:slow"}, "data": {"probe": []}, "prompts_per_round": 64}
    slow["data"]["train"] = [{"name": "chain_sum", "count": 128, "options": {"min_terms": 2, "max_terms": 2}}]
    pools = {"generators": {"cpus": 1, "threads": 1, "most": MOST, "idle_s": 5.0}, "prompts_per_call": 2}
    config = tiny_config(tiny, **slow, cluster=pools | {"deadline_s": 300})
    (tmp_path / "tiny.yaml").write_text(dump_config(config))
    with Sandbox(tmp_path / "box") as sandbox:
        sandbox.env["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{sandbox.env.get('PYTHONPATH', '')}"
        cluster = Autoscaled(sandbox, MOST)
        assert cluster.generator_nodes() == []
        command = ["rlsf", "run", str(tmp_path / "tiny.yaml"), "--root", str(tmp_path), "--run", "scaled"]
        run = sandbox.start(*command, "--address", cluster.address)
        cluster.until(lambda: len(cluster.generators()) == MOST, 240, "four generators")
        told, *lost = sorted(cluster.generators())[1:]
        for node in lost:
            cluster.lose(node)
        cluster.until(lambda: not set(lost) & set(cluster.generators()), 60, "two nodes lost")
        cluster.until(lambda: len(cluster.generators()) == MOST, 240, "four generators again")
        cluster.drain(told, 60)
        cluster.until(lambda: told not in cluster.generators(), 60, "a generator that leaves")
        assert run.wait(400) == 0, run.output
        cluster.until(lambda: not cluster.generator_nodes(), 60, "no nodes")
    counts = json.loads((tmp_path / "scaled" / "summary.json").read_text())["accounting"]
    assert counts["admitted"] == counts["trained"] + counts["filtered"] == 128
    told_of = "".join(file.read_text() for file in (tmp_path / "scaled/logs").iterdir())
    assert "leaves its node, which is about to go" in told_of
