"""What is said to a Ray and to the runs that go on there, from outside: how far, wait, go on, go back, stop."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayActorError, RayTaskError

from actors.job import NAMESPACE
from rlsf_ray.access import own_token
from rlsf_ray.errors import DeadlineError, InputError, RlsfError, ServiceError
from rlsf_ray.feeds import LARGEST
from rlsf_ray.placement import grown
from rlsf_ray.records import Json

OnStatus = Callable[[Json], None]

POLL_S = 1.0
ANSWER_S = 60.0  # the coordinator answers control calls at once, unless it is still being created
CONNECT_S = 5.0  # to a port that is open; Ray itself would try for minutes


def status(run_name: str, address: str | None = None) -> Json:
    """How far a running run is. Raises ServiceError if no such run is running there."""
    found: Json = _tell(run_name, address, "status")
    return found


def watch(run_name: str, address: str | None = None, *, on_status: OnStatus) -> Json:
    """Show a running run until it ends; returns the last status seen. Leaving earlier does nothing to the run."""
    with at(address):
        coordinator = running(run_name)
        found: Json = ask(coordinator, "status")
        while True:
            on_status(found)
            if found["ended"]:
                return found
            time.sleep(POLL_S)
            try:
                found = ask(coordinator, "status")
            except ServiceError:  # it has ended and left since
                return found


def stop(run_name: str, address: str | None = None, *, now: bool = False) -> bool:
    """Ask a running run to drain; `now`: without waiting for its optimiser step. Returns at once.

    False: it ends by itself just now.
    """
    return bool(_tell(run_name, address, "drain", now))


def pause(run_name: str, address: str | None = None) -> None:
    """Let a running run begin no batch and no optimiser step until `resume`. Its actors keep their places."""
    _tell(run_name, address, "hold", True)


def resume(run_name: str, address: str | None = None) -> None:
    """Let a paused run go on."""
    _tell(run_name, address, "hold", False)


def roll_back(run_name: str, version: int, address: str | None = None) -> None:
    """End a running run on the content of an older version (0: the base model), published as a new one.

    Raises InputError for a version that it cannot go back to.
    """
    _tell(run_name, address, "roll_back", version)


def feed(run_name: str, file: Path, address: str | None = None) -> Json:
    """Give a running run the prompts of a file: {"prompts", "known": left out, "first_round": that takes them,
    "room": of the rounds from that one on}.

    The file has the columns of the run's own data file, or `question`. Raises InputError for a bad file.
    """
    try:
        size, data = file.stat().st_size, b""
        if size <= LARGEST:
            data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); check the path and your access to it") from error
    if size > LARGEST:
        raise InputError(f"{file} has {size:,} bytes, expected at most {LARGEST:,}; feed it in parts")
    found: Json = _tell(run_name, address, "feed", file.name, data)
    return found


def _tell(run_name: str, address: str | None, method: str, *args: Any) -> Any:
    """One control call. Raises ServiceError if no such run is running there, or if it begins or ends just now."""
    with at(address):
        return ask(running(run_name), method, *args)


def at(address: str | None) -> Any:
    """Be connected to the Ray at `address`, else at RAY_ADDRESS, else to one on this machine."""
    return connected(address or os.environ.get("RAY_ADDRESS") or "auto")


def cluster_resources(address: str) -> dict[str, float]:
    """Resources that the cluster at `address` has or can grow to, as Ray names them."""
    with connected(address):
        return resources()


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Be connected to Ray; yields True if this is a Ray of our own. A connection that was there before stays."""
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        own_token()
    options: Json = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _knock(address)
            ray.init(address=address, **options)
        else:
            # Ray Train asks the dashboard only to clean up after a killed controller; this Ray ends with us anyway
            ray.init("local", include_dashboard=False, **options)
    except AuthenticationError as error:
        raise InputError(
            f"the Ray at {address} asks for a token, and that of this user is missing or another: copy the cluster's"
            " ~/.ray/auth_token here, or set RAY_AUTH_TOKEN"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray answers at {address or 'this machine'} ({error}); start one with `ray start --head`, correct"
            " --address or RAY_ADDRESS, or leave both out for a Ray of our own"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # Ray has no type of its own for a start that takes too long (2.60)
            raise
        raise DeadlineError(
            f"Ray has not started on this machine in its own time ({error}); it is overloaded, perhaps: run the same"
            " command again, or start one with `ray start --head` and name its --address"
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


def resources() -> dict[str, float]:
    """What the cluster has, or can grow to where its head node says so."""
    return grown(ray.cluster_resources())


def running(run_name: str) -> Any:
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


def ask(coordinator: Any, method: str, *args: Any) -> Any:
    """One control call, with errors as our own types."""
    try:
        return ray.get(getattr(coordinator, method).remote(*args), timeout=ANSWER_S)
    except GetTimeoutError as error:
        raise DeadlineError(
            f"the coordinator has not answered `{method}` for {ANSWER_S:g} s; is the head node alive?"
        ) from error
    except RayActorError as error:
        raise ServiceError(f"the coordinator is gone; the same `rlsf run` resumes the run ({error})") from error
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, RlsfError) else error from None
