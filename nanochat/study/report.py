"""
The report of runs: their curves, figures and samples on one HTML page. It reads metrics.jsonl alone
and invents nothing: a run without a measurement has no curve of it.
"""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanochat.base import logbook
from nanochat.base.common import UserError, base_dir, duration, human
from nanochat.model.stages import STAGES
from nanochat.study.page import Cell, Line, draw_lines, gallery, table, write_page
from nanochat.train.spent import WORDS, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 250  # the most points of a curve that are drawn


class Curve(NamedTuple):
    """One plot: which number of which rows it shows, its title, and what it is drawn against."""

    kind: str
    name: str
    title: str
    x: str


CURVES = (
    Curve("eval", "val_bpb", "Validation, bits per byte", "tokens"),
    Curve("eval", "val_bpb", "Validation, bits per byte", "seconds"),
    Curve("train", "loss", "Training loss, nats per token", "tokens"),
    Curve("train", "loss", "Training loss, nats per token", "seconds"),
    Curve("train", "lr_mult", "Learning rate, share of peak", "tokens"),
    Curve("train", "tok_per_sec", "Speed, tokens per second", "tokens"),
)


@dataclass(frozen=True)
class Log:
    """The logbook of one run: its folder and its rows."""

    directory: Path
    rows: list[dict[str, Any]]

    @property
    def stage(self) -> str:
        return self.directory.parent.name

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.directory.name}"

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The rows of this kind, in order."""
        return [row for row in self.rows if row.get("kind") == kind]

    def last(self, name: str, *kinds: str) -> Any:
        """The newest value of a number in rows of these kinds; None if there is none."""
        values = [row.get(name) for row in self.rows if row.get("kind") in kinds]
        return next((value for value in reversed(values) if value is not None), None)

    def curve(self, kind: str, y: str, x: str) -> tuple[list[float], list[float]]:
        """The finite points of a curve, (xs, ys); a long one as means of neighbouring points."""
        rows = self.of(kind)
        points = [(r[x], r[y]) for r in rows if _is_finite(r.get(x)) and _is_finite(r.get(y))]
        size = max(1, math.ceil(len(points) / POINTS))
        parts = [points[i : i + size] for i in range(0, len(points), size)]
        xs, ys = ([sum(p[i] for p in part) / len(part) for part in parts] for i in (0, 1))
        return xs, ys


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def load(directories: Iterable[Path | str]) -> list[Log]:
    """The logbooks in these run folders. Raises UserError for a folder without rows."""
    logs = []
    for directory in map(Path, directories):
        rows = logbook.read(directory)
        if not rows:
            raise UserError(
                f"there is no {logbook.FILE} with data in {directory}: give the folder of a "
                "run, <base>/checkpoints/<stage>/<tag>"
            )
        logs.append(Log(directory.resolve(), rows))
    return logs


def find_runs() -> list[Path]:
    """The folders of all runs under the base folder, in the order of the stages, then by age."""
    files = base_dir().glob(f"checkpoints/*/*/{logbook.FILE}")
    return sorted(
        (file.parent for file in files),
        key=lambda run: (_stage_order(run.parent.name), run.stat().st_mtime),
    )


def _stage_order(stage: str) -> tuple[int, str]:
    order = list(STAGES)
    return (order.index(stage) if stage in order else len(order), stage)


def _plot(axes: "Axes", lines: Sequence[Line], what: Curve) -> None:
    draw_lines(axes, lines, what.x, what.title)
    if what.name in ("lr_mult", "tok_per_sec"):
        axes.set_ylim(bottom=0)


def _plots(logs: Sequence[Log]) -> list[Callable[["Axes"], object]]:
    """A plot of each of CURVES that any run has, with one line per run."""
    plots = []
    for what in CURVES:
        curves = [log.curve(what.kind, what.name, what.x) for log in logs]
        lines = [
            Line(i, log.name, np.array(xs), np.array(ys))
            for i, (log, (xs, ys)) in enumerate(zip(logs, curves, strict=True))
            if xs
        ]
        if lines:
            plots.append(partial(_plot, lines=lines, what=what))
    return plots


def _number(value: Any, write: Callable[[float], str]) -> str:
    return write(value) if _is_finite(value) else ""


def _runs_table(logs: Sequence[Log]) -> str:
    rows = []
    for log in logs:
        losses = log.curve("train", "loss", "tokens")[1]
        cells = [
            _number(log.last("step", "train", "summary"), "{:,d}".format),
            _number(log.last("tokens", "train", "summary", "eval"), human),
            _number(log.last("seconds", "train", "summary", "eval"), duration),
            f"{losses[-1]:.3f}" if losses else "",
            _number(log.last("val_bpb", "eval"), "{:.4f}".format),
            _number(log.last("tok_per_sec", "summary", "train"), "{:,.0f}".format),
            _number(log.last("peak_share", "summary", "train"), "{:.0%}".format),
        ]
        rows.append((log.name, cells))
    heads = "run, steps, tokens, time, training loss, bits per byte, tokens / s, share of peak"
    return table(heads.split(", "), rows, first_colour=0)


def _time_table(logs: Sequence[Log]) -> str:
    """Where the seconds of each run went, as shares; '' if no run has noted it."""
    rows = []
    for log in logs:
        spent, seconds = log.last("spent", "summary"), log.last("seconds", "summary")
        if isinstance(spent, dict) and _is_finite(seconds):
            noted = {str(name): part for name, part in spent.items() if _is_finite(part)}
            parts = shares(noted, seconds)
            words = [*WORDS.values(), "other"]
            rows.append((log.name, [f"{parts[word]:.1%}" for word in words]))
    return table(("run", *WORDS.values(), "other"), rows) if rows else ""


def accuracies(logs: Sequence[Log]) -> dict[str, dict[str, Any]]:
    """Stage -> its newest chat_eval row with an accuracy, in the order of the stages."""
    newest = {
        str(row.get("stage") or log.stage): row
        for log in logs
        for row in log.of("chat_eval")
        if _is_finite(row.get("accuracy"))
    }
    return dict(sorted(newest.items(), key=lambda item: _stage_order(item[0])))


def _accuracy_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [{**(row.get("kinds") or {}), "all": row} for row in stages.values()]
    kinds = dict.fromkeys(kind for column in columns for kind in column)
    rows = []
    for kind in sorted(kinds, key=lambda kind: kind == "all"):  # "all" is the last row
        results = [column.get(kind) or {} for column in columns]
        cells: list[Cell] = []
        for result in results:
            lo, hi = (_number(result.get(end), "{:.0%}".format) for end in ("lo", "hi"))
            accuracy = _number(result.get("accuracy"), "{:.1%}".format)
            cells.append((accuracy, f"{lo} to {hi}" if lo and hi else ""))
        newest = next((result for result in reversed(results) if result), {})
        cells.append(_number(newest.get("chance"), "{:.0%}".format))
        cells.append(_number(newest.get("n"), "{:,d}".format))
        rows.append((kind, cells))
    return table(("kind of question", *stages, "chance", "questions"), rows)


def _samples(logs: Sequence[Log]) -> str:
    """The last samples of each run: the prompt in bold, then the continuation."""
    parts = []
    for log in logs:
        samples = {
            name.removeprefix("sample/"): str(text)
            for row in log.of("sample")
            for name, text in row.items()
            if name.startswith("sample/")
        }
        parts += [f"<h3>{html.escape(log.name)}</h3>"] if samples else []
        parts += [f"<p><b>{html.escape(p)}</b>{html.escape(t)}</p>" for p, t in samples.items()]
    return "".join(parts)


def write_report(directories: Sequence[Path | str], out: Path | str) -> Path:
    """
    Write the page of the runs in these folders to `out` and return its path. Raises UserError
    without folders, or for a folder without metrics.
    """
    logs = load(directories)
    if not logs:
        raise UserError("there is no run to report: train one, or give the folder of a run")
    stages = accuracies(logs)
    sections = {
        "Runs": _runs_table(logs),
        "Time": _time_table(logs),
        "Curves": gallery(_plots(logs)),
        "Accuracy": _accuracy_table(stages) if stages else "",
        "Samples": _samples(logs),
    }
    name = logs[0].name if len(logs) == 1 else f"{len(logs)} runs"
    return write_page(f"nanochat: {name}", sections, out)
