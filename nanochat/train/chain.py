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
from nanochat.base.common import UserError, base_dir, duration, human, notice, print0
from nanochat.base.files import atomic_write, reserved
from nanochat.model.stages import STAGES, lock_file, run_directory, step_folders
from nanochat.train.knobs import MachineKnobs

T = TypeVar("T")
USUAL = 0.45  # of the peak of matrix products is what training reaches
SAVE_SECONDS = 60.0  # between two notes of the time that a step has taken


def begun(stage: str, tag: str) -> bool:
    """Whether a stage has a step that a later start continues from, or is being trained now."""
    run = run_directory(stage, tag)
    return reserved(lock_file(run)) or any(int(folder.name[5:]) for folder in step_folders(run))


class Diary:
    """
    What is planned and which steps are done, in a file: the same command continues. UserError for
    a tag that cannot be a folder's name, or that has models of which there is no diary.
    """

    def __init__(self, folder: str, tag: str, seconds_used: float = 0.0):
        runs = [run_directory(stage, tag) for stage in STAGES]
        self.tag, self.path = tag, base_dir() / folder / f"{tag}.json"
        if not self.path.exists() and (other := next(filter(step_folders, runs), None)):
            raise UserError(
                f"{other} holds a model that nanochat {folder} has not trained: choose another "
                "--model_tag=NAME"
            )
        self.log = self.path.with_suffix(".log")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.lengths: dict[str, str] = stored.get("lengths", {})  # flags by stage
        self.notes: dict[str, Any] = stored.get("notes", {})  # what else a command decided
        self.done: list[str] = stored.get("done", [])
        self._forget_what_is_gone()
        self.earlier: float = stored.get("seconds", 0.0) + seconds_used
        self.began = time.monotonic()

    def _forget_what_is_gone(self) -> None:
        """Stages whose models were deleted, and all that followed, are no longer done."""
        there = [bool(step_folders(run_directory(s, self.tag))) for s in self.done if s in STAGES]
        if not there or there[-1]:
            return
        last = max((i for i, found in enumerate(there) if found), default=-1)
        gone = [s for s in self.done if s in STAGES][last + 1]
        notice(f"the model of {STAGES[gone].command} was deleted: training goes on from there")
        self.done = self.done[: self.done.index(gone)]
        self.lengths = {stage: self.lengths[stage] for stage in self.lengths if stage in self.done}

    @property
    def seconds(self) -> float:
        """The time of all starts together."""
        return self.earlier + time.monotonic() - self.began

    def save(self) -> None:
        names = "lengths", "notes", "done"
        content = {"seconds": round(self.seconds, 1)} | {n: getattr(self, n) for n in names}
        atomic_write(self.path, json.dumps(content, indent=1))

    def replan(self) -> None:
        """
        Forget the lengths of the stages that have not begun, because the budget has changed; says
        of the one under way that it keeps its own.
        """
        for stage in [stage for stage in self.lengths if stage not in self.done]:
            if begun(stage, self.tag):
                notice(
                    f"{STAGES[stage].command} is under way and keeps the length with which it was "
                    f"begun ({self.lengths[stage]}): the new budget counts for what comes after it"
                )
            else:
                self.forget(stage)

    def forget(self, stage: str) -> None:
        """Forget the length of a stage that has not begun; a run without a step is set aside."""
        from nanochat.model.checkpoint import new_run

        del self.lengths[stage]
        if step_folders(directory := run_directory(stage, self.tag)):
            with (
                self.log.open("a", encoding="utf-8") as log,
                contextlib.redirect_stderr(log),
                new_run(directory),
            ):
                pass  # the stage itself opens it


class Display:
    """One line per step on the terminal; everything else is printed to the log file."""

    def __init__(self, log: Path, keep: Callable[[], None] = lambda: None):
        self.terminal, self.log = sys.stdout, log
        self.keep = keep  # called now and then during a step
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
            kept = began
            while not over.wait(self.interval):
                self.write(self.state(title, time.monotonic() - began, directory), self.live)
                if time.monotonic() > kept + SAVE_SECONDS:
                    kept = time.monotonic()
                    with contextlib.suppress(UserError):  # the step itself meets a full disk
                        self.keep()

        watcher, outcome = threading.Thread(target=watch, daemon=True), "stopped after"
        self.write(f"{title:<14} starting", self.live)
        watcher.start()
        try:
            with (
                self.log.open("a", encoding="utf-8") as log,
                contextlib.redirect_stdout(log),
                contextlib.redirect_stderr(log),
            ):
                yield
            outcome = "done in"
        finally:
            over.set()
            watcher.join()
            if not isinstance(sys.exception(), KeyboardInterrupt):  # of which the chain tells
                self.write(f"{title:<14} {outcome} {duration(time.monotonic() - began)}")

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
        """Write a line; the next one replaces it if `replaced`. A lost terminal ends no chain."""
        start, end = ("\r\033[K", "" if replaced else "\n") if self.live else ("", "\n")
        print0(text, prefix=start, end=end, file=self.terminal)


class Chain:
    """The steps of a command that trains several stages; those in its diary are not repeated."""

    def __init__(self, diary: Diary):
        self.diary, self.display = diary, Display(diary.log, diary.save)
        diary.save()

    def step(
        self,
        name: str,
        title: str,
        work: Callable[[], T],
        directory: Path | None = None,
        noted: Callable[[T], dict[str, Any]] = lambda result: {},
    ) -> T | None:
        """
        Do the work of a step unless it is done, and note it with what is to be `noted` of its
        result; the result, or None if it was done before. `directory`: of the run that it trains.
        KeyboardInterrupt if a signal came when a stage was at its end: the next one does not begin.
        """
        if name in self.diary.done:
            return None
        try:
            with self.display.working(title, directory):
                result = work()
            self.diary.notes |= noted(result)
            self.diary.done.append(name)
            if isinstance(result, dict) and result.get("signal"):
                raise KeyboardInterrupt
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
        try:
            self.step(stage, title, work, run_directory(stage, tag))
        except UserError:
            if not begun(stage, tag):  # the length may be the reason
                self.diary.forget(stage)
                self.diary.save()
            raise
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
