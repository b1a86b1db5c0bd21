"""
Predict the memory of training by part, and which device batches fit a GPU or this machine.

    nanochat plan memory --depth 12 --gpu rtx3090
    nanochat plan memory --depth 4 --device_batch_sizes 8 16 32 --sequence_lens 512 1024

Tensors are counted from the shape of the model and from what a layer is declared to keep; tests
compare the count with real steps. A margin on top stands for the context, the compiler and the
allocator: measured where there is a GPU, else from the runs named beside the figures. A row that
does not fit is marked; if none fits, that is an error.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import median
from typing import Any, Literal

from nanochat.base.common import UserError, columns, notice, print0
from nanochat.base.knobs import knob
from nanochat.model.config import GPTConfig
from nanochat.plan import machine
from nanochat.plan.machine import GIB, Machine
from nanochat.plan.shapes import SizeKnobs, counts


@dataclass(frozen=True)
class Margin:
    """Bytes that no tensor shows: process and context, compiler, and the allocator's share."""

    context: float
    compile: float
    fragmentation: float  # of what is allocated


MARGINS = {
    # An RTX 3090's owner saw a context of 1-1.5 GB, 0.8 GB for the compiler's cache and 0.3 GB lost
    # to fragmentation at 17-23 GB.
    "cuda": Margin(1.25e9, 0.8e9, 0.015),
    "mps": Margin(0.5e9, 0.0, 0.05),  # not measured
    # Resident sizes of eight runs, within 7 %: malloc keeps what is freed
    # (runtime.keep_freed_memory), in pieces that often cannot be used again.
    "cpu": Margin(0.4e9, 0.05e9, 0.65),
}


@dataclass(kw_only=True)
class MemoryKnobs(SizeKnobs):
    """Grid"""

    gpu: str = knob("", "GPU to plan for, for example rtx3090 (default: this machine)")
    gpus: int = knob(1, "GPUs that share the optimizer's state", low=1)
    memory_gb: float = knob(
        0.0, "memory available per GPU (default: the GPU's, or what is free here)", low=0
    )
    device_batch_sizes: tuple[int, ...] = knob(
        (1, 2, 4, 8, 16, 32, 64), "rows of a micro-batch, one line of the table each", low=1
    )
    sequence_lens: tuple[int, ...] = knob(
        (), "context lengths of the training rows (default: sequence_len)", low=1
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "precision of the computation"
    )
    compile: Literal["auto", "on", "off"] = knob("auto", "torch.compile; auto = on a GPU")
    micro_batches: int = knob(
        2, "micro-batches per step; with 1, there are no gradients yet when activations peak", low=1
    )
    calibrate: bool = knob(True, "on a GPU of this machine, measure the margin with a short run")
    json: bool = knob(False, "print only JSON")


def kept_by_layer(
    config: GPTConfig, tokens: int, T: int, size: int, cpu: bool, compiled: bool
) -> float:
    """
    Bytes that one layer keeps for its backward pass, for `tokens` tokens in rows of T, `size` bytes
    each: eight vectors of the model's width (the layer's input, the normed inputs of both parts, q
    before and after its norm, the attention's output twice, the residual), three of the key-value
    width (one more with value embeddings), the MLP's hidden vectors before and after the
    activation, and in float32 the scales of four norms with the softmax's sum; also the weights in
    the compute dtype. Of these, compiled code on a GPU keeps one of each kind and computes the
    others again (gpt.ACTIVATION_BUDGET). What is not compiled keeps copies between operators, in
    half precision also in float32; compiled code on a CPU keeps the attention's probabilities,
    which fused kernels do not.
    """
    from nanochat.model.attention import QUERY_BLOCK

    hidden, width, kv = 2, 8 + 4 * config.convolutions, 3 + config.value_embeddings
    if config.activation == "swiglu":
        hidden = 3 if compiled else 4
    if not compiled:
        width += 3 if size == 4 else 6
    elif not cpu:
        hidden, width, kv = hidden - 1, width // 2, kv - 1
    vectors = width * config.n_embd + kv * config.n_kv_head * config.head_dim
    scales = 2 + 2 * config.n_head + config.n_kv_head
    kept = tokens * (size * (vectors + hidden * config.hidden) + 4 * scales)
    if size < 4:
        kept += size * counts(config)["transformer"] / config.n_layer
    if cpu and compiled:
        kept += size * tokens * config.n_head * (T + QUERY_BLOCK) / 2
    return kept


def predict(
    config: GPTConfig,
    rows: int,
    sequence_len: int,
    *,
    dtype: str,
    device_type: str,
    compiled: bool,
    margin: Margin | None = None,
    world_size: int = 1,
    micro_batches: int = 2,
) -> dict[str, int]:
    """
    Bytes that training takes on one device, by part. Weights, gradients and optimizer (its state)
    stay; activations, loss, update (what an optimizer step needs beside its state) and evaluation
    are those of different moments, so `allocated`, the peak of all tensors, is less than their sum.
    total = allocated + context + compile + fragmentation.
    """
    from nanochat.model.attention import QUERY_BLOCK
    from nanochat.model.loss import BLOCK_CHUNKS, CHUNK_ELEMENTS, COMPILED_ELEMENTS

    cpu, size = device_type == "cpu", 4 if dtype == "float32" else 2
    n, C, V, T = counts(config), config.n_embd, config.vocab_size, sequence_len
    tokens, matrices = rows * T, n["transformer"]
    tables = n["total"] - matrices
    layer = kept_by_layer(config, tokens, T, size, cpu, compiled)
    activations = config.n_layer * layer + 3 * size * tokens * C + 16 * micro_batches * tokens
    # The loss: the head's weights, the gradients of both factors, and chunks of logits.
    most = CHUNK_ELEMENTS.get(device_type, 1 << 25)
    if compiled:
        most = COMPILED_ELEMENTS.get(device_type, most)
    chunk = min(most, tokens * V)
    block = size * min(BLOCK_CHUNKS.get(device_type, 1) * chunk, tokens * V)
    copies = 12 if compiled else 16 if config.softcap else 8  # bytes per logit
    copies = size if compiled and not cpu else copies
    both = size * tokens * C + 4 * V * C
    loss = both + block + copies * chunk + (size * V * C if size < 4 else 0)
    # A layer's backward pass: gradients of its hidden vectors, or a block of scores.
    work = size * tokens * 2 * config.hidden
    if cpu:
        work = max(work, tokens * config.n_head * min(T, QUERY_BLOCK) * (4 + size))
    kept = 4 * n["total"] if micro_batches > 1 else 4 * V * C
    backward = both + size * tokens * C + 4 * V * C + work
    # Muon's largest pool of matrices of one shape: on a GPU all at once.
    hidden = config.hidden * (2 if config.activation == "swiglu" else 1)
    pool = config.n_layer * C * max(2 * C + 2 * config.n_kv_head * config.head_dim, hidden)
    update = pool * (4 + size if cpu else 20)
    logits = 8 if config.softcap else 4
    evaluation = size * tokens * (4 * C + 2 * config.hidden) + logits * chunk
    if compiled and not cpu:  # the code of training, which keeps what training keeps
        evaluation = activations + 2 * size * chunk
    parts = {
        "weights": 4 * n["total"],
        "gradients": 4 * n["total"],
        "optimizer": (4 * matrices + 8 * tables) / world_size,
        "activations": activations,
        "loss": loss,
        "update": update,
        "evaluation": evaluation,
    }
    peak = max(kept + activations + max(loss, backward), 4 * n["total"] + max(update, evaluation))
    allocated = parts["weights"] + parts["optimizer"] + peak
    margin = margin or MARGINS[device_type]
    beside = {
        "allocated": allocated,
        "context": margin.context,
        "compile": margin.compile if compiled else 0,
        "fragmentation": margin.fragmentation * allocated,
    }
    every = parts | beside | {"total": sum(beside.values())}
    return {name: round(value) for name, value in every.items()}


def measured_margin(points: Sequence[Mapping[str, Any]], counted: Sequence[float]) -> Margin:
    """
    The margin of a GPU from points measured on it and the bytes that were counted for each: the
    context is what the card holds beyond torch's pool, including other processes, and fragmentation
    what the pool holds beyond the counted bytes. Medians.
    """
    context = median(p["card_bytes"] - p["pool_bytes"] for p in points)
    pool = median(p["pool_bytes"] / n for p, n in zip(points, counted, strict=True))
    return Margin(context, 0.0, pool - 1)


def calibrate(
    config: GPTConfig, rows: int, sequence_len: int, dtype: str, compiled: bool
) -> Margin | None:
    """
    The margin of this machine's GPU from a few real steps of a small device batch. None if even
    that batch does not fit; UserError if it fails in another way.
    """
    how: dict[str, Any] = {"dtype": dtype, "device_type": "cuda", "compiled": compiled}
    config = replace(config, sequence_len=sequence_len)
    sizes = {"config": asdict(config), "rows": rows, "accumulation": 2, "seconds": 0.0}
    point = machine.in_process({**sizes, **how})
    if point.get("error") == "out of memory":
        return None
    if "error" in point:
        raise UserError(
            f"the margin cannot be measured ({point['error']}): use the usual one with "
            "--no_calibrate"
        )
    counted = predict(config, rows, sequence_len, **how)["allocated"]
    return measured_margin([point], [counted])


def _planned_machine(knobs: MemoryKnobs) -> Machine:
    if not knobs.gpu:
        planned = machine.here("auto", knobs.dtype)
    else:
        planned = machine.of_card(knobs.gpu)
        if knobs.dtype != "auto":
            planned = replace(planned, dtype=knobs.dtype)
    return replace(planned, memory_bytes=knobs.memory_gb * GIB or planned.memory_bytes)


def run(knobs: MemoryKnobs) -> dict[str, Any]:
    """Print the grid and return it. UserError if nothing fits."""
    lengths = knobs.sequence_lens or (knobs.sequence_len,)
    if max(lengths) > knobs.sequence_len:
        raise UserError(
            f"rows of {max(lengths)} tokens do not fit a context of {knobs.sequence_len}: "
            "raise --sequence_len as well"
        )
    if not knobs.device_batch_sizes:
        raise UserError(
            "--device_batch_sizes is empty: give some, as in --device_batch_sizes 8 16 32"
        )
    config = knobs.config()
    target = _planned_machine(knobs)
    compiled = target.compiles(0.0, knobs.compile)
    if knobs.compile == "on" and not compiled:
        notice(f"predicted without torch.compile, which does not work on {target.name}")
    margin = None
    if target.device_type == "cuda" and not knobs.gpu and knobs.calibrate:
        print0("calibrating with a few steps of the smallest device batch", file=sys.stderr)
        smallest = min(knobs.device_batch_sizes), min(lengths)
        margin = calibrate(config, *smallest, target.dtype, compiled)
    predictions = []
    for T, rows in product(sorted(set(lengths)), sorted(set(knobs.device_batch_sizes))):
        parts = predict(
            config,
            rows,
            T,
            dtype=target.dtype,
            device_type=target.device_type,
            world_size=knobs.gpus,
            micro_batches=knobs.micro_batches,
            compiled=compiled,
            margin=margin,
        )
        fits = parts["total"] <= target.memory_bytes
        predictions.append({"rows": rows, "sequence_len": T, **parts, "fits": fits})
    _show(predictions, target, compiled)
    return {
        "device": target.name,
        "memory_bytes": round(target.memory_bytes),
        "dtype": target.dtype,
        "compiled": compiled,
        "config": asdict(config),
        "grid": predictions,
    }


def _show(predictions: Sequence[Mapping[str, Any]], target: Machine, compiled: bool) -> None:
    """Print the table. UserError if nothing fits."""
    available = target.memory_bytes / GIB
    print0(
        f"{target.name}, {available:.1f} GB; {target.dtype}, "
        f"{'compiled' if compiled else 'not compiled'}; in GB of 2^30 bytes"
    )
    shown = ("state", "activations", "loss", "update", "evaluation", "margin", "total")
    table = []
    for parts in predictions:
        state = parts["weights"] + parts["gradients"] + parts["optimizer"]
        cells = {**parts, "state": state, "margin": parts["total"] - parts["allocated"]}
        figures = [f"{cells[name] / GIB:.2f}" for name in shown]
        verdict = "fits" if parts["fits"] else "does not fit"
        table.append((parts["rows"], parts["sequence_len"], *figures, verdict))
    print0(columns(("rows", "T", *shown, ""), table))
    if any(parts["fits"] for parts in predictions):
        return
    least = predictions[0]
    fewer = "" if least["rows"] == 1 else ", or fewer rows in --device_batch_sizes"
    raise UserError(
        f"nothing fits {target.name}: {least['rows']} rows of {least['sequence_len']} take "
        f"{least['total'] / GIB:.1f} GB of {available:.1f}; choose a smaller --depth, --vocab or "
        f"--sequence_len{fewer}"
    )
