"""
Choose depth, width, batch, context and length of a run for a budget of time, and write the recipe
that the training commands take.

    nanochat plan recipe --hours 24 --gpu rtx4090
    nanochat plan recipe --minutes 20 --probe plan/probe.json
    nanochat base_train --recipe plan/recipe.toml

The speed comes from a probe, from a peak measured here, or from the table of cards; the loss from a
scaling law that a pilot corrects; the memory from a count of tensors. Every candidate is
shown with the reason why it lost. A budget that no model can use is refused, and a card that holds
none.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError, columns, duration, human, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.model.config import ArchitectureKnobs
from nanochat.plan import machine, probe
from nanochat.plan.choice import Candidate, Choice, ChoiceKnobs, choose
from nanochat.plan.law import Law
from nanochat.plan.machine import GIB, Machine, budget_seconds
from nanochat.train.scaling import embedding_rate

# Shares of the time that pretraining leaves; the remainder is for evaluation and starting programs.
LATER_STAGES = {"mid_train": 0.45, "chat_sft": 0.3}


@dataclass(kw_only=True)
class RecipeKnobs(ChoiceKnobs):
    """Recipe"""

    gpu: str = knob("", "plan for this GPU, for example rtx4090")
    probe: str = knob(
        "",
        "use this file from plan probe (default: the one in the base folder, if it was "
        "measured on this machine)",
    )
    memory_gb: float = knob(
        0.0, "memory of the device (default: the GPU's, or what is free here)", low=0
    )
    model_tag: str = knob("", "name of the model's folder; it goes into the recipe")
    out: str = knob(
        "",
        "recipe to write, with its plan (.json) in the same folder (default: plan/recipe.toml "
        "in the base folder)",
    )
    json: bool = knob(False, "print only JSON")


def planned_machine(knobs: RecipeKnobs) -> Machine:
    """
    The machine that is planned for: a card by name, the machine of a probe, or this one, which is
    probed now unless it was before. UserError for two of them and for an unknown card.
    """
    if knobs.gpu and knobs.probe:
        raise UserError(
            f"--gpu={knobs.gpu} and --probe={knobs.probe} describe two machines: give only one "
            "of them"
        )
    if knobs.probe:
        target = machine.load(knobs.probe)
    elif knobs.gpu:
        target = machine.of_card(knobs.gpu)
    else:
        target = _this_machine(knobs)
    return replace(target, memory_bytes=knobs.memory_gb * GIB) if knobs.memory_gb else target


def _this_machine(knobs: RecipeKnobs) -> Machine:
    target, file = machine.here(knobs.device_type, knobs.dtype), machine.folder() / "probe.json"
    if file.exists():
        probed = machine.load(file)
        identity = ("name", "device_type", "dtype")
        if all(getattr(probed, name) == getattr(target, name) for name in identity):
            return probed
    print0("this machine has no probe yet: measuring a few points (plan probe measures more)")
    shared = {f.name for f in fields(probe.ProbeKnobs)} & {f.name for f in fields(knobs)}
    given = {name: getattr(knobs, name) for name in shared - {"out", "json"}}
    probe.run(probe.ProbeKnobs(**given, device_batches=(8,)))
    return machine.load(file)


# the files


def toml_value(value: Any) -> str:
    """A value as TOML spells it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float):
        return repr(float(f"{value:.6g}"))
    return json.dumps(value, ensure_ascii=False)


def tables(knobs: RecipeKnobs, candidate: Candidate) -> dict[str, dict[str, Any]]:
    """The recipe of a candidate: flags by command."""
    pretraining = knobs.pretraining_seconds()
    stages = {"base_train": _pretraining(knobs, candidate)}
    remaining = pretraining / knobs.pretrain - pretraining
    if remaining > 30:
        for command, share in LATER_STAGES.items():
            stages[command] = {
                "max_minutes": round(share * remaining / 60, 3),
                "warmdown_ratio": 1.0,
            }
        # Rates as in the quickstart, whose chain was measured (dev/LOG.md).
        stages["mid_train"]["lr_scale"] = 0.5
        stages["chat_sft"]["init_lr_frac"] = 0.5
    if knobs.model_tag:
        for flags in stages.values():
            flags["model_tag"] = knobs.model_tag
    return stages


def _pretraining(knobs: RecipeKnobs, candidate: Candidate) -> dict[str, Any]:
    config = candidate.config
    flags: dict[str, Any] = {
        "depth": config.n_layer,
        "model_dim": config.n_embd,
        "head_dim": config.head_dim,
        "kv_ratio": knobs.kv_ratio,
        "max_minutes": round(knobs.pretraining_seconds() / 60, 3),
        "total_batch_size": candidate.total_batch_size,
        "device_batch_size": candidate.device_batch_size,
        "embedding_lr": embedding_rate(candidate.total_batch_size),
    }
    flags |= {f.name: getattr(config, f.name) for f in fields(ArchitectureKnobs)}
    if len(candidate.contexts) > 1:
        flags["context_stages"] = tuple(f"{T}@{begin:g}" for begin, T in candidate.contexts)
    if knobs.data:
        flags["data"] = knobs.data
    return flags


def write(knobs: RecipeKnobs, target: Machine, choice: Choice, the_law: Law) -> dict[str, Any]:
    """Write the recipe, the fallback's recipe beside it and the plan as JSON; return the plan."""
    out = Path(knobs.out).expanduser() if knobs.out else machine.folder() / "recipe.toml"
    spare = out.with_name(f"{out.stem}-fallback{out.suffix}")
    _write_recipe(out, "primary", knobs, target, choice.primary)
    if choice.fallback:
        _write_recipe(spare, "fallback", knobs, target, choice.fallback)
    else:
        spare.unlink(missing_ok=True)
    whole = {
        "knobs": asdict(knobs),
        "machine": target.stored(),
        "law": asdict(the_law),
        "recipe": str(out),
        "pretraining_seconds": knobs.pretraining_seconds(),
        **asdict(choice),
    }
    atomic_write(out.with_suffix(".json"), json.dumps(whole, indent=1))
    return whole


def _write_recipe(
    file: Path, role: str, knobs: RecipeKnobs, target: Machine, candidate: Candidate
) -> None:
    bpb, lo, hi = candidate.bpb
    rate = candidate.speed
    lines = [
        f"# {duration(budget_seconds(knobs))} on {target.name}: {role} of plan recipe. "
        f"Speed: {target.source}.",
        f"# Predicted: {bpb:.3f} bits per byte ({lo:.3f} to {hi:.3f}) after "
        f"{human(candidate.tokens)} tokens at {rate.tok_per_sec:,.0f} tok/s ({rate.lo:,.0f} to "
        f"{rate.hi:,.0f}), {candidate.memory_bytes / GIB:.2f} GiB",
    ]
    for command, flags in tables(knobs, candidate).items():
        lines += ["", f"[{command}]", *(f"{n} = {toml_value(v)}" for n, v in flags.items())]
    atomic_write(file, "\n".join(lines) + "\n")


def show(choice: Choice, target: Machine, most: int = 12) -> None:
    """Print the table of candidates."""
    print0(f"{target.name}, {target.dtype}; speed: {target.source}")
    chosen = [c for c in (choice.primary, choice.fallback) if c]
    others = sorted((c for c in choice.candidates if c not in chosen), key=lambda c: c.bpb[0])
    rows = [
        (
            f"{c.config.n_layer} x {c.config.n_embd}",
            human(c.parameters),
            " -> ".join(str(T) for _, T in c.contexts),
            f"{c.total_batch_size:,}",
            c.device_batch_size,
            f"{c.speed.tok_per_sec:,.0f}",
            human(c.tokens),
            "{:.3f} ({:.3f}-{:.3f})".format(*c.bpb),
            f"{c.memory_bytes / GIB:.2f} GiB" if c.memory_bytes else "",
            c.why,
        )
        for c in [*chosen, *others][:most]
    ]
    size = ("depth x width", "parameters", "context", "batch", "rows")
    print0(columns((*size, "tok/s", "tokens", "bits per byte", "memory", ""), rows))
    if hidden := len(choice.candidates) - len(rows):
        print0(f"  and {hidden} more, predicted to be worse: the plan's .json has all of them")


def run(knobs: RecipeKnobs) -> dict[str, Any]:
    """Print the candidates, write recipe and plan; returns the plan. UserError as choose()."""
    knobs.pretraining_seconds()  # a missing budget is refused before anything is measured
    target = planned_machine(knobs)
    choice = choose(knobs, target, Law())
    show(choice, target)
    whole = write(knobs, target, choice, Law())
    commands = ", ".join(tables(knobs, choice.primary))
    print0(f"  {whole['recipe']}: pass it with --recipe to {commands}")
    print0(
        "  the bits per byte are predicted for web text (for budgets of minutes, English "
        "prose): run plan pilot to measure your own text"
    )
    return whole
