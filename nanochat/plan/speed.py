"""
How fast a machine trains a model: from the points that `plan probe` measured on it, or else, for a
CUDA card, from a roofline by parts, which tests compare with the speeds that owners report. Between
points the speed is interpolated; the interval says how well.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from nanochat.model.config import GPTConfig
from nanochat.plan import law
from nanochat.plan.machine import Machine, Point
from nanochat.plan.shapes import counts, flops_per_token
from nanochat.train.polynomials import chosen_polynomials

TYPICAL = 0.5  # share of a card's peak, for what needs only the size of a budget
# Share of the peak that a training step reaches, with a 90 % interval, where there is no roofline.
# CPU: a compiled step on two cores took 41 to 50 % of an AVX-512 peak (dev/LOG.md), and 11 % where
# matrix units lift the peak tenfold and little else: hence a plan for this machine always measures.
SHARES = {"mps": (0.3, 0.1, 0.5), "cpu": (0.2, 0.08, 0.5)}
LOOKBACK = 0.94  # speed with the parts of --lookback, as a share of that without (two cores)
DOUBT = 1.5  # by which factor the truth may lie beside the roofline


class Speed(NamedTuple):
    """Tokens per second with a 90 % interval."""

    tok_per_sec: float
    lo: float
    hi: float


def tokens_per_second(config: GPTConfig, rows: int, T: int, total: int, machine: Machine) -> Speed:
    """
    Tokens per second of steps of `total` tokens in micro-batches of up to `rows` rows of T tokens:
    from the points of the machine, else for a CUDA card from its roofline, else as a share of the
    peak.
    """
    own = T * -(-total // (T * machine.gpus))  # tokens of a step on the GPU with most rows
    rows = min(rows, own // T)
    if machine.points:
        rate, error = interpolated(machine.points, config, rows, T)
        interval = math.exp(law.Z90 * error)
        rates = rate, rate / interval, rate * interval
    elif machine.device_type == "cuda":
        rate = total / step_seconds(roofline(config, rows, T, own, machine))
        rates = rate, rate / DOUBT, rate * DOUBT
    else:
        shares = SHARES[machine.device_type]
        rates = [share * machine.peak_flops / flops_per_token(config, T) for share in shares]
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
    Seconds of the parts of a step of `total` tokens on one CUDA card: products and attention at the
    share of the peak that kernels reach, the rest by its bytes.
    """
    n = counts(config)
    C, L, V, matrices = config.n_embd, config.n_layer, config.vocab_size, n["transformer"]
    micro = total // (rows * T)
    peak = machine.peak_flops
    bandwidth = 0.9 * (machine.bandwidth or peak / 100)
    share = 0.78 if peak < 3e14 else 0.64  # large cards are harder to keep busy
    fused = 0.48 if config.head_dim >= 128 else 0.41  # of the peak, forward and backward
    products = 6 * n["matmul"] * total
    attention = flops_per_token(config, T) * total - products
    # Muon: steps of three products for each matrix, whose shorter side is C.
    muon = len(chosen_polynomials("auto", C)) * (4 * matrices * C + 2 * C * matrices / 3)
    tables = n["total"] - matrices
    return {
        "products": products / (share * peak),
        "attention": attention / (fused * peak),
        "loss": (10 * V * total + 12 * micro * V * C) / bandwidth,
        "elementwise": (108 * L * C * total + 24 * micro * matrices) / bandwidth,
        "optimizer": muon / (0.7 * share * peak) + (66 * matrices + 28 * tables) / bandwidth,
        "launches": 7e-6 * (micro * (55 * L + 40) + 30 * L + 150),
    }


def interpolated(
    points: Sequence[Point], config: GPTConfig, rows: int, T: int
) -> tuple[float, float]:
    """
    (tokens per second, relative error) of a model: the mean over the points, by inverse squared
    distance in the logarithms of FLOPs per token, context and tokens of a micro-batch. The time of
    a token grows with its FLOPs to the power that the points show, if that is from 0 to 1; 0.8 is
    the usual one. Points of a busy machine can show anything, so twice the FLOPs per second of the
    best one is the most that is believed. A speed is known to 3 % at best, and no better than the
    points drifted; away from them the error is 12 % of the distance. A point without the parts of
    --lookback counts for a model with them as LOOKBACK says, and the other way round.
    """
    sizes = [
        (
            q["flops_per_token"],
            q["config"]["sequence_len"],
            q["config"]["sequence_len"] * q["rows"],
        )
        for q in points
    ]
    x = np.log(np.divide(sizes, (flops_per_token(config, T), T, rows * T))) * (1, 0.5, 0.5)
    parts = [config.convolutions - q["config"].get("convolutions", False) for q in points]
    rates = np.log([q["tok_per_sec"] for q in points]) + np.multiply(parts, math.log(LOOKBACK))
    flops = x[:, 0] - x[:, 0].mean()
    power = np.clip((0.8 * 0.05 - flops @ rates) / (0.05 + flops @ flops), 0, 1)
    squared = (x**2).sum(1)
    rate = np.average(rates + power * x[:, 0], weights=1 / (squared + 0.003))
    drift = fmean(q.get("drift", 0.0) ** 2 for q in points)
    error = math.sqrt(0.03**2 + drift + 0.12**2 * squared.min())
    most = math.log(2) + (rates + x[:, 0]).max()
    return math.exp(min(rate, most)), error


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
    return median(measured or [30.0 * compiled])
