"""
How fast a machine trains a model: from the points that `plan probe` measured on it, or else from
its peak and a stated share of it. Between points the speed is interpolated; the interval says how
well.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from nanochat.model.config import GPTConfig
from nanochat.plan import law
from nanochat.plan.machine import Machine
from nanochat.plan.shapes import counts, flops_per_token, layer_parameters

PRETRAIN = 0.85  # share of a budget that pretraining gets
# Share of the peak that a training step reaches, with a 90 % interval. GPU: tokens per second that
# users report for an RTX 3090 (depth 12), 4070 (depths 12 and 16) and 4090 (124 M parameters) over
# the table's peaks, 43 to 75 %. CPU: a compiled step on two cores took 41 to 50 % of an AVX-512
# peak (dev/LOG.md), and 11 % where matrix units lift the peak tenfold and little else: hence a
# recipe for this machine always measures.
SHARES = {"cuda": (0.5, 0.3, 0.75), "mps": (0.3, 0.1, 0.5), "cpu": (0.2, 0.08, 0.5)}


@dataclass(frozen=True)
class Speed:
    """Tokens per second with a 90 % interval."""

    tok_per_sec: float
    lo: float
    hi: float


class _Fit:
    """
    Milliseconds of a micro-batch per token as a + b f and of an update as c + d P (f FLOPs per
    token, P parameters; none negative), times the deviation of the nearest points from that, by
    inverse squared distance in the logarithms of FLOPs, context and tokens of a micro-batch.
    """

    def __init__(self, points: Sequence[Mapping[str, Any]]):
        from scipy.optimize import nnls

        f, p, T, rows = np.array([_sizes(point) for point in points], dtype=float).T
        micro = np.array([point["micro_ms"] for point in points]) / (rows * T)
        update = np.array([point["update_ms"] for point in points])
        ones = np.ones_like(f)
        parts = np.stack([ones, f / f.mean()], 1) / micro[:, None]
        # Points of a single f do not tell a from b; this row then gives half to each.
        alike = 0.03 / micro.mean() * np.array([[1.0, -1.0]])
        a, b = nnls(np.concatenate([parts, alike]), np.append(ones, 0.0))[0]
        self.a, self.b = a, b / f.mean()
        self.c, self.d = nnls(np.stack([ones, p], 1) / update[:, None], ones)[0]
        self.places = _place(f, T, rows)
        self.deviations = np.log(micro / (self.a + self.b * f))

    def step_ms(self, f: float, p: float, T: int, rows: int, total: int) -> tuple[float, float]:
        """(milliseconds of a step of `total` tokens, distance to the nearest point)."""
        squared = ((self.places - _place(f, T, rows)) ** 2).sum(-1)
        deviation = float(np.average(self.deviations, weights=1 / (squared + 0.003)))
        micro = (self.a + self.b * f) * math.exp(deviation)
        return float(total * micro + self.c + self.d * p), float(np.sqrt(squared.min()))


def _sizes(point: Mapping[str, Any]) -> tuple[float, float, int, int]:
    """(FLOPs per token, parameters, context, rows) of a measured point."""
    T = point["config"]["sequence_len"]
    return point["flops_per_token"], point["parameters"], T, point["rows"]


def _place(f: Any, T: Any, rows: Any) -> np.ndarray:
    return np.stack([np.log(f), 0.5 * np.log(T), 0.5 * np.log(rows * T)], axis=-1)


def tokens_per_second(config: GPTConfig, rows: int, T: int, total: int, machine: Machine) -> Speed:
    """
    Tokens per second of steps of `total` tokens in micro-batches of `rows` rows of T tokens. With
    points, the interval comes from leaving each one out in turn, narrower at a point (3 %) and
    wider away from all of them, and from how far they drifted. Without, it is that of SHARES, and
    three times as deep on a GPU below a width of 512, where launching kernels takes longer than
    running them.
    """
    f, p = flops_per_token(config, T), counts(config)["total"]
    points = machine.good_points
    if not points:
        peak = machine.factor * machine.peak_flops / f
        share, lo, hi = SHARES[machine.device_type]
        narrow = machine.device_type != "cpu" and config.n_embd < 512
        return Speed(share * peak, lo * peak / (3 if narrow else 1), hi * peak)
    ms, distance = _Fit(points).step_ms(f, p, T, rows, total)
    drift = float(np.sqrt(np.mean([q.get("drift", 0.0) ** 2 for q in points])))
    near = math.hypot(0.03, drift, _typical_error(points) * min(1.0, distance / 0.5))
    interval = math.exp(law.Z90 * (near + 0.1 * max(0.0, distance - 0.7)))
    rate = machine.factor * total / ms * 1e3
    return Speed(rate, rate / interval, rate * interval)


def _typical_error(points: Sequence[Mapping[str, Any]]) -> float:
    """Relative error of predicting a point from the others; 0.15 if there are fewer than three."""
    if len(points) < 3:
        return 0.15
    errors = []
    for i, point in enumerate(points):
        f, p, T, rows = _sizes(point)
        others = [*points[:i], *points[i + 1 :]]
        guess, _ = _Fit(others).step_ms(f, p, T, rows, point["accumulation"] * rows * T)
        errors.append(np.log(guess / point["step_ms"]))
    return float(np.sqrt(np.mean(np.square(errors))))


def usual_share(machine: Machine) -> float:
    """Share of the peak that training reaches: the median of the points, or else by SHARES."""
    reached = [
        p["tok_per_sec"] * p["flops_per_token"] / machine.peak_flops for p in machine.good_points
    ]
    return machine.factor * (median(reached) if reached else SHARES[machine.device_type][0])


def usual_flops(machine: Machine, seconds: float) -> float:
    """FLOPs of `seconds` of training at the usual share of the peak."""
    return usual_share(machine) * machine.peak_flops * seconds


def rough_bpb(config: GPTConfig, machine: Machine, seconds: float, the_law: law.Law) -> float:
    """Bits per byte after `seconds` at the usual share: tells which sizes deserve a closer look."""
    tokens = usual_flops(machine, seconds) / flops_per_token(config)
    return the_law.bpb(layer_parameters(config), max(1.0, tokens))


def first_step(machine: Machine, compiled: bool) -> float:
    """
    Seconds that the first step takes longer than others, as the points say, or else half a minute
    to compile (on two cores, dev/LOG.md).
    """
    measured = [p["first_step_s"] for p in machine.good_points if p["compiled"] == compiled]
    if measured:
        return median(measured)
    return 30.0 if compiled else 0.0


def config_key(config: GPTConfig) -> str:
    """A text that identifies an architecture."""
    return json.dumps(asdict(config), sort_keys=True)
