"""
Try a recipe for a short time, extrapolate to its whole budget with an interval, and correct the
recipe with the measurements.

    nanochat plan pilot                    the recipe in the base folder, for a twelfth of its time
    nanochat plan pilot recipe.toml --minutes 5 --target_bpb 0.9

While the learning rate is high, a loss lies above what the same tokens give once the rate has
fallen, so a curve that is cut short says too little. A pilot is therefore several short runs
(lengths 1 : 2 : 4), each with the recipe's whole schedule over its own length, of which only the
decayed ends are fitted (plan.extrapolate). Without --minutes a pilot takes an hour at most.
Runs too short to be fitted are refused.
"""

import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.base import logbook
from nanochat.base.common import UserError, columns, duration, human, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.base.strangers import read_json, read_toml
from nanochat.model.config import GPTConfig
from nanochat.model.stages import run_directory
from nanochat.plan import day, machine, recipe
from nanochat.plan.choice import OPENING, Candidate, MemoryModel, choose
from nanochat.plan.extrapolate import Curve, fit_curve
from nanochat.plan.law import Law, worth
from nanochat.plan.machine import GIB, Machine
from nanochat.plan.speed import Speed, first_step
from nanochat.train.scaling import PILOT

MOST_SECONDS = 3600.0  # for all runs together
FEWEST_STEPS = 16  # of the shortest run


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
        "time for all runs together (0 = a twelfth of the pretraining time, at most an hour)",
        low=0,
    )
    runs: int = knob(
        3,
        "short runs, each twice as long as the one before; two if time is short",
        low=2,
        high=6,
    )
    target_bpb: float = knob(
        0.0, "target bits per byte; the pilot predicts whether the budget reaches it", low=0
    )
    keep: bool = knob(False, "keep the weights of the short runs")
    json: bool = knob(False, "print only JSON")


@dataclass(frozen=True)
class StoredPlan:
    """What plan recipe wrote: the recipe file, its [base_train] table, and the plan's JSON."""

    file: Path
    flags: dict[str, Any]
    knobs: recipe.RecipeKnobs
    machine: Machine
    primary: Candidate

    @classmethod
    def read(cls, name: str) -> "StoredPlan":
        """UserError if a file is missing or of another version."""
        file = Path(name).expanduser() if name else machine.folder() / "recipe.toml"
        try:
            tables = read_toml(file)
            plan = read_json(file.with_suffix(".json"))
            given = {n: tuple(v) if isinstance(v, list) else v for n, v in plan["knobs"].items()}
            knobs = recipe.RecipeKnobs(**{**given, "out": str(file)})
            primary = Candidate(**plan["primary"])
            primary.config = GPTConfig(**plan["primary"]["config"])
            primary.speed = Speed(*plan["primary"]["speed"])
            points: tuple[dict[str, Any], ...] = ()
            if plan["machine"]["points"]:
                points = machine.load(knobs.probe or machine.folder() / "probe.json").points
            target = Machine(**{**plan["machine"], "points": points})
            return cls(file, tables["base_train"], knobs, target, primary)
        except OSError as e:
            raise UserError(
                f"cannot read {e.filename} ({e.strerror}): make a recipe with "
                "nanochat plan recipe --hours N"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{file} and its .json were not written by plan recipe ({type(e).__name__}: "
                f"{e}): run plan recipe again"
            ) from None

    @property
    def tag(self) -> str:
        """Names the runs of this recipe, so that an interrupted pilot finds them again."""
        text = json.dumps(self.flags, sort_keys=True)
        return "pilot-" + hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def compiled(self) -> bool:
        return self.machine.compiles(self.knobs.pretraining_seconds())

    def seconds_beside_training(self) -> float:
        """Seconds of a short run that opening, compiling and two evaluations take."""
        rate, sources = self.primary.speed.tok_per_sec, max(1, len(self.knobs.data))
        evaluations = sources * self.primary.eval_tokens / rate
        return OPENING + first_step(self.machine, self.compiled) + evaluations


def lengths(planned: Candidate, beside: float, seconds: float, runs: int) -> list[int]:
    """
    Steps of the short runs, 1 : 2 : 4 ..., that take `seconds` together, of which each run spends
    `beside` without training; of fewer runs if the shortest would be too short to be fitted.
    UserError if that is so with two.
    """
    step = planned.total_batch_size / planned.speed.tok_per_sec
    parts = [1 << i for i in range(runs)]
    unit = (seconds - runs * beside) / step / sum(parts)
    unit = min(unit, planned.steps / 2 / parts[-1])
    steps = [int(unit * part) for part in parts]
    if unit >= FEWEST_STEPS:
        return steps
    if runs > 2:
        return lengths(planned, beside, seconds, runs - 1)
    if FEWEST_STEPS * parts[-1] * 2 > planned.steps:
        raise UserError(
            f"a run of {planned.steps} steps is too short for a pilot, which would take nearly "
            "as long: train with the recipe as it is"
        )
    least = FEWEST_STEPS * step * sum(parts) + runs * beside
    raise UserError(
        f"{duration(seconds)} allows only runs of {', '.join(str(max(0, n)) for n in steps)} "
        f"steps, too short to fit a curve: give at least --minutes={math.ceil(least / 6) / 10:g}"
    )


def train(words: Sequence[str], quiet: bool) -> None:
    """
    Run base_train in its own process. UserError if it fails; if interrupted, it saves itself first,
    and the same command continues it.
    """
    process = machine.python("nanochat.commands.base_train", *words)
    out = sys.stderr if quiet else sys.stdout
    with subprocess.Popen(**process, stdout=out, start_new_session=True) as p:
        try:
            status = p.wait()
        except BaseException:
            p.send_signal(signal.SIGINT)
            p.wait()
            raise
    if status:
        raise UserError(
            f"a run of the pilot failed with exit status {status}: see its messages above"
        )


def short_run(stored: StoredPlan, steps: int, quiet: bool) -> Path:
    """The folder of a run of so many steps with the recipe's schedule, trained unless it exists."""
    tag = f"{stored.tag}-{steps}"
    directory = run_directory("base", tag)
    rows = logbook.read(directory)
    if not any(r.get("kind") == "summary" and r.get("step") == steps for r in rows):
        compiled = "on" if stored.compiled else "off"
        length = ["--max_minutes=0", "--max_hours=0", f"--num_iterations={steps}"]
        run = [f"--model_tag={tag}", "--resume=auto", "--keep=1", "--run=dummy"]
        rest = ["--eval_every=0", "--sample_every=0", f"--compile={compiled}"]
        if "eval_tokens" not in stored.flags:
            rest.append(f"--eval_tokens={stored.primary.eval_tokens}")
        train(["--recipe", str(stored.file), *length, *run, *rest], quiet)
    return directory


def results_of(directory: Path) -> dict[str, Any]:
    """What a finished run reached; tok_per_sec without the first step, which compiles."""
    from nanochat.study.records import record

    rows = [r for r in logbook.read(directory) if r.get("kind") == "train"]
    seconds = rows[-1]["seconds"] - rows[0]["seconds"]
    tokens = rows[-1]["tokens"] - rows[0]["tokens"]
    recorded = record(directory)
    names = ("steps", "tokens", "final_bpb", "peak_memory_bytes")
    kept = {name: recorded[name] for name in names}
    return {**kept, "tok_per_sec": tokens / max(seconds, 1e-9)}


def verdict(target: float, candidate: Candidate, law: Law) -> str:
    """Whether the budget reaches a target, in words."""
    import numpy as np

    middle, lo, hi = candidate.bpb
    expected = f"{middle:.3f} ({lo:.3f} to {hi:.3f}) are expected"
    if target >= hi:
        return f"{target:g} bits per byte are within reach: {expected}"
    if target >= lo:
        return f"{target:g} bits per byte are uncertain: {expected}"
    flops = 6 * candidate.size * candidate.tokens
    multiples = np.geomspace(1, 1e4, 200)
    enough = next((m for m in multiples if law.bpb(*law.best(m * flops)) <= target), None)
    remedy = "no budget within 10,000 times this one reaches them on this text"
    if enough:
        remedy = f"about {enough:.2g} times the budget would reach them"
    return f"{target:g} bits per byte are out of reach: {expected}; {remedy}"


def run(knobs: PilotKnobs) -> dict[str, Any]:
    """Train the short runs, extrapolate and write the corrected recipe; returns all figures."""
    from nanochat.model.checkpoint import list_checkpoints

    stored = StoredPlan.read(knobs.plan)
    planned = stored.primary
    seconds = knobs.minutes * 60 or min(PILOT * stored.knobs.pretraining_seconds(), MOST_SECONDS)
    steps = lengths(planned, stored.seconds_beside_training(), seconds, knobs.runs)
    print0(
        f"pilot of {stored.file}: runs of {', '.join(f'{n:,}' for n in steps)} of "
        f"{planned.steps:,} steps, about {duration(seconds)}"
    )
    directories = [short_run(stored, n, knobs.json) for n in steps]
    runs = [results_of(directory) for directory in directories]
    if not knobs.keep:
        for checkpoint in (c for d in directories for c in list_checkpoints(d)):
            shutil.rmtree(checkpoint.path)
    if any(r["final_bpb"] is None for r in runs):
        raise UserError(
            "a run of the pilot has no bits per byte, because its validation text is empty: give "
            "more text with --data"
        )
    longest = runs[-1]
    ratio = longest["tok_per_sec"] / planned.speed.tok_per_sec
    text = day.fresh_text(stored.knobs.data, stored.knobs.vocab)
    tokens = worth(planned.tokens * ratio, text)
    curve = fit_curve(
        [worth(r["tokens"], text) for r in runs],
        [r["final_bpb"] for r in runs],
        tokens,
        Law().share(planned.size, longest["tokens"]),
        Law().b,
    )
    law = Law().moved(planned.size, tokens, (curve.bpb, curve.lo, curve.hi))
    target = _corrected_machine(stored, longest["peak_memory_bytes"], ratio)
    choice = choose(stored.knobs, target, law, text, kept=planned.shape)
    heads, *rows = day.model_rows(choice)
    print0(columns(heads, rows))
    written = recipe.write(stored.knobs, target, choice, law)
    report: dict[str, Any] = {
        "runs": runs,
        "fit": asdict(curve),
        "speed_ratio": ratio,
        "changed": choice.primary.shape != planned.shape,
        "recipe": written["recipe"],
        "memory_bytes": longest["peak_memory_bytes"],
        "predicted_before": planned.bpb[0],
        "predicted": written["primary"],
    }
    _show(report, curve, planned, choice.primary)
    if knobs.target_bpb:
        report["target"] = verdict(knobs.target_bpb, choice.primary, law)
        print0("  " + report["target"])
    atomic_write(stored.file.with_name("pilot.json"), json.dumps(report, indent=1))
    return report


def _corrected_machine(stored: StoredPlan, peak_memory_bytes: float, ratio: float) -> Machine:
    """The machine of the plan with the speed and the memory that the pilot measured."""
    planned = stored.primary
    corrected = replace(stored.machine, factor=stored.machine.factor * ratio, memory_gap=0.0)
    _, predicted = MemoryModel(corrected, stored.compiled).predict(
        planned.config, planned.device_batch_size, planned.accumulation
    )
    return replace(corrected, memory_gap=peak_memory_bytes - predicted)


def _show(report: Mapping[str, Any], curve: Curve, planned: Candidate, chosen: Candidate) -> None:
    rows = [(human(r["tokens"]), f"{r['final_bpb']:.4f}") for r in report["runs"]]
    print0(columns(("tokens", "bits per byte"), rows))
    floor = curve.level * curve.share
    print0(
        f"  L(D) = {floor:.3f} + {curve.level - floor:.3f} (D / {human(curve.tokens)})"
        f"^-{curve.power:.3f}; the whole budget: {curve.bpb:.3f} bits per byte ({curve.lo:.3f} to "
        f"{curve.hi:.3f}); the law said {planned.bpb[0]:.3f}"
    )
    print0(
        f"  speed: {report['speed_ratio']:.2f} times the prediction; peak memory: "
        f"{report['memory_bytes'] / GIB:.2f} GiB, predicted "
        f"{planned.peak_memory_bytes / GIB:.2f}"
    )
    kept = "the recipe keeps its model"
    if report["changed"]:
        kept = "another model is better now, but has not been tried"
    depth, width = chosen.shape
    print0(f"  {kept}: depth {depth}, width {width}; {report['recipe']} is corrected")
