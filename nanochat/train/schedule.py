"""
Learning rate and momentum as pure functions of progress (0 at the start, 1 at the end), whatever progress is measured in.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up to the peak, plateau, linear decay to `final` of the peak; all as fractions of progress."""

    warmup: float = 0.0
    decay: float = 0.4
    final: float = 0.0
    momentum: tuple[float, float] = (
        0.85,
        0.95,
    )  # Muon's, warmed up over the first `momentum_warmup` steps
    momentum_warmup: int = 300
    since: tuple[float, float] | None = (
        None  # (progress, factor): straight from there to the floor, instead of what stands above
    )

    def lr_mult(self, progress: float) -> float:
        """The factor on every peak rate: 0 <= factor <= 1, and `final` at progress 1 (or the factor of `since`, if that is lower)."""
        p = min(max(progress, 0.0), 1.0)
        if self.since is not None:
            begin, factor = self.since
            floor = min(self.final, factor)
            return (
                floor + (factor - floor) * (1 - max(p, begin)) / (1 - begin) if begin < 1 else floor
            )
        up = (
            min(1.0, (p + 1e-3) / self.warmup) if self.warmup > 0 else 1.0
        )  # never exactly 0: the first step should teach something
        left = (1 - p) / self.decay if self.decay > 0 else 1.0
        down = 1.0 if left >= 1 else self.final + (1 - self.final) * left
        return min(up, down)

    def momentum_at(self, step: int) -> float:
        """Muon's momentum at an optimizer step counted from 0."""
        low, high = self.momentum
        return (
            high
            if self.momentum_warmup <= 0
            else low + (high - low) * min(step / self.momentum_warmup, 1.0)
        )
