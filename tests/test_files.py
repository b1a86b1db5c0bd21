"""files: atomic writes leave no partial file; a lock is held by one process at a time."""

import subprocess
import sys

import pytest

from nanochat.base.common import UserError
from nanochat.base.files import atomic_write, locked, sha256_file

HOLD = """
import sys
from nanochat.base.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.txt"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]
    assert sha256_file(path).startswith("11507a0e2f5e69d5")


def test_a_refused_write_keeps_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match=r"No space left.*NANOCHAT_BASE_DIR"):
        atomic_write(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_lock_excludes_other_processes(tmp_path):
    path = tmp_path / "deep" / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="in use"), locked(path, busy="in use"):
        pass
    holder.communicate(b"")
    with locked(path, busy="in use"):  # free again once its holder has ended
        pass
