"""
What the user sees during slow work: a progress bar, or one status line that is rewritten in place.
In a log file there is a line at the end instead of a bar, and the status line is printed now and
then.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from nanochat.base.common import duration, human, in_line, notice, print0, printable, rank

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE = 2.0  # seconds; shorter work leaves no line behind


class ProgressBar:
    """The bar that `progress` yields."""

    def __init__(self, total: float | None, description: str, unit: str):
        self.total, self.unit = total, unit
        self.completed, self.note, self.started = 0.0, "", time.monotonic()
        self.display = _open_display(description) if sys.stderr.isatty() and rank() == 0 else None

    def __str__(self) -> str:
        """'12.6M of 30M bytes, 3.1M tokens'"""
        total = f" of {human(self.total)}" if self.total else ""
        note = f", {self.note}" if self.note else ""
        return f"{human(self.completed)}{total} {self.unit}{note}"

    def advance(self, amount: float = 1) -> None:
        """Report that `amount` more is completed."""
        self.update(self.completed + amount)

    def update(self, completed: float, total: float | None = None, note: str = "") -> None:
        """
        Report how much is completed. `total` sets a total that was unknown until now; `note` is
        text to show after the figures.
        """
        self.completed, self.note = completed, note or self.note
        self.total = self.total if total is None else total
        if self.display is not None:
            task = self.display.task_ids[0]
            self.display.update(
                task, completed=self.completed, total=self.total, figures=printable(in_line(self))
            )


def _open_display(description: str) -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    display = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a file or pipe gets its lines as usual
    )
    display.add_task(printable(in_line(description)), total=None, figures="")
    display.start()
    return display


@contextmanager
def progress(total: float | None, description: str, unit: str = "items") -> Iterator[ProgressBar]:
    """
    A progress bar on standard error while the block runs, on rank 0 only; outside a terminal it
    shows nothing. Work of more than PATIENCE leaves a closing line. `total` may be unknown (None).

        with progress(len(files), "reading", "files") as bar:
            for file in files:
                bar.advance()
    """
    bar = ProgressBar(total, description, unit)
    try:
        yield bar
    finally:
        if bar.display is not None:
            with suppress(OSError):  # the terminal may be gone
                bar.display.stop()
    seconds = time.monotonic() - bar.started
    if seconds > PATIENCE:
        notice(f"{description}: {bar} in {duration(seconds)}")


class StatusLine:
    """
    One line about work in progress: rewritten in place on a terminal, at most every `live_seconds`;
    otherwise printed at most every `log_seconds`. Only rank 0 prints.
    """

    def __init__(self, live_seconds: float = 0.2, log_seconds: float = 10.0):
        self.live = sys.stdout.isatty()
        self.interval = live_seconds if self.live else log_seconds
        self.shown_at = float("-inf")
        self._clear = "\r\033[K" if self.live else ""  # empties the line

    @property
    def due(self) -> bool:
        """Whether `show` would print now; ask first if the text is costly to make."""
        return time.monotonic() - self.shown_at >= self.interval

    def show(self, text: str) -> None:
        """Replace the line by `text`, unless the last change is too recent."""
        if self.due:
            self.shown_at = time.monotonic()
            print0(text, prefix=self._clear, end="" if self.live else "\n")

    def print(self, text: str) -> None:
        """Print a line that stays; the next status appears below it."""
        print0(text, prefix=self._clear)
