"""
Continue text with a model: type lines, then a line ### to complete them.

The model is loaded once. Each completion starts from an empty input. Ctrl+C stops a completion or
clears a line; twice on an empty line, it exits. Also works with piped text.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.base.common import entry, notice, opening, print0
from nanochat.base.knobs import knob, parse
from nanochat.chat.terminal import Prompt, Screen, in_terminal
from nanochat.commands.chat_cli import GenerationKnobs, Speed, full_remark, show_continuation

TRIGGER = "###"


@dataclass(kw_only=True)
class CompleteKnobs(GenerationKnobs):
    """Completion"""

    source: Literal["base", "mid", "sft", "rl"] = knob("base", "stage of the model", alias="-i")
    temperature: float = knob(
        0.8, "sampling temperature (0 = always the likeliest token)", alias="-t", low=0
    )


def typed_lines() -> Iterator[str]:
    """Lines that are typed in a terminal; pasted text may have several."""
    style = {"": "ansibrightblack"}
    for text in Prompt("> ", "complete_history", style, continued=False):
        yield from text.split("\n")


def piped_lines() -> Iterator[str]:
    """Lines from standard input, printed as they would look if typed."""
    for line in sys.stdin:
        print0(f"> {line.rstrip()}")
        yield line.rstrip("\r\n")


def main(argv: Sequence[str] | None = None) -> None:
    options, _ = parse(
        CompleteKnobs,
        argv,
        command="base_complete",
        description=f"Type lines, then a line {TRIGGER} to complete them.",
    )
    opening("base_complete")
    engine, loaded = options.load(options.source)
    interactive = in_terminal()
    screen = Screen(interactive)
    guide = f"{loaded.describe()}. A line {TRIGGER} completes the lines before it."
    if interactive:
        screen.remark(f"{guide} Ctrl+D exits.")
    else:
        print0(guide)
    lines: list[str] = []
    turn = 0
    for line in typed_lines() if interactive else piped_lines():
        if line.strip() != TRIGGER:
            lines.append(line)
            continue
        text, lines = "\n".join(lines), []
        if not text.strip():
            notice(f"there is no text before {TRIGGER}: type some lines first")
            continue
        try:
            finish = show_continuation(screen, engine, text, options.sampling(turn), Speed())
        except KeyboardInterrupt:
            screen.remark("[stopped]")
            if not interactive:
                return
        else:
            if finish == "context":
                screen.remark(full_remark(engine.model.config.sequence_len))
        print0()
        turn += 1
    if lines:
        notice(f"the text after the last {TRIGGER} was not completed: end it with a line {TRIGGER}")


if __name__ == "__main__":
    entry(main)
