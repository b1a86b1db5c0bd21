"""The command `nanochat`: lists every command with one line about it, or runs one of them."""

import runpy
import shutil
import sys
import textwrap

from nanochat.base.commands import FOLDER, command_names, near, summary
from nanochat.base.common import UserError, entry, print0


def list_commands() -> None:
    names = command_names()
    width = max(map(len, names))
    print0("usage: nanochat COMMAND [--flag VALUE ...]    (COMMAND -h lists its flags)\n")
    room = max(40, shutil.get_terminal_size((110, 24)).columns - width - 4)
    for name in names:
        line = textwrap.shorten(summary(FOLDER / f"{name}.py"), room, placeholder=" ...")
        print0(f"  {name:<{width}}  {line}")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        list_commands()
        return
    word = sys.argv.pop(1)
    name = word.removeprefix("scripts.").removeprefix("nanochat.").replace("-", "_")
    if name not in command_names():
        raise UserError(
            f"there is no command {word}{near(name, command_names())}; nanochat -h lists all "
            "commands"
        )
    runpy.run_module(f"nanochat.commands.{name}", run_name="__main__", alter_sys=True)


def console() -> None:
    """The entry point of the installed command `nanochat`."""
    entry(main)


if __name__ == "__main__":
    console()
