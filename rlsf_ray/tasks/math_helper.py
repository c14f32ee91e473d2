"""The helper process behind `equality.AnswerChecker`: `python -m rlsf_ray.tasks.math_helper SECONDS`.

It writes {"ready": true}, then answers each line {"a": ..., "b": ...} with {"equal": bool}, and ends with its input.
sympy can loop in C code that no exception and no thread interrupts, so each comparison runs under a kernel alarm
whose default action ends this process: even an orphan of a killed parent cannot compute for ever. POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys

_MEMORY_BYTES = 2 << 30  # address space; "9^{9^9}" would otherwise take all memory before the deadline


def same_value(a: str, b: str) -> bool:
    """Are two mathematical texts equal after math-verify's parsing, in either order (it is not symmetric)?"""
    from math_verify import parse, verify

    first, second = (
        # Its own time-outs use SIGALRM and are off; without the fallback, unparsed text is never equal.
        parse(f"${text.replace('**', '^')}$", parsing_timeout=None, fallback_mode="no_fallback")
        for text in (a, b)
    )
    return any(verify(x, y, timeout_seconds=None) for x, y in ((first, second), (second, first)))


def main() -> None:
    limit_s = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes our input
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # a system that knows no such limit goes without
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    import math_verify  # noqa: F401  (slow: before "ready", so that no comparison pays for it)

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the time-outs we switched off
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        equal = same_value(request["a"], request["b"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps({"equal": equal}) + "\n")


if __name__ == "__main__":
    main()
