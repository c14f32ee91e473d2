"""Do two answers mean the same? Numbers here, mathematics through math-verify in one helper process."""

from __future__ import annotations

import json
import logging
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from fractions import Fraction
from types import TracebackType

from rlsf_ray.algorithms.answers import normalise
from rlsf_ray.errors import ServiceError
from rlsf_ray.records import Json

logger = logging.getLogger(__name__)

_START_S = 60.0  # importing math-verify takes 0.4 s on an idle core
_MAX_LENGTH = 500  # characters; longer texts are compared as text
_DECIMAL = re.compile(r"-?\d*\.?\d+(?:e[-+]?\d{1,3})?")
_RATIO = re.compile(r"-?\d+/\d*[1-9]\d*")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_MATH = re.compile(r"[\d\\+*/^=-]")
# math-verify reads words as products of letters ("listen" = "silent"), "2 3" as the mixed number 5, "1e3" as 3e.
_NOT_MATH = re.compile(
    r"(?<![\\a-zA-Z])(?!(?:sqrt|sin|cos|tan|log|exp)(?![a-zA-Z]))[a-zA-Z]{3,}|\d\s+\d|\de[-+]?\d", re.IGNORECASE
)


class AnswerChecker:
    """Compares answers; a context manager. Safe to share between threads, which then take turns.

    The helper process starts at the first comparison that needs it. If it is not done within `deadline_s` or has
    died, it is replaced, the answers count as not equal, and that is logged.
    """

    def __init__(self, deadline_s: float = 5.0) -> None:
        self.deadline_s = deadline_s
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[bytes] | None = None

    def equal(self, a: str, b: str) -> bool:
        """Numbers by exact value ("1,000" = "1000", "1/2" = "0.5"), words as normalised text, the rest by math-verify.

        Raises ServiceError if the helper process cannot be started.
        """
        a, b = _plain(a), _plain(b)
        plain_a, plain_b = normalise(a), normalise(b)
        if plain_a == plain_b:
            return bool(plain_a)
        number_a, number_b = _number(plain_a), _number(plain_b)
        if number_a is not None and number_b is not None:
            if number_a == number_b:
                return True
            if "/" not in plain_a + plain_b:
                return False  # with a ratio, rounding is math-verify's to judge: 1/3 = 0.333333
        if not (_is_math(a) and _is_math(b)):
            return False
        with self._lock:
            return self._ask(a, b)

    def close(self) -> None:
        """End the helper process, if there is one. The checker can be used again afterwards."""
        with self._lock:
            self._stop()

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _ask(self, a: str, b: str) -> bool:
        if self._helper is None or self._helper.poll() is not None:
            self._start()
        assert self._helper is not None
        assert self._helper.stdin is not None
        request = json.dumps({"a": a, "b": b}).encode() + b"\n"
        try:
            self._helper.stdin.write(request)
            reply = _read_reply(self._helper, self.deadline_s)
        except BrokenPipeError:
            reply = None
        if reply is not None:
            return bool(reply["equal"])
        logger.warning(
            "the helper died or did not compare %.80r with %.80r within %g s: counted as not equal",
            a,
            b,
            self.deadline_s,
        )
        self._stop()
        return False

    def _start(self) -> None:
        self._stop()
        # A Ray worker's import path is not in its environment, so the helper gets it spelled out.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        alarm_s = self.deadline_s + 1.0  # ours comes first; the alarm is for orphans
        self._helper = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlsf_ray.tasks.math_helper", str(alarm_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        if _read_reply(self._helper, _START_S) is None:
            code = self._helper.poll()
            self._stop()
            raise ServiceError(
                f"the answer-checking helper did not start within {_START_S:g} s (exit code {code}); its own message is"
                f" on stderr; try: {sys.executable} -m rlsf_ray.tasks.math_helper 5"
            )

    def _stop(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        helper.kill()  # it holds no state
        helper.wait()
        for pipe in (helper.stdin, helper.stdout):
            if pipe is not None:
                pipe.close()


def _read_reply(helper: subprocess.Popen[bytes], timeout_s: float) -> Json | None:
    """The next line the helper writes, or None if it ends or is silent until the deadline."""
    assert helper.stdout is not None
    end, line = time.monotonic() + timeout_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(helper.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            ready = selector.select(max(0.0, end - time.monotonic()))
            part = os.read(helper.stdout.fileno(), 4096) if ready else b""
            if not part:
                return None
            line += part
    reply: Json = json.loads(line)
    return reply


def _plain(text: str) -> str:
    r"""Without \text{...} and the like around words, and without $ around formulas."""
    return _WRAPPER.sub(r"\1", text).strip().strip("$").strip()


def _number(text: str) -> Fraction | None:
    """Exact value of a decimal, also with an exponent of up to 3 digits, or of a ratio of whole numbers."""
    if len(text) <= _MAX_LENGTH and (_DECIMAL.fullmatch(text) or _RATIO.fullmatch(text)):
        return Fraction(text)
    return None


def _is_math(text: str) -> bool:
    return len(text) <= _MAX_LENGTH and bool(_MATH.search(text)) and not _NOT_MATH.search(text)
