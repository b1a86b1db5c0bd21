"""
Continue text with a model: type lines, then a line ### to complete them.

The model is loaded once. Each completion starts from an empty input; Ctrl+C exits at any time.
Also works with piped text.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.base import knobs
from nanochat.base.common import entry, notice, opening, printable
from nanochat.base.knobs import knob
from nanochat.chat.reply import continue_text
from nanochat.commands.chat_cli import (
    GREY,
    NORMAL,
    GenerationKnobs,
    in_terminal,
    typed,
)

TRIGGER = "###"


@dataclass(kw_only=True)
class CompleteKnobs(GenerationKnobs):
    """Completion"""

    source: Literal["base", "mid", "sft", "rl"] = knob("base", "stage of the model", alias="-i")
    temperature: float = knob(
        0.8, "sampling temperature (0 = always the likeliest token)", alias="-t", low=0
    )


def typed_lines() -> Iterator[str]:
    """Lines from a terminal; a paste may bring several at once."""
    for text in typed("complete_history", {"": "ansibrightblack"}):
        yield from text.split("\n")


def piped_lines() -> Iterator[str]:
    """Lines from standard input, printed as they would look if typed."""
    for line in sys.stdin:
        print(printable(f"> {line.rstrip()}"), flush=True)
        yield line.rstrip("\r\n")


def main(argv: Sequence[str] | None = None) -> None:
    options, _ = knobs.parse(
        CompleteKnobs,
        argv,
        command="base_complete",
        description=f"Type lines, then a line {TRIGGER} to complete them.",
    )
    opening("base_complete")
    engine, loaded = options.load(options.source)
    interactive = in_terminal()
    guide = f"{loaded.describe()}. A line {TRIGGER} completes the lines before it. Ctrl+C exits."
    colour, end = (GREY, NORMAL) if interactive else ("", "")
    print(f"{colour}{printable(guide)}{end}", flush=True)
    lines: list[str] = []
    turn = 0
    try:
        for line in typed_lines() if interactive else piped_lines():
            if line.strip() != TRIGGER:
                lines.append(line)
            elif not "".join(lines).strip():
                notice(f"there is no text before {TRIGGER}: type some lines first")
            else:
                for piece in continue_text(engine, "\n".join(lines), **options.sampling(turn)):
                    print(printable(piece), end="", flush=True)
                print("\n", flush=True)
                lines, turn = [], turn + 1
    except KeyboardInterrupt:
        print(flush=True)
        return
    if lines:
        notice(f"the text after the last {TRIGGER} was not completed: end it with a line {TRIGGER}")


if __name__ == "__main__":
    entry(main)
