"""
The table of commands: every module of nanochat/commands, read without importing it, and how a
program starts one of them, or another module of this project, in a process of its own.
"""

import ast
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "commands"
REPOSITORY = FOLDER.parents[1]
# In the order of use; a command that is not listed comes last
ORDER = (
    "quickstart mine dataset tok_train tok_eval tok_data base_train base_loss base_eval "
    "base_complete mid_train chat_sft chat_rl chat_eval chat_cli serve export models report plan "
    "compare"
)


def command_names() -> list[str]:
    """The name of every command, in the order in which a first run uses them."""
    names = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))
    order = ORDER.split()
    return [n for n in order if n in names] + [n for n in names if n not in order]


def summary(module_file: Path) -> str:
    """The first sentence of a module's docstring, read without importing the module."""
    return first_sentence(ast.get_docstring(ast.parse(module_file.read_text(encoding="utf-8"))))


def first_sentence(doc: str | None) -> str:
    """The first sentence of a docstring without its full stop; '' if there is none."""
    paragraph = " ".join((doc or "").split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)|:$", paragraph, maxsplit=1)[0]


def near(name: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' if one of `names` is similar to `name`, else ''."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def module_process(module: str, *words: str, **environment: str) -> dict[str, Any]:
    """
    Arguments of subprocess.run that start a module of this project with `words` and with these
    variables in its environment. The current folder does not matter.
    """
    paths = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    return {
        "args": [sys.executable, "-u", "-m", module, *words],
        "env": {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONSAFEPATH": "1",  # the current folder may hold a statistics.py
            **environment,
        },
        "stdin": subprocess.DEVNULL,
    }
