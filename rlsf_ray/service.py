"""The driver: finds or starts Ray, hands the run to its coordinator, and watches. It holds no part of the run."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.job import NAMESPACE, Job, source_hash
from actors.spawn import nodes_without, spawn_coordinator
from rlsf_ray.config import NAME_CHARACTERS, RunConfig
from rlsf_ray.errors import DeadlineError, DrainedError, InputError, RlsfError, ServiceError
from rlsf_ray.memory import PeakMemory
from rlsf_ray.placement import gpu_shares, marks, placed
from rlsf_ray.plan import missing_resources
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.storage import Storage
from rlsf_ray.stream.run_state import RunState

OnStatus = Callable[[Json], None]

POLL_S = 1.0
ANSWER_S = 60.0  # the coordinator answers control calls at once, unless it is still being created
DRAIN_S = 30.0  # a drain is promised within 20 s
CONNECT_S = 5.0  # to a port that is open; Ray itself would try for minutes


def run(
    config: RunConfig,
    *,
    root: str,
    run_name: str,
    address: str | None = None,
    on_status: OnStatus = lambda status: None,
) -> Json:
    """Run `config` on Ray in the run directory `root`; returns the summary. The same call again resumes.

    `address`: of a Ray cluster; else RAY_ADDRESS (a Ray job has it set), else a Ray of our own on this machine.
    Raises InputError before anything heavy starts, NoPairsError, DrainedError after SIGTERM or Ctrl-C, or the
    ServiceError that ended the run.
    """
    check_run_name(run_name)
    summary = _finished(root, config, run_name, on_status)
    if summary is not None:
        return summary
    with _connected(address) as embedded, _Signals() as signals:  # Ray sets a handler of its own when it connects
        resources = _resources()
        shares = _check_size(config, resources)  # before the config is written: the cure may be another config
        store = RunStore.create_or_resume(root, config)
        _check_shared(store)
        job = Job(run=run_name, root=store.root, source=source_hash(), gpus=shares, marks=marks(resources))
        coordinator = _join(job)
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


def status(run_name: str, address: str | None = None) -> Json:
    """How far a running run is. Raises ServiceError if no such run is running there."""
    with _connected(address or os.environ.get("RAY_ADDRESS") or "auto"):
        found: Json = _ask(_running(run_name), "status")
        return found


def stop(run_name: str, address: str | None = None) -> None:
    """Ask a running run to drain. Returns at once. Raises ServiceError if no such run is running there."""
    with _connected(address or os.environ.get("RAY_ADDRESS") or "auto"):
        _ask(_running(run_name), "drain")


def cluster_resources(address: str) -> dict[str, float]:
    """Resources that the cluster at `address` has or can grow to, as Ray names them."""
    with _connected(address):
        return dict(_resources())


@contextmanager
def _connected(address: str | None) -> Iterator[bool]:
    """Be connected to Ray; yields True if this is a Ray of our own. A connection that was there before stays."""
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: Json = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _knock(address)
            ray.init(address=address, **options)
        else:
            # Ray Train asks the dashboard only to clean up after a killed controller; this Ray ends with us anyway
            ray.init("local", include_dashboard=False, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray answers at {address or 'this machine'} ({error}); start one with `ray start --head`, correct"
            " --address or RAY_ADDRESS, or leave both out for a Ray of our own"
        ) from error
    try:
        yield address is None
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at a `host:port`, ValueError for an address of another kind."""
    host, _, port = address.rpartition(":")
    if host.startswith("ray:"):
        raise ValueError("a Ray Client's; use its host and port of `ray start --head`, or `ray job submit`")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


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


def _resources() -> Mapping[str, float]:
    """What the cluster has, or can grow to where an autoscaler says so."""
    from ray._private.state import state

    now, most = ray.cluster_resources(), state.get_max_resources_from_cluster_config() or {}
    return {name: max(float(now.get(name, 0)), float(most.get(name, 0))) for name in {*now, *most}}


def _join(job: Job) -> Any:
    """The run's coordinator: the one that runs, or a new one.

    Raises InputError if a run of this name works in another directory.
    """
    environment = {}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a Ray job ships its own working directory
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()]
        environment["PYTHONPATH"] = os.pathsep.join(paths)  # a user's own functions, on machines that have them there
    coordinator = spawn_coordinator(job, environment)
    found = _ask(coordinator, "status")
    check_root(found, job)
    if found["ended"]:  # an earlier run of this name that nobody has asked about
        ray.kill(coordinator)
    if found["ended"] or found["ending"]:  # after `stop`: it ends its step and leaves
        _wait_until_gone(job.run)
        coordinator = spawn_coordinator(job, environment)
    _ask(coordinator, "start", job.source)
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


def _running(run_name: str) -> Any:
    try:
        return ray.get_actor(f"{run_name}/coordinator", namespace=NAMESPACE)
    except ValueError as error:
        raise ServiceError(
            f"no run called {run_name} is running on this Ray; expected one of {_runs() or 'none at all'}; check the"
            " name and --address"
        ) from error


def _runs() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name.removesuffix("/coordinator") for name in names if name.endswith("/coordinator"))


def _ask(coordinator: Any, method: str, *args: Any) -> Any:
    """One control call, with errors as our own types."""
    try:
        return ray.get(getattr(coordinator, method).remote(*args), timeout=ANSWER_S)
    except GetTimeoutError as error:
        raise DeadlineError(
            f"the coordinator has not answered `{method}` for {ANSWER_S:g} s; is the head node alive?"
        ) from error
    except RayActorError as error:
        raise ServiceError(f"the coordinator is gone ({error}); run the same command again to resume") from error
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, RlsfError) else error from None


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
        found = _ask(coordinator, "status", memory.peak_gb if memory else None)
        on_status(found)
        if found["ended"]:
            break
        if signals.asked.wait(POLL_S) and asked_at is None:
            asked_at = time.monotonic()
            _ask(coordinator, "drain")
            if not wait_for_drain:
                raise DrainedError(f"{run_name} drains on the cluster; the same command resumes it")
        if asked_at is not None:
            time.sleep(POLL_S)
            if time.monotonic() - asked_at > DRAIN_S:
                raise DrainedError(f"{run_name} did not drain within {DRAIN_S:g} s; the same command resumes it")
    summary, error = _ask(coordinator, "outcome")
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
