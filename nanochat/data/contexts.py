"""
Context stages: the tokens per row as a pure function of progress (0 at the start of a run, 1 at its
end).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nanochat.base.common import UserError


@dataclass(frozen=True)
class Contexts:
    """
    Stages of (share of progress from which it applies, tokens per row T). Both rise from stage to
    stage, and the first stage begins at 0.
    """

    stages: tuple[tuple[float, int], ...]

    @classmethod
    def parse(cls, texts: Sequence[str], longest: int, fixed: bool = True) -> "Contexts":
        """
        The stages that texts such as "512@0" "1024@0.6" spell; without any, one stage of `longest`
        tokens. If `fixed`, the last stage must have `longest` tokens. Raises UserError for anything
        that is not a list of stages.
        """
        words = " ".join(texts).split()
        matches = [re.fullmatch(r"(\d+)@(\d*\.?\d+|\d+\.)", word) for word in words]
        stages = [(float(m[2]), int(m[1])) for m in matches if m] or [(0.0, longest)]
        (first, shortest), (last, end) = stages[0], stages[-1]
        rising = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(stages))
        if not (all(matches) and rising and first == 0 and last < 1 and shortest > 0):
            raise UserError(
                f"the context stages {' '.join(words)} are invalid: write TOKENS@SHARE for "
                "each, with rising tokens and shares, the first share 0 and the last below 1, "
                "as in 512@0 1024@0.6 2048@0.9"
            )
        if fixed and end != longest:
            raise UserError(
                f"the last context stage has {end} tokens, but --sequence_len is {longest}: "
                "make them equal, or leave one flag out"
            )
        return cls(tuple(stages))

    @property
    def lengths(self) -> list[int]:
        return [T for _, T in self.stages]

    @property
    def longest(self) -> int:
        return self.stages[-1][1]

    def at(self, progress: float) -> int:
        """Tokens per row at this progress."""
        return [T for begin, T in self.stages if progress >= begin][-1]

    def mean(self, of: Callable[[int], float]) -> float:
        """The mean over the run of a function of T, weighted by the progress of each stage."""
        ends = [begin for begin, _ in self.stages[1:]] + [1.0]
        return sum((end - begin) * of(T) for end, (begin, T) in zip(ends, self.stages, strict=True))
