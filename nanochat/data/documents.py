"""
Reads the text of files as documents: plain text, the formats of readers.py, a text field of the
rows of rows.py, and archives of all these.

A plain text is cut into documents of about 16,000 characters, after a paragraph where possible,
else after a line, a sentence or a word; line breaks at a cut are dropped. A file of rows holds one
document per row: in the field that the user names, or in the first of TEXT_FIELDS that the row
has. A field within another is written post.body; a template such as {title}\\n\\n{body} joins
several. A separator such as <|endoftext|> ends a document in any format and is dropped. Documents
of white space alone are skipped. A file that cannot be read raises a UserError that names the
place, or is listed in the report if it is one of several; bad rows are listed in the report.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

from nanochat.base.common import UserError
from nanochat.data import dialogue, shapes
from nanochat.data.folders import ARCHIVES, COMPRESSED, PLAIN, READABLE, TEXT_FIELDS, kind_of
from nanochat.data.readers import READERS, Reader, unpacked
from nanochat.data.rows import Report, TooManyBadRows, open_parquet, open_text, read_rows, reading

MAX_CHARACTERS = 16_384  # per document cut from a .txt file
CUT_AFTER = [re.compile(pattern) for pattern in (r"\n\n+", r"\n", r'[.!?]"? |。', r" ")]
# What other programs write between documents: these anywhere, the short ones on a line of their own
SEPARATOR = re.compile(
    r"<\|(?:endoftext|end_of_text|startoftext|begin_of_text|end_of_document|bos|eos)\|>"
    r"|^[ \t]*(?:</s>|<s>|<(?i:eos|bos|eod)>|\[(?:EOS|BOS|SEP)\])[ \t]*$",
    re.MULTILINE,
)
# A quick test before the slow pattern: a text without any of these holds no separator
ENDS_SEPARATOR = "|>", "s>", "S>", "S]", "SEP]", "eod>", "EOD>"
LONGEST_SEPARATOR = 32
HOLDS_CONVERSATIONS = "holds conversations"
ROWS_WITHOUT_TEXT = 100  # at the beginning of a file, after which it is taken to have no text
NAMED = re.compile(r"\{([^{}\n]{1,200})\}")  # a field of a template


def read(path: Path, field: str | None, report: Report) -> Iterator[str]:
    """
    The documents of one file, each of which can be encoded as UTF-8. Raises UserError if it cannot
    be read. Bad rows go to the report.
    """
    with reading(path):
        try:
            yield from filter(str.strip, _read(path, field, report))
        except UserError as e:
            if isinstance(e, TooManyBadRows) or str(path) in str(e):
                raise
            raise UserError(f"{path}: {e}") from e


def _read(path: Path, field: str | None, report: Report) -> Iterator[str]:
    kind = kind_of(path)
    if kind in PLAIN:
        yield from _read_txt(path, report)
    elif kind in ARCHIVES:
        with unpacked(path, READABLE, report) as files:  # chosen as in a folder
            yield from read_all(files, field, report)
    else:
        reader = READERS.get(kind)
        texts = _read_document(path, reader, report) if reader else _read_rows(path, field, report)
        for text in texts:
            parts = [part for part in _at_separators(text, report) if part is not None]
            yield from parts if len(parts) == 1 else (part.strip("\n") for part in parts)
            if not text.strip():
                report.notes["documents without text skipped"] += 1


def read_all(
    paths: Sequence[Path], field: str | None, report: Report, total: int = 0
) -> Iterator[str]:
    """
    The documents of several files, which may be part of a source of `total` files. The report lists
    those that cannot be read. Raises UserError if the only file, or all of several, cannot be read.
    """
    failed, total = False, max(total, len(paths))
    for path in paths:
        has_text, skipped = False, len(report.skipped)
        try:
            for text in read(path, field, report):
                has_text = True
                yield text
            if has_text:
                with reading(path):  # it may be gone by now
                    report.read[kind_of(path)] += 1
        except TooManyBadRows:
            raise
        except UserError as e:
            if total == 1 and not report.level:
                raise
            failed = True
            report.skip(path, e)
            continue
        if not has_text and len(report.skipped) == skipped:  # else it is an archive, listed by file
            report.skip(path, UserError("it has no text"))
    if failed and not report.read and not report.level and total == len(paths):
        reason, name = report.skipped[0]
        raise UserError(
            f"none of {len(paths):,} files can be read; {name}: {reason}, and so on: convert them, "
            "or name other files"
        )


def text_bytes(path: Path) -> int:
    """Roughly how many bytes of text a file holds; a parquet file's footer states it."""
    with reading(path):
        size = path.stat().st_size * (4 if path.suffix.lower() in COMPRESSED else 1)
        if kind_of(path) != ".parquet":
            return size
    with suppress(UserError), reading(path), open_parquet(path) as file:
        metadata = file.metadata
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return size  # the file is damaged: whoever reads it raises the error


def cut(pieces: Iterable[str | None], limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """
    Text that comes in pieces of any size, as documents of at most `limit` characters. A document is
    cut in its second half, at the best place that CUT_AFTER finds there. A piece of None ends a
    document.
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
    """
    Where to cut a text between two indices: after the last match of the first pattern of CUT_AFTER
    that matches, else at `last`.
    """
    for pattern in CUT_AFTER:
        ends = [match.end() for match in pattern.finditer(text, first, last)]
        if ends:
            return ends[-1]
    return last


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined; lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_txt(path: Path, report: Report) -> Iterator[str]:
    with open_text(path, report) as file:
        head = file.read(dialogue.HEAD) + file.readline(dialogue.HEAD)
        if dialogue.STAMPED.match(head.split("\n", 1)[0]) and dialogue.chats_in_text(head):
            report.notes["chats of WhatsApp, read without their times"] += 1
            for chat in dialogue.sessions(dialogue.whatsapp(chain(head.splitlines(), file))):
                yield from cut([dialogue.as_text(chat)])
        else:
            yield from cut(_separated(file, report, head))


def _separated(file: IO[str], report: Report, rest: str) -> Iterator[str | None]:
    """
    The text of a file whose beginning, `rest`, is read already, in pieces; None at a separator.
    """
    while chunk := file.read(1 << 20):
        # To the end of a line, so that no separator is divided
        chunk, rest = rest + chunk + file.readline(1 << 20), ""
        tail = chunk[-LONGEST_SEPARATOR:]
        opening = re.search(r"[ \t]*[<\[]", tail)
        if opening and chunk[-1] != "\n":  # a very long line: what may be half a separator waits
            rest = tail[opening.start() :]
        yield from _at_separators(chunk.removesuffix(rest), report)
    yield from _at_separators(rest, report)


def _at_separators(text: str, report: Report) -> Iterator[str | None]:
    """The text between separators, and None for each separator."""
    start = 0
    if any(end in text for end in ENDS_SEPARATOR):
        for separator in SEPARATOR.finditer(text):
            report.notes[f"documents ended at {separator[0].strip()}"] += 1
            yield text[start : separator.start()]
            yield None
            start = separator.end()
    yield text[start:]


def _read_document(path: Path, reader: Reader, report: Report) -> Iterator[str]:
    """The documents of a file that one of READERS reads. Raises UserError if it is damaged."""
    try:
        for text in reader(path, report):
            yield from cut([well_formed(text)])
    except (UserError, OSError):
        raise
    except Exception as e:  # a library may raise anything for a malformed file
        raise UserError(
            f"{path} cannot be read ({type(e).__name__}: {str(e)[:100]}): replace it, or leave it "
            "out"
        ) from e


def _read_rows(path: Path, field: str | None, report: Report) -> Iterator[str]:
    fields: Collection[str] = TEXT_FIELDS
    if field:
        names = NAMED.findall(field) or [field]
        fields = {*names, *(name.partition(".")[0] for name in names)}
    any_text, earlier_problems = False, len(report.problems)
    for number, (place, row) in enumerate(read_rows(path, report, fields)):
        chats = dialogue.exported(row)
        if chats is not None:
            for chat in chats:
                yield from cut([well_formed(dialogue.as_text(chat))])
            continue
        try:
            text = text_of_row(row, field)
        except (UserError, UnicodeDecodeError) as e:
            if field is None and shapes.shape_of(row):
                raise UserError(
                    f"{path} {HOLDS_CONVERSATIONS}: train on them with mid_train or chat_sft, or "
                    "name a text field with PATH#FIELD"
                ) from e
            if number == 0 and kind_of(path) == ".parquet" and isinstance(e, UserError):
                raise  # all rows of a parquet file have the same fields
            report.bad_row(place, e)
            if not any_text and len(report.problems) >= earlier_problems + ROWS_WITHOUT_TEXT:
                break
            continue
        any_text = True
        yield text
    if not any_text and not field and (problems := report.problems[earlier_problems:]):
        # The file holds other data: give one reason for the file, not one for every row
        del report.problems[earlier_problems:]
        raise UserError(problems[0])


def text_of_row(row: Any, field: str | None) -> str:
    """
    The text of a row in `field`, which may be a template, or else in the first of TEXT_FIELDS; ""
    if it is null. Raises UserError if the row has no such field or it holds no text.
    """
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise UserError(f"expected an object with a text field, got a {type(row).__name__}")
    wanted = " or ".join(TEXT_FIELDS[:3])
    field = field or next((name for name in TEXT_FIELDS if name in row), wanted)
    parts = {}
    for name in NAMED.findall(field) or [field]:
        try:
            value = _at_path(row, name)
        except KeyError as e:
            raise UserError(
                f"it has no field {name}, only {shapes.fields_of(row)}: name the field that holds "
                "the text with PATH#FIELD"
            ) from e
        if name != field and isinstance(value, int | float):  # in a template
            value = str(value)
        parts[name] = _as_text(value, name)
    if field in parts:
        return parts[field]
    if not any(map(str.strip, parts.values())):
        return ""
    template = field.replace("\\n", "\n").replace("\\t", "\t")
    return NAMED.sub(lambda match: parts[match[1]], template)


def _at_path(value: Any, path: str) -> Any:
    """The value at a path such as post.body, through lists too. KeyError if there is none."""
    if value is None:
        return None
    if isinstance(value, list):
        return [_at_path(element, path) for element in value]
    if isinstance(value, dict):
        if path in value:
            return value[path]
        first, _, rest = path.partition(".")
        if rest:
            return _at_path(value[first], rest)
    raise KeyError(path)


def _as_text(value: Any, name: str) -> str:
    """
    The text of a field `name` that holds text, bytes of UTF-8, null, or a list of these, which
    become lines. Raises UserError for other values.
    """
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
