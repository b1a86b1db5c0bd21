"""
What a run measures while it trains: when each evaluation is due, and how much it reads.

If an evaluation has a limit of time, a small part of it is measured first. The speed of that part
decides how much the whole evaluation reads; if the machine becomes slower, later evaluations read
less.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STABLE = 1.25  # an evaluation keeps its size unless it takes this many times its seconds


@dataclass
class Size:
    """
    How much an evaluation reads, counted in units of its own (tokens of each source, questions,
    tokens of a sample), such that it takes at most about `seconds`.
    """

    seconds: float  # that one evaluation may take
    least: int  # units that are read even if they take longer
    most: int  # units
    now: int = 0  # units that the next evaluation reads: `most`, or a multiple of `least`

    def __post_init__(self):
        self.most = max(self.most, self.least)
        self.now = self.now or self.least

    def affordable(self, seconds_per_unit: float) -> int:
        """How many units fit into `seconds` at this speed, from `least` to `most`."""
        if seconds_per_unit * self.most <= self.seconds:
            return self.most
        units = int(self.seconds / seconds_per_unit)
        return max(self.least, units // self.least * self.least)

    def adapt(self, seconds_per_unit: float) -> None:
        """Read less from now on if the last evaluation was much slower than `seconds` allows."""
        if self.now * seconds_per_unit > STABLE * self.seconds:
            self.now = min(self.now, self.affordable(seconds_per_unit))


@dataclass
class Evaluation:
    """
    Something to measure while training: measure() returns numbers, which are logged under `name`.

    every: the interval between evaluations, in steps (1 and above) or as a share of the run (below
    1); 0 = only at the end. start: also measure before the first step; with a time budget, that is
    done for every evaluation, to know what it costs. size: measure() reads size.now units. A number
    called val_bpb decides which checkpoint is the best.
    """

    name: str
    every: float
    measure: Callable[[], dict[str, Any]]
    start: bool = False
    size: Size | None = None


def due(every: float, step: int, before: float, after: float) -> bool:
    """
    Whether something with the interval `every` (see Evaluation) is due after this step, during
    which progress has gone from `before` to `after`.
    """
    if every <= 0:
        return False
    if every >= 1:
        return step % int(every) == 0
    return int(after / every + 1e-9) > int(before / every + 1e-9)
