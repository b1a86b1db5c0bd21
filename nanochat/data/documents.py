"""
Text of files as documents: .txt, or the text field of the rows that rows.py reads.

A .txt file is cut into documents of about 16,000 characters, after a paragraph where possible, else
after a line, a sentence or a word; line breaks at a cut are dropped. Where it has separators such
as <|endoftext|>, a document ends there, and the separator is dropped. The other formats hold one
document per row, in the field that is named or in the first of TEXT_FIELDS that the row has.
Documents of white space alone are skipped. A file that cannot be read raises a UserError that names
the place; rows that cannot be read go to the report.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from nanochat.base.common import UserError
from nanochat.data.folders import COMPRESSED, format_of
from nanochat.data.rows import (
    PARQUET_ROWS,
    Report,
    open_parquet,
    open_text,
    read_rows,
    reading,
)

MAX_CHARACTERS = 16_384  # per document cut from a .txt file
TEXT_FIELDS = "text", "content", "body", "document", "article", "story", "passage", "message"
CUT_AFTER = [re.compile(pattern) for pattern in (r"\n\n+", r"\n", r'[.!?]"? |。', r" ")]
# What other programs write between documents: these anywhere, the short ones on a line of their own
SEPARATOR = re.compile(
    r"<\|(?:endoftext|end_of_text|startoftext|begin_of_text|end_of_document)\|>"
    r"|^[ \t]*(?:</s>|<s>|<eos>|<bos>|<EOD>|\[EOS\]|\[SEP\])[ \t]*$",
    re.MULTILINE,
)
MAYBE_SEPARATOR = "<|", "</s>", "<s>", "<eos>", "<bos>", "<EOD>", "[EOS]", "[SEP]"
LONGEST_SEPARATOR = 32


def read(path: Path, field: str | None, report: Report | None = None) -> Iterator[str]:
    """
    The documents of one file, each of which can be encoded as UTF-8. Without a report, a bad row
    raises a UserError at the end of the file.
    """
    into = report or Report()
    kind = format_of(path)
    reader = {".txt": _read_txt, ".parquet": _read_parquet}.get(kind, _read_rows)
    with reading(path):
        for text in reader(path, field, into):
            if text.strip():
                yield text
            elif kind != ".txt":
                into.notes["documents without text skipped"] += 1
    if report is None:
        into.finish()


def text_bytes(path: Path) -> int:
    """Roughly how many bytes of text a file holds; a parquet file's footer states it."""
    if format_of(path) != ".parquet":
        return path.stat().st_size * (4 if path.suffix.lower() in COMPRESSED else 1)
    with reading(path), open_parquet(path) as file:
        metadata = file.metadata
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def cut(pieces: Iterable[str | None], limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """
    Text that arrives in pieces of any size, as documents of at most `limit` characters. Each cut
    falls in the second half of a document, at the best place that CUT_AFTER finds there. None among
    the pieces ends a document.
    """
    text, start = "", 0
    for piece in pieces:
        if piece is None:
            yield text[start:].strip("\n")
            text, start = "", 0
            continue
        text, start = text[start:] + piece, 0
        while len(text) - start > limit:
            end = cut_point(text, start + limit // 2, start + limit)
            yield text[start:end].strip("\n")
            start = end
    yield text[start:].strip("\n")


def cut_point(text: str, first: int, last: int) -> int:
    """Where to cut a text between two places: after what CUT_AFTER finds, else at the last."""
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


def _read_txt(path: Path, field: str | None, report: Report) -> Iterator[str]:
    file, raw = open_text(path, report)
    with file:
        try:
            yield from cut(_separated(file, path, report))
        except UnicodeDecodeError as e:
            byte = raw.tell() - len(e.object) + e.start
            raise UserError(
                f"{path} is not {e.encoding.upper()} at byte {byte}: convert it, for example with "
                "iconv"
            ) from e


def _separated(file: IO[str], path: Path, report: Report) -> Iterator[str | None]:
    """The text of a file in pieces that end with a line where possible; None at a separator."""
    rest = ""
    while chunk := file.read(1 << 20):
        # To the end of the line, so that no separator is torn; a line without end keeps its tail
        chunk = rest + chunk + (chunk[-1:] != "\n") * file.readline(1 << 20)
        torn = re.search(r"[ \t]*[<\[]", tail := chunk[-LONGEST_SEPARATOR:])
        rest = tail[torn.start() :] if torn and chunk[-1] != "\n" else ""
        yield from _at_separators(chunk[: len(chunk) - len(rest)], path, report)
    yield from _at_separators(rest, path, report)


def _at_separators(text: str, path: Path, report: Report) -> Iterator[str | None]:
    if "\0" in text:
        raise UserError(
            f"{path} holds zero bytes, so it is not text: convert it, or remove them with "
            "tr -d '\\000'"
        )
    start = 0
    if any(mark in text for mark in MAYBE_SEPARATOR):
        for found in SEPARATOR.finditer(text):
            report.notes[f"documents ended at {found[0].strip()}"] += 1
            yield text[start : found.start()]
            yield None
            start = found.end()
    yield text[start:]


def _read_rows(path: Path, field: str | None, report: Report) -> Iterator[str]:
    for place, row in read_rows(path, report):
        try:
            text = _text_of_row(row, field)
        except UserError as e:
            report.bad_row(place, e)
            continue
        yield text


def _text_of_row(row: Any, field: str | None) -> str:
    """The text of a row; "" if its field is null."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise UserError(f"expected an object with a text field, got a {type(row).__name__}")
    name = text_field(row, field)
    return _as_text(row[name], name)


def _as_text(value: Any, name: str) -> str:
    """Text, bytes in UTF-8, or a list of texts, as one text of lines."""
    if value is None:
        return ""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list) and all(isinstance(part, str | bytes | None) for part in value):
        return "\n".join(_as_text(part, name) for part in value)
    raise UserError(
        f"the field {name} holds a {type(value).__name__}, not text; name a text field with "
        "PATH#FIELD"
    )


def _read_parquet(path: Path, field: str | None, report: Report) -> Iterator[str]:
    with open_parquet(path) as file:
        try:
            column = text_field(file.schema_arrow.names, field)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e
        kind = file.schema_arrow.field(column).type
        if not _holds_text(kind):
            raise UserError(
                f"{path}: the column {column} holds {kind}, not text; name a text column with "
                "PATH#FIELD"
            )
        number = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                try:
                    text = _as_text(value, column)
                except UnicodeDecodeError as e:
                    report.bad_row(f"{path}, row {number}", e)
                    continue
                yield text


def _holds_text(kind: Any) -> bool:
    """Whether a column of this Arrow type holds text, in any of the ways that Arrow has for it."""
    import pyarrow.types as types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _holds_text(kind.value_type)
    if types.is_fixed_size_list(kind):
        return _holds_text(kind.value_type)
    views = types.is_string_view(kind) or types.is_binary_view(kind)
    plain = types.is_string(kind) or types.is_large_string(kind)
    return views or plain or types.is_binary(kind) or types.is_large_binary(kind)


def text_field(names: Iterable[str], field: str | None) -> str:
    """The field that holds the text: `field`, or the first of TEXT_FIELDS. UserError if missing."""
    names = list(names)
    candidates = [field] if field else TEXT_FIELDS
    for name in candidates:
        if name in names:
            return name
    hint = "name the field that holds the text with PATH#FIELD"
    if {"messages", "conversations"} & set(names) and not field:
        hint = "these are conversations, train on them with mid_train or chat_sft"
    shown = ", ".join(map(str, names[:12])) + ", ..." * (len(names) > 12)
    raise UserError(
        f"it has no field {' or '.join(candidates[:3])}, only {shown or 'none'}: {hint}"
    )
