"""
One training step, eager and compiled: tokens per second, share of the measured matrix-product peak,
peak memory.

    python -m bench.train_step                      depth 4, context 512, vocabulary 8,192, batch 8
    python -m bench.train_step --depth=12 --compile=on

The step is the trainer's: forward, loss, backward, Muon and AdamW. The last line is JSON.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from nanochat.base import hardware, knobs
from nanochat.base.common import entry
from nanochat.base.knobs import knob
from nanochat.base.runtime import compiler_missing, open_runtime
from nanochat.data.feed import Batch
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.knobs import TrainKnobs
from nanochat.train.run import make_optimizer
from nanochat.train.scaling import Shape


@dataclass(kw_only=True)
class TrainStepKnobs(TrainKnobs, Shape):
    """Measurement"""

    sequence_len: int = knob(512, "context length in tokens", low=1)
    vocab_size: int = knob(8192, "tokens of the vocabulary", low=1)
    batch: int = knob(8, "rows of a step", low=1)
    steps: int = knob(20, "steps timed; their median counts", low=1)
    modes: tuple[Literal["eager", "compiled"], ...] = knob(("eager", "compiled"), "what to measure")


def measure(k: TrainStepKnobs, compiled: bool) -> dict[str, Any]:
    """Median step time of one mode after three steps of warm-up, as a dict of figures."""
    rt = open_runtime(k.device_type, k.dtype, k.seed)
    peak = hardware.measured_peak(rt.device, rt.dtype)
    shape: dict[str, Any] = {
        "vocab_size": k.vocab_size,
        "sequence_len": k.sequence_len,
        **k.dimensions(),
    }
    model = GPT.build(GPTConfig(**shape), rt.device, rt.dtype)
    model.init_weights(k.seed)
    if compiled:
        model.compile()
    optimizer = make_optimizer(model, k, rt)
    tokens = torch.randint(0, k.vocab_size, (k.batch, k.sequence_len + 1), device=rt.device)
    b = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    times = []
    for i in range(k.steps + 3):
        began = time.perf_counter()
        optimizer.zero_grad()
        (model.loss(b.inputs, b.targets) / b.targets.numel()).backward()
        optimizer.step()
        rt.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - began)
    median = sorted(times)[len(times) // 2]
    rate = b.inputs.numel() / median
    peak = max(
        peak, hardware.measured_peak(rt.device, rt.dtype)
    )  # before and after: a busy moment must not flatter the share
    share = rate * model.flops_per_token() / peak
    return {
        "mode": "compiled" if compiled else "eager",
        "dtype": rt.dtype_name,
        "tok_per_sec": round(rate, 1),
        "peak_share": round(share, 4),
        "peak_memory_bytes": rt.peak_memory(),
        "peak_flops": peak,
        "step_ms": round(median * 1e3, 2),
        "best_ms": round(min(times) * 1e3, 2),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(TrainStepKnobs, argv, command="bench.train_step")
    rows = []
    for mode in k.modes:
        missing = (
            compiler_missing(open_runtime(k.device_type, k.dtype, k.seed).device)
            if mode == "compiled"
            else ""
        )
        if missing:
            print(f"compiled: left out, {missing}")
        else:
            rows.append(measure(k, mode == "compiled"))
    columns = ("mode", "dtype", "step_ms", "tok_per_sec", "peak_share", "peak_memory_bytes")
    table = Table(
        *columns,
        title=f"depth {k.depth}, context {k.sequence_len}, vocabulary {k.vocab_size:,}, "
        f"batch {k.batch}",
    )
    for row in rows:
        table.add_row(
            *(
                row[c]
                if isinstance(row[c], str)
                else f"{row[c]:.1%}"
                if c == "peak_share"
                else f"{row[c]:,}"
                for c in columns
            )
        )
    Console(width=120).print(table)
    best = max(rows, key=lambda row: row["tok_per_sec"])
    print(json.dumps({**best, "all": rows}))
    return best


if __name__ == "__main__":
    entry(main)
