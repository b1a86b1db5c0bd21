"""
Try a recipe for a short time, and correct it and its prediction with what was measured.

    nanochat plan pilot                    the recipe in the base folder, for a twelfth of its time
    nanochat plan pilot recipe.toml --minutes 5 --target_bpb 0.9

While the learning rate is high, a loss lies above what the same tokens give once the rate has
fallen, so a curve that is cut short says too little. A pilot is therefore a short run with the
recipe's whole schedule over its own length. Its speed and memory correct the machine, and its end
moves the scaling law, whose shape says the rest, up or down for this text. Without --minutes a
pilot takes an hour at most. A run that can say nothing, because it is too short, is refused with
exit status 3: the recipe stays as it is.
"""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.base import logbook
from nanochat.base.commands import module_process
from nanochat.base.common import UserError, columns, duration, human, print0
from nanochat.base.files import write_json
from nanochat.base.knobs import knob, stored_values
from nanochat.base.strangers import read_json, read_toml
from nanochat.model.stages import run_directory
from nanochat.plan import day, machine, memory, recipe
from nanochat.plan.choice import OPENING
from nanochat.plan.law import worth
from nanochat.plan.machine import GIB
from nanochat.plan.speed import first_step
from nanochat.train.scaling import EVALUATING, LONGEST_PILOT, PILOT

FEWEST_STEPS = 64
ENDS = [signal.SIGTERM, *filter(None, [getattr(signal, "SIGHUP", None)])]
SIZE = ("depth", "model_dim", "head_dim", "total_batch_size", "device_batch_size")


@dataclass(kw_only=True)
class PilotKnobs:
    """Pilot"""

    plan: str = knob(
        "",
        "recipe to try, with its plan (.json) in the same folder (default: "
        "plan/recipe.toml in the base folder)",
        positional=True,
    )
    minutes: float = knob(
        0.0,
        "time for the short run (0 = a twelfth of the pretraining time, at most an hour)",
        low=0,
    )
    target_bpb: float = knob(
        0.0, "target bits per byte; the pilot predicts whether the budget reaches it", low=0
    )
    json: bool = knob(False, "print only JSON")


class SaysNothing(UserError):
    """A pilot from which nothing follows: runs/one_day.sh goes on with the recipe as it is."""

    status = 3


@contextmanager
def refusals_say_nothing() -> Iterator[None]:
    """The block plans. A plan that is refused, as when memory is short just now, says nothing."""
    try:
        yield
    except UserError as e:
        raise SaysNothing(str(e)) from None


def read(name: str) -> tuple[Path, dict[str, Any], recipe.RecipeKnobs]:
    """
    The recipe file, its [base_train] table, and the knobs that plan the same again. UserError if a
    file is missing or of another version.
    """
    file = machine.plan_file(name, "recipe.toml")
    try:
        flags = read_toml(file)["base_train"]
        stored = read_json(file.with_suffix(".json"))["knobs"]
        given = stored_values(recipe.RecipeKnobs, stored, f"in {file.with_suffix('.json')}")
        return file, flags, recipe.RecipeKnobs(**{**stored, **given, "out": str(file)})
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{file} and its .json are no recipe of this version ({type(e).__name__}: {e}): make "
            "one with nanochat plan recipe --hours N"
        ) from None


def train(words: Sequence[str]) -> None:
    """
    Run base_train in its own process, which prints where this one does (--json sends it to standard
    error). UserError if it fails; if interrupted, or if the terminal is closed, it saves itself
    first, and the same command continues it.
    """
    command = module_process("nanochat.commands.base_train", *words)
    ends = [number for number in ENDS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ends:
        signal.signal(number, signal.default_int_handler)
    with subprocess.Popen(**command, stdout=sys.stdout, start_new_session=True) as process:
        try:
            process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        finally:
            for number in ends:
                signal.signal(number, signal.SIG_DFL)
    if process.returncode:
        raise UserError(
            f"the pilot failed with exit status {process.returncode}: see its messages above"
        )


def short_run(file: Path, words: Sequence[str]) -> dict[str, Any]:
    """
    The record of a run of the recipe with these flags instead, trained unless it exists; its
    tok_per_sec is that of its steps, without compiling, evaluating and opening it again.
    """
    from nanochat.study.records import record

    same = json.dumps([read_toml(file), *words], sort_keys=True)
    tag = f"pilot-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
    directory = run_directory("base", tag)
    if not logbook.newest(directory, "summary"):
        run = [f"--model_tag={tag}", "--resume=auto", "--keep=1", "--run=dummy"]
        train(["--recipe", str(file), *run, "--sample_every=0", *words])
    for checkpoint in directory.glob("step_*"):
        shutil.rmtree(checkpoint)
    made = record(directory)
    return {**made, "tok_per_sec": made["tokens"] / max(made["seconds"], 1e-9)}


def verdict(target: float, bpb: tuple[float, float, float]) -> str:
    """Whether the budget reaches a target, in words."""
    middle, lo, hi = bpb
    reach = "within reach" if target >= hi else "uncertain" if target >= lo else "out of reach"
    return f"{target:g} bits per byte are {reach}: {middle:.3f} ({lo:.3f} to {hi:.3f}) are expected"


def run(knobs: PilotKnobs) -> dict[str, Any]:
    """Train the short run and write the corrected recipe; returns all figures."""
    file, flags, asked = read(knobs.plan)
    # The context is the plan's own where the run does not grow it: memory may have shortened it
    size = SIZE if "context_stages" in flags else (*SIZE, "sequence_len")
    with refusals_say_nothing():
        plan = day.planned(replace(asked, **{name: flags[name] for name in size}))
        planned = plan.primary
    target, whole = plan.machine, asked.pretraining_seconds
    seconds = knobs.minutes * 60 or min(PILOT * whole, LONGEST_PILOT)
    compiled = target.compiles(whole)
    beside = OPENING + first_step(target, compiled)
    step = planned.total_batch_size / planned.speed.tok_per_sec
    steps = (seconds * (1 - EVALUATING) - beside) / step
    if steps < FEWEST_STEPS:
        least = (FEWEST_STEPS * step + beside) / (1 - EVALUATING) / 60
        raise SaysNothing(
            f"{duration(seconds)} allow only {max(0, int(steps))} steps, too few to say anything: "
            f"give at least --minutes={math.ceil(10 * least) / 10:g}, or train with the recipe as "
            "it is"
        )
    print0(f"pilot of {file}: about {steps:,.0f} of {planned.steps:,} steps, {duration(seconds)}")
    words = [f"--max_minutes={seconds / 60:g}", f"--compile={'on' if compiled else 'off'}"]
    made = short_run(file, words)
    end, peak = made["final_bpb"], made["peak_memory_bytes"]
    if made["steps"] < FEWEST_STEPS / 4:
        raise SaysNothing(
            f"the pilot ended after {made['steps']} of {steps:,.0f} steps, too few to say "
            "anything: give it more --minutes, or train with the recipe as it is"
        )
    if end is None:
        raise SaysNothing(
            "the pilot has no bits per byte, because its validation text is empty: give more text "
            "with --data"
        )
    ratio = made["tok_per_sec"] / planned.speed.tok_per_sec
    counted = planned.memory["allocated" if target.device_type == "cuda" else "total"]
    known = memory.above(memory.calibrated(target, compiled), planned.memory["allocated"])
    gap = known + peak - counted
    target = replace(target, factor=target.factor * ratio, memory_gap=gap)
    fresh = worth(made["tokens"], plan.text)
    moved = plan.law(planned.config).moved(planned.size, fresh, end, planned.config.n_layer)
    plan = replace(plan, knobs=asked, machine=target, moved=moved, kept=planned.shape)
    with refusals_say_nothing():
        chosen = plan.primary
    written = recipe.write(plan)
    heads, *rows = day.model_rows(plan)
    print0(columns(heads, rows))
    same = chosen.shape == planned.shape
    print0(
        f"  the pilot: {end:.4f} bits per byte after {human(made['tokens'])} tokens; the whole "
        f"budget: {chosen.bpb[0]:.3f} ({chosen.bpb[1]:.3f} to {chosen.bpb[2]:.3f}), where the law "
        f"said {planned.bpb[0]:.3f}\n"
        f"  speed: {ratio:.2f} times the prediction; peak memory: {peak / GIB:.2f} GiB, predicted "
        f"{counted / GIB:.2f}\n"
        f"  {written['recipe']} is corrected: {chosen.shape[0]} x {chosen.shape[1]}, "
        f"{'which was tried' if same else 'which is better now, but has not been tried'}"
    )
    report: dict[str, Any] = {
        "run": made,
        "speed_ratio": ratio,
        "recipe": written["recipe"],
        "predicted_before": planned.bpb[0],
        "predicted": written["primary"],
    }
    if knobs.target_bpb:
        report["target"] = verdict(knobs.target_bpb, chosen.bpb)
        print0("  " + report["target"])
    write_json(file.with_name("pilot.json"), report)
    return report
