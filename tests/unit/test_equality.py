"""When two answers mean the same, and that no helper process hangs or is left behind."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from rlsf_ray.algorithms.answers import label_answers
from rlsf_ray.tasks.equality import AnswerChecker

HANGS = "1000000000!"  # sympy computes it in one C call that no signal handler interrupts


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker() as checker:
        yield checker


def helper_of(checker: AnswerChecker) -> psutil.Process:
    assert checker._helper is not None
    return psutil.Process(checker._helper.pid)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def wait_until_ended(process: psutil.Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not has_ended(process) and time.monotonic() < end:
        time.sleep(0.05)
    return has_ended(process)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        ("1,000", "1000"),
        ("007", "+7."),
        ("1e3", "1000"),
        ("1/3", "0.333333"),
        ("x+1", "1+x"),
        ("$x + 1$", "1+x"),
        ("2**3", "8"),
        (r"1\frac{1}{2}", "3/2"),
        ("x=3", "3"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("(x-1)(x+1)", "x^2-1"),
        ("50%", "0.5"),
        ("Paris", " paris "),
        (r"\text{blue}", "blue"),
        ("B", "b"),
    ],
)
def test_equal_answers(checker: AnswerChecker, a: str, b: str) -> None:
    assert checker.equal(a, b)
    assert checker.equal(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("12", "21"),
        ("1/2", "0.6"),
        ("1/3", "0.34"),
        ("x+1", "x+2"),
        ("(1,2)", "(2,1)"),
        ("listen", "silent"),
        ("listen-1", "silent-1"),
        ("3 apples", "3 pears"),
        ("2 3", "5"),
        ("1e3", "3e1"),
        ("2**3", "2"),
        ("1/0", "2"),
        ("", ""),
        ("1" * 600, "2" * 600),
        (r"\frac{", r"\sqrt{"),
    ],
)
def test_different_answers(checker: AnswerChecker, a: str, b: str) -> None:
    assert not checker.equal(a, b)
    assert not checker.equal(b, a)


def test_the_checker_serves_the_answer_classes_of_a_group(checker: AnswerChecker) -> None:
    assert label_answers(["1/2", "0.5", None, "3", r"\frac12", "3.0"], checker.equal) == [0, 0, -1, 1, 0, 1]


def test_numbers_and_words_need_no_helper() -> None:
    with AnswerChecker() as checker:
        assert checker.equal("1,000", "1000")
        assert not checker.equal("12", "13")
        assert not checker.equal("cat", "dog")
        assert checker._helper is None


def test_a_hanging_comparison_ends_at_the_deadline_and_the_next_one_works(caplog: pytest.LogCaptureFixture) -> None:
    with AnswerChecker(deadline_s=1.0) as checker:
        assert checker.equal("x+1", "1+x")
        hung = helper_of(checker)
        start = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert not checker.equal(HANGS, "10")
        assert 0.9 < time.monotonic() - start < 3.0
        assert "counted as not equal" in caplog.text
        assert has_ended(hung)
        assert checker.equal("x+1", "1+x")


def test_a_killed_helper_is_replaced() -> None:
    with AnswerChecker() as checker:
        assert checker.equal("x+1", "1+x")
        helper = helper_of(checker)
        helper.kill()
        wait_until_ended(helper, 5)
        assert checker.equal("x+1", "1+x")


def test_threads_share_one_helper(checker: AnswerChecker) -> None:
    verdicts: dict[int, bool] = {}

    def compare(i: int) -> None:
        verdicts[i] = checker.equal(f"x+{i}", f"{i - i % 2}+x")  # equal for even i

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: i % 2 == 0 for i in range(8)}
    assert helper_of(checker).is_running()


def test_close_ends_the_helper() -> None:
    checker = AnswerChecker()
    assert checker.equal("x+1", "1+x")
    helper = helper_of(checker)
    checker.close()
    assert has_ended(helper)
    checker.close()  # a second time does nothing


@pytest.mark.parametrize("last_question", ["1+x", HANGS], ids=["idle", "hanging"])
def test_the_helper_of_a_killed_parent_ends_by_itself(last_question: str) -> None:
    code = (
        "import os, threading, time, signal\n"
        "from rlsf_ray.tasks.equality import AnswerChecker\n"
        "checker = AnswerChecker(deadline_s=1.0)\n"
        "checker.equal('x+1', '2+x')\n"
        "print(checker._helper.pid, flush=True)\n"
        f"threading.Thread(target=checker.equal, args=({last_question!r}, '10'), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    helper_pid = int(done.stdout)
    # idle: the input ends; hanging: the kernel alarm, one second after the deadline of one second
    assert not psutil.pid_exists(helper_pid) or wait_until_ended(psutil.Process(helper_pid), 10)
