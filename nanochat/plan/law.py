"""
Bits per byte from the size of a model and the tokens that it reads: L(N, D) = E + A / N^a + B / D^b
(the form of Hoffmann et al. 2022, equation 10), with N the parameters of its layers and D the
tokens of a run whose learning rate has decayed. Embedding and head do not count, as in Kaplan et
al. 2020: in a model of minutes the head is most of what a token is multiplied with, and counting it
makes one narrow layer look best.

The law is fitted to a published ladder of compute-optimal runs on web text and to runs of minutes
on a CPU that were made here. It is a first guess: text and tokenizer move the whole curve, which a
pilot measures (`Law.moved`). A plan never shows its figure without the interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

# Parameters of the layers, tokens, bits per byte: depths of nanochat trained compute-optimally on
# FineWeb-Edu with 1, 2, 5 and 10 x 1e18 FLOPs, as published by its author; 110.7, 167.8, 250.7 and
# 381.8 M matmul parameters, less a head of 32,768 tokens at 64 per layer.
LADDER = (
    (85.5e6, 1.24e9, 0.897),
    (138.2e6, 1.79e9, 0.862),
    (216.3e6, 2.64e9, 0.829),
    (341.8e6, 3.81e9, 0.800),
)
# The same of depths 1 to 4 on English prose, minutes on two cores (dev/LOG.md: small budgets, a
# plan of 20 minutes, general English).
MEASURED = (
    (0.197e6, 4.6e6, 1.965),
    (0.393e6, 3.0e6, 1.987),
    (1.327e6, 1.57e6, 2.054),
    (1.573e6, 1.5e6, 2.068),
    (3.146e6, 0.54e6, 2.262),
    (1.327e6, 4.0e6, 1.899),
    (1.769e6, 12.5e6, 1.656),
    (3.146e6, 8.96e6, 1.727),
    (0.885e6, 19.5e6, 1.698),
    (1.327e6, 17.4e6, 1.622),
    (1.769e6, 15.8e6, 1.632),
    (2.359e6, 0.61e6, 2.211),
    (0.041e6, 21.1e6, 1.999),
)
EXPONENTS = (
    0.34,
    0.28,
)  # Hoffmann et al. 2022, approach 3: the ladder alone cannot tell exponents from floor
Z90 = 1.645  # intervals here are 90 %
LOW, HIGH = (
    math.log10(6 * n * d) for n, d, _ in (LADDER[0], LADDER[-1])
)  # logarithms of 6 N D: the ends of the ladder
HERE = 14.0  # the middle of MEASURED
NEAR = 15.0  # up to here MEASURED's text counts in full


@dataclass(frozen=True)
class Law:
    """
    E, A and B in bits per byte, N and D in units of `size` and `tokens`. `prose` is the distance,
    in logarithms, of the text of MEASURED above that of LADDER; it counts the less the nearer FLOPs
    come to the ladder's. A pilot sets `factor`, which moves the whole curve, and `around`, the ends
    of the interval over its middle (None = by the distance from what was measured).
    """

    floor: float
    A: float
    B: float
    a: float
    b: float
    size: float
    tokens: float
    prose: float
    factor: float = 1.0
    around: tuple[float, float] | None = None

    def bpb(self, n: float, d: float) -> float:
        """Bits per byte of n parameters in the layers after d tokens."""
        prose = self.prose * np.clip((LOW - math.log10(6 * n * d)) / (LOW - NEAR), 0, 1)
        return self.factor * math.exp(prose) * (self._limit(n) + self._reducible(d))

    def _limit(self, n: float) -> float:
        return self.floor + self.A * (n / self.size) ** -self.a

    def _reducible(self, d: float) -> float:
        return self.B * (d / self.tokens) ** -self.b

    def interval(self, n: float, d: float) -> tuple[float, float, float]:
        """
        Bits per byte and its 90 % interval. The error is a judgement: 1.5 % on the ladder, 4 %
        where runs were made here (one that it is not fitted to came to 1.84-1.87 where it says
        1.78), and 1.5 % more for every factor of ten in FLOPs from the nearer of the two.
        """
        at, middle = math.log10(6 * n * d), self.bpb(n, d)
        ladder = math.hypot(0.015, 0.015 * max(0.0, LOW - at, at - HIGH))
        here = math.hypot(0.04, 0.015 * abs(at - HERE))
        width = math.exp(Z90 * min(ladder, here))
        lo, hi = self.around or (1 / width, width)
        return middle, lo * middle, hi * middle

    def best(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) with 6 N D = flops and the lowest bits per byte."""
        from scipy.optimize import brentq

        def slope(log_n: float) -> float:
            """The difference of the two terms' logarithmic slopes, 0 at the optimum."""
            n = math.exp(log_n)
            gain = self.a * (self._limit(n) - self.floor)
            return gain - self.b * self._reducible(flops / 6 / n)

        n = math.exp(float(brentq(slope, 0.0, math.log(flops))))  # type: ignore[arg-type]
        return n, flops / 6 / n

    def share(self, n: float, d: float) -> float:
        """The part of the bits per byte of (n, d) that more tokens cannot remove."""
        return self._limit(n) / (self._limit(n) + self._reducible(d))

    def moved(self, n: float, d: float, bpb: tuple[float, float, float]) -> "Law":
        """The curve through a pilot's interval (middle, lo, hi) at n and d, everywhere as wide."""
        middle, lo, hi = bpb
        factor = self.factor * middle / self.bpb(n, d)
        return replace(self, factor=factor, around=(lo / middle, hi / middle))


@cache
def fitted() -> Law:
    """
    The law of LADDER, whose rows are taken for optima of their FLOPs (a A / N^a = b B / D^b there),
    and of MEASURED.
    """
    return fit(LADDER, MEASURED)


def fit(
    ladder: Sequence[tuple[float, float, float]], measured: Sequence[tuple[float, float, float]]
) -> Law:
    """
    Least squares in logarithms, with these standard deviations: 0.3 % of the ladder's bits per
    byte, 1 % of the measured ones, whose text may lie 5 % beside the ladder's, a tenth of the
    optima, 0.1 of the exponents.
    """
    from scipy.optimize import least_squares

    n, d, bpb = np.array(ladder).T
    own_n, own_d, own_bpb = np.array(measured).T
    size, tokens = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))

    def misses(p: np.ndarray) -> np.ndarray:
        floor, log_a, log_b, a, b, prose = p

        def of_size(n: np.ndarray) -> np.ndarray:
            return np.exp(log_a) * (n / size) ** -a

        def of_tokens(d: np.ndarray) -> np.ndarray:
            return np.exp(log_b) * (d / tokens) ** -b

        predicted = floor + (of_size(n) + of_tokens(d))
        own_predicted = floor + (of_size(own_n) + of_tokens(own_d))
        return np.concatenate(
            [
                np.log(np.maximum(predicted, 1e-9) / bpb) / 0.003,
                (np.log(np.maximum(own_predicted, 1e-9) / own_bpb) + prose) / 0.01,
                (np.array([a, b]) - EXPONENTS) / 0.1,
                [prose / 0.05],
                np.log(a * of_size(n) / (b * of_tokens(d))) / 0.1,
            ]
        )

    start = [0.6 * bpb.min(), -2.0, -2.0, *EXPONENTS, 0.0]
    floor, log_a, log_b, a, b, prose = map(float, least_squares(misses, start).x)
    return Law(floor, math.exp(log_a), math.exp(log_b), a, b, size, tokens, prose)
