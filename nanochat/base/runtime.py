"""
Where and in what precision this process computes: device, dtype, ranks, seed, chosen once in `open_runtime`.

A float16 run needs a loss scaler (`scale_loss`); float32 and bfloat16 do not. Nothing else in the project probes for a device.
"""

import ctypes
import gc
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from nanochat.base import hardware
from nanochat.base.common import UserError, notice, rank, world_size

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """What the rest of the program needs to know of the machine; immutable for the process's life."""

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
        """Wait until the device has done what it was asked; for honest clocks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int:
        """Bytes: the most allocated on the GPU so far, or the process's peak resident size on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource  # not on Windows, where only this figure is missing

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def open_runtime(device_type: str = "auto", dtype: str = "auto", seed: int = 42) -> Runtime:
    """
    Choose the device ("auto" | "cpu" | "cuda" | "mps") and the compute dtype ("auto" | "float32" | "bfloat16" | "float16"); join the
    process group when torchrun started us. UserError when what is asked for is not there.
    """
    device = _device(device_type)
    if device.type == "cpu":
        keep_freed_memory()
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            device_id=device if device.type == "cuda" else None,
        )
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: choose auto, {', '.join(DTYPES)}")
    chosen = _auto_dtype(device) if dtype == "auto" else DTYPES[dtype]
    if (
        dtype == "auto" and world_size() > 1 and device.type == "cpu"
    ):  # a measured choice: all ranks must make the same one
        names = [str(chosen)]
        dist.broadcast_object_list(names)
        chosen = DTYPES[names[0].removeprefix("torch.")]
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    return Runtime(device, chosen, rank(), world_size(), seed)


def close_runtime() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory() -> bool:
    """
    Let glibc reuse freed blocks instead of handing large ones back to the system: faulting their pages in again costs a CPU
    training step a tenth of its time. True where it took effect (glibc's mallopt); elsewhere nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def _device(asked: str) -> torch.device:
    have = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if asked == "auto":
        asked = next(name for name, there in have.items() if there)
    if asked not in have:
        raise UserError(f"device_type is {asked!r}: choose auto, {', '.join(have)}")
    if not have[asked]:
        raise UserError(
            f"device_type is {asked} but torch {torch.__version__} sees none: use --device_type=cpu or another torch build"
        )
    if asked != "cuda":
        return torch.device(asked)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"rank {local} has no GPU of its own: this machine has {torch.cuda.device_count()}; lower --nproc_per_node"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _auto_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    return hardware.faster_dtype(device) if device.type == "cpu" else torch.float32


def compiler_missing(device: torch.device) -> str:
    """Why torch.compile cannot work here, or '' when it can."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            return "Triton is not installed"
        return ""
    if device.type == "cpu" and not any(
        shutil.which(c) for c in (os.environ.get("CXX", "g++"), "g++", "clang++")
    ):
        return "no C++ compiler was found (install g++)"
    return "" if device.type == "cpu" else f"not supported on {device.type}"


def out_of_memory(e: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the host."""
    messages = (
        "can't allocate memory",  # the CPU
        "not enough memory",  # Windows
        "out of memory",  # MPS
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(e, torch.OutOfMemoryError) or (
        isinstance(e, RuntimeError) and any(text in str(e) for text in messages)
    )


def release_memory() -> None:
    """Return the blocks that the accelerator's allocator holds but does not use."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def halve_until_it_fits(
    attempt: Callable[[int], T], rows: int, what: str = "a batch"
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
                raise UserError(
                    f"out of memory with {what} of 1 row: use a smaller model, a shorter "
                    "--sequence_len or a device with more memory"
                ) from e
        # Here the exception is gone, and with it the traceback that kept the failed tensors alive.
        release_memory()
        notice(f"out of memory with {what} of {rows} rows: continuing with {rows // 2}")
        rows //= 2
