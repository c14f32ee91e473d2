"""Whole files or none: what a full disk leaves behind."""

import errno
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from rlsf_ray import storage as storage_module
from rlsf_ray.errors import InputError, StorageError
from rlsf_ray.storage import Storage


@contextmanager
def full_disk():
    """Files of this process cannot grow beyond 4 KiB: the same path through the code as a full disk.

    Not a fixture: pytest's own output may go to a file, and it writes before fixtures are taken down.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_with_its_cure_and_keeps_what_was_committed(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("state.json", b"old")
    with pytest.raises(StorageError, match=r"cannot write .*state\.json: no space left.*Free space"), full_disk():
        storage.write("state.json", b"x" * 5000)
    assert storage.read("state.json") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]  # the unfinished file is gone


def test_an_append_that_did_not_fit_is_taken_back(tmp_path):
    storage = Storage(str(tmp_path))
    storage.append("a.jsonl", b"1\n")
    with pytest.raises(StorageError, match="no space left"), full_disk():
        storage.append("a.jsonl", b"x" * 5000)
    assert storage.read("a.jsonl") == b"1\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_kernels_own_no_space_error_is_recognised(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="no space left"):
        Storage(str(tmp_path)).append("a.jsonl", b"1\n")


def test_a_torn_last_line_is_dropped_and_whole_ones_stay(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"1\n2\n{torn")
    storage = Storage(str(tmp_path))
    storage.append("a.jsonl", b"3\n", separator=b"\n")
    storage.append("a.jsonl", b"4\n", separator=b"\n")
    assert storage.read("a.jsonl") == b"1\n2\n3\n4\n"


def test_a_folder_has_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_LOCK_WAIT_S", 0.0)
    refused = pytest.raises(InputError, match=r"another run works in .*--run name")
    with Storage(str(tmp_path)).lock(), refused, Storage(str(tmp_path)).lock():
        pass
    with Storage(str(tmp_path)).lock():
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = "import sys; from rlsf_ray.storage import Storage; lock = Storage(sys.argv[1]).lock(); lock.__enter__()"
    code += "; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline()
        holder.kill()
    with Storage(str(tmp_path)).lock():
        pass


@pytest.mark.parametrize(("code", "goes_on"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_no_hindrance_but_a_broken_one_is(tmp_path, monkeypatch, code, goes_on):
    def flock(*args):
        raise OSError(code, "no")

    monkeypatch.setattr(storage_module.fcntl, "flock", flock)
    with nullcontext() if goes_on else pytest.raises(StorageError, match="cannot lock"), Storage(str(tmp_path)).lock():
        pass


def test_the_use_of_a_disk_is_a_share_and_unknown_at_a_url(tmp_path: Path) -> None:
    used = Storage(str(tmp_path)).used()
    assert used is not None
    assert 0.0 < used < 1.0
    assert Storage("memory://anything").used() is None


class NoCredentialsError(Exception):
    """As botocore has one: no OSError."""


@pytest.mark.parametrize("use", ["read", "names", "write"])
def test_an_object_store_s_own_errors_are_named_with_the_file(monkeypatch, use):
    storage = Storage("memory://errors/run")

    def fails(*args, **kwargs):
        raise NoCredentialsError("Unable to locate credentials")

    for method in ("cat_file", "ls", "pipe_file"):
        monkeypatch.setattr(type(storage._fs), method, fails)
    call = {"read": lambda: storage.read("a"), "names": lambda: storage.names("a")}
    with pytest.raises(StorageError, match=r"memory://errors/run/a: NoCredentialsError: Unable .*credentials here"):
        call.get(use, lambda: storage.write("a", b""))()


def test_a_url_has_one_run_at_a_time_and_a_dead_one_s_lease_runs_out(monkeypatch):
    monkeypatch.setattr(storage_module, "_LEASE_BEAT_S", 0.2)
    storage, other = Storage("memory://leased/run"), Storage("memory://leased/run")
    refused = pytest.raises(InputError, match=rf"another run works in memory://leased/run \(.*process {os.getpid()}\)")
    with storage.lock(), refused, other.lock():
        pass
    with other.lock():
        pass
    assert storage.read(".lock") is None
    storage.write(".lock", b"host, process 1, killed")
    began = time.monotonic()
    with other.lock():
        assert time.monotonic() - began > 0.6


def test_of_two_runs_that_begin_at_a_url_at_once_one_goes_on(monkeypatch):
    monkeypatch.setattr(storage_module, "_LEASE_BEAT_S", 0.2)
    storage = Storage("memory://raced/run")
    whole = type(storage).write

    def write(self, name, data):
        whole(self, name, data)
        whole(self, name, b"elsewhere, process 7, first beat")  # the other's, at once

    monkeypatch.setattr(type(storage), "write", write)
    with pytest.raises(InputError, match=r"another run works in .* \(elsewhere, process 7\)"), storage.lock():
        pass


def test_a_run_that_was_away_for_too_long_hears_that_another_has_its_lease(monkeypatch):
    monkeypatch.setattr(storage_module, "_LEASE_BEAT_S", 0.2)
    storage, other = Storage("memory://stalled/run"), Storage("memory://stalled/run")
    with storage.lock():
        storage.check_lock()
        other.write(".lock", b"elsewhere, process 7, 0123")
        time.sleep(0.5)
        with pytest.raises(StorageError, match=r"another run works there \(elsewhere, process 7\); that one goes on"):
            storage.check_lock()
    assert other.read(".lock") == b"elsewhere, process 7, 0123"
