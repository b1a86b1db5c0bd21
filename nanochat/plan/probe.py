"""
Measure what this machine does in a second of training: speed, memory and steadiness over depths, context lengths and device batches.

    python -m scripts.plan probe --hours 24
    python -m scripts.plan probe --depths 12 16 20 --lengths 512 2048 --device_batches 8 32

A point of the grid is one depth, context length and device batch, measured on random tokens in a process of its own, compiled as base_train
would be: running out of memory is a result and no crash. Points are kept in a file as they come, and what is there is not measured again.
Each is measured twice, the second time when all have been measured once, and the second time counts: many a machine is faster in its first
minutes of work than in the hours after them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from nanochat.base import hardware
from nanochat.base.common import UserError, columns, duration, entry, human, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.base.runtime import open_runtime, out_of_memory
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.plan import law, speed
from nanochat.plan.speed import GIB, PRETRAIN, Machine
from nanochat.study import page
from nanochat.train.knobs import MachineKnobs, TrainKnobs
from nanochat.train.run import make_optimizer
from nanochat.train.scaling import batch_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 32)
SAVED = (
    "name",
    "device_type",
    "dtype",
    "memory_bytes",
    "peak_flops",
)  # of the machine, in the file
ASKED = (
    "name",
    "dtype",
    "compiled",
    "config",
    "rows",
    "accumulation",
)  # of a point: what makes two of them the same measurement


@dataclass(kw_only=True)
class Knobs(MachineKnobs, speed.BudgetKnobs, speed.OpenKnobs):
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
    total_batch_size: int = knob(0, "tokens of an optimizer step; 0 = as for the budget", low=0)
    compile: Literal["auto", "on", "off"] = knob(
        "auto", "torch.compile; auto = as base_train would in the budget"
    )
    seconds: float = knob(6.0, "time to measure each point, three rounds at least", low=0)
    limit_minutes: float = knob(
        0.0, "begin no further point after so long (0 = a twelfth of the budget)", low=0
    )
    out: str = knob("", "file of finished points (default: plan/probe.json in the base folder)")
    json: bool = knob(False, "print JSON alone")


# measuring ----------------------------------------------------------------------------------------------------------------


def process(module: str, *words: str) -> dict[str, Any]:
    """Arguments of subprocess.run for one of our modules, whatever folder we are in."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {
        "args": [sys.executable, "-u", "-m", module, *words],
        "env": {**os.environ, "PYTHONPATH": path},
        "stdin": subprocess.DEVNULL,
    }


def in_process(spec: Mapping[str, Any], limit: float = 900.0) -> dict[str, Any]:
    """`measure` or, without a config, `machine_here` in a process of its own. {"error": why} when that fails or takes `limit` seconds."""
    try:
        done = subprocess.run(
            **process("nanochat.plan.probe", json.dumps(spec)),
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {duration(limit)}"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -9:
        return {"error": "out of memory"}  # the system ended it
    return {
        "error": (lines[-1] if lines else f"ended with status {done.returncode}").removeprefix(
            "error: "
        )
    }


def machine_here(device_type: str, dtype: str) -> dict[str, Any]:
    """The fields of Machine for the device of this process."""
    import psutil

    rt = open_runtime(device_type, dtype)
    cuda = rt.device.type == "cuda"
    memory = (
        torch.cuda.get_device_properties(rt.device).total_memory
        if cuda
        else psutil.virtual_memory().available
    )
    peak = hardware.measured_peak(rt.device, rt.dtype)
    name = hardware.device_name(rt.device)
    return {
        "name": name,
        "device_type": rt.device.type,
        "dtype": rt.dtype_name,
        "memory_bytes": memory,
        "peak_flops": peak,
    }


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """
    Speed and peak memory of one point in this process: spec has config, rows, accumulation, compiled, device_type, dtype, seconds. A step
    is accumulation x micro_ms + update_ms, both medians; `spread` is the 10 to 90 % range of their sum over its median. On a GPU also
    what the allocator's pool held and what the card holds in all, contexts and other processes too. {"error"} where memory runs out.
    """
    rt = open_runtime(spec["device_type"], spec["dtype"])
    config = GPTConfig(**spec["config"])
    rows, T, n = spec["rows"], config.sequence_len, spec["accumulation"]
    micros, updates, losses = [], [], []
    try:
        model = GPT.build(config, rt.device, rt.dtype)
        model.init_weights(rt.seed)
        if spec["compiled"]:
            model.compile()
        optimizer = make_optimizer(model, TrainKnobs(), rt)
        tokens = torch.randint(0, config.vocab_size, (rows, T + 1), device=rt.device)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        began = time.perf_counter()
        first = 0.0
        while len(micros) < 6 or (
            time.perf_counter() - began < spec["seconds"] and len(micros) < 200
        ):
            optimizer.zero_grad()
            loss, t0, t1 = x.new_zeros(()), 0.0, 0.0
            for _ in range(min(2, n)):  # the second one adds to gradients that are there
                rt.synchronize()
                t0 = time.perf_counter()
                loss = model.loss(x, y) / y.numel()
                loss.backward()
                rt.synchronize()
                t1 = time.perf_counter()
            optimizer.step()
            rt.synchronize()
            micros.append(t1 - t0)
            updates.append(time.perf_counter() - t1)
            losses.append(float(loss.detach()))
            if len(micros) == 1:
                first, began = time.perf_counter() - began, time.perf_counter()
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        return {"error": "out of memory"}
    micros, updates = (
        np.array(micros[3:]),
        np.array(updates[3:]),
    )  # the first ones compile and warm up
    step = n * float(np.median(micros)) + float(np.median(updates))
    both = micros + updates
    pool = {}
    if rt.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(rt.device)
        pool = {"pool_bytes": torch.cuda.max_memory_reserved(rt.device), "card_bytes": total - free}
    return {
        **pool,
        "micro_ms": 1e3 * float(np.median(micros)),
        "update_ms": 1e3 * float(np.median(updates)),
        "step_ms": 1e3 * step,
        "tok_per_sec": n * rows * T / step,
        "spread": float((np.quantile(both, 0.9) - np.quantile(both, 0.1)) / np.median(both)),
        "first_step_s": first,
        "peak_memory_bytes": rt.peak_memory(),
        "finite": bool(np.isfinite(losses).all()),
        "flops_per_token": model.flops_per_token(),
        "parameters": model.counts()["total"],
    }


def _key(p: Mapping[str, Any]) -> str:
    return json.dumps([p[n] for n in ASKED], sort_keys=True)


def here(device_type: str = "auto", dtype: str = "auto") -> Machine:
    """This machine with a peak measured now. UserError when its device cannot be used."""
    found = in_process({"device_type": device_type, "dtype": dtype})
    if "error" in found:
        raise UserError(f"this machine's speed cannot be measured: {found['error']}")
    return Machine(**found, source="a share of the peak measured here")


def grid(k: Knobs, machine: Machine, seconds: float) -> list[tuple[GPTConfig, int]]:
    """
    (architecture, rows) of every point: the likeliest depth first, and all depths before other rows, as a speed is foretold from two sizes
    better than from one. Where no depths are given, they are the most promising for `seconds` on this machine and its neighbours.
    """
    cpu = machine.device_type == "cpu"
    lengths = k.lengths or (
        (k.sequence_len,) if k.sequence_len else (512,) if cpu else (512, 1024, 2048)
    )
    batches = sorted(k.device_batches or ((8, 32) if cpu else (8, 16, 32, 64)))
    depths = list(k.depths or ((k.depth,) if k.depth else ()))
    if not depths:
        shapes = [k.config(d, k.aspect_ratio or 64, lengths[0]) for d in DEPTHS]
        i = min(
            range(1, len(DEPTHS) - 1),
            key=lambda i: speed.promise(shapes[i], machine, seconds, law.fitted()),
        )
        depths = [DEPTHS[i], DEPTHS[i - 1], DEPTHS[i + 1]]
    return [
        (k.config(d, k.aspect_ratio or 64, T), rows)
        for rows in batches
        for d in depths
        for T in lengths
    ]


def saved(machine: Machine) -> dict[str, Any]:
    """What the file of a probe says of the machine."""
    return {n: v for n, v in asdict(machine).items() if n in SAVED}


def run(k: Knobs) -> dict[str, Any]:
    """Measure what the file does not have yet; print the table, write file and page; {"machine", "points", "tokens" in the budget, ...}."""
    out = Path(k.out).expanduser() if k.out else speed.folder() / "probe.json"
    machine = here(k.device_type, k.dtype)
    seconds = speed.budget_seconds(k) or (20 * 60 if machine.device_type == "cpu" else 86400)
    training = PRETRAIN * seconds
    compiled = speed.compiles(machine.device_type, training, k.compile)
    old = (
        json.loads(out.read_text(encoding="utf-8"))["points"]
        if out.exists() and speed.load(out)
        else []
    )
    known = {_key(p): p for p in old}
    print0(
        f"{machine.name}, {machine.dtype}, measured peak {machine.peak_flops / 1e12:.3g} TFLOP/s; {duration(training)} of pretraining"
    )
    stop = time.monotonic() + (k.limit_minutes * 60 or seconds / 12)
    points, left = [], 0
    full: dict[str, int] = {}  # architecture -> rows that did not fit
    todo = grid(k, machine, training)

    def measured(point: Mapping[str, Any], again: str = "") -> dict[str, Any]:
        c = point["config"]
        print0(
            f"  {again}depth {c['n_layer']}, width {c['n_embd']}, T {c['sequence_len']}, {point['rows']} rows ..."
        )
        return in_process(
            {n: point[n] for n in ASKED}
            | {"device_type": machine.device_type, "seconds": k.seconds}
        )

    def save() -> None:
        atomic_write(
            out, json.dumps({"machine": saved(machine), "points": list(known.values())}, indent=1)
        )

    while todo:
        config, rows = todo.pop(0)
        micro = rows * config.sequence_len
        reach = (
            speed.usual_share(machine)
            * machine.peak_flops
            * training
            / speed.flops_per_token(config, config.sequence_len)
        )
        point = {
            "name": machine.name,
            "dtype": machine.dtype,
            "compiled": compiled,
            "config": asdict(config),
            "rows": rows,
        }
        point["accumulation"] = max(1, (k.total_batch_size or batch_for(reach)) // micro)
        shape = json.dumps(asdict(config))
        if (key := _key(point)) in known and known[key].get(
            "error", "out of memory"
        ) == "out of memory":
            point = known[key]
        elif rows >= full.get(shape, 1 << 60):
            point |= {"error": "out of memory"}
        elif points and time.monotonic() > stop:
            left += 1
            continue
        else:
            point |= measured(point)
        if point.get("error") == "out of memory":
            full[shape] = min(rows, full.get(shape, rows))
        points.append(point)
        known[key] = point
        if (
            len(points) == 1 and "error" not in point
        ):  # now it is known what share of its peak this machine reaches: aim again
            machine = replace(machine, points=(point,))
            todo = [p for p in grid(k, machine, training) if p != (config, rows)]
        save()
    for p in points:
        if "error" in p or "drift" in p:
            continue
        found = measured(p, "again, the machine being warm: ")
        if "error" not in found:
            p |= {
                **found,
                "drift": found["step_ms"] / p["step_ms"] - 1,
                "first_step_s": p["first_step_s"],
            }
            save()
    if left:
        print0(
            f"  {left} points left out for lack of time: the same command measures them, or raise --limit_minutes"
        )
    points.sort(
        key=lambda p: [p["config"][n] for n in ("n_layer", "n_embd", "sequence_len")]
    )  # stable: rows stay in their order
    good = [p for p in points if "error" not in p]
    for p in good:
        p["tokens_in_budget"] = p["tok_per_sec"] * training
    _print(points, machine)
    written = _page(points, out.with_suffix(".html")) if good else None
    print0(f"  {out}" + (f"\n  {written}" if written else ""))
    found = {
        "machine": saved(machine),
        "points": points,
        "seconds": seconds,
        "pretraining_seconds": training,
    }
    return {**found, "left_out": left, "file": str(out)}


def _print(points: Sequence[Mapping[str, Any]], machine: Machine) -> None:
    rows = []
    for p in points:
        c = p["config"]
        head = [
            f"{c['n_layer']} x {c['n_embd']}",
            str(c["sequence_len"]),
            str(p["rows"]),
            str(p["accumulation"]),
        ]
        if "error" in p:
            rows.append([*head, p["error"], *[""] * 6])
            continue
        steady = f"{p['spread']:.0%}" + ("" if p["finite"] else ", loss not finite")
        drift = f"{p['drift']:+.0%}" if "drift" in p else ""
        share = p["tok_per_sec"] * p["flops_per_token"] / machine.peak_flops
        speeds = [f"{p['step_ms']:,.0f}", drift, f"{p['tok_per_sec']:,.0f}", steady, f"{share:.0%}"]
        rows.append(
            [
                *head,
                *speeds,
                f"{p['peak_memory_bytes'] / GIB:.2f} GiB",
                human(p["tokens_in_budget"]),
            ]
        )
    heads = (
        "depth x width",
        "T",
        "rows",
        "accumulation",
        "ms a step",
        "later",
        "tok/s",
        "spread",
        "of peak",
        "peak memory",
    )
    print0(columns((*heads, "tokens in the budget"), rows))


def _page(points: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Speed and memory against the device batch, a curve for each depth and length."""

    def shape(p: Mapping[str, Any]) -> tuple[int, int, int]:
        return p["config"]["n_layer"], p["config"]["n_embd"], p["config"]["sequence_len"]

    shapes = list(dict.fromkeys(map(shape, points)))

    def draw(ax: "Axes", name: str, unit: float, title: str) -> None:
        for i, one in enumerate(shapes):
            mine = sorted(
                (p for p in points if shape(p) == one and name in p), key=lambda p: p["rows"]
            )
            colour = page.LIGHT[i % len(page.LIGHT)]
            ax.plot(
                [p["rows"] for p in mine],
                [p[name] / unit for p in mine],
                "o-",
                color=colour,
                markersize=4,
            )
        ax.set_title(title)
        ax.set_xlabel("rows of a micro-batch")
        ax.set_ylim(0)

    plots = [page.svg(partial(draw, name="tok_per_sec", unit=1, title="Tokens a second"))]
    plots += [page.svg(partial(draw, name="peak_memory_bytes", unit=GIB, title="Peak memory, GiB"))]
    legend = " ".join(f"{page.chip(i)}{d} x {w}, T {t}" for i, (d, w, t) in enumerate(shapes))
    return page.write_page(
        "nanochat: probe", {"Speed": f'<p class="key">{legend}</p>{page.gallery(plots)}'}, out
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What in_process starts: one measurement, its specification in JSON the only argument."""
    (text,) = sys.argv[1:] if argv is None else argv
    spec = json.loads(text)
    if (
        sys.platform == "linux" and spec["device_type"] == "cpu"
    ):  # where memory ends, an error here is better than one of another process
        import resource

        import psutil

        resource.setrlimit(
            resource.RLIMIT_DATA,
            (int(0.95 * psutil.virtual_memory().available), resource.RLIM_INFINITY),
        )
    found = measure(spec) if "config" in spec else machine_here(spec["device_type"], spec["dtype"])
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    entry(main)
