"""Write one HTML page with the curves of your runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.base import knobs
from nanochat.base.common import base_dir, entry, print0
from nanochat.base.knobs import knob
from nanochat.study.report import build, curves_png, find_runs


@dataclass(frozen=True)
class Knobs:
    """Report"""

    directories: tuple[str, ...] = knob(
        (), "folders of runs; all under the base folder when none is given", positional=True
    )
    out: str = knob("", "the page to write; report.html in the base folder when empty", alias="-o")
    png: str = knob("", "also write a picture of the runs as one chain of stages to this file")


def main(argv: Sequence[str] | None = None) -> None:
    k, _ = knobs.parse(Knobs, argv, command="report")
    directories = list(k.directories) or find_runs()
    print0(build(directories, k.out or base_dir() / "report.html"))
    if k.png:
        print0(curves_png(directories, k.png))


if __name__ == "__main__":
    entry(main)
