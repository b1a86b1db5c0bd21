"""
Draw runs from their logbooks on one HTML page. Every plot is inside it: it needs no network, no script and no other file, and follows the
reader's light or dark setting. It also draws a picture of a chain of stages for a README. It reads metrics.jsonl alone and refuses to
invent: a run without a measurement has no curve of it.
"""

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.base import logbook
from nanochat.base.common import UserError, base_dir, duration, human
from nanochat.base.files import atomic_write
from nanochat.model.stages import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHT = ("#2a6fdb", "#d9541e", "#12876a", "#8b4fc4", "#a87400", "#c2366b", "#4a5568", "#0b7f96")
DARK = ("#6ea8ff", "#ff9364", "#4fd0a8", "#c99bff", "#e3b84a", "#ff86b3", "#b5bfcd", "#5fd0e6")
INK = "#010203"  # stands for the page's text colour in a plot, which the page then chooses
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.18,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
}
# row kind, number, title, unit of the vertical axis
CURVES = (
    ("eval", "val_bpb", "Validation", "bits per byte"),
    ("train", "loss", "Training loss", "nats per token"),
    ("train", "lr_mult", "Learning rate", "share of peak"),
    ("train", "tok_per_sec", "Speed", "tokens per second"),
)


@dataclass(frozen=True)
class Log:
    """One run: its folder, and its rows by kind."""

    directory: Path
    rows: list[dict[str, Any]]

    @property
    def stage(self) -> str:
        return self.directory.parent.name

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.directory.name}"

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if r.get("kind") == kind]

    def last(self, name: str, *kinds: str) -> Any:
        """The newest value of a number in rows of these kinds, None when there is none."""
        return next(
            (
                r[name]
                for r in reversed(self.rows)
                if r.get("kind") in kinds and r.get(name) is not None
            ),
            None,
        )

    def curve(self, kind: str, y: str, x: str) -> tuple[list[float], list[float]]:
        """The finite points of a curve; long ones as the means of 250 stretches."""
        points = [(r[x], r[y]) for r in self.of(kind) if _finite(r.get(x)) and _finite(r.get(y))]
        size = max(1, math.ceil(len(points) / 250))
        parts = [points[i : i + size] for i in range(0, len(points), size)]
        xs, ys = ([sum(p[i] for p in part) / len(part) for part in parts] for i in (0, 1))
        return xs, ys


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def load(directories: Iterable[Path | str]) -> list[Log]:
    """The logs of these run folders. UserError for one without rows."""
    logs = []
    for d in map(Path, directories):
        directory = d.parent if d.name == logbook.FILE else d
        rows = logbook.read(directory)
        if not rows:
            raise UserError(
                f"no {logbook.FILE} with rows in {directory}: give the folder of a run, <base>/checkpoints/<stage>/<tag>"
            )
        logs.append(Log(directory.resolve(), rows))
    return logs


def find_runs() -> list[Path]:
    """Every run under the base folder, stages in their order."""
    found = base_dir().glob(f"checkpoints/*/*/{logbook.FILE}")
    return sorted(
        (f.parent for f in found), key=lambda d: (_stage_order(d.parent.name), d.stat().st_mtime)
    )


def _stage_order(stage: str) -> tuple[int, str]:
    order = list(STAGES)
    return (order.index(stage) if stage in order else len(order), stage)


def time_unit(seconds: float) -> tuple[float, str]:
    return (
        (1, "seconds")
        if seconds < 120
        else (60, "minutes")
        if seconds < 3 * 3600
        else (3600, "hours")
    )


def token_unit(tokens: float) -> tuple[float, str]:
    units = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"))
    return next((u for u in units if tokens >= u[0]), (1, "tokens"))


def _plot(ax: "Axes", logs: Sequence[Log], kind: str, y: str, title: str, x: str) -> None:
    """One curve a run; `x` is tokens or seconds."""
    curves = [log.curve(kind, y, x) for log in logs]
    unit, label = (token_unit if x == "tokens" else time_unit)(
        max((max(xs) for xs, _ in curves if xs), default=0)
    )
    for i, (xs, ys) in enumerate(curves):
        style = "-" if i < len(LIGHT) else "--"
        marker = "o" if len(xs) < 40 else None
        ax.plot(
            [v / unit for v in xs],
            ys,
            style,
            color=LIGHT[i % len(LIGHT)],
            marker=marker,
            markersize=3,
            linewidth=1.6,
        )
    ax.set_xlabel(label)
    ax.set_title(title)
    if y in ("lr_mult", "tok_per_sec"):
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1])


def svg(draw: Callable[["Axes"], object]) -> str:
    """What draw(ax) draws as SVG for a page(): the colours of LIGHT, in order, become the page's own."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        INK,
    )
    with matplotlib.rc_context({**RC, **ink, "svg.hashsalt": "nanochat"}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        figure.patch.set_alpha(0)
        ax = figure.add_subplot()
        ax.patch.set_alpha(0)
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:,.10g}")
        draw(ax)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text).replace(INK, "currentColor")
    for i, colour in enumerate(LIGHT):
        text = text.replace(colour, f"var(--c{i})")
    return text


def _number(value: Any, form: str) -> str:
    return format(value, form) if _finite(value) else ""


def _runs_table(logs: Sequence[Log]) -> str:
    heads = (
        "run",
        "steps",
        "tokens",
        "time",
        "training loss",
        "bits per byte",
        "tokens / s",
        "share of peak",
    )
    rows = []
    for i, log in enumerate(logs):
        tokens, seconds = (log.last(n, "train", "summary", "eval") for n in ("tokens", "seconds"))
        losses = log.curve("train", "loss", "tokens")[1]
        cells = (
            _number(log.last("step", "train", "summary"), ",d"),
            human(tokens) if _finite(tokens) else "",
            duration(seconds) if _finite(seconds) else "",
            _number(losses[-1] if losses else None, ".3f"),
            _number(log.last("val_bpb", "eval"), ".4f"),
            _number(log.last("tok_per_sec", "summary", "train"), ",.0f"),
            _number(log.last("peak_share", "summary", "train"), ".0%"),
        )
        rows.append(
            f"<tr><th>{chip(i)}{html.escape(log.name)}</th>"
            + "".join(f"<td>{c}</td>" for c in cells)
            + "</tr>"
        )
    return table(heads, rows)


def chip(i: int) -> str:
    """A dot in the colour of curve i."""
    return f'<i style="background:var(--c{i % len(LIGHT)})"></i>'


def table(heads: Iterable[str], rows: Iterable[str]) -> str:
    """Plain heads, and rows that are HTML already."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _accuracies(logs: Sequence[Log]) -> dict[str, dict[str, Any]]:
    """Stage -> its newest chat_eval row that has accuracy by kind, stages in their order."""
    found: dict[str, dict[str, Any]] = {}
    for log in logs:
        for row in log.of("chat_eval"):
            if _finite(row.get("accuracy")):
                found[str(row.get("stage") or log.stage)] = row
    return dict(sorted(found.items(), key=lambda item: _stage_order(item[0])))


def _accuracy_table(stages: dict[str, dict[str, Any]]) -> str:
    def cell(r: dict[str, Any] | None) -> str:
        if r is None or not _finite(r.get("accuracy")):
            return "<td></td>"
        spread = (
            f"<small>{r['lo']:.0%} to {r['hi']:.0%}</small>"
            if _finite(r.get("lo")) and _finite(r.get("hi"))
            else ""
        )
        return f"<td>{r['accuracy']:.1%}{spread}</td>"

    def row(name: str, cells: Sequence[dict[str, Any] | None]) -> str:
        some = next((c for c in reversed(cells) if c), {})
        chance = _number(some.get("chance"), ".0%")
        return f"<tr><th>{html.escape(name)}</th>{''.join(map(cell, cells))}<td>{chance}</td><td>{_number(some.get('n'), ',d')}</td></tr>"

    kinds = list(dict.fromkeys(k for r in stages.values() for k in r.get("kinds") or {}))
    rows = [
        row(kind, [(r.get("kinds") or {}).get(kind) for r in stages.values()]) for kind in kinds
    ]
    return table(
        ("kind of question", *stages, "chance", "questions"),
        [*rows, row("all", list(stages.values()))],
    )


def _samples(logs: Sequence[Log]) -> str:
    """The last samples of each run: prompt and what the model made of it."""
    parts = []
    for log in logs:
        newest = {
            k[7:]: str(v) for r in log.of("sample") for k, v in r.items() if k.startswith("sample/")
        }
        lines = "".join(
            f"<p><b>{html.escape(p)}</b>{html.escape(t)}</p>" for p, t in newest.items()
        )
        parts.append(f"<h3>{html.escape(log.name)}</h3>{lines}" if lines else "")
    return "".join(parts)


STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --paper: #fbfbfa; --soft: #5d6875; --rule: #dfe3e8; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --paper: #15181c; --soft: #9aa5b1; --rule: #2e343b; DARK } }
body { margin: 2.5rem auto; max-width: 72rem; padding: 0 1.25rem; background: var(--paper); color: var(--ink);
       font: 15px/1.55 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem } h3 { font-size: .95rem; margin: 1.2rem 0 .2rem }
header p, small { color: var(--soft); margin: .2rem 0 } small { display: block; font-size: .78em }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .9rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; white-space: nowrap }
th:first-child { text-align: left; padding-left: 0 } thead th { font-weight: 500; color: var(--soft) } tbody th { font-weight: 600 }
th i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .55em }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem 2rem }
svg { width: 100%; height: auto } svg text { font-family: system-ui, sans-serif !important } p b { margin-right: .1em }
"""


def build(directories: Sequence[Path | str], out: Path | str) -> Path:
    """Write the page of these runs to `out` and return its path. UserError for a folder without metrics."""
    logs = load(directories)
    if not logs:
        raise UserError("there is no run to report: train one, or give its folder")
    plots = []
    for kind, y, title, unit in CURVES:
        for x in ("tokens", "seconds") if y in ("val_bpb", "loss") else ("tokens",):
            if any(log.curve(kind, y, x)[0] for log in logs):
                plots.append(
                    svg(partial(_plot, logs=logs, kind=kind, y=y, title=f"{title}, {unit}", x=x))
                )
    stages = _accuracies(logs)
    title = "nanochat: " + (logs[0].name if len(logs) == 1 else f"{len(logs)} runs")
    accuracy = _accuracy_table(stages) if stages else ""
    return page(
        title,
        {
            "Runs": _runs_table(logs),
            "Curves": gallery(plots),
            "Accuracy": accuracy,
            "Samples": _samples(logs),
        },
        out,
    )


def gallery(plots: Sequence[str]) -> str:
    figures = "".join(f"<figure style=margin:0>{p}</figure>" for p in plots)
    return f'<div class="plots">{figures}</div>' if plots else ""


def page(title: str, sections: dict[str, str], out: Path | str) -> Path:
    """Write one page that stands alone, a heading for each section of HTML that is not empty; returns its path."""
    colours = {"LIGHT": LIGHT, "DARK": DARK}
    style = re.sub(
        "LIGHT|DARK",
        lambda m: " ".join(f"--c{i}: {c};" for i, c in enumerate(colours[m[0]])),
        STYLE,
    )
    body = [f"<header><h1>{html.escape(title)}</h1><p>{datetime.now():%Y-%m-%d %H:%M}</p></header>"]
    body += [f"<h2>{html.escape(head)}</h2>{text}" for head, text in sections.items() if text]
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<title>{html.escape(title)}</title><style>{style}</style>"
    out = Path(out)
    atomic_write(
        out,
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n',
    )
    return out


def curves_png(directories: Sequence[Path | str], out: Path | str) -> Path:
    """
    A picture of stages that follow each other: training loss and validation bits per byte along the clock, and the accuracy of each stage
    where it was measured. `directories` in the order of training.
    """
    import matplotlib
    from matplotlib.figure import Figure

    logs = load(directories)
    stages = _accuracies(logs)
    spans = [
        max((r["seconds"] for r in log.rows if _finite(r.get("seconds"))), default=0.0)
        for log in logs
    ]
    unit, word = time_unit(sum(spans))
    with matplotlib.rc_context({**RC, "text.color": "#1d232b", "axes.labelcolor": "#1d232b"}):
        figure = Figure(figsize=(11 if stages else 8, 3.3), layout="constrained", dpi=150)
        panels = figure.subplots(
            1, 3 if stages else 2, width_ratios=[4, 4, 3] if stages else [1, 1]
        )
        for ax, (kind, y, title, label) in zip(panels, (CURVES[1], CURVES[0]), strict=False):
            start = 0.0
            for i, (log, span) in enumerate(zip(logs, spans, strict=True)):
                xs, ys = log.curve(kind, y, "seconds")
                shifted, colour = [(start + v) / unit for v in xs], LIGHT[i % len(LIGHT)]
                ax.plot(
                    shifted,
                    ys,
                    color=colour,
                    linewidth=1.6,
                    marker="o" if kind == "eval" else None,
                    markersize=3.5,
                )
                ax.axvspan(
                    start / unit, (start + span) / unit, color=colour, alpha=0.05, linewidth=0
                )
                where = (
                    (start + span / 2) / unit,
                    0.97 if i % 2 == 0 else 0.89,
                )  # neighbours of short stages do not collide
                ax.text(
                    *where,
                    log.stage,
                    color=colour,
                    transform=ax.get_xaxis_transform(),
                    ha="center",
                    va="top",
                    weight="bold",
                )
                start += span
            ax.set_title(f"{title}, {label}")
            ax.set_xlabel(word)
            ax.set_xlim(0, start / unit)
        if stages:
            ax = panels[-1]
            for i, (stage, row) in enumerate(stages.items()):
                colour = LIGHT[
                    next((j for j, log in enumerate(logs) if log.stage == stage), i) % len(LIGHT)
                ]
                ax.bar(i, 100 * row["accuracy"], color=colour, width=0.62)
                ax.text(
                    i,
                    100 * row["accuracy"] + 1.5,
                    f"{row['accuracy']:.0%}",
                    ha="center",
                    va="bottom",
                    weight="bold",
                    color=colour,
                )
            ax.set_xticks(range(len(stages)), list(stages))
            ax.set_ylim(0, 110)
            ax.set_yticks(range(0, 101, 20))
            ax.grid(axis="x", visible=False)
            ax.set_title("Held-out questions answered, %")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    out = Path(out)
    atomic_write(out, buffer.getvalue())
    return out
