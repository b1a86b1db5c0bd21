"""
What a run measures while it trains: when each evaluation falls due, and how much it reads.

Where the time of an evaluation is limited, a small part of it is measured first; its speed decides
how much the whole evaluation reads, and a machine that becomes slower makes the next one smaller.
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
    least: int  # units, read even if they take longer; `now` is a multiple of it
    most: int  # units
    now: int = 0  # units that the next evaluation reads

    def __post_init__(self):
        self.most = max(self.most, self.least)
        self.now = self.now or self.least

    def affordable(self, seconds_per_unit: float) -> int:
        """Units that fit into the seconds at this speed, within `least` and `most`."""
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
    Something to measure while training: measure() -> numbers for the logbook under `name`.

    every >= 1: steps; below 1: that share of the run; 0: only at the end. `start` also measures
    before the first step; with a time budget every evaluation does, so that its cost is known.
    With a `size`, measure() reads size.now units. A number called val_bpb decides which checkpoint
    is best.
    """

    name: str
    every: float
    measure: Callable[[], dict[str, Any]]
    start: bool = False
    size: Size | None = None


def due(every: float, step: int, before: float, after: float) -> bool:
    """Whether `every` (steps from 1 up, else a share of progress) falls due at this step."""
    if every <= 0:
        return False
    if every >= 1:
        return step % int(every) == 0
    return int(after / every + 1e-9) > int(before / every + 1e-9)
