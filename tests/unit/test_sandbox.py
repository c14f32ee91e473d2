"""Code of a model against tests: what passes, what is wrong, what could not be told, and what it may not touch."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from rlsf_ray.errors import InputError
from rlsf_ray.records import Check
from rlsf_ray.tasks import sandbox
from rlsf_ray.tasks.checks import check_answer
from rlsf_ray.tasks.sandbox import run_tests

RIGHT = "def add(a, b):\n    return a + b"


def test_right_and_wrong_code_are_told_apart_with_the_reason() -> None:
    assert run_tests(RIGHT, "assert add(1, 2) == 3").right is True
    wrong = run_tests(RIGHT, "assert add(1, 2) == 4, 'one and two'")
    assert (wrong.right, wrong.reason) == (False, "AssertionError: one and two")
    assert run_tests("def add(a, b) return", "").reason.startswith("SyntaxError")
    assert run_tests("", "add(1, 2)").reason.startswith("NameError")


def test_the_standard_library_and_the_own_folder_can_be_used() -> None:
    source = (
        "import collections, dataclasses, functools, heapq, itertools, json, math, random, re, string, typing\n"
        "Point = collections.namedtuple('Point', 'x y')\n"
        "open('a.txt', 'w').write('kept')\n"
    )
    found = run_tests(source, "assert Point(1, 2).y == 2 and open('a.txt').read() == 'kept'")
    assert (found.right, found.reason) == (True, "")


def test_a_class_finds_the_module_that_it_stands_in() -> None:
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int"
    assert run_tests(source, "assert A(1).x == 1").right is True


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("while True: pass", "has not ended after 1 s"),
        ("x = ' ' * (1 << 31)", "out of memory"),
        ("import os; os.abort()", "ended by SIGABRT"),
    ],
)
def test_what_does_not_end_by_itself_is_no_wrong_answer(source: str, reason: str) -> None:
    found = run_tests(source, "", seconds=1.0)
    assert (found.right, found.reason) == (None, reason)


@pytest.mark.parametrize(
    "source",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import os; os.write(1, b'passed')",
        "import sys; sys.exit()",
        "import builtins; builtins.exec = lambda *a: None",
        "import builtins; builtins.compile = lambda *a: ''",
        "import __main__; __main__.write(__main__.pipe, b'')",
    ],
)
def test_leaving_early_is_not_passing(source: str) -> None:
    assert run_tests(source, "assert False").right is False


FORK = (  # the call below subprocess, of which no audit event tells
    "import os, _posixsubprocess as p; a, b = os.pipe()\n"
    "p.fork_exec([b'/usr/bin/touch', b'/tmp/rlsf-outside'], [b'/usr/bin/touch'], True, (), None, None, -1, -1, -1, -1,"
    " -1, -1, a, b, False, False, -1, None, None, None, -1, None, False)"
)


@pytest.mark.parametrize(
    "source",
    [
        "open('/etc/passwd').read()",
        "open('../outside', 'w')",
        "import os; os.open('/etc/passwd', os.O_RDONLY)",
        "import os; os.listdir('/')",
        "import os; os.mkdir('/tmp/outside')",
        "import os; os.symlink('/etc/passwd', 'here')",
        "import os; os.fork()",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
        "import ctypes; ctypes.CDLL(None)",
        "import pathlib; pathlib.Path('/etc/passwd').read_text()",
        "import shutil; shutil.rmtree('/tmp')",
        "import os; os.path.realpath = lambda p, **k: os.getcwd()\nopen('/etc/passwd')",
        "import sqlite3; sqlite3.connect('/tmp/outside.db')",
        "import os; os.mkdir('a'); os.chdir('a'); os.open('../..', os.O_RDONLY, dir_fd=os.open('.', os.O_RDONLY))",
        'import _xxsubinterpreters as s; s.run_string(s.create(), \'open("/tmp/rlsf-outside", "w")\')',
        'import _interpreters as s; s.exec(s.create(), \'open("/tmp/rlsf-outside", "w")\')',
        "import readline; readline.write_history_file('/tmp/rlsf-outside')",
        "import pwd; pwd.getpwall()",
        FORK,
        "import sys; sys.modules.pop('_posixsubprocess', None)\n" + FORK,
    ],
)
def test_files_processes_and_the_network_are_out_of_reach(source: str) -> None:
    found = run_tests(source, "")
    assert found.right is False
    assert found.reason.startswith(("PermissionError", "ImportError")), found
    assert not os.path.exists("/tmp/rlsf-outside")


def test_files_of_other_kinds_cannot_be_made(tmp_path: Path) -> None:
    found = run_tests(f"import os; os.mkfifo({str(tmp_path / 'pipe')!r})", "")
    assert found.right is False
    assert os.listdir(tmp_path) == []


def test_what_is_the_check_s_own_fault_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the tests of a check of code are not Python"):
        run_tests(RIGHT, "assert add(1, 2 ==")
    monkeypatch.setattr(sandbox, "_PREFIX", ["false"])
    assert run_tests(RIGHT, "").right is None


def test_a_server_on_this_machine_hears_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        found = run_tests(f"import _socket; s = _socket.socket(); s.connect(('127.0.0.1', {port}))", "")
        assert (found.right, found.reason) == (False, "PermissionError: not allowed here: socket.__new__")
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_environment_is_seen_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run_tests("import os", "assert 'A_SECRET' not in os.environ").right is True
    before, files = set(psutil.Process().children(recursive=True)), psutil.Process().num_fds()
    run_tests("import time; open('left', 'w'); time.sleep(60)", "", seconds=0.5)
    time.sleep(0.2)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert psutil.Process().num_fds() == files
    assert os.listdir(tmp_path) == []


def test_a_check_of_code_takes_the_last_block() -> None:
    check = Check(kind="code", data={"tests": "assert add(1, 2) == 3"})
    answer = f"First:\n```python\nadd = None\n```\nThen:\n```python\n{RIGHT}\n```\nDone."
    assert check_answer(check, answer).right is True
    assert check_answer(check, RIGHT).right is True
    assert check_answer(check, None).reason == "no answer"
    shown = f"The input:\n```json\n[1, 2]\n```\nThe code:\n```python\n{RIGHT}\n```\nIt prints\n```\n3\n```"
    assert check_answer(check, shown).right is True
