"""
Extrapolate the ends of short runs to a long one, with an interval: L(D) = F + S D^-p, where F and p
are taken from the scaling law with as much doubt as it deserves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.base.common import UserError, human
from nanochat.plan.law import Z90

# Relative standard deviation of a run's end, by seed and validation text: a judgement.
NOISE = 0.005
# Standard deviations of what the law says: of the floor (logit of its share) and of the exponent
# (logarithm).
DOUBT = (0.8, 0.35)


@dataclass(frozen=True)
class Curve:
    """
    L(D) = level (share + (1 - share) (D / tokens)^-power), and its value at a target with a 90 %
    interval. `share` is the part of the level that more tokens do not remove.
    """

    level: float
    share: float
    power: float
    tokens: float
    bpb: float
    lo: float
    hi: float


def fit_curve(
    tokens: Sequence[float], bpb: Sequence[float], target: float, share: float, power: float
) -> Curve:
    """
    Fit the decayed ends (tokens, bits per byte) of runs and extrapolate to `target` tokens. `share`
    and `power` are what the law expects at the longest run. The curve is that of least squares; its
    interval follows from the covariance of its parameters and the noise of the predicted run
    (NOISE, or the residuals if these are larger). UserError for ends that do not fall.
    """
    from scipy.optimize import approx_fprime, least_squares

    d, y = np.array(tokens, dtype=float), np.log(np.array(bpb, dtype=float))
    if len(d) < 2 or not np.isfinite(y).all() or y[d.argmax()] >= y[d.argmin()]:
        ends = ", ".join(f"{human(t)} tokens {b:.4f}" for t, b in zip(tokens, bpb, strict=True))
        raise UserError(
            f"the pilot's longer runs are not better ({ends}): give it more --minutes, or lower "
            "the learning rates"
        )
    x = np.log(d / d.max())
    expected = np.array([math.log(share / (1 - share)), math.log(power)])

    def misses(p: np.ndarray) -> np.ndarray:
        return np.concatenate([(_log_loss(p, x) - y) / NOISE, (p[1:] - expected) / DOUBT])

    fit = least_squares(misses, [y[d.argmax()], *expected])
    residuals = _log_loss(fit.x, x) - y
    noise = max(NOISE, math.sqrt(np.sum(residuals**2) / (len(d) - 1)))
    fit.jac[: len(d)] *= NOISE / noise
    covariance = np.linalg.inv(fit.jac.T @ fit.jac)
    distance = math.log(target / d.max())
    slope = approx_fprime(fit.x, _log_loss, 1e-6, distance)
    error = math.exp(Z90 * math.sqrt(slope @ covariance @ slope + noise**2))
    middle = math.exp(_log_loss(fit.x, distance))
    level, odds, power = np.exp(fit.x).tolist()
    longest = float(d.max())
    return Curve(level, odds / (1 + odds), power, longest, middle, middle / error, middle * error)


def _log_loss(p: np.ndarray, x: np.ndarray | float) -> np.ndarray:
    """
    Logarithm of the loss at x = ln(tokens / tokens of the longest run), for p: logarithm of its
    level, logit of the floor's share, logarithm of the exponent.
    """
    share = 1 / (1 + np.exp(-p[1]))
    return p[0] + np.log(share + (1 - share) * np.exp(-np.exp(p[2]) * x))
