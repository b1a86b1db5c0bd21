"""
Compare predictions of the planner with measurements: speed and peak memory over depths and context
lengths.

    python -m bench.plan_accuracy           on a GPU depths 12-20 and T 512-2048; on a CPU a small
    grid python -m bench.plan_accuracy --depths 12 20 --lengths 2048 --device_batches 8 16

Every point is trained for some seconds in a process of its own, as plan probe does. Its speed is
predicted from the other points and, as without a probe, from the peak; the memory of its tensors
from the count of plan memory alone; and on a GPU the memory of the whole card, with what the
smallest point took above the count. The last line is JSON.
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
from nanochat.plan.machine import Machine

PREDICTED = ("speed_by_points", "speed_by_peak", "memory", "card")


@dataclass(kw_only=True)
class AccuracyKnobs(probe.ProbeKnobs):
    """Accuracy"""

    vocab: int = knob(0, "tokens of the vocabulary; 0 = 65,536 on a GPU, 8,192 on a CPU", low=0)
    limit_minutes: float = knob(600.0, "start no further point after this time", low=0)


def errors(
    point: dict[str, Any], machine: Machine, others: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """prediction / measurement - 1 of a point: speed by other points and by the peak, memory."""
    config, rows, T = GPTConfig(**point["config"]), point["rows"], point["config"]["sequence_len"]
    began = time.monotonic()
    bases: dict[str, tuple[dict[str, Any], ...]] = {"speed_by_peak": ()}
    if others:
        bases["speed_by_points"] = tuple(others)
    result = {}
    for name, points in bases.items():
        batch = point["accumulation"] * rows * T
        basis = replace(machine, points=points)
        predicted = speed.tokens_per_second(config, rows, T, batch, basis).tok_per_sec
        result[name] = predicted / point["tok_per_sec"] - 1
    parts = memory.predict(config, rows, replace(machine, memory_gap=0.0), point["compiled"])
    counted = parts["allocated" if machine.device_type == "cuda" else "total"]
    result["memory"] = counted / point["peak_memory_bytes"] - 1
    return {**result, "seconds": time.monotonic() - began}


def add_card_errors(
    points: Sequence[dict[str, Any]], results: Sequence[dict[str, float]], machine: Machine
) -> None:
    """On a GPU, the error for the whole card, with what the smallest point took above the count."""
    smallest = min(points, key=lambda p: p["peak_memory_bytes"])
    if "card_bytes" not in smallest:
        return
    gap = memory.gap(smallest, replace(machine, memory_gap=0.0))[1]
    for point, result in zip(points, results, strict=True):
        if point is not smallest:
            error = memory.gap(point, replace(machine, memory_gap=gap))[1]
            result["card"] = -error / point["card_bytes"]


def measure(knobs: AccuracyKnobs) -> tuple[Machine, list[dict[str, Any]]]:
    """The machine and its measured points, on a grid for its kind of device."""
    gpu = machines.here(knobs.device_type, knobs.dtype).device_type != "cpu"
    depths = (12, 16, 20) if gpu else (2, 3, 4)
    lengths = (512, 1024, 2048) if gpu else (256, 512)
    probed = probe.run(
        replace(
            knobs,
            depths=knobs.depths or ((knobs.depth,) if knobs.depth else depths),
            lengths=knobs.lengths or lengths,
            device_batches=knobs.device_batches or (8,),
            vocab=knobs.vocab or (65_536 if gpu else 8_192),
            out=knobs.out or str(base_dir() / "bench" / "plan_accuracy.json"),
        )
    )
    points = [p for p in probed["points"] if "error" not in p]
    if not points:
        raise UserError("no point could be measured: try a smaller --depths or --device_batches")
    return replace(Machine(**probed["machine"]), points=()), points


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    values, _ = knobs.parse(AccuracyKnobs, argv, command="bench.plan_accuracy")
    machine, points = measure(values)
    results = [errors(p, machine, [q for q in points if q is not p]) for p in points]
    add_card_errors(points, results, machine)
    rows, lines = [], []
    for point, result in zip(points, results, strict=True):
        c = point["config"]
        size = {"depth": c["n_layer"], "width": c["n_embd"], "T": c["sequence_len"]}
        measured = {name: point[name] for name in ("tok_per_sec", "peak_memory_bytes")}
        rows.append({**size, "rows": point["rows"], **result, **measured})
        shown = [f"{result[name]:+.1%}" if name in result else "" for name in PREDICTED]
        by_points, by_peak, tensors, card = shown
        held = f"{point['card_bytes'] / 1e9:.2f} GB" if "card_bytes" in point else ""
        head = f"{c['n_layer']} x {c['n_embd']}", c["sequence_len"], point["rows"]
        peak = f"{point['peak_memory_bytes'] / 1e9:.2f} GB"
        speeds = f"{point['tok_per_sec']:,.0f}", by_points, by_peak
        lines.append((*head, *speeds, peak, tensors, held, card))
    size_heads = ("depth x width", "T", "rows", "tok/s", "by the points", "by the peak")
    memory_heads = ("peak memory", "predicted", "of the card", "predicted")
    print0(columns((*size_heads, *memory_heads), lines))
    by_name = {n: [abs(r[n]) for r in rows if n in r] for n in PREDICTED}
    summary = {
        "machine": machine.stored(),
        "worst": {n: max(errors_of) for n, errors_of in by_name.items() if errors_of},
        "mean": {n: fmean(errors_of) for n, errors_of in by_name.items() if errors_of},
        "rows": rows,
    }
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    entry(main)
