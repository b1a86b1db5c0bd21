"""
What the user sees during slow work: a progress bar, or one status line that is rewritten in place.
In a log file the bar becomes a single line at the end and the status line an occasional line.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nanochat.base.common import duration, human, notice, print0, rank

PATIENCE = 1.0  # seconds of work before a bar appears; shorter work shows nothing at all


class ProgressBar:
    """The bar that `progress` yields; `note` is free text shown behind the figures."""

    def __init__(self, total: float | None, description: str, unit: str):
        self.total, self.description, self.unit = total, description, unit
        self.completed, self.note, self.started = 0.0, "", time.monotonic()
        self._bar = None

    @property
    def figures(self) -> str:
        """'12.6M of 30M bytes, 3.1M tokens'"""
        total = f" of {human(self.total)}" if self.total else ""
        note = f", {self.note}" if self.note else ""
        return f"{human(self.completed)}{total} {self.unit}{note}"

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Report `amount` more units of work."""
        self.update(self.completed + amount, note=note)

    def update(self, completed: float, total: float | None = None, note: str = "") -> None:
        """Report how much is completed, and the total if it has only become known now."""
        self.completed, self.note = completed, note or self.note
        self.total = self.total if total is None else total
        if self._bar is None and rank() == 0 and time.monotonic() - self.started > PATIENCE:
            self._bar = _open_bar(self.description, self.total)
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=self.completed,
                total=self.total,
                figures=self.figures,
            )


def _open_bar(description: str, total: float | None):
    """A started rich.progress.Progress on standard error; it shows nothing outside a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task(description, total=total, figures="")
    bar.start()
    return bar


@contextmanager
def progress(total: float | None, description: str, unit: str = "items") -> Iterator[ProgressBar]:
    """
    A progress bar on standard error while the block runs, on rank 0 only; `total` is None when it
    is unknown. Work that took longer than a second leaves one closing line with its figures.

        with progress(len(files), "reading", "files") as bar:
            for file in files:
                bar.advance()
    """
    bar = ProgressBar(total, description, unit)
    try:
        yield bar
    finally:
        if bar._bar is not None:
            bar._bar.stop()
    if bar._bar is not None:
        notice(f"{description}: {bar.figures} in {duration(time.monotonic() - bar.started)}")


class StatusLine:
    """
    One line about work in progress: rewritten in place on a terminal, at most every `live_seconds`;
    otherwise printed at most every `log_seconds`. Only rank 0 prints.
    """

    def __init__(self, live_seconds: float = 0.2, log_seconds: float = 10.0):
        self.live = sys.stdout.isatty()
        self.interval = live_seconds if self.live else log_seconds
        self.shown_at = float("-inf")

    @property
    def due(self) -> bool:
        """Whether `show` would print now; ask first if the text is costly to make."""
        return time.monotonic() - self.shown_at >= self.interval

    def show(self, text: str) -> None:
        """Replace the line by `text`, unless the last change is too recent."""
        if self.due:
            self.shown_at = time.monotonic()
            print0(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n")

    def print(self, text: str) -> None:
        """Print a line that stays; the next status appears below it."""
        print0(f"\r\033[K{text}" if self.live else text)
