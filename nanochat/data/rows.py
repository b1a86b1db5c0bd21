"""
Opens files as people have them, and reads rows from them: .jsonl, .json, .csv, .tsv and .parquet
give ("FILE, line N", value) for text, conversations and tasks alike.

Compression (gzip, bzip2, xz, zstd) is recognised by its first bytes, UTF-16 and UTF-32 by their
byte-order mark, UTF-16 without one by its zero bytes. A pointer of git-lfs or git-annex is named as
what it is. Bad rows are collected in a Report, so that all are named at once.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from nanochat.base.common import UserError
from nanochat.data.folders import BEFORE_JSON, format_of

LONGEST_ROW = 1 << 28  # bytes of a line; a longer one is no row of text
SHOWN = 5  # bad rows that a message names
MOST_COLLECTED = 1000  # bad rows, after which reading stops
PARQUET_ROWS = 64  # per batch: few, because one row may hold megabytes
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a pointer of git-lfs: run `git lfs pull`",
    b"version https://hawser.github.com/spec/": "a pointer of git-lfs: run `git lfs pull`",
    b"/annex/objects/": "a pointer of git-annex: run `git annex get`",
    b"# xet version": "a pointer of git-xet: run `git xet checkout`",
}
UTF16_MARKS = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
UTF32_MARKS = codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE


class Report:
    """
    What reading a source came upon: notes (reason -> count) for the data summary, and bad rows, of
    which `limit` may be left out.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.notes: Counter[str] = Counter()
        self.problems: list[str] = []

    def clear(self) -> None:
        """Forget everything, because reading starts again."""
        self.notes.clear()
        self.problems.clear()

    def bad_row(self, place: str, reason: object) -> None:
        """Leave a row out. Raises UserError once there are far too many."""
        self.problems.append(f"{place}: {reason}")
        if len(self.problems) > self.limit + MOST_COLLECTED:
            self.finish()

    def finish(self) -> None:
        """Call this at the end: UserError that names the bad rows if they exceed `limit`."""
        count = len(self.problems)
        if count > self.limit:
            named = "; ".join(self.problems[:SHOWN])
            if count == 1:
                raise UserError(f"{named}; fix or delete it, or skip it with --skip_bad_rows 1")
            more = f" (the first {SHOWN})" if count > SHOWN else ""
            at_least = "at least " if count > self.limit + MOST_COLLECTED else ""
            raise UserError(
                f"{at_least}{count:,} rows cannot be used: {named}{more}; fix or delete them, or "
                f"skip them with --skip_bad_rows {count}"
            )
        if count:
            self.notes["bad rows skipped"] = count


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system, a decompressor or pyarrow says about a file, as a UserError."""
    import pyarrow as pa

    faults = OSError, UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError, csv.Error
    try:
        yield
    except (*faults, pa.ArrowException) as e:
        what = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise UserError(
            f"cannot read {path} ({what}): download or write it again, or leave it out"
        ) from e


class _Zstandard(io.RawIOBase):
    """A zstd file, decompressed by pyarrow."""

    def __init__(self, path: Path):
        import pyarrow as pa

        self.stream = pa.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed. Raises UserError for a pointer to a file elsewhere."""
    with open(path, "rb") as file:
        head = file.read(64)
    for start, meaning in POINTERS.items():
        if head.startswith(start):
            raise UserError(f"{path} is {meaning} in its folder to get the data")
    if head.startswith(b"\x1f\x8b"):
        opened: Any = gzip.GzipFile(path)
    elif head.startswith(b"BZh"):
        opened = bz2.BZ2File(path)
    elif head.startswith(b"\xfd7zXZ\x00"):
        opened = lzma.LZMAFile(path)  # noqa: SIM115 (the caller closes it)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        opened = _Zstandard(path)
    else:
        return open(path, "rb")
    return cast(BinaryIO, io.BufferedReader(opened, 1 << 16))


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with these bytes: UTF-8 unless they speak for another."""
    if head.startswith(UTF32_MARKS):
        return "utf-32"
    if head.startswith(UTF16_MARKS):
        return "utf-16"
    pairs = len(head) // 2
    even, odd = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if pairs and max(even, odd) > 0.3 * pairs and min(even, odd) < 0.05 * pairs:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8-sig"


def open_text(path: Path, report: Report) -> tuple[IO[str], BinaryIO]:
    """A file as text, and the bytes behind it; an encoding that was guessed is noted."""
    raw = open_bytes(path)
    head = cast(io.BufferedReader, raw).peek(4096)[:4096]
    encoding = encoding_of(head)
    if encoding != "utf-8-sig":
        report.notes[f"files read as {encoding.upper()}"] += 1
    return io.TextIOWrapper(raw, encoding=encoding), raw


def lines(path: Path, report: Report) -> Iterator[bytes]:
    """The lines of a file in UTF-8."""
    with open_bytes(path) as file:
        head = cast(io.BufferedReader, file).peek(4096)[:4096]
        if (encoding := encoding_of(head)) != "utf-8-sig":
            report.notes[f"files read as {encoding.upper()}"] += 1
            with io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
                yield from (line.encode("utf-8", "surrogatepass") for line in text)
            return
        number = 0
        while line := file.readline(LONGEST_ROW):
            number += 1
            if len(line) == LONGEST_ROW:
                raise UserError(
                    f"{path}, line {number} is longer than {LONGEST_ROW:,} bytes: write one "
                    "document per line"
                )
            yield line


def read_rows(path: Path, report: Report) -> Iterator[tuple[str, Any]]:
    """
    ("FILE, line N", value) for each row of a file: an object, a list or a text. Rows that cannot
    be read go to the report. Raises UserError for a file that cannot be read.
    """
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
    with reading(path):
        yield from readers.get(format_of(path), _json_rows)(path, report)


def _json_rows(path: Path, report: Report) -> Iterator[tuple[str, Any]]:
    if format_of(path) == ".json":
        with open_bytes(path) as file:
            head = cast(io.BufferedReader, file).peek(64)
        if head.lstrip(BEFORE_JSON).startswith(b"["):
            yield from _json_list(path, report)
            return
    for number, line in enumerate(lines(path, report), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as e:
            report.bad_row(f"{path}, line {number}", f"invalid JSON ({e})")


def _json_list(path: Path, report: Report) -> Iterator[tuple[str, Any]]:
    """The rows of a file that is one list in JSON."""
    try:
        rows = json.loads(b"".join(lines(path, report)))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: invalid JSON ({e}); fix it, or leave it out") from e
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _csv_rows(path: Path, report: Report) -> Iterator[tuple[str, Any]]:
    file, _ = open_text(path, report)
    csv.field_size_limit(LONGEST_ROW)
    with file:
        delimiter = "\t" if format_of(path) == ".tsv" else ","
        file.reconfigure(newline="")  # pyright: ignore[reportAttributeAccessIssue]
        rows = csv.DictReader(file, strict=True, delimiter=delimiter)
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                width = len(rows.fieldnames or [])
                report.bad_row(place, f"expected {width} fields, as in the header")
            else:
                yield place, row


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile; UserError for a pointer to a file elsewhere."""
    from pyarrow.parquet import ParquetFile

    open_bytes(path).close()
    return ParquetFile(path)


def _parquet_rows(path: Path, report: Report) -> Iterator[tuple[str, Any]]:
    with open_parquet(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=PARQUET_ROWS))
        for number, row in enumerate(chain.from_iterable(batches), 1):
            yield f"{path}, row {number}", row
