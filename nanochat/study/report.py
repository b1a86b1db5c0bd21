"""
The report of runs on one HTML page: their curves, figures, samples, settings and costs. The runs of
one tag are a chain, whose stages follow one another on one clock. The page reads metrics.jsonl
alone and invents nothing: a run without a measurement has no curve of it.
"""

import html
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanochat.base import logbook
from nanochat.base.common import UserError, base_dir, duration, human, notice, print0
from nanochat.base.files import reserved
from nanochat.base.knobs import as_typed
from nanochat.base.progress import StatusLine
from nanochat.base.strangers import is_number
from nanochat.eval.scores import stage_results, stage_table
from nanochat.model.stages import STAGES, lock_file, saved_last
from nanochat.study.page import Cell, Line, draw_lines, gallery, table, write_page
from nanochat.train.spent import WORDS, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nanochat.train.run import OpenRun

POINTS = 250  # the most points of a curve that are drawn
MOMENTS = 6  # the most evaluations of which samples are shown
MOST_TEXT = 600  # characters of a sample or a setting
MOST_NAMES = 32  # names that a run gives its lines in a plot, or its samples
LEAST_SECONDS = 20  # a stage that took less writes no page: it would be a tenth of its time
BUSY = 0.05  # of the time, `watch` works


class Curve(NamedTuple):
    """One plot: the fields of rows that it shows, its title, and what it is drawn against."""

    kind: str
    field: str  # a regular expression; where it has a group, a run has a line for every match
    title: str
    x: str


CURVES = (
    Curve("eval", "val_bpb", "Validation, bits per byte", "seconds"),
    Curve("eval", "val_bpb", "Validation, bits per byte", "tokens"),
    Curve("eval", "val_bpb/(.+)", "Bits per byte by source", "seconds"),
    Curve("train", "loss", "Training loss, nats per token", "seconds"),
    Curve("train", "lr_mult", "Learning rate, share of peak", "seconds"),
    Curve("train", "tok_per_sec", "Speed, tokens per second", "seconds"),
    Curve("train", "reward", "Mean reward of sampled replies", "seconds"),
    Curve("eval", "((?:.+/)?pass@[0-9]+)", "Held-out questions, share answered", "seconds"),
)
SHAPE = "n_layer", "n_embd", "n_head", "sequence_len", "vocab_size"
NOTE = (
    '<p class="note">Time and tokens count from the beginning of the chain, without breaks. Bits '
    "per byte are those of held-out text in base, and of held-out conversations afterwards.</p>"
)
FOLDED = "default", "inherited"  # origins of settings that few want to see
FROM_ZERO = "lr_mult", "tok_per_sec", "reward"


@dataclass(frozen=True)
class Log:
    """The logbook of one run, and how far its chain was before it."""

    directory: Path
    rows: list[dict[str, Any]]
    before: Mapping[str, float]  # seconds and tokens of the stages before it

    @property
    def stage(self) -> str:
        return self.directory.parent.name

    @property
    def tag(self) -> str:
        return self.directory.name

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.tag}"

    @property
    def config(self) -> dict[str, Any]:
        """What the run was started with, last of all."""
        return self.last("config", "start") or {}

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The rows of this kind, in order."""
        return [row for row in self.rows if row.get("kind") == kind]

    def last(self, name: str, *kinds: str) -> Any:
        """The newest value of a field in rows of these kinds; None if there is none."""
        values = [row.get(name) for row in self.rows if row.get("kind") in kinds]
        return next((value for value in reversed(values) if value is not None), None)

    def state(self) -> str:
        """For example "finished", "training, 43%"."""
        steps = [self.last("step", kind) or 0 for kind in ("summary", "train")]
        if steps[0] >= max(1, steps[1]):
            return "finished"
        progress = _number(self.last("progress", "train"), "{:.0%}".format) or "starting"
        return f"{'training' if reserved(lock_file(self.directory)) else 'stopped'}, {progress}"

    def curve(self, kind: str, y: str, x: str) -> tuple[list[float], list[float]]:
        """
        The finite points of a curve, (xs, ys), with x counted along the chain; a long one as means
        of neighbouring points.
        """
        rows = self.of(kind)
        if y == "loss":
            rows = [row for row in rows if "reward" not in row]  # that loss is no measure of text
        points = [(r[x], r[y]) for r in rows if is_number(r.get(x)) and is_number(r.get(y))]
        size = max(1, math.ceil(len(points) / POINTS))
        parts = [points[i : i + size] for i in range(0, len(points), size)]
        xs, ys = ([sum(p[i] for p in part) / len(part) for part in parts] for i in (0, 1))
        return [value + self.before[x] for value in xs], ys


# ---- which runs


def load(directories: Iterable[Path | str]) -> list[Log]:
    """
    The logbooks in these run folders, those of a tag joined into a chain. Raises UserError for a
    folder without rows.
    """
    logs: list[Log] = []
    totals: dict[tuple[Path, str], dict[str, float]] = {}
    for directory in sorted(map(Path, directories), key=lambda run: _stage_order(run.parent.name)):
        rows = logbook.read(directory)
        if not rows:
            raise UserError(
                f"there is no {logbook.FILE} with data in {directory}: give the folder of a "
                "run, <base>/checkpoints/<stage>/<tag>"
            )
        chained = directory.resolve().parent.parent, directory.name
        total = totals.setdefault(chained, {"seconds": 0.0, "tokens": 0.0})
        log = Log(directory.resolve(), rows, dict(total))
        for x in total:
            total[x] += max((row[x] for row in rows if is_number(row.get(x))), default=0)
        logs.append(log)
    return logs


def chain(tag: str = "") -> list[Path]:
    """
    The folders of all stages with this tag that have a log book, in the order of the stages; by
    default of the tag that was trained last.
    """
    files = base_dir().glob(f"checkpoints/*/{tag or '*'}/{logbook.FILE}")
    files = [file for file in files if file.stat().st_size]  # else it has just been opened
    if files and not tag:
        tag = max(files, key=lambda f: (saved_last(f.parent), f.stat().st_mtime)).parent.name
    runs = [file.parent for file in files if file.parent.name == tag]
    return sorted(runs, key=lambda run: _stage_order(run.parent.name))


def find_runs(names: Sequence[str]) -> list[Path]:
    """The run folders that a person means with tags or folders; by default the newest chain."""
    runs = [] if names else chain()
    for name in names:
        known = not (Path(name) / logbook.FILE).exists() and re.fullmatch(r"[\w.-]+", name)
        runs += (chain(name) if known else []) or [Path(name)]
    return list(dict.fromkeys(runs))


def default_page(runs: Sequence[Path]) -> Path:
    """Where the page of these runs is written unless told otherwise: one file for every chain."""
    tags = {run.resolve().name for run in runs}
    return base_dir() / (f"report/{tags.pop()}.html" if len(tags) == 1 else "report.html")


def _stage_order(stage: str) -> tuple[int, str]:
    order = list(STAGES)
    return (order.index(stage) if stage in order else len(order), stage)


# ---- curves


OF_TALKS = "-conversations-val"  # behind the name of a source of conversations


def _plot(axes: "Axes", lines: Sequence[Line], what: Curve) -> None:
    draw_lines(axes, lines, what.x, what.title)
    if what.field in FROM_ZERO:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(ncols=1 + (len(lines) > 5))


def labels(logs: Sequence[Log]) -> list[str]:
    """What tells the runs apart: their stages, or also their tags, or their folders."""
    one_chain = len({(log.directory.parent.parent, log.tag) for log in logs}) == 1
    names = [log.stage if one_chain else log.name for log in logs]
    folders = [str(log.directory) for log in logs]
    return [
        name if names.count(name) == 1 else folder
        for name, folder in zip(names, folders, strict=True)
    ]


def _lines(logs: Sequence[Log], what: Curve) -> list[Line]:
    """The lines of a plot, with the bands that the rows give."""
    lines: list[Line] = []
    for i, (log, label) in enumerate(zip(logs, labels(logs), strict=True)):
        names = dict.fromkeys(name for row in log.of(what.kind) for name in row)
        matches = [m for name in names if (m := re.fullmatch(what.field, name[:MOST_TEXT]))]
        for match in matches[:MOST_NAMES]:
            xs, ys = log.curve(what.kind, match[0], what.x)
            ends = [log.curve(what.kind, f"{match[0]}_{end}", what.x)[1] for end in ("lo", "hi")]
            band = tuple(map(np.array, ends)) if all(len(end) == len(xs) for end in ends) else ()
            parts = [label, *(part.removesuffix(OF_TALKS) for part in match.groups())]
            number = i if len(parts) == 1 else len(lines)
            if xs:
                lines.append(Line(number, ", ".join(parts), np.array(xs), np.array(ys), band))
    return lines


def _plots(logs: Sequence[Log]) -> list[Callable[["Axes"], object]]:
    """A plot of each of CURVES that any run has."""
    drawn = [(what, _lines(logs, what)) for what in CURVES]
    return [partial(_plot, lines=lines, what=what) for what, lines in drawn if lines]


# ---- tables


def _number(value: Any, write: Callable[[float], str]) -> str:
    return write(value) if is_number(value) else ""


def _runs_table(logs: Sequence[Log]) -> str:
    rows = []
    for log in logs:
        losses = log.curve("train", "loss", "tokens")[1]
        cells: list[Cell] = [
            log.state(),
            _number(log.last("step", "train", "summary"), "{:,d}".format),
            _number(log.last("tokens", "train", "summary", "eval"), human),
            _number(log.last("seconds", "train", "summary", "eval"), duration),
            f"{losses[-1]:.3f}" if losses else "",
            _number(log.last("val_bpb", "eval"), "{:.4f}".format),
            _number(log.last("pass@1", "eval"), "{:.1%}".format),
            _number(log.last("tok_per_sec", "summary", "train"), "{:,.0f}".format),
            _number(log.last("peak_share", "summary", "train"), "{:.0%}".format),
        ]
        rows.append((log.name, cells))
    heads = (
        "run, state, steps, tokens, time, training loss, bits per byte, pass@1, tokens / s, "
        "share of peak"
    )
    return table(heads.split(", "), rows, first_colour=0)


def _shares(log: Log) -> dict[str, float]:
    """Where the seconds of a finished run went; {} if it has not noted it."""
    spent, seconds = log.last("spent", "summary"), log.last("seconds", "summary")
    if not isinstance(spent, dict) or not is_number(seconds):
        return {}
    return shares({str(name): part for name, part in spent.items() if is_number(part)}, seconds)


def _costs_table(logs: Sequence[Log], watts: float) -> str:
    """When each run began, where its seconds went, as shares, and what energy `watts` come to."""
    parts = [_shares(log) for log in logs]
    seconds = [log.last("seconds", "summary", "train") or 0.0 for log in logs]
    words = [
        w for w in (*WORDS.values(), "other") if any(part.get(w, 0) > 0.0005 for part in parts)
    ]
    energy = [[f"{watts * s / 3600:.3g} Wh"] * bool(watts) for s in (*seconds, sum(seconds))]
    rows = []
    for i, log in enumerate(logs):
        began = str(next((row.get("time", "") for row in log.of("start")), ""))[:16]
        spent = [f"{parts[i][word]:.1%}" if parts[i] else "" for word in words]
        cells = [began.replace("T", " "), duration(seconds[i]), *spent, *energy[i]]
        rows.append((log.name, cells))
    if len(logs) > 1:
        rows.append(("all", ["", duration(sum(seconds)), *[""] * len(words), *energy[-1]]))
    note = (
        f"Energy is an estimate: {watts:g} W, as stated with --watts, drawn all the time."
        if watts
        else "Energy is not measured. nanochat report --watts N estimates it from the power that "
        "the machine draws."
    )
    heads = ["run", "began", "time", *words] + ["energy, estimated"] * bool(watts)
    return table(heads, rows) + f'<p class="note">{html.escape(note)}</p>'


def _accuracy_table(logs: Sequence[Log]) -> str:
    """The answers of each stage, or of each run where there are several tags."""
    named = zip(labels(logs), logs, strict=True)
    results = stage_results({label: log.rows for label, log in named})
    if not results:
        return ""
    head, rows = stage_table(results)
    return table(head, [(name, cells) for name, *cells in rows])


def _spread(rows: list[Any]) -> list[Any]:
    """At most MOMENTS of these rows, evenly spaced, with the first and the last."""
    count = min(MOMENTS, len(rows))
    return [rows[round(i * (len(rows) - 1) / max(1, count - 1))] for i in range(count)]


def _samples(logs: Sequence[Log], chats: bool) -> str:
    """What runs of stages that chat, or of those that do not, wrote as they trained."""
    parts = []
    for log in logs:
        moments = _spread(log.of("sample"))
        if not moments or chats != (log.stage in STAGES and STAGES[log.stage].chats):
            continue
        names = [n for row in moments for n in row if n.startswith("sample/")]
        names = [*dict.fromkeys(names)][:MOST_NAMES]
        rows = [
            (
                _number(row.get("step"), "step {:,d}".format),
                [str(row.get(name, ""))[:MOST_TEXT] for name in names],
            )
            for row in moments
        ]
        heads = ("after", *(name.removeprefix("sample/") for name in names))
        parts.append(f"<h3>{html.escape(log.name)}</h3>{table(heads, rows, kind='text')}")
    return "".join(parts)


def _fields(log: Log, *path: str) -> dict[str, Any]:
    """The object at this place in what a run was started with; {} if there is none."""
    value: Any = log.config
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """A setting as a person would type it."""
    if isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    ):
        return "..."
    return as_typed(value)[:MOST_TEXT]


def _by_run(title: str, logs: Sequence[Log], columns: Sequence[Mapping[str, Cell]]) -> str:
    """A table with a column for every run; one for all of them where they agree."""
    heads = [log.name for log in logs]
    if all(column == columns[0] for column in columns):
        heads, columns = (["all runs"] if len(logs) > 1 else heads), columns[:1]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, "") for column in columns]) for name in names]
    return table((title, *heads), rows, kind="text") if rows else ""


def _settings(logs: Sequence[Log]) -> str:
    """The knobs of each run and where their values came from, the usual ones in a fold."""
    columns, folded = [], []
    for log in logs:
        knobs, origins = _fields(log, "knobs"), _fields(log, "origins")
        cells = {n: (_text(v), _text(origins.get(n, "default"))) for n, v in knobs.items()}
        columns.append({n: cell for n, cell in cells.items() if cell[1] not in FOLDED})
        folded.append({n: cell for n, cell in cells.items() if cell[1] in FOLDED})
    fold = _by_run("setting", logs, folded)
    fold = f"<details><summary>inherited and defaults</summary>{fold}</details>" if fold else ""
    return _by_run("setting", logs, columns) + fold


def _machine(logs: Sequence[Log]) -> str:
    """What each run ran on, and the shape of its model."""
    columns: list[dict[str, Cell]] = []
    for log in logs:
        shape = [_text(_fields(log, "config").get(name, "?")) for name in SHAPE]
        known = {
            **_fields(log, "machine"),
            "processes": log.config.get("world_size"),
            "precision": log.config.get("dtype"),
            "compiled": _fields(log, "horizon").get("compiled"),
            "model": "{} layers, width {}, {} heads, context {}, vocabulary {}".format(*shape),
        }
        columns.append({n: _text(value) for n, value in known.items() if value is not None})
    return _by_run("", logs, columns)


# ---- the page


def write_report(
    directories: Sequence[Path | str], out: Path | str, watts: float = 0.0, refresh: int = 0
) -> Path:
    """
    Write the page of the runs in these folders to `out` and return its path. `watts` is what the
    machine draws, to estimate its energy; `refresh` as for write_page. Raises
    UserError without folders, or for a folder without metrics.
    """
    logs = load(directories)
    if not logs:
        raise UserError("there is no run to report: train one, or give the folder of a run")
    sections = {
        "Runs": _runs_table(logs),
        "Curves": f"{NOTE}{plots}" if (plots := gallery(_plots(logs))) else "",
        "Accuracy": _accuracy_table(logs),
        "Conversations": _samples(logs, chats=True),
        "Samples": _samples(logs, chats=False),
        "Time and energy": _costs_table(logs, watts),
        "Machine and model": _machine(logs),
        "Settings": _settings(logs),
    }
    tags = list(dict.fromkeys(log.tag for log in logs))
    name = tags[0] if len(tags) == 1 else f"{len(logs)} runs"
    note = f"this page is loaded anew every {refresh} seconds" if refresh else ""
    return write_page(f"nanochat: {name}", sections, out, refresh, note)


def watch(names: Sequence[str], out: Path | str, watts: float = 0.0) -> Path:
    """
    Write the page of these runs whenever one of their log books has grown, until Ctrl+C; then for
    the last time, and it no longer reloads itself. Returns its path. Raises UserError as find_runs
    and write_report do.
    """
    line, written, pause = StatusLine(), (), 1.0
    while True:
        runs = find_runs(names)
        if not any((run / logbook.FILE).exists() for run in runs):
            line.show(f"waiting for {', '.join(names) or 'a run'}")
        try:
            files = [run / logbook.FILE for run in runs]
            grown = tuple((file, file.stat().st_size) for file in files if file.exists())
            if runs and grown != written:
                began, page = time.monotonic(), out or default_page(runs)
                write_report(runs, page, watts, refresh=max(10, round(pause)))
                pause = max(5.0, (time.monotonic() - began) / BUSY)
                written = grown
                line.show(f"wrote {page} at {datetime.now():%H:%M:%S}; Ctrl+C ends")
            time.sleep(pause)
        except KeyboardInterrupt:
            if not written:
                raise  # there is nothing to write yet
            return write_report(runs, out or default_page(runs), watts)


def train_and_report(run: "OpenRun", *parts: Any) -> dict[str, Any]:
    """
    Train a stage, as stage.train with these `parts`, and write the page of its chain. The run is
    complete and saved before: a page that fails, or Ctrl+C meanwhile, costs nothing but the page.
    """
    from nanochat.train import stage

    summary = stage.train(run, *parts)
    if run.runtime.is_main and summary["seconds"] >= LEAST_SECONDS:
        runs = chain(run.directory.name)
        try:
            print0(f"  report: {write_report(runs, default_page(runs))}")
        except Exception as e:  # a run that has succeeded must not end with an error
            notice(f"the report was not written ({type(e).__name__}: {e}): nanochat report does")
    return summary
