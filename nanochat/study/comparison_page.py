"""The results of a comparison, as one HTML page with plots and as lines for a terminal."""

import html
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanochat.base.common import human
from nanochat.study.page import UNITS, Cell, Line, draw_lines, gallery, table, write_page
from nanochat.study.statistics import MEASURES, Record, Result, interval, paired

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


def figure(result: Result, form: str) -> str:
    """A measure and its interval, "-12.3 (-15.0 to -9.6)", or the only bound that is known."""
    for side in ("at_least", "at_most"):
        if side in result:
            return f"{side.replace('_', ' ')} {result[side]:{form}}"
    if result["mean"] is None:
        return "unknown"
    mean = f"{result['mean']:{form}}"
    if result["lo"] is None:
        return mean
    return f"{mean} ({result['lo']:{form}} to {result['hi']:{form}})"


def summary(pair: Result) -> str:
    """The differences between a condition and the baseline, for a terminal."""
    lines = [f"{pair['name']} against {pair['baseline']}, {pair['n_seeds']} paired seeds:"]
    for name, measure in MEASURES.items():
        value = figure(pair[name], measure.form)
        lines.append(f"  {measure.title:<28}{value:<32}{pair[name]['verdict']}")
    return "\n".join(lines)


def _conditions_table(results: Result) -> str:
    conditions = results["conditions"]
    flags = [shlex.split(condition["flags"]) for condition in conditions]
    shared = [flag for flag in flags[0] if all(flag in other for other in flags)]
    rows = []
    for condition, all_flags in zip(conditions, flags, strict=True):
        own = shlex.join(flag for flag in all_flags if flag not in shared)
        failed = "; ".join(f"seed {seed}: {e}" for seed, e in condition["failed"].items())
        cells: list[Cell] = [own, (str(condition["n_seeds"]), failed)]
        if condition["n_seeds"]:
            cells += _figures(condition)
        rows.append((condition["name"], cells))
    goal = "the baseline's final" if results["target"] is None else f"{results['target']:g}"
    heads = (
        "condition, flags, seeds, parameters, tokens, final bits per byte, "
        f"tokens to {goal}, step, training"
    )
    common = f"<p>All conditions: {html.escape(shlex.join(shared))}</p>"
    return table(heads.split(", "), rows, first_colour=0) + common


def _figures(condition: Result) -> list[Cell]:
    """The cells of a condition that has finished runs."""
    bpb, to_target = condition["final_bpb"], condition["to_target"]
    deviation = ""
    if bpb["sd"] is not None:
        deviation = f"sd {bpb['sd']:.4f} ({bpb['sd_lo']:.4f} to {bpb['sd_hi']:.4f})"
    target = f"reached by {to_target['reached']} of {to_target['of']}", ""
    if to_target["tokens"]:
        steps_and_time = f"{to_target['steps']:,.0f} steps, {to_target['seconds']:,.1f} s"
        target = f"{to_target['tokens']:,.0f}", steps_and_time
    memory, wall = condition["peak_memory_bytes"] or 0, condition["wall_seconds"] or 0
    return [
        (f"{condition['parameters']:,.0f}", f"{human(memory)}B peak"),
        (f"{condition['tokens']:,.0f}", f"{condition['steps']:,.0f} steps"),
        (f"{bpb['mean']:.4f}", deviation),
        target,
        f"{condition['step_ms']:,.1f} ms",
        (f"{condition['seconds']:,.1f} s", f"{wall:,.1f} s wall"),
    ]


def _pairs_table(pairs: Sequence[Result]) -> str:
    rows = []
    for pair in pairs:
        cells = [
            (pair[name]["verdict"], figure(pair[name], measure.form))
            for name, measure in MEASURES.items()
        ]
        rows.append((pair["name"], [str(pair["n_seeds"]), *cells]))
    titles = [measure.title for measure in MEASURES.values()]
    return table(("against the baseline", "pairs", *titles), rows, first_colour=1) if rows else ""


# ---- plots

Groups = Mapping[str, Sequence[Record]]  # the finished runs of each condition


def _on_one_grid(runs: Sequence[Record], x: str) -> tuple[np.ndarray, np.ndarray]:
    """The part of x that all runs cover, (points,), and their bits per byte, (runs, points)."""
    curves = []
    for run in runs:
        points = [point for point in run["curve"] if point[1] > 0]
        _, tokens, seconds, bpb = np.array(points).T
        along = {"tokens": tokens, "seconds": seconds, "FLOPs": tokens * run["flops_per_token"]}
        curves.append((along[x], bpb))
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    grid = np.unique(np.concatenate([xs for xs, _ in curves]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.stack([np.interp(np.log(grid), np.log(xs), ys) for xs, ys in curves])


def _draw(axes: "Axes", lines: Sequence[Line], x: str, title: str) -> None:
    """Draw lines on a logarithmic axis that begins at a twelfth of the longest line."""
    from matplotlib.ticker import LogLocator

    draw_lines(axes, lines, x, title)
    longest = max(line.x[-1] for line in lines)
    # The vertical range leaves out the steep beginning, next to which the rest would be flat
    late = [part[line.x >= longest / 6] for line in lines for part in (line.y, *line.band)]
    values = np.concatenate(late)
    if values.size and (height := np.ptp(values)):
        axes.set_ylim(values.min() - 0.05 * height, values.max() + 0.1 * height)
    axes.set_xscale("log")
    axes.set_xlim(left=axes.dataLim.x1 / 12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")
    axes.legend()


def draw_curves(axes: "Axes", groups: Groups, x: str = "tokens", title: str = "") -> None:
    """
    Draw the mean learning curve of each group of runs with a band from the best to the worst seed,
    against "tokens", "seconds" or "FLOPs".
    """
    lines = []
    for i, (name, runs) in enumerate(groups.items()):
        if runs:
            grid, ys = _on_one_grid(runs, x)
            if grid.size:
                lines.append(Line(i, name, grid, ys.mean(0), (ys.min(0), ys.max(0))))
    _draw(axes, lines, x, title or f"Bits per byte against {x}")


def _differences(groups: Groups) -> list[Line]:
    """Bits per byte minus those of the baseline, which is the first group, with t intervals."""
    baseline, *others = groups
    lines = []
    for i, name in enumerate(others, 1):
        pairs = paired(groups[baseline], groups[name])
        grids = [_on_one_grid(pair, "tokens") for pair in pairs]
        if grids and grids[0][0].size:
            x = grids[0][0]
            deltas = [np.interp(np.log(x), np.log(xs), ys[1] - ys[0]) for xs, ys in grids]
            mean = np.mean(deltas, 0)
            band = [mean, mean]  # with one seed there is no interval
            if len(pairs) > 1:
                intervals = [interval(column) for column in np.transpose(deltas).tolist()]
                band = [np.array([result[end] for result in intervals]) for end in ("lo", "hi")]
            lines.append(Line(i, name, x, mean, band))
    return lines


def write_comparison(name: str, results: Result, runs: Sequence[Record], out: Path) -> Path:
    """Write the page of a comparison to `out`: verdicts, conditions, curves, method."""
    groups: dict[str, list[Record]] = {c["name"]: [] for c in results["conditions"]}
    for run in runs:
        if not run.get("error"):
            groups[run["condition"]].append(run)
    plots = [partial(draw_curves, groups=groups, x=x) for x in UNITS if any(groups.values())]
    if lines := _differences(groups):
        title = f"Bits per byte minus those of {results['conditions'][0]['name']}"
        plots.append(partial(_draw, lines=lines, x="tokens", title=title))
    sections = {
        "Results": _pairs_table(results["pairs"]),
        "Conditions": _conditions_table(results),
        "Curves": gallery(plots),
        "How it was computed": "".join(f"<p>{html.escape(note)}</p>" for note in NOTES),
    }
    return write_page(f"nanochat: {name}", sections, out)
