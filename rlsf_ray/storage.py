"""Whole files under one root, a local folder or an fsspec URL: a reader sees the old content or the new, never half.

Locally a file is written beside its target, flushed to disk, then renamed over it. On an object store one put is
atomic by itself. Every failure of the storage becomes a `StorageError` that names the file.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rlsf_ray.errors import InputError, StorageError
from rlsf_ray.redaction import has_user

logger = logging.getLogger(__name__)

_LOCK_WAIT_S = 10.0  # a process that was told to end may still hold the lock
_LEASE_BEAT_S = 5.0  # at a URL; one that nobody has written anew for three beats is free
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}  # some shared file systems: a run goes on without
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk full, quota used up, size limit of the process


class Storage:
    """Files by their name relative to `root`. Raises `InputError` for a root that no file system serves."""

    def __init__(self, root: str) -> None:
        self._fs, self._base = _file_system(root)
        self.local = isinstance(self._fs, LocalFileSystem)
        self.root = self._base if self.local else root.rstrip("/")
        self.lost = ""  # who holds the lease that was ours

    def path(self, name: str) -> str:
        """The absolute path or URL of a file."""
        return f"{self.root}/{name}"

    def write(self, name: str, data: bytes) -> None:
        """Put `data` in place of what was there. A crash at any moment leaves the old content."""
        with self._guard("write", name):
            if not self.local:
                self._fs.pipe_file(self.key(name), data)
                return
            target = Path(self.key(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
                _flush(target.parent)  # else a power cut may still bring the old name back
            except OSError:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise

    def append(self, name: str, data: bytes, *, separator: bytes = b"") -> None:
        """Add `data` at the end. What a crash left behind the last `separator` is dropped first.

        One writer for each name. An object store cannot append, so the file is put anew.
        """
        if not self.local:
            self.write(name, (self.read(name) or b"") + data)
            return
        with self._guard("append to", name):
            target = Path(self.key(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            if separator:
                _drop_torn_end(target, separator)
            with target.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    written = file.write(data)
                    if written != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
                except OSError:
                    with suppress(OSError):
                        file.truncate(size)
                    raise

    def used(self) -> float | None:
        """The share of its disk that is in use; None at a URL, and where the file system does not say."""
        if not self.local:
            return None
        with suppress(OSError):
            disk = shutil.disk_usage(self._base)
            return disk.used / (disk.used + disk.free)
        return None

    @contextmanager
    def lock(self, name: str = ".lock") -> Iterator[None]:
        """Be the only run in this folder. The lock of a dead process is free, at a URL after some seconds.

        Raises InputError if a living process has it. Another `name` is another lock.
        """
        with ExitStack() as held:
            if not self.local:
                held.enter_context(self._lease(name))
                yield
                return
            with self._guard("lock", name):
                Path(self._base).mkdir(parents=True, exist_ok=True)
                file = held.enter_context(Path(self.key(name)).open("a"))
                until = time.monotonic() + _LOCK_WAIT_S
                while not _locked(file.fileno()):
                    if time.monotonic() > until:
                        raise self._taken("a process of this machine")
                    time.sleep(0.2)
            yield

    @contextmanager
    def _lease(self, name: str) -> Iterator[None]:
        """The lock where none is to be had: a file that its holder writes anew at every beat."""
        mine = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex}".encode()
        self._until_free(name)
        self.write(name, mine)
        time.sleep(_LEASE_BEAT_S / 5)
        if (found := self.read(name)) != mine:  # two at once: the last one has it
            raise self._taken(_holder(found))
        over, self.lost = threading.Event(), ""
        beats = threading.Thread(target=self._beat, args=(name, mine, over), daemon=True)
        beats.start()
        try:
            yield
        finally:
            over.set()
            beats.join()
            if not self.lost:
                with suppress(StorageError):  # it runs out by itself
                    self.remove(name)

    def _until_free(self, name: str) -> None:
        """Return once nobody keeps the lease up. Raises InputError if somebody does so for two beats."""
        found, beats, since = self.read(name), 0, time.monotonic()
        while found is not None and time.monotonic() - since < 3 * _LEASE_BEAT_S:
            time.sleep(_LEASE_BEAT_S / 5)
            if (now := self.read(name)) != found:
                found, beats, since = now, beats + 1, time.monotonic()
            if found is not None and beats == 2:
                raise self._taken(_holder(found))

    def _beat(self, name: str, mine: bytes, over: threading.Event) -> None:
        for beat in itertools.count(1):
            if over.wait(_LEASE_BEAT_S):
                return
            try:
                if not (found := self.read(name) or b"").startswith(mine):
                    self.lost = _holder(found)
                    return
                self.write(name, mine + b", beat %d" % beat)
            except StorageError as error:
                logger.warning("the lock of the run directory is not kept up: %s", error)

    def check_lock(self) -> None:
        """Raises StorageError if another run has taken the lease: this one had not kept it up for three beats."""
        if self.lost:
            raise StorageError(
                f"the run directory {self.root} was not reached for too long, and now another run works there"
                f" ({self.lost}); that one goes on: look at it with `rlsf watch`"
            )

    def _taken(self, holder: str) -> InputError:
        return InputError(
            f"another run works in {self.root} ({holder}); expected to be the only one; wait for it, stop it"
            " (`rlsf stop`, or end its process), or give this run another --run name"
        )

    def arrow(self) -> Any:
        """The file system for pyarrow, with paths as in `key`; None for a local folder."""
        if self.local:
            return None
        from pyarrow.fs import FSSpecHandler, PyFileSystem  # takes long to load

        return PyFileSystem(FSSpecHandler(self._fs))

    def key(self, name: str) -> str:
        """A file's path inside its file system, without the URL's scheme."""
        return f"{self._base}/{name}"

    def read(self, name: str) -> bytes | None:
        """The content, or None where there is no such file."""
        with self._guard("read", name):
            try:
                return self._fs.cat_file(self.key(name))
            except FileNotFoundError:
                return None

    def names(self, folder: str) -> list[str]:
        """Base names in a folder, sorted, without unfinished files; empty where there is no such folder."""
        with self._guard("list", folder):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self.key(folder), detail=False)
            except FileNotFoundError:
                return []
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
        return sorted(name for name in names if not name.startswith("."))

    def size(self, folder: str) -> int:
        """Bytes of all files below a folder; 0 where there is none."""
        with self._guard("list", folder):
            self._fs.invalidate_cache()
            try:
                return int(self._fs.du(self.key(folder)))
            except FileNotFoundError:
                return 0

    def remove(self, folder: str) -> None:
        """Take away a folder and all below it, if it is there."""
        with self._guard("remove", folder), suppress(FileNotFoundError):
            self._fs.rm(self.key(folder), recursive=True)

    @contextmanager
    def _guard(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = self.path(name)
            if error.errno in _FULL:
                raise StorageError(
                    f"cannot {verb} {path}: no space left ({error}); what was committed is still readable. Free space"
                    f" on the disk that holds {self.root} (old runs, old folders in checkpoints/), then run the same"
                    " command again to resume"
                ) from error
            raise StorageError(
                f"cannot {verb} {path}: {error}; check that the path exists, is a folder of yours and is reachable"
            ) from error
        except Exception as error:  # an object store's own types, which have no base in common
            if self.local:
                raise
            raise StorageError(
                f"cannot {verb} {self.path(name)}: {type(error).__name__}: {error}; check the URL, the way to it,"
                " and the credentials here and on every node"
            ) from error


def damaged(path: str, why: object, *, needed: bool) -> StorageError:
    """The error for a file whose content cannot be understood. `needed`: the run cannot go on without it."""
    other = "begin a new run" if needed else "delete it and run the same command again"
    return StorageError(f"{path} is damaged or was only half written ({why}); restore it from a copy, or {other}")


def _file_system(root: str) -> tuple[Any, str]:
    if not root.strip() or "\0" in root:
        raise InputError(
            f"the run directory must have a name without NUL characters, got {root!r}; give a folder or a URL like"
            " s3://b/run"
        )
    if "://" not in root:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(root))
    if has_user(root):
        raise InputError(
            "logs and messages name the run directory, got a URL with a user or a password (not shown); give it without"
            " them, and the file system's own credentials in the environment, here and on every node"
        )
    try:
        fs, base = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"no file system for the run directory {root}: {error}; give a folder, or install the fsspec package that"
            " serves this URL (s3fs for s3://, gcsfs for gs://)"
        ) from error
    except Exception as error:  # an object store's own types, such as that of missing credentials
        raise InputError(
            f"no way to the run directory {root}: {type(error).__name__}: {error}; check the URL and the credentials"
            " here and on every node"
        ) from error
    return fs, base.rstrip("/")


def _holder(lease: bytes | None) -> str:
    """Host and process, as `_lease` writes them."""
    return ", ".join((lease or b"?").decode(errors="replace").split(", ")[:2])


def _flush(folder: Path) -> None:
    """Have a folder's names on the disk; not every file system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _drop_torn_end(target: Path, separator: bytes) -> None:
    if not target.exists() or target.stat().st_size == 0:
        return
    with target.open("rb") as file:
        file.seek(-len(separator), os.SEEK_END)
        whole = file.read() == separator
    if not whole:  # only after a crash
        content = target.read_bytes()
        os.truncate(target, content.rfind(separator) + len(separator) if separator in content else 0)
