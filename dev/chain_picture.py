"""
Draw the stages of one chain along the clock, as in dev/quickstart.png: training loss, validation
bits per byte, and what the last stage answered, by kind of question.

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
    """A bar per kind of question after the last stage that was asked; a dark line is guessing."""
    *_, (stage, summary) = stage_results({log.stage: log.rows for log in logs}).items()
    trained = [log.stage for log in logs]
    hue = colour(trained.index(stage))
    kinds = sorted(summary["kinds"].items(), key=lambda kind: kind[1]["accuracy"])
    for i, (_, result) in enumerate(kinds):
        percent, guessing = 100 * result["accuracy"], 100 * result["chance"]
        axes.barh(i, percent, color=hue, height=0.62, alpha=0.8)
        axes.vlines(guessing, i - 0.31, i + 0.31, color="#1d232b", linewidth=1.6)
        axes.text(102, i, f"{percent:.0f}", ha="left", va="center", color=hue)
    axes.set_yticks(range(len(kinds)), [name for name, _ in kinds])
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 25))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("%; the dark line is guessing")
    axes.set_title(f"{summary['accuracy']:.0%} of {summary['n']} held-out questions")


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
