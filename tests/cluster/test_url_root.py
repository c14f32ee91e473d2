"""A run directory on an object store: a local S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from moto.server import ThreadedMotoServer
from tiny import tiny_config

from actors.job import NAMESPACE
from rlsf_ray import loop, operate, service
from rlsf_ray.errors import DrainedError
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty bucket, which the actors of a Ray of our own reach too."""
    import s3fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        s3fs.S3FileSystem().mkdir("runs")
        ray.init("local", namespace=NAMESPACE, num_cpus=8, include_dashboard=False, log_to_driver=False)
        yield "s3://runs"
        ray.shutdown()
    server.stop()


def test_a_run_lives_at_a_url_and_resumes_there(bucket: str, tiny: Path, tmp_path: Path) -> None:
    """Drained after round 1, it goes on from the checkpoint at the URL, with the pairs of a run in a folder."""
    config, root = tiny_config(tiny, rounds=4, data={"probe": []}), f"{bucket}/tiny"

    def drain_after_round_1(status: Json) -> None:
        if status.get("version", 0) >= 1:
            operate.stop("tiny")

    with pytest.raises(DrainedError):
        service.run(config, root=root, run_name="tiny", on_status=drain_after_round_1)
    summary = service.run(config, root=root, run_name="tiny")
    loop.run(config, str(tmp_path / "loop"))
    ours, theirs = RunStore.open(root), RunStore.open(str(tmp_path / "loop"))
    assert summary["accounting"] == theirs.read_json("summary.json")["accounting"]
    assert ours.read_table("pairs").to_pylist() == theirs.read_table("pairs").to_pylist()
    assert ours.versions() == [1, 2, 3, 4]
    steps = [row["step"] for row in ours.read_metrics("train")]
    assert set(steps) == set(range(1, summary["training"]["steps"] + 1))  # those of a round that was cut off twice
    assert ours.storage.read("report.html")
