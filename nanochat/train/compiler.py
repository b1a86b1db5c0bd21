"""
torch.compile as a run uses it: its seconds are counted, signals wait until it has finished, and a
failure costs speed, never the run.

Compiled code is kept on disk, so that only the first run of a shape waits for it. A compiler that
is killed can leave half a file there, which torch would load for ever: damaged files are removed
before a run compiles, a failure removes all the others and compiles once more, and after a second
failure the run continues without compiled code.
"""

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
from torch import Tensor

from nanochat.base.common import UserError, base_dir, notice, unstoppable
from nanochat.base.files import check_writable
from nanochat.base.runtime import out_of_memory
from nanochat.model.gpt import GPT

T = TypeVar("T")
FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # the environment variable that says where torch keeps its code
# What torch writes there: folders by the beginning of a hash, and these
ENTRY = re.compile(r"[a-z0-9]{2}|fxgraph|aotautograd|precompiled_headers|triton|locks|cache")
HELD_BACK = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class _Abandoned(Exception):
    """The run that code is compiled for will not start."""


class _Watch:
    """Follows the compiler of this process through torch's callbacks."""

    def __init__(self):
        self.seconds = 0.0  # in the foreground: something waited for them
        self.background: set[int] = set()  # threads that compile ahead
        self.abandoned = False
        self.failed = False  # not the exception: its traceback would keep tensors alive
        self.began: dict[int, float] = {}
        self.masks: dict[int, Any] = {}

    def install(self) -> None:
        """Have torch call start and end; torch.compiler.reset() forgets it."""
        from torch._dynamo.callback import callback_handler as handler

        if self.start not in handler.start_callbacks:
            handler.register_start_callback(self.start)
            handler.register_end_callback(self.end)

    def start(self, *_: Any) -> None:
        thread = threading.get_ident()
        if self.abandoned and thread in self.background:
            raise _Abandoned
        self.began[thread] = time.monotonic()
        self.masks[thread] = hold_back_signals()

    def end(self, *_: Any) -> None:
        thread = threading.get_ident()
        seconds = time.monotonic() - self.began.pop(thread, time.monotonic())
        if thread not in self.background:
            self.seconds += seconds
        self.failed = self.failed or sys.exc_info()[1] is not None
        mask = self.masks.pop(thread, None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def hold_back_signals() -> Any:
    """
    Block the signals that stop a program, in this thread and in the C++ compilers that it starts:
    Ctrl+C in a terminal would kill those too, and leave half a file behind. Returns the mask that
    was in force; None where there are no masks.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return None
    held = {getattr(signal, name) for name in HELD_BACK if hasattr(signal, name)}
    return signal.pthread_sigmask(signal.SIG_BLOCK, held)


_watch = _Watch()


def seconds() -> float:
    """The seconds for which this process has waited for the compiler."""
    return _watch.seconds


def _try_vector_instructions() -> None:
    """Let torch try with a C++ compiler which vector instructions work, while a model is traced."""
    from torch._inductor import cpu_vec_isa

    hold_back_signals()
    cpu_vec_isa.valid_vec_isa_list()


def prepare(model: GPT) -> None:
    """Let a model run compiled code from now on, out of a folder without damaged files."""
    remove_damaged(writable_cache())
    if (
        model.embed.weight.device.type == "cpu"
        and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ
    ):
        from torch._inductor import config

        threading.Thread(target=_try_vector_instructions, daemon=True).start()
        # A block and the head are about 25 small files: threads start a C++ compiler for several
        # at once. The processes that Triton wants would cost more than they save.
        os.environ.setdefault("TORCH_WARM_POOL", "0")
        threads = min(8, os.cpu_count() or 1)
        config.compile_threads = threads  # pyright: ignore[reportAttributeAccessIssue]
        # It warns of a CUDA toolkit on a machine without a GPU, where nothing here needs one
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    model.compile()
    _watch.install()


def forget_shapes() -> None:
    """Drop the compiled code of shapes that never return: the compiler gives up after eight."""
    torch.compiler.reset()
    _watch.install()


def cache_folder() -> Path:
    """Where compiled code is kept: in the base folder, unless the user names another."""
    if not os.environ.get(FOLDER):
        ours = base_dir() / "compiled"
        if re.fullmatch(
            r"[\w./+-]+", str(ours), re.ASCII
        ):  # torch splits its command lines at spaces
            os.environ[FOLDER] = str(ours)
        else:
            from torch._inductor.runtime.cache_dir_utils import default_cache_dir

            return Path(default_cache_dir())
    return Path(os.environ[FOLDER])


def writable_cache() -> Path:
    """Where compiled code is kept; a temporary folder where the usual one cannot be written."""
    folder = cache_folder()
    try:
        check_writable(folder)
        return folder
    except UserError as e:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="nanochat-compiled-")
        notice(f"{e}; compiled code of this run goes to {os.environ[FOLDER]}")
        return Path(os.environ[FOLDER])


def remove_damaged(folder: Path) -> int:
    """Remove libraries that are not complete, and return their number."""
    damaged = [path for path in folder.glob("*/**/*.so") if not _is_complete(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    if damaged:
        notice(
            f"removed {len(damaged)} damaged file{'s' * (len(damaged) > 1)} of an interrupted "
            f"compilation from {folder}"
        )
    return len(damaged)


def _is_complete(library: Path) -> bool:
    """Whether a shared library has all the bytes that its header speaks of; True if not ELF."""
    try:
        size = library.stat().st_size
        with open(library, "rb") as file:
            head = file.read(64)
    except OSError:
        return True  # it is somebody else's to judge
    if size < 64:
        return False
    if head[:4] != b"\x7fELF":
        return sys.platform != "linux"
    if head[4] != 2 or head[5] != 1:  # not of 64 bits, or not little-endian
        return True
    (begin,) = struct.unpack_from("<Q", head, 40)  # the table of sections is what ends the file
    entry_size, entries = struct.unpack_from("<HH", head, 58)
    return begin + entry_size * entries <= size


def remove_all(folder: Path) -> None:
    """Remove everything that torch keeps in its folder, on disk and in this process."""
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
    The result of work(), which may run the model's compiled code and can be repeated. If it fails
    because the compiler does, everything is compiled again once, from an empty folder; if that
    fails too, the model runs without compiled code from then on.
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


class Ahead:
    """
    Compiles a training step for one shape of batches in a thread, while the run is being opened.
    """

    current: "Ahead | None" = None  # a process compiles ahead for one run at a time

    def __init__(self, model: GPT, rows: int, sequence_len: int):
        self.error: Exception | None = None
        self.ended = threading.Event()
        device = model.embed.weight.device
        ids = torch.zeros(rows, sequence_len, dtype=torch.int64, device=device)
        _watch.abandoned = False
        self.thread = threading.Thread(target=self._compile, args=(model, ids), daemon=True)
        self.thread.start()

    def _compile(self, model: GPT, ids: Tensor) -> None:
        _watch.background.add(threading.get_ident())
        try:
            if ids.device.type == "cuda":
                torch.cuda.set_device(ids.device)  # a thread begins on the first one
            guarded(model, lambda: model.loss(ids, ids).backward())
        except Exception as e:  # wait() raises it
            self.error = e
        finally:
            for p in model.parameters():
                p.grad = None
            _watch.background.discard(threading.get_ident())
            self.ended.set()

    def abandon(self) -> None:
        """Let nobody wait for it: it compiles nothing new, and the program may end meanwhile."""
        Ahead.current, _watch.abandoned = None, True
        if not self.ended.wait(1):
            unstoppable.append(lambda: not self.ended.is_set())

    def wait(self) -> float:
        """
        Return when the step is compiled, with the seconds that this took. Memory that did not
        suffice is left to the first step, which tries fewer rows.
        """
        began = time.monotonic()
        self.ended.wait()  # Thread.join() believes after Ctrl+C that the thread has ended
        Ahead.current = None
        if self.error is not None and not out_of_memory(self.error):
            raise self.error
        return time.monotonic() - began
