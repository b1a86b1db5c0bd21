"""
Bits per byte from the size of a model and what it reads: L(N, D) = E + A / N^a + B / D^b (the form of Hoffmann et al. 2022, equation
10), N the parameters that a token is multiplied with, D the tokens of a run whose learning rate has decayed.

It is fitted to a published ladder of compute-optimal runs on web text, and is a first guess: text and tokenizer move the whole curve,
which a pilot run measures (`scaled`). A plan never shows its figure without the interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.optimize import brentq, least_squares

# FLOPs, matmul parameters, tokens, bits per byte: depths of nanochat trained compute-optimally on FineWeb-Edu, as published by its author
LADDER = (
    (1e18, 110.7e6, 1.24e9, 0.897),
    (2e18, 167.8e6, 1.79e9, 0.862),
    (5e18, 250.7e6, 2.64e9, 0.829),
    (1e19, 381.8e6, 3.81e9, 0.800),
)
EXPONENTS = (0.34, 0.28)  # Hoffmann et al. 2022, approach 3: the ladder alone cannot tell exponents from floor
Z90 = 1.645  # intervals here are 90 %


@dataclass(frozen=True)
class Law:
    """E, A, B in bits per byte, N and D in units of `size` and `tokens`; `factor` moves the whole curve, `spread` replaces its error."""

    floor: float
    A: float
    B: float
    a: float
    b: float
    size: float
    tokens: float
    factor: float = 1.0
    spread: float | None = None  # relative standard deviation, None = by the distance from the ladder

    def bpb(self, n: float, d: float) -> float:
        """Bits per byte of n matmul parameters after d tokens."""
        return self.factor * (self.floor + self.A * (n / self.size) ** -self.a + self.B * (d / self.tokens) ** -self.b)

    def interval(self, n: float, d: float) -> tuple[float, float, float]:
        """
        Bits per byte and its 90 % interval. The error is a judgement: 1.5 % on the ladder and as much again for every factor of ten in
        FLOPs outside it. A check: 4.6 M tokens on 7.3 M parameters, 3.7 factors of ten below, came to 1.84-1.87 where the law says 1.79
        (dev/LOG.md, ten minutes of real text).
        """
        low, high = math.log10(LADDER[0][0]), math.log10(LADDER[-1][0])
        at = math.log10(6 * n * d)
        error = self.spread or math.hypot(0.015, 0.015 * max(0.0, low - at, at - high))
        middle = self.bpb(n, d)
        return middle, middle * math.exp(-Z90 * error), middle * math.exp(Z90 * error)

    def best(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) with 6 N D = flops and the lowest bits per byte."""

        def slope(log_n: float) -> float:  # of the logarithms of the two terms, equal at the optimum
            x = self.a * self.A * (math.exp(log_n) / self.size) ** -self.a
            y = self.b * self.B * (flops / 6 / math.exp(log_n) / self.tokens) ** -self.b
            return x - y

        n = math.exp(float(brentq(slope, 0.0, math.log(flops))))  # type: ignore[arg-type]  # the root alone, as full_output is off
        return n, flops / 6 / n

    def tokens_for(self, bpb: float, n: float) -> float | None:
        """Tokens with which n parameters reach `bpb`; None when no number of them does."""
        left = bpb / self.factor - self.floor - self.A * (n / self.size) ** -self.a
        return self.tokens * (left / self.B) ** (-1 / self.b) if left > 0 else None

    def share(self, n: float, d: float) -> float:
        """What part of the bits per byte of (n, d) more tokens cannot remove."""
        return (self.floor + self.A * (n / self.size) ** -self.a) * self.factor / self.bpb(n, d)

    def scaled(self, factor: float, spread: float) -> "Law":
        """The same curve, moved to where a pilot found it, with the pilot's relative standard deviation."""
        return replace(self, factor=factor, spread=spread)


@cache
def fitted() -> Law:
    """The law of LADDER, whose rows are taken for optima of their FLOPs: a A / N^a = b B / D^b there."""
    return fit(LADDER)


def fit(ladder: Sequence[tuple[float, float, float, float]]) -> Law:
    """Least squares in logarithms: 0.3 % on the bits per byte, a tenth on the optima, 0.05 on the exponents."""
    _, n, d, bpb = np.array(ladder).T
    size, tokens = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))

    def misses(p: np.ndarray) -> np.ndarray:
        floor, log_a, log_b, a, b = p
        x, y = np.exp(log_a) * (n / size) ** -a, np.exp(log_b) * (d / tokens) ** -b
        shape = (np.array([a, b]) - EXPONENTS) / 0.05
        return np.concatenate([np.log(np.maximum(floor + x + y, 1e-9) / bpb) / 0.003, np.log(a * x / (b * y)) / 0.1, shape])

    floor, log_a, log_b, a, b = map(float, least_squares(misses, [0.6 * bpb.min(), -2.0, -2.0, *EXPONENTS]).x)
    return Law(floor, math.exp(log_a), math.exp(log_b), a, b, size, tokens)
