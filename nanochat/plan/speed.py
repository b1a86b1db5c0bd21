"""
How fast a machine trains a model: from the points that `plan probe` measured on it, or else from
its peak and a stated share of it. Between points the speed is interpolated; the interval says how
well.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from nanochat.model.config import GPTConfig
from nanochat.plan import law
from nanochat.plan.machine import Machine
from nanochat.plan.shapes import counts, flops_per_token

PRETRAIN = 0.85  # share of a budget that pretraining gets
# Share of the peak that a training step reaches, with a 90 % interval. GPU: tokens per second that
# users report for an RTX 3090 (depth 12), 4070 (depths 12 and 16) and 4090 (124 M parameters) over
# the table's peaks, 43 to 75 %. CPU: a compiled step on two cores took 41 to 50 % of an AVX-512
# peak (dev/LOG.md), and 11 % where matrix units lift the peak tenfold and little else: hence a
# recipe for this machine always measures.
SHARES = {"cuda": (0.5, 0.3, 0.75), "mps": (0.3, 0.1, 0.5), "cpu": (0.2, 0.08, 0.5)}


class Speed(NamedTuple):
    """Tokens per second with a 90 % interval."""

    tok_per_sec: float
    lo: float
    hi: float


def tokens_per_second(config: GPTConfig, rows: int, T: int, total: int, machine: Machine) -> Speed:
    """
    Tokens per second of steps of `total` tokens in micro-batches of `rows` rows of T tokens. With
    points, the interval is 3 % wide at a point, and wider by how far the points lie beside the fit,
    by how far they drifted, and away from all of them. Without, it is that of SHARES, and three
    times as deep on a GPU below a width of 512, where launching kernels takes longer than running
    them.
    """
    f, p = flops_per_token(config, T), counts(config)["total"]
    if not machine.points:
        peak = machine.factor * machine.peak_flops / f
        share, lo, hi = SHARES[machine.device_type]
        narrow = machine.device_type != "cpu" and config.n_embd < 512
        return Speed(share * peak, lo * peak / (3 if narrow else 1), hi * peak)
    micro_ms, update_ms, error = _fitted(machine.points, f, p, T, rows)
    rate = machine.factor * 1e3 * total / (total * micro_ms + update_ms)
    interval = math.exp(law.Z90 * error)
    return Speed(rate, rate / interval, rate * interval)


def _fitted(
    points: Sequence[Mapping[str, Any]], f: float, p: float, T: int, rows: int
) -> tuple[float, float, float]:
    """
    (milliseconds of a micro-batch per token, milliseconds of an update, relative error) of a model
    of p parameters and f FLOPs per token. The first is a + b f and the second c + d p, with no
    negative factor; the first also deviates like the nearest points do, by inverse squared distance
    in the logarithms of FLOPs, context and tokens of a micro-batch.
    """
    from scipy.optimize import nnls

    context = np.array([q["config"]["sequence_len"] for q in points])
    tokens = context * [q["rows"] for q in points]
    flops, parameters, micro_ms, update_ms, drift = (
        np.array([q.get(name, 0.0) for q in points], dtype=float)
        for name in ("flops_per_token", "parameters", "micro_ms", "update_ms", "drift")
    )
    micro_ms /= tokens
    ones = np.ones_like(flops)
    parts = np.stack([ones, flops / flops.mean()], 1) / micro_ms[:, None]
    # Points of a single f do not tell a from b; this row then gives half to each.
    alike = 0.03 / micro_ms.mean() * np.array([[1.0, -1.0]])
    a, b = nnls(np.concatenate([parts, alike]), np.append(ones, 0.0))[0]
    c, d = nnls(np.stack([ones, parameters], 1) / update_ms[:, None], ones)[0]
    deviations = np.log(micro_ms / (a + b * flops / flops.mean()))
    typical = np.sqrt((deviations**2).sum() / (len(points) - 2)) if len(points) > 2 else 0.15
    squared = (
        np.log(flops / f) ** 2 + (np.log(context / T) ** 2 + np.log(tokens / (rows * T)) ** 2) / 4
    )
    deviation = np.average(deviations, weights=1 / (squared + 0.003))
    distance = math.sqrt(squared.min())
    near = math.hypot(0.03, math.sqrt((drift**2).mean()), typical * min(1.0, 2 * distance))
    error = near + 0.1 * max(0.0, distance - 0.7)
    micro = (a + b * f / flops.mean()) * math.exp(deviation)
    return float(micro), float(c + d * p), error


def usual_flops(machine: Machine, seconds: float) -> float:
    """FLOPs of `seconds` of training: at the median of the points, or else a share of the peak."""
    reached = [p["tok_per_sec"] * p["flops_per_token"] for p in machine.points]
    usual = median(reached) if reached else SHARES[machine.device_type][0] * machine.peak_flops
    return machine.factor * usual * seconds


def first_step(machine: Machine, compiled: bool) -> float:
    """
    Seconds that the first step takes longer than others, as the points say, or else half a minute
    to compile (on two cores, dev/LOG.md).
    """
    measured = [p["first_step_s"] for p in machine.points if p["compiled"] == compiled]
    if measured:
        return median(measured)
    return 30.0 if compiled else 0.0
