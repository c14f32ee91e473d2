"""Ray's autoscaler over nodes that are processes of this machine; for tests of pools that grow and shrink."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from private_cluster import Sandbox, free_ports

HEAD = "f" * 51 + "00000"  # the id under which the fake provider looks for its head
ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
}


class Autoscaled:
    """A head of three CPUs, up to `most` nodes for generators and one for a trainer, gone after six idle seconds."""

    def __init__(self, sandbox: Sandbox, most: int) -> None:
        self.sandbox = sandbox
        port, self._dashboard, agent = free_ports(3)
        self.address = f"127.0.0.1:{port}"
        config = sandbox.folder / "autoscaling.json"
        config.write_text(json.dumps(_config(most, self.address)))
        code, output = sandbox.run(
            *("ray", "start", "--head", "--num-cpus=3", f"--port={port}", f"--autoscaling-config={config}"),
            *(f"--dashboard-port={self._dashboard}", f"--dashboard-agent-listen-port={agent}"),
            '--resources={"rlsf_marked": 1, "rlsf_trainer": 1}',
            env=ENVIRONMENT,
        )
        assert code == 0, output

    def _ask(self, what: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self._dashboard}/api/v0/{what}?limit=10000&detail=1"
        with urllib.request.urlopen(urllib.request.Request(url, headers=self.sandbox.bearer), timeout=30) as answer:
            return list(json.load(answer)["data"]["result"]["result"])

    def generator_nodes(self) -> list[str]:
        """Ids of the living nodes that generators stand on."""
        nodes = self._ask("nodes")
        return [n["node_id"] for n in nodes if n["state"] == "ALIVE" and "rlsf_generator" in n["resources_total"]]

    def generators(self) -> Counter[str]:
        """{node: generators that live there}."""
        return self._living("Generator")

    def trainers(self) -> Counter[str]:
        """{node: training workers that live there}."""
        return self._living("RayTrainWorker")

    def _living(self, cls: str) -> Counter[str]:
        actors = [actor for actor in self._ask("actors") if actor["class_name"] == cls]
        return Counter(actor["node_id"] for actor in actors if actor["state"] == "ALIVE")

    def until(self, ready: Callable[[], Any], seconds: float, what: str) -> Any:
        """The first true value of `ready`, looked at every second."""
        end = time.monotonic() + seconds
        while not (value := ready()):
            if time.monotonic() > end:
                pytest.fail(f"{what}: not within {seconds:g} s; {self.generator_nodes()}, {self.generators()}")
            time.sleep(1.0)
        return value

    def drain(self, node: str, seconds: int) -> None:
        """Tell Ray what a spot notice says."""
        reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
        code, output = self.sandbox.run(
            *("ray", "drain-node", "--address", self.address, "--node-id", node, *reason),
            *("--deadline-remaining-seconds", str(seconds)),
        )
        assert code == 0, output

    def lose(self, node: str) -> None:
        """kill -9 of the node's raylet, which takes its workers with it."""
        code, output = self.sandbox.run("pkill", "-9", "-f", f"raylet/raylet .*--node_id={node}")
        assert code == 0, output


def _config(most: int, address: str) -> dict[str, Any]:
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": HEAD,
        "gcs_address": address,
    }
    generator = {"resources": {"CPU": 1, "rlsf_generator": 1}, "node_config": {}, "min_workers": 0, "max_workers": most}
    trainer = {"resources": {"CPU": 2, "rlsf_trainer": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1}
    head = {"resources": {"CPU": 3, "rlsf_marked": 1, "rlsf_trainer": 1}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "tests",
        "max_workers": most + 1,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10.0,
        "provider": provider,
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {"generator": generator, "trainer": trainer, "ray.head.default": head},
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "initialization_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "docker": {},
    }
