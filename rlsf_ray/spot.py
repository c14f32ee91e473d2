"""Watches for the notice that this spot machine is about to be taken, and tells Ray: what stands here moves away.

    python -m rlsf_ray.spot aws    # or gcp; one on each spot node, started beside Ray

AWS gives two minutes, Google Cloud 30 seconds. Ray's own node providers do not look (2.60).
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from rlsf_ray.errors import ServiceError

logger = logging.getLogger(__name__)

LOOK_S, ASK_S, DRAIN_S = 2.0, 2.0, 60.0
GCP_NOTICE_S = 30.0


def aws_notice(host: str) -> float | None:
    """Unix seconds at which AWS takes this machine; None: it has said nothing. IMDSv2, with a token of its own."""
    token = _get(f"{host}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    found = _get(f"{host}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    return datetime.fromisoformat(json.loads(found)["time"]).timestamp() if found else None


def gcp_notice(host: str) -> float | None:
    """The same on Google Cloud, which says only that it has begun."""
    found = _get(f"{host}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return time.time() + GCP_NOTICE_S if found == "TRUE" else None


# Each cloud's way to ask, and where
CLOUDS: dict[str, tuple[Callable[[str], float | None], str]] = {
    "aws": (aws_notice, "http://169.254.169.254"),
    "gcp": (gcp_notice, "http://metadata.google.internal"),
}


def _get(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """What is there; None where there is nothing."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=dict(headers), method=method), timeout=ASK_S
        ) as r:
            return str(r.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == http.client.NOT_FOUND:
            return None
        raise


def watch(notice: Callable[[], float | None], drain: Callable[[float], None]) -> None:
    """Return once a notice has come and Ray knows of it. Who does not answer, the service or Ray, is asked again."""
    answered = told = True
    until: float | None = None
    while True:
        try:
            until, answered = until or notice(), True
        except (OSError, ValueError, http.client.HTTPException) as error:
            if answered:
                logger.warning("the metadata service does not answer: %s; asking on", error)
            answered = False
        if until is not None:
            try:
                drain(until)
                return
            except (OSError, RuntimeError, ServiceError, subprocess.TimeoutExpired) as error:  # Ray restarts, perhaps
                if told:
                    logger.warning("Ray cannot be told that this machine goes: %s; trying on", error)
                told = False
        time.sleep(LOOK_S)


def drain_this_node(until: float) -> None:
    """Tell Ray that this node goes at `until` (unix seconds). Raises ServiceError if Ray does not take it."""
    import ray

    ray.init("auto", logging_level=logging.ERROR)
    try:
        context = ray.get_runtime_context()
        node, address = context.get_node_id(), context.gcs_address
    finally:
        ray.shutdown()
    seconds = max(1, int(until - time.time()))
    ray_command = Path(sys.executable).parent / "ray"
    command = [str(ray_command), "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DRAIN_S, check=False)
    if done.returncode:
        raise ServiceError(f"Ray did not drain node {node}: {done.stderr.strip() or done.stdout.strip()}")
    logger.warning("this machine goes in %d s: Ray drains node %s", seconds, node)


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m rlsf_ray.spot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    notice, host = CLOUDS[parser.parse_args().cloud]
    host = os.environ.get("RLSF_METADATA", host)  # another address in tests
    logger.info("watching %s", host)
    watch(lambda: notice(host), drain_this_node)


if __name__ == "__main__":
    main()
