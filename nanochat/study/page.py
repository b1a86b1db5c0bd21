"""
Write one HTML page that contains its plots and tables. A page needs no network, no script and no
other file, and forbids the browser to load any; it follows the reader's light or dark setting.
"""

import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanochat.base.common import printable, user_path
from nanochat.base.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHT = ("#2a6fdb", "#d9541e", "#12876a", "#8b4fc4", "#a87400", "#c2366b", "#4a5568", "#0b7f96")
DARK = ("#6ea8ff", "#ff9364", "#4fd0a8", "#c99bff", "#e3b84a", "#ff86b3", "#b5bfcd", "#5fd0e6")
INK = "#010203"  # stands for the text colour in a plot; the page replaces it
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
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
    "legend.frameon": False,
}
COLOURED = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color grid.color"
UNITS = {  # of the horizontal axes: (size, name), in order of size
    "tokens": (
        (1.0, "tokens"),
        (1e3, "thousand tokens"),
        (1e6, "million tokens"),
        (1e9, "billion tokens"),
    ),
    "seconds": ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours")),
    "FLOPs": tuple((10.0**power, f"10^{power} FLOPs") for power in range(0, 30, 3)),
}
POLICY = (  # pages contain text of models and strangers: no scripts, nothing is fetched
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
Cell = str | tuple[str, str]  # of a table: text, or text with small text below it
STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --paper: #fbfbfa; --soft: #5d6875;
        --rule: #dfe3e8; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ec; --paper: #15181c; --soft: #9aa5b1; --rule: #2e343b; DARK } }
body { margin: 2.5rem auto; max-width: 72rem; padding: 0 1.25rem; background: var(--paper);
       color: var(--ink); font: 15px/1.55 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem }
h3 { font-size: .95rem; margin: 1.2rem 0 .2rem }
header p, small, .note { color: var(--soft); margin: .2rem 0 }
small { display: block; font-size: .78em }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .9rem; text-align: right; border-bottom: 1px solid var(--rule);
         vertical-align: top; white-space: nowrap }
th:first-child { text-align: left; padding-left: 0 }
thead th { font-weight: 500; color: var(--soft) } tbody th { font-weight: 600 }
.text th, .text td { text-align: left } .text thead th { white-space: normal }
.text td { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 24rem }
.text small { display: inline; margin-left: .6em }
summary { cursor: pointer; color: var(--soft); margin: .75rem 0 .25rem }
th i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .55em }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
         gap: 1.5rem 2rem }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .35rem 1.5rem;
     margin: 0 0 1rem } dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
pre { font-size: .85em; margin: 0 0 .3em; white-space: pre-wrap; overflow-wrap: anywhere;
      padding-left: 2ch; text-indent: -2ch }
@media (max-width: 34rem) { dl { display: block } dd { margin: 0 0 .6rem } }
figure { margin: 0 } svg { width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important } p b { margin-right: .1em }
"""


def colour(i: int) -> str:
    """The colour of curve `i` in a plot; after eight, they repeat."""
    return LIGHT[i % len(LIGHT)]


class Line(NamedTuple):
    """A line of a plot and its band, (low, high); the arrays have the shape (points,)."""

    number: int  # decides its colour
    name: str
    x: np.ndarray
    y: np.ndarray
    band: Sequence[np.ndarray] = ()


def unit_of(x: str, longest: float) -> tuple[float, str]:
    """(size, name) of the largest unit of `x`, a key of UNITS, that `longest` reaches."""
    units = UNITS[x]
    return next((unit for unit in reversed(units) if longest >= unit[0]), units[0])


def _label(name: str) -> str:
    """A name as a legend shows it: matplotlib reads $...$ as mathematics, and hides a first _."""
    return f" {name}" if name.startswith("_") else name.replace("$", r"\$")


def draw_lines(axes: "Axes", lines: Sequence[Line], x: str, title: str) -> None:
    """Draw lines with their bands against `x`, a key of UNITS, in a unit that suits the longest."""
    size, label = unit_of(x, max(line.x[-1] for line in lines))
    for line in lines:
        style: dict[str, Any] = {"color": colour(line.number), "label": _label(line.name)}
        if line.band:
            low, high = line.band
            axes.fill_between(
                line.x / size, low, high, color=style["color"], alpha=0.18, linewidth=0
            )
        elif len(line.x) < 25:
            style["marker"] = "o"
        dashes = "-" if line.number < len(LIGHT) else "--"
        axes.plot(line.x / size, line.y, dashes, **style)
    axes.set_xlabel(label)
    axes.set_title(title)


def svg(draw: Callable[["Axes"], object]) -> str:
    """What draw(axes) draws, as SVG; its colours LIGHT become the page's, light or dark."""
    import matplotlib
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = dict.fromkeys(COLOURED.split(), INK)
    with matplotlib.rc_context({**RC, **ink, "svg.hashsalt": "nanochat"}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text).replace(INK, "currentColor")
    for i, light in enumerate(LIGHT):
        text = text.replace(light, f"var(--c{i})")
    return text


def gallery(plots: Sequence[Callable[["Axes"], object]]) -> str:
    """Plots side by side, each as a function draws it; "" if there are none."""
    figures = "".join(f"<figure>{svg(draw)}</figure>" for draw in plots)
    return f'<div class="plots">{figures}</div>' if plots else ""


def table(
    heads: Iterable[str],
    rows: Iterable[tuple[str, Sequence[Cell]]],
    first_colour: int | None = None,
    kind: str = "",
) -> str:
    """
    A table of rows (head, cells). With `first_colour`, rows start with dots in the colours of
    successive curves. Cells hold figures, or sentences if `kind` is "text".
    """
    parts = [f"<th>{html.escape(text)}</th>" for text in heads]
    parts = ["<thead><tr>", *parts, "</tr></thead><tbody>"]
    for i, (head, cells) in enumerate(rows, first_colour or 0):
        dot = f'<i style="background:var(--c{i % len(LIGHT)})"></i>'
        mark = "" if first_colour is None else dot
        parts.append(f"<tr><th>{mark}{html.escape(head)}</th>")
        for cell in cells:
            text, small = (cell, "") if isinstance(cell, str) else cell
            note = f"<small>{html.escape(small)}</small>" if small else ""
            parts.append(f"<td>{html.escape(text)}{note}</td>")
        parts.append("</tr>")
    return f'<div class="wide {kind}"><table>{"".join(parts)}</tbody></table></div>'


def write_page(title: str, sections: Mapping[str, str], out: Path | str, refresh: int = 0) -> Path:
    """
    Write a page to `out`; returns its path. sections: {heading: HTML}, of which empty ones are left
    out. refresh: browsers reload the page every so many seconds (0 = never), and it says so.
    """
    style = STYLE
    for name, colours in (("LIGHT", LIGHT), ("DARK", DARK)):
        style = style.replace(name, " ".join(f"--c{i}: {c};" for i, c in enumerate(colours)))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        '<meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>",
        f"<header><h1>{html.escape(title)}</h1><p>{datetime.now():%Y-%m-%d %H:%M}</p>",
        f"<p>this page is loaded anew every {refresh} seconds</p>" if refresh else "",
        "</header>",
        *(f"<h2>{html.escape(head)}</h2>{text}" for head, text in sections.items() if text),
        "</body></html>\n",
    ]
    atomic_write(user_path(out), printable("".join(parts)))
    return user_path(out)
