"""
The speed and memory of machines: the table of GPUs in gpus.toml, and measurements of this machine.
The table is for planning on other machines; on this one, measurements are used. A card whose exact
name is not in the table (a laptop or cut-down variant, a MIG slice) is unknown: it never gets the
figures of a similar card. Looking up a card does not import torch.
"""

import functools
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.base.common import counted, human

if TYPE_CHECKING:
    import torch

ROOT = Path("/")  # where proc and sys, the folders of the kernel, are


@dataclass(frozen=True)
class GPU:
    """A row of gpus.toml, which explains the figures."""

    name: str
    bf16: float  # TFLOP/s, 0 for a card without bf16 units
    fp16: float  # TFLOP/s
    memory_gb: float
    bandwidth: float  # GB/s
    watts: float  # rated board power, 0 if not published
    source: str
    aliases: tuple[str, ...]

    @property
    def flops(self) -> float:
        """FLOP/s of training: in bf16, or in fp16 where there is no bf16."""
        return 1e12 * (self.bf16 or self.fp16)

    @property
    def device_type(self) -> str:
        return "mps" if self.name.startswith("Apple") else "cuda"

    @property
    def dtype(self) -> str:
        """The precision that runtime.open_runtime chooses on this card."""
        if self.device_type == "mps":
            return "float32"
        return "bfloat16" if self.bf16 else "float16"


@functools.cache
def gpus() -> tuple[GPU, ...]:
    """Every GPU of the table."""
    text = Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    return tuple(
        GPU(
            name,
            bf16,
            fp16,
            memory,
            bandwidth,
            watts,
            table["sources"][source],
            tuple(aliases),
        )
        for name, bf16, fp16, memory, bandwidth, watts, _, source, *aliases in table["gpus"]
    )


def _key(name: str) -> str:
    """
    'NVIDIA GeForce RTX 4090', 'rtx4090' and '4090' -> '4090'. Words that name another card (Laptop,
    D, MIG) stay.
    """
    vendors = r"nvidia|geforce|tesla|apple|quadro|generation|\brtx(?=\W|\d)"
    return re.sub(r"[^a-z0-9]", "", re.sub(vendors, " ", name.lower()))


def lookup(name: str) -> GPU | None:
    """The GPU that the driver, or a person, calls `name`; None if the table does not have it."""
    key = _key(name)
    return next((gpu for gpu in gpus() if key in map(_key, (gpu.name, *gpu.aliases))), None)


def device_name(device: "torch.device") -> str:
    """The name of the GPU or processor as the system reports it, for example 'NVIDIA H200'."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "Apple"
    model = re.search(r"^model name\s*:\s*(.+)$", _text(ROOT / "proc/cpuinfo"), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def describe_machine(device: "torch.device") -> dict[str, str]:
    """A description of this machine and `device`, by heading, for the logbook of a run."""
    import torch

    described = {
        "processor": device_name(torch.device("cpu")),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "memory": f"{human(total_memory())}B",
        "system": f"{platform.system()} {platform.machine()}",
        "PyTorch": torch.__version__,
    }
    if device.type == "cuda":
        memory = human(torch.cuda.mem_get_info(device)[1])
        described["GPU"] = f"{device_name(device)}, {memory}B"
    return described


def best_seconds(
    f: Callable[[], object], device: "torch.device", budget: float, repeats: int
) -> float:
    """
    The shortest time of f() in about `budget` seconds, after a warm-up call. On an accelerator each
    time is the mean of `repeats` consecutive calls.
    """
    import torch

    wait = torch.accelerator.synchronize
    if device.type == "cpu":
        wait, repeats = (lambda: None), 1
    f()
    wait()
    best, stop = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(repeats):
            f()
        wait()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def _matmul_flops(
    rows: int, inner: int, columns: int, device: "torch.device", dtype: "torch.dtype", budget: float
) -> float:
    """Measured FLOP/s of the product (rows, inner) x (inner, columns)."""
    import torch

    x = torch.randn(rows, inner, device=device).to(dtype)
    w = torch.randn(columns, inner, device=device).to(dtype)
    with torch.no_grad():
        multiply = functools.partial(torch.nn.functional.linear, x, w)
        return 2 * rows * inner * columns / best_seconds(multiply, device, budget, 10)


def measured_peak(device: "torch.device", dtype: "torch.dtype") -> float:
    """FLOP/s of the fastest of three typical matrix products; takes half a second."""
    if device.type == "cpu":
        shapes = [(1024, 1024, 1024), (2048, 1024, 1024), (4096, 512, 2048)]
    else:
        shapes = [(4096, 4096, 4096), (8192, 4096, 8192), (8192, 8192, 8192)]
    return max(_matmul_flops(*shape, device, dtype, 0.12) for shape in shapes)


def faster_dtype(device: "torch.device") -> "torch.dtype":
    """
    torch.bfloat16 if its matrix products measure at least 1.2 times the speed of float32 on this
    device, else torch.float32; takes 0.2 seconds.
    """
    import torch

    full, half = (
        _matmul_flops(1024, 1024, 1024, device, dtype, 0.08)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return torch.bfloat16 if half >= 1.2 * full else torch.float32


def usable_cpus() -> int:
    """
    How many CPUs this process can keep busy: those that it may run on, or fewer if its container or
    service has a quota of CPU time (cgroup v2 and v1).
    """
    return max(1, int(min([len(_allowed_cpus()), *_cpu_quotas()])))


def _allowed_cpus() -> Sequence[int]:
    """The numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


class OtherPrograms:
    """What other programs take of the CPUs that this process may use."""

    def __init__(self) -> None:
        self._before = self._so_far()

    def cpus(self) -> float:
        """
        How many CPUs they kept busy on average, since the last call or since this object was made.
        The children of this process do not count.
        """
        before, self._before = self._before, self._so_far()
        wall, own, used = (b - a for a, b in zip(before, self._before, strict=True))
        return max(0.0, used - own) / max(wall, 1e-9)

    def warning(self, seconds: float = 60.0) -> str:
        """
        What to tell the user if, for so many seconds, other programs left torch fewer CPUs than it
        has threads; else "". Measures only when so many seconds have passed since it last did.
        """
        import torch

        if time.monotonic() < self._before[0] + seconds:
            return ""
        allowed, threads, others = len(_allowed_cpus()), torch.get_num_threads(), self.cpus()
        if others < 0.3 or threads + others < allowed + 0.3:
            return ""
        fewer = max(1, round(allowed - others))
        remedy = f", or compute with OMP_NUM_THREADS={fewer}" if fewer < threads else ""
        return (
            f"other programs keep {others:.1f} of {counted(allowed, 'CPUs')} busy, which slows "
            f"this one down: end them{remedy}"
        )

    @staticmethod
    def _so_far() -> tuple[float, float, float]:
        """Seconds of the clock, of CPUs used by this process, and of CPUs used by all programs."""
        import psutil

        own, me = 0.0, psutil.Process()
        for process in (me, *me.children(recursive=True)):
            with suppress(psutil.Error):  # it has just ended
                # User and system time, its own and that of children that have ended
                own += sum(process.cpu_times()[:4])
        cpus, working = psutil.cpu_times(percpu=True), ("user", "nice", "system", "irq", "softirq")
        used = sum(getattr(cpus[i], name, 0.0) for i in _allowed_cpus() for name in working)
        return time.monotonic(), own, used


def available_memory() -> int:
    """
    Bytes of main memory that this process can still allocate: what the machine has available, but
    no more than the limit of its container or service (cgroup v2 and v1) leaves.
    """
    import psutil

    free = [limit - used for limit, used in _memory_limits()]
    return max(0, min([psutil.virtual_memory().available, *free]))


def total_memory() -> int:
    """Bytes of main memory of the machine, or of the container if that has less."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def in_container() -> bool:
    """Whether a container or a service may use less memory than the machine has."""
    import psutil

    return total_memory() < psutil.virtual_memory().total


def limit_memory(ranks: int = 1) -> None:
    """
    On Linux, make allocations of this process, one of `ranks` equal ones, fail when memory runs
    out. After an error, a batch can be halved or the reason printed; without the limit, the kernel
    would kill the process.
    """
    if sys.platform != "linux":
        return
    import resource

    import psutil
    import torch

    stacks = torch.get_num_threads() * (8 << 20)  # of future threads: reserved, but hardly used
    most = psutil.Process().memory_info().data + stacks + int(0.95 * available_memory() / ranks)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each cgroup above this process that has a limit."""
    for level in _cgroups("memory"):
        for names in ("max", "current"), ("limit_in_bytes", "usage_in_bytes"):  # of v2 and of v1
            limit, used = (_figure(level / f"memory.{name}") for name in names)
            if limit is None:
                continue
            # Page cache can be freed; in v1, its last line includes lower levels
            statistics = _text(level / "memory.stat")
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", statistics, re.M)
            yield limit, max(0, (used or 0) - int([0, *cached][-1]))


def _cpu_quotas() -> Iterator[float]:
    """How many CPUs each cgroup above this process may keep busy, for those that have a quota."""
    for level in _cgroups("cpu"):
        # v2 has the quota and its period in one file, v1 in two
        texts = [_text(level / f"cpu.{name}") for name in ("max", "cfs_quota_us", "cfs_period_us")]
        if quota := re.fullmatch(r"\s*(\d+)\s+([1-9]\d*)\s*", " ".join(texts)):
            yield int(quota[1]) / int(quota[2])


def _cgroups(controller: str) -> Iterator[Path]:
    """The folder of each cgroup above this process in which `controller` may have a limit."""
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):  # v1 has a tree for each
            continue
        mount = ROOT / "sys/fs/cgroup" / (controllers and controller)  # v1 has links with this name
        # In a container, this may be the path on the host, of which only the top is visible
        folder = mount / path.lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(mount):
                break
            yield level


def _text(path: Path) -> str:
    """The text of a file of the kernel; "" if it does not exist, as on other systems."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _figure(path: Path) -> int | None:
    """The number in a file of the kernel; None if it has no number, as in "max"."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None
