"""
Write docs/commands.md from the help of the commands themselves.

    python dev/commands_page.py            # writes it
    python dev/commands_page.py --check    # fails if it is not current
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanochat.base.commands import FOLDER, command_names, summary  # noqa: E402
from nanochat.commands.plan import SUBCOMMANDS  # noqa: E402

PAGE = ROOT / "docs" / "commands.md"


def help_of(*words: str) -> str:
    """What `nanochat WORDS -h` prints at a width of 100 columns."""
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nanochat", *words, "-h"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def page() -> str:
    """The Markdown text of the page."""
    names = command_names()
    parts = [
        "# Commands",
        "",
        "```sh",
        "nanochat base_train -h",
        "```",
        "",
        "prints the text below. A value in [brackets] is the default; 0 often means that the command chooses. `python -m scripts.base_train` is the",
        "same command. Every command takes `--recipe FILE.toml` and refuses flags that it does not know. Words are explained in the",
        "[glossary](glossary.md), messages in [troubleshooting](troubleshooting.md). This page is written by `python dev/commands_page.py`.",
        "",
        "| command | what it does |",
        "|---|---|",
        *(f"| [`{name}`](#{name}) | {summary(FOLDER / f'{name}.py')} |" for name in names),
        "",
    ]
    for name in names:
        parts += [f"## {name}", "", "```text", help_of(name), "```", ""]
        if name == "plan":
            for subcommand in SUBCOMMANDS:
                parts += [
                    f"### plan {subcommand}",
                    "",
                    "```text",
                    help_of(name, subcommand),
                    "```",
                    "",
                ]
    return "\n".join(parts)


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)} is not current: run python dev/commands_page.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
