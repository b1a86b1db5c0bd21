"""
What planning knows of a machine: a card from the table, a file that `plan probe` wrote, or this
machine, which is examined in a process of its own. A card that the table does not name is refused,
because the figures of another card would be a guess.
"""

import json
import subprocess
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from nanochat.base import hardware
from nanochat.base.commands import module_process, near
from nanochat.base.common import UserError, base_dir, duration, user_path
from nanochat.base.knobs import knob
from nanochat.base.strangers import read_json
from nanochat.train.knobs import DeviceKnobs
from nanochat.train.scaling import compile_pays

GIB = 1 << 30
Point = dict[str, Any]  # the figures of a measurement
LIMIT = 900.0  # seconds that one measurement may take


@dataclass(kw_only=True)
class BudgetKnobs:
    """Budget"""

    hours: float = knob(0.0, "time for the whole run, from pretraining to evaluation", low=0)
    minutes: float = knob(0.0, "the same in minutes", low=0)

    @property
    def budget(self) -> float:
        """The budget in seconds, 0 if none is given. UserError for two."""
        if self.hours and self.minutes:
            raise UserError(
                f"--hours={self.hours:g} and --minutes={self.minutes:g} set two budgets: give only "
                "one of them"
            )
        return self.hours * 3600 or self.minutes * 60


@dataclass(kw_only=True)
class CardKnobs(DeviceKnobs):
    """Machine"""

    gpu: str = knob("", "plan for this GPU, for example rtx4090 (default: this machine)")
    gpus: int = knob(1, "number of these GPUs", low=1)
    probe: str = knob(
        "",
        "use this file from plan probe (default: the one in the base folder, if it was "
        "measured on this machine)",
    )
    memory_gb: float = knob(
        0.0, "memory of the device (default: the GPU's, or what is free here)", low=0
    )
    json: bool = knob(False, "print only JSON")


@dataclass(frozen=True)
class Machine:
    """
    What is known of a machine. `points` are measurements made on it, as plan.measure returns; those
    that failed are left out.
    """

    name: str
    device_type: str
    dtype: str
    memory_bytes: float
    peak_flops: float
    points: tuple[Point, ...] = ()
    source: str = ""  # where its speed comes from, in words
    factor: float = 1.0  # measured over predicted speed, from a pilot
    memory_gap: float | None = None  # bytes that a pilot measured above the count, or None
    # By point (memory.calibrated): bytes counted, and how many more a run takes by its measurement
    gaps: tuple[tuple[float, float], ...] = ()
    compiler: bool = True  # whether torch.compile works on it
    bandwidth: float = 0.0  # bytes per second of the memory, 0 if not known
    watts: float = 0.0  # rated board power, 0 if not known
    threads: int = 0  # of a CPU, 0 if not known
    gpus: int = 1  # that train together

    def compiles(self, seconds: float, asked: str = "auto") -> bool:
        """Whether base_train compiles on it in a run of `seconds`, given --compile=`asked`."""
        wanted = compile_pays(self.device_type, seconds) if asked == "auto" else asked == "on"
        return wanted and self.compiler

    def stored(self) -> dict[str, Any]:
        """What files keep of it, with the number of its points instead of them."""
        return {**vars(self), "points": len(self.points)}


def of_card(name: str) -> Machine:
    """
    A card of the table. Its dtype and compiler are those of the card, whatever this machine has.
    UserError for an unknown card names the similar ones.
    """
    gpu = hardware.lookup(name)
    if gpu is None:
        known = [g.name for g in hardware.gpus()]
        raise UserError(
            f"there is no GPU {name!r} in the table{near(name.upper(), known)}: choose from "
            f"{', '.join(known)}. Or measure yours: run plan probe on it and give the file to plan "
            "recipe with --probe"
        )
    return Machine(
        gpu.name,
        gpu.device_type,
        gpu.dtype,
        gpu.memory_gb * GIB,
        gpu.flops,
        source=f"specification: {gpu.source}",
        compiler=gpu.device_type == "cuda",
        bandwidth=1e9 * gpu.bandwidth,
        watts=gpu.watts,
    )


def plan_file(given: str, usual: str) -> Path:
    """The file that a flag gives, or without one the usual file in the folder of plans."""
    return user_path(given) if given else base_dir() / "plan" / usual


def load(path: Path | str) -> Machine:
    """The machine of a probe's file, with its points. UserError if there is no such file."""
    try:
        file = read_json(user_path(path))
        found = Machine(**file["machine"])
        own = {"name": found.name, "dtype": found.dtype, "threads": found.threads}.items()
        points = ({"threads": found.threads} | p for p in file["points"])
        good = (p for p in points if own <= p.items() and "error" not in p)
        return replace(found, points=tuple(good), source=f"measured, {path}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is no file of plan probe ({type(e).__name__}: {e}): name another, or delete "
            f"it and make one with nanochat plan probe --out {path}"
        ) from None


def here(device_type: str, dtype: str) -> Machine:
    """
    This machine: measured now, with the points and the peak of the probe in the base folder if that
    was made on this device with as many threads (those of earlier versions do not say). UserError
    if the device cannot be used.
    """
    measured = in_process({"device_type": device_type, "dtype": dtype})
    if "error" in measured:
        raise UserError(f"the speed of this machine cannot be measured: {measured['error']}")
    this = Machine(**measured, source="a share of the peak measured here")
    if (file := plan_file("", "probe.json")).exists():
        probed, device = load(file), attrgetter("name", "device_type", "dtype")
        if device(probed) == device(this) and probed.threads in (0, this.threads):
            # With its peak, another probe has the same grid
            peak = probed.peak_flops
            return replace(this, points=probed.points, source=probed.source, peak_flops=peak)
    return this


def named(knobs: CardKnobs) -> Machine:
    """
    A card by name, the machine of a probe, or this one; in the dtype and with the memory that the
    knobs give. UserError for two machines, an unknown card, and several of no card.
    """
    if knobs.gpu and knobs.probe:
        raise UserError(
            f"--gpu={knobs.gpu} and --probe={knobs.probe} describe two machines: give only one "
            "of them"
        )
    if knobs.gpu and knobs.device_type != "auto":
        raise UserError(
            f"--device_type={knobs.device_type} has no effect beside --gpu={knobs.gpu}: leave it "
            "out"
        )
    if knobs.gpus > 1 and not knobs.gpu:
        raise UserError(f"--gpus={knobs.gpus} also needs the name of the GPU: add --gpu NAME")
    if knobs.gpu:
        found = of_card(knobs.gpu)
    else:
        found = load(knobs.probe) if knobs.probe else here(knobs.device_type, knobs.dtype)
    dtype = found.dtype if knobs.dtype == "auto" else knobs.dtype
    size = knobs.memory_gb * GIB or found.memory_bytes
    return replace(found, gpus=knobs.gpus, dtype=dtype, memory_bytes=size)


def in_process(spec: Point) -> Point:
    """
    What plan.measure returns for `spec`, in a process of its own, so that running out of memory is
    a result. Returns {"error": reason} if the process fails or takes longer than LIMIT.
    """
    try:
        done = subprocess.run(
            **module_process("nanochat.plan.measure", json.dumps(spec)),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {duration(LIMIT)}"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -9:  # the system killed it
        return {"error": "out of memory"}
    messages = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
    return {"error": messages[-1].removeprefix("error: ")}
