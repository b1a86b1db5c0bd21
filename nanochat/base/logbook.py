"""
The record of a run: one line of JSON a row in metrics.jsonl, flushed as it is written, so that a killed run keeps every row but perhaps the
last. The same numbers go to the sinks that the user asks for (wandb, trackio, tensorboard), which are optional packages.

It never stops training: a sink or a disk that fails in the middle is reported once and the run goes on. It refuses to log from any rank
but 0. A number that JSON cannot write (NaN, infinities) is stored as null with its name under "nonfinite"; read() gives it back.

    {"kind": "start", "step": 0, "time": "2026-01-31T12:00:00", "run": "dummy", "config": {...}}
    {"kind": "train", "step": 10, "loss": null, "lr_mult": 1.0, "nonfinite": {"loss": "nan"}}
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError, notice, rank

FILE = "metrics.jsonl"
IDENTITY = (
    "kind",
    "step",
    "stage",
    "task",
)  # two rows that agree on these are the same measurement: the later one counts
Sink = tuple[
    Callable[[str, int | None, dict[str, float]], object], Callable[[], object]
]  # log(kind, step, numbers), close()


def _plain(value: Any) -> Any:
    """What JSON can hold: tensors and numpy scalars become numbers, paths text, floats that are not finite null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, nested ones as outer/inner: what a sink can plot."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def _wandb(directory: Path, name: str, config: dict[str, Any]) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(project="nanochat", name=name, config=config, dir=str(directory))
    return lambda kind, step, numbers: run.log(
        {f"{kind}/{k}": v for k, v in numbers.items()}, step=step
    ), run.finish


def _trackio(directory: Path, name: str, config: dict[str, Any]) -> Sink:
    import trackio  # pyright: ignore[reportMissingImports]

    trackio.init(project="nanochat", name=name, config=config)
    return lambda kind, step, numbers: trackio.log(
        {f"{kind}/{k}": v for k, v in numbers.items()}, step=step
    ), trackio.finish


def _tensorboard(directory: Path, name: str, config: dict[str, Any]) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"))
    writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def log(kind: str, step: int | None, numbers: dict[str, float]) -> None:
        for k, v in numbers.items():
            writer.add_scalar(f"{kind}/{k}", v, step)
        writer.flush()

    return log, writer.close


SINKS = {"wandb": _wandb, "trackio": _trackio, "tensorboard": _tensorboard}


class Logbook:
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
        Opens `directory`/metrics.jsonl for more rows. `step` is where training starts, 0 or the step of the checkpoint resumed from: rows
        of later steps that an earlier attempt left behind no longer count. None adds rows beside a finished run (evaluations).
        `config` is stored in a row of kind "start". wandb stays out while the run's name is "dummy". Raises UserError for a sink that is
        unknown, not installed or that will not start.
        """
        self.directory = Path(directory)
        self._file = None
        self._sinks: dict[str, Sink] = {}
        self._said: set[str] = set()
        if unknown := [s for s in sinks if s not in SINKS]:
            raise UserError(f"there is no sink {unknown[0]!r}: choose from {', '.join(SINKS)}")
        if rank() != 0:
            return
        path = self.directory / FILE
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 (open as long as the run)
            _cut_torn_line(self._file)
        except OSError as e:
            raise UserError(
                f"cannot write {path} ({e.strerror}): free some space or set NANOCHAT_BASE_DIR to another disk"
            ) from e
        plain = _plain(dict(config or {}))
        for name in dict.fromkeys(sinks):
            if name == "wandb" and run_name == "dummy":
                continue
            try:
                self._sinks[name] = SINKS[name](
                    self.directory, run_name if run_name != "dummy" else self.directory.name, plain
                )
            except ImportError as e:
                raise UserError(
                    f"{name} is not installed: pip install {name}, or leave it out"
                ) from e
            except Exception as e:
                raise UserError(f"{name} will not start ({e}): mend that or leave it out") from e
        if config is not None or step is not None:
            now = datetime.now().isoformat(timespec="seconds")
            self._write(
                {"kind": "start", "step": step, "time": now, "run": run_name, "config": plain}
            )

    def log(self, step: int | None = None, kind: str = "train", **values: Any) -> None:
        """One row. Values are numbers, texts, or dicts and lists of them; a zero-dimensional tensor counts as a number."""
        if rank() != 0:
            return
        row = {"kind": kind, "step": step, **_plain(values)}
        floats = {
            k: v.item() if hasattr(v, "item") else v
            for k, v in values.items()
            if row[k] is None and v is not None
        }
        self._write(row | ({"nonfinite": {k: str(v) for k, v in floats.items()}} if floats else {}))
        for name, (send, _) in list(self._sinks.items()):
            try:
                send(kind, step, dict(_numbers(_plain(values))))
            except (
                Exception
            ) as e:  # whatever a tracker's client or network does, the run matters more
                del self._sinks[name]
                notice(
                    f"{name} failed and is left out from step {step} on ({type(e).__name__}: {e}); {FILE} goes on"
                )

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            raise ValueError("this logbook is closed")
        try:
            self._file.write(
                json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
            )
            self._file.flush()
        except OSError as e:
            self._once(
                f"cannot write to {self.directory / FILE} ({e.strerror}): rows are being lost until there is space"
            )

    def _once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            notice(message)

    def close(self) -> None:
        """Close the file and the sinks. Calling it again does nothing."""
        for name, (_, finish) in self._sinks.items():
            try:
                finish()
            except Exception as e:
                notice(
                    f"{name} did not finish cleanly ({type(e).__name__}: {e}); {FILE} is complete"
                )
        self._sinks = {}
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_torn_line(file: Any) -> None:
    """Drop what follows the last newline: the half row of a killed run, onto which the next row would be glued."""
    end = at = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - 65536)
        file.seek(start)
        newline = file.read(at - start).rfind(b"\n")
        if newline >= 0:
            at = start + newline + 1
            break
        at = start
    if at < end:
        file.truncate(at)


def read(directory: Path | str) -> list[dict[str, Any]]:
    """
    The rows that count, in the order written: of rows alike in kind, step, stage and task the last; none that a restart from an earlier
    step has superseded. [] when there is no metrics.jsonl. A line that is not whole (killed, disk full) is passed over.
    """
    path = Path(directory)
    path = path if path.suffix == ".jsonl" else path / FILE
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict):
            continue
        for name, text in row.pop("nonfinite", {}).items():
            row[name] = float(text)
        if row.get("kind") == "start" and row.get("step") is not None:
            rows = {
                k: r
                for k, r in rows.items()
                if row["step"] > 0 and (r.get("step") is None or r["step"] <= row["step"])
            }
        key = tuple(row.get(name) for name in IDENTITY)
        rows.pop(key, None)  # so that the later row also takes the later place
        rows[key] = row
    return list(rows.values())
