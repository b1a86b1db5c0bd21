"""
Draw the stages of one chain along the clock, as in dev/quickstart.png: training loss, validation
bits per byte, and the accuracy of each stage where it was measured.

    python dev/chain_picture.py OUT.png RUN_FOLDER ...      (in the order of training)
"""

import sys
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanochat.eval.scores import stage_results
from nanochat.study.page import RC, colour, unit_of
from nanochat.study.report import CURVES, Curve, Log, load


def draw_along_the_clock(axes: Axes, logs: Sequence[Log], what: Curve) -> None:
    """The curves of the runs one after another, each stage on a tinted background."""
    spans = [log.last("seconds", "train", "summary", "eval") or 0.0 for log in logs]
    unit, label = unit_of("seconds", sum(spans))
    start = 0.0
    for i, (log, span) in enumerate(zip(logs, spans, strict=True)):
        xs, ys = log.curve(what.kind, what.field, "seconds")
        marker = "o" if what.kind == "eval" else None
        times = [x / unit for x in xs]  # counted along the chain already
        axes.plot(times, ys, color=colour(i), linewidth=1.6, marker=marker, markersize=3.5)
        begin, end = start / unit, (start + span) / unit
        axes.axvspan(begin, end, color=colour(i), alpha=0.05, linewidth=0)
        axes.text(
            (begin + end) / 2,
            0.89 if i % 2 else 0.97,  # so that the names of short stages do not collide
            log.stage,
            color=colour(i),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            weight="bold",
        )
        start += span
    axes.set_title(what.title)
    axes.set_xlabel(label)
    axes.set_xlim(0, start / unit)


def draw_accuracies(axes: Axes, logs: Sequence[Log]) -> None:
    """One bar per stage, in the colour of its run."""
    stages = stage_results({log.stage: log.rows for log in logs})
    trained = [log.stage for log in logs]
    for i, (stage, row) in enumerate(stages.items()):
        hue, percent = (
            colour(trained.index(stage) if stage in trained else i),
            100 * row["accuracy"],
        )
        axes.bar(i, percent, color=hue, width=0.62)
        label = f"{row['accuracy']:.0%}"
        axes.text(i, percent + 1.5, label, ha="center", va="bottom", weight="bold", color=hue)
    axes.set_xticks(range(len(stages)), list(stages))
    axes.set_ylim(0, 110)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="x", visible=False)
    axes.set_title("Held-out questions answered, %")


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("error: give the file to write and the folders of the runs, in order of training")
    out, *directories = sys.argv[1:]
    logs = load(directories)
    has_accuracies = bool(stage_results({log.stage: log.rows for log in logs}))
    widths = [4, 4, 3] if has_accuracies else [1, 1]
    training = next(what for what in CURVES if what.field == "loss")
    validation = next(what for what in CURVES if what.field == "val_bpb")
    with matplotlib.rc_context({**RC, "text.color": "#1d232b", "axes.labelcolor": "#1d232b"}):
        figure = Figure(figsize=(11 if has_accuracies else 8, 3.3), layout="constrained", dpi=150)
        panels = figure.subplots(1, len(widths), width_ratios=widths)
        draw_along_the_clock(panels[0], logs, training)
        draw_along_the_clock(panels[1], logs, validation)
        if has_accuracies:
            draw_accuracies(panels[2], logs)
        figure.savefig(out)


if __name__ == "__main__":
    main()
