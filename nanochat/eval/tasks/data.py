"""
Rows of data sets: from the user's folder (--task_dir), else from the hub at a pinned commit,
verified and kept in task_data of the base folder.

A folder holds, under each data set's name, the same files as the hub
(gsm8k/main/test-00000-of-00001.parquet) or simpler ones (gsm8k/test.jsonl). A row that cannot
become an item stops the reading with a UserError that names its file and line.
"""

import csv
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError, base_dir, notice, print0
from nanochat.base.files import locked, sha256_file
from nanochat.data import hub
from nanochat.data.documents import json_lines
from nanochat.eval.tasks.common import Item

Row = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """
    Where rows come from and what a row becomes. Evaluations read "val", which is what the authors
    published as test; training reads "train".
    """

    name: str  # of its folder
    repo: str
    commit: str
    item: Callable[[Row], Item]  # KeyError, TypeError, ValueError or UserError for a bad row
    hub: Mapping[str, str]  # split -> pattern of the files in the repository
    # split -> further patterns in the user's folder; the first that matches wins
    local: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def items(self, split: str, n: int, seed: int = 0, folder: Path | None = None) -> list[Item]:
        """Task.items: checks all rows, shuffles them by `seed` and returns the first n (0: all)."""
        items = list(read_items(self.item, self.files(split, folder)))
        random.Random(seed).shuffle(items)
        return items[: n or None]

    def files(self, split: str, folder: Path | None = None) -> list[Path]:
        """The files of a split: from `folder` if it has them, else fetched."""
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
        patterns = f"{self.name}/{self.hub[split]}", *self.local.get(split, ())
        for pattern in patterns:
            if paths := sorted(folder.glob(pattern)):
                return [path for path in paths if path.parent == paths[0].parent]
        notice(f"{folder} has no {' or '.join(patterns)}: using {self.repo} from the hub")
        return self._fetch(split)

    def _fetch(self, split: str) -> list[Path]:
        folder = base_dir() / "task_data" / self.name
        with locked(folder / ".lock"):  # one rank fetches, the others then have the files
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


def read_items(item: Callable[[Row], Item], paths: Iterable[Path]) -> Iterator[Item]:
    """The item of each row of the files; UserError for the first row that cannot become one."""
    for path in paths:
        for place, row in read(path):
            try:
                yield item(row)
            except (UserError, KeyError, TypeError, ValueError) as e:
                reason = f"it has no {e}" if isinstance(e, KeyError) else e
                raise UserError(f"{place}: {reason}; fix or delete it") from e


def read(path: Path) -> Iterator[tuple[str, Row]]:
    """
    ("FILE, line N", row) for each row of a .jsonl, .csv (with a header) or .parquet file.
    UserError for what cannot be read.
    """
    import pyarrow as pa

    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers.get(path.suffix, _read_jsonl)(path)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as e:
        raise UserError(
            f"cannot read {path} ({str(e).splitlines()[0][:120]}): download or write it again"
        ) from e


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
        for number, row in enumerate(chain.from_iterable(batches), 1):
            yield f"{path}, row {number}", row


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                width = len(rows.fieldnames or [])
                raise UserError(
                    f"{place}: expected {width} fields, as in the header; fix or delete the line"
                )
            yield place, row


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for place, row in json_lines(path):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f"{place}: expected an object, got a {kind}; fix or delete the line")
        yield place, row


def digest(paths: Iterable[Path]) -> str:
    """A hash of the files' contents."""
    return hashlib.sha256("".join(map(sha256_file, paths)).encode()).hexdigest()[:16]
