"""
Measure the training speed, memory and steadiness of this machine over depths, context lengths and
device batches.

    nanochat plan probe --hours 24
    nanochat plan probe --depths 12 16 20 --lengths 512 2048 --device_batches 8 32

A point of the grid is one depth, context length and device batch, measured on random tokens in a
process of its own, compiled if base_train would compile: running out of memory is a result, not a
crash. Points are stored in a file as they come, and stored points are not measured again. Each is
measured twice, the second time after all others, and the second time counts: many machines are
faster in their first minutes of work than in the hours after them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nanochat.base.common import columns, duration, human, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.model.config import GPTConfig
from nanochat.plan import law, machine, speed
from nanochat.plan.machine import GIB, Machine
from nanochat.plan.shapes import OpenSizeKnobs, flops_per_token, layer_parameters
from nanochat.train.knobs import MachineKnobs
from nanochat.train.scaling import PRETRAIN, batch_for

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 32)
# What makes two points the same measurement.
IDENTITY = ("name", "dtype", "compiled", "config", "rows", "accumulation")
MEMORY_ENDED = "out of memory"


@dataclass(kw_only=True)
class ProbeKnobs(MachineKnobs, OpenSizeKnobs):
    """Grid"""

    depths: tuple[int, ...] = knob(
        (), "layers to try; default: those nearest to the best size for the budget", low=1
    )
    lengths: tuple[int, ...] = knob(
        (), "context lengths (default: 512 on a CPU, else 512 1024 2048)", low=1
    )
    device_batches: tuple[int, ...] = knob(
        (), "rows of a micro-batch (default: 8 32 on a CPU, else 8 to 64)", low=1
    )
    total_batch_size: int = knob(0, "tokens per optimizer step; 0 = as for the budget", low=0)
    compile: Literal["auto", "on", "off"] = knob(
        "auto", "torch.compile; auto = as base_train would in the budget"
    )
    seconds: float = knob(6.0, "time to measure each point, for at least six steps", low=0)
    limit_minutes: float = knob(
        0.0, "start no new measurement after this time (0 = a twelfth of the budget)", low=0
    )
    out: str = knob("", "file of measured points (default: plan/probe.json in the base folder)")
    json: bool = knob(False, "print only JSON")


def grid(knobs: ProbeKnobs, target: Machine, seconds: float) -> list[tuple[GPTConfig, int]]:
    """
    (architecture, rows) of every point: the likeliest depth first, and all depths before other
    rows, because two sizes predict a speed better than one. Depths that are not given are the most
    promising one for `seconds` on this machine and its neighbours.
    """
    cpu = target.device_type == "cpu"
    lengths = knobs.lengths or ((knobs.sequence_len,) if knobs.sequence_len else ())
    lengths = lengths or ((512,) if cpu else (512, 1024, 2048))
    batches = sorted(knobs.device_batches or ((8, 32) if cpu else (8, 16, 32, 64)))
    aspect = knobs.aspect_ratio or 64
    depths = knobs.depths or ((knobs.depth,) if knobs.depth else ())
    if not depths:
        flops = speed.usual_flops(target, seconds)

        def rough_bpb(i: int) -> float:
            config = knobs.of_size(DEPTHS[i], aspect, lengths[0])
            tokens = max(1.0, flops / flops_per_token(config))
            return law.Law().bpb(layer_parameters(config), tokens)

        i = min(range(1, len(DEPTHS) - 1), key=rough_bpb)
        depths = DEPTHS[i], DEPTHS[i - 1], DEPTHS[i + 1]
    return [
        (knobs.of_size(depth, aspect, T), rows)
        for rows in batches
        for depth in depths
        for T in lengths
    ]


class _Session:
    """One run of the command: measures points until the time limit, and stores each at once."""

    def __init__(self, knobs: ProbeKnobs, target: Machine, file: Path, training_seconds: float):
        self.knobs, self.machine, self.file = knobs, target, file
        self.training_seconds = training_seconds
        self.compiled = target.compiles(training_seconds, knobs.compile)
        self.points: list[dict[str, Any]] = []
        self.left_out = 0
        stored = json.loads(file.read_text(encoding="utf-8"))["points"] if file.exists() else []
        self.stored = {_identity(p): p for p in stored}

    def measure_all(self, stop: float) -> None:
        """Measure the grid; after the first point its speed aims the grid anew."""
        first = grid(self.knobs, self.machine, self.training_seconds)[0]
        self._add(*first, late=False)
        good = tuple(p for p in self.points if "error" not in p)
        self.machine = replace(self.machine, points=good)
        for cell in grid(self.knobs, self.machine, self.training_seconds):
            if cell != first:
                self._add(*cell, late=time.monotonic() > stop)

    def measure_again(self) -> None:
        """Measure every new point a second time, now that the machine is warm."""
        for point in self.points:
            if "error" in point or "drift" in point:
                continue
            again = self._measure(point, "again, on a warm machine: ")
            if "error" not in again:
                drift = again["step_ms"] / point["step_ms"] - 1
                point |= {**again, "drift": drift, "first_step_s": point["first_step_s"]}
                self._store(point)

    def _add(self, config: GPTConfig, rows: int, late: bool) -> None:
        """Add a point, stored or measured now; leave it out if it is too late to measure it."""
        reach = speed.usual_flops(self.machine, self.training_seconds) / flops_per_token(config)
        batch = self.knobs.total_batch_size or batch_for(reach)
        point = {
            "name": self.machine.name,
            "dtype": self.machine.dtype,
            "compiled": self.compiled,
            "config": asdict(config),
            "rows": rows,
            "accumulation": max(1, batch // (rows * config.sequence_len)),
        }
        stored = self.stored.get(_identity(point))
        if stored and stored.get("error", MEMORY_ENDED) == MEMORY_ENDED:
            point = stored
        elif any(
            p.get("error") == MEMORY_ENDED and p["config"] == point["config"] and p["rows"] <= rows
            for p in self.points
        ):
            point["error"] = MEMORY_ENDED
        elif late:
            self.left_out += 1
            return
        else:
            point |= self._measure(point)
        self.points.append(point)
        self._store(point)

    def _measure(self, point: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        c = point["config"]
        print0(
            f"  {prefix}depth {c['n_layer']}, width {c['n_embd']}, T {c['sequence_len']}, "
            f"{point['rows']} rows ..."
        )
        spec = {name: point[name] for name in IDENTITY}
        where = {"device_type": self.machine.device_type, "seconds": self.knobs.seconds}
        return machine.in_process({**spec, **where})

    def _store(self, point: dict[str, Any]) -> None:
        self.stored[_identity(point)] = point
        points = list(self.stored.values())
        file = {"machine": self.machine.stored(), "points": points}
        atomic_write(self.file, json.dumps(file, indent=1))


def _identity(point: Mapping[str, Any]) -> str:
    return json.dumps([point[name] for name in IDENTITY], sort_keys=True)


def run(knobs: ProbeKnobs) -> dict[str, Any]:
    """
    Measure what the file does not hold yet, print the table and write the file. Returns machine,
    points (each with the tokens in the budget), seconds, pretraining_seconds, left_out, file.
    """
    file = Path(knobs.out).expanduser() if knobs.out else machine.folder() / "probe.json"
    target = machine.here(knobs.device_type, knobs.dtype)
    usual_budget = 20 * 60 if target.device_type == "cpu" else 86400
    seconds = machine.budget_seconds(knobs) or usual_budget
    training = PRETRAIN * seconds
    if file.exists():
        machine.load(file)  # UserError if it is not a probe
    print0(
        f"{target.name}, {target.dtype}, measured peak {target.peak_flops / 1e12:.3g} TFLOP/s; "
        f"{duration(training)} of pretraining"
    )
    session = _Session(knobs, target, file, training)
    session.measure_all(time.monotonic() + (knobs.limit_minutes * 60 or seconds / 12))
    session.measure_again()
    if session.left_out:
        print0(
            f"  points not measured for lack of time: {session.left_out}; run the same command "
            "again to measure them, or raise --limit_minutes"
        )
    size = ("n_layer", "n_embd", "sequence_len")
    points = sorted(session.points, key=lambda p: [p["config"][name] for name in size])
    for point in points:
        if "error" not in point:
            point["tokens_in_budget"] = point["tok_per_sec"] * training
    _show(points, target)
    print0(f"  {file}")
    return {
        "machine": target.stored(),
        "points": points,
        "seconds": seconds,
        "pretraining_seconds": training,
        "left_out": session.left_out,
        "file": str(file),
    }


def _show(points: Sequence[Mapping[str, Any]], target: Machine) -> None:
    size = ("depth x width", "T", "rows", "accumulation")
    measured = ("ms per step", "later", "tok/s", "of peak", "peak memory", "tokens in the budget")
    rows = []
    for p in points:
        c = p["config"]
        cells = [f"{c['n_layer']} x {c['n_embd']}", c["sequence_len"], p["rows"], p["accumulation"]]
        if "error" in p:
            rows.append([*cells, p["error"], *[""] * 6])
            continue
        cells += [
            f"{p['step_ms']:,.0f}",
            f"{p['drift']:+.0%}" if "drift" in p else "",
            f"{p['tok_per_sec']:,.0f}",
            f"{p['tok_per_sec'] * p['flops_per_token'] / target.peak_flops:.0%}",
            f"{p['peak_memory_bytes'] / GIB:.2f} GiB",
            human(p["tokens_in_budget"]),
            "" if p["finite"] else "loss not finite",
        ]
        rows.append(cells)
    print0(columns((*size, *measured, ""), rows))
