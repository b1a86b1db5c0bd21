"""
Context stages: the tokens per row as a pure function of progress (0 at the start of a run, 1 at its
end).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        stages: list[tuple[float, int]] = []
        for text in " ".join(texts).split():
            if not (m := re.fullmatch(r"(\d+)@(\d*\.?\d+|\d+\.)", text)):
                raise UserError(
                    f"the context stage {text!r} is not TOKENS@SHARE: write for example 512@0 "
                    "1024@0.6 2048@0.9"
                )
            T, begin = int(m[1]), float(m[2])
            if T < 1 or begin >= 1:
                raise UserError(
                    f"the context stage {text} never trains: give at least 1 token, and a share of "
                    "the run from 0 to below 1"
                )
            if not stages and begin:
                raise UserError(
                    f"no context is given for the run before {text}: let the first stage begin at "
                    f"0, as in {T}@0"
                )
            if stages and (begin <= stages[-1][0] or stages[-1][1] >= T):
                raise UserError(
                    f"the context stage {text} follows {stages[-1][1]}@{stages[-1][0]:g}: let "
                    "tokens and shares rise from stage to stage"
                )
            stages.append((begin, T))
        if stages and fixed and stages[-1][1] != longest:
            raise UserError(
                f"the last context stage has {stages[-1][1]} tokens, but --sequence_len is "
                f"{longest}: leave one of them out"
            )
        return cls(tuple(stages) or ((0.0, longest),))

    @property
    def lengths(self) -> list[int]:
        return [T for _, T in self.stages]

    @property
    def longest(self) -> int:
        return self.stages[-1][1]

    def at(self, progress: float) -> int:
        """Tokens per row at this progress."""
        begun = [T for begin, T in self.stages if progress >= begin]
        return begun[-1] if begun else self.stages[0][1]

    def mean(self, of: Callable[[int], float]) -> float:
        """The mean over the run of a function of T, weighted by the progress of each stage."""
        ends = [begin for begin, _ in self.stages[1:]] + [1.0]
        return sum((end - begin) * of(T) for end, (begin, T) in zip(ends, self.stages, strict=True))
