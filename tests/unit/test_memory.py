"""Peak memory counts the process and what it has started."""

import os
import subprocess
import sys
import time

from rlsf_ray.memory import PeakMemory, tree_pss_bytes


def test_a_child_s_memory_counts() -> None:
    before = tree_pss_bytes(os.getpid())
    hold = "import sys; block = bytearray(b'x') * 300_000_000; print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    during = tree_pss_bytes(os.getpid())
    child.communicate()
    assert 290e6 < during - before < 400e6


def test_the_peak_is_the_largest_sample() -> None:
    with PeakMemory(every_s=0.01) as memory:
        block = bytearray(b"x") * 300_000_000
        until = time.monotonic() + 20
        while memory.peak_gb < 0.3 and time.monotonic() < until:
            time.sleep(0.01)
        peak = memory.peak_gb
        del block
    assert memory.peak_gb >= peak > 0.3
