"""Code that a model wrote, run against tests in a process of its own.

Covered: processor time, wall-clock time, memory, size of each file and files open at once, no new processes, no
network, no file but those of a temporary folder and (to read) Python's own, no environment, no inherited file, output
thrown away. The verdict comes over a pipe with a secret, so that ending early or printing does not look like passing.
Not covered: whether a path is there, and its size and times (os.stat, os.readlink); a fault of CPython; code that looks
for the secret in the frames below its own, or breaks the standard library under the fence; an answer whose own __eq__
says yes to everything; how many files it writes; code that raises MemoryError itself, which counts as out of memory;
code that makes built-in modules anew (posix, pwd) to get back what is taken out of them, or signals a process by a
descriptor of it (signal.pidfd_send_signal). The fences are audit hooks of Python and limits of the kernel, not a
virtual machine: they hold what a model writes by accident or for an easy reward, not an attacker. Numpy and other
packages are not there, nor sockets (so no asyncio, subprocess or unittest.mock) or databases.
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

from rlsf_ray.errors import InputError
from rlsf_ray.tasks.verdict import Verdict

SECONDS = 5.0
MEGABYTES = 512

# Runs inside: takes its orders from standard input, so that no argument or environment has them, and leaves none of its
# own names where the solution finds them by looking about.
_INSIDE = r"""
def main():
    import json, os, resource, sys, types
    orders = json.load(sys.stdin)
    sys.stdin.close()
    folder, secret, pipe = orders["folder"], orders["secret"].encode(), orders["pipe"]
    for name, limit in orders["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    own = tuple({os.path.realpath(p) + os.sep for p in (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))})
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    refused = ("socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "os.system",
               "os.kill", "os.killpg", "os.putenv", "pty.", "signal.pthread_kill", "resource.", "fcntl.", "mmap.",
               "sys._current_frames", "gc.", "syslog.", "webbrowser.", "sys.settrace", "sys.setprofile", "sqlite3.",
               "cpython.PyInterpreterState_New")  # an interpreter within has no hook
    unheard = ("_posixsubprocess", "_posixshmem", "_multiprocessing", "readline", "pwd", "spwd", "grp", "nis", "_dbm",
               "_gdbm", "_xxsubinterpreters", "_interpreters", "_testcapi", "_testinternalcapi")  # no event tells
    touching = ("open", "os.", "shutil.", "tempfile.", "glob.", "pathlib.")
    realpath, isdir, fsdecode, paths, null, write, dumps = (
        os.path.realpath, os.path.isdir, os.fsdecode, (str, bytes, os.PathLike), os.devnull, os.write, json.dumps)
    is_a, number, refusal, run, make = isinstance, int, PermissionError, exec, compile
    def inside(path):
        return realpath(path) == folder or realpath(path).startswith(folder + "/")
    def hook(event, args):
        if event.startswith(refused) or (event == "import" and args and args[0] in unheard):
            raise refusal("not allowed here: " + event)
        if not event.startswith(touching):
            return
        if event == "open" and args and is_a(args[0], number):
            raise refusal("no file by its number")
        found = [a for a in args if is_a(a, paths)]
        if event == "open" and found and isdir(found[0]):  # paths that begin there are told without it
            raise refusal("no folder is opened")
        flags = args[2] if event == "open" and len(args) > 2 and is_a(args[2], number) else writing
        looks = event in ("os.listdir", "os.scandir") or (event == "open" and not flags & writing)
        for path in found[:1] if event == "open" else found:
            path = fsdecode(path)
            if path != null and not inside(path) and not (looks and realpath(path).startswith(own)):
                raise refusal("no file outside the temporary folder: " + path)
    tests = make(orders.pop("tests"), "<tests>", "exec")
    source = orders.pop("source")
    def no_process(*args):
        raise refusal("not allowed here: fork_exec")
    import _posixsubprocess
    _posixsubprocess.fork_exec = no_process
    for name in ("mknod", "mkfifo", "chroot", "unshare", "setns"):
        if hasattr(os, name):
            delattr(os, name)
            delattr(sys.modules["posix"], name)
    for name in unheard:
        sys.modules.pop(name, None)
    sys.path[:] = [p for p in sys.path if p]
    sys.modules["__main__"] = types.ModuleType("__main__")
    write(pipe, secret)  # from here on what goes wrong is the solution's doing
    sys.addaudithook(hook)
    solution = sys.modules["solution"] = types.ModuleType("solution")  # classes look for their module by its name
    space = solution.__dict__
    try:
        run(make(source, "<solution>", "exec"), space)
        run(tests, space)
        found = {"right": True, "reason": ""}
    except MemoryError:
        found = {"right": None, "reason": "out of memory"}
    except BaseException as error:
        try:
            text = type(error).__name__ + ": " + str(error)
        except BaseException:
            text = type(error).__name__
        found = {"right": False, "reason": text[:200]}
    write(pipe, secret + dumps(found).encode())
main()
"""


def check_tests(tests: str) -> None:
    """Raises InputError for tests that are not Python."""
    try:
        compile(tests, "<tests>", "exec")
    except (SyntaxError, ValueError, TypeError) as error:
        raise InputError(f"the tests of a check of code are not Python: {error}; correct them") from error


def run_tests(source: str, tests: str, *, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Verdict:
    """Does `source` run, and `tests` (assertions) after it? Wrong: an error of either, reported by its name.

    A run that does not begin or end in time, or that the kernel ends, is no wrong answer: `right` is None. Raises
    InputError for tests that are not Python.
    """
    check_tests(tests)
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
        return Verdict(None, f"could not be run: exit status {status}")
    found = said.removeprefix(secret)
    if not found.startswith(secret):
        if status < 0:
            return Verdict(None, f"ended by {signal.Signals(-status).name}")
        return Verdict(False, f"left before the tests, with exit status {status}")
    told = json.loads(found.removeprefix(secret))
    return Verdict(told["right"], told["reason"])


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
