"""
Rows of data sets. They are read from the user's folder (--task_dir), or else fetched from the hub
at a pinned commit, verified, and kept in task_data of the base folder.

The user's folder has a folder for each data set, which holds the same files as the hub
(gsm8k/main/test-00000-of-00001.parquet) or simpler ones (gsm8k/test.jsonl). Rows that cannot become
an item lead to a UserError that names their files and lines.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError, base_dir, notice, print0
from nanochat.base.files import locked, sha256_file
from nanochat.data import hub
from nanochat.data.rows import BAD_ROW, Report, read_rows
from nanochat.eval.tasks.common import Item

Row = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """
    Where the rows of a data set come from, and what they become. Evaluations read the split "val",
    which is what the authors published as test; training reads "train".
    """

    name: str  # also of its folder
    repo: str
    commit: str
    item: Callable[[Row], Item]  # KeyError, TypeError, ValueError or UserError for a bad row
    hub: Mapping[str, str]  # split -> pattern of the files in the repository
    # split -> further patterns in the user's folder; the first that matches wins
    local: Mapping[str, Sequence[str]]

    def items(self, split: str, n: int, seed: int = 0, folder: Path | None = None) -> list[Item]:
        """Task.items: checks all rows, shuffles them by `seed` and returns the first n (0: all)."""
        items = list(read_items(self.item, self.files(split, folder)))
        random.Random(seed).shuffle(items)
        return items[: n or None]

    def files(self, split: str, folder: Path | None = None) -> list[Path]:
        """The files of a split: those in `folder` if it has any, or else fetched ones."""
        if split not in self.hub:
            raise UserError(
                f"{self.name} has no {split} split, only {', '.join(self.hub)}: leave it out"
            )
        if folder is None:
            return self._fetch(split)
        if not folder.is_dir():
            raise UserError(
                f"--task_dir {folder} is not a folder: name one that holds {self.name}, "
                f"or leave it out to fetch {self.repo}"
            )
        patterns = f"{self.name}/{self.hub[split]}", *self.local[split]
        for pattern in patterns:
            if paths := sorted(folder.glob(pattern)):
                return [path for path in paths if path.parent == paths[0].parent]
        notice(f"{folder} has no {' or '.join(patterns)}: using {self.repo} from the hub")
        return self._fetch(split)

    def _fetch(self, split: str) -> list[Path]:
        folder = base_dir() / "task_data" / self.name
        with locked(folder / ".lock"):  # one rank fetches the files for all
            try:
                commit, listed = hub.pin(self.repo, folder, self.commit)
                files = [listed[path] for path in sorted(listed) if fnmatch(path, self.hub[split])]
                if not files:
                    raise UserError(
                        f"{self.repo} has no {self.hub[split]} at commit {commit}: name a folder "
                        "that has it with --task_dir"
                    )
                paths = {folder / file.path: file for file in files}
                new = [f for p, f in paths.items() if not p.exists() or p.stat().st_size != f.size]
                if new:
                    print0(f"fetching {self.repo} ({split}), commit {commit[:12]}")
                    hub.download(self.repo, commit, new, folder)
            except UserError as e:
                raise UserError(
                    f"{e}; or name a folder that holds {self.name} with --task_dir"
                ) from e
        return list(paths)


def read_items(
    item: Callable[[Any], Item],
    paths: Iterable[Path],
    report: Report | None = None,
    rows: Callable[[Path, Report], Iterator[tuple[str, Any]]] = read_rows,
) -> Iterator[Item]:
    """
    The item of each row that `rows` reads from the files. Rows that cannot become an item are added
    to `report`; without a report, a UserError at the end names them.
    """
    bad_rows = report or Report()
    for path in paths:
        for place, row in rows(path, bad_rows):
            try:
                yield item(row)
            except BAD_ROW as e:
                reason = f"it has no {e}" if isinstance(e, KeyError) else e
                if not isinstance(row, dict) and not isinstance(e, UserError):
                    reason = f"expected an object, got a {type(row).__name__}"
                bad_rows.bad_row(place, reason)
    if report is None:
        bad_rows.finish()


def read(path: Path) -> Iterator[tuple[str, Row]]:
    """
    ("FILE, line N", row) for each row of a file in a format of data/rows.py. A UserError at the end
    names the rows that cannot be read or are no objects.
    """
    report = Report()
    for place, row in read_rows(path, report):
        if isinstance(row, dict):
            yield place, row
        else:
            report.bad_row(place, f"expected an object, got a {type(row).__name__}")
    report.finish()


def digest(paths: Iterable[Path]) -> str:
    """A hash of the files' contents, 16 hexadecimal digits."""
    return hashlib.sha256("".join(map(sha256_file, paths)).encode()).hexdigest()[:16]
