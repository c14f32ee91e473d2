"""A version goes to a node once, however many of its generators fetch it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from simulated import ADAPTER, FOLDER, SimulatedJob
from tiny import tiny_config

from actors.generator import Generator
from actors.job import NAMESPACE, source_hash
from actors.weight_store import WeightStore
from rlsf_ray.placement import gpu_shares
from rlsf_ray.run_store import RunStore

pytestmark = pytest.mark.cluster

GENERATORS = 3
SHAPES = {"A": (16, 1 << 16), "B": (1 << 16, 16)}
ADAPTER_BYTES = 8 << 20


@pytest.fixture
def far() -> Iterator[Any]:
    """A Ray of two nodes; yields the one where the generators stand, and the store does not."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1, resources={"far": GENERATORS})
        paths = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
        environment = {"env_vars": {"PYTHONPATH": paths}}
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, runtime_env=environment)
        yield node
    finally:
        ray.shutdown()
        cluster.shutdown()


def _created(node: Any) -> int:
    """Bytes of all objects that the node's store has ever held."""
    found = next(one for one in ray.nodes() if one["NodeID"] == node.node_id)
    reply = node_stats(found["NodeManagerAddress"], found["NodeManagerPort"], include_memory_info=False)
    return int(reply.store_stats.cumulative_created_bytes)


def test_a_version_comes_to_a_node_once_for_all_its_generators(far: Any, tmp_path: Path) -> None:
    """Then each loads another, and fetches the one before that too: three more come, so the count sees every one."""
    config = tiny_config(Path("model"), cluster={"max_staleness": 2})  # the store holds two more
    run = RunStore.create_or_resume(str(tmp_path / "run"), config)
    for version in range(1, 2 + GENERATORS):
        arrays = {ADAPTER.format(side): np.full(shape, version, dtype=np.float32) for side, shape in SHAPES.items()}
        run.write_adapter(version, arrays, config.model.name, config)
    shares = gpu_shares(config, 0.0)
    job = SimulatedJob(run="fan", root=run.root, source=source_hash(), gpus=shares, service_s=0.0, slots=1)
    where = {"name": "fan/weight_store", "namespace": NAMESPACE, "resources": {"node:__internal_head__": 0.001}}
    store = ray.remote(WeightStore).options(num_cpus=0, **where).remote(job, "weight_store")
    ray.get(store.prepare.remote(), timeout=120)
    Far = ray.remote(Generator).options(num_cpus=0, resources={"far": 1})
    generators = [Far.remote(job, f"generator-{index}") for index in range(GENERATORS)]

    def load(versions: Sequence[int]) -> float:
        """Let each generator load its version; returns how many adapters have come to the node."""
        before = _created(far)
        calls = [one.load_version.remote(version) for one, version in zip(generators, versions, strict=True)]
        assert [swap["version"] for swap in ray.get(calls, timeout=180)] == list(versions)
        return (_created(far) - before) / ADAPTER_BYTES

    assert load([1] * GENERATORS) == pytest.approx(1.0, abs=0.1)
    assert load(range(2, 2 + GENERATORS)) == pytest.approx(GENERATORS, abs=0.1)
