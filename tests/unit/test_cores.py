"""The cores of a node: one actor computes at a time, unless the config divides them."""

import os
import subprocess
import sys
import threading

import pytest

from actors import cores as module
from actors.cores import Cores
from rlsf_ray.config_sections import PoolConfig

HOLD = (
    "import sys, tempfile; tempfile.tempdir = sys.argv[1]; from rlsf_ray.config_sections import PoolConfig\n"
    "from actors.cores import Cores\n"
    "with Cores(PoolConfig()).turn(): print(flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def holder(tmp_path):
    """Another process that computes on all cores, until its input ends."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=pipe, stdout=pipe) as process:
        assert process.stdout.readline()
        yield process
        process.kill()


def test_a_second_actor_waits_for_the_first(holder, monkeypatch):
    order = []
    real = module.fcntl.flock

    def flock(file, how):
        try:
            real(file, how)
            order.append("got")
        except BlockingIOError:
            order.append("busy")
            holder.stdin.close()
            raise

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with Cores(PoolConfig()).turn():
        order.append("computes")
    assert order == ["busy", "got", "computes"]


@pytest.mark.parametrize("pool", [PoolConfig(threads=1), PoolConfig(gpus=0.5)])
def test_whoever_has_cores_of_its_own_or_a_gpu_does_not_wait(holder, pool):
    with Cores(pool).turn():
        assert holder.poll() is None  # still holds them


def test_an_error_frees_the_cores(tmp_path):
    with pytest.raises(ValueError, match="x"), Cores(PoolConfig()).turn():
        raise ValueError("x")
    with Cores(PoolConfig()).turn():
        pass


def test_a_lock_that_cannot_be_had_does_not_stop_the_work(tmp_path, caplog):
    (tmp_path / f"rlsf-cores-{os.getuid()}.lock").mkdir()
    with Cores(PoolConfig()).turn():
        pass
    assert "computing beside other actors" in caplog.text


def test_a_long_wait_names_who_has_the_cores(holder, monkeypatch, caplog):
    monkeypatch.setattr(module, "LATE_S", 0.05)
    threading.Timer(1.0, holder.stdin.close).start()
    with Cores(PoolConfig()).turn():
        pass
    assert f"process {holder.pid} has them" in caplog.text


def test_the_calls_of_one_actor_share_its_turn_and_the_last_ends_it(tmp_path):
    ours, theirs = Cores(PoolConfig()), Cores(PoolConfig())
    got = threading.Event()

    def other():
        with theirs.turn():
            got.set()

    waiting = threading.Thread(target=other)
    with ours.turn():
        with ours.turn():
            waiting.start()
        assert not got.wait(0.3)
    waiting.join(60)
    assert got.is_set()
