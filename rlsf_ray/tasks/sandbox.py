"""Code that a model wrote, run against tests in a process of its own.

Covered: processor time, wall-clock time, memory, size and number of files, no new processes, no network, no file but
those of a temporary folder and (to read) Python's own, no environment, no inherited file, output thrown away. The
verdict comes over a pipe with a secret, so that ending early or printing does not look like passing.
Not covered: a fault of CPython, and code that looks for the secret in the frames below its own. The fences are audit
hooks of Python and limits of the kernel, not a virtual machine: they hold what a model writes by accident or for an
easy reward, not an attacker. Numpy and other packages are not there.
Where the kernel lets us, the process also gets a network of its own with nothing in it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from rlsf_ray.tasks.verdict import Verdict

SECONDS = 5.0
MEGABYTES = 512

# Runs inside: takes its orders from standard input, so that no argument or environment has them.
_INSIDE = r"""
import json, os, resource, sys
orders = json.load(sys.stdin)
sys.stdin.close()
folder, secret, pipe = orders["folder"], orders["secret"], orders["pipe"]
for name, limit in orders["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
own = tuple({os.path.realpath(p) + os.sep for p in (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))})
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
refused = ("socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "os.system",
           "os.kill", "os.killpg", "os.putenv", "pty.", "signal.pthread_kill", "resource.", "fcntl.", "mmap.",
           "sys._current_frames", "gc.", "syslog.", "webbrowser.", "sys.settrace", "sys.setprofile")
touching = ("open", "os.", "shutil.", "tempfile.", "glob.", "pathlib.")
def inside(path):
    return os.path.realpath(path).startswith(folder + os.sep) or os.path.realpath(path) == folder
def hook(event, args, refused=refused, touching=touching, own=own, inside=inside, writing=writing):
    if event.startswith(refused):
        raise PermissionError("not allowed here: " + event)
    if event.startswith(touching):
        paths = [a for a in args if isinstance(a, (str, bytes, os.PathLike))]
        flags = args[2] if event == "open" and len(args) > 2 and isinstance(args[2], int) else writing
        looks = event in ("open", "os.listdir", "os.scandir") and not (flags & writing and event == "open")
        for path in paths[:1] if event == "open" else paths:
            path = os.fsdecode(path)
            if not inside(path) and not (looks and os.path.realpath(path).startswith(own)):
                raise PermissionError("no file outside the temporary folder: " + path)
        if event == "open" and args and isinstance(args[0], int):
            raise PermissionError("no file by its number")
def go(source, tests):
    space = {"__name__": "solution"}
    try:
        exec(compile(source, "<solution>", "exec"), space)
        exec(compile(tests, "<tests>", "exec"), space)
        return {"right": True, "reason": ""}
    except MemoryError:
        return {"right": None, "reason": "out of memory"}
    except BaseException as error:
        return {"right": False, "reason": (type(error).__name__ + ": " + str(error))[:200]}
write, dumps = os.write, json.dumps
sys.path[:] = [p for p in sys.path if p]
sys.addaudithook(hook)
found = go(orders["source"], orders["tests"])
write(pipe, (secret + dumps(found)).encode())
"""


def run_tests(source: str, tests: str, *, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Verdict:
    """Does `source` run, and `tests` (assertions) after it? Wrong: an error of either, reported by its name.

    A run that does not end in time, or that the kernel ends, is no wrong answer: `right` is None.
    """
    secret, (reading, writing) = secrets.token_hex(16), os.pipe()
    with tempfile.TemporaryDirectory(prefix="rlsf-check-") as folder:
        orders = {
            "source": source,
            "tests": tests,
            "folder": os.path.realpath(folder),
            "secret": secret,
            "pipe": writing,
            "limits": {
                "RLIMIT_CPU": int(seconds) + 1,
                "RLIMIT_AS": megabytes << 20,
                "RLIMIT_FSIZE": 1 << 20,
                "RLIMIT_NOFILE": 32,
                "RLIMIT_CORE": 0,
            },
        }
        process = subprocess.Popen(
            [*_own_network(), sys.executable, "-I", "-S", "-c", _INSIDE],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writing],
            cwd=folder,
            env={},
            start_new_session=True,
        )
        os.close(writing)
        try:
            process.communicate(json.dumps(orders).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Verdict(None, f"has not ended after {seconds:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it may have started
            process.wait()
            with os.fdopen(reading, "rb") as pipe:
                said = pipe.read(1 << 16).decode(errors="replace")
        return _verdict(said, secret, process.returncode)


def _verdict(said: str, secret: str, status: int) -> Verdict:
    if not said.startswith(secret):
        if status < 0:
            return Verdict(None, f"ended by {signal.Signals(-status).name}")
        return Verdict(False, f"left before the tests, with exit status {status}")
    found = json.loads(said.removeprefix(secret))
    return Verdict(found["right"], found["reason"])


def _own_network() -> list[str]:
    """A prefix that gives the process an empty network, where that is allowed and quick to know."""
    global _PREFIX
    if _PREFIX is None:
        asked = ["unshare", "--net", "--map-root-user"]
        try:
            able = subprocess.run([*asked, "true"], capture_output=True, timeout=5.0, check=False).returncode == 0
        except (OSError, subprocess.SubprocessError):
            able = False
        _PREFIX = asked if able else []
    return _PREFIX


_PREFIX: list[str] | None = None
