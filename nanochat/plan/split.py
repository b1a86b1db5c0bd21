"""
Divide a time budget between the stages of training, printed as assignments for a shell.

    nanochat plan split --minutes 12 --seconds_used 90      prints base=2.47, mid=4.57, ...: minutes
"""

from dataclasses import dataclass
from typing import Any

from nanochat.base.common import UserError, print0
from nanochat.base.knobs import knob
from nanochat.train.scaling import split_budget

SHARES = {"base": 0.27, "mid": 0.5, "sft": 0.11, "rl": 0.12}  # of the quickstart (dev/LOG.md)
USABLE = 0.97  # of the budget
OVERHEAD_SECONDS = 60  # starting programs, evaluations and the summary
LEAST_SECONDS = 60


@dataclass(kw_only=True)
class SplitKnobs:
    """Budget"""

    minutes: float = knob(0.0, "time for the whole run", low=0)
    seconds_used: float = knob(0.0, "seconds already used", low=0)
    json: bool = knob(False, "print only JSON")


def run(knobs: SplitKnobs) -> dict[str, Any]:
    """Print the minutes of each stage and return them."""
    if not knobs.minutes:
        raise UserError("plan split needs a budget: add --minutes N")
    remaining = USABLE * 60 * knobs.minutes - knobs.seconds_used - OVERHEAD_SECONDS
    seconds = split_budget(max(LEAST_SECONDS, remaining), SHARES)
    minutes = {stage: round(s / 60, 2) for stage, s in seconds.items()}
    for stage, amount in minutes.items():
        print0(f"{stage}={amount:.2f}")
    return minutes
