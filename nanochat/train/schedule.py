"""Learning rate and momentum as pure functions of progress: 0 at the start, 1 at the end."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up to the peak, a plateau, and a linear decay to a floor."""

    warmup: float = 0.0  # share of the run
    decay: float = 0.4  # share of the run
    final: float = 0.0  # the floor, as a share of the peak
    momentum: tuple[float, float] = 0.85, 0.95  # of Muon, rising over `momentum_warmup` steps
    momentum_warmup: int = 300
    # (progress, factor) of a redecay: the factor falls from there linearly to the floor
    since: tuple[float, float] | None = None

    def lr_mult(self, progress: float) -> float:
        """
        The factor on every peak rate, from 0 to 1; at progress 1 it is `final`, or the factor of
        `since` if that is lower.
        """
        p = min(max(progress, 0.0), 1.0)
        if self.since is not None:
            begin, factor = self.since
            floor = min(self.final, factor)
            if begin >= 1:
                return floor
            return floor + (factor - floor) * (1 - max(p, begin)) / (1 - begin)
        up = 1.0
        if self.warmup > 0:  # never exactly 0: the first step would change nothing
            up = min(1.0, (p + 1e-3) / self.warmup)
        remaining = (1 - p) / self.decay if self.decay > 0 else 1.0
        down = 1.0 if remaining >= 1 else self.final + (1 - self.final) * remaining
        return min(up, down)

    def momentum_at(self, step: int) -> float:
        """Muon's momentum at an optimizer step, counted from 0."""
        low, high = self.momentum
        if self.momentum_warmup <= 0:
            return high
        return low + (high - low) * min(step / self.momentum_warmup, 1.0)
