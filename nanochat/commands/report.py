"""Write one HTML page with the curves of your runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.base.common import base_dir, entry, print0
from nanochat.base.knobs import knob, parse


@dataclass(frozen=True)
class ReportKnobs:
    """Report"""

    directories: tuple[str, ...] = knob(
        (), "folders of runs (default: all runs under the base folder)", positional=True
    )
    out: str = knob("", "file to write (default: report.html in the base folder)", alias="-o")


def main(argv: Sequence[str] | None = None) -> Path:
    knobs, _ = parse(ReportKnobs, argv, command="report")

    from nanochat.study.report import find_runs, write_report

    directories = knobs.directories or find_runs()
    page = write_report(directories, knobs.out or base_dir() / "report.html")
    print0(page)
    return page


if __name__ == "__main__":
    entry(main)
