"""
Run the conditions of a comparison, each run by base_train in a process of its own, and time them.
All files are in compare/NAME under the base folder; for the runs, that is the base folder. After an
interruption, a comparison continues where it stopped; one process at a time may work on it.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import IO, Any, NamedTuple

from nanochat.base import files, logbook
from nanochat.base.commands import module_process
from nanochat.base.common import UserError, base_dir, duration, notice, print0
from nanochat.base.progress import StatusLine
from nanochat.base.strangers import mismatch, read_json
from nanochat.data.shards import prepare
from nanochat.data.sources import training_sources
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.checkpoint import list_checkpoints
from nanochat.study.comparison_page import write_comparison
from nanochat.study.conditions import Condition
from nanochat.study.records import at_speed, read_records, record
from nanochat.study.statistics import Record, Result, analyse
from nanochat.train import compiler

SHARED = ("tokenizer", "tokens", "shards")  # folders of the user's base folder that runs read
LONGEST_NAME = 200  # characters of a folder
ESTIMATE_STEPS, RETIME_STEPS = 6, 30  # steps that are run to time a condition


class Timing(NamedTuple):
    """How long a condition takes, as measured in its first steps."""

    run_seconds: float
    step_ms: float


class Comparison:
    """A comparison and its folder: the conditions, the finished runs, and the results."""

    def __init__(self, knobs: Any, conditions: list[Condition]):
        """`knobs` are those of compare. Raises UserError if the folder has other conditions."""
        self.conditions, self.keep = conditions, knobs.keep
        self.target = None if knobs.target == "auto" else float(knobs.target)
        self.name = knobs.name or "-vs-".join(condition.name for condition in conditions)
        if len(self.name) > LONGEST_NAME:
            raise UserError(
                f"the names of {len(conditions)} conditions are too long for a folder together: "
                "give it one with --name"
            )
        self.folder = (base_dir() / "compare" / self.name).resolve()
        n = len(conditions)
        # With each seed another condition comes first, so that none has an advantage if the speed
        # of the machine drifts
        self.schedule = [
            (conditions[(i + j) % n], knobs.first_seed + i)
            for i in range(knobs.seeds)
            for j in range(n)
        ]
        self.records: dict[tuple[str, int], Record] = {}  # by condition and seed
        stored = self._stored_flags()
        for condition in conditions:
            flags = stored.setdefault(condition.name, condition.flags)
            if flags != condition.flags:
                raise UserError(
                    f"the condition {condition.name} of {self.name} was started with "
                    f"{shlex.join(flags)}, not {shlex.join(condition.flags)}: rename the "
                    "condition with --names, or choose another --name"
                )
        self.flags = stored  # by condition, also of those that are not compared now

    def _stored_flags(self) -> dict[str, list[str]]:
        """The flags of every condition in the folder; also reads the finished runs."""
        file = self.folder / "conditions.json"
        if not file.exists():
            return {}
        for run in read_records(self.folder / "runs.jsonl"):
            self._add(run)
        try:
            flags = read_json(file)
            if fault := mismatch(flags, {str: [str]}, "conditions"):
                raise ValueError(fault)
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read {file} ({e}): choose another --name") from e
        return flags

    def _add(self, run: Record) -> None:
        self.records[run["condition"], run["seed"]] = run

    def _finished(self, names: Collection[str]) -> list[Record]:
        """The finished runs of these conditions, in the order in which they were made."""
        runs = self.records.values()
        return [run for run in runs if run["condition"] in names and not run.get("error")]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """
        Reserve the folder for this process and its runs; a run that outlives this process keeps it
        reserved. Inside, SIGTERM acts as Ctrl+C does.
        """
        busy = (
            f"{self.name} is being compared by another process, or its last run is still saving: "
            "wait for it, or stop it"
        )
        with files.locked(self.folder / "lock", busy) as self.lock:
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                yield
            finally:
                signal.signal(signal.SIGTERM, before)

    @property
    def missing(self) -> list[tuple[Condition, int]]:
        """The runs, (condition, seed), that are still to be made, in order."""
        done = {key for key, run in self.records.items() if not run.get("again")}
        return [(c, seed) for c, seed in self.schedule if (c.name, seed) not in done]

    def _mean_seconds(self, condition: Condition) -> float:
        """Wall-clock seconds of this condition's finished runs, on average; 0 without any."""
        runs = self._finished([condition.name])
        return fmean(run["wall_seconds"] for run in runs) if runs else 0.0

    def write(self) -> Result:
        """Write all files of the comparison; returns its results."""
        rows = "".join(json.dumps(run) + "\n" for run in self.records.values())
        files.atomic_write(self.folder / "runs.jsonl", rows)
        files.write_json(self.folder / "conditions.json", self.flags)
        scheduled = {(condition.name, seed) for condition, seed in self.schedule}
        runs = [run for key, run in self.records.items() if key in scheduled]
        flags = {condition.name: shlex.join(condition.flags) for condition in self.conditions}
        results = {
            "name": self.name,
            "runs_planned": len(self.schedule),
            "runs_finished": len(runs),
            **analyse(runs, flags, self.target),
        }
        files.write_json(self.folder / "results.json", results)
        write_comparison(self.name, results, runs, self.folder / "report.html")
        return results

    # ---- runs

    def run_missing(self) -> None:
        """Make every run that is missing, and update the files after each."""
        missing, status = self.missing, StatusLine(live_seconds=5, log_seconds=30)
        first = len(self.schedule) - len(missing) + 1
        self.write()
        warm = set()
        for i, (condition, seed) in enumerate(missing):
            status.print(f"run {first + i} of {len(self.schedule)}: {condition.name}, seed {seed}")
            compiles = condition.budget_seconds and condition.knobs.compile != "off"
            if compiles and condition.name not in warm:
                status.print(
                    "  a trial run first, so that compilation does not count towards this run"
                )
                self.time_steps(condition, seed, ESTIMATE_STEPS)
                warm.add(condition.name)
            run = self.train(condition, seed, status, missing[i + 1 :])
            self._add(run)
            self.write()
            if not self.keep and not run.get("again"):
                for checkpoint in list_checkpoints(self._directory(self.folder, condition, seed)):
                    shutil.rmtree(checkpoint.path)
            figures = "{final_bpb:.4f} bits per byte, {step_ms:.1f} ms per step"
            status.print(f"  {run.get('error') or figures.format(**run)}")

    @staticmethod
    def _directory(base: Path, condition: Condition, seed: int) -> Path:
        return base / "checkpoints" / "base" / f"{condition.name}-s{seed}"

    def train(
        self,
        condition: Condition,
        seed: int,
        status: StatusLine,
        later: Sequence[tuple[Condition, int]],
    ) -> Record:
        """
        Train one run to its end; returns its record, even if it failed. If interrupted, waits until
        the run is saved. Raises UserError if it took no step, or was refused when it resumed.
        `later`: the runs after it, for the time left.
        """
        inputs, directory = self._inputs(condition), self._directory(self.folder, condition, seed)
        steps_before = steps_written(directory)
        log_file = self.folder / "logs" / f"{directory.name}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(log_file, "ab") as log:
            began = log.tell()
            process = self._start(self.folder, condition, seed, log)
            try:
                while process.poll() is None:
                    time.sleep(0.25)
                    if status.due and (rows := train_rows(directory)):
                        status.show(self._progress(directory.name, rows[-1], later))
            except BaseException:
                notice("saving the run; repeat the same command to resume it")
                process.terminate()  # only once: a second signal would stop it before it has saved
                process.wait()
                raise
        flags = self._all_flags(condition)
        labels = {"condition": condition.name, "seed": seed, "flags": flags, **inputs}
        if process.returncode == 0:
            run = record(directory, **labels)
            if run["final_bpb"] is None:
                run["error"] = "its bits per byte are not a number"
            return run
        error = _failure(log_file, process.returncode, began)
        # Status 2 is an error that would recur, unless the machine lacked something; after any
        # other status, the run is tried again
        lacked = "free some space" in error or "out of memory" in error
        again = process.returncode != 2 or lacked
        refused = not again and steps_written(directory) == steps_before
        if refused or not train_rows(directory):
            raise UserError(f"{directory.name} did not start: {error} (its output: {log_file})")
        return {**labels, "error": error, "again": again}

    def _inputs(self, condition: Condition) -> dict[str, Any]:
        """
        What a run of this condition reads: the fingerprint of the tokenizer, and the SHA-256 of
        each text. UserError if the finished runs have read something else.
        """
        tokenizer, folder = Tokenizer.load(), base_dir() / "tokenizer"
        now = tokenizer.fingerprint
        for run in self._finished([c.name for c in self.conditions]):
            if (before := run.get("tokenizer", now)) != now:
                raise UserError(
                    f"the finished runs of {self.name} have the tokenizer {before[:8]}, but "
                    f"{folder} now holds {now[:8]}: rename that folder to tokenizer_{now[:8]}, and "
                    f"tokenizer_{before[:8]} to tokenizer; or choose another --name"
                )
        knobs = condition.knobs
        sources = training_sources(knobs.data, knobs.skip_bad_rows)
        splits = [(source, split) for source in sources for split in ("train", "val")]
        data = [prepare(source, split, tokenizer).sha256 for source, split in splits]
        for run in self._finished([c.name for c in self.conditions if c.knobs.data == knobs.data]):
            if run.get("data", data) != data:
                raise UserError(
                    f"the text of {condition.name} is not the one that the finished runs of "
                    f"{self.name} have read: restore it, or choose another --name"
                )
        return {"tokenizer": now, "data": data}

    def _progress(self, run: str, row: logbook.Row, later: Sequence[tuple[Condition, int]]) -> str:
        """The status line: the progress of a run, and the time left for it and those after it."""
        whole = row["seconds"] / max(row["progress"], 1e-3)
        seconds = whole - row["seconds"]
        seconds += sum(self._mean_seconds(condition) or whole for condition, _ in later)
        return (
            f"  {run}  {row['progress']:.0%}  loss {row['loss']:.4f}  "
            f"{duration(seconds)} left for all runs"
        )

    def _start(
        self, base: Path, condition: Condition, seed: int, log: IO[bytes]
    ) -> subprocess.Popen:
        """Start base_train with the base folder `base`. It inherits the lock of the comparison."""
        for name in SHARED:
            target, link = base_dir() / name, base / name
            target.mkdir(exist_ok=True)
            if not link.exists():
                link.unlink(missing_ok=True)  # one that points nowhere
                link.symlink_to(os.path.relpath(target.resolve(), base))
        compiler.cache_folder()  # sets the environment: all runs share the user's compiled code
        process = module_process(
            "nanochat.commands.base_train",
            *self._all_flags(condition),
            f"--seed={seed}",
            f"--model_tag={condition.name}-s{seed}",
            "--resume=auto",
            NANOCHAT_BASE_DIR=str(base),
        )
        return subprocess.Popen(
            **process,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(self.lock.fileno(),),
            start_new_session=True,
        )

    def _all_flags(self, condition: Condition) -> list[str]:
        """
        The flags of a condition, and those that fix what base_train would otherwise choose by
        measuring the machine: the values of the first finished run, or for the batch those of the
        first run of this condition.
        """
        automatic = {  # flag -> the conditions for which base_train would choose its value
            name: [c.name for c in self.conditions if getattr(c.knobs, name) == "auto"]
            for name in ("dtype", "compile")
        }
        if condition.budget_seconds and not condition.knobs.total_batch_size:
            automatic["total_batch_size"] = [condition.name]
        flags = list(condition.flags)
        for name, conditions in automatic.items():
            runs = self._finished(conditions)
            if condition.name in conditions and runs:
                flags.append(f"--{name}={runs[0]['pins'][name]}")
        return flags

    # ---- time

    def time_steps(self, condition: Condition, seed: int, steps: int) -> Timing:
        """Run the first steps of a condition to time it, in a folder that is then deleted."""
        self._inputs(condition)
        base = self.folder / "timing"
        directory, log_file = self._directory(base, condition, seed), base / "log"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        try:
            with open(log_file, "wb") as log:
                process = self._start(base, condition, seed, log)
                try:
                    at = first_rows(process, directory, steps)
                finally:
                    process.kill()
                    process.wait()
            if "train" not in at:
                error = _failure(log_file, process.returncode)
                raise UserError(f"condition {condition.name} did not start: {error}")
            step_ms = record(directory)["step_ms"]
        finally:
            shutil.rmtree(base, ignore_errors=True)
        opening, evaluation = at["start"] - at["launch"], at["eval"] - at["start"]
        training = at["train"] - at["eval"] + (condition.steps or 0) * step_ms / 1e3
        estimate = opening + (condition.evaluations + 1) * evaluation + training
        return Timing(condition.budget_seconds or estimate, step_ms)

    def estimate(self) -> dict[str, Any]:
        """
        Print how many runs are missing and how long they take. Deletes the comparison's folder if
        nothing was stored in it yet.
        """
        total, missing = 0.0, self.missing
        try:
            for condition in self.conditions:
                n = sum(c is condition for c, _ in missing)
                seconds = condition.budget_seconds or self._mean_seconds(condition)
                if n and not seconds:
                    seconds = self.time_steps(condition, 0, ESTIMATE_STEPS).run_seconds
                total += n * seconds
                print0(f"  {condition.name}: {n} runs of about {duration(seconds)}")
        finally:
            if not (self.folder / "conditions.json").exists():
                shutil.rmtree(self.folder)
        print0(f"about {duration(total)} in total")
        return {"runs": len(missing), "seconds": total}

    def retime(self, rounds: int) -> None:
        """
        Time every run again: for each seed, the conditions run in turn, `rounds` times. The step
        time of a run becomes the median over the rounds of its seed.
        """
        n = len(self.conditions)
        for i, seed in enumerate(sorted({seed for _, seed in self.schedule})):
            times: dict[str, list[float]] = {condition.name: [] for condition in self.conditions}
            for j in range(rounds):
                for turn in range(n):
                    condition = self.conditions[(i + j + turn) % n]
                    step_ms = self.time_steps(condition, seed, RETIME_STEPS).step_ms
                    times[condition.name].append(step_ms)
                    print0(
                        f"seed {seed}, round {j + 1} of {rounds}: {condition.name}, "
                        f"{step_ms:.1f} ms per step"
                    )
            for run in self._finished(times):
                if run["seed"] == seed:
                    self._add(at_speed(run, median(times[run["condition"]])))


def first_rows(process: subprocess.Popen, directory: Path, steps: int) -> dict[str, float]:
    """
    Watch a run until it has taken so many steps or has ended. Returns, by time.monotonic(), when it
    wrote its first row of each kind, and when this function was called ("launch").
    """
    at = {"launch": time.monotonic()}
    is_running = True
    while is_running:
        is_running = process.poll() is None and len(train_rows(directory)) < steps
        time.sleep(0.05)
        for row in logbook.read(directory):
            at.setdefault(row["kind"], time.monotonic())
    return at


def train_rows(directory: Path) -> list[logbook.Row]:
    """The training rows in the logbook of a run, which may still be going; [] before the first."""
    return [row for row in logbook.read(directory) if row["kind"] == "train"]


def steps_written(directory: Path) -> int:
    """How many steps were ever logged in the folder of a run, those of earlier starts included."""
    file = directory / logbook.FILE
    return file.read_bytes().count(b'"kind": "train"') if file.exists() else 0


def _failure(log_file: Path, status: int, began: int = 0) -> str:
    """Why a run failed, from its exit status and its output, the log from the byte `began` on."""
    lines = log_file.read_bytes()[began:].decode("utf-8", "replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if status < 0:
        return f"ended by signal {-status} (out of memory?)"
    return lines[-1] if lines else f"ended with status {status}"
