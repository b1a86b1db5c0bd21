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
        The stages written as texts such as "512@0" "1024@0.6"; without texts, one stage of
        `longest` tokens. If `fixed`, the last stage must have `longest` tokens. Raises UserError
        for invalid stages.
        """
        words = " ".join(texts).split()
        matches = [re.fullmatch(r"(\d+)@(\d*\.?\d+|\d+\.)", word) for word in words]
        stages = [(float(m[2]), int(m[1])) for m in matches if m] or [(0.0, longest)]
        first_share, shortest = stages[0]
        last_share, last_length = stages[-1]
        rising = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(stages))
        if not (all(matches) and rising and first_share == 0 and last_share < 1 and shortest > 0):
            raise UserError(
                f"the context stages {' '.join(words)} are invalid: write TOKENS@SHARE for "
                "each, with rising tokens and shares, the first share 0 and the last below 1, "
                "as in 512@0 1024@0.6 2048@0.9"
            )
        if fixed and last_length != longest:
            raise UserError(
                f"the last context stage has {last_length} tokens, but --sequence_len is "
                f"{longest}: make them equal, or leave one flag out"
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

    def mean(self, value: Callable[[int], float]) -> float:
        """The mean over the run of value(T), each stage weighted by its share of the progress."""
        ends = [begin for begin, _ in self.stages[1:]] + [1.0]
        stages = zip(self.stages, ends, strict=True)
        return sum((end - begin) * value(T) for (begin, T), end in stages)
