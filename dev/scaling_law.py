"""
Fit the scaling laws of the planner, nanochat/plan/law.py, to the runs below and print their
numbers.

    python dev/scaling_law.py

The rows of LADDER are taken for optima of their FLOPs: a A / N^a = b B / D^b there. Least squares
in logarithms, with these standard deviations: 0.3 % of the ladder's bits per byte, 1 % of the
measured ones, whose text may lie 5 % beside the ladder's, a tenth of the optima, 0.1 of the
exponents. LOOKING_BACK and TINYWORLD are fitted alone, without a ladder, with 0.5 % instead of 1 %,
so these fits hold only near their runs; the number of layers has an exponent of its own there.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from nanochat.plan.law import Law

# Parameters of the layers, tokens, bits per byte, and for LOOKING_BACK and TINYWORLD layers
Run = tuple[float, ...]

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
# Runs of dev/plan_trial.py with the parts of --lookback, vocabularies of 8,192 and 2,048
# (dev/LOG.md, the choice over budgets), means of their seeds, and the run of three hours. The
# embedded corpus has 5.3 M tokens, of which law.worth counts the repeated ones; its four runs of
# thirty minutes read 130 MB of it once.
LOOKING_BACK = (
    (0.050e6, 4.497e6, 1.8706, 1),
    (0.198e6, 2.462e6, 1.8249, 1),
    (0.198e6, 10.89e6, 1.6487, 1),
    (0.198e6, 35.78e6, 1.5631, 1),
    (0.395e6, 2.167e6, 1.8223, 2),
    (0.395e6, 9.585e6, 1.6321, 2),
    (0.395e6, 31.85e6, 1.5333, 2),
    (0.395e6, 63.4e6, 1.508, 2),
    (0.888e6, 1.376e6, 1.8819, 2),
    (0.888e6, 6.095e6, 1.6545, 2),
    (0.888e6, 20.04e6, 1.5227, 2),
    (1.332e6, 1.155e6, 1.9074, 3),
    (1.332e6, 5.112e6, 1.6660, 3),
    (1.332e6, 16.42e6, 1.5343, 3),
)
TINYWORLD = (
    (0.050e6, 10.23e6, 0.2387, 1),
    (0.198e6, 5.153e6, 0.2331, 1),
    (0.198e6, 21.6e6, 0.2139, 1),
    (0.395e6, 3.506e6, 0.2300, 2),
    (0.395e6, 14.89e6, 0.2043, 2),
    (0.888e6, 2.269e6, 0.2415, 2),
    (0.888e6, 9.9e6, 0.2050, 2),
    (0.888e6, 33.16e6, 0.1969, 2),
    (1.332e6, 1.778e6, 0.2477, 3),
    (1.332e6, 7.824e6, 0.2054, 3),
    (1.332e6, 26.62e6, 0.1965, 3),
    (1.776e6, 20.86e6, 0.1949, 4),
    (3.154e6, 12.92e6, 0.1966, 4),
)


def fit(ladder: Sequence[Run] = LADDER, measured: Sequence[Run] = MEASURED) -> Law:
    """The law of these runs."""
    n, d, bpb = np.reshape(ladder, (-1, 3)).T
    # Where the number of layers is not known, it has no exponent, and 1 stands for it
    own_n, own_d, own_bpb, own_layers = np.array([(*run, 1)[:4] for run in measured]).T
    size, tokens = (
        float(np.exp(np.log(values).mean()))
        for values in ((n, d) if len(ladder) else (own_n, own_d))
    )

    def misses(p: np.ndarray) -> np.ndarray:
        floor, log_a, log_b, a, b, prose, deep = p

        def of_size(n: np.ndarray) -> np.ndarray:
            return np.exp(log_a) * (n / size) ** -a

        def of_tokens(d: np.ndarray) -> np.ndarray:
            return np.exp(log_b) * (d / tokens) ** -b

        predicted = floor + (of_size(n) + of_tokens(d))
        own_predicted = floor + of_size(own_n) * own_layers**-deep + of_tokens(own_d)
        return np.concatenate(
            [
                np.log(np.maximum(predicted, 1e-9) / bpb) / 0.003,
                (np.log(np.maximum(own_predicted, 1e-9) / own_bpb) + prose)
                / (0.01 if len(ladder) else 0.005),
                (np.array([a, b]) - EXPONENTS) / 0.1,
                [prose / 0.05, 1e3 * deep] if len(ladder) else [1e3 * prose, deep / 0.3],
                np.log(a * of_size(n) / (b * of_tokens(d))) / 0.1,
            ]
        )

    start = [0.6 * min([*bpb, *own_bpb]), -2.0, -2.0, *EXPONENTS, 0.0, 0.0]
    floor, log_a, log_b, a, b, prose, deep = map(float, least_squares(misses, start).x)
    if len(ladder):
        deep = 0.0
    else:
        prose = 0.0
    return Law(floor, math.exp(log_a), math.exp(log_b), a, b, size, tokens, prose, deep)


if __name__ == "__main__":
    for runs in ((LADDER, MEASURED), ((), LOOKING_BACK), ((), TINYWORLD)):
        print(fit(*runs))
