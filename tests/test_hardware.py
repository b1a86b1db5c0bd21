"""hardware: exact names, plausible figures in the table, plausible measurements."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from bench.bandwidth import read_bandwidth
from nanochat.base import hardware
from nanochat.base.hardware import faster_dtype, gpus, lookup, measured_peak

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
def test_a_card_is_known_by_all_its_names(name, row):
    gpu = lookup(name)
    assert gpu is not None and gpu.name == row


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
def test_a_variant_never_gets_the_figures_of_a_similar_card(name):
    assert lookup(name) is None


def test_every_row_says_where_its_figures_are_from():
    table = tomllib.loads(Path(hardware.__file__).with_name("gpus.toml").read_text("utf-8"))
    for row in table["gpus"]:
        assert row[6] in table["power"] and row[7] in table["sources"], row


def test_the_table_has_distinct_names_and_plausible_figures():
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


def test_measurements_are_plausible():
    peak = measured_peak(CPU, torch.float32)
    bandwidth = read_bandwidth(CPU)
    dtype = faster_dtype(CPU)
    assert 1e9 < peak < 1e15 and 2e8 < bandwidth < 2e12
    assert dtype in (torch.float32, torch.bfloat16)
    assert hardware.device_name(CPU)


@pytest.mark.parametrize(
    ("seconds", "calls"), [([9.0, 0.25, 0.5, 0.125] + [0.5] * 9, 5), ([9.0, 4.0], 2)]
)
def test_the_best_time_counts_within_the_budget_and_not_the_warm_up(monkeypatch, seconds, calls):
    """On a clock that only the function moves; a call that has begun is not cut off."""
    now, taken = [100.0], iter(seconds)
    made = []

    def work():
        made.append(next(taken))
        now[0] += made[-1]

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    best = hardware.best_seconds(work, CPU, 1.0, 10)
    assert len(made) == calls and best == min(made[1:])


def test_figures_follow_from_the_best_time_of_each_product(monkeypatch):
    """And the measurements take the time that their docstrings name."""
    seconds, budgets = {torch.float32: 1.0, torch.bfloat16: 1.0}, []

    def timed(multiply, device, budget, repeats):
        budgets.append(budget)
        return seconds[multiply.args[0].dtype]

    monkeypatch.setattr(hardware, "best_seconds", timed)
    assert measured_peak(CPU, torch.float32) == 2 * 4096 * 512 * 2048
    assert sum(budgets) < 0.5
    for half, dtype in ((1 / 1.19, torch.float32), (1 / 1.21, torch.bfloat16)):
        seconds[torch.bfloat16] = half
        budgets.clear()
        assert faster_dtype(CPU) is dtype and sum(budgets) < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_known_card_measures_close_to_its_peak():
    device = torch.device("cuda")
    gpu = lookup(hardware.device_name(device))
    if gpu is None or not gpu.bf16:
        pytest.skip(f"{hardware.device_name(device)} is not in the table")
    assert 0.4 < measured_peak(device, torch.bfloat16) / gpu.flops < 1.05
    assert 0.5 < read_bandwidth(device) / (gpu.bandwidth * 1e9) < 1.05


# --- memory and CPUs of containers

GB = 2**30
MACHINE = SimpleNamespace(total=64 * GB, available=50 * GB)


def machine(root, cgroup, **files):
    """A system in `root` whose processes are in the cgroup; files: "path in /sys/fs/cgroup" -> text."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "available", "total"),
    [
        ("0::/", {}, 50, 64),
        ("0::/", {"memory.max": "max", "memory.current": GB}, 50, 64),
        ("0::/", {"memory.max": 8 * GB, "memory.current": 3 * GB}, 5, 8),  # docker, podman: v2
        (  # what the page cache holds is given back
            "0::/",
            {
                "memory.max": 8 * GB,
                "memory.current": 7 * GB,
                "memory.stat": f"anon 5\ninactive_file {4 * GB}\nactive_file 9",
            },
            5,
            8,
        ),
        (  # a service: the tightest of the levels above counts
            "0::/a.slice/b.service",
            {
                "a.slice/memory.max": 6 * GB,
                "a.slice/memory.current": 5 * GB,
                "a.slice/b.service/memory.max": "max",
                "a.slice/b.service/memory.current": GB,
            },
            1,
            6,
        ),
        ("0::/host/only", {"memory.max": 4 * GB, "memory.current": 0}, 4, 4),
        (  # v1
            "5:cpu:/\n4:memory:/docker/x\n0::/",
            {
                "memory/docker/x/memory.limit_in_bytes": 2 * GB,
                "memory/docker/x/memory.usage_in_bytes": GB,
                "memory/docker/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {GB // 2}",
                "memory/memory.limit_in_bytes": 9223372036854771712,
                "memory/memory.usage_in_bytes": 20 * GB,
            },
            1.5,
            2,
        ),
        (  # v1, whose path is that of the host
            "4:memory:/kubepods/y",
            {"memory/memory.limit_in_bytes": 3 * GB, "memory/memory.usage_in_bytes": 9 * GB},
            0,
            3,
        ),
        ("nonsense\n::\n", {"memory.max": "many"}, 50, 64),
        ("0::/../../..", {"memory.max": 4 * GB, "memory.current": 0}, 4, 4),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, cgroup, files, available, total):
    monkeypatch.setattr("psutil.virtual_memory", lambda: MACHINE)
    monkeypatch.setattr(hardware, "ROOT", machine(tmp_path, cgroup, **files))
    assert hardware.available_memory() == available * GB
    assert hardware.total_memory() == total * GB


def test_systems_without_cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: MACHINE)
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    assert hardware.available_memory() == 50 * GB
    assert hardware.total_memory() == 64 * GB


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        ("0::/", {}, 4),
        ("0::/", {"cpu.max": "max 100000"}, 4),
        ("0::/", {"cpu.max": "6400000 100000"}, 4),
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "100000 0"}, 4),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        (  # v1
            "4:cpu,cpuacct:/docker/x\n0::/",
            {
                "cpu/docker/x/cpu.cfs_quota_us": 200000,
                "cpu/docker/x/cpu.cfs_period_us": 100000,
                "cpu/cpu.cfs_quota_us": -1,
                "cpu/cpu.cfs_period_us": 100000,
            },
            2,
        ),
    ],
)
def test_the_cpus_of_a_container_count(tmp_path, monkeypatch, cgroup, files, cpus):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4), raising=False)
    monkeypatch.setattr(hardware, "ROOT", machine(tmp_path, cgroup, **files))
    assert hardware.usable_cpus() == cpus


def test_cpus_of_a_system_that_limits_no_process_to_some(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    assert hardware.usable_cpus() == 8


def test_the_memory_of_this_machine():
    assert 0 < hardware.available_memory() <= hardware.total_memory()


ALLOCATE = """
import gc, os, sys, torch
from pathlib import Path
from nanochat.base import hardware
from nanochat.base.runtime import halve_until_it_fits

torch.set_num_threads(1)
gc.freeze()  # so that what was imported is not visited each time that memory runs out
for folder, ranks in zip(sys.argv[1::2], sys.argv[2::2]):
    if (child := os.fork()) == 0:
        hardware.ROOT = Path(folder)
        assert hardware.in_container()
        hardware.limit_memory(int(ranks))
        _, rows = halve_until_it_fits(lambda n: torch.ones(n << 20, dtype=torch.uint8), 4096)
        print(rows, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process by its data")
def test_what_a_container_does_not_have_is_an_error_and_halves_a_batch(tmp_path):
    v1 = {"memory/a/memory.limit_in_bytes": GB, "memory/a/memory.usage_in_bytes": GB // 4}
    v2 = {"memory.max": GB, "memory.current": GB // 4}
    nested = {"a/memory.max": GB, "a/memory.current": GB // 4, "a/b/memory.max": "max"}
    cases = [("4:memory:/a", v1, 1), ("0::/", v2, 1), ("0::/a/b", nested, 1), ("0::/", v2, 3)]
    words = []
    for i, (cgroup, files, ranks) in enumerate(cases):
        words += [str(machine(tmp_path / str(i), cgroup, **files)), str(ranks)]
    run = subprocess.run(
        [sys.executable, "-c", ALLOCATE, *words], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["512", "512", "512", "128"], run.stderr
    assert run.stderr.count("out of memory with a batch of 4096 rows: continuing with 2048") == 4


BUSY = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


@pytest.mark.skipif(sys.platform != "linux", reason="the busy program is detached from this one")
def test_the_time_of_children_is_this_programs_own_and_that_of_others_is_not():
    detach = (
        f"import subprocess, sys; command = [sys.executable, '-c', {BUSY!r}]\n"
        "print(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid)"
    )
    child = subprocess.Popen([sys.executable, "-c", BUSY])
    other = int(subprocess.run([sys.executable, "-c", detach], stdout=subprocess.PIPE).stdout)
    programs = psutil.Process(child.pid), psutil.Process(other)
    _, own_before, all_before = hardware.OtherPrograms._so_far()
    used_before = [sum(program.cpu_times()[:2]) for program in programs]
    time.sleep(1)
    of_child, of_other = (
        sum(program.cpu_times()[:2]) - used
        for program, used in zip(programs, used_before, strict=True)
    )
    _, own, used = hardware.OtherPrograms._so_far()
    for program in programs:
        program.kill()
    child.wait()
    assert of_child > 0 and of_other > 0
    assert 0.9 * of_child <= own - own_before <= of_child + 0.5 * of_other
    assert used - all_before >= 0.8 * (of_child + of_other)


@pytest.mark.parametrize(
    ("cpus", "threads", "used", "said"),
    [
        (2, 2, 120, ""),  # its own two threads
        (2, 2, 120 + 15, ""),  # a little
        (
            2,
            2,
            120 + 60,
            "keep 1.0 of 2 CPUs busy, which slows this one down: end them, or compute with OMP_NUM_THREADS=1",
        ),
        (2, 1, 120 + 60, ""),  # there is a CPU for each
        (2, 1, 120 + 120, "keep 2.0 of 2 CPUs busy, which slows this one down: end them"),
        (16, 8, 120 + 6 * 60, ""),
        (
            16,
            8,
            120 + 10 * 60,
            "keep 10.0 of 16 CPUs busy, which slows this one down: end them, or compute with OMP_NUM_THREADS=6",
        ),
    ],
)
def test_the_user_is_told_of_other_programs_that_leave_too_few_cpus(
    monkeypatch, cpus, threads, used, said
):
    readings = iter([(0.0, 0.0, 0.0), (60.0, 120.0, float(used))])
    monkeypatch.setattr(hardware.OtherPrograms, "_so_far", staticmethod(lambda: next(readings)))
    monkeypatch.setattr(hardware, "_allowed_cpus", lambda: range(cpus))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    others = hardware.OtherPrograms()
    monkeypatch.setattr(hardware.time, "monotonic", lambda: 59.0)
    assert others.warning() == ""
    monkeypatch.setattr(hardware.time, "monotonic", lambda: 60.0)
    assert others.warning() == (said and f"other programs {said}")
