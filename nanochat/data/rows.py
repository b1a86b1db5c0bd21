"""
Opens files as people have them, and reads rows from them: .jsonl, .json, .csv, .tsv and .parquet
give ("FILE, line N", value) for text, conversations and tasks alike.

Compression (gzip, bzip2, xz, zstd) is recognised by its first bytes, UTF-16 and UTF-32 by their
byte-order mark, UTF-16 without one by its zero bytes. Text that is not UTF-8 is read in the
encoding that charset-normalizer guesses, and the report says so. A file that is only a pointer of
git-lfs or git-annex is an error that says how to get the data. Bad rows are collected in a Report,
so that one message names them all.
"""

import bz2
import codecs
import csv
import errno
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

from nanochat.base.common import UserError, counted, human, optional
from nanochat.base.strangers import shown
from nanochat.data.folders import BEFORE_JSON, TABLES, delimiter_of, format_of, kind_of

Rows = Iterator[tuple[str, Any]]  # (place, value)
# What converting a malformed row may raise
BAD_ROW = (UserError, LookupError, TypeError, ValueError, AttributeError)

LONGEST_ROW = 1 << 28  # bytes of a line
SHOWN = 5  # bad rows that a message names
MOST_COLLECTED = 1000  # bad rows, after which reading stops
PARQUET_ROWS = 64  # per batch: few, because one row may hold megabytes
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a pointer of git-lfs: run `git lfs pull`",
    b"version https://hawser.github.com/spec/": "a pointer of git-lfs: run `git lfs pull`",
    b"/annex/objects/": "a pointer of git-annex: run `git annex get`",
    b"# xet version": "a pointer of git-xet: run `git xet checkout`",
}
# The usual encodings of text that is not UTF-8, the most frequent ones first
ENCODINGS = (
    "cp1252 iso8859_15 cp1250 iso8859_2 cp1251 koi8_r koi8_u cp866 cp1253 iso8859_7 cp1254 cp1255 "
    "cp1256 cp1257 cp1258 cp932 euc_jp iso2022_jp gb18030 big5 cp949 tis_620 cp850 mac_roman"
)
SAMPLE = 1 << 16  # bytes around the first that is not UTF-8
STRAY = 4  # a text with more letters beyond ASCII per undecodable byte than this is UTF-8, damaged
ASCII = bytes(range(32, 92))  # what every encoding of a page but UTF-16 and the like has in common
# Encodings that a page declares, and what browsers take them for, which has more characters
AS_IN_BROWSERS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
DECLARED = re.compile(
    rb"""<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?([\w.:-]{1,40})""", re.I
)


class TooManyBadRows(UserError):
    """More rows cannot be used than may be left out."""


class Report:
    """
    What reading a source found: notes (text -> count) for the data summary, the files read (format
    -> count), the files skipped (reason, file), and the problems of bad rows ("FILE, line N:
    reason"), of which --skip_bad_rows leaves `limit` out; None: the command has no such flag.
    """

    def __init__(self, limit: int | None = None):
        self.limit = limit or 0
        self._has_flag = limit is not None
        self.notes: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.skipped: list[tuple[str, str]] = []
        self.level = 0  # how many archives the file that is being read lies in
        self.problems: list[str] = []

    def clear(self) -> None:
        """Forget everything, because reading starts again."""
        for collection in (self.notes, self.read, self.skipped, self.problems):
            collection.clear()

    def skip(self, path: Path, error: UserError) -> None:
        """List a file as skipped, for the reason that the error gives, without its path."""
        reason = str(error).removeprefix(f"{path}: ").replace(f"{path} is ", "it is ")
        self.skipped.append((reason.replace(str(path), "it"), str(path)))

    def rename(self, old: str, new: str) -> None:
        """Name files that lie in the folder `old` as if they lay in `new`."""
        self.skipped = [(r.replace(old, new), name.replace(old, new)) for r, name in self.skipped]
        self.problems = [problem.replace(old, new) for problem in self.problems]

    def bad_row(self, place: str, reason: object) -> None:
        """Leave a row out. Raises UserError once there are far too many."""
        self.problems.append(f"{place}: {reason}")
        if len(self.problems) > self.limit + MOST_COLLECTED:
            self.finish()

    def finish(self) -> None:
        """
        Call this at the end. Raises TooManyBadRows, which names the bad rows, if there are more
        than `limit`.
        """
        count = len(self.problems)
        if count > self.limit:
            at_least = "at least " if count > self.limit + MOST_COLLECTED else ""
            named = "; ".join([*self.problems[:SHOWN], "..."] if count > SHOWN else self.problems)
            skip = f", or skip them with --skip_bad_rows {count}" if self._has_flag else ""
            raise TooManyBadRows(
                f"{at_least}{counted(count, 'rows')} cannot be used: {named}; correct or delete "
                f"them{skip}"
            )
        if count:
            self.notes["bad rows skipped"] = count


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the system, a decompressor or pyarrow about a file into a UserError."""
    import pyarrow as pa

    faults = OSError, UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError, csv.Error
    try:
        yield
    except (*faults, pa.ArrowException) as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # nothing is wrong with the file
        what = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise UserError(
            f"cannot read {path} ({what}): check its permissions, replace it with an undamaged "
            "copy, or leave it out"
        ) from e


def of_each(paths: Sequence[Path], read: Callable[[Path], Any]) -> list[Any]:
    """What `read` returns for each file; UserError, as by reading(), if it cannot be read."""
    values = []
    for path in paths:
        with reading(path):
            values.append(read(path))
    return values


def open_bytes(path: Path) -> io.BufferedReader:
    """
    Open a file for its bytes, decompressed. Raises UserError for a pointer of git-lfs or the like.
    """
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
        import pyarrow as pa

        opened = pa.input_stream(str(path), compression="zstd")
    else:
        return open(path, "rb")
    return io.BufferedReader(opened, 1 << 16)


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with `head`: UTF-16 or UTF-32 if evident, or UTF-8."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    pairs = len(head) // 2
    even, odd = head[: 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)  # zero bytes
    if pairs and max(even, odd) > 0.3 * pairs and min(even, odd) < 0.05 * pairs:
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8-sig"


def guessed_encoding(sample: bytes) -> str | None:
    """
    The encoding of bytes that are not UTF-8, as charset-normalizer guesses it; None if they do not
    look like text in any of ENCODINGS.
    """
    from_bytes, names = optional("charset_normalizer", "documents").from_bytes, ENCODINGS.split()
    # ASCII tells nothing about the encoding, so each line counts from its first other byte on
    telling = b"\n".join(re.findall(rb"[\x80-\xff][^\n]*", sample))
    best = from_bytes(telling[:SAMPLE], cp_isolation=names).best()
    if best is None:
        return None
    # Several encodings often give the same text: take the most frequent one
    possible = {best.encoding, *best.could_be_from_charset}
    return next((name for name in names if name in possible), None)


def encoding_of_file(path: Path) -> tuple[str, str]:
    """
    (encoding, errors) with which open() can read a text. Reads the file up to its first byte that
    is not UTF-8, and looks at the bytes around that one. Raises UserError for a file that is not
    text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, position = b"", 0
    with open_bytes(path) as file:
        encoding = encoding_of(file.peek(4096)[:4096])
        if encoding != "utf-8-sig":
            return encoding, "strict"
        while chunk := file.read(1 << 20):
            if b"\0" in chunk:
                raise UserError(
                    f"{path} holds zero bytes, so it is not text: convert it, or remove the zero "
                    "bytes with tr -d '\\000'"
                )
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as e:
                # e.object begins with what the decoder had kept of the chunk before
                start = position - (len(e.object) - len(chunk)) + e.start
                sample = before[-SAMPLE:] + chunk + file.read(SAMPLE)
                break
            before, position = chunk, position + len(chunk)
        else:
            ends_within_a_character = bool(decoder.getstate()[0])
            return encoding, "replace" if ends_within_a_character else "strict"
    good = sum(not c.isascii() for c in sample.decode("utf-8", "ignore"))
    bad = sample.decode("utf-8", "replace").count("\ufffd")
    if good > STRAY * bad:
        return encoding, "replace"  # UTF-8 with a few damaged bytes
    if b"\0" in sample or (guess := guessed_encoding(sample)) is None:
        raise UserError(f"{path} is not UTF-8 at byte {start}: convert it, for example with iconv")
    return guess, "replace"


def encoding_of_html(data: bytes, report: Report) -> str:
    """The encoding of a page: its byte-order mark, else what it declares, else UTF-8 or a guess."""
    encoding = encoding_of(data[:4096])
    if encoding != "utf-8-sig" or data.startswith(codecs.BOM_UTF8):
        return encoding
    declared, encoding = DECLARED.search(data[:4096]), "utf-8"
    with suppress(LookupError, UnicodeError):  # if it declares no encoding of text
        name = codecs.lookup(declared[1].decode("ascii") if declared else encoding).name
        # A page that declares UTF-16 but is not in it is in UTF-8, says the standard of HTML
        if ASCII.decode(name, "replace") == ASCII.decode():
            encoding = AS_IN_BROWSERS.get(name, name)
    try:
        data.decode(encoding)
    except UnicodeDecodeError as e:
        encoding = guessed_encoding(data[max(0, e.start - SAMPLE) : e.start + (1 << 20)]) or "utf-8"
        report.notes[f"files read as {encoding.upper()} (guessed)"] += 1
    return encoding


def open_text(path: Path, report: Report, newline: str | None = None) -> IO[str]:
    """Open a file as text. The report notes an encoding other than UTF-8 and damaged bytes."""
    encoding, errors = encoding_of_file(path)
    if errors == "replace" and encoding == "utf-8-sig":
        report.notes["files with damaged bytes, read as U+FFFD"] += 1
    elif encoding != "utf-8-sig":
        guess = " (guessed)" if errors == "replace" else ""
        report.notes[f"files read as {encoding.upper()}{guess}"] += 1
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors=errors, newline=newline)


def lines(path: Path, report: Report) -> Iterator[bytes]:
    """The lines of a file in UTF-8. Raises UserError for one of LONGEST_ROW bytes or more."""
    with open_bytes(path) as file:
        if (encoding := encoding_of(file.peek(4096)[:4096])) != "utf-8-sig":
            report.notes[f"files read as {encoding.upper()}"] += 1
            with io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
                yield from (line.encode("utf-8", "surrogatepass") for line in text)
            return
        number = 0
        while line := file.readline(LONGEST_ROW):
            number += 1
            if len(line) == LONGEST_ROW:
                raise UserError(
                    f"{path}, line {number} has {LONGEST_ROW:,} bytes or more: write one document "
                    "per line"
                )
            yield line


def read_rows(path: Path, report: Report, fields: Collection[str] = ()) -> Rows:
    """
    ("FILE, line N", value) for each row of a file: an object, a list or a text. Of a parquet file
    with columns among `fields`, only these are read. Rows that cannot be read go to the report.
    Raises UserError for a file that cannot be read.
    """
    with reading(path):
        kind = kind_of(path)
        if kind == ".parquet":
            yield from _parquet_rows(path, fields)
        elif kind in TABLES:
            yield from _csv_rows(path, report)
        else:
            yield from _json_rows(path, report)


def _json_rows(path: Path, report: Report) -> Rows:
    """The rows of a file with one JSON value per line, or of a .json file that is one value."""
    whole = _whole(path, report) if format_of(path) == ".json" else None
    if whole:
        try:
            value = json.loads(whole)
        except (ValueError, RecursionError) as e:
            if whole.lstrip(BEFORE_JSON).startswith(b"["):
                raise UserError(f"{path}: invalid JSON ({e}); correct it, or leave it out") from e
        else:
            for number, row in enumerate(value if isinstance(value, list) else [value], 1):
                yield f"{path}, row {number}", row
            return
    for number, line in enumerate(lines(path, report), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as e:
            if whole == b"" and number == 1:
                raise UserError(
                    f"{path} has more than {human(LONGEST_ROW)} bytes and no JSON value on its "
                    "first line: divide it, or convert it to .jsonl"
                ) from e
            report.bad_row(f"{path}, line {number}", f"invalid JSON ({e})")


def _whole(path: Path, report: Report) -> bytes:
    """The bytes of a file in UTF-8; b"" for a file too long to be read as one JSON value."""
    whole = bytearray()
    for line in lines(path, report):
        whole += line
        if len(whole) > LONGEST_ROW:
            return b""
    return bytes(whole)


def _csv_rows(path: Path, report: Report) -> Rows:
    csv.field_size_limit(LONGEST_ROW)
    with open_text(path, report, newline="") as file:
        header = file.readline()
        delimiter = delimiter_of(format_of(path), header)
        rows = csv.DictReader(chain([header], file), strict=True, delimiter=delimiter)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as e:
                if str(e) == "unexpected end of data":
                    raise  # the file was cut off
                report.bad_row(f"{path}, line {rows.line_num + 1}", e)
                continue
            place = f"{path}, line {rows.line_num}"
            # An unpaired quotation mark joins all fields up to the next mark into one
            joined = delimiter == "\t" and any(
                "\n" in str(v) and "\t" in str(v) for v in row.values()
            )
            if joined or None in row or None in row.values():
                width = len(rows.fieldnames or [])
                report.bad_row(place, f"expected {width} fields, as in the header")
            else:
                yield place, row


def open_parquet(path: Path) -> Any:
    """
    A pyarrow ParquetFile. Raises UserError for a pointer of git-lfs or the like, and if two columns
    have the same name.
    """
    from pyarrow.parquet import ParquetFile

    open_bytes(path).close()  # it checks for pointers
    file = ParquetFile(path)
    repeated = [name for name, n in Counter(file.schema_arrow.names).items() if n > 1]
    if repeated:
        file.close()
        raise UserError(f"{path} has several columns called {shown(repeated[0])}: rename them")
    return file


def _parquet_rows(path: Path, fields: Collection[str]) -> Rows:
    with open_parquet(path) as file:
        columns = [name for name in file.schema_arrow.names if name in fields] or None
        batches = file.iter_batches(batch_size=PARQUET_ROWS, columns=columns)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
