"""
Readers of text files: .txt, .jsonl and .parquet become documents.

A .txt file is cut into documents of about 16,000 characters, after a paragraph where possible, else
after a line, a sentence or a word; line breaks at a cut are dropped. The other formats hold one
document per row, in the field that is named or in the first of TEXT_FIELDS that the row has.
Documents of white space alone are skipped. Anything that cannot be read (text that is not UTF-8, a
damaged file, a missing field) raises a UserError that names the place.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError

MAX_CHARACTERS = 16_384  # per document cut from a .txt file
TEXT_FIELDS = "text", "content", "body", "document", "article", "story", "passage", "message"
CUT_AFTER = [re.compile(pattern) for pattern in (r"\n\n+", r"\n", r'[.!?]"? |。', r" ")]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the system or pyarrow says about a file, as a UserError."""
    import pyarrow as pa

    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as e:
        raise UserError(
            f"cannot read {path} ({str(e).splitlines()[0][:120]}): download or write it again, or "
            "leave it out"
        ) from e


def read(path: Path, field: str | None) -> Iterator[str]:
    """The documents of one file, each of which can be encoded as UTF-8."""
    with _reading(path):
        for text in READERS[path.suffix.lower()](path, field):
            if text.strip():
                yield text


def text_bytes(path: Path) -> int:
    """Roughly how many bytes of text a file holds; a parquet file's footer states it."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    from pyarrow.parquet import read_metadata

    with _reading(path):
        metadata = read_metadata(path)
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def cut(pieces: Iterable[str], limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """
    Text that arrives in pieces of any size, as documents of at most `limit` characters. Each cut
    falls in the second half of a document, at the best place that CUT_AFTER finds there.
    """
    text, start = "", 0
    for piece in pieces:
        text, start = text[start:] + piece, 0
        while len(text) - start > limit:
            end = _cut_point(text, start + limit // 2, start + limit)
            yield text[start:end].strip("\n")
            start = end
    yield text[start:].strip("\n")


def _cut_point(text: str, first: int, last: int) -> int:
    for pattern in CUT_AFTER:
        ends = [match.end() for match in pattern.finditer(text, first, last)]
        if ends:
            return ends[-1]
    return last


def well_formed(text: str) -> str:
    """`text` with pairs of surrogates joined and lone ones, which UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_txt(path: Path, field: str | None) -> Iterator[str]:
    with open(path, "rb") as raw, TextIOWrapper(raw, encoding="utf-8-sig") as file:
        try:
            yield from cut(iter(lambda: file.read(1 << 20), ""))
        except UnicodeDecodeError as e:
            byte = raw.tell() - len(e.object) + e.start
            raise UserError(
                f"{path} is not UTF-8 at byte {byte}: convert it, for example with iconv"
            ) from e


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """
    ("FILE, line N", value) for every line of a JSON-lines file that is not blank; UserError for a
    line that is not JSON.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{place}: invalid JSON ({e}); fix or delete the line") from e


def _read_jsonl(path: Path, field: str | None) -> Iterator[str]:
    for place, row in json_lines(path):
        yield from _text_of_row(row, field, place)


def _text_of_row(row: Any, field: str | None, place: str) -> Iterator[str]:
    """The text of a row as json.loads returns it; nothing if the field is null."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise UserError(
            f"{place}: expected an object with a text field, got a {type(row).__name__}; fix or "
            "delete the line"
        )
    name = _text_field(row, field, place)
    text = row[name]
    if isinstance(text, str):
        yield well_formed(text)
    elif text is not None:
        raise UserError(
            f"{place}: the field {name} holds a {type(text).__name__}, not text; name a text field "
            "with PATH#FIELD"
        )


def _read_parquet(path: Path, field: str | None) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        column = _text_field(file.schema_arrow.names, field, str(path))
        kind = file.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(
                f"{path}: the column {column} holds {kind}, not text; name a text column with "
                "PATH#FIELD"
            )
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _text_field(names: Iterable[str], field: str | None, place: str) -> str:
    names = list(names)
    candidates = [field] if field else TEXT_FIELDS
    for name in candidates:
        if name in names:
            return name
    hint = "name the field that holds the text with PATH#FIELD"
    if "messages" in names and not field:
        hint = "these are conversations, train on them with mid_train or chat_sft"
    raise UserError(
        f"{place} has no field {' or '.join(candidates[:3])}, only "
        f"{', '.join(map(str, names)) or 'none'}: {hint}"
    )


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
