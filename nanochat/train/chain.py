"""
Several stages one after another in one process, for the commands quickstart and mine: a chain. The
terminal shows one line per step, and everything else is printed to a log file. A diary on disk
says which steps are done: started again after an interruption, the same command continues.
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
from nanochat.base.files import reserved, write_json
from nanochat.base.hardware import OtherPrograms
from nanochat.model.stages import STAGES, lock_file, run_directory, step_folders
from nanochat.train.knobs import MachineKnobs

T = TypeVar("T")
USUAL = 0.45  # what training reaches, as a share of the peak of matrix products
SAVE_SECONDS = 60.0  # between two saves of the diary while a step is at work


def begun(stage: str, tag: str) -> bool:
    """Whether a stage is being trained now, or has a checkpoint after its first step."""
    run = run_directory(stage, tag)
    return reserved(lock_file(run)) or any(int(folder.name[5:]) for folder in step_folders(run))


class Diary:
    """
    A file that keeps what a chain has planned and which of its steps are done. UserError for a tag
    that cannot be the name of a folder, or that has models which no such chain has trained.
    """

    def __init__(self, folder: str, tag: str, seconds_used: float = 0.0):
        runs = [run_directory(stage, tag) for stage in STAGES]
        self.tag, self.path = tag, base_dir() / folder / f"{tag}.json"
        if not self.path.exists() and (other := next(filter(step_folders, runs), None)):
            raise UserError(
                f"{other} holds a model that nanochat {folder} has not trained: choose another "
                "name with --model_tag=NAME"
            )
        self.log = self.path.with_suffix(".log")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stored = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.lengths: dict[str, str] = stored.get("lengths", {})  # stage -> flags of its length
        self.notes: dict[str, Any] = stored.get("notes", {})  # what else a command decided
        self.done: list[str] = stored.get("done", [])  # names of steps
        self.earlier: float = stored.get("seconds", 0.0) + seconds_used
        if self._forget_deleted_models():
            self.earlier = seconds_used
        self.began = time.monotonic()

    def _forget_deleted_models(self) -> bool:
        """
        The last stages, if their models were deleted, are no longer done, nor is what follows them.
        Returns whether all models were deleted: then the clock of the chain starts again.
        """
        deleted = ""
        for stage in reversed([step for step in self.done if step in STAGES]):
            if step_folders(run_directory(stage, self.tag)):
                break
            deleted = stage
        if deleted:
            notice(f"the model of {STAGES[deleted].command} was deleted: training it again")
            self.done = self.done[: self.done.index(deleted)]
            self.lengths = {s: flags for s, flags in self.lengths.items() if s in self.done}
        return bool(deleted) and not any(step in STAGES for step in self.done)

    @property
    def seconds(self) -> float:
        """Seconds that the chain has taken, including earlier starts."""
        return self.earlier + time.monotonic() - self.began

    def save(self) -> None:
        content = {
            "seconds": round(self.seconds, 1),
            "lengths": self.lengths,
            "notes": self.notes,
            "done": self.done,
        }
        write_json(self.path, content)

    def replan(self) -> None:
        """
        After a change of the budget, forget the lengths of the stages that have not begun. A notice
        says that one under way keeps its length.
        """
        for stage in [stage for stage in self.lengths if stage not in self.done]:
            if begun(stage, self.tag):
                notice(
                    f"{STAGES[stage].command} is under way and keeps the length with which it was "
                    f"begun ({self.lengths[stage]}): the new budget is for the stages after it"
                )
            else:
                self.forget(stage)

    def forget(self, stage: str) -> None:
        """
        Forget the length of a stage that has not begun. Its folder, with a checkpoint from before
        the first step, is set aside if there is one.
        """
        from nanochat.model.checkpoint import new_run

        del self.lengths[stage]
        if step_folders(directory := run_directory(stage, self.tag)):
            with (
                self.log.open("a", encoding="utf-8") as log,
                contextlib.redirect_stderr(log),
                new_run(directory),
            ):
                pass  # the stage will open the new run


class Display:
    """One line per step on the terminal; everything else is printed to the log file."""

    def __init__(self, log: Path, save_diary: Callable[[], None] = lambda: None):
        self.terminal, self.log = sys.stdout, log
        self.save_diary = save_diary  # called every SAVE_SECONDS during a step
        self.live = self.terminal.isatty()
        self.interval = 0.5 if self.live else 30.0  # seconds between two states of a line
        self.warned = False  # of other programs that use the CPUs
        self.first: dict[str, Any] = {}  # the first row of the logbook seen in the current step

    @contextlib.contextmanager
    def working(self, title: str, directory: Path | None = None) -> Iterator[None]:
        """
        While the block runs, show the progress of the run in `directory`, if there is one. What the
        block prints goes to the log file.
        """
        began, over = time.monotonic(), threading.Event()
        self.first = {}

        def watch() -> None:
            import torch

            saved, others = began, OtherPrograms()
            while not over.wait(self.interval):
                if not self.warned and (warning := others.warning()):
                    self.warned = True
                    if not torch.accelerator.is_available():
                        self.write(f"notice: {warning}")
                self.write(self.state(title, time.monotonic() - began, directory), self.live)
                if time.monotonic() > saved + SAVE_SECONDS:
                    saved = time.monotonic()
                    with contextlib.suppress(UserError):  # a full disk also stops the step itself
                        self.save_diary()

        watcher = threading.Thread(target=watch, daemon=True)
        outcome = "stopped after"
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
            if not isinstance(sys.exception(), KeyboardInterrupt):  # then Chain.step says so
                self.write(f"{title:<14} {outcome} {duration(time.monotonic() - began)}")

    def state(self, title: str, seconds: float, directory: Path | None) -> str:
        """The line of a step at work: for training, with a bar, the speed and the time left."""
        if directory is None:
            return f"{title:<14} working, {duration(seconds)}"
        row = logbook.newest(directory, "train")
        if not row:
            return f"{title:<14} starting, {duration(seconds)}"
        self.first = self.first or row
        progress = row["progress"]
        gained = progress - self.first["progress"]
        bar = ("#" * round(20 * progress)).ljust(20, ".")
        line = f"{title:<14} [{bar}] {progress:4.0%}  {human(row['tok_per_sec'])} tokens per second"
        if gained <= 0:
            return line
        # Measured since the first row, because the time before it includes compiling
        seconds_left = (row["seconds"] - self.first["seconds"]) * (1 - progress) / gained
        return f"{line}, {duration(seconds_left)} left"

    def write(self, text: str, replaced: bool = False) -> None:
        """
        Write a line, which the next one replaces if `replaced`. A chain continues if its terminal
        is closed.
        """
        start, end = ("\r\033[K", "" if replaced else "\n") if self.live else ("", "\n")
        print0(text, prefix=start, end=end, file=self.terminal)


class Chain:
    """Does the steps of a command, except those that its diary lists as done."""

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
        Do the work of a step and enter it in the diary; returns the result, or None if the step was
        done before. directory: of the run that it trains. noted: maps the result to what is added
        to the diary's notes. KeyboardInterrupt if a signal came when a stage had trained its last
        step, so that the next stage does not begin.
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
        Run a stage to its end, or continue it, with these flags and, from the diary, those of its
        length. Returns False if it was done before.
        """
        flags = flags.split() if isinstance(flags, str) else flags
        argv = [f"--model_tag={tag}", "--resume=auto", *self.diary.lengths[stage].split()]
        argv += [f"--{name}={getattr(knobs, name)}" for name in ("device_type", "dtype", "seed")]
        done = stage in self.diary.done
        try:
            self.step(stage, title, lambda: command([*argv, *flags]), run_directory(stage, tag))
        except UserError:
            if not begun(stage, tag):  # its length may be the reason: plan it again next time
                self.diary.forget(stage)
                self.diary.save()
            raise
        return not done


def expected_speed(knobs: MachineKnobs, **shape: Any) -> tuple[float, float]:
    """
    (tokens per second, FLOP/s of matrix products) to expect on this machine when training a model
    whose shape is given as fields of GPTConfig.
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
