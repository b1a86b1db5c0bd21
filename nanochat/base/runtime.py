"""
The device, precision, ranks and seed of this process, chosen once by `open_runtime`; nothing else
in the project looks for a device. Training in float16 needs a loss scale (train/loop.py); float32
and bfloat16 do not.
"""

import ctypes
import functools
import gc
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanochat.base import hardware
from nanochat.base.common import RankLost, UserError, notice, out_of_memory, rank, world_size

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
JOINING = timedelta(minutes=5)  # that a rank waits for the others when it starts


@dataclass(frozen=True)
class Runtime:
    """What the rest of the program needs to know about the machine; it never changes."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    seed: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def synchronize(self) -> None:
        """Wait until the device has finished its work, so that a clock can be read."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def reading(self, t: torch.Tensor) -> Callable[[], list[float]]:
        """
        Begin to copy the values of t (n,) to the host; returns a function that waits for them and
        returns them. A GPU can compute meanwhile: what it is given to do before that function is
        called runs after the copy, while the host waits.
        """
        if self.device.type != "cuda":
            return t.tolist
        copy, copied = t.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()

        def values() -> list[float]:
            copied.synchronize()
            return copy.tolist()

        return values

    def peak_memory(self) -> int:
        """The peak in bytes: memory allocated on the GPU, or resident memory of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource  # not available on Windows, where only this figure is missing

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def open_runtime(device_type: str = "auto", dtype: str = "auto", seed: int = 42) -> Runtime:
    """
    Choose the device ("auto", "cpu", "cuda" or "mps") and the compute dtype ("auto", "float32",
    "bfloat16" or "float16"), seed torch, and join the process group that torchrun prepared. Raises
    UserError if the machine does not have what is asked for.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    device = choose_device(device_type)
    on_gpu = device.type == "cuda"
    if device.type == "cpu":
        # In a container, freed memory that is kept counts towards the limit: training keeps it only
        # once it has found how many rows fit
        if hardware.in_container():
            hardware.limit_memory(world_size())
        else:
            keep_freed_memory()
    if world_size() > 1 and not dist.is_initialized():
        # Numbers of the host are sent by gloo, so that they do not wait for a GPU
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        _join(backend, device if on_gpu else None)
        _processes[:] = [("", 0)] * world_size()
        dist.all_gather_object(_processes, (platform.node(), os.getpid()))
    chosen = _fastest_dtype(device) if dtype == "auto" else DTYPES[dtype]
    torch.manual_seed(seed)
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    return Runtime(device, chosen, rank(), world_size(), seed)


def _join(backend: str, device: torch.device | None) -> None:
    """Join the other ranks. RankLost if they do not all arrive within JOINING."""
    from torch.distributed.rendezvous import rendezvous

    ranks = [f"joined/{i}" for i in range(world_size())]
    try:
        store, _, _ = next(rendezvous("env://", timeout=JOINING))
        _stores[:] = [store]
        store.set(ranks[rank()], "")
        store.wait(ranks, JOINING)
        dist.init_process_group(
            backend, store=store, rank=rank(), world_size=world_size(), device_id=device
        )
    except dist.DistError as e:
        lost = RankLost(
            f"not all {world_size()} ranks of the run joined within {JOINING.seconds // 60} "
            "minutes: see the messages of the others, and start again"
        )
        lost.aloud = True
        raise lost from e


def rank_lost(e: RuntimeError) -> RankLost | None:
    """The RankLost for an exception that says that another rank has ended; None for others."""
    texts = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport"
    if not (isinstance(e, dist.DistError) or any(text in str(e) for text in texts)):
        return None
    lost = RankLost(
        "another rank has ended, so this run ends too: see its message, if it could print one; "
        "continue with --resume=auto"
    )
    try:  # only the first rank to notice prints it; torchrun's own store outlives every rank
        lost.aloud = _stores[0].add("lost", 1) == 1
    except (dist.DistError, RuntimeError, IndexError):  # rank 0 had the store, and has ended
        time.sleep(0.05)  # a killed process closes its connections just before it ends
        lost.aloud = all(map(_has_ended, _processes[: rank()]))
    return lost


def tell_of_error() -> None:
    """
    On rank 0, before it ends with an error that it prints: let the other ranks know, so that they
    do not print that they have lost it. Call it before leaving the process group.
    """
    if rank() == 0 and _stores:
        with suppress(dist.DistError, RuntimeError):  # the store has gone
            _stores[0].add("lost", 1)


_stores: list[Any] = []  # the store through which the ranks have joined; empty with one rank
_processes: list[tuple[str, int]] = []  # host and process id of every rank


def _has_ended(process: tuple[str, int]) -> bool:
    """Whether a process of this host has ended; False for those of other hosts."""
    import psutil

    host, pid = process
    try:
        return host == platform.node() and psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # it belongs to another user
        return False


def close_runtime() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def keep_freed_memory() -> bool:
    """
    Make glibc reuse freed blocks instead of returning large ones to the system: page faults of new
    blocks take a tenth of the time of a training step on a CPU. Returns whether it took effect,
    which is only so with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def choose_device(device_type: str) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device_type == "auto":
        device_type = next(name for name in available if available[name])
    if device_type not in available:
        raise UserError(f"there is no device {device_type!r}: choose auto, {', '.join(available)}")
    if not available[device_type]:
        raise UserError(
            f"--device_type={device_type} is not supported by this build of PyTorch "
            f"({torch.__version__}): use --device_type=cpu, or install another build"
        )
    if device_type != "cuda":
        return torch.device(device_type)
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"rank {local} has no GPU, because this machine has only {count}: run torchrun with "
            f"--nproc_per_node={count}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype that "auto" means on this device, the same on all ranks."""
    if device.type == "cuda":
        return torch.float16 if emulates_bfloat16(device) else torch.bfloat16
    if device.type == "mps":
        return torch.float32
    choice = [hardware.faster_dtype(device)]  # measured, so that ranks may differ
    if world_size() > 1:
        dist.broadcast_object_list(choice)
    return choice[0]


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether this is a GPU from before Ampere, whose products of bfloat16 are slow."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


@functools.cache
def compiler_fails(device: torch.device) -> str:
    """Why compiling and running a small function fails on this device; '' if it works."""
    try:
        double = torch.compile(lambda x: x + x, dynamic=False)
        double(torch.ones(8, device=device))
    except Exception as e:  # whatever is missing: Triton, a C compiler, the headers of Python
        return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return ""


def compiler_missing(device: torch.device) -> str:
    """Why torch.compile cannot work on this device; '' if it can. On a GPU, this is tried once."""
    if device.type == "cuda":
        return compiler_fails(device)
    if device.type != "cpu":
        return f"it is not supported on {device.type}"
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++"
    return "" if any(map(shutil.which, compilers)) else "there is no C++ compiler (install g++)"


# Held while a CUDA graph is captured, which fails if another thread empties the cache meanwhile
capturing = threading.RLock()


def release_memory() -> None:
    """Return the blocks that an allocator, of an accelerator or glibc, holds but does not use."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        with capturing:
            torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def halve_until_it_fits(
    attempt: Callable[[int], T],
    rows: int,
    what: str = "a batch",
    remedy: str = "use a smaller model, a shorter context or a device with more memory",
) -> tuple[T, int]:
    """
    Call `attempt(rows)`; when it runs out of memory, try again with half the rows. Returns the
    result and the rows that fitted. `what` names the batch for the notice, for example "a
    validation batch". Raises UserError if a single row does not fit. `attempt` may run several
    times, so it must not keep anything of a failed call.
    """
    while True:
        try:
            return attempt(rows), rows
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
            if rows == 1:
                raise UserError(f"out of memory with {what} of 1 row: {remedy}") from e
        # Here the exception is gone, and with it the traceback that kept the failed tensors alive.
        release_memory()
        notice(f"out of memory with {what} of {rows} rows: continuing with {rows // 2}")
        rows //= 2
