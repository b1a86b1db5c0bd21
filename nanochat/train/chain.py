"""
Stages one after another in one process, as the commands quickstart and mine train them: a line per
stage on the terminal, everything else in a log file, and a diary from which the same command
continues after an interruption.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nanochat.base import logbook
from nanochat.base.common import base_dir, duration, human, printable
from nanochat.base.files import atomic_write
from nanochat.model.stages import run_directory
from nanochat.train.knobs import MachineKnobs

T = TypeVar("T")
USUAL = 0.45  # of the peak of matrix products is what training reaches


class Diary:
    """What is planned and which steps are done, in a file: the same command continues."""

    def __init__(self, folder: str, tag: str, seconds_used: float = 0.0):
        self.path = base_dir() / folder / f"{tag}.json"
        self.log = self.path.with_suffix(".log")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.lengths: dict[str, str] = stored.get("lengths", {})  # flags by stage
        self.notes: dict[str, Any] = stored.get("notes", {})  # what else a command decided
        self.done: list[str] = stored.get("done", [])
        self.earlier: float = stored.get("seconds", 0.0) + seconds_used
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time of all starts together."""
        return self.earlier + time.monotonic() - self.began

    def save(self) -> None:
        names = "lengths", "notes", "done"
        content = {"seconds": round(self.seconds, 1)} | {n: getattr(self, n) for n in names}
        atomic_write(self.path, json.dumps(content, indent=1))


class Display:
    """One line per step on the terminal; everything else is printed to the log file."""

    def __init__(self, log: Path):
        self.terminal, self.log = sys.stdout, log
        self.live = self.terminal.isatty()
        self.interval = 0.5 if self.live else 30.0  # seconds between two states of a line
        self.first: dict[str, Any] = {}  # row of the log that the current step showed first

    @contextlib.contextmanager
    def working(self, title: str, directory: Path | None = None) -> Iterator[None]:
        """
        While the block runs, show how far the training in `directory` is; what the block prints
        goes to the log file.
        """
        began, over = time.monotonic(), threading.Event()
        self.first = {}

        def watch() -> None:
            while not over.wait(self.interval):
                self.write(self.state(title, time.monotonic() - began, directory), self.live)

        watcher = threading.Thread(target=watch, daemon=True)
        self.write(f"{title:<14} starting", self.live)
        watcher.start()
        try:
            with (
                self.log.open("a", encoding="utf-8") as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
            ):
                yield
        finally:
            over.set()
            watcher.join()
        self.write(f"{title:<14} done in {duration(time.monotonic() - began)}")

    def state(self, title: str, seconds: float, directory: Path | None) -> str:
        """The line of a step at work: a bar, its speed and what is left."""
        if directory is None:
            return f"{title:<14} working, {duration(seconds)}"
        row = logbook.newest(directory, "train")
        if not row:
            return f"{title:<14} starting, {duration(seconds)}"
        # The first row's time is left out, because compiling is part of it
        self.first = self.first or row
        progress = row["progress"]
        gained = progress - self.first["progress"]
        full = round(20 * progress)
        bar = "#" * full + "." * (20 - full)
        line = f"{title:<14} [{bar}] {progress:4.0%}  {human(row['tok_per_sec'])} tokens per second"
        if gained <= 0:
            return line
        left = (row["seconds"] - self.first["seconds"]) * (1 - progress) / gained
        return f"{line}, {duration(left)} left"

    def write(self, text: str, replaced: bool = False) -> None:
        """Write a line; the next one replaces it if `replaced`."""
        start, end = ("\r\033[K", "" if replaced else "\n") if self.live else ("", "\n")
        self.terminal.write(start + printable(text) + end)
        self.terminal.flush()


class Chain:
    """The steps of a command that trains several stages; those in its diary are not repeated."""

    def __init__(self, diary: Diary):
        self.diary, self.display = diary, Display(diary.log)
        diary.save()

    def step(
        self, name: str, title: str, work: Callable[[], T], directory: Path | None = None
    ) -> T | None:
        """
        Do the work of a step unless it is done, and note it; the result of the work, or None if it
        was done before. `directory`: of the run that it trains.
        """
        if name in self.diary.done:
            return None
        try:
            with self.display.working(title, directory):
                result = work()
            self.diary.done.append(name)
        except KeyboardInterrupt:
            self.display.write("stopped: the same command continues here")
            raise
        finally:
            self.diary.save()
        return result

    def train(
        self,
        stage: str,
        title: str,
        command: Callable[[Sequence[str]], object],
        knobs: MachineKnobs,
        tag: str,
        flags: str | Sequence[str],
    ) -> bool:
        """
        Run a stage to its end, or continue it, with the flags and those of its length in the diary;
        whether there was anything to do.
        """
        flags = flags.split() if isinstance(flags, str) else flags
        argv = [f"--model_tag={tag}", "--resume=auto", *self.diary.lengths[stage].split()]
        argv += [f"--{name}={getattr(knobs, name)}" for name in ("device_type", "dtype", "seed")]
        work = lambda: command([*argv, *flags])  # noqa: E731
        done = stage in self.diary.done
        self.step(stage, title, work, run_directory(stage, tag))
        return not done


def expected_speed(knobs: MachineKnobs, **shape: Any) -> tuple[float, float]:
    """
    (tokens per second of training, FLOP/s of matrix products): what to expect here of a model of
    this shape, given as fields of GPTConfig.
    """
    import torch

    from nanochat.base.hardware import measured_peak
    from nanochat.base.runtime import close_runtime, open_runtime
    from nanochat.model.config import GPTConfig
    from nanochat.model.gpt import GPT

    runtime = open_runtime(knobs.device_type, knobs.dtype, knobs.seed)
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
    peak = measured_peak(runtime.device, runtime.dtype)
    close_runtime()
    return USUAL * peak / model.flops_per_token(), peak
