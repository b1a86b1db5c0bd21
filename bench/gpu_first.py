"""
The first ten minutes on a card: whether everything is right there, and how fast it is.

    bash bench/gpu_first.sh                         on the first CUDA device
    bash bench/gpu_first.sh --device cpu --tiny     the same logic on a CPU, with tiny sizes

Each part of PARTS runs in a process of its own with a time limit and leaves PART.json, with the name
of the card, and PART.log in the folder --out. The last output is a table of passes and failures, and
the exit status is 0 only if all parts passed. It needs a checkout, because it uses the tests' models.
"""

import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import (
    Tensor,
    _fused_sdp_choice,  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
)
from torch.nn.attention import SDPBackend

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import priors  # noqa: E402
import tiny  # noqa: E402

from bench.bandwidth import read_bandwidth  # noqa: E402
from nanochat.base import hardware, knobs  # noqa: E402
from nanochat.base.common import UserError, base_dir, columns, print0  # noqa: E402
from nanochat.base.knobs import knob  # noqa: E402
from nanochat.base.runtime import (  # noqa: E402
    Runtime,
    compiler_missing,
    halve_until_it_fits,
    open_runtime,
)
from nanochat.data.feed import Batch  # noqa: E402
from nanochat.model import attention  # noqa: E402
from nanochat.model.config import GPTConfig  # noqa: E402
from nanochat.model.gpt import GPT  # noqa: E402
from nanochat.train import compiler  # noqa: E402
from nanochat.train.knobs import TrainKnobs  # noqa: E402
from nanochat.train.run import make_optimizer  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "gpu_losses.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Report = dict[str, Any]  # "checks" has {what must hold: whether it does}; the rest are figures


@dataclass(frozen=True)
class Place:
    """Where a part runs: the device and its dtype, and whether sizes are tiny."""

    runtime: Runtime
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return self.runtime.device.type == "cuda"

    def pick(self, full: Any, small: Any) -> Any:
        return small if self.tiny else full

    def with_dtype(self, dtype: torch.dtype) -> Runtime:
        runtime = self.runtime
        return Runtime(runtime.device, dtype, runtime.rank, runtime.world_size, runtime.seed)

    def modes(self) -> list[str]:
        """What can run here: "eager", and "compiled" where there is a compiler."""
        return ["eager"] if compiler_missing(self.runtime.device) else ["eager", "compiled"]


# ---- the card


def chosen_backends(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> list[str]:
    """The kernels that torch chooses for what attention asks of it on a GPU, by name."""
    real, seen = F.scaled_dot_product_attention, []

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(SDPBackend(_fused_sdp_choice(*args, **options)).name)
        return real(*args, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        attention.attend_fused(q, k, v, window)
    return seen


def backend_cases(place: Place) -> dict[str, list[str]]:
    """The chosen kernels by precision and by how heads are grouped."""
    T, D = place.pick(1024, 32), 64
    names = {"float32": torch.float32, "float16": torch.float16}
    if place.runtime.dtype is torch.bfloat16:
        names["bfloat16"] = torch.bfloat16
    cases = {}
    for name, dtype in names.items():
        for heads, shared in (("own keys", 4), ("grouped", 2)):
            shapes = (4, shared, shared)
            q, k, v = (
                torch.randn(2, h, T, D, device=place.runtime.device, dtype=dtype) for h in shapes
            )
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            cases[f"{name}, {heads}"] = chosen_backends(q, k, v)
    return cases


def card(place: Place) -> Report:
    """What the card is and can do, and which attention kernels run."""
    device, dtype = place.runtime.device, place.runtime.dtype
    wanted = {place.runtime.dtype_name: dtype}
    if place.on_gpu:
        wanted |= {"float32 (TF32)": torch.float32, "float16": torch.float16}
    peaks = {n: float(f"{hardware.measured_peak(device, t) / 1e12:.3g}") for n, t in wanted.items()}
    bandwidth = read_bandwidth(device) / 1e9
    table = hardware.lookup(hardware.device_name(device))
    backends = backend_cases(place)
    checks = {
        "products run": all(math.isfinite(x) and x > 0 for x in peaks.values()),
        "torch.compile can work": not compiler_missing(device),
        "no attention materialises its scores": not place.on_gpu
        or all("MATH" not in used for used in backends.values()),
    }
    if place.on_gpu and torch.cuda.get_device_capability(device) >= (8, 0):
        half = [used for name, used in backends.items() if not name.startswith("float32")]
        checks["flash attention in half precision"] = all(
            set(used) <= {"FLASH_ATTENTION", "CUDNN_ATTENTION"} for used in half
        )
    properties = torch.cuda.get_device_properties(device) if place.on_gpu else None
    return {
        "checks": checks,
        "torch": torch.__version__,
        "capability": f"{properties.major}.{properties.minor}" if properties else "",
        "memory_gb": round(properties.total_memory / 2**30, 1) if properties else 0,
        "peak_tflops": peaks,
        "bandwidth_gb_per_s": round(bandwidth),
        "table": {"bf16": table.bf16, "bandwidth": table.bandwidth} if table else None,
        "backends": backends,
    }


# ---- tests


class _Outcomes:
    """A plugin of pytest that counts outcomes and keeps the names of failures."""

    def __init__(self):
        self.counts: dict[str, int] = defaultdict(int)
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.failed.append(report.nodeid)


def tests(place: Place) -> Report:
    """The tests marked gpu. Without a GPU they are all skipped."""
    import pytest

    outcomes = _Outcomes()
    os.chdir(ROOT)
    words = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/test_gpu.py"]
    code = pytest.main(words, plugins=[outcomes])
    ran = outcomes.counts["passed" if place.on_gpu else "skipped"]
    return {
        "checks": {"pytest -m gpu": code == 0 and not outcomes.failed and ran > 0},
        "outcomes": dict(outcomes.counts),
        "failed": outcomes.failed,
    }


# ---- golden losses

GOLDEN_STEPS = 20
GOLDEN_KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "grouped": {"n_kv_head": 2},
    "tied": {"tie_embeddings": True},
    "swiglu": {"activation": "swiglu", "softcap": 0.0},
    "prior": {},
}
# How far a loss may be from the file's: products are summed in another order on every device, and
# training amplifies it. Without TF32, which would be as coarse as bfloat16
TOLERANCE = {"float32": 2e-3, "bfloat16": 4e-2}


def golden_model(kind: str, runtime: Runtime) -> GPT:
    """A model of a kind of GOLDEN_KINDS with the same weights on every device."""
    shape = {"sequence_len": 64, "vocab_size": 250, "n_layer": 2, "n_head": 4, "n_kv_head": 4}
    config = GPTConfig(**{**shape, "n_embd": 128, **GOLDEN_KINDS[kind]})
    tensors: dict[str, Tensor] = {}
    if kind == "prior":  # without a curve of distances, which GPUs only fit
        terms = {n: x for n, x in priors.terms(vocab=250).items() if n != "lag"}
        with tempfile.TemporaryDirectory() as folder:
            path = priors.write(Path(folder) / "prior.safetensors", terms)
            config, tensors = priors.made(path, runtime.device, config)
    model = GPT.build(config, "cpu", runtime.dtype)
    model.init_weights(7)
    if model.prior is not None:
        model.prior.load_state_dict(tensors)
    model.to(runtime.device)
    model.set_context(config.sequence_len)
    return model


def golden_losses(kind: str, runtime: Runtime, compiled: bool) -> list[float]:
    """The losses of GOLDEN_STEPS steps over four batches that come again."""
    model = golden_model(kind, runtime)
    if compiled:
        compiler.prepare(model)
    optimizer = tiny.optimizer(model, runtime, weight_decay=0.01)
    if runtime.dtype is torch.float32:
        optimizer.ns_dtype = torch.float32  # as on a CPU
    losses = []
    for step in range(GOLDEN_STEPS):
        batch = tiny.batch(seed=step % 4, T=64, vocab=250)
        inputs, targets = (x.to(runtime.device) for x in (batch.inputs, batch.targets))
        optimizer.zero_grad()
        loss = model.loss(inputs, targets) / targets.numel()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def golden(place: Place) -> Report:
    """The losses of training in both precisions, eager and compiled, against those of the file."""
    file, worst, checks = json.loads(GOLDEN.read_text(encoding="utf-8")), {}, {}
    torch.set_float32_matmul_precision("highest")
    for mode in place.modes():
        for dtype_name, dtype in reversed(DTYPES.items()):
            for kind in place.pick(GOLDEN_KINDS, ("prior",)):
                got = golden_losses(kind, place.with_dtype(dtype), mode == "compiled")
                want = file[f"{kind}, {dtype_name}"]
                pairs = zip(got, want, strict=True)
                error = max(abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in pairs)
                name = f"{kind}, {dtype_name}, {mode}"
                worst[name] = round(error, 6)
                checks[name] = error < TOLERANCE[dtype_name]
                print0(f"{name}: {error:.2e}")
                torch.compiler.reset()
    return {"checks": checks, "largest_relative_error": worst}


def write_golden() -> None:
    """Write the file that cards are compared with, on a CPU."""
    out = {}
    for kind in GOLDEN_KINDS:
        for name, dtype in DTYPES.items():
            runtime = Runtime(torch.device("cpu"), dtype, 0, 1, 42)
            losses = golden_losses(kind, runtime, compiled=False)
            out[f"{kind}, {name}"] = [round(x, 6) for x in losses]
    GOLDEN.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


# ---- training

KINDS_OF_WORK = (  # of kernels and operators, by their names; the first that matches counts
    ("attention", r"flash|fmha|attention|_BlockAttention|softmax_warp"),
    ("products", r"gemm|cutlass|nvjet|cublas|xmma|\bmm\b|\bbmm\b|addmm|baddbmm|_int_mm|linear"),
    ("loss", r"log_softmax|cross_entropy|nll|LinearCrossEntropy"),
    ("copies", r"memcpy|memset|copy_|\bcat\b|clone"),
    ("reductions", r"triton_(per|red)|reduce|norm|sum|mean"),
    ("elementwise", r"triton_poi|elementwise|mul|add|div|sub|pow|sigmoid|exp|tanh|relu|silu|fill"),
)


def kind_of_work(name: str) -> str:
    return next((k for k, pattern in KINDS_OF_WORK if re.search(pattern, name, re.I)), "other")


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of one call of step() by kind of work: of kernels on a GPU, else of operators."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize()
    milliseconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        micro = event.self_device_time_total if gpu else event.self_cpu_time_total
        if micro and (not gpu or str(event.device_type).endswith("CUDA")):
            milliseconds[kind_of_work(event.key)] += micro / 1e3
    return {kind: round(ms, 3) for kind, ms in sorted(milliseconds.items())}


def training_step(
    place: Place, config: GPTConfig, rows: int, compiled: bool, matmul: str = "float"
) -> Callable[[], float]:
    """A step of the trainer on random tokens, which returns the loss."""
    runtime = place.runtime
    torch.manual_seed(runtime.seed)  # of the tokens
    model = GPT.build(config, runtime.device, runtime.dtype)
    model.init_weights(runtime.seed)
    model.set_matmul(matmul)
    if compiled:
        compiler.prepare(model)
    optimizer = make_optimizer(model, TrainKnobs(embedding_lr=0.2), runtime)
    size = rows, config.sequence_len + 1
    tokens = torch.randint(0, config.vocab_size, size, device=runtime.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad()
        loss = model.loss(inputs, targets) / targets.numel()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def speed_of_training(place: Place, config: GPTConfig, rows: int, seconds: float) -> Report:
    """Tokens per second, share of the peak, peak memory and one profiled step of a shape."""
    device, compiled = place.runtime.device, "compiled" in place.modes()

    def attempt(rows: int) -> Report:
        if place.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        step, times, losses = training_step(place, config, rows, compiled), [], []
        began = time.perf_counter()
        losses.append(step())
        first = time.perf_counter() - began
        losses += [step(), step()]
        began = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < seconds:
            at = time.perf_counter()
            losses.append(step())
            times.append(time.perf_counter() - at)
        median = sorted(times)[len(times) // 2]
        rate = rows * config.sequence_len / median
        flops = rate * GPT.build(config, "meta").flops_per_token()
        table = hardware.lookup(hardware.device_name(device))
        return {
            "tok_per_sec": round(rate),
            "step_ms": round(1e3 * median, 2),
            "first_step_s": round(first, 1),
            "share_of_measured_peak": round(
                flops / hardware.measured_peak(device, place.runtime.dtype), 4
            ),
            "share_of_table_peak": round(flops / table.flops, 4) if table else None,
            "peak_memory_gb": round(place.runtime.peak_memory() / 1e9, 2),
            "ms_by_kind": profiled(step, device),
            "finite": all(map(math.isfinite, losses)),
            "compiled": compiled,
        }

    figures, fitting = halve_until_it_fits(attempt, rows, "a step")
    return {"rows": fitting, "T": config.sequence_len, **figures}


# Layers, width, width of a head, context, vocabulary, rows; the second is that of runs/ittybitty.sh
SHAPES = {"d12": (12, 768, 128, 2048, 32768, 32), "d4": (4, 512, 64, 2048, 24576, 48)}


def shape(place: Place, name: str) -> tuple[GPTConfig, int]:
    """The configuration of SHAPES and its rows, or something tiny."""
    depth, width, head, T, V, rows = place.pick(SHAPES[name], (1, 32, 16, 32, 64, 2))
    heads = width // head
    return GPTConfig(
        sequence_len=T,
        vocab_size=V,
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=width,
    ), rows


def train(place: Place) -> Report:
    """How fast the trainer's step is for both shapes, and what its time goes to."""
    figures = {
        name: speed_of_training(place, *shape(place, name), place.pick(8.0, 0.0)) for name in SHAPES
    }
    for name, row in figures.items():
        print0(name, json.dumps(row))
    checks = {f"{name}: losses are numbers": row.pop("finite") for name, row in figures.items()}
    if place.on_gpu:  # below it, something runs that should not
        least = {name: row["share_of_measured_peak"] >= 0.2 for name, row in figures.items()}
        checks |= {f"{name}: at least 20 % of the measured peak": ok for name, ok in least.items()}
    return {"checks": checks, **figures}


def int8(place: Place) -> Report:
    """A training step with the matrices of the blocks multiplied by 8-bit integers, and without."""
    config, rows = shape(place, "d12")
    rates, losses = {}, {}
    for kind in ("float", "int8"):
        compiled = "compiled" in place.modes()
        step = training_step(place, config, place.pick(16, rows), compiled, kind)
        losses[kind] = [step() for _ in range(3)][-1]
        times = []
        for _ in range(place.pick(20, 2)):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        tokens = place.pick(16, rows) * config.sequence_len
        rates[kind] = round(tokens / sorted(times)[len(times) // 2])
        del step
    near = abs(losses["int8"] / losses["float"] - 1) < 0.02
    return {"checks": {"the loss is that of floats": near}, "tok_per_sec": rates, "loss": losses}


# ---- decoding


DECODED = {"prompt": (64, 4), "tokens": (256, 4), "repeats": (3, 1)}  # on a card, tiny


def decode(place: Place) -> Report:
    """Tokens per second of d12 at several numbers of rows, with and without CUDA graphs."""
    from bench import decode as bench

    words = place.pick(
        ["--depth=12", "--vocab_size=32768"],
        ["--depth=1", "--model_dim=32", "--head_dim=16", "--vocab_size=64", "--sequence_len=64"],
    )
    words += ["--batch", *place.pick(("1", "8", "32"), ("1", "2"))]
    words += [f"--{n}={place.pick(*v)}" for n, v in DECODED.items()]
    words += [f"--device_type={place.runtime.device.type}", f"--dtype={place.runtime.dtype_name}"]
    figures = {}
    for mode, graphs in (("eager", "false"), ("graphed", "true")):
        for row in bench.main([*words, f"--graphs={graphs}"])["batches"]:
            figures.setdefault(str(row["batch"]), {})[mode] = row["tok_per_sec"]
    checks = {"every size generates": all(x > 0 for f in figures.values() for x in f.values())}
    if place.on_gpu:
        checks["graphs are faster for one row"] = figures["1"]["graphed"] > figures["1"]["eager"]
    return {"checks": checks, "tok_per_sec_by_rows": figures}


# ---- what must be survived


class _OutOfMemoryInBackward(torch.autograd.Function):
    """Passes a tensor on; its backward pass asks for more memory than there is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.device = x.device
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] + torch.empty(1 << 50, dtype=torch.uint8, device=ctx.device)[0]


def backward_out_of_memory(folder: Path, runtime: Runtime) -> tuple[list[int], bool]:
    """
    Train two steps with a model that runs out of memory in the backward pass of more than two rows:
    the rows of every forward pass, and whether the weights are those of a run that never did.
    """
    batches, finals, rows = tiny.ListFeed.random(2, rows=8), [], []
    for name, limit in (("limited", 2), ("plain", 8)):
        model = tiny.randomise(tiny.model(n_embd=64)).to(runtime.device)
        model.compute_dtype = runtime.dtype
        model.set_context(16)
        loss = model.loss

        def limited(inputs: Tensor, *rest: Any, loss: Any = loss, limit: int = limit) -> Tensor:
            if limit < 8:
                rows.append(inputs.size(0))
            total = loss(inputs, *rest)
            return _OutOfMemoryInBackward.apply(total) if inputs.size(0) > limit else total

        setattr(model, "loss", limited)  # noqa: B010
        steps = [
            Batch(b.inputs.to(runtime.device), b.targets.to(runtime.device)) for b in batches.steps
        ]
        tiny.fit(folder / name, model, tiny.ListFeed(steps), runtime=runtime)
        finals.append(tiny.weights(model))
    # Two rows at a time are summed in another order than eight
    same = all(torch.allclose(x, finals[1][name], 0.1, 0.02) for name, x in finals[0].items())
    return rows, same


def run_flags(place: Place, folder: Path) -> list[str]:
    """The flags of a short base_train in this place, whose text and tokenizer are written here."""
    sizes = [
        "--device_type",
        "--dtype",
        "--model_dim",
        "--head_dim",
        "--device_batch_size",
        "--total_batch_size",
    ]
    words = [w for w in tiny.workplace(folder) if not w.startswith(tuple(sizes))]
    width, head, rows = place.pick((256, 64, 64), (32, 8, 8))
    runtime = place.runtime
    return [
        *words,
        "--eval_every=0",
        f"--device_type={runtime.device.type}",
        f"--dtype={runtime.dtype_name}",
        f"--model_dim={width}",
        f"--head_dim={head}",
        f"--device_batch_size={rows}",
        f"--total_batch_size={rows * 64}",
        f"--compile={'on' if 'compiled' in place.modes() and not place.tiny else 'off'}",
    ]


def recovery(place: Place) -> Report:
    """A backward pass out of memory, a resumed run, a context that grows: all without recompiling
    until torch gives up."""
    from nanochat.commands import base_train

    folder = base_dir()
    rows, same = backward_out_of_memory(folder / "oom", place.with_dtype(torch.float32))
    words, steps = run_flags(place, folder), place.pick(40, 4)
    stages = ["--context_stages", "16@0", "32@0.5"]
    whole = base_train.main([*words, *stages, f"--num_iterations={steps}", "--model_tag=whole"])
    half = [*words, *stages, "--model_tag=half", f"--num_iterations={steps}"]
    base_train.main([*half[:-1], f"--num_iterations={steps // 2}"])
    again = base_train.main([*half, "--resume=auto", "--new_horizon=stretch"])
    return {
        "checks": {
            "out of memory in the backward pass: rows halve to those that fit": rows[:3]
            == [8, 4, 2],
            "out of memory in the backward pass: the update is the same": same,
            "a context that grows": whole["steps"] == steps
            and math.isfinite(whole["eval"]["val_bpb"]),
            "a resumed run sees the same tokens": again["tokens"] == whole["tokens"],
        },
        "rows_tried": rows,
        "val_bpb": {"whole": whole["eval"]["val_bpb"], "resumed": again["eval"]["val_bpb"]},
    }


def finetuning(place: Place) -> Report:
    """Thirty steps of finetuning, whose batches have many widths."""
    from nanochat.commands import base_train, chat_sft

    words = run_flags(place, base_dir())
    steps, count = place.pick((30, 1024), (2, 16))
    base_train.main([*words, "--num_iterations=4", "--sequence_len=512", "--model_tag=t"])
    began = time.perf_counter()
    out = chat_sft.main(
        [
            "--source=base",
            f"--data=tinyworld@{count}",
            f"--num_iterations={steps}",
            "--model_tag=t",
            "--sample_every=0",
            "--eval_tokens=2000",
            f"--device_type={place.runtime.device.type}",
        ]
    )
    return {
        "checks": {
            f"{steps} steps": out["steps"] == steps and math.isfinite(out["eval"]["val_bpb"])
        },
        "seconds": round(time.perf_counter() - began, 1),
        "val_bpb": out["eval"]["val_bpb"],
    }


def half_precision(place: Place) -> Report:
    """A run in float16, with its loss scaler."""
    from nanochat.commands import base_train

    words = [w for w in run_flags(place, base_dir()) if not w.startswith(("--dtype", "--compile"))]
    steps = place.pick(40, 3)
    out = base_train.main([*words, "--dtype=float16", "--compile=off", f"--num_iterations={steps}"])
    learned = out["eval"]["val_bpb"] < place.pick(4.0, math.inf)
    return {"checks": {"a float16 run learns": learned}, "val_bpb": out["eval"]["val_bpb"]}


# ---- the parts, one after the other

# In the order in which they run, each with its limit in seconds
PARTS: dict[str, tuple[Callable[[Place], Report], int]] = {
    "card": (card, 60),
    "tests": (tests, 180),
    "golden": (golden, 150),
    "train": (train, 150),
    "decode": (decode, 60),
    "recovery": (recovery, 90),
    "finetuning": (finetuning, 60),
    "float16": (half_precision, 30),
    "int8": (int8, 90),
}


@dataclass(kw_only=True)
class FirstKnobs:
    """What to run"""

    device: Literal["cuda", "cpu"] = knob("cuda", "the card, or a CPU in its place")
    tiny: bool = knob(False, "tiny sizes and no compiler: to try the script itself")
    parts: tuple[str, ...] = knob((), f"some of: {' '.join(PARTS)} (default: all)")
    out: str = knob("", "folder for the results (default: gpu_first in the base folder)")
    minutes: float = knob(10.0, "start no part after this time, and end the one that runs", low=0)
    write_golden: bool = knob(False, f"write {GOLDEN.relative_to(ROOT)} on a CPU, and end")


def run_part(name: str, device: str, tiny_sizes: bool, out: str) -> None:
    """One part, in the process that was started for it: writes its JSON and its log."""
    with open(Path(out) / f"{name}.log", "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with tempfile.TemporaryDirectory() as base:
        os.environ["NANOCHAT_BASE_DIR"] = base
        os.environ.setdefault(compiler.FOLDER, str(Path(out) / "compiled"))  # shared by the parts
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        if tiny_sizes:  # every line runs, but nothing waits for a compiler
            torch.set_num_threads(1)
            torch.compiler.set_stance("force_eager")
        place = Place(open_runtime(device, "float32" if tiny_sizes else "auto"), tiny_sizes)
        began = time.monotonic()
        try:
            report = PARTS[name][0](place)
        except BaseException:
            Path(out, f"{name}.error").write_text(traceback.format_exc(), encoding="utf-8")
            raise
        report["seconds_in_all"] = round(time.monotonic() - began, 1)
        report["card"] = hardware.device_name(place.runtime.device)
        _write(Path(out) / f"{name}.json", report)


def _write(path: Path, report: Report) -> None:
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def main(argv: Sequence[str] | None = None) -> dict[str, Report]:
    k, _ = knobs.parse(
        FirstKnobs,
        argv,
        command="bench.gpu_first",
        description="Check and measure everything on a card that it has not met before.",
    )
    if k.write_golden:
        write_golden()
        return {}
    if unknown := set(k.parts) - set(PARTS):
        raise UserError(f"there is no part {min(unknown)!r}: choose from {', '.join(PARTS)}")
    if k.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this machine has no CUDA device: use --device=cpu --tiny to try the script"
        )
    out = Path(k.out or base_dir() / "gpu_first")
    out.mkdir(parents=True, exist_ok=True)
    for name in k.parts or PARTS:  # those of an earlier run
        (out / f"{name}.json").unlink(missing_ok=True)
    context = _context()
    reports: dict[str, Report] = {}
    deadline = time.monotonic() + 60 * k.minutes
    try:
        for name in k.parts or PARTS:
            limit = PARTS[name][1] * (10 if k.tiny else 1)  # other work may keep a CPU busy
            limit = min(limit, deadline - time.monotonic())
            reports[name] = _attempt(context, name, k, out, limit)
            print0(f"{name}: {'passed' if passed(reports[name]) else 'FAILED'}")
    finally:  # also after Ctrl+C
        print0(table(reports))
    return reports


def _context() -> Any:
    """Starts processes from one that has imported torch and the project, but not opened a card."""
    context = multiprocessing.get_context("forkserver")
    modules = "nanochat.commands.base_train", "nanochat.train.stage", "bench.gpu_first"
    context.set_forkserver_preload([*modules, "torch._dynamo", "torch._inductor.cpu_vec_isa"])
    return context


def _attempt(context: Any, name: str, k: FirstKnobs, out: Path, limit: float) -> Report:
    """Run a part in a process and return its report, or one that says how it failed."""
    path = out / f"{name}.json"
    if limit <= 0:
        report = {"checks": {"was started": False}}
        _write(path, report)
        return report
    print0(f"{name}: at most {limit:.0f} s")
    process = context.Process(target=run_part, args=(name, k.device, k.tiny, str(out)))
    process.start()
    try:
        process.join(limit)
    finally:
        late = process.is_alive()
        process.kill()
        process.join()
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    what = f"ends within {limit:.0f} s" if late else f"ends without an error (see {name}.error)"
    report = {"checks": {what: False}}
    _write(path, report)
    return report


def passed(report: Report) -> bool:
    return all(report["checks"].values())


def table(reports: dict[str, Report]) -> str:
    """Every check with its verdict."""
    rows = [
        (name, check, "pass" if ok else "FAIL")
        for name, report in reports.items()
        for check, ok in report["checks"].items()
    ]
    card = next((r["card"] for r in reports.values() if "card" in r), "no part ended")
    failed = sum(verdict == "FAIL" for *_, verdict in rows)
    return (
        f"{columns(('part', 'check', 'result'), rows)}\n\n{card}: {len(rows) - failed} checks "
        f"passed, {failed} failed"
    )


def command() -> None:
    """main() with an exit status: 1 if a check failed."""
    if not all(map(passed, main().values())):
        sys.exit(1)


if __name__ == "__main__":
    from nanochat.base.common import entry

    entry(command)
