"""
Plan a run: one page about a budget of hours, count parameters, predict memory, measure speed,
choose a recipe, and test it with a pilot.

    nanochat plan day --hours 24 --gpu rtx4090
    nanochat plan arch --params 38M --vocab 24576 --split 1:1:1
    nanochat plan memory --depth 12 --gpu rtx3090

Each subcommand is a module of nanochat/plan and explains its flags with -h; all take --json.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from nanochat.base.commands import near, summary
from nanochat.base.common import UserError, base_dir, entry, print0
from nanochat.base.knobs import parse

# In the order of use: plan NAME is nanochat/plan/NAME.py, whose knobs are NameKnobs.
SUBCOMMANDS = ("day", "arch", "memory", "probe", "recipe", "pilot")


def commands() -> dict[str, tuple[str, str]]:
    """{subcommand: (its module, a sentence about it)}, read without importing the modules."""
    plan = Path(__file__).parent.parent / "plan"
    return {name: (f"nanochat.plan.{name}", summary(plan / f"{name}.py")) for name in SUBCOMMANDS}


def exports_to(config: dict[str, Any], here: bool) -> str:
    """
    What a model of this configuration can be exported to, in words; one that is trained `here` has
    the tokenizer that is there, if that has as many tokens.
    """
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.export.target import destinations
    from nanochat.model.config import GPTConfig
    from nanochat.train.scaling import digits_for

    digits = digits_for(config["vocab_size"])
    if here and (base_dir() / "tokenizer" / "tokenizer.json").exists():
        tokenizer = Tokenizer.load()
        if tokenizer.vocab_size == config["vocab_size"]:
            digits = tokenizer.digits
    return destinations(GPTConfig(**config), digits)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<8}  {does}" for name, (_, does) in commands().items()]
        usage = (
            "usage: nanochat plan SUBCOMMAND [--flag VALUE ...]    (SUBCOMMAND -h lists its flags)"
        )
        print0(usage, "", *lines, sep="\n")
        return {}
    name, *flags = words
    if name not in SUBCOMMANDS:
        raise UserError(
            f"plan has no subcommand {name!r}{near(name, SUBCOMMANDS)}: choose "
            f"{', '.join(SUBCOMMANDS)}"
        )
    module = importlib.import_module(f"nanochat.plan.{name}")
    kind = getattr(module, f"{name.title()}Knobs")
    values = parse(kind, flags, command=f"plan {name}")[0]
    # With --json nothing else may go to standard output.
    with redirect_stdout(sys.stderr) if values.json else nullcontext():
        report = module.run(values)
        planned = report if name == "arch" else report.get("primary", {})
        if "config" in planned:
            report["exports"] = exports_to(planned["config"], here=not values.gpu)
            print0(f"  {report['exports']}")
    if values.json:
        print0(json.dumps(report))
    return report


if __name__ == "__main__":
    entry(main)
