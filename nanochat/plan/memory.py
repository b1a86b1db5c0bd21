"""
Memory before training, by part: which device batches fit a card, this machine, or what --memory_gb says.

    python -m scripts.plan memory --depth 12 --gpu rtx3090
    python -m scripts.plan memory --depth 4 --device_batch_sizes 8 16 32 --sequence_lens 512 1024

Tensors are counted on the real model, loss and optimizer (plan.live); a context, a compiler and an allocator take a margin on top, measured
where there is a GPU, else from the runs named beside the figures. A row that does not fit is marked; when none does, that is an error.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import torch

from nanochat.base.common import UserError, columns, notice, print0
from nanochat.base.knobs import knob
from nanochat.base.runtime import DTYPES, compiler_missing
from nanochat.model.config import GPTConfig
from nanochat.plan import probe as throughput
from nanochat.plan import trace_memory as live
from nanochat.plan.arch import SizeKnobs, card, config_for
from nanochat.plan.speed import GIB, Machine


@dataclass(frozen=True)
class Margin:
    """What no tensor shows, in bytes: the process and its context, the compiler's own, and the allocator's share of what is allocated."""

    context: float
    compile: float
    fragmentation: float


MARGINS = {
    # An RTX 3090's owner saw a context of 1-1.5 GB, 0.8 GB for the compiler's cache and 0.3 GB lost to fragmentation at 17-23 GB
    "cuda": Margin(1.25e9, 0.8e9, 0.015),
    "mps": Margin(0.5e9, 0.0, 0.05),  # not measured
    # Resident sizes of eight runs, within 7 %: malloc keeps what is freed (runtime.keep_freed_memory), in pieces that often serve no more
    "cpu": Margin(0.4e9, 0.05e9, 0.65),
}


@dataclass(kw_only=True)
class Knobs(SizeKnobs):
    """Grid"""

    gpu: str = knob("", "the card, for example rtx3090 (default: this machine)")
    gpus: int = knob(1, "cards that share the optimizer's state", low=1)
    memory_gb: float = knob(
        0.0, "memory to fit into (default: the card's, or what is free here)", low=0
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
        2, "micro-batches of a step; with 1 there are no gradients yet when activations peak", low=1
    )
    calibrate: bool = knob(True, "on a GPU of this machine, measure the margin with a short run")
    json: bool = knob(False, "print JSON alone")


def predict(
    config: GPTConfig,
    rows: int,
    sequence_len: int,
    *,
    dtype: torch.dtype,
    device_type: str,
    world_size: int = 1,
    eval_rows: int | None = None,
    micro_batches: int = 2,
    compiled: bool | None = None,
    margin: Margin | None = None,
) -> dict[str, int]:
    """
    Bytes that training takes on one device, by part. Weights, gradients and optimizer (its state) stay; activations, loss, update (what an
    optimizer step needs beside its state), evaluation (eval_rows rows of the whole context; rows when None) and kv_cache are the peaks of
    moments that do not fall together, so `allocated`, the peak of all tensors, is less than their sum. total = allocated + context +
    compile + fragmentation. `compiled` None: on a GPU. micro_batches 1: the device batch holds the whole step.
    """
    compiled = device_type == "cuda" if compiled is None else compiled
    margin = margin or MARGINS[device_type]
    peak, end = live.trace(
        config,
        rows,
        sequence_len,
        dtype=dtype,
        device_type=device_type,
        world_size=world_size,
        eval_rows=eval_rows,
        micro_batches=micro_batches,
        compiled=compiled,
    )
    out = {name: end[name] for name in ("weights", "gradients", "optimizer")}
    out |= {name: peak[name] for name in ("activations", "loss")} | {
        "update": peak["optimizer"] - end["optimizer"]
    }
    out |= {name: peak[name] for name in ("evaluation", "kv_cache")}
    out |= {"context": round(margin.context), "compile": round(margin.compile) if compiled else 0}
    out |= {"fragmentation": round(margin.fragmentation * peak["all"]), "allocated": peak["all"]}
    return out | {
        "total": sum(out[name] for name in ("allocated", "context", "compile", "fragmentation"))
    }


def margin_of(points: Sequence[Mapping[str, Any]], counted: Sequence[float]) -> Margin:
    """
    The margin of a GPU from points that throughput.measure made on it: the context is what the card holds beyond torch's pool, other
    processes included, and fragmentation what the pool has beyond the bytes counted in each. The medians.
    """
    context = median(p["card_bytes"] - p["pool_bytes"] for p in points)
    return Margin(
        context, 0.0, median(p["pool_bytes"] / n for p, n in zip(points, counted, strict=True)) - 1
    )


def calibrate(
    config: GPTConfig, rows: int, sequence_len: int, dtype: str, compiled: bool
) -> Margin | None:
    """
    The margin of this machine's GPU from a few real steps of a small device batch, in a process of its own. None when even that batch does
    not fit; UserError when it fails in another way.
    """
    how: dict[str, Any] = {"compiled": compiled, "device_type": "cuda"}
    short = replace(config, sequence_len=sequence_len)
    point = throughput.in_process(
        {
            "config": asdict(short),
            "rows": rows,
            "accumulation": 2,
            "dtype": dtype,
            "seconds": 0.0,
            **how,
        }
    )
    if point.get("error") == "out of memory":
        return None
    if "error" in point:
        raise UserError(
            f"the margin cannot be measured ({point['error']}): --no_calibrate takes the usual one"
        )
    return margin_of(
        [point],
        [predict(short, rows, sequence_len, dtype=DTYPES[dtype], **how, eval_rows=1)["allocated"]],
    )


def _place(k: Knobs) -> Machine:
    """The machine that is asked about: a card by name, or this one, measured in a process of its own: ours must hold nothing of a GPU."""
    if k.gpu:
        m = Machine.of(card(k.gpu))
        m = m if k.dtype == "auto" else replace(m, dtype=k.dtype)
    else:
        m = throughput.here("auto", k.dtype)
    return replace(m, memory_bytes=k.memory_gb * GIB or m.memory_bytes)


def grid(
    config: GPTConfig, batches: Sequence[int], lengths: Sequence[int], there: float, **how: Any
) -> list[dict[str, Any]]:
    """predict() for every pair of device batch and length, smallest first, each with whether it fits into `there` bytes."""
    out, cells = [], [(T, rows) for T in sorted(set(lengths)) for rows in sorted(set(batches))]
    for i, (T, rows) in enumerate(cells):
        if sys.stderr.isatty():
            print0(f"\r\033[K{rows} rows of {T} ({i + 1} of {len(cells)})", end="", file=sys.stderr)
        parts = predict(config, rows, T, **how)
        out.append({"rows": rows, "sequence_len": T, "fits": parts["total"] <= there, **parts})
    if sys.stderr.isatty():
        print0("\r\033[K", end="", file=sys.stderr)
    return out


def run(k: Knobs) -> dict[str, Any]:
    """Print the grid and return it; UserError when nothing fits."""
    m = _place(k)
    kind, there = m.device_type, m.memory_bytes
    config = config_for(k.shape(), k.arch(), k.vocab)
    lengths = k.sequence_lens or (k.sequence_len,)
    if longest := [T for T in lengths if k.sequence_len < T]:
        raise UserError(
            f"rows of {longest[0]} tokens do not fit a context of {k.sequence_len}: raise --sequence_len as well"
        )
    if not k.device_batch_sizes:
        raise UserError(
            "--device_batch_sizes names none: give some, as in --device_batch_sizes 8 16 32"
        )
    compiled = k.compile == "on" or (k.compile == "auto" and kind == "cuda")
    if not k.gpu and compiled and (missing := compiler_missing(torch.device(kind))):
        notice(f"predicted without torch.compile: {missing}")
        compiled = False
    margin = MARGINS[kind]
    if not k.gpu and kind == "cuda" and k.calibrate:
        print0("calibrating with a few steps of the smallest device batch", file=sys.stderr)
        margin = (
            calibrate(config, min(k.device_batch_sizes), min(lengths), m.dtype, compiled) or margin
        )
    rows = grid(
        config,
        k.device_batch_sizes,
        lengths,
        there,
        dtype=m.torch_dtype,
        device_type=kind,
        world_size=k.gpus,
        micro_batches=k.micro_batches,
        compiled=compiled,
        margin=margin,
    )
    print0(
        f"{m.name}, {there / GIB:.1f} GB; {m.dtype}, {'compiled' if compiled else 'not compiled'}; in GB of 2^30 bytes"
    )
    shown = ("state", "activations", "loss", "update", "evaluation", "margin", "total")
    table = []
    for r in rows:
        state = r["weights"] + r["gradients"] + r["optimizer"]
        cells = {**r, "state": state, "margin": r["total"] - r["allocated"]}
        table.append(
            (
                r["rows"],
                r["sequence_len"],
                *(f"{cells[c] / GIB:.2f}" for c in shown),
                "fits" if r["fits"] else "does not fit",
            )
        )
    print0(columns(("rows", "T", *shown, ""), table))
    out = {
        "device": m.name,
        "memory_bytes": round(there),
        "dtype": m.dtype,
        "compiled": compiled,
        "config": asdict(config),
        "grid": rows,
    }
    if not any(r["fits"] for r in rows):
        least = rows[0]
        raise UserError(
            f"nothing fits {m.name}: {least['rows']} rows of {least['sequence_len']} take {least['total'] / GIB:.1f} GB of "
            f"{there / GIB:.1f}; choose a smaller --depth, --vocab or --sequence_len"
            + ("" if least["rows"] == 1 else ", or fewer rows in --device_batch_sizes")
        )
    return out
