"""
The logbook of a run: metrics.jsonl, one row of JSON per line, flushed as it is written, so that a
killed run loses at most its last row. The same numbers are sent to the trackers that the user asks
for (wandb, trackio, tensorboard; optional packages).

Logging never stops training: the failure of a tracker or disk is reported once.
Only rank 0 logs. Numbers that JSON cannot hold (NaN, infinities) are stored as null and repeated
under "nonfinite"; `read` restores them.

    {"kind": "start", "step": 0, "time": "2026-01-31T12:00:00+01:00", "run": "dummy", ...}
    {"kind": "train", "step": 10, "loss": null, "lr_mult": 1.0, "nonfinite": {"loss": "nan"}}
"""

import errno
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from nanochat.base.common import UserError, disk_error, notice, rank
from nanochat.base.strangers import mismatch, missing, open_regular

FILE = "metrics.jsonl"
MOST_LINE = 2**24  # bytes
NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
IDENTITY = ("kind", "step", "stage", "task")  # of rows equal in these, only the last one counts
_NUMBER, _COUNT = (float, None), (int, None)
_SCORE = {"accuracy": _NUMBER, "n": _COUNT, "lo": _NUMBER, "hi": _NUMBER, "chance": _NUMBER}
_ROW = {  # the forms of those fields that some code reads; see strangers.mismatch
    "kind": str,
    "step": _COUNT,
    "stage": str,
    "task": (str, None),
    "tokens": _COUNT,
    "seconds": _NUMBER,
    "progress": _NUMBER,
    "loss": _NUMBER,
    "lr_mult": _NUMBER,
    "tok_per_sec": _NUMBER,
    "peak_share": _NUMBER,
    "val_bpb": _NUMBER,
    "peak_memory_bytes": _COUNT,
    **_SCORE,
    "kinds": {str: _SCORE},
    "tasks": {str: (_SCORE, _NUMBER)},
    "config": {str: object},
    "nonfinite": {str: str},
}
Row = dict[str, Any]  # of metrics.jsonl
# A tracker: (function that logs (kind, step, numbers), function that closes it)
Tracker = tuple[Callable[[str, int | None, dict[str, float]], object], Callable[[], object]]


def _plain(value: Any) -> Any:
    """The value as JSON holds it: tensors as numbers, paths as text, NaN and infinities as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, those of nested dicts as "outer/inner"."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def _service(module: str, directory: Path, run_name: str, config: dict[str, Any]) -> Tracker:
    """wandb, or trackio, which has the same interface."""
    service = importlib.import_module(module)
    folder = {"dir": str(directory)} if module == "wandb" else {}
    run = service.init(project="nanochat", name=run_name, config=config, **folder)

    def log(kind: str, step: int | None, numbers: dict[str, float]) -> None:
        run.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    return log, run.finish


def _tensorboard(directory: Path, config: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"))
    writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def log(kind: str, step: int | None, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(f"{kind}/{name}", value, step)
        writer.flush()

    return log, writer.close


TRACKERS = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "torch.utils.tensorboard"}


def needed_trackers(sinks: Sequence[str], run_name: str) -> list[str]:
    """
    The trackers that a run uses: those named in --sinks, or none while the run's name is "dummy".
    UserError if one is unknown or not installed; rank 0 alone needs them.
    """
    for name in sinks:
        if name not in TRACKERS:
            raise UserError(f"--sinks cannot be {name!r}: choose from {', '.join(TRACKERS)}")
    needed = list(dict.fromkeys(sinks)) if run_name != "dummy" else []
    for name in needed if rank() == 0 else ():
        try:
            importlib.import_module(TRACKERS[name])
        except ImportError as e:
            raise UserError(
                f"{name} is not installed: run pip install {name}, or remove {name} from --sinks"
            ) from e
    return needed


class Logbook(AbstractContextManager["Logbook"]):
    """An open metrics.jsonl, to which `log` appends rows. A context manager."""

    def __init__(
        self,
        directory: Path | str,
        *,
        sinks: Sequence[str] = (),
        run_name: str = "dummy",
        config: Mapping[str, Any] | None = None,
        step: int | None = None,
    ):
        """
        `step` is where training starts: 0, or the step of the checkpoint that it resumes from.
        Rows of later steps, which an earlier attempt wrote, no longer count. With None, rows are
        added to a finished run, as evaluations do. `config` is stored in a row of kind "start".
        `sinks` do nothing while the run's name is "dummy". Raises UserError if the folder cannot be
        written, or if a tracker is unknown, not installed or does not start.
        """
        self.directory = Path(directory)
        self._trackers: dict[str, Tracker] = {}
        self._file: IO[bytes] | None = None
        self._disk_failed, self._start = False, b""  # its row of kind "start"
        sinks = needed_trackers(sinks, run_name)
        if rank() != 0:
            return
        try:
            self._open()
        except OSError as e:
            raise disk_error(self.directory / FILE, e) from e
        settings = _plain(config or {})
        for name in sinks:
            self._trackers[name] = self._open_tracker(name, run_name, settings)
        if config is not None or step is not None:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            start = {
                "kind": "start",
                "step": step,
                "time": now,
                "run": run_name,
                "config": settings,
            }
            self._write(start)
            self._start = _line(start)

    def _open_tracker(self, name: str, run_name: str, config: dict[str, Any]) -> Tracker:
        try:
            if name == "tensorboard":
                return _tensorboard(self.directory, config)
            return _service(name, self.directory, run_name, config)
        except Exception as e:
            raise UserError(
                f"{name} cannot start ({e}): fix that, or remove {name} from --sinks"
            ) from e

    def log(self, step: int | None = None, kind: str = "train", **values: Any) -> None:
        """
        Append a row. Values are numbers, text, or dicts and lists of them; a tensor with one
        element counts as a number.
        """
        if rank() != 0:
            return
        plain = _plain(values)
        row = {"kind": kind, "step": step, **plain}
        lost = {name: v for name, v in values.items() if plain[name] is None and v is not None}
        if lost:
            row["nonfinite"] = {name: str(float(v)) for name, v in lost.items()}
        self._write(row)
        for name, (send, _) in list(self._trackers.items()):
            try:
                send(kind, step, dict(_numbers(plain)))
            except Exception as e:  # of any kind: it must not end the run
                del self._trackers[name]
                notice(
                    f"{name} failed at step {step} and is switched off ({type(e).__name__}: "
                    f"{e}); {FILE} is still written"
                )

    def back_to(self, step: int) -> None:
        """Note that training has returned to `step`: rows of later steps no longer count."""
        if rank() == 0 and self._start:
            self._write({**json.loads(self._start), "step": step})

    def _write(self, row: Row) -> None:
        if self._file is None:
            raise ValueError("this logbook is closed")
        line = _line(row)
        try:
            if not self._exists(self._file):
                notice(f"{self.directory / FILE} was deleted: it is written anew from this step on")
                deleted = self._file
                self._open()
                deleted.close()
                line = self._start + line
            if self._disk_failed:  # the row before may be incomplete
                line = b"\n" + line
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._disk_failed = False
        except OSError as e:
            if not self._disk_failed:
                notice(
                    f"cannot write to {self.directory / FILE} ({e.strerror}): rows are lost; "
                    "free some space"
                )
            self._disk_failed = True

    def _open(self) -> None:
        """Open the file for appending, without a buffer, and drop a partial row at its end."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._file = open(self.directory / FILE, "a+b", buffering=0)  # noqa: SIM115 (stays open)
        _cut_torn_line(self._file)

    def _exists(self, file: IO[bytes]) -> bool:
        """Whether the open file is still the one in the folder."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.directory / FILE))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file and the trackers. Calling it again does nothing."""
        for name, (_, finish) in self._trackers.items():
            try:
                finish()
            except Exception as e:
                notice(
                    f"{name} did not finish cleanly ({type(e).__name__}: {e}); {FILE} is complete"
                )
        self._trackers = {}
        if self._file is not None:
            with suppress(OSError):  # a file system that is gone; every row was written at once
                self._file.close()
            self._file = None

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(row: Row) -> bytes:
    """The row in JSON. Half a surrogate pair, as in a file name that is not UTF-8, is escaped."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _cut_torn_line(file: IO[bytes]) -> None:
    """
    Drop what follows the last newline: the partial row of a killed run. A whole file is left alone,
    because another process may be appending a row to it.
    """
    file.seek(0)
    rows = file.read()
    end = rows.rfind(b"\n") + 1
    if end < len(rows):
        file.truncate(end)
    file.seek(0, os.SEEK_END)


def _rows(path: Path) -> Iterator[Row]:
    """
    Every complete row in the order written, with NaN and infinities restored. Rows that no logbook
    writes, which a stranger's file may have, are left out with a notice.
    """
    left_out = ""
    try:
        with open_regular(path) as file:
            while line := file.readline(MOST_LINE):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # the process was killed, or the disk was full
                fault = mismatch(row, _ROW, "the row") or missing(row, ["kind"])
                if fault:
                    left_out = left_out or fault
                    continue
                for name, value in row.pop("nonfinite", {}).items():
                    if name in row and row[name] is None and name not in IDENTITY:
                        row[name] = NONFINITE.get(value, math.nan)
                yield row
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(
            f"cannot read {path} ({e.strerror}): restore the file, or move it away"
        ) from e
    if left_out:
        notice(f"{path} has rows that no logbook writes ({left_out}): they are left out")


def add(directory: Path, step: int, kind: str, **values: Any) -> None:
    """
    Append a row to the logbook of a finished run. If its folder cannot be written, a notice says
    that the result is not stored.
    """
    try:
        with Logbook(directory) as book:
            book.log(step, kind, **values)
    except UserError as e:
        notice(f"the result of {kind} was not stored: {e}")


def newest(directory: Path, kind: str) -> Row:
    """
    The last row of a kind near the end of the logbook, which a run may still be writing; {} if
    there is none. Only the last 16 KiB are read, so that this can be called often.
    """
    try:
        with open_regular(directory / FILE) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError, RecursionError):  # the first may be half a line
            row = json.loads(line)
            if isinstance(row, dict) and row.get("kind") == kind:
                return row
    return {}


def by_kind(directory: Path | str) -> dict[str, Row]:
    """The last valid row of each kind in a run's folder."""
    return {row["kind"]: row for row in read(directory)}


def read(directory: Path | str) -> list[Row]:
    """
    The valid rows of a run's folder (or of a .jsonl file), in the order written: of rows with the
    same IDENTITY only the last one, and none of later steps after a restart from an earlier one. []
    if there is no metrics.jsonl. Incomplete lines are ignored. UserError if it cannot be read.
    """
    path = Path(directory)
    rows: dict[tuple[Any, ...], Row] = {}
    limit = math.inf  # the earliest step that a later start went back to
    for row in reversed([*_rows(path if path.suffix == ".jsonl" else path / FILE)]):
        step = row.get("step") or 0
        if step <= limit:
            rows.setdefault(tuple(row.get(name) for name in IDENTITY), row)
        if row["kind"] == "start" and row.get("step") is not None:
            limit = min(limit, step)
            if step == 0:
                break
    return [*reversed(rows.values())]
