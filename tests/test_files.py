"""files: atomic writes leave no partial file; a lock is held by one process at a time."""

import importlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.base.common import UserError
from nanochat.base.files import (
    atomic_write,
    check_writable,
    locked,
    release,
    reserve,
    sha256_file,
)
from nanochat.data.tokenizer import Tokenizer
from nanochat.plan import probe

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


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    atomic_write(tmp_path / "a.txt", "caf\udce9")  # from the name of a file that is not UTF-8
    assert (tmp_path / "a.txt").read_bytes() == b"caf?"


def test_a_refused_write_keeps_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match=r"No space left.*NANOCHAT_BASE_DIR"):
        atomic_write(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files")
@pytest.mark.parametrize("where", ["/proc/self", "/proc/new", "a file", "below a file"])
def test_a_folder_that_takes_no_files_is_refused_before_any_work(tmp_path, monkeypatch, where):
    (tmp_path / "a file").write_text("")
    known = {"a file": tmp_path / "a file", "below a file": tmp_path / "a file" / "b"}
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(known.get(where, where)))
    monkeypatch.setattr(Tokenizer, "train", lambda *_: pytest.fail("it was trained"))
    monkeypatch.setattr(probe, "grid", lambda *_: pytest.fail("it was measured"))
    for command in (["tok_train", "--data=tinyworld@1"], ["plan", "probe", "--device_type=cpu"]):
        with pytest.raises(UserError, match=r"NANOCHAT_BASE_DIR"):
            importlib.import_module(f"nanochat.commands.{command[0]}").main(command[1:])
    with pytest.raises(UserError, match="cannot write"):
        check_writable(Path(known.get(where, where)))


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


RESERVE = """
import os, sys, time
from pathlib import Path
from nanochat.base.files import release, reserve
reserve(Path(sys.argv[1]), "the run t")
if sys.argv[2] == "with a child" and os.fork() == 0:
    time.sleep(60)
print(os.getpid(), flush=True)
sys.stdin.read()
release() if sys.argv[2] == "released" else os._exit(1)
"""


def holder(path: Path, how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", RESERVE, str(path), how]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert int(process.stdout.readline()) == process.pid
    return process


@pytest.mark.parametrize("how", ["released", "killed", "ended", "with a child"])
def test_a_run_is_reserved_by_one_living_process(tmp_path, how):
    """However it ended, a process that is dead does not keep a run, nor do its children."""
    path = tmp_path / "base" / ".t.lock"
    other = holder(path, how)
    says = rf"the run t is in use by process {other.pid} on {socket.gethostname()} since 20"
    for _ in range(2):
        with pytest.raises(UserError, match=says):
            reserve(path, "the run t")
    if how in ("killed", "with a child"):
        other.kill()
    other.stdin.close()
    other.wait(60)
    assert path.exists() == (how != "released")
    reserve(path, "the run t")
    reserve(path, "the run t")  # by the same process: nothing to do
    assert f"process {os.getpid()} on" in path.read_text()
    release()
    assert not path.exists()
    if how == "with a child":
        os.killpg(other.pid, signal.SIGKILL)


@pytest.mark.parametrize("lock", ["locked", "reserve"])
def test_a_lock_in_a_folder_that_cannot_be_written(tmp_path, lock):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "lock"
    with pytest.raises(UserError, match=r"cannot write .*lock"):
        if lock == "reserve":
            reserve(path, "the run t")
        else:
            with locked(path):
                pass


def test_where_locks_do_not_exist_the_work_goes_on_with_a_notice(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    reserve(tmp_path / ".t.lock", "the run t")
    release()
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err
