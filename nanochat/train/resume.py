"""
How a run goes on from its checkpoint: what must have stayed as it was, and what becomes of the learning rate where its length changes.

It refuses another architecture, and another length without a word on how to decay; a rate that jumps all the same is printed.
"""

from collections.abc import Mapping
from typing import Any

from nanochat.base.common import UserError, duration, print0
from nanochat.model.checkpoint import Checkpoint
from nanochat.model.config import GPTConfig
from nanochat.train.loop import Run
from nanochat.train.schedule import Schedule

HORIZONS = (
    "num_iterations",
    "target_flops",
    "target_param_data_ratio",
    "max_minutes",
    "max_hours",
    "epochs",
    "total_batch_size",
    "questions_per_step",
    "context_stages",
)


def same_architecture(config: GPTConfig, stored: Checkpoint) -> None:
    """UserError when the flags ask for another model than the checkpoint to go on from holds, even one whose weights would fit."""
    for name, before in stored.meta["config"].items():
        if (now := getattr(config, name)) != before:
            raise UserError(
                f"{stored} has {name}={before}, not {now}: leave the flag out to go on, or start another run with --model_tag"
            )


def same_horizons(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UserError when the knobs now give the run another length, batch or context stages than those before."""
    a, b = _in_words(before), _in_words(now)
    for n in a:
        if a[n] != b[n]:
            raise UserError(
                f"this run was started with {n}={a[n]} and is asked to go on with {b[n]}: leave the flag out, or choose what becomes of "
                "the learning rate: --new_horizon=stretch lays the schedule over the new length, whatever jump that is; "
                "--new_horizon=redecay goes from the present rate to the floor over what is left"
            )


def _in_words(k: Mapping[str, Any]) -> dict[str, str]:
    """The horizons that these knobs have; a budget in minutes, in whatever unit it was given."""
    found = {n: k[n] for n in HORIZONS if n in k and n != "max_hours"} | {
        "max_minutes": k["max_minutes"] or k["max_hours"] * 60
    }
    return {
        n: f"{v:.10g}" if isinstance(v, int | float) else " ".join(v) or "none"
        for n, v in found.items()
    }


def schedule_of(k: Mapping[str, Any], plan: Mapping[str, Any]) -> Schedule:
    """The schedule of a run with these knobs and this plan, in which an earlier redecay left where it began."""
    since = plan.get("since")
    return Schedule(
        k["warmup_ratio"],
        k["warmdown_ratio"],
        k["final_lr_frac"],
        since=(since[0], since[1]) if since else None,
    )


def going_on(k: Mapping[str, Any], stored: Checkpoint, run: Run, progress: float) -> Schedule:
    """
    The schedule from a checkpoint on, the run standing at `progress` of its present horizon: as it was, or under a new horizon as
    k["new_horizon"] says, which is noted in the run's plan. A rate that jumps is printed with both values. UserError when there is
    nothing left to train, or no rate to fall from.
    """
    meta = stored.meta
    before = schedule_of(meta["knobs"], meta["horizon"]).lr_mult(meta.get("progress", progress))
    if k["new_horizon"] and progress >= 1:
        raise UserError(
            f"{stored} is at or past the new end already, with {run.step:,} steps in {duration(run.seconds)}: ask for more"
        )
    if k["new_horizon"] == "redecay":
        if before <= k["final_lr_frac"]:
            raise UserError(
                f"the learning rate of {stored} is at its floor (x{before:.3g}), from which redecay cannot fall: say --new_horizon=stretch, "
                "or give a lower --final_lr_frac"
            )
        run.meta["horizon"]["since"] = (progress, before)
    schedule = schedule_of(k, run.meta["horizon"])
    after = schedule.lr_mult(progress)
    if k["new_horizon"] or abs(after - before) > 0.01:
        print0(
            f"  learning rate x{before:.3f} at step {run.step:,}, x{after:.3f} from here on ({progress:.1%} of the run is over)"
        )
    return schedule
