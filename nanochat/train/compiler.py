"""
torch.compile for training: counts the seconds it takes, delays signals until it has finished, and
continues without compiled code if it fails.

Compiled code is stored on disk, so that only the first run with a shape waits for the compiler. A
compiler that was killed can leave an incomplete file there, which torch would load every time.
Damaged files are therefore removed before a run compiles. If the compiler fails nevertheless, all
stored code is removed and it is run again; after a second failure the run continues without it.
"""

import contextvars
import logging
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanochat.base.common import UserError, base_dir, counted, notice, unstoppable
from nanochat.base.files import check_writable
from nanochat.base.hardware import usable_cpus
from nanochat.base.runtime import out_of_memory
from nanochat.model.gpt import GPT

T = TypeVar("T")
FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # the environment variable with the folder of compiled code
# The folders that torch makes there: two characters of a hash, and these names
ENTRY = re.compile(r"[a-z0-9]{2}|fxgraph|aotautograd|precompiled_headers|triton|locks|cache")
# The signals that stop a program; Windows has no SIGHUP
STOPPING = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]


class _Abandoned(Exception):
    """Ends a compilation in the background whose run will not start."""


class _Watch:
    """Follows the compiler in this process through torch's callbacks."""

    def __init__(self):
        self.seconds = 0.0  # of compilations that are not ahead
        self.failed = False  # not the exception: its traceback would keep tensors alive
        self.began: dict[threading.Thread, float] = {}  # when a thread's compilation started
        self.masks: dict[threading.Thread, Any] = {}  # its signal mask before that

    def install(self) -> None:
        """Register start and end with torch, which forgets them at torch.compiler.reset()."""
        from torch._dynamo.callback import callback_handler as handler

        if self.start not in handler.start_callbacks:
            handler.register_start_callback(self.start)
            handler.register_end_callback(self.end)

    def start(self, *_: Any) -> None:
        thread = threading.current_thread()
        if isinstance(thread, Ahead) and thread.abandoned:
            raise _Abandoned
        self.began[thread] = time.monotonic()
        self.masks[thread] = hold_back_signals()

    def end(self, *_: Any) -> None:
        thread = threading.current_thread()
        seconds = time.monotonic() - self.began.pop(thread, time.monotonic())
        if not isinstance(thread, Ahead):
            self.seconds += seconds
        self.failed = self.failed or sys.exc_info()[1] is not None
        mask = self.masks.pop(thread, None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def hold_back_signals() -> Any:
    """
    Block the signals that stop a program, in this thread and in the C++ compilers that it starts:
    Ctrl+C in a terminal would kill those too, which leaves incomplete files. Returns the signal
    mask as it was before; None on systems without signal masks.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return None
    return signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


_watch = _Watch()


def seconds() -> float:
    """The seconds for which this process has waited for the compiler."""
    return _watch.seconds


def _try_vector_instructions() -> None:
    """
    Have torch find out, with a C++ compiler, which vector instructions work here. In a thread of
    its own, this needs no time of its own: the model is traced meanwhile.
    """
    from torch._inductor import cpu_vec_isa

    hold_back_signals()
    cpu_vec_isa.valid_vec_isa_list()


def prepare(model: GPT) -> None:
    """Have a model run compiled code from now on, after removing damaged files from its folder."""
    remove_damaged(writable_cache())
    if (
        model.embed.weight.device.type == "cpu"
        and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ
    ):
        from torch._inductor import config

        threading.Thread(target=_try_vector_instructions, daemon=True).start()
        # A block and the head are about 25 small C++ files, of which threads compile several at
        # once. The worker processes that Triton needs would cost more time than they save.
        os.environ.setdefault("TORCH_WARM_POOL", "0")
        threads = min(8, usable_cpus())
        config.compile_threads = threads  # pyright: ignore[reportAttributeAccessIssue]
        # Hides a warning that the CUDA toolkit is missing, which only GPUs need
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    model.compile()
    _watch.install()


def forget_shapes() -> None:
    """
    Drop all compiled code in memory, when batches have another shape from now on: torch compiles
    only a limited number of shapes.
    """
    torch.compiler.reset()
    _watch.install()


def cache_folder() -> Path:
    """
    The folder of compiled code: FOLDER if it is set, else one in the base folder. If torch could
    not handle that path, because it splits command lines at spaces, torch's own default.
    """
    if not os.environ.get(FOLDER):
        ours = base_dir() / "compiled"
        if not re.fullmatch(r"[\w./+-]+", str(ours), re.ASCII):
            from torch._inductor.runtime.cache_dir_utils import default_cache_dir

            return Path(default_cache_dir())
        os.environ[FOLDER] = str(ours)
    return Path(os.environ[FOLDER])


def writable_cache() -> Path:
    """The folder of compiled code; a temporary one, and a notice, if it cannot be written."""
    folder = cache_folder()
    try:
        check_writable(folder)
        return folder
    except UserError as e:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="nanochat-compiled-")
        notice(f"{e}; compiled code of this run goes to {os.environ[FOLDER]}")
        return Path(os.environ[FOLDER])


def remove_damaged(folder: Path) -> int:
    """Remove incomplete libraries, with a notice, and return their number."""
    damaged = [path for path in folder.glob("*/**/*.so") if not _is_complete(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    if damaged:
        files = counted(len(damaged), "damaged files")
        notice(f"removed {files} of an interrupted compilation from {folder}")
    return len(damaged)


def _is_complete(library: Path) -> bool:
    """
    Whether an ELF library has as many bytes as its header says. True for what cannot be judged:
    other formats (on Linux, all are ELF), other word sizes, unreadable files.
    """
    try:
        size = library.stat().st_size
        with open(library, "rb") as file:
            head = file.read(64)
    except OSError:
        return True
    if size < 64:
        return False
    if head[:4] != b"\x7fELF":
        return sys.platform != "linux"
    if head[4] != 2 or head[5] != 1:  # not of 64 bits, or not little-endian
        return True
    (begin,) = struct.unpack_from("<Q", head, 40)  # of the section table, at the file's end
    entry_size, entries = struct.unpack_from("<HH", head, 58)
    return begin + entry_size * entries <= size


def remove_all(folder: Path) -> None:
    """Remove all compiled code, in torch's folder and in this process."""
    from torch._inductor import utils

    for path in folder.iterdir() if folder.is_dir() else ():
        if ENTRY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    forget_shapes()
    clear = getattr(utils, "clear_caches", None)
    if clear is not None:
        clear()


def guarded(model: GPT, work: Callable[[], T]) -> T:
    """
    The result of work(), which may run the model's compiled code and must be repeatable. If the
    compiler fails, everything is compiled again, from an empty folder; if it fails again, the model
    runs without compiled code from then on. Other errors are raised.
    """
    for attempt in range(3):
        _watch.failed = False
        try:
            return work()
        except Exception as e:
            failed = _watch.failed and not isinstance(e, _Abandoned)
            if not model.compiled or not failed or out_of_memory(e):
                raise
            reason = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:160]}"
        if attempt == 0:
            notice(f"the compiler failed ({reason}): compiling again from an empty cache")
            remove_all(cache_folder())
        else:
            notice(f"the compiler failed again ({reason}): running without torch.compile")
            model.compiled = False
    raise AssertionError("the attempt without compiled code returns or raises")


class Ahead(threading.Thread):
    """Compiles a training step while a run is being opened, for one batch shape."""

    current: "Ahead | None" = None  # a process compiles ahead for one run at a time

    def __init__(self, model: GPT, rows: int, sequence_len: int):
        super().__init__(daemon=True)
        self.error: Exception | None = None
        self.ended, self.abandoned = threading.Event(), False
        self.model, device = model, model.embed.weight.device
        self.ids = torch.zeros(rows, sequence_len, dtype=torch.int64, device=device)
        # torch's settings for the compiler hold in the thread that made them, or in a copy of its
        # context
        self.settings = contextvars.copy_context()
        self.start()

    def run(self) -> None:
        self.settings.run(self._compile)

    def _compile(self) -> None:
        model, ids = self.model, self.ids
        try:
            if ids.device.type == "cuda":
                torch.cuda.set_device(ids.device)  # which is the first GPU in every new thread
            guarded(model, lambda: model.loss(ids, ids).backward())
        except Exception as e:  # wait() raises it
            # An error holds what the failed step had in memory. If that was too much, the first
            # step will try fewer rows, and needs it.
            self.error = None if out_of_memory(e) else e
        finally:
            for p in model.parameters():
                p.grad = None
            self.ended.set()

    def abandon(self) -> None:
        """
        End the thread, of which nothing is needed any more: it finishes what it is compiling, or is
        killed when the program ends.
        """
        Ahead.current, self.abandoned = None, True
        if not self.ended.wait(1):
            unstoppable.append(lambda: not self.ended.is_set())

    def wait(self) -> float:
        """
        Wait until the step is compiled; returns the seconds that this took. Raises what the thread
        raised, except when it ran out of memory: the first step will try fewer rows.
        """
        began = time.monotonic()
        self.ended.wait()  # not Thread.join(), which after Ctrl+C takes the thread for ended
        Ahead.current = None
        if self.error is not None:
            raise self.error
        return time.monotonic() - began
