"""hardware: the table is exact about names and honest about rates; measurements are of the right size."""

import platform
import subprocess
import sys
import time

import pytest
import torch

from nanochat.base import hardware
from nanochat.base.hardware import gpus, lookup

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("rtx-3090", "RTX 3090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada Generation"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("h100", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("Apple M2 Pro", "Apple M2 Pro"),
        ("m4max", "Apple M4 Max"),
    ],
)
def test_a_card_is_found_under_the_names_it_goes_by(name, row):
    found = lookup(name)
    assert found is not None and found.name == row


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce GTX 1080",
        "AMD EPYC",
        "RTX",
        "",
    ],
)
def test_another_card_is_never_taken_for_a_known_one(name):
    assert lookup(name) is None


def test_the_table():
    keys = [hardware._key(n) for g in gpus() for n in (g.name, *g.aliases)]
    assert len(keys) == len(set(keys))
    for gpu in gpus():
        assert (
            gpu.source
            and 0 < (gpu.bf16 or gpu.fp16) < 3000
            and gpu.memory_gb > 0
            and 50 < gpu.bandwidth < 10000
        )
    for name, bf16, memory, bandwidth in [
        ("3090", 71, 24, 936),
        ("4090", 165, 24, 1008),
        ("5090", 209, 32, 1792),
        ("a100", 312, 80, 2039),
    ]:
        gpu = lookup(name)
        assert gpu is not None
        assert (
            int(gpu.bf16) == bf16 and gpu.memory_gb == memory and gpu.bandwidth == bandwidth
        )  # the half rate, for fp32 accumulation
    for name in (
        "3060",
        "3090",
        "4070",
        "4080",
        "4090",
        "5090",
        "A10",
        "A100",
        "L4",
        "L40S",
        "H100",
        "H200",
        "M1",
        "M2",
        "M3",
        "M4",
    ):
        assert lookup(name), name


def test_looking_up_does_not_import_torch():
    code = "import sys; from nanochat.base.hardware import lookup; assert lookup('h100'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_measurements_are_plausible_and_quick():
    hardware.measured_peak(
        CPU, torch.float32
    )  # the first product of a process also sets the library up
    start = time.perf_counter()
    peak = hardware.measured_peak(CPU, torch.float32)
    bandwidth = hardware.read_bandwidth(CPU)
    dtype = hardware.faster_dtype(CPU)
    assert time.perf_counter() - start < 20
    assert 1e9 < peak < 1e15 and 2e8 < bandwidth < 2e12
    assert dtype in (torch.float32, torch.bfloat16)
    assert hardware.device_name(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_known_card_measures_below_its_peak_and_not_far():
    device = torch.device("cuda")
    gpu = lookup(hardware.device_name(device))
    if gpu is None or not gpu.bf16:
        pytest.skip(f"{hardware.device_name(device)} is not in the table")
    assert 0.4 < hardware.measured_peak(device, torch.bfloat16) / gpu.flops < 1.05
    assert 0.5 < hardware.read_bandwidth(device) / (gpu.bandwidth * 1e9) < 1.05


def test_freed_memory_is_kept_where_glibc_is():
    """In a process of its own: a block freed and taken again costs no page faults any more."""
    code = (
        "import resource, torch; from nanochat.base.runtime import keep_freed_memory\n"
        "kept = keep_freed_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): torch.ones(16 * 2**20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(kept, faults())"
    )
    kept, faults = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert (kept == "True") == (platform.libc_ver()[0] == "glibc")
    assert kept == "False" or int(faults) < 1000  # 20 blocks of 64 MB: 327,680 pages of 4 KB
