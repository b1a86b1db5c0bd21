"""
Fit the scaling law of the planner, nanochat/plan/law.py, to the runs below and print its numbers.

    python dev/scaling_law.py

The rows of LADDER are taken for optima of their FLOPs: a A / N^a = b B / D^b there. Least squares
in logarithms, with these standard deviations: 0.3 % of the ladder's bits per byte, 1 % of the
measured ones, whose text may lie 5 % beside the ladder's, a tenth of the optima, 0.1 of the
exponents.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from nanochat.plan.law import Law

Run = tuple[float, float, float]  # parameters of the layers, tokens, bits per byte

# Depths of nanochat trained compute-optimally on
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
# Hoffmann et al. 2022, approach 3: the ladder alone cannot tell exponents from floor.
EXPONENTS = (0.34, 0.28)


def fit(ladder: Sequence[Run] = LADDER, measured: Sequence[Run] = MEASURED) -> Law:
    """The law of these runs."""
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


if __name__ == "__main__":
    print(fit())
