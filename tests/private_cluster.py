"""A place to start and kill whole Ray clusters: a PID namespace of its own, so that nothing outside can be hit."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

# The namespace's first process: says that it stands, then reaps every orphan by ignoring SIGCHLD.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); signal.pause()"


def unavailable() -> str:
    """Why there can be no private PID namespace here; empty where there can."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        return "unshare and nsenter (util-linux) are needed for a private PID namespace"
    tried = subprocess.run(["unshare", "-pf", "--mount-proc", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"a private PID namespace is not permitted here: {tried.stderr.strip()}"


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Shell:
    """One command that runs in the sandbox; its output goes to a file."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self._popen, self._log = popen, log

    def wait(self, seconds: float) -> int:
        """Its exit code, which must come within `seconds`."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds:g} s:\n{self.output}")

    def until(self, ready: Callable[[], Any], seconds: float) -> None:
        """Return once `ready()`, looked at every 20 ms, while this command still runs."""
        end = time.monotonic() + seconds
        while not ready():
            assert self._popen.poll() is None, f"ended too early with {self._popen.returncode}:\n{self.output}"
            assert time.monotonic() < end, f"nothing within {seconds:g} s:\n{self.output}"
            time.sleep(0.02)

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._popen.poll()

    def terminate(self) -> None:
        """SIGTERM to the command itself: nsenter does not pass signals on."""
        os.kill(_only_child(self._popen.pid), signal.SIGTERM)

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")


class Sandbox:
    """A context manager. Its processes share a HOME and a Ray folder of their own, and all die at its end."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder, self._count = folder, 0
        self._ray = tempfile.mkdtemp(prefix="rlsf-", dir="/tmp")  # short: Ray's sockets lie below it
        self._bin = Path(python).parent
        (folder / "home").mkdir(parents=True, exist_ok=True)
        token = folder / "home" / ".ray" / "auth_token"
        token.parent.mkdir(exist_ok=True)
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.bearer = {"Authorization": f"Bearer {token.read_text()}"}  # for HTTP
        self.env = {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "RAY_TMPDIR": self._ray,
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": "200",
        }
        if "PYTHONPATH" in os.environ:
            self.env["PYTHONPATH"] = os.environ["PYTHONPATH"]

    def __enter__(self) -> Sandbox:
        command = ["unshare", "-pf", "--kill-child", "--mount-proc", sys.executable, "-ISc", INIT]
        self._unshare = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._unshare.stdout
        assert self._unshare.stdout.readline() == b"up\n", "the namespace did not start"
        self._init = _only_child(self._unshare.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self._ray, ignore_errors=True)

    def kill(self) -> None:
        """kill -9 of everything inside, at one moment: the kernel ends a namespace with its first process."""
        if self._unshare.poll() is None:
            os.kill(self._init, signal.SIGKILL)
        self._unshare.wait(30)

    def restart(self) -> None:
        """Kill everything, begin an empty namespace with the same folders."""
        self.kill()
        self.__enter__()

    def start(self, *command: str, env: Mapping[str, str] | None = None) -> Shell:
        """Begin a command; its folder is the sandbox's."""
        self._count += 1
        log = self.folder / f"output-{self._count}.txt"
        enter = ["nsenter", "-t", str(self._init), "-p", "-m", f"--wd={self.folder}", "--"]
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [*enter, *command], env=self.env | dict(env or {}), stdout=file, stderr=subprocess.STDOUT
            )
        return Shell(popen, log)

    def run(self, *command: str, env: Mapping[str, str] | None = None, seconds: float = 120.0) -> tuple[int, str]:
        """(exit code, output) of a command."""
        shell = self.start(*command, env=env)
        return shell.wait(seconds), shell.output

    def processes(self) -> list[str]:
        """Command lines of everything that lives inside."""
        ours, found = os.readlink(f"/proc/{self._init}/ns/pid"), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/pid") == ours and int(folder.name) != self._init:
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue  # ended meanwhile
        return found


def _only_child(process: int) -> int:
    (child,) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(child)
