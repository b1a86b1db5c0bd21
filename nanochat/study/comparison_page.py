"""What a comparison found, as one HTML page with plots and as lines for a terminal."""

import html
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanochat.base.common import human
from nanochat.study.page import (
    chip,
    colour,
    gallery,
    svg,
    table,
    table_row,
    time_unit,
    token_unit,
    write_page,
)
from nanochat.study.statistics import MEASURES, Record, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTES = (
    "Differences are paired: runs of one seed see the same data in the same order and, where "
    "shapes agree, start from the same weights. Intervals are 95 % t intervals over seeds; those "
    "of savings and step times are computed on the logarithm of the ratio. They are not adjusted "
    "for several conditions. The verdicts are: Holm's method at 5 % over the conditions, for "
    "each measure separately.",
    "Tokens and seconds are saved on the way to a target: the number that was given, or else the "
    "final bits per byte of the run of the pair that ended worse, so that both runs get there; if "
    "the condition wins, that is the baseline's own result. Between evaluations, tokens are "
    "interpolated on a logarithmic axis, never beyond the end of a curve. No run was shortened to "
    "its target: a run of that length, with its learning rate decayed, would have got there "
    "sooner.",
    "Seconds are those of the optimizer steps, without start-up, compilation, evaluation and "
    "saving; the wall time includes them. The first step of a process counts as a median step. "
    "After --retime, seconds follow the speed measured then, with the conditions taking turns. "
    "Bands span the seeds; around differences they are pointwise 95 % t intervals.",
)


def figure(result: Mapping[str, Any], form: str) -> str:
    """A measure in words: "-12.3 (-15.0 to -9.6)", or the bound that is known instead."""
    for side in ("at_least", "at_most"):
        if side in result:
            return f"{side.replace('_', ' ')} {result[side]:{form}}"
    if result["mean"] is None:
        return "unknown"
    mean = f"{result['mean']:{form}}"
    if result["lo"] is None:
        return mean
    return f"{mean} ({result['lo']:{form}} to {result['hi']:{form}})"


def summary(pair: Mapping[str, Any]) -> str:
    """The differences between a condition and the baseline, for a terminal."""
    lines = [f"{pair['name']} against {pair['baseline']}, {pair['n_seeds']} paired seeds:"]
    for name, measure in MEASURES.items():
        value = figure(pair[name], measure.form)
        lines.append(f"  {measure.title:<28}{value:<32}{pair[name]['verdict']}")
    return "\n".join(lines)


def _conditions_table(results: Mapping[str, Any]) -> str:
    conditions = results["conditions"]
    flags = [shlex.split(condition["flags"]) for condition in conditions]
    shared = [flag for flag in flags[0] if all(flag in other for other in flags)]
    rows = []
    for i, condition in enumerate(conditions):
        own = shlex.join(flag for flag in flags[i] if flag not in shared)
        failed = "; ".join(f"seed {seed}: {e}" for seed, e in condition["failed"].items())
        cells = [own, (str(condition["n_seeds"]), failed)]
        if condition["n_seeds"]:
            cells += _figures(condition)
        rows.append(table_row(f"{chip(i)}{html.escape(condition['name'])}", cells))
    goal = "the baseline's final" if results["target"] is None else f"{results['target']:g}"
    heads = (
        "condition, flags, seeds, parameters, tokens, final bits per byte, "
        f"tokens to {goal}, step, training"
    )
    common = f"<p>All conditions: {html.escape(shlex.join(shared))}</p>"
    return table(heads.split(", "), rows) + common


def _figures(condition: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The cells of a condition that has finished runs."""
    bpb, to_target = condition["final_bpb"], condition["to_target"]
    deviation = ""
    if bpb["sd"] is not None:
        deviation = f"sd {bpb['sd']:.4f} ({bpb['sd_lo']:.4f} to {bpb['sd_hi']:.4f})"
    target = f"reached by {to_target['reached']} of {to_target['of']}", ""
    if to_target["tokens"]:
        tokens, steps, seconds = (to_target[n]["mean"] for n in ("tokens", "steps", "seconds"))
        target = f"{tokens:,.0f}", f"{steps:,.0f} steps, {seconds:,.1f} s"
    memory, wall = condition["peak_memory_bytes"] or 0, condition["wall_seconds"] or 0
    return [
        (f"{condition['parameters']:,.0f}", f"{human(memory)}B peak"),
        (f"{condition['tokens']:,.0f}", f"{condition['steps']:,.0f} steps"),
        (f"{bpb['mean']:.4f}", deviation),
        target,
        (f"{condition['step_ms']:,.1f} ms", ""),
        (f"{condition['seconds']:,.1f} s", f"{wall:,.1f} s wall"),
    ]


def _pairs_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for i, pair in enumerate(pairs, 1):
        cells = [
            (pair[name]["verdict"], figure(pair[name], measure.form))
            for name, measure in MEASURES.items()
        ]
        head = f"{chip(i)}{html.escape(pair['name'])}"
        rows.append(table_row(head, [str(pair["n_seeds"]), *cells]))
    titles = [measure.title for measure in MEASURES.values()]
    return table(("against the baseline", "pairs", *titles), rows) if rows else ""


# ---- plots

Groups = Mapping[str, Sequence[Record]]  # the finished runs of each condition
Grid = tuple[np.ndarray, np.ndarray]  # x (points,) and bits per byte (runs, points)


class Band(NamedTuple):
    """A line with a band around it; all have the shape (points,)."""

    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _flops_unit(flops: float) -> tuple[float, str]:
    power = 3 * int(math.log10(flops) // 3)
    return 10.0**power, f"10^{power} FLOPs"


UNITS: dict[str, Callable[[float], tuple[float, str]]] = {
    "tokens": token_unit,
    "seconds": time_unit,
    "FLOPs": _flops_unit,
}


def _on_one_grid(runs: Sequence[Record], x: str) -> Grid:
    """Runs on the stretch of x that all of them cover."""

    def along(run: Record, point: Sequence[float]) -> float:
        _, tokens, seconds, _ = point
        flops = tokens * run["flops_per_token"]
        return {"tokens": tokens, "seconds": seconds, "FLOPs": flops}[x]

    curves = [np.array([(along(run, p), p[3]) for p in run["curve"] if p[1] > 0]).T for run in runs]
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    grid = np.unique(np.concatenate([xs[(xs >= low) & (xs <= high)] for xs, _ in curves]))
    return grid, np.stack([np.interp(np.log(grid), np.log(xs), ys) for xs, ys in curves])


def _draw(
    axes: "Axes", bands: Mapping[str, Band], names: Sequence[str], x: str, title: str
) -> None:
    """
    Draw bands by the name of their condition, on a logarithmic axis that starts at a twelfth of the
    longest run. `names`, of all conditions, decide the colours.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    longest = max(band.x[-1] for band in bands.values())
    unit, label = UNITS[x](longest)
    for name, band in bands.items():
        hue = colour(names.index(name))
        axes.plot(band.x / unit, band.middle, linewidth=1.6, label=name, color=hue)
        axes.fill_between(band.x / unit, band.low, band.high, color=hue, alpha=0.18, linewidth=0)
    # the steep beginning would flatten the rest
    late = [part[band.x >= longest / 6] for band in bands.values() for part in band[1:]]
    values = np.concatenate(late)
    if values.size and np.ptp(values):
        margin = np.ptp(values)
        axes.set_ylim(values.min() - 0.05 * margin, values.max() + 0.1 * margin)
    axes.set_xscale("log")
    axes.set_xlim(left=longest / unit / 12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.set_title(title)
    axes.legend(frameon=False)


def draw_curves(axes: "Axes", groups: Groups, x: str = "tokens", title: str = "") -> None:
    """
    Draw the mean learning curve of each group of runs with a band from the best to the worst seed,
    against "tokens", "seconds" or "FLOPs".
    """
    bands = {}
    for name, runs in groups.items():
        if runs:
            grid, ys = _on_one_grid(runs, x)
            if grid.size:
                bands[name] = Band(grid, ys.mean(0), ys.min(0), ys.max(0))
    _draw(axes, bands, list(groups), x, title or f"Bits per byte against {x}")


def _difference(pairs: Sequence[tuple[Record, Record]]) -> Band | None:
    """Bits per byte of the second run less those of the first, with t intervals; None if none."""
    grids = [_on_one_grid(pair, "tokens") for pair in pairs]
    if not grids or not grids[0][0].size:
        return None
    x = grids[0][0]
    deltas = np.stack([np.interp(np.log(x), np.log(xs), ys[1] - ys[0]) for xs, ys in grids])
    intervals = [interval(list(column)) for column in deltas.T]
    low, high = (
        np.array([i["mean"] if i[end] is None else i[end] for i in intervals])
        for end in ("lo", "hi")
    )
    return Band(x, deltas.mean(0), low, high)


def _plots(groups: Groups) -> list[str]:
    plots = [svg(partial(draw_curves, groups=groups, x=x)) for x in UNITS]
    baseline, *others = groups
    by_seed = {run["seed"]: run for run in groups[baseline]}
    bands = {}
    for name in others:
        pairs = [(by_seed[r["seed"]], r) for r in groups[name] if r["seed"] in by_seed]
        if band := _difference(pairs):
            bands[name] = band
    if bands:
        title = f"Bits per byte minus those of {baseline}"
        plots.append(svg(lambda axes: _draw(axes, bands, list(groups), "tokens", title)))
    return plots


def write_comparison(
    name: str, results: Mapping[str, Any], runs: Sequence[Record], out: Path
) -> Path:
    """Write the page of a comparison to `out`: verdicts, conditions, curves, method."""
    groups: dict[str, list[Record]] = {c["name"]: [] for c in results["conditions"]}
    for run in runs:
        if not run.get("error"):
            groups[run["condition"]].append(run)
    sections = {
        "Results": _pairs_table(results["pairs"]),
        "Conditions": _conditions_table(results),
        "Curves": gallery(_plots(groups)) if any(groups.values()) else "",
        "How it was computed": "".join(f"<p>{html.escape(note)}</p>" for note in NOTES),
    }
    return write_page(f"nanochat: {name}", sections, out)
