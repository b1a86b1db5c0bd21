"""
`python -m nanochat` lists every command in a line; `python -m nanochat base_train --depth=4` runs one.

The lines are the opening sentences of the commands themselves, read without importing them: the list costs no time and cannot go stale.
"""

import ast
import runpy
import shutil
import sys
import textwrap
from pathlib import Path

from nanochat.base.common import UserError, entry, print0
from nanochat.base.knobs import first_sentence, near

COMMANDS = Path(__file__).parent / "commands"
ORDER = (  # that of a first run; a command not named here comes after these
    "dataset",
    "tok_train",
    "tok_eval",
    "tok_data",
    "base_train",
    "base_loss",
    "base_eval",
    "base_complete",
    "mid_train",
    "chat_sft",
    "chat_rl",
    "chat_eval",
    "chat_cli",
    "chat_web",
    "report",
    "plan",
    "compare",
    "export",
)


def commands() -> dict[str, tuple[str, str]]:
    """Name -> (module that runs it, what it does in a sentence), in the order of a first run."""
    found = {}
    for file in COMMANDS.glob("*.py"):
        if file.stem != "__init__":
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            found[file.stem] = f"nanochat.commands.{file.stem}", first_sentence(doc)
    return dict(
        sorted(
            found.items(),
            key=lambda item: (ORDER.index(item[0]) if item[0] in ORDER else len(ORDER), item[0]),
        )
    )


def main() -> None:
    known = commands()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        width = max(map(len, known), default=0)
        print0(
            "usage: python -m nanochat COMMAND [--flag VALUE ...]    (COMMAND -h lists its flags)\n"
        )
        room = max(40, shutil.get_terminal_size((110, 24)).columns - width - 4)
        for name, (_, does) in known.items():
            print0(f"  {name:<{width}}  {textwrap.shorten(does, room, placeholder=' ...')}")
        return
    name = sys.argv[1].removeprefix("scripts.").removeprefix("nanochat.").replace("-", "_")
    if name not in known:
        raise UserError(
            f"there is no command {sys.argv[1]}{near(name, known)}; python -m nanochat lists them all"
        )
    del sys.argv[1]
    runpy.run_module(known[name][0], run_name="__main__", alter_sys=True)


def console() -> None:
    """The command `nanochat` that an installation makes."""
    entry(main)


if __name__ == "__main__":
    console()
