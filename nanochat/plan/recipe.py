"""
Choose depth, width, batch, context and length of a run for a budget of time, and write the recipe
that the training commands take.

    nanochat plan recipe --hours 24 --gpu rtx4090
    nanochat plan recipe --minutes 20 --probe plan/probe.json
    nanochat base_train --recipe plan/recipe.toml

The page of plan day is printed, and the plan's JSON holds every candidate. A budget that no model
can use is refused, and a card that holds none.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from nanochat.base.common import duration, notice, print0, user_path
from nanochat.base.files import atomic_write, write_json
from nanochat.base.knobs import knob
from nanochat.base.strangers import read_toml
from nanochat.plan import day, machine
from nanochat.plan.choice import Candidate, Plan
from nanochat.plan.shapes import architecture
from nanochat.train.scaling import LATER_STAGES, embedding_rate

EVALUATION = LATER_STAGES["evaluation"] / LATER_STAGES["mid_train"]


@dataclass(kw_only=True)
class RecipeKnobs(day.PlanKnobs):
    """Recipe"""

    model_tag: str = knob("", "name of the model's folder; it goes into the recipe")
    out: str = knob(
        "",
        "recipe to write, with its plan (.json) in the same folder (default: plan/recipe.toml "
        "in the base folder)",
    )


# the files


def tables(knobs: RecipeKnobs, candidate: Candidate) -> dict[str, dict[str, Any]]:
    """The recipe of a candidate: flags by command."""
    seconds, rate = knobs.stages, embedding_rate(candidate.total_batch_size)
    pretraining = candidate.flags(knobs.kv_ratio)
    pretraining |= {"embedding_lr": float(f"{rate:.6g}"), **architecture(candidate.config)}
    if len(candidate.contexts) > 1:
        pretraining["context_stages"] = tuple(f"{T}@{begin:g}" for begin, T in candidate.contexts)
    stages = {"base_train": {**pretraining, "data": knobs.data}}
    if seconds["mid_train"] > 13:
        # Rates as in the quickstart, whose chain was measured (dev/LOG.md).
        for command, scale in (("mid_train", "lr_scale"), ("chat_sft", "init_lr_frac")):
            stages[command] = {"warmdown_ratio": 1.0, scale: 0.5}
            given = {"data": knobs.conversations, "task_dir": knobs.task_dir}
            stages[command] |= {name: value for name, value in given.items() if value}
    where = {name: getattr(knobs, name) for name in ("device_type", "dtype")}
    for command, flags in stages.items():
        flags |= {name: value for name, value in where.items() if value != "auto"}
        flags["max_minutes"] = round(seconds[command] / 60, 3)
        if knobs.model_tag:
            flags["model_tag"] = knobs.model_tag
    return stages


def write(plan: Plan) -> dict[str, Any]:
    """Write the recipe of a plan, and the plan as JSON beside it; return the plan."""
    knobs = plan.knobs
    out = machine.plan_file(knobs.out, "recipe.toml")
    lines = [f"# {duration(knobs.budget)} on {plan.machine.name}"]
    lines += [f"# {what}: {figure} ({source})" for what, figure, source in day.gains(plan)]
    for command, flags in tables(knobs, plan.primary).items():
        lines += [
            "",
            f"[{command}]",
            *(f"{n} = {json.dumps(v, ensure_ascii=False)}" for n, v in flags.items()),
        ]
    atomic_write(out, "\n".join(lines) + "\n")
    whole = {
        # A number of tokens has become a budget, and two would be refused
        "knobs": {**asdict(knobs), "tokens": 0.0},
        "machine": plan.machine.stored(),
        "law": asdict(plan.law(plan.primary.config)),
        "recipe": str(out),
        "pretraining_seconds": knobs.pretraining_seconds,
        **asdict(plan.choice),
    }
    write_json(out.with_suffix(".json"), whole)
    return whole


def replanned(file: str, stage: str, seconds_left: float) -> list[str]:
    """
    The flags that let a stage of a recipe, and all that follow it, end in `seconds_left`: none if
    that is as planned, else its share of what is left, which a notice says. Pretraining alone gets
    longer if time is left over, as after a pilot that was refused.
    """
    recipe = read_toml(user_path(file))
    planned = {name: 60 * flags["max_minutes"] for name, flags in recipe.items()}
    planned["evaluation"] = planned.get("mid_train", 0.0) * EVALUATION
    needed = sum(list(planned.values())[list(planned).index(stage) :])
    share = max(0.05, seconds_left / max(1.0, needed))
    if 0.98 < share < (1.02 if stage == "base_train" else math.inf):
        return []
    notice(
        f"{duration(max(0.0, seconds_left))} are left for {stage} and what follows, "
        f"{duration(needed)} were planned: {stage} gets {share:.0%} of its planned time"
    )
    if stage == "evaluation":
        return ["-n", str(max(20, round(500 * share)))]
    return [f"--max_minutes={planned[stage] / 60 * share:.3f}"]


def run(knobs: RecipeKnobs) -> dict[str, Any]:
    """Print the page of plan day and write recipe and plan; returns the plan."""
    plan = day.planned(knobs)
    day.show(day.page(plan, begun=plan.knobs.used > 0))
    whole = write(plan)
    commands = ", ".join(tables(plan.knobs, plan.primary))
    print0(f"\n  {whole['recipe']}: pass it with --recipe to {commands}")
    return whole
