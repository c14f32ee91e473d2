"""What an operator says to a run that goes on: wait, go on, go back, end now; and limits that end it by themselves."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from running import alive, standing_groups, training_worker, wait_for

from actors.coordinator import STOP_S
from actors.job import NAMESPACE
from rlsf_ray import operate, service
from rlsf_ray.config import RunConfig
from rlsf_ray.errors import DrainedError, InputError, ServiceError
from rlsf_ray.logs import Tail
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.limits import Limits

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]

Launch = Callable[[RunConfig, Path], "Future[Json]"]


def _progress(run: str) -> list[object]:
    found = operate.status(run)
    return [found[key] for key in ("traces", "steps", "version")]


def _standstill(run: str) -> list[object]:
    """Where a paused run stands once what was being written or trained has ended."""
    found: list[object] = []
    for _ in range(60):
        before, found = found, _progress(run)
        if found == before:
            return found
        time.sleep(2.0)
    raise AssertionError(f"{run} does not come to a standstill: {found}")


def _status(run: str) -> Json:
    """Empty between two lives."""
    with suppress(ServiceError):
        return operate.status(run)
    return {}


def _stands(run: str) -> bool:
    """Is it paused, with all its actors there?"""
    found = _status(run)
    return found.get("state") == "paused" and found["message"] not in ("", "starting actors")


def _questions(file: Path) -> Path:
    file.write_text("".join(json.dumps({"question": f"Say {word}"}) + "\n" for word in ("yes", "no")))
    return file


def test_a_run_waits_goes_on_is_fed_and_goes_back(
    launch: Launch, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(rounds=6, data={"probe": []})
    life = launch(config, tmp_path / "held")
    wait_for(lambda: "held/coordinator" in alive("held") and operate.status("held").get("version", 0) >= 1, life=life)
    operate.pause("held")
    ray.kill(ray.get_actor("held/coordinator", namespace=NAMESPACE))
    with pytest.raises(ServiceError, match="the coordinator is gone"):
        life.result()
    life = launch(config, tmp_path / "held")  # the order outlives the process that took it
    wait_for(lambda: _stands("held"), life=life)
    before = _standstill("held")
    with ThreadPoolExecutor() as threads:
        seen: list[Json] = []
        watching = threads.submit(operate.watch, "held", on_status=seen.append)
        time.sleep(3.0)
        assert _progress("held") == before
        assert operate.status("held")["state"] == "paused"
        (tmp_path / "long.jsonl").write_text(json.dumps({"question": "so " * 3000}))
        with pytest.raises(InputError, match="1 prompts do not fit the model's context"):
            operate.feed("held", tmp_path / "long.jsonl")
        fed = operate.feed("held", _questions(tmp_path / "new.jsonl"))
        with pytest.raises(InputError, match="knows all of its 2 prompts"):
            operate.feed("held", tmp_path / "new.jsonl")
        operate.resume("held")
        wait_for(lambda: operate.status("held")["version"] > fed["first_round"], life=life)
        with pytest.raises(InputError, match="cannot go back to version 77"):
            operate.roll_back("held", 77)
        operate.roll_back("held", 1)
        with pytest.raises((InputError, ServiceError), match=r"going back|ends"):
            operate.roll_back("held", 1)
        summary = life.result()
        assert watching.result()["ended"]
    assert {"paused", "running"} <= {status["state"] for status in seen}
    went = summary["guard"]["rolled_back"]
    assert went["to"] == 1
    store = RunStore.open(str(tmp_path / "held"))
    assert (fed["prompts"], fed["known"]) == (2, 0)
    assert fed["room"] == (6 - fed["first_round"]) * config.prompts_per_round
    written = {row["prompt_id"] for row in store.read_table("traces", fed["first_round"]).to_pylist()}
    assert {"feed-0001-1", "feed-0001-2"} < written
    assert store.read_adapter(went["version"])[1].checksum == store.read_adapter(1)[1].checksum
    counts = summary["accounting"]
    assert counts["in_flight"] == 0
    assert counts["admitted"] == sum(counts[end] for end in ("trained", "filtered", "failed", "rolled_back"))
    lines = [row["message"] for row in Tail(store.root, "coordinator")()]
    wanted = [*["paused by an operator"] * 2, "resumed by an operator", "an operator wants to go back to version 1"]
    assert [line for line in lines if "operator" in line] == wanted
    assert "round 1 is over: version 1" in lines


def test_limits_and_a_stop_in_haste_leave_a_run_that_goes_on_to_its_end(
    small: Callable[..., RunConfig], launch: Launch, tmp_path: Path
) -> None:
    config, root = small(rounds=3, data={"probe": []}), tmp_path / "limited"
    with pytest.raises(DrainedError, match=r"has written \d+ tokens of at most 1; .*higher limit"):
        service.run(config, root=str(root), run_name="limited", limits=Limits(tokens=1))
    written = RunStore.open(str(root)).read_json("state.json")["counts"]["tokens"]
    assert written > 1

    life = launch(config, root)
    wait_for(lambda: _status("limited").get("steps", 0) > 0, life=life)
    os.kill(training_worker(), signal.SIGSTOP)  # its step does not end
    began = time.monotonic()
    assert operate.stop("limited")
    assert operate.stop("limited", now=True)
    with pytest.raises(DrainedError, match="was asked to stop"):
        life.result()
    assert time.monotonic() - began < STOP_S, "it has waited for the trainer"
    wait_for(lambda: not alive("limited") and standing_groups() == 0, 20)

    counts = launch(config, root).result()["accounting"]
    assert counts["admitted"] == 24 == counts["trained"] + counts["filtered"] + counts["failed"]
