"""
What machines can do: a table of cards from their vendors' data, and measurements of the machine at hand. The table serves planning for a
card that is elsewhere; on this machine a measurement counts. It refuses to guess: a card that no row names exactly (a laptop or cut-down
variant of a known one, a MIG slice) gives None, never another card's figures. Looking a card up does not import torch.
"""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GPU:
    name: str
    bf16: (
        float | None
    )  # TFLOP/s of dense matrix products in bfloat16 accumulated in fp32; None: the card has no bf16 units
    fp16: float  # the same in float16; TF32 is half of it on every card from Ampere on
    memory_gb: float  # as sold, 10^9 or 2^30 bytes by the vendor's habit: 2^30 for GeForce and data-centre cards
    bandwidth: float  # GB/s
    source: str
    aliases: tuple[str, ...] = ()  # further names, as the driver spells them

    @property
    def flops(self) -> float:
        """FLOP/s of training: bf16, or fp16 where there is none."""
        return 1e12 * (self.bf16 or self.fp16)

    @property
    def device_type(self) -> str:
        return "mps" if self.name.startswith("Apple") else "cuda"

    @property
    def dtype(self) -> str:
        """The precision that runtime.open_runtime chooses on it."""
        return "float32" if self.device_type == "mps" else "bfloat16" if self.bf16 else "float16"


# GeForce cards multiply in bf16 or fp16 at half rate when they accumulate in fp32, as training does. The usual headline figures (142 for
# the 3090, 330 for the 4090) are for fp16 accumulation, and the largest ones for 2:4 sparsity: neither can be reached in training.
_TURING = "NVIDIA Turing architecture whitepaper, appendix A"
_GA102 = "NVIDIA Ampere GA102 whitepaper v2, appendices A and C"
_GA10X = "SMs x boost clock x 512 FLOP a clock, which gives the GA102 whitepaper's figure for the RTX 3090"
_ADA = "NVIDIA Ada architecture whitepaper v2, appendix A"
_ADA_CLOCK = (
    "SMs x boost clock x 512 FLOP a clock, which gives the Ada whitepaper's figure for the RTX 4090"
)
_BLACKWELL = "NVIDIA RTX Blackwell architecture whitepaper, appendix A"
_SHEET = "NVIDIA data sheet, dense (half of the figure with sparsity)"
_APPLE = "Apple's published GPU figure and memory bandwidth"
_APPLE_CLOCK = "Apple's memory bandwidth; GPU cores x 256 FLOP a clock x clock as measured by reviewers; the largest configuration"

GPUS = (
    GPU("RTX 2080 Ti", None, 53.8, 11, 616, _TURING),
    GPU("RTX 3060", 25.5, 25.5, 12, 360, _GA10X),
    GPU("RTX 3060 Ti", 32.4, 32.4, 8, 448, _GA10X),
    GPU("RTX 3070", 40.6, 40.6, 8, 448, _GA102),
    GPU("RTX 3070 Ti", 43.5, 43.5, 8, 608, _GA10X),
    GPU("RTX 3080", 59.5, 59.5, 10, 760, _GA102),
    GPU("RTX 3080 Ti", 68.2, 68.2, 12, 912, _GA10X),
    GPU("RTX 3090", 71.0, 71.0, 24, 936, _GA102),
    GPU("RTX 3090 Ti", 80.0, 80.0, 24, 1008, _GA10X),
    GPU("RTX A6000", 154.8, 154.8, 48, 768, _GA102),
    GPU("RTX 4060", 30.2, 30.2, 8, 272, _ADA_CLOCK),
    GPU("RTX 4060 Ti", 44.1, 44.1, 8, 288, _ADA_CLOCK + "; sold with 8 or 16 GB"),
    GPU("RTX 4070", 58.3, 58.3, 12, 504, _ADA_CLOCK),
    GPU("RTX 4070 SUPER", 71.0, 71.0, 12, 504, _ADA_CLOCK),
    GPU("RTX 4070 Ti", 80.2, 80.2, 12, 504, _ADA),
    GPU("RTX 4070 Ti SUPER", 88.2, 88.2, 16, 672, _ADA_CLOCK),
    GPU("RTX 4080", 97.5, 97.5, 16, 717, _ADA),
    GPU("RTX 4080 SUPER", 104.4, 104.4, 16, 736, _ADA_CLOCK),
    GPU("RTX 4090", 165.2, 165.2, 24, 1008, _ADA),
    GPU("RTX 6000 Ada Generation", 364.2, 364.2, 48, 960, _ADA),
    GPU("RTX 5070", 61.7, 61.7, 12, 672, _BLACKWELL),
    GPU("RTX 5070 Ti", 87.9, 87.9, 16, 896, _BLACKWELL),
    GPU("RTX 5080", 112.6, 112.6, 16, 960, _BLACKWELL),
    GPU("RTX 5090", 209.5, 209.5, 32, 1792, _BLACKWELL),
    GPU("T4", None, 65.0, 16, 320, _SHEET),
    GPU("V100 16GB", None, 125.0, 16, 900, _SHEET, ("V100", "V100-SXM2-16GB")),
    GPU("V100 32GB", None, 125.0, 32, 900, _SHEET, ("V100-SXM2-32GB", "V100-SXM3-32GB")),
    GPU("A10", 125.0, 125.0, 24, 600, _SHEET),
    GPU("A10G", 70.0, 70.0, 24, 600, _SHEET),
    GPU("A40", 149.7, 149.7, 48, 696, _GA102),
    GPU("A100 40GB", 312.0, 312.0, 40, 1555, _SHEET, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    GPU("A100 80GB SXM", 312.0, 312.0, 80, 2039, _SHEET, ("A100", "A100 80GB", "A100-SXM4-80GB")),
    GPU("A100 80GB PCIe", 312.0, 312.0, 80, 1935, _SHEET, ("A100 PCIe",)),
    GPU("L4", 121.0, 121.0, 24, 300, _SHEET),
    GPU("L40", 181.0, 181.0, 48, 864, _SHEET),
    GPU("L40S", 362.0, 362.0, 48, 864, _SHEET),
    GPU(
        "H100 SXM",
        989.4,
        989.4,
        80,
        3352,
        _SHEET,
        ("H100", "H100 80GB", "H100 80GB HBM3", "H100 SXM5"),
    ),
    GPU("H100 PCIe", 756.0, 756.0, 80, 2039, _SHEET, ("H100 80GB PCIe",)),
    GPU("H100 NVL", 835.0, 835.0, 94, 3938, _SHEET),
    GPU("H200", 989.4, 989.4, 141, 4800, _SHEET, ("H200 SXM",)),
    GPU("H200 NVL", 836.0, 836.0, 141, 4800, _SHEET),
    GPU("B200", 2250.0, 2250.0, 180, 8000, _SHEET),
    # Apple's GPUs run bf16 and fp16 at the rate of fp32; memory is shared with the CPU: the largest on sale
    GPU("Apple M1", 2.6, 2.6, 16, 68, _APPLE),
    GPU("Apple M1 Pro", 5.2, 5.2, 32, 200, _APPLE),
    GPU("Apple M1 Max", 10.4, 10.4, 64, 400, _APPLE),
    GPU("Apple M1 Ultra", 20.8, 20.8, 128, 800, _APPLE),
    GPU("Apple M2", 3.6, 3.6, 24, 100, _APPLE),
    GPU("Apple M2 Pro", 6.8, 6.8, 32, 200, _APPLE),
    GPU("Apple M2 Max", 13.6, 13.6, 96, 400, _APPLE),
    GPU("Apple M2 Ultra", 27.2, 27.2, 192, 800, _APPLE),
    GPU("Apple M3", 3.6, 3.6, 24, 102, _APPLE_CLOCK),
    GPU("Apple M3 Pro", 6.4, 6.4, 36, 150, _APPLE_CLOCK),
    GPU("Apple M3 Max", 14.3, 14.3, 128, 400, _APPLE_CLOCK),
    GPU("Apple M3 Ultra", 28.6, 28.6, 512, 819, _APPLE_CLOCK),
    GPU("Apple M4", 4.0, 4.0, 32, 120, _APPLE_CLOCK),
    GPU("Apple M4 Pro", 8.1, 8.1, 64, 273, _APPLE_CLOCK),
    GPU("Apple M4 Max", 17.2, 17.2, 128, 546, _APPLE_CLOCK),
)


def _key(name: str) -> str:
    """'NVIDIA GeForce RTX 4090' and 'rtx4090' and '4090' -> '4090'; words that make another card of it (Laptop, D, MIG) stay."""
    words = re.sub(
        r"nvidia|geforce|tesla|apple|quadro|generation|\brtx(?=\W|\d)", " ", name.lower()
    )
    return re.sub(r"[^a-z0-9]", "", words)


def lookup(name: str) -> GPU | None:
    """The row of the card that the driver, or a person, calls `name`; None for a card that the table does not have."""
    key = _key(name)
    return next((gpu for gpu in GPUS if key in map(_key, (gpu.name, *gpu.aliases))), None)


def device_name(device: "torch.device") -> str:
    """'NVIDIA H200', 'Apple M2 Pro' or the processor's name, as the system reports it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps" or platform.system() == "Darwin":
        import subprocess

        return (
            subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
            ).stdout.strip()
            or "Apple"
        )
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if info.exists()
        else None
    )
    return found[1].strip() if found else platform.processor() or platform.machine()


def _best_seconds(
    f: Callable[[], object], device: "torch.device", budget: float, repeats: int
) -> float:
    """The shortest time of f() in about `budget` seconds, after a warm-up; on an accelerator the mean over `repeats` calls in a row."""
    import torch

    wait = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}.get(
        device.type, lambda: None
    )
    repeats = 1 if device.type == "cpu" else repeats
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


def measured_peak(device: "torch.device", dtype: "torch.dtype") -> float:
    """FLOP/s of the best of a few matrix products of the kind that training does, measured here in about half a second."""
    import torch

    cpu = device.type == "cpu"
    shapes = (
        [(1024, 1024, 1024), (2048, 1024, 1024), (4096, 512, 2048)]
        if cpu
        else [(4096,) * 3, (8192, 4096, 8192), (8192,) * 3]
    )
    best = 0.0
    with torch.no_grad():
        for rows, inner, columns in shapes:
            x = torch.randn(rows, inner, device=device).to(dtype)
            w = torch.randn(columns, inner, device=device).to(dtype)
            seconds = _best_seconds(
                lambda x=x, w=w: torch.nn.functional.linear(x, w), device, 0.12, 10
            )
            best = max(best, 2 * rows * inner * columns / seconds)
    return best


def read_bandwidth(device: "torch.device") -> float:
    """Bytes/s at which all cores read main memory (or the accelerator its own): the time to sum a buffer far larger than the caches."""
    import psutil
    import torch

    if device.type == "cpu":
        sizes = [
            p.read_text().strip()
            for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        ]
        last_level = max(
            (
                int(s[:-1]) * {"K": 2**10, "M": 2**20}.get(s[-1], 1)
                for s in sizes
                if s[:-1].isdigit()
            ),
            default=2**25,
        )
        size = min(max(2**28, 6 * last_level), psutil.virtual_memory().available // 4)
    else:
        size = 2**31
    x = torch.ones(size // 4, device=device)
    with torch.no_grad():
        return x.numel() * 4 / _best_seconds(x.sum, device, 0.12, 5)


def faster_dtype(device: "torch.device") -> "torch.dtype":
    """torch.bfloat16 where its matrix products measure at least 1.2 times the speed of fp32 here, else torch.float32; about 0.2 s."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x = torch.randn(1024, 1024, device=device).to(dtype)
        return _best_seconds(lambda: torch.nn.functional.linear(x, x), device, 0.08, 10)

    with torch.no_grad():
        return (
            torch.bfloat16
            if seconds(torch.float32) >= 1.2 * seconds(torch.bfloat16)
            else torch.float32
        )
