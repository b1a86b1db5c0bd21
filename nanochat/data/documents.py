"""
Text of files as documents: plain text, what readers.py reads, or the text field of the rows that
rows.py reads; and all of these in archives.

A plain text is cut into documents of about 16,000 characters, after a paragraph where possible,
else after a line, a sentence or a word; line breaks at a cut are dropped. The other formats hold
one document per row, in the field that is named or in the first of TEXT_FIELDS that the row has. A
field within another is written post.body, and several make up a template, {title}\\n\\n{body}.
Where a text of any format has separators such as <|endoftext|>, a document ends there, and the
separator is dropped. Documents of white space alone are skipped. A file that cannot be read raises
a UserError that names the place; of several files, it goes to the report, as rows that cannot be
read do.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

from nanochat.base.common import UserError
from nanochat.data import dialogue, shapes
from nanochat.data.folders import (
    ARCHIVES,
    COMPRESSED,
    PLAIN,
    ROWS,
    TEXT,
    TEXT_FIELDS,
    kind_of,
)
from nanochat.data.readers import READERS, Reader, unpacked
from nanochat.data.rows import (
    Report,
    TooManyBadRows,
    open_parquet,
    open_text,
    read_rows,
    reading,
)

MAX_CHARACTERS = 16_384  # per document cut from a .txt file
CUT_AFTER = [re.compile(pattern) for pattern in (r"\n\n+", r"\n", r'[.!?]"? |。', r" ")]
# What other programs write between documents: these anywhere, the short ones on a line of their own
SEPARATOR = re.compile(
    r"<\|(?:endoftext|end_of_text|startoftext|begin_of_text|end_of_document|bos|eos)\|>"
    r"|^[ \t]*(?:</s>|<s>|<(?i:eos|bos|eod)>|\[(?:EOS|BOS|SEP)\])[ \t]*$",
    re.MULTILINE,
)
LOOKED_AT = 1 << 14  # characters that decide whether a text is a chat
# A text that has none of these has no separator: soon seen, where the pattern takes its time
OPENS_SEPARATOR, ENDS_SEPARATOR = "<[", ("|>", "s>", "S>", "S]", "SEP]", "eod>", "EOD>")
HELD = "holds conversations"
NO_TEXT = 100  # rows without text, after which a file is taken to have none
LONGEST_SEPARATOR = 32
NAMED = re.compile(r"\{([^{}\n]{1,200})\}")  # a field of a template


def read(path: Path, field: str | None, report: Report | None = None) -> Iterator[str]:
    """
    The documents of one file, each of which can be encoded as UTF-8. Without a report, a bad row
    raises a UserError at the end of the file.
    """
    into = report or Report()
    with reading(path):
        kind = kind_of(path)
        if kind in PLAIN:
            texts = _read_txt(path, into)
        elif kind in READERS:
            texts = _read_document(path, READERS[kind], into)
        elif kind in ARCHIVES:
            texts = _read_archive(path, field, into)
        else:
            texts = _read_rows(path, field, into)
        try:
            for text in texts:
                parts = [text] if kind in PLAIN else _parted(text, into)
                yield from filter(str.strip, parts)
                if kind not in PLAIN and not text.strip():
                    into.notes["documents without text skipped"] += 1
        except UserError as e:
            if isinstance(e, TooManyBadRows) or str(path) in str(e):
                raise
            raise UserError(f"{path}: {e}") from e
    if report is None:
        into.finish()


def read_all(
    paths: Sequence[Path], field: str | None, report: Report, of: int = 0
) -> Iterator[str]:
    """
    The documents of several files, which may be a part `of` so many. The report has those that
    cannot be read, unless there is no other file: then it is a UserError.
    """
    failed, of = False, max(of, len(paths))
    for path in paths:
        report.path, has_text, listed = path, False, len(report.skipped)
        try:
            for text in read(path, field, report):
                has_text = True
                yield text
        except TooManyBadRows:
            raise
        except UserError as e:
            if of == 1 and not report.level:
                raise
            failed = True
            report.skip(path, e)
            continue
        if has_text:
            report.read[kind_of(path)] += 1
        elif len(report.skipped) == listed:  # of an archive, that of its files is said already
            report.skip(path, UserError("it has no text"))
    if failed and not report.read and not report.level and of == len(paths):
        reason, name = report.skipped[0]
        raise UserError(
            f"none of {len(paths):,} files can be read; {name}: {reason}, and so on: convert them, "
            "or name other files"
        )


def text_bytes(path: Path) -> int:
    """Roughly how many bytes of text a file holds; a parquet file's footer states it."""
    size = path.stat().st_size * (4 if path.suffix.lower() in COMPRESSED else 1)
    if kind_of(path) != ".parquet":
        return size
    with suppress(UserError), reading(path), open_parquet(path) as file:
        metadata = file.metadata
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return size  # of a damaged file; reading it will say so


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


def _read_txt(path: Path, report: Report) -> Iterator[str]:
    with open_text(path, report) as file:
        head = file.read(LOOKED_AT) + file.readline(LOOKED_AT)
        if dialogue.STAMPED.match(head.split("\n", 1)[0]) and dialogue.chats_in_text(head):
            messages = [*dialogue.whatsapp(chain(head.splitlines(), file))]
            report.notes["chats of WhatsApp, read without their times"] += 1
            for chat in dialogue.sessions(messages):
                yield from cut([dialogue.as_text(chat)])
        else:
            yield from cut(_separated(file, report, head))


def _separated(file: IO[str], report: Report, rest: str) -> Iterator[str | None]:
    """
    The text of a file, after its beginning `rest`, in pieces that end with a line where possible;
    None at a separator.
    """
    while chunk := file.read(1 << 20):
        # To the end of the line, so that no separator is torn; a line without end keeps its tail
        chunk = rest + chunk
        if chunk[-1] != "\n":
            chunk += file.readline(1 << 20)
        torn = re.search(r"[ \t]*[<\[]", tail := chunk[-LONGEST_SEPARATOR:])
        rest = tail[torn.start() :] if torn and chunk[-1] != "\n" else ""
        yield from _at_separators(chunk[: len(chunk) - len(rest)], report)
    yield from _at_separators(rest, report)


def _at_separators(text: str, report: Report) -> Iterator[str | None]:
    start = 0
    if any(c in text for c in OPENS_SEPARATOR) and any(end in text for end in ENDS_SEPARATOR):
        for found in SEPARATOR.finditer(text):
            report.notes[f"documents ended at {found[0].strip()}"] += 1
            yield text[start : found.start()]
            yield None
            start = found.end()
    yield text[start:]


def _parted(text: str, report: Report) -> list[str]:
    """The documents of a text that is there as a whole."""
    parts = [part for part in _at_separators(text, report) if part is not None]
    return parts if len(parts) == 1 else [part.strip("\n") for part in parts]


def _read_document(path: Path, reader: Reader, report: Report) -> Iterator[str]:
    """What a library reads of a file, in documents."""
    try:
        for text in reader(path, report):
            yield from cut([well_formed(text)])
    except (UserError, OSError):
        raise
    except Exception as e:  # whatever a library does with a file that somebody made to break it
        raise UserError(f"{path} cannot be read ({type(e).__name__}: {str(e)[:100]})") from e


def _read_archive(path: Path, field: str | None, report: Report) -> Iterator[str]:
    """The documents of the files in an archive, as the finder finds them in a folder."""
    with unpacked(path, (*TEXT, *ROWS), report) as files:
        yield from read_all(files, field, report)


def _read_rows(path: Path, field: str | None, report: Report) -> Iterator[str]:
    named = NAMED.findall(field or "") or [field or ""]
    fields = {*named, *(name.split(".")[0] for name in named)} if field else TEXT_FIELDS
    same_fields = kind_of(path) == ".parquet"
    good, before = False, len(report.problems)
    for number, (place, row) in enumerate(read_rows(path, report, fields)):
        try:
            if (chats := dialogue.exported(row)) is not None:
                for part in chain.from_iterable(map(dialogue.sessions, chats)):
                    yield from cut([well_formed(dialogue.as_text(part))])
                continue
            text = text_of_row(row, field)
        except (UserError, UnicodeDecodeError) as e:
            if field is None and shapes.shape_of(row):
                raise UserError(
                    f"{path} {HELD}: train on them with mid_train or chat_sft, or name a text "
                    "field with PATH#FIELD"
                ) from e
            if number == 0 and same_fields and isinstance(e, UserError):
                raise  # what the first row lacks, all rows lack
            report.bad_row(place, e)
            if not good and len(report.problems) >= before + NO_TEXT:
                break
            continue
        good = True
        yield text
    if not good and not field and (problems := report.problems[before:]):
        # It is data of another kind: one reason for the file, not one for every row
        del report.problems[before:]
        raise UserError(problems[0])


def text_of_row(row: Any, field: str | None) -> str:
    """The text of a row; "" if its field is null. Raises UserError if there is none."""
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise UserError(f"expected an object with a text field, got a {type(row).__name__}")
    if field and "{" in field:
        values = {m: _value(row, m) for m in NAMED.findall(field)}
        parts = {
            m: str(v) if isinstance(v, int | float) else _as_text(v, m) for m, v in values.items()
        }
        filled = NAMED.sub(lambda m: parts[m[1]], field.replace("\\n", "\n").replace("\\t", "\t"))
        return filled if any(part.strip() for part in parts.values()) else ""
    if field and field not in row and "." in field:
        return _as_text(_value(row, field), field)
    for name in [field] if field else TEXT_FIELDS:
        if name in row:
            return _as_text(row[name], name)
    raise _no_field(row, field or " or ".join(TEXT_FIELDS[:3]))


def _value(row: Any, path: str) -> Any:
    """The value at a path such as post.body, through lists too. UserError if there is none."""
    try:
        return _found(row, path)
    except KeyError as e:
        raise _no_field(row, path) from e


def _no_field(row: dict[str, Any], wanted: str) -> UserError:
    return UserError(
        f"it has no field {wanted}, only {shapes.fields_of(row)}: name the field that holds the "
        "text with PATH#FIELD"
    )


def _found(value: Any, path: str) -> Any:
    if value is None or (isinstance(value, dict) and path in value):
        return value and value[path]
    if isinstance(value, list):
        return [_found(one, path) for one in value]
    first, _, rest = path.partition(".")
    if not isinstance(value, dict) or not rest:
        raise KeyError(path)
    return _found(value[first], rest)


def _as_text(value: Any, name: str) -> str:
    """Text, bytes in UTF-8, or a list of these, as one text of lines."""
    if value is None:
        return ""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list) and all(isinstance(v, str | bytes | list | None) for v in value):
        return "\n".join(filter(None, (_as_text(part, name) for part in value)))
    raise UserError(
        f"the field {name} holds a {type(value).__name__}, not text; name a text field with "
        "PATH#FIELD"
    )
