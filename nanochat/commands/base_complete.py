"""
Go on with text as a base model does: type lines, and a line ### completes them.

The model is loaded once. Every completion begins with an empty input; Ctrl+C leaves at any time. Works with piped text alike.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.base import knobs
from nanochat.base.common import entry, notice
from nanochat.base.knobs import knob
from nanochat.commands.chat_cli import (
    CONTROL,
    GREY,
    NORMAL,
    ModelKnobs,
    asker,
    completion,
    forgiving_streams,
    open_engine,
    terminal,
)

TRIGGER = "###"


@dataclass(kw_only=True)
class Knobs(ModelKnobs):
    """Completion"""

    source: Literal["base", "mid", "sft", "rl"] = knob("base", "stage of the model", alias="-i")
    temperature: float = knob(0.8, "0 = always the likeliest token", alias="-t", low=0)


def typed(ask: Callable[[], str]) -> Iterator[str]:
    """Lines of a terminal; one paste may bring several."""
    while True:
        try:
            yield from ask().split("\n")
        except EOFError:
            return


def piped() -> Iterator[str]:
    """Lines of standard input, shown as a terminal would show them typed."""
    for line in sys.stdin:
        print(f"> {line.rstrip()}", flush=True)
        yield line.rstrip("\r\n")


def main(argv: Sequence[str] | None = None) -> None:
    k, _ = knobs.parse(
        Knobs, argv, command="base_complete", description="Type lines; a line ### completes them."
    )
    engine, loaded = open_engine(k, k.source)
    forgiving_streams()
    live = terminal()
    grey, normal = (GREY, NORMAL) if live else ("", "")
    print(
        f"{grey}{loaded.describe()}. A line {TRIGGER} completes the lines before it; then the next text begins. Ctrl+C leaves.{normal}",
        flush=True,
    )
    lines: list[str] = []
    turn = 0
    try:
        for line in (
            typed(asker("> ", "complete_history", {"": "ansibrightblack"})) if live else piped()
        ):
            if line.strip() != TRIGGER:
                lines.append(line)
                continue
            if not "".join(lines).strip():
                notice(f"there is no text before {TRIGGER}: type some lines first")
                continue
            for piece in completion(engine, "\n".join(lines), k.sampling(turn)):
                print(CONTROL.sub("", piece) if live else piece, end="", flush=True)
            print("\n", flush=True)
            lines, turn = [], turn + 1
    except KeyboardInterrupt:
        print(flush=True)
        return
    if lines:
        notice(f"the last {len(lines)} lines were not completed: end them with a line {TRIGGER}")


if __name__ == "__main__":
    entry(main)
