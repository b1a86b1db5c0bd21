"""
How a run resumes from a checkpoint: what must not change, and how the learning rate continues.

It refuses a different architecture, and a different length unless told how the rate continues. A
rate that jumps is printed.
"""

from collections.abc import Mapping
from dataclasses import fields
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
    """UserError if the flags ask for another model than the stored one, even if its weights fit."""
    before = checkpoint.config
    for f in fields(before):
        name, stored, value = f.name, getattr(before, f.name), getattr(config, f.name)
        if value != stored:
            raise UserError(
                f"{checkpoint} has {name}={stored}, not {value}: leave the flag out to continue, "
                "or start another run with --model_tag"
            )


def same_horizons(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """UserError if the knobs ask for another length, batch or context stages than those stored."""
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
    """The horizons among these knobs as text; a time budget is in minutes, however it was given."""
    horizons = {name: knobs[name] for name in HORIZONS if name in knobs and name != "max_hours"}
    horizons["max_minutes"] = knobs["max_minutes"] or knobs["max_hours"] * 60
    return {
        name: f"{value:.10g}" if isinstance(value, int | float) else " ".join(value) or "none"
        for name, value in horizons.items()
    }


def _schedule(knobs: Mapping[str, Any], horizon: Mapping[str, Any]) -> Schedule:
    since = horizon.get("since")
    return Schedule(
        knobs["warmup_ratio"],
        knobs["warmdown_ratio"],
        knobs["final_lr_frac"],
        since=tuple(since) if since else None,
    )


def schedule_from(checkpoint: Checkpoint | None, run: Run) -> Schedule:
    """
    The schedule of a run, new or restored from a checkpoint; a redecay is noted in its horizon.
    Prints a rate that jumps. UserError if nothing is left to train, or no rate to fall from.
    """
    knobs, horizon = run.meta["knobs"], run.meta["horizon"]
    if checkpoint is None:
        return _schedule(knobs, horizon)
    meta, progress = checkpoint.meta, run.progress
    stored = _schedule(meta["knobs"], meta["horizon"])
    before = stored.lr_mult(meta.get("progress", progress))
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
