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

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from nanochat.base.common import columns, duration, notice, print0
from nanochat.base.files import check_writable, write_json
from nanochat.base.knobs import knob
from nanochat.base.strangers import read_json
from nanochat.plan import machine, speed
from nanochat.plan.machine import GIB, Machine, Point
from nanochat.plan.shapes import OpenSizeKnobs, flops_per_token
from nanochat.train.knobs import DeviceKnobs
from nanochat.train.scaling import PRETRAIN, batch_for

DEPTHS = (*range(1, 6), *range(6, 28, 2), 28, 32)
MEMORY_ENDED = "out of memory"


@dataclass(kw_only=True)
class ProbeKnobs(DeviceKnobs, OpenSizeKnobs):
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
    compile: Literal["auto", "on", "off"] = knob(
        "auto", "torch.compile; auto = as base_train would in the budget"
    )
    seconds: float = knob(6.0, "time to measure each point, for at least six steps", low=0)
    limit_minutes: float = knob(
        0.0, "time for all measurements, about (0 = a twelfth of the budget)", low=0
    )
    out: str = knob("", "file of measured points (default: plan/probe.json in the base folder)")
    json: bool = knob(False, "print only JSON")


def grid(knobs: ProbeKnobs, target: Machine, seconds: float) -> Iterator[Point]:
    """
    What identifies every point: the likeliest depth first, and all depths before other rows,
    because two sizes predict a speed better than one. Depths that are not given are near the size
    that reads 20 tokens per parameter of its layers in `seconds` on this machine.
    """
    cpu, flops = target.device_type == "cpu", speed.usual_flops(target, seconds)
    aspect, depths = knobs.aspect_ratio or 64.0, knobs.depths or (knobs.depth,)
    given = (knobs.sequence_len,) if knobs.sequence_len else ()
    lengths = knobs.lengths or given or ((512,) if cpu else (512, 1024, 2048))
    if not depths[0]:
        wanted = (math.sqrt(flops / 6 / 20) / 12 / aspect**2) ** (1 / 3)
        i = min(range(1, len(DEPTHS) - 1), key=lambda i: abs(math.log(DEPTHS[i] / wanted)))
        depths = DEPTHS[i], DEPTHS[i - 1], DEPTHS[i + 1]
    batches = sorted(knobs.device_batches or ((8, 32) if cpu else (8, 16, 32, 64)))
    for rows, depth, T in product(batches, depths, lengths):
        config = knobs.of_size(depth, aspect, T, seconds, target.device_type)
        batch = knobs.total_batch_size or batch_for(flops / flops_per_token(config))
        yield {
            "name": target.name,
            "dtype": target.dtype,
            "threads": target.threads,
            "compiled": target.compiles(seconds, knobs.compile),
            "config": asdict(config),
            "rows": rows,
            "accumulation": max(1, batch // (rows * T)),
        }


def run(knobs: ProbeKnobs) -> dict[str, Any]:
    """
    Measure what the file does not hold yet, print the table and write the file. Returns machine,
    points, left_out and file.
    """
    began = time.monotonic()
    file = machine.plan_file(knobs.out, "probe.json")
    check_writable(file.parent)
    target = replace(machine.here(knobs.device_type, knobs.dtype), points=())
    stored = _stored(file, target)
    seconds = knobs.budget or (1200 if target.device_type == "cpu" else 86_400)
    training, limit = PRETRAIN * seconds, knobs.limit_minutes * 60 or seconds / 12
    knobs = replace(knobs, vocab=knobs.vocabulary(speed.usual_flops(target, training)))
    print0(
        f"{target.name}, {target.dtype}, measured peak {target.peak_flops / 1e12:.3g} TFLOP/s; "
        f"{duration(training)} of pretraining"
    )
    points: list[Point] = []
    left_out = 0

    def measure(point: Point, again: str = "") -> Point:
        c = point["config"]
        size = f"{c['n_layer']} x {c['n_embd']}, context {c['sequence_len']}"
        print0(f"  {again}{size}, {point['rows']} rows ...")
        where = {"device_type": target.device_type, "seconds": knobs.seconds}
        return machine.in_process(point | where)

    def save() -> None:
        write_json(file, {"machine": target.stored(), "points": stored})

    for wanted in grid(knobs, target, training):
        known = (p for p in stored if p.get("error", MEMORY_ENDED) == MEMORY_ENDED)
        point = next((p for p in known if wanted.items() <= p.items()), None)
        if point is None:
            if wanted["config"] in [p["config"] for p in points if "error" in p]:
                point = {**wanted, "error": MEMORY_ENDED}  # with fewer rows already
            elif points and time.monotonic() > began + limit / 2:  # each is measured twice
                left_out += 1
                continue
            else:
                point = wanted | measure(wanted)
            stored.insert(0, point)
            save()
        points.append(point)
    for point in points:
        if not {"error", "drift"} & set(point):
            again = measure(point, "again, on a warm machine: ")
            if "error" not in again:
                drift = again["step_ms"] / point["step_ms"] - 1
                point |= {**again, "drift": drift, "first_step_s": point["first_step_s"]}
                save()
    if left_out:
        print0(
            f"  points not measured for lack of time: {left_out}; run the same command again to "
            "measure them, or raise --limit_minutes"
        )
    _show(points, target)
    print0(f"  {file}")
    return {
        "machine": target.stored(),
        "points": points,
        "left_out": left_out,
        "file": str(file),
    }


def _stored(file: Path, target: Machine) -> list[Point]:
    """
    The points in a file, if there is one. Those of this machine by earlier versions do not say
    their threads, and count as with as many. UserError if the file is not a probe's.
    """
    if not file.exists():
        return []
    machine.load(file)
    points = read_json(file)["points"]
    return [{"threads": target.threads, **p} if p["name"] == target.name else p for p in points]


def _show(points: Sequence[Point], target: Machine) -> None:
    """Print the table of points, and a notice if the speed changed much between measurements."""
    heads = "depth x width|T|rows|accumulation|ms per step|later|tok/s|of peak|peak memory"
    rows = []
    for p in points:
        c, measured = p["config"], [p.get("error", ""), "", "", "", ""]
        if "error" not in p:
            rate = p["tok_per_sec"]
            measured = [
                f"{p['step_ms']:,.0f}",
                f"{p.get('drift', 0):+.0%}",
                f"{rate:,.0f}",
                f"{rate * p['flops_per_token'] / target.peak_flops:.0%}",
                f"{p['peak_memory_bytes'] / GIB:.2f} GiB",
            ]
        size = f"{c['n_layer']} x {c['n_embd']}"
        rows.append([size, c["sequence_len"], p["rows"], p["accumulation"], *measured])
    print0(columns(heads.split("|"), rows))
    if any(abs(p.get("drift", 0)) > 0.3 for p in points):
        notice(
            "the speed changed by more than 30 % between two measurements, so other programs were "
            "probably busy: end them, delete the file and measure again"
        )
