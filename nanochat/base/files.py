"""Files that several processes read or write: atomic writes, hashes, locks."""

import atexit
import errno
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from nanochat.base.common import UserError, disk_error, notice
from nanochat.base.strangers import open_regular, read_json


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """
    Write `data` to a temporary file beside `path`, flush it to disk and rename it, so that a reader
    sees the old file or the new one but never a partial one. What UTF-8 cannot hold becomes "?".
    Raises UserError if the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data.encode("utf-8", "replace") if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise disk_error(path, e) from e
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # even after Ctrl+C


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as indented JSON, as atomic_write() does."""
    atomic_write(path, json.dumps(value, indent=1) + "\n")


def check_writable(folder: Path) -> None:
    """UserError unless files can be written in a folder, which is created if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as e:
        raise disk_error(folder, e) from e


def sha256_file(path: Path | str) -> str:
    """
    The SHA-256 of a regular file's bytes, as 64 hexadecimal digits. OSError for anything else.
    """
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()  # pyright: ignore


class Hashes:
    """
    The SHA-256 of files, stored in the JSON file `memory` by device, inode, size and times of
    change: a file is read again only if it may have changed. `save` writes `memory`; what is lost
    or damaged there is read again.
    """

    LIMIT = 20_000  # files remembered
    RECENT = 2_000_000_000  # ns; a file that is newer may change again without a later time

    def __init__(self, memory: Path):
        self.memory, self._changed = memory, False
        try:
            stored = read_json(memory).items()
            self._known = {state: digest for state, digest in stored if isinstance(digest, str)}
        except (OSError, ValueError, AttributeError):
            self._known = {}

    def of(self, path: Path) -> str:
        """The SHA-256 of a file's bytes in hexadecimal digits. Raises OSError."""
        s = path.stat()
        state = f"{s.st_dev}:{s.st_ino}:{s.st_size}:{s.st_mtime_ns}:{s.st_ctime_ns}"
        if state not in self._known:
            digest, self._changed = sha256_file(path), True
            if time.time_ns() - max(s.st_mtime_ns, s.st_ctime_ns) <= self.RECENT:
                return digest
            self._known[state] = digest
        return self._known[state]

    def save(self) -> None:
        """Write `memory` if it has changed; nothing happens if its folder cannot be written."""
        if self._changed:
            newest = list(self._known.items())[-self.LIMIT :]
            with suppress(UserError):
                atomic_write(self.memory, json.dumps(dict(newest)))
            self._changed = False


@contextmanager
def locked(path: Path | str, busy: str = "", waiting: str = "") -> Iterator[IO[bytes]]:
    """
    Hold an exclusive lock on the file `path`, which is created if needed; yields the open file. The
    lock ends with the block, or with the process and the children that inherit the open file.
    While another process has the lock, waits, after the notice `waiting`; if `busy` is given,
    raises UserError(busy) instead.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise disk_error(path, e) from e
    with file:
        if not _lock(file, wait=False):
            if busy:
                raise UserError(busy)
            if waiting:
                notice(waiting)
            _lock(file, wait=True)
        yield file


def _lock(file: IO[bytes], wait: bool, whole_process: bool = False) -> bool:
    """
    Lock an open file; False if another process has locked it, unless `wait`. With `whole_process`,
    forked children do not inherit the lock, so that it always ends with the process.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return _lock_on_windows(file, wait)
    lock = fcntl.lockf if whole_process else fcntl.flock
    try:
        lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            return False
        notice(
            f"{file.name} cannot be locked ({e.strerror}): do not start two programs in this "
            "folder at the same time"
        )
    return True


def _lock_on_windows(file: IO[bytes], wait: bool) -> bool:
    import msvcrt

    file.seek(1 << 30)  # a byte that nobody reads
    while True:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore
        except OSError:
            if not wait:
                return False
            time.sleep(0.5)
        else:
            return True


_held: dict[Path, IO[bytes]] = {}  # what reserve() holds in this process


def reserve(path: Path, what: str) -> None:
    """
    Reserve `what` for this process by a lock file at `path`, until release() or the end of the
    process. UserError, with the process that the file names, if another living process has reserved
    it. The file of a dead process does not matter, and a second call in the same process does
    nothing.
    """
    if path in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while path not in _held:
            file = open(path, "a+b")  # noqa: SIM115 (stays open)
            if not _lock(file, wait=False, whole_process=True):
                file.seek(0)
                holder = file.read(1000).decode("utf-8", "replace") or "another process"
                file.close()
                raise UserError(
                    f"{what} is in use by {holder}: wait until that ends, or stop it; "
                    "to start another run, choose another --model_tag"
                )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                _held[path] = file
            else:
                file.close()  # another process has just released it and removed the file
        file, now = _held[path], datetime.now().isoformat(" ", timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
        file.flush()
    except OSError as e:
        raise disk_error(path, e) from e
    if len(_held) == 1:
        atexit.register(release)


def reserved(path: Path) -> bool:
    """Whether a living process, which may be this one, has called reserve() with this path."""
    try:
        if any(os.path.samefile(path, held) for held in _held):
            return True  # opening and closing the file would release the lock
        with open(path, "r+b") as file:
            return not _lock(file, wait=False, whole_process=True)
    except OSError:
        return False


def release() -> None:
    """Release everything that this process has reserved."""
    while _held:
        path, file = _held.popitem()
        with suppress(OSError):  # the folder can no longer be written
            path.unlink(missing_ok=True)  # before the lock ends, while no one else can have it
        file.close()
        with suppress(OSError):  # removes folders that are empty, after a run that did not start
            path.parent.rmdir()
            path.parent.parent.rmdir()
