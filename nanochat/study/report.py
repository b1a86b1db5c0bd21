"""
The report of runs on one HTML page: their curves, figures, samples, settings and costs. The runs of
one tag are a chain: the time and tokens of its stages are counted one after another. The page is
made from metrics.jsonl alone; what a run has not measured is left out.
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
from nanochat.model.stages import STAGES, lock_file, one_chain, saved_last
from nanochat.study.page import Cell, Line, draw_lines, gallery, table, write_page
from nanochat.train.spent import WORDS, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nanochat.train.run import OpenRun

POINTS = 250  # the most points of a curve that are drawn
MOMENTS = 6  # the most evaluations whose samples are shown
MOST_TEXT = 600  # characters of a sample or a setting
MOST_NAMES = 32  # the most lines in a plot, or sample prompts, of one run
LEAST_SECONDS = 20  # a shorter stage writes no page, which would take a tenth of its time
BUSY = 0.05  # the largest share of time in which `watch` writes pages


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
FOLDED = "default", "inherited"  # origins of settings that the page shows on demand only
FROM_ZERO = "lr_mult", "tok_per_sec", "reward"  # fields whose axes begin at 0


@dataclass(frozen=True)
class Log:
    """The logbook of one run, and how far its chain was before it."""

    directory: Path
    rows: list[logbook.Row]
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
        """What the run was started with the last time."""
        return self.last("config", "start") or {}

    def started_with(self, name: str) -> dict[str, Any]:
        """The object of this name in `config`; {} if there is none."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    def of(self, kind: str) -> list[logbook.Row]:
        """The rows of this kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]

    def last(self, name: str, *kinds: str) -> Any:
        """The newest value of a field in rows of these kinds; None if there is none."""
        values = [row.get(name) for row in self.rows if row["kind"] in kinds]
        return next((value for value in reversed(values) if value is not None), None)

    def state(self) -> str:
        """For example "finished", "training, 43%"."""
        finished, trained = (self.last("step", kind) or 0 for kind in ("summary", "train"))
        if finished >= max(1, trained):
            return "finished"
        progress = _number(self.last("progress", "train"), "{:.0%}".format) or "starting"
        return f"{'training' if reserved(lock_file(self.directory)) else 'stopped'}, {progress}"

    def curve(self, kind: str, y: str, x: str) -> tuple[list[float], list[float]]:
        """
        The finite points of a curve, (xs, ys), with x counted from the beginning of the chain. If
        there are more than POINTS, neighbouring points are averaged.
        """
        rows = self.of(kind)
        if y == "loss":
            rows = [row for row in rows if "reward" not in row]  # RL's loss is not about text
        points = [(r[x], r[y]) for r in rows if is_number(r.get(x)) and is_number(r.get(y))]
        size = max(1, math.ceil(len(points) / POINTS))
        xs, ys = [], []
        for i in range(0, len(points), size):
            part_xs, part_ys = zip(*points[i : i + size], strict=True)
            xs.append(sum(part_xs) / len(part_xs) + self.before[x])
            ys.append(sum(part_ys) / len(part_ys))
        return xs, ys


# ---- which runs


def load(directories: Iterable[Path | str], quiet: bool = False) -> list[Log]:
    """
    The logbooks in these run folders, those of a tag joined into a chain; a notice names stages
    that do not belong to it, unless `quiet`. Raises UserError for a folder without rows.
    """
    chains: dict[tuple[Path, str], dict[str, list[logbook.Row]]] = {}
    for directory in sorted(map(Path, directories), key=_stage_order):
        rows = logbook.read(directory)
        if not rows:
            raise UserError(
                f"there is no {logbook.FILE} with data in {directory}: give the folder of a "
                "run, <base>/checkpoints/<stage>/<tag>"
            )
        run = directory.resolve()
        chains.setdefault((run.parent.parent, run.name), {})[run.parent.name] = rows
    logs: list[Log] = []
    for (root, tag), stages in chains.items():
        total = {"seconds": 0.0, "tokens": 0.0}
        for stage, rows in one_chain(stages, tag, quiet).items():
            logs.append(Log(root / stage / tag, rows, dict(total)))
            for x in total:
                total[x] += max((row[x] for row in rows if is_number(row.get(x))), default=0)
    return sorted(logs, key=lambda log: _stage_order(log.directory))


def chain(tag: str = "") -> list[Path]:
    """
    The run folders with this tag (default: the one trained last) that have rows in their log
    books, in the order of the stages.
    """
    files = base_dir().glob(f"checkpoints/*/{tag or '*'}/{logbook.FILE}")
    files = [file for file in files if file.stat().st_size]  # an empty one was just opened
    if files and not tag:
        tag = max(files, key=lambda f: (saved_last(f.parent), f.stat().st_mtime)).parent.name
    return sorted((f.parent for f in files if f.parent.name == tag), key=_stage_order)


def find_runs(names: Sequence[str]) -> list[Path]:
    """The run folders that tags or folders name; by default those of the newest chain."""
    runs = [] if names else chain()
    for name in names:
        is_folder = (Path(name) / logbook.FILE).exists()
        may_be_tag = not is_folder and re.fullmatch(r"[\w.-]+", name)
        runs += (may_be_tag and chain(name)) or [Path(name)]
    return list(dict.fromkeys(runs))


def default_page(runs: Sequence[Path]) -> Path:
    """The file of the page by default: one for every tag, and one for several tags together."""
    tags = {run.resolve().name for run in runs}
    return base_dir() / (f"report/{tags.pop()}.html" if len(tags) == 1 else "report.html")


def _stage_order(run: Path) -> tuple[int, str]:
    """A key that sorts runs by their stages, those of unknown stages last."""
    stage, order = run.parent.name, list(STAGES)
    return (order.index(stage) if stage in order else len(order), stage)


# ---- curves


CONVERSATIONS = "-conversations-val"  # the end of a name of conversations, which plots leave out


def _plot(axes: "Axes", lines: Sequence[Line], what: Curve) -> None:
    draw_lines(axes, lines, what.x, what.title)
    if what.field in FROM_ZERO:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(ncols=2 if len(lines) > 5 else 1)


def labels(logs: Sequence[Log]) -> list[str]:
    """A name for each run that no other has: its stage, its stage and tag, or its folder."""
    one_chain = len({(log.directory.parent.parent, log.tag) for log in logs}) == 1
    names = [log.stage if one_chain else log.name for log in logs]
    return [
        name if names.count(name) == 1 else str(log.directory)
        for name, log in zip(names, logs, strict=True)
    ]


def _lines(logs: Sequence[Log], what: Curve) -> list[Line]:
    """The lines of a plot, with a band if the rows have fields NAME_lo and NAME_hi."""
    lines: list[Line] = []
    for i, (log, label) in enumerate(zip(logs, labels(logs), strict=True)):
        names = dict.fromkeys(name for row in log.of(what.kind) for name in row)
        matches = [re.fullmatch(what.field, name[:MOST_TEXT]) for name in names]
        for match in [match for match in matches if match][:MOST_NAMES]:
            xs, ys = log.curve(what.kind, match[0], what.x)
            ends = [log.curve(what.kind, f"{match[0]}_{end}", what.x)[1] for end in ("lo", "hi")]
            band = tuple(map(np.array, ends)) if all(len(end) == len(xs) for end in ends) else ()
            parts = [label, *(part.removesuffix(CONVERSATIONS) for part in match.groups())]
            number = i if len(parts) == 1 else len(lines)  # a colour per run, or per line
            if xs:
                lines.append(Line(number, ", ".join(parts), np.array(xs), np.array(ys), band))
    return lines


def _plots(logs: Sequence[Log]) -> list[Callable[["Axes"], object]]:
    """A plot of each of CURVES that any run has."""
    drawn = [(what, _lines(logs, what)) for what in CURVES]
    return [partial(_plot, lines=lines, what=what) for what, lines in drawn if lines]


# ---- tables


def _number(value: Any, write: Callable[[float], str]) -> str:
    """write(value), or "" if the value is no finite number."""
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
    """The share of a finished run's time by activity; {} if its logbook does not have it."""
    spent, seconds = log.last("spent", "summary"), log.last("seconds", "summary")
    if not isinstance(spent, dict) or not is_number(seconds):
        return {}
    return shares({str(name): part for name, part in spent.items() if is_number(part)}, seconds)


def _costs_table(logs: Sequence[Log], watts: float) -> str:
    """When each run began, how its time was spent, and how much energy that is at `watts`."""
    parts = [_shares(log) for log in logs]
    words = [
        w for w in (*WORDS.values(), "other") if any(part.get(w, 0) > 0.0005 for part in parts)
    ]
    heads = ["run", "began", "time", *words]
    note = (
        "Energy is not measured. nanochat report --watts N estimates it from the power that the "
        "machine draws."
    )
    if watts:
        heads.append("energy, estimated")
        note = f"Energy is an estimate: {watts:g} W, as stated with --watts, drawn all the time."

    rows, total = [], 0.0
    for log, part in zip(logs, parts, strict=True):
        seconds = log.last("seconds", "summary", "train")
        total += seconds if is_number(seconds) else 0.0
        began = str(next((row.get("time", "") for row in log.of("start")), ""))[:16]
        spent = [f"{part[word]:.1%}" if part else "" for word in words]
        rows.append((log.name, began.replace("T", " "), seconds, spent))
    if len(logs) > 1:
        rows.append(("all", "", total, [""] * len(words)))
    cells = []
    for name, began, seconds, spent in rows:
        energy = [_number(seconds, lambda s: f"{watts * s / 3600:.3g} Wh")] if watts else []
        cells.append((name, [began, _number(seconds, duration), *spent, *energy]))
    return table(heads, cells) + f'<p class="note">{html.escape(note)}</p>'


def _accuracy_table(logs: Sequence[Log]) -> str:
    """The accuracy of each run in chat_eval; "" if there is none."""
    named = zip(labels(logs), logs, strict=True)
    results = stage_results({label: log.rows for label, log in named})
    if not results:
        return ""
    head, rows = stage_table(results)
    return table(head, [(name, cells) for name, *cells in rows])


def _samples(logs: Sequence[Log], chats: bool) -> str:
    """The samples that runs logged: those of stages that chat, or those of the others."""
    parts = []
    for log in logs:
        samples = log.of("sample")
        if not samples or chats != (log.stage in STAGES and STAGES[log.stage].chats):
            continue
        evenly = np.linspace(0, len(samples) - 1, min(MOMENTS, len(samples)))
        moments = [samples[round(i)] for i in evenly]
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


def _text(value: Any) -> str:
    """A setting as a person would type it."""
    if isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    ):
        return "..."
    return as_typed(value)[:MOST_TEXT]


def _by_run(title: str, logs: Sequence[Log], columns: Sequence[Mapping[str, Cell]]) -> str:
    """A table with a column for every run, or a single one if all columns are the same."""
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
        knobs, origins = log.started_with("knobs"), log.started_with("origins")
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
        shape = [_text(log.started_with("config").get(name, "?")) for name in SHAPE]
        known = {
            **log.started_with("machine"),
            "processes": log.config.get("world_size"),
            "precision": log.config.get("dtype"),
            "compiled": log.started_with("horizon").get("compiled"),
            "model": "{} layers, width {}, {} heads, context {}, vocabulary {}".format(*shape),
        }
        columns.append({n: _text(value) for n, value in known.items() if value is not None})
    return _by_run("", logs, columns)


# ---- the page


def write_report(
    directories: Sequence[Path | str], out: Path | str, watts: float = 0.0, refresh: int = 0
) -> Path:
    """
    Write the page of the runs in these folders to `out`; returns its path. watts: the power that
    the machine draws, to estimate energy (0 = not given). refresh: as for write_page. UserError
    without folders, or for a folder without metrics.
    """
    logs = load(directories, quiet=refresh > 0)
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
    return write_page(f"nanochat: {name}", sections, out, refresh)


def watch(names: Sequence[str], out: Path | str, watts: float = 0.0) -> Path:
    """
    Write the page of these runs whenever one of their logbooks has grown, until Ctrl+C. Then write
    it once more, without automatic reloading, and return its path. Raises UserError as write_report
    does.
    """
    line, written, pause = StatusLine(), [], 1.0
    while True:
        runs = find_runs(names)
        try:
            files = [run / logbook.FILE for run in runs]
            grown = [(file, file.stat().st_size) for file in files if file.exists()]
            if not grown:
                line.show(f"waiting for {', '.join(names) or 'a run'}")
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
    Train a stage and write the page of its chain; returns the summary. `parts` are the arguments of
    stage.train after `run`. The run is saved before the page is written: if that fails, or Ctrl+C
    interrupts it, only the page is missing.
    """
    from nanochat.train import stage

    summary = stage.train(run, *parts)
    if run.runtime.is_main and summary["seconds"] >= LEAST_SECONDS:
        runs = chain(run.directory.name)
        try:
            print0(f"  report: {write_report(runs, default_page(runs))}")
        except Exception as e:  # a run that has succeeded must not end with an error
            notice(
                f"the report was not written ({type(e).__name__}: {e}): run nanochat report to "
                "write it"
            )
    return summary
