"""
How fast a machine trains a model: from the points that `plan probe` measured on it, or else, for a
CUDA card, from a roofline by parts, which tests compare with the speeds that owners report. Between
points the speed is interpolated; the interval says how well.
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

TYPICAL = 0.5  # share of a card's peak, for what needs only the size of a budget
# Share of the peak that a training step reaches, with a 90 % interval, where there is no roofline.
# CPU: a compiled step on two cores took 41 to 50 % of an AVX-512 peak (dev/LOG.md), and 11 % where
# matrix units lift the peak tenfold and little else: hence a plan for this machine always measures.
SHARES = {"mps": (0.3, 0.1, 0.5), "cpu": (0.2, 0.08, 0.5)}
# The parts of a step on a CUDA card, and by which factor the truth may differ from each.
DOUBT = {
    "products": 1.45,
    "attention": 1.6,
    "loss": 1.5,
    "elementwise": 1.5,
    "optimizer": 1.5,
    "launches": 2.0,
}


class Speed(NamedTuple):
    """Tokens per second with a 90 % interval."""

    tok_per_sec: float
    lo: float
    hi: float


def tokens_per_second(config: GPTConfig, rows: int, T: int, total: int, machine: Machine) -> Speed:
    """
    Tokens per second of steps of `total` tokens in micro-batches of `rows` rows of T tokens. With
    points, the interval is 3 % wide at a point, and wider by how far the points lie beside the fit,
    by how far they drifted, and away from all of them. Without, a CUDA card has its roofline, and
    other devices a share of their peak (SHARES).
    """
    f, p = flops_per_token(config, T), counts(config)["total"]
    if machine.points:
        micro_ms, update_ms, error = _fitted(machine.points, f, p, T, rows)
        rate = 1e3 * total / (total * micro_ms + update_ms)
        interval = math.exp(law.Z90 * error)
        rates = rate, rate / interval, rate * interval
    elif machine.device_type == "cuda":
        total = max(rows * T, total // machine.gpus)
        parts = roofline(config, rows, T, total, machine)
        rates = [
            machine.gpus
            * total
            / step_seconds({n: s * DOUBT[n] ** power for n, s in parts.items()})
            for power in (0, 1, -1)
        ]
    else:
        rates = [share * machine.peak_flops / f for share in SHARES[machine.device_type]]
    middle, lo, hi = (machine.factor * rate for rate in rates)
    if machine.factor != 1:  # a pilot has measured it
        lo, hi = max(lo, middle / 1.15), min(hi, middle * 1.15)
    return Speed(middle, lo, hi)


def step_seconds(parts: Mapping[str, float]) -> float:
    """A step's time from its parts: launching overlaps with what runs."""
    return max(parts["launches"], sum(parts.values()) - parts["launches"])


def roofline(
    config: GPTConfig, rows: int, T: int, total: int, machine: Machine
) -> dict[str, float]:
    """
    Seconds of the parts of a step of `total` tokens on one CUDA card, by the keys of DOUBT:
    products and attention at the share of the peak that kernels reach, the rest by its bytes.
    """
    n = counts(config)
    C, L, V, matrices = config.n_embd, config.n_layer, config.vocab_size, n["transformer"]
    micro = max(1, total // (rows * T))
    peak = machine.peak_flops
    bandwidth = 0.9 * (machine.bandwidth or peak / 100)
    share = 0.78 if peak < 3e14 else 0.64  # large cards are harder to keep busy
    fused = 0.48 if config.head_dim >= 128 else 0.41  # of the peak, forward and backward
    products = 6 * n["matmul"] * total
    attention = flops_per_token(config, T) * total - products
    # Muon: five rounds of three products for each matrix, whose shorter side is C.
    muon = 5 * (4 * matrices * C + 2 * C * matrices / 3)
    tables = n["total"] - matrices
    return {
        "products": products / (share * peak),
        "attention": attention / (fused * peak),
        "loss": (10 * V * total + 12 * micro * V * C) / bandwidth,
        "elementwise": (108 * L * C * total + 24 * micro * matrices) / bandwidth,
        "optimizer": muon / (0.7 * share * peak) + (66 * matrices + 28 * tables) / bandwidth,
        "launches": 7e-6 * (micro * (55 * L + 40) + 30 * L + 150),
    }


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
    share = SHARES.get(machine.device_type, (TYPICAL,))[0]
    usual = median(reached) if reached else share * machine.gpus * machine.peak_flops
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
