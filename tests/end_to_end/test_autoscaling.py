"""Nodes that come and go: 0 to 4 for generators and back, one for a trainer; three lost at once, one told to go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from autoscaled import HEAD, Autoscaled
from private_cluster import Sandbox, unavailable
from tiny import tiny_config

from rlsf_ray import loop
from rlsf_ray.config_loading import dump_config
from rlsf_ray.run_store import RunStore

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]
MOST = 4
ROUNDS, PROMPTS = 6, 64


def test_generators_and_a_trainer_come_with_nodes_are_lost_with_them_and_go(tiny: Path, tmp_path: Path) -> None:
    sums = {"name": "chain_sum", "count": ROUNDS * PROMPTS, "options": {"min_terms": 2, "max_terms": 2}}
    task = {"data": {"train": [sums], "probe": []}, "rounds": ROUNDS, "prompts_per_round": PROMPTS}
    pools = {
        "generators": {"cpus": 1, "threads": 1, "most": MOST, "idle_s": 5.0},
        "trainers": {"cpus": 2, "threads": 1, "most": 2},
    }
    more = {"prompts_per_call": 2, "deadline_s": 300}
    config = tiny_config(tiny, **task, rollout={"name": "own_parts:slow"}, cluster=pools | more)
    (tmp_path / "tiny.yaml").write_text(dump_config(config))
    with Sandbox(tmp_path / "box") as sandbox:
        sandbox.env["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{sandbox.env.get('PYTHONPATH', '')}"
        cluster = Autoscaled(sandbox, MOST)
        assert cluster.generator_nodes() == []
        command = ["rlsf", "run", str(tmp_path / "tiny.yaml"), "--root", str(tmp_path), "--run", "scaled"]
        run = sandbox.start(*command, "--address", cluster.address)
        cluster.until(lambda: len(cluster.generators()) == MOST, 240, "four generators")
        told = sorted(cluster.generators())[1]
        cluster.drain(told, 60)
        cluster.until(lambda: told not in cluster.generators(), 60, "a generator that leaves")
        cluster.until(lambda: len(cluster.trainers()) == 2, 240, "a second training worker")
        cluster.until(lambda: len(cluster.generators()) >= 3, 240, "generators at work")
        lost = {*sorted(cluster.generators())[1:3], *cluster.trainers()} - {HEAD}
        for node in lost:
            cluster.lose(node)
        living = lambda: {*cluster.generators(), *cluster.trainers()}  # noqa: E731
        cluster.until(lambda: not lost & living(), 60, "three nodes lost")
        cluster.until(cluster.trainers, 180, "a training worker again")
        cluster.until(lambda: len(cluster.generators()) == MOST, 240, "four generators again")
        assert run.wait(500) == 0, run.output
        cluster.until(lambda: not cluster.generator_nodes(), 60, "no nodes")
    counts = json.loads((tmp_path / "scaled" / "summary.json").read_text())["accounting"]
    assert counts["admitted"] == counts["trained"] + counts["filtered"] == ROUNDS * PROMPTS
    loop.run(tiny_config(tiny, **task), str(tmp_path / "loop"))
    ours, calm = (RunStore.open(str(tmp_path / name)).read_adapter(ROUNDS)[0] for name in ("scaled", "loop"))
    assert max(np.abs(ours[name] - calm[name]).max() for name in calm) <= 1e-5
    told_of = "".join(file.read_text() for file in (tmp_path / "scaled/logs").iterdir())
    assert "leaves its node, which is about to go" in told_of
