"""
Write one HTML page about a model: the curves, figures, samples, settings and costs of its stages.

    nanochat report                the model that was trained last
    nanochat report d4 d6          two models on one page
    nanochat report --watch        keeps the page up to date while a model trains
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.base.common import entry, print0
from nanochat.base.knobs import knob, parse


@dataclass(frozen=True)
class ReportKnobs:
    """Report"""

    runs: tuple[str, ...] = knob(
        (), "model tags or folders of runs (default: the tag trained last)", positional=True
    )
    out: str = knob(
        "",
        "file to write (default: report/TAG.html in the base folder, where every stage also "
        "writes it; report.html for several tags)",
        alias="-o",
    )
    watch: bool = knob(
        False, "keep the page up to date until Ctrl+C; a browser that shows it follows by itself"
    )
    watts: float = knob(
        0.0, "power that the machine draws while it trains, to estimate the energy", low=0
    )


def main(argv: Sequence[str] | None = None) -> Path:
    knobs, _ = parse(ReportKnobs, argv, command="report")

    from nanochat.study.report import default_page, find_runs, watch, write_report

    if knobs.watch:
        page = watch(knobs.runs, knobs.out, knobs.watts)
    else:
        runs = find_runs(knobs.runs)
        page = write_report(runs, knobs.out or default_page(runs), knobs.watts)
    print0(page)
    return page


if __name__ == "__main__":
    entry(main)
