"""
Learning rate, momentum and context as pure functions of progress (0 at the start, 1 at the end), whatever progress is measured in.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanochat.common import UserError


@dataclass(frozen=True)
class Schedule:
    """Warm-up to the peak, plateau, linear decay to `final` of the peak; all as fractions of progress."""

    warmup: float = 0.0
    decay: float = 0.4
    final: float = 0.0
    momentum: tuple[float, float] = (0.85, 0.95)  # Muon's, warmed up over the first `momentum_warmup` steps
    momentum_warmup: int = 300
    since: tuple[float, float] | None = None  # (progress, factor): straight from there to the floor, instead of what stands above

    def lr_mult(self, progress: float) -> float:
        """The factor on every peak rate: 0 <= factor <= 1, and `final` at progress 1 (or the factor of `since`, if that is lower)."""
        p = min(max(progress, 0.0), 1.0)
        if self.since is not None:
            begin, factor = self.since
            floor = min(self.final, factor)
            return floor + (factor - floor) * (1 - max(p, begin)) / (1 - begin) if begin < 1 else floor
        up = min(1.0, (p + 1e-3) / self.warmup) if self.warmup > 0 else 1.0  # never exactly 0: the first step should teach something
        left = (1 - p) / self.decay if self.decay > 0 else 1.0
        down = 1.0 if left >= 1 else self.final + (1 - self.final) * left
        return min(up, down)

    def momentum_at(self, step: int) -> float:
        """Muon's momentum at an optimizer step counted from 0."""
        low, high = self.momentum
        return high if self.momentum_warmup <= 0 else low + (high - low) * min(step / self.momentum_warmup, 1.0)


@dataclass(frozen=True)
class Contexts:
    """Context stages: rows of T tokens from a share of progress on. Both rise from stage to stage, and the first begins at 0."""

    stages: tuple[tuple[float, int], ...]  # (share of progress, T)

    @classmethod
    def parse(cls, texts: Sequence[str], longest: int, fixed: bool = True) -> "Contexts":
        """
        The stages that texts such as "512@0" "1024@0.6" spell; without any, the one of `longest`, which the last must have if it is
        `fixed`. UserError for what makes no stages.
        """
        stages: list[tuple[float, int]] = []
        for text in " ".join(texts).split():
            if not (m := re.fullmatch(r"(\d+)@(\d*\.?\d+|\d+\.)", text)):
                raise UserError(f"the context stage {text!r} is not TOKENS@SHARE: write for example 512@0 1024@0.6 2048@0.9")
            T, begin = int(m[1]), float(m[2])
            if T < 1 or begin >= 1:
                raise UserError(f"the context stage {text} never trains: give at least 1 token, and a share of the run from 0 to below 1")
            if not stages and begin:
                raise UserError(f"nothing is said of the run before its context stage {text}: let the first one begin at 0, as in {T}@0")
            if stages and (begin <= stages[-1][0] or stages[-1][1] >= T):
                last = f"{stages[-1][1]}@{stages[-1][0]:g}"
                raise UserError(f"the context stage {text} comes after {last}: let tokens and shares rise from stage to stage")
            stages.append((begin, T))
        if stages and fixed and stages[-1][1] != longest:
            raise UserError(f"the last context stage has {stages[-1][1]} tokens, but sequence_len is {longest}: leave one of them out")
        return cls(tuple(stages) or ((0.0, longest),))

    @property
    def lengths(self) -> list[int]:
        return [T for _, T in self.stages]

    @property
    def longest(self) -> int:
        return self.stages[-1][1]

    def at(self, progress: float) -> int:
        """Tokens of a row at this progress."""
        return next((T for begin, T in reversed(self.stages) if progress >= begin), self.stages[0][1])

    def mean(self, of: Callable[[int], float]) -> float:
        """The mean of a function of T over the run: of tokens where progress counts tokens or steps, of time where it counts time."""
        ends = [begin for begin, _ in self.stages[1:]] + [1.0]
        return sum((end - begin) * of(T) for end, (begin, T) in zip(ends, self.stages, strict=True))
