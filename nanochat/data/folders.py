"""
Finds the files of a source, for text and conversations alike: those of a known format, whatever the
case of the extension, compressed or not, in a folder and the folders below it, links included.
Every file that is skipped is counted by reason.

A file that the user names is always read. In a folder, a table (.csv, .tsv) is read if one of its
columns has a name from TEXT_FIELDS or QUESTIONS, and a .json file if it holds a list of rows or
messages. Where the extension is missing or contradicts the first bytes of the file, these decide.
"""

import csv
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.base.common import UserError, base_dir, human
from nanochat.base.strangers import open_regular

# Text to be read as it stands: prose, markup that a model may well learn to write, and programs
ENDINGS = (
    "txt text asc log md markdown mdx rst tex org adoc asciidoc py js mjs ts jsx tsx c h cc cpp "
    "hpp java kt go rs rb php cs swift scala sh sql r jl lua pl hs ml ex clj lisp el f90 pas"
)
PLAIN = tuple(f".{ending}" for ending in ENDINGS.split())
# For each of these, readers.py has a reader
DOCUMENTS = (
    *(".html", ".htm", ".xhtml", ".docx", ".odt", ".epub", ".pdf", ".rtf"),
    *(".eml", ".mbox", ".srt", ".vtt", ".ipynb"),
)
ARCHIVES = ".zip", ".tar", ".tgz"
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT = (*PLAIN, *DOCUMENTS, *ARCHIVES)
READABLE = (*TEXT, *ROWS)
CONVERSATIONS = (*ROWS, ".txt", ".md", *ARCHIVES)
TABLES = (".csv", ".tsv")
TEXT_FIELDS = "text", "content", "body", "document", "article", "story", "passage", "message"
QUESTIONS = "prompt", "instruction", "question", "query", "input", "messages", "conversations"
MESSAGES = re.compile(rb'"(?:messages|conversations|chats)"\s*:\s*[\[{]')
HEAD = 1 << 16  # bytes that decide what a file holds
FAR = 1 << 24  # bytes in which the messages of a Telegram export begin, after the contacts
MAGIC = (  # the first bytes of a file, and what it is whatever its name says
    (b"%PDF-", ".pdf"),
    (b"{\\rtf", ".rtf"),
    (b"PK\x03\x04", ".zip"),
    (b"\xd0\xcf\x11\xe0", ".doc"),
    (b"PAR1", ".parquet"),
)
PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html)\b", re.IGNORECASE)
ZIPPED = {  # a file in a zip archive, and what the archive is
    "word/document.xml": ".docx",
    "xl/workbook.xml": ".xlsx",
    "ppt/presentation.xml": ".pptx",
    "META-INF/container.xml": ".epub",
    "content.xml": ".odt",
}
BEFORE_JSON = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"  # byte-order marks, blanks, halves of UTF-16
MOST_UNREAD = 10_000  # bytes of text in files that are not read; more may be an error
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Other files that may be the text of a corpus; pictures, programs and the like are not
TEXT_LIKE = re.compile(
    r"\.(md|markdown|rst|html?|xml|tex|log|csv|tsv|json|pdf|docx?|odt|rtf|epub|mobi|srt|vtt|eml|"
    r"mbox|zip|tar|tgz|7z|rar|lz4|gz|bz2|xz|zst|arrow|feather|orc|avro|tfrecord|warc|bin|npy|azw3)"
)


@dataclass
class Found:
    """The files to read, sorted by path, and those that are skipped, as (reason, path)."""

    files: list[Path] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, reason: str, path: Path) -> None:
        """Skip a file or a folder."""
        self.skipped.append((reason, str(path)))

    def reasons(self) -> Counter[str]:
        """How many files are skipped for each reason."""
        return Counter(reason for reason, _ in self.skipped)

    def in_words(self) -> str:
        """'3 .pdf files not read, 1 hidden files': the four most frequent reasons."""
        return ", ".join(f"{n:,} {reason}" for reason, n in self.reasons().most_common(4))


def format_of(path: Path) -> str:
    """'.jsonl' for talk.JSONL.gz: the extension in lower case, without that of a compression."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    ending = os.path.splitext(name)[1]
    return "" if ending == ".parquet" and not path.name.lower().endswith(ending) else ending


def kind_of(path: Path) -> str:
    """
    The format of a file, as an extension: that of its first bytes if they tell, else that of its
    name; ".txt" for text without an extension, and "" for what is neither. Raises OSError.
    """
    named = format_of(path)
    if named and named not in READABLE:
        return named
    with open_regular(path) as file:
        head = file.read(HEAD)
    kind = next((kind for start, kind in MAGIC if head.startswith(start)), named)
    if kind == ".zip":
        return _kind_of_zip(path, named)
    if kind == named == "" and head.strip() and b"\0" not in head:
        kind = ".txt"
    return ".html" if kind == ".txt" and PAGE.match(head) else kind


def _kind_of_zip(path: Path, named: str) -> str:
    """The kind of a zip archive, as office documents and books are; `named`: that of its name."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        return named  # whoever reads it raises the error
    default = named if named in DOCUMENTS else ".zip"
    return next((kind for name, kind in ZIPPED.items() if name in names), default)


def find(paths: Sequence[Path], name: str, formats: tuple[str, ...]) -> Found:
    """
    The files among `paths`, and those of `formats` in the folders among them, for the source
    `name`. Raises UserError if a path gives none, or if nearly all text in a folder is in files of
    other formats.
    """
    total = Found()
    for path in paths:
        if path.is_dir():
            found = in_folder(path, name, formats)
        else:
            try:
                known = path.is_file() and kind_of(path) in formats
            except OSError as e:
                raise UserError(f"cannot read {path} ({e.strerror}): check its permissions") from e
            found = Found([path] if known else [])
        if not found.files:
            others = found.in_words()
            raise UserError(
                f"data source {name}: there is no file to read ({_brief(formats)}, or one of them "
                f"compressed: {', '.join(COMPRESSED)}) at {path}{others and f', only {others}'}; "
                "add one, or name another file or folder"
            )
        total.files += found.files
        total.skipped += found.skipped
    return total


def _brief(formats: tuple[str, ...]) -> str:
    """The formats in words, without the variants of others."""
    variants = {*PLAIN[1:], ".htm", ".xhtml", ".tgz", ".ndjson"}
    return ", ".join(kind for kind in formats if kind not in variants)


def in_folder(path: Path, name: str, formats: tuple[str, ...]) -> Found:
    """`find` in a folder, where there may be nothing to read."""
    found = Found()
    read = unread = 0
    seen: set[tuple[int, int]] = set()
    # Links last: a link to a file that is read anyway adds nothing
    for file in sorted(_walk(path, found), key=lambda file: (file.is_symlink(), file)):
        try:
            info = file.stat()
        except OSError:
            found.skip("broken links", file)
            continue
        identity = _identity(info)
        if not stat.S_ISREG(info.st_mode):
            reason = "pipes, devices or sockets"
        elif _hidden(file.name):
            if format_of(file) not in formats:
                continue
            reason = "hidden files"
        elif not os.access(file, os.R_OK):
            reason = "files that you have no permission to read"
        elif not _is_data(file, formats):
            kind, ending = kind_of(file), os.path.splitext(file.name.lower())[1]
            shown = ending if kind in formats else kind or ending
            reason = f"{shown or 'other'} files not read"
            if TEXT_LIKE.fullmatch(ending):
                unread += info.st_size
        elif file.is_symlink() and identity in seen:
            reason = "links to files that are read already"
        else:
            seen.add(identity)
            found.files.append(file)
            read += info.st_size
            continue
        found.skip(reason, file)
    found.files.sort()
    if found.files and unread > max(MOST_UNREAD, 100 * read):
        raise UserError(
            f"data source {name}: only {human(read)} bytes of {path} would be read, and "
            f"{human(unread)} bytes not ({found.in_words()}): convert these files to .txt or "
            ".jsonl, or name the files that you mean"
        )
    return found


def delimiter_of(kind: str, header: str) -> str:
    """What separates the fields of a table: Excel writes semicolons in much of Europe."""
    return "\t" if kind == ".tsv" else max(",;", key=header.count)


def _hidden(name: str) -> bool:
    """Whether a name begins with a dot, such as ._NAME of a Mac, or is the Mac's own folder."""
    return name.startswith(".") or name == "__MACOSX"


def _is_data(file: Path, formats: tuple[str, ...]) -> bool:
    """Whether a file of a folder holds rows or text, and not a table or settings beside them."""
    try:
        kind = kind_of(file)
        if kind not in formats or file.suffix.lower() in COMPRESSED:
            return kind in formats
        if kind in TABLES:
            with open(file, "rb") as opened:
                header = opened.readline(HEAD).replace(b"\0", b"").lstrip(BEFORE_JSON)
            line = header.decode("utf-8", "replace").lower()
            columns = next(csv.reader([line], delimiter=delimiter_of(kind, line)), [])
            return not {*TEXT_FIELDS, *QUESTIONS}.isdisjoint(name.strip() for name in columns)
        if kind != ".json":
            return True
        with open(file, "rb") as opened:
            head = opened.read(HEAD)
            if b'"contacts"' in head or b'"personal_information"' in head:
                head += opened.read(FAR)
            head = head.replace(b"\0", b"").lstrip(BEFORE_JSON)
        return head.startswith(b"[") or bool(MESSAGES.search(head))
    except (OSError, csv.Error):
        return True  # whoever reads it raises the error


def _walk(path: Path, found: Found) -> Iterator[Path]:
    """Every file below a folder, through links to folders too, but into no folder twice."""

    def unreadable(error: OSError) -> None:
        found.skip("folders that cannot be opened", Path(str(error.filename)))

    reasons = {_identity(base_dir().stat()): "the base folder"}  # why not to enter a folder
    reasons.pop(_identity(path.stat()), None)  # unless it is the one to read
    for folder, folders, files in os.walk(path, followlinks=True, onerror=unreadable):
        identity = _identity(os.stat(folder))
        if identity in reasons:
            folders.clear()
            found.skip(reasons[identity], Path(folder))
            continue
        reasons[identity] = "links to folders that are read already"
        folders[:] = sorted(f for f in folders if not _hidden(f))
        yield from (Path(folder, file) for file in files)


def _identity(info: os.stat_result) -> tuple[int, int]:
    """What two paths to the same file or folder have in common."""
    return info.st_dev, info.st_ino
