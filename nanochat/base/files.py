"""Files that several processes read or write at the same time: atomic writes, hashes, locks."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nanochat.base.common import UserError, disk_error


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """
    Write `data` to a temporary file beside `path`, flush it to disk and rename it, so that a reader
    sees the old file or the new one but never a partial one. Raises UserError if the disk refuses.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data.encode("utf-8") if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, e) from e


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def locked(path: Path | str, busy: str = "") -> Iterator[IO[bytes]]:
    """
    Hold an exclusive lock on the file `path`, which is created if needed; yields the open file. The
    lock ends with the block, or with the process and the children that inherit the open file.
    Waits while another process holds the lock; given `busy`, raises UserError(busy) instead.
    """
    import fcntl  # not available on Windows

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(busy) from None
        yield file
