"""
How a run resumes from a checkpoint: what must stay the same, and how the learning rate continues.

The architecture must. The length may change if --new_horizon says how the learning rate continues;
if the rate changes abruptly, a line is printed.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nanochat.base.common import UserError, duration, print0
from nanochat.model.checkpoint import Checkpoint
from nanochat.model.config import GPTConfig
from nanochat.train.loop import Run
from nanochat.train.schedule import Schedule

HORIZONS = (  # knobs that set the length of a run and the size of its steps
    "num_iterations",
    "target_flops",
    "target_param_data_ratio",
    "max_passes",
    "max_minutes",
    "max_hours",
    "epochs",
    "total_batch_size",
    "conversations_per_step",
    "questions_per_step",
    "samples",
    "context_stages",
)


def same_architecture(config: GPTConfig, checkpoint: Checkpoint) -> None:
    """UserError if the flags describe another model than the stored one, even if weights fit."""
    before = checkpoint.config
    for f in fields(before):
        name, stored, value = f.name, getattr(before, f.name), getattr(config, f.name)
        if value != stored:
            raise UserError(
                f"{checkpoint} has {name}={stored}, not {value}: leave the flag out to continue, "
                "or start another run with --model_tag"
            )


def same_horizons(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """UserError if the knobs of HORIZONS differ between the stored knobs and those asked for."""
    before, now = _horizon_texts(stored), _horizon_texts(asked)
    for name in before:
        by_rule = name == "total_batch_size" and not asked[name]  # the rule keeps the stored batch
        if before[name] != now[name] and not by_rule:
            raise UserError(
                f"this run was started with {name}={before[name]}, not {now[name]}: leave the "
                "flag out; or, to resume with a different length, choose how the learning rate "
                "continues: --new_horizon=stretch fits the schedule to the new length, even if "
                "the rate jumps; --new_horizon=redecay lowers the current rate to the floor"
            )


def _horizon_texts(knobs: Mapping[str, Any]) -> dict[str, str]:
    """The knobs of HORIZONS as text; a time budget is in minutes even if it was given in hours."""
    horizons = {name: knobs[name] for name in HORIZONS if name in knobs and name != "max_hours"}
    horizons["max_minutes"] = knobs["max_minutes"] or knobs["max_hours"] * 60
    return {
        name: f"{value:.10g}" if isinstance(value, int | float) else " ".join(value) or "none"
        for name, value in horizons.items()
    }


def _schedule(knobs: Mapping[str, Any], horizon: Mapping[str, Any]) -> Schedule:
    return Schedule(
        knobs["warmup_ratio"],
        knobs["warmdown_ratio"],
        knobs["final_lr_frac"],
        since=horizon.get("since") or None,
    )


def schedule_from(checkpoint: Checkpoint | None, run: Run) -> Schedule:
    """
    The schedule of a run, which is new or restored from a checkpoint. Stores in its horizon where a
    redecay begins. UserError with --new_horizon if there is nothing left to train, or if redecay
    has no rate to lower.
    """
    knobs, horizon = run.meta["knobs"], run.meta["horizon"]
    if checkpoint is None:
        return _schedule(knobs, horizon)
    meta, progress = checkpoint.meta, run.progress
    old_schedule = _schedule(meta["knobs"], meta["horizon"])
    before = old_schedule.lr_mult(meta.get("progress", progress))
    if knobs["new_horizon"] and progress >= 1:
        raise UserError(
            f"{checkpoint} is already at or past the new end ({run.step:,} steps in "
            f"{duration(run.seconds)}): choose a longer run"
        )
    if knobs["new_horizon"] == "redecay":
        if before <= knobs["final_lr_frac"]:
            raise UserError(
                f"the learning rate of {checkpoint} is at its floor (x{before:.3g}), so redecay "
                "cannot lower it: use --new_horizon=stretch, or a lower --final_lr_frac"
            )
        horizon["since"] = (progress, before)
    schedule = _schedule(knobs, horizon)
    after = schedule.lr_mult(progress)
    if knobs["new_horizon"] or abs(after - before) > 0.01:
        print0(
            f"  learning rate x{before:.3f} at step {run.step:,}, x{after:.3f} from here on "
            f"({progress:.1%} of the run is done)"
        )
    return schedule
