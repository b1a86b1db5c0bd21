"""
Extrapolate the ends of short runs to a long one, with an interval: L(D) = F + S D^-p, where F and p
are taken from the scaling law with as much doubt as it deserves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.base.common import UserError, human

NOISE = (
    0.005  # relative standard deviation of a run's end, by seed and validation text: a judgement
)
# Standard deviations of what the law says: of the floor (logit of its share) and of the exponent
# (logarithm).
DOUBT = (0.8, 0.35)
DRAWS = 8000


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

    def at(self, d: float) -> float:
        """Bits per byte after d tokens."""
        return self.level * (self.share + (1 - self.share) * (d / self.tokens) ** -self.power)


def fit_curve(
    tokens: Sequence[float],
    bpb: Sequence[float],
    target: float,
    share: float,
    power: float,
    seed: int = 0,
) -> Curve:
    """
    Fit the decayed ends (tokens, bits per byte) of runs and extrapolate to `target` tokens. `share`
    and `power` are what the law expects at the longest run. The curve is that of least squares;
    value and interval come from DRAWS curves around the law, resampled by how well they meet the
    ends (to NOISE, or to the residuals if these are larger), each with the noise of the predicted
    run. UserError for ends that do not fall.
    """
    from scipy.optimize import least_squares

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
        """Of (logarithm of the level, *shape), from the ends and the law."""
        return np.concatenate([(p[0] + _fall(p[1:], x) - y) / NOISE, (p[1:] - expected) / DOUBT])

    level, *shape = least_squares(misses, [y[d.argmax()], *expected]).x
    residuals = level + _fall(np.array(shape), x) - y
    noise = max(NOISE, float(np.sqrt(np.sum(residuals**2) / max(1, len(d) - 1))))
    logs = _resampled(x, y, expected, noise, math.log(target / d.max()), seed)
    lo, middle, hi = np.exp(np.quantile(logs, [0.05, 0.5, 0.95])).tolist()
    floor = float(1 / (1 + np.exp(-shape[0])))
    return Curve(math.exp(level), floor, math.exp(shape[1]), float(d.max()), middle, lo, hi)


def _fall(shape: np.ndarray, x: np.ndarray | float) -> np.ndarray:
    """
    Logarithm of the loss over that of the longest run, x = ln(tokens / tokens of the longest).
    shape (..., 2): logit of the floor's share, logarithm of the exponent.
    """
    share = 1 / (1 + np.exp(-shape[..., :1]))
    return np.log(share + (1 - share) * np.exp(-np.exp(shape[..., 1:]) * x))


def _resampled(
    x: np.ndarray, y: np.ndarray, expected: np.ndarray, noise: float, target: float, seed: int
) -> np.ndarray:
    """Logarithms of the loss at `target`, as DRAWS curves that meet the ends have it."""
    rng = np.random.default_rng(seed)
    shapes = expected + np.array(DOUBT) * rng.standard_normal((DRAWS, 2))
    levels = y - _fall(shapes, x)  # what each end says of the level
    level = levels.mean(-1)
    log_odds = -0.5 * np.sum((levels - level[:, None]) ** 2, -1) / noise**2
    odds = np.exp(log_odds - log_odds.max())
    taken = rng.choice(DRAWS, DRAWS, p=odds / odds.sum())
    of_level = rng.standard_normal(DRAWS) / math.sqrt(len(x))
    of_run = rng.standard_normal(DRAWS)
    return level[taken] + _fall(shapes[taken], target)[:, 0] + noise * (of_level + of_run)
