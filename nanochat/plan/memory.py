"""
Predict the memory of training by part, and which device batches fit a GPU or this machine.

    nanochat plan memory --depth 12 --gpu rtx3090
    nanochat plan memory --depth 4 --device_batch_sizes 8 16 32 --sequence_len 1024

Tensors are counted from the shape of the model and from what a layer is declared to keep; tests
compare the count with real steps. What no tensor shows (context, compiler, allocator) is taken from
plan probe where it was run on the machine, else from the runs named beside the figures. A row that
does not fit is marked; if none fits, that is an error.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from nanochat.base.common import UserError, columns, print0
from nanochat.base.knobs import knob
from nanochat.model.config import GPTConfig
from nanochat.plan import machine
from nanochat.plan.machine import GIB, CardKnobs, Machine, Point
from nanochat.plan.shapes import SizeKnobs, counts

# By kind of device: bytes of the process and its context, bytes of the compiler, and the
# allocator's share of what is allocated.
BESIDE = {
    # An RTX 3090's owner saw a context of 1-1.5 GB, 0.8 GB for the compiler's cache and 0.3 GB lost
    # to fragmentation at 17-23 GB.
    "cuda": (1.25e9, 0.8e9, 0.015),
    "mps": (0.5e9, 0.0, 0.05),  # not measured
    # Resident sizes of eight runs, within 7 %: malloc keeps what is freed
    # (runtime.keep_freed_memory), in pieces that often cannot be used again.
    "cpu": (0.4e9, 0.05e9, 0.65),
}
# Bytes that a run takes on a CPU beside steps such as a probe measures: its text, evaluations and
# saves. Two runs of 2 x 128 took 0.2 and 0.3 GiB more (dev/LOG.md).
RUN = 0.25e9
USABLE = 0.95  # of a device's memory for a plan: the driver and the screen take some
SHOWN = ("state", "activations", "loss", "update", "beside", "total")  # parts, as predict says


@dataclass(kw_only=True)
class MemoryKnobs(CardKnobs, SizeKnobs):
    """Grid"""

    device_batch_sizes: tuple[int, ...] = knob(
        (1, 2, 4, 8, 16, 32, 64), "rows of a micro-batch, one line of the table each", low=1
    )
    compile: Literal["auto", "on", "off"] = knob("auto", "torch.compile; auto = on a GPU")


def kept_by_layer(config: GPTConfig, tokens: int, size: int, cpu: bool, compiled: bool) -> float:
    """
    Bytes that one layer keeps for its backward pass, for `tokens` tokens of `size` bytes a value:
    eight vectors of the model's width (the layer's input, the normed inputs of both parts, q
    before and after its norm, the attention's output twice, the residual), three of the key-value
    width (one more with value embeddings), and the MLP's hidden vectors before and after the
    activation. Of these, compiled code on a GPU keeps one of each kind and computes the
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
    if cpu and compiled:
        vectors += config.n_head * (config.sequence_len + QUERY_BLOCK) / 2
    return size * tokens * (vectors + hidden * config.hidden)


def predict(config: GPTConfig, rows: int, target: Machine, compiled: bool) -> dict[str, int]:
    """
    Bytes that training takes on one device, by part. `state` (weights, gradients, optimizer) stays;
    activations, loss and update (what an optimizer step needs beside its state) are those of
    different moments, so `allocated`, the peak of all tensors, is less than their sum. `total` adds
    what is `beside` the tensors (BESIDE) and what was measured above the count on this machine.
    """
    from nanochat.model.attention import QUERY_BLOCK
    from nanochat.model.loss import limits

    device, size = target.device_type, 4 if target.dtype == "float32" else 2
    n, C, V = counts(config), config.n_embd, config.vocab_size
    cpu, tokens, matrices = device == "cpu", rows * config.sequence_len, n["transformer"]
    layer = kept_by_layer(config, tokens, size, cpu, compiled)
    cast = size * (size < 4)  # bytes of a weight in the compute dtype, beside the float32 one
    activations = config.n_layer * layer + 3 * size * tokens * C + cast * matrices
    # The loss: the head's weights, the gradients of both factors, and chunks of logits.
    elements, block_chunks = limits(device, size < 4, compiled)
    chunk = min(elements, tokens * V)
    block = size * min(block_chunks * chunk, tokens * V)
    # Bytes per logit beside its gradient. Code for a GPU (tests/cuda_code.py reads it) needs least.
    copies = (12 if cpu else size) if compiled else 12 if config.softcap else 8
    both = size * tokens * C + 4 * V * C
    loss = both + block + copies * chunk + cast * V * C
    # A layer's backward pass: gradients of its hidden vectors, or a block of scores.
    scores = config.n_head * min(config.sequence_len, QUERY_BLOCK) * (4 + size) if cpu else 0
    backward = 2 * both + tokens * max(size * 2 * config.hidden, scores)
    if compiled and not cpu:
        # The head's gradient is summed before the last block's backward pass begins, and of what
        # is kept beside the blocks, one vector is left and one, the gradient, has come.
        vectors = {"relu2": 1, "swiglu": 4}.get(config.activation, 2)
        backward = size * tokens * (vectors * config.hidden - C)
    # Muon's largest pool of matrices of one shape: on a GPU all at once.
    hidden = config.hidden * (2 if config.activation == "swiglu" else 1)
    pool = config.n_layer * C * max(2 * C + 2 * config.n_kv_head * config.head_dim, hidden)
    update = pool * (4 + size if cpu else 20)
    state = 8 * n["total"] + (4 * matrices + 8 * (n["total"] - matrices)) / target.gpus
    allocated = state + max(activations + max(loss, backward), update)
    context, compiler, share = BESIDE[device]
    beside = context + compiler * compiled + share * allocated + above(target, allocated)
    parts = {
        "state": state,
        "activations": activations,
        "loss": loss,
        "update": update,
        "beside": beside,
        "allocated": allocated,
        "total": allocated + beside,
    }
    return {name: round(value) for name, value in parts.items()}


def calibrated(target: Machine, compiled: bool) -> Machine:
    """
    The machine with the points of such steps alone, if there are any (others are better than none),
    and with their gaps.
    """
    points = tuple(p for p in target.points if p["compiled"] == compiled) or target.points
    bare, run = replace(target, gaps=()), RUN * (target.device_type == "cpu")
    gaps = sorted((counted, size + run) for counted, size in (gap(p, bare) for p in points))
    return replace(target, points=points, gaps=tuple(gaps))


def gap(point: Point, target: Machine) -> tuple[float, float]:
    """
    (bytes of tensors counted, bytes measured above the count: of the card or process) of a point.
    """
    config = GPTConfig(**point["config"])
    counted = predict(config, point["rows"], target, point["compiled"])
    measured = point.get("card_bytes", point["peak_memory_bytes"])
    return counted["allocated"], measured - counted["total"]


def above(target: Machine, allocated: float) -> float:
    """
    Bytes to add to a count of so many: what a pilot measured, or else what the points say, between
    which it is interpolated. The share of BESIDE differs among machines, so that the gap of a small
    model says nothing of a large one.
    """
    if target.memory_gap is not None or not target.gaps:
        return target.memory_gap or 0.0
    counted, sizes = np.array(target.gaps).T
    return float(np.interp(allocated, counted, sizes))


def fitting_rows(config: GPTConfig, rows: int, target: Machine, compiled: bool) -> int:
    """
    The rows of a micro-batch, halved until they fit the USABLE memory. One row is returned whether
    it fits or not.
    """
    usable = USABLE * target.memory_bytes
    while rows > 1 and predict(config, rows, target, compiled)["total"] > usable:
        rows //= 2
    return rows


def run(knobs: MemoryKnobs) -> dict[str, Any]:
    """Print the grid and return it. UserError if nothing fits."""
    config, target, T = knobs.config(), machine.named(knobs), knobs.sequence_len
    compiled = target.compiles(0.0, knobs.compile)
    target = calibrated(target, compiled)
    grid, table = [], []
    for rows in sorted(set(knobs.device_batch_sizes)):
        parts = predict(config, rows, target, compiled)
        fits = parts["total"] <= target.memory_bytes
        grid.append({"rows": rows, **parts, "fits": fits})
        sizes = (f"{parts[name] / GIB:.2f}" for name in SHOWN)
        table.append((rows, *sizes, "fits" if fits else "does not fit"))
    available = target.memory_bytes / GIB
    print0(
        f"{target.name}, {available:.1f} GB; {target.dtype}, "
        f"{'compiled' if compiled else 'not compiled'}; rows of {T:,} tokens; in GB of 2^30 bytes"
    )
    print0(columns(("rows", *SHOWN, ""), table))
    least = grid[0]
    if not least["fits"]:
        raise UserError(
            f"nothing fits {target.name}: {least['rows']} rows of {T} take "
            f"{least['total'] / GIB:.1f} GB of {available:.1f}; choose a smaller --depth, --vocab "
            "or --sequence_len, or fewer rows in --device_batch_sizes"
        )
    return {
        "machine": target.stored(),
        "compiled": compiled,
        "config": asdict(config),
        "grid": grid,
    }
