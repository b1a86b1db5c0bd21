"""
Rows of the tasks' data sets: from the user's folder (--task_dir), else from the hub at a pinned commit, verified and kept in task_data of
the base folder.

A folder holds, under each task's name, what the hub holds (gsm8k/main/test-00000-of-00001.parquet) or simpler files (gsm8k/test.jsonl).
It refuses to guess: a row that is not what the task needs stops the reading, named by file and line.
"""

import csv
import fcntl
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError, base_dir, notice, print0
from nanochat.base.files import sha256_file
from nanochat.data import hub
from nanochat.eval.tasks.common import Item

Make = Callable[
    [dict[str, Any]], Item
]  # a row -> an item; KeyError, TypeError, ValueError or UserError when it cannot be one


@dataclass(frozen=True)
class DataSet:
    """Where rows come from. Evaluations read "val", which is what the authors published as test; training reads "train"."""

    name: str  # of its folder
    repo: str
    commit: str
    hub: Mapping[str, str]  # split -> pattern of the files in the repository
    local: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # split -> further patterns in the user's folder, the first found wins


def files(data: DataSet, split: str, folder: Path | None = None) -> list[Path]:
    """The files of a split: in `folder` if it has them, else fetched. UserError when they cannot be had."""
    if split not in data.hub:
        raise UserError(
            f"{data.name} has no {split} split, only {', '.join(data.hub)}: leave it out"
        )
    if folder is not None:
        if not folder.is_dir():
            raise UserError(
                f"--task_dir {folder} is no folder: name one that holds {data.name}, or leave it out to fetch {data.repo}"
            )
        patterns = f"{data.name}/{data.hub[split]}", *data.local.get(split, ())
        for pattern in patterns:
            if found := sorted(folder.glob(pattern)):
                return [path for path in found if path.parent == found[0].parent]
        notice(f"{folder} has no {' or '.join(patterns)}: taking {data.repo} from the hub")
    return _fetched(data, split)


def _fetched(data: DataSet, split: str) -> list[Path]:
    folder = base_dir() / "task_data" / data.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one rank fetches, the others find it done
        try:
            commit, listed = hub.pin(data.repo, folder, data.commit)
            wanted = [listed[path] for path in sorted(listed) if fnmatch(path, data.hub[split])]
            if not wanted:
                raise UserError(f"{data.repo} has no {data.hub[split]} at commit {commit}")
            new = [
                f
                for f in wanted
                if not (path := folder / f.path).is_file() or path.stat().st_size != f.size
            ]
            if new:
                print0(f"fetching {data.repo} ({split}), commit {commit[:12]}")
                hub.download(data.repo, commit, new, folder)
        except UserError as e:
            raise UserError(f"{e}; or name a folder that holds {data.name} with --task_dir") from e
    return [folder / f.path for f in wanted]


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", row) of a .jsonl, .csv (with a header) or .parquet file. UserError naming the place of what cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                rows = chain.from_iterable(
                    batch.to_pylist() for batch in file.iter_batches(batch_size=1024)
                )
                for number, row in enumerate(rows, 1):
                    yield f"{path}, row {number}", row
        elif path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                rows = csv.DictReader(file, strict=True)
                for row in rows:
                    if None in row or None in row.values():
                        raise UserError(
                            f"{path}, line {rows.line_num}: not the {len(rows.fieldnames or [])} fields of the header; mend it"
                        )
                    yield f"{path}, line {rows.line_num}", row
        else:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}, line {number}", _object(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as e:
        raise UserError(
            f"cannot read {path} ({str(e).splitlines()[0][:120]}): fetch or make it again"
        ) from e


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{place}: this is not JSON ({e}); mend or delete the line") from e
    if not isinstance(row, dict):
        raise UserError(
            f"{place}: this is a {type(row).__name__}, not an object; mend or delete the line"
        )
    return row


def made(make: Make, paths: Iterable[Path]) -> Iterator[Item]:
    """The items of all rows. UserError naming the first row that cannot be one."""
    for path in paths:
        for place, row in read(path):
            try:
                yield make(row)
            except (UserError, KeyError, TypeError, ValueError) as e:
                reason = f"there is no {e}" if isinstance(e, KeyError) else e
                raise UserError(f"{place}: {reason}; mend or delete it") from e


def items_of(data: DataSet, make: Make) -> Callable[..., list[Item]]:
    """Task.items of a data set: all rows are checked, then n are drawn; fewer are the first of more."""

    def items(split: str, n: int, seed: int = 0, folder: Path | None = None) -> list[Item]:
        found = list(made(make, files(data, split, folder)))
        random.Random(seed).shuffle(found)
        return found[: n or None]

    return items


def digest(paths: Iterable[Path]) -> str:
    """A hash of the files' contents."""
    return hashlib.sha256("".join(map(sha256_file, paths)).encode()).hexdigest()[:16]
