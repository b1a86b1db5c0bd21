"""The horizon of a run: rows per step, and the steps, epochs or time after which it ends."""

import math
from dataclasses import dataclass

from nanochat.base.common import UserError, duration, human, notice, print0
from nanochat.train.run import OpenRun
from nanochat.train.scaling import USEFUL_PASSES, batch_for, context_for, whole_rows

CHARACTERS_PER_TOKEN = 4.0  # about
LENGTHS = "num_iterations", "target_flops", "target_param_data_ratio"  # knobs that give the steps


@dataclass(frozen=True)
class Horizon:
    """Rows per step, and what ends the run: steps, epochs or (without both) a time budget."""

    rows: int  # at the longest context
    steps: int | None = None
    epochs: int | None = None

    def tokens(self, context: int, epoch_tokens: int) -> int:
        """Tokens of the run, in rows of `context` tokens; 0 if only a time budget ends it."""
        return (self.steps or 0) * self.rows * context + (self.epochs or 0) * epoch_tokens


def choose_horizon(run: OpenRun, characters: float = math.inf) -> Horizon:
    """
    The horizon of a pretraining run, from its knobs for the length and total_batch_size, which a
    rule sets if it is 0. That rule also considers how many characters of text there are; limit the
    length with `within_passes` afterwards. UserError if two lengths are given, or none, or one that
    is too short for a single step.
    """
    if (rows := run.stored("rows")) is not None:
        return Horizon(rows, run.stored("steps"))
    contexts, budget = run.contexts, run.budget_seconds
    flops_per_token = contexts.mean(run.model.flops_per_token)
    length = _given_length(run)
    tokens = _expected_tokens(run, length, flops_per_token)
    most_tokens = most_passes(run) * characters / CHARACTERS_PER_TOKEN
    batch = run.knobs.total_batch_size or _batch_by_rule(run, min(tokens, most_tokens))
    rows = whole_rows(batch, *contexts.lengths)
    steps = None
    if length == "num_iterations":
        steps = run.knobs.num_iterations
    elif length:
        steps = round(tokens / batch)
        if not steps:
            value = getattr(run.knobs, length)
            raise UserError(
                f"--{length}={value:g} comes to {tokens:,.0f} tokens, less than one step of "
                f"{batch:,} tokens: give {value * batch / tokens:.2g} or more, or a smaller "
                "--total_batch_size"
            )
    fastest = batch * flops_per_token / run.peak_flops
    if 0 < budget < fastest:
        raise UserError(
            f"a budget of {budget:.3g} s is too short for one step: {batch:,} tokens take at "
            f"least {fastest:.3g} s here; give more time, a smaller --total_batch_size or a "
            "smaller --depth"
        )
    if not run.knobs.total_batch_size:
        run.resolve(total_batch_size=batch)
    shapes = ", ".join(
        f"{batch // T} rows of {T}" + (f" from {begin:.0%}" if begin else "")
        for begin, T in contexts.stages
    )
    end = f"{steps:,} steps, {human(steps * batch)} tokens" if steps else duration(budget)
    print0(f"  {batch:,} tokens per step ({shapes}); {end}")
    return Horizon(rows, steps)


def most_passes(run: OpenRun) -> float:
    """
    How often a run may read its text: --max_passes, else USEFUL_PASSES, or infinity if the length
    is given by one of LENGTHS.
    """
    by_rule = all(run.origins[name] == "default" for name in LENGTHS)
    return run.knobs.max_passes or (USEFUL_PASSES if by_rule else math.inf)


def within_passes(run: OpenRun, horizon: Horizon, steps_per_pass: float) -> Horizon:
    """
    The horizon, shortened to most_passes if a pass over all sources takes `steps_per_pass`. A
    resumed run keeps its horizon.
    """
    most = most_passes(run) * steps_per_pass
    if run.stored("rows") is not None or most == math.inf:
        return horizon
    steps = max(1, int(most))
    if horizon.steps and horizon.steps <= steps:
        return horizon
    print0(
        f"  at most {steps:,} steps: {most_passes(run):g} passes over the text, beyond which it "
        "would only be memorised (--max_passes=N allows more)"
    )
    return Horizon(horizon.rows, steps)


def _given_length(run: OpenRun) -> str:
    """The knob of LENGTHS that sets the steps; "" if only a time budget ends the run."""
    values = {name: getattr(run.knobs, name) for name in LENGTHS}
    for name, value in values.items():
        if not 0 < value < math.inf and value != -1:
            raise UserError(f"--{name} must be positive, or -1 for none (got {value:g})")
    given = [name for name in LENGTHS if values[name] > 0 and run.origins[name] != "default"]
    if len(given) > 1:
        flags = " and ".join(f"--{name}={values[name]:g}" for name in given)
        raise UserError(f"{flags} set two lengths for one run: keep one, and set the other to -1")
    if given or run.budget_seconds:
        return given[0] if given else ""
    if values["target_param_data_ratio"] > 0:
        return "target_param_data_ratio"
    raise UserError(
        "no length is given: give --num_iterations, --target_param_data_ratio, --target_flops or "
        "--max_minutes"
    )


def _expected_tokens(run: OpenRun, length: str, flops_per_token: float) -> float:
    """Tokens that the run will train on; 0 if the number of steps is given."""
    if length == "num_iterations":
        return 0.0
    if length == "target_flops":
        return run.knobs.target_flops / flops_per_token
    if length == "target_param_data_ratio":
        return run.knobs.target_param_data_ratio * run.model.counts()["total"]
    flops = 0.3 * run.peak_flops * run.budget_seconds  # only for the batch: the clock ends the run
    if run.origins["sequence_len"] == "default" and context_for(flops) < run.contexts.longest:
        notice(
            f"a context of {run.contexts.longest} is long for this budget: with "
            f"--sequence_len={context_for(flops)} the run would train on more tokens"
        )
    return flops / flops_per_token


def _batch_by_rule(run: OpenRun, tokens: float) -> int:
    """
    Tokens per step for a run of `tokens` (0 = not known): a whole number of rows at every context.
    A resumed run keeps its batch.
    """
    if run.resume_from:
        return run.resume_from.meta["horizon"]["rows"] * run.contexts.longest
    unit = math.lcm(*run.contexts.lengths)
    batch = batch_for(tokens) if tokens else 1 << 19
    return max(1, batch // unit) * unit


def conversation_horizon(run: OpenRun, rows: int) -> Horizon:
    """The horizon of a later stage: --num_iterations, else the time budget, else --epochs."""
    knobs, budget = run.knobs, run.budget_seconds
    if knobs.num_iterations < 1 and knobs.num_iterations != -1:
        raise UserError(
            f"--num_iterations must be positive, or -1 for none (got {knobs.num_iterations})"
        )
    given = {
        f"--epochs={knobs.epochs}": knobs.epochs > 1,
        f"--num_iterations={knobs.num_iterations}": knobs.num_iterations > 0,
        "a time budget": budget > 0,
    }
    lengths = [length for length, is_given in given.items() if is_given]
    if len(lengths) > 1:
        raise UserError(
            f"{lengths[0]} and {lengths[1]} set two lengths for one run: give only one of them"
        )
    if knobs.num_iterations > 0:
        return Horizon(rows, steps=knobs.num_iterations)
    return Horizon(rows, epochs=None if budget else knobs.epochs)
