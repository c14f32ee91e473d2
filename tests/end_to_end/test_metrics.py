"""A run on a Ray that a real Prometheus scrapes: every query of the Grafana dashboard finds its numbers."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from private_cluster import Sandbox, free_ports, unavailable
from tiny import tiny_config

from rlsf_ray.config_loading import dump_config

PROMETHEUS = shutil.which("prometheus")
DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"
ROUNDS = 500  # more than there is time for: the sandbox ends the run
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
    pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus on the path; Debian's package `prometheus` has it"),
]


def test_prometheus_answers_every_query_of_the_dashboard(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_config(tiny, rounds=ROUNDS)))
    ray, dashboard, agent, metrics, port = free_ports(5)
    scrape = {"job_name": "ray", "scrape_interval": "1s", "static_configs": [{"targets": [f"127.0.0.1:{metrics}"]}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    with Sandbox(tmp_path / "box") as sandbox:
        ports = [f"--port={ray}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        code, output = sandbox.run(
            *("ray", "start", "--head", "--num-cpus=4", *ports, f"--metrics-export-port={metrics}"),
            env={"RAY_metrics_report_interval_ms": "1000"},
        )
        assert code == 0, output
        sandbox.start(
            *(
                str(PROMETHEUS),
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
            ),
            f"--web.listen-address=127.0.0.1:{port}",
        )
        command = ["rlsf", "run", str(tmp_path / "tiny.yaml"), "--root", str(tmp_path), "--run", "watched"]
        sandbox.start(*command, "--address", f"127.0.0.1:{ray}")
        until = time.monotonic() + 400
        versions = _found(port, 'ray_rlsf_version{run="watched"} > 0', until)
        assert 0 < float(versions[0]["values"][-1][1]) <= ROUNDS
        for title, expression, legend in _queries():
            found = _found(port, expression, until)
            for label in re.findall(r"{{(\w+)}}", legend):
                assert all(label in series["metric"] for series in found), f"{title}: no label {label}"


def _found(port: int, expression: str, until: float) -> list[Any]:
    """What Prometheus has of the last minutes for a query, once it has something. Fails at the moment `until`."""
    while time.monotonic() < until:
        query = {"query": expression, "start": time.time() - 400, "end": time.time(), "step": 1}
        url = f"http://127.0.0.1:{port}/api/v1/query_range?{urllib.parse.urlencode(query)}"
        with suppress(urllib.error.URLError), urllib.request.urlopen(url, timeout=30) as answer:
            if found := json.load(answer)["data"]["result"]:
                return list(found)
        time.sleep(0.5)
    pytest.fail(f"nothing for {expression}")


def _queries() -> list[tuple[str, str, str]]:
    """(panel, query for our run, legend) of the dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [
        (p["title"], t["expr"].replace("$run", "watched"), t["legendFormat"]) for p in panels for t in p["targets"]
    ]
    assert len(found) >= len(panels) > 10
    return found
