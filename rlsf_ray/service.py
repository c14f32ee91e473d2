"""The driver: finds or starts Ray, hands the run to its coordinator, and watches. It holds no part of the run."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Mapping
from types import FrameType
from typing import Any

import ray

from actors.job import Job, source_hash
from actors.spawn import nodes_without, spawn_coordinator
from rlsf_ray.config import NAME_CHARACTERS, RunConfig
from rlsf_ray.errors import DeadlineError, DrainedError, InputError
from rlsf_ray.memory import PeakMemory
from rlsf_ray.operate import ANSWER_S, POLL_S, OnStatus, ask, connected, resources
from rlsf_ray.placement import check_growing_trainers, gpu_shares, marks, placed
from rlsf_ray.plan import missing_resources
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.storage import Storage
from rlsf_ray.stream.limits import NO_LIMITS, Limits
from rlsf_ray.stream.run_state import RunState

DRAIN_S = 30.0  # a drain is promised within 20 s


def run(
    config: RunConfig,
    *,
    root: str,
    run_name: str,
    address: str | None = None,
    on_status: OnStatus = lambda status: None,
    limits: Limits = NO_LIMITS,
    webhook: str | None = None,
) -> Json:
    """Run `config` on Ray in the run directory `root`; returns the summary. The same call again resumes.

    `address`: of a Ray cluster; else RAY_ADDRESS (a Ray job has it set), else a Ray of our own on this machine.
    `webhook`: a URL that hears of the guard, of quarantined generators and of the run's end.
    Raises InputError before anything heavy starts, NoPairsError, DrainedError after SIGTERM or Ctrl-C, or the
    ServiceError that ended the run.
    """
    check_run_name(run_name)
    _check_webhook(webhook)
    summary = _finished(root, config, run_name, on_status)
    if summary is not None:
        return summary
    with connected(address) as embedded, _Signals() as signals:  # Ray sets a handler of its own when it connects
        found = resources()
        shares = _check_size(config, found)  # before the config is written: the cure may be another config
        marked = marks(found)
        check_growing_trainers(config, (n["Resources"] for n in ray.nodes() if n["Alive"]), marked)
        store = RunStore.create_or_resume(root, config)
        _check_shared(store)
        job = Job(run=run_name, root=store.root, source=source_hash(), gpus=shares, marks=marked)
        coordinator = _join(job, limits, webhook)
        if not embedded:
            return _follow(coordinator, run_name, signals, on_status, wait_for_drain=False)
        with PeakMemory() as memory:
            return _follow(coordinator, run_name, signals, on_status, wait_for_drain=True, memory=memory)


def check_run_name(name: str) -> None:
    """Raises InputError for a name that would leave the folder of runs, or that Ray would read as a path."""
    if not re.fullmatch(rf"[A-Za-z0-9][{NAME_CHARACTERS}]{{0,99}}", name):
        raise InputError(
            f"--run: expected up to 100 letters, digits and ._+=- that begin with a letter or digit, got {name!r};"
            " choose another name"
        )


def _check_webhook(url: str | None) -> None:
    """Raises InputError, which does not show the URL, for one that nothing can be posted to."""
    if url is not None and not re.fullmatch(r"https?://[\w.-]+(:\d{1,5})?(/[!-~]*)?", url):
        raise InputError(
            "the webhook is no URL like https://host/path without blanks; correct RLSF_WEBHOOK, or unset it"
        )


def _finished(root: str, config: RunConfig, run_name: str, on_status: OnStatus) -> Json | None:
    """The summary of a run that is over; None if there is anything left to do. A run of another config is refused."""
    if Storage(root).read("config.yaml") is None:
        return None
    store = RunStore.create_or_resume(root, config)
    summary: Json | None = store.read_json("summary.json")
    saved = store.read_json("state.json") or {}
    if saved.get("by") == "loop":
        raise InputError(
            f"{store.root} holds a run of rlsf_ray.loop, expected one of this service; give this run another name"
        )
    if summary is None or saved.get("state") != "done":
        return None
    on_status(RunState(run_name, config, saved).status() | {"message": "it was finished before, nothing is run"})
    return summary


def _check_size(config: RunConfig, resources: Mapping[str, float]) -> dict[str, float]:
    """Each pool's share of the GPUs. Raises InputError if the cluster, which has these resources, is too small."""
    shares = gpu_shares(config, resources.get("GPU", 0.0))
    missing = missing_resources(placed(config, shares), resources)
    if missing:
        raise InputError("the cluster is too small for this run:\n  " + "\n  ".join(missing))
    return shares


def _check_shared(store: RunStore) -> None:
    """Raises InputError if a node does not see the run directory."""
    if not store.storage.local or len([node for node in ray.nodes() if node["Alive"]]) < 2:
        return
    marker = f".seen-{uuid.uuid4().hex[:8]}"
    store.write_text(marker, "")
    try:
        blind = nodes_without(store.path(marker))
    finally:
        os.unlink(store.path(marker))
    if blind:
        raise InputError(
            f"the run directory {store.root} is not on shared storage: {', '.join(blind)} cannot see it;"
            " put it on a shared file system, or give a URL like s3://bucket/run"
        )


def _join(job: Job, limits: Limits, webhook: str | None) -> Any:
    """The run's coordinator: the one that runs, or a new one.

    Raises InputError if a run of this name works in another directory.
    """
    environment = {}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a Ray job ships its own working directory
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()]
        environment["PYTHONPATH"] = os.pathsep.join(paths)  # a user's own functions, on machines that have them there
    coordinator = spawn_coordinator(job, environment)
    found = ask(coordinator, "status")
    check_root(found, job)
    if found["ended"]:  # an earlier run of this name that nobody has asked about
        ray.kill(coordinator)
    if found["ended"] or found["ending"]:  # after `stop`: it ends its step and leaves
        _wait_until_gone(job.run)
        coordinator = spawn_coordinator(job, environment)
    ask(coordinator, "start", job.source, limits, webhook)
    return coordinator


def check_root(found: Json, job: Job) -> None:
    """Raises InputError if the coordinator whose status was `found` works in another run directory."""
    if found["root"] != job.root:
        raise InputError(
            f"a run called {job.run} is on this cluster already, in {found['root']}; expected {job.root}; give this run"
            " another --run name"
        )


def _wait_until_gone(run_name: str) -> None:
    until = time.monotonic() + ANSWER_S
    while f"{run_name}/coordinator" in ray.util.list_named_actors():
        if time.monotonic() > until:
            raise DeadlineError(
                f"the old coordinator of {run_name} did not leave within {ANSWER_S:g} s; stop it by hand"
            )
        time.sleep(0.1)


def _follow(
    coordinator: Any,
    run_name: str,
    signals: _Signals,
    on_status: OnStatus,
    *,
    wait_for_drain: bool,
    memory: PeakMemory | None = None,
) -> Json:
    """Watch until the run ends. A signal drains it; where nobody would clean up after us, see the drain through."""
    asked_at = None
    while True:
        found = ask(coordinator, "status", memory.peak_gb if memory else None)
        on_status(found)
        if found["ended"]:
            break
        if signals.asked.wait(POLL_S) and asked_at is None:
            asked_at = time.monotonic()
            ask(coordinator, "drain")
            if not wait_for_drain:
                raise DrainedError(f"{run_name} drains on the cluster; the same command resumes it")
        if asked_at is not None:
            time.sleep(POLL_S)
            if time.monotonic() - asked_at > DRAIN_S:
                raise DrainedError(f"{run_name} did not drain within {DRAIN_S:g} s; the same command resumes it")
    summary, error = ask(coordinator, "outcome")
    if error is not None:
        raise error
    result: Json = summary
    return result


class _Signals:
    """SIGTERM and the first Ctrl-C set `asked`; a second Ctrl-C leaves at once. Off the main thread nothing happens."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked.is_set():
            raise KeyboardInterrupt
        self.asked.set()
