"""
Plan a run before it: parameters, memory, speed, a recipe for a budget of hours, and a pilot of it.

    python -m scripts.plan arch --params 38M --vocab 24576 --split 1:1:1
    python -m scripts.plan memory --depth 12 --gpu rtx3090

Each subcommand is a module of nanochat/plan and explains its flags with -h; all take --json.
"""

import ast
import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from nanochat import plan
from nanochat.base import knobs
from nanochat.base.commands import first_sentence, near
from nanochat.base.common import UserError, entry, print0

MODULES = {
    "arch": "arch",
    "memory": "memory",
    "probe": "probe",
    "recipe": "recipe",
    "pilot": "pilot",
}  # in the order of use


def commands() -> dict[str, tuple[str, str]]:
    """Subcommand -> (its module, what it does in a sentence), read without importing it."""
    found = {}
    for name, module in MODULES.items():
        file = Path(plan.__path__[0]) / f"{module}.py"
        if file.is_file():
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            found[name] = f"{plan.__name__}.{module}", first_sentence(doc)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    words = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not words or words[0] in ("-h", "--help"):
        print0(
            "usage: python -m scripts.plan SUBCOMMAND [--flag VALUE ...]    (SUBCOMMAND -h lists its flags)\n"
        )
        print0("\n".join(f"  {name:<8}  {does}" for name, (_, does) in known.items()))
        return {}
    if words[0] not in known:
        raise UserError(
            f"plan has no subcommand {words[0]!r}{near(words[0], known)}: choose {', '.join(known)}"
        )
    module = importlib.import_module(known[words[0]][0])
    k, _ = knobs.parse(module.Knobs, words[1:], command=f"plan {words[0]}")
    with (
        redirect_stdout(sys.stderr) if k.json else nullcontext()
    ):  # whatever else there is to say must not mix with it
        out = module.run(k)
    if k.json:
        print0(json.dumps(out))
    return out


if __name__ == "__main__":
    entry(main)
