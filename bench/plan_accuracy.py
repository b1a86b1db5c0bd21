"""
Compare predictions of the planner with measurements: speed and peak memory over depths and context
lengths.

    python -m bench.plan_accuracy           on a GPU depths 12-20 and T 512-2048; on a CPU a small
    grid python -m bench.plan_accuracy --depths 12 20 --lengths 2048 --device_batches 8 16

Every point is trained for some seconds in a process of its own, as plan probe does. Its speed is
predicted from the other points and, as without a probe, from the peak; the memory of its tensors
from the trace of plan memory alone; and on a GPU the memory of the whole card, with a margin
measured at the smallest point. The last line is JSON.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from nanochat.base import knobs
from nanochat.base.common import UserError, base_dir, columns, entry, print0
from nanochat.base.knobs import knob
from nanochat.model.config import GPTConfig
from nanochat.plan import machine as machines
from nanochat.plan import memory, probe, speed
from nanochat.plan.choice import MemoryModel
from nanochat.plan.machine import Machine

PREDICTED = ("speed_by_points", "speed_by_peak", "memory", "card")


@dataclass(kw_only=True)
class AccuracyKnobs(probe.ProbeKnobs):
    """Accuracy"""

    vocab: int = knob(0, "tokens of the vocabulary; 0 = 65,536 on a GPU, 8,192 on a CPU", low=0)
    limit_minutes: float = knob(600.0, "start no further point after this time", low=0)


def errors(
    p: dict[str, Any], machine: Machine, others: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """prediction / measurement - 1 of a point: speed by other points and by the peak, memory."""
    config, rows, n = GPTConfig(**p["config"]), p["rows"], p["accumulation"]
    micro = rows * config.sequence_len
    began = time.monotonic()
    rates = {
        name: speed.tokens_per_second(
            config, rows, config.sequence_len, n * micro, replace(machine, points=tuple(points))
        ).tok_per_sec
        for name, points in (("speed_by_points", others), ("speed_by_peak", ()))
        if points or name == "speed_by_peak"
    }
    traced = MemoryModel(replace(machine, points=(), memory_gap=0.0), p["compiled"]).report(
        config, rows, n
    )
    found = {name: rate / p["tok_per_sec"] - 1 for name, rate in rates.items()} | {
        "memory": traced / p["peak_memory_bytes"] - 1
    }
    return found | {"traced": traced, "seconds": time.monotonic() - began}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(AccuracyKnobs, argv, command="bench.plan_accuracy")
    gpu = machines.here(k.device_type, k.dtype).device_type != "cpu"
    k = replace(
        k,
        depths=k.depths or ((k.depth,) if k.depth else (12, 16, 20) if gpu else (2, 3, 4)),
        lengths=k.lengths or ((512, 1024, 2048) if gpu else (256, 512)),
        device_batches=k.device_batches or (8,),
        vocab=k.vocab or (65_536 if gpu else 8_192),
        out=k.out or str(base_dir() / "bench" / "plan_accuracy.json"),
    )
    probed = probe.run(k)
    good = [p for p in probed["points"] if "error" not in p]
    if not good:
        raise UserError("no point could be measured: try a smaller --depths or --device_batches")
    machine = Machine(**probed["machine"])
    rows, lines = [], []
    every = [errors(p, machine, [q for q in good if q is not p]) for p in good]
    smallest = min(range(len(good)), key=lambda i: good[i]["peak_memory_bytes"])
    on_card = "card_bytes" in good[smallest]
    margin = (
        memory.measured_margin([good[smallest]], [every[smallest]["traced"]]) if on_card else None
    )
    for i, (p, found) in enumerate(zip(good, every, strict=True)):
        if margin and i != smallest:
            found["card"] = (found["traced"] * (1 + margin.fragmentation) + margin.context) / p[
                "card_bytes"
            ] - 1
        c = p["config"]
        rows.append(
            {
                "depth": c["n_layer"],
                "width": c["n_embd"],
                "T": c["sequence_len"],
                "rows": p["rows"],
                **found,
            }
        )
        rows[-1] |= {"tok_per_sec": p["tok_per_sec"], "peak_memory_bytes": p["peak_memory_bytes"]}
        said = [f"{found[n]:+.1%}" if n in found else "" for n in PREDICTED]
        tensors, card = (
            f"{p[n] / 1e9:.2f} GB" if n in p else "" for n in ("peak_memory_bytes", "card_bytes")
        )
        head = [
            f"{c['n_layer']} x {c['n_embd']}",
            c["sequence_len"],
            p["rows"],
            f"{p['tok_per_sec']:,.0f}",
        ]
        lines.append([*head, *said[:2], tensors, said[2], card, said[3]])
    heads = (
        "depth x width",
        "T",
        "rows",
        "tok/s",
        "by the points",
        "by the peak",
        "peak memory",
        "predicted",
        "of the card",
        "predicted",
    )
    print0(columns(heads, lines))
    worst = {
        n: max(abs(r[n]) for r in rows if n in r) for n in PREDICTED if any(n in r for r in rows)
    }
    mean = {n: fmean(abs(r[n]) for r in rows if n in r) for n in worst}
    found = {
        "machine": machine.stored(),
        "worst": worst,
        "mean": mean,
        "rows": rows,
    }
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    entry(main)
