"""
Finds the files of a source, for text and conversations alike: those of a format that rows.py can
read, in any case of the extension, compressed or not, in a folder and the folders below it, links
included. What is passed over is counted by reason, and nothing is passed over silently.

A file that is named is always read; in a folder, .csv and .tsv files (often tables about the
texts) and .json files that hold no list of rows are not.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.base.common import UserError, human

TEXT = (".txt",)
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ONLY_NAMED = (".csv", ".tsv")
BEFORE_JSON = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"  # marks, blanks, and halves of UTF-16
NOTEWORTHY = 10_000  # bytes of text in files that are not read
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Other files that may be the text of a corpus; pictures, programs and the like are not
TEXT_LIKE = re.compile(
    r"\.(md|markdown|rst|html?|xml|tex|log|csv|tsv|json|pdf|docx?|odt|rtf|epub|mobi|srt|vtt|eml|"
    r"mbox|zip|tar|tgz|7z|rar|lz4|gz|bz2|xz|zst|arrow|feather|orc|avro|tfrecord|warc|bin|npy)"
)


@dataclass
class Found:
    """The files to read, sorted by path, and what was passed over: reason -> count."""

    files: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def passed_over(self) -> str:
        """'3 .pdf files not read, 1 hidden files': the four most frequent reasons."""
        return ", ".join(f"{n:,} {what}" for what, n in self.skipped.most_common(4))


def format_of(path: Path) -> str:
    """'.jsonl' for talk.JSONL.gz: the extension in lower case, without that of a compression."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    ending = os.path.splitext(name)[1]
    return "" if ending == ".parquet" and not path.name.lower().endswith(ending) else ending


def find(path: Path, name: str, formats: tuple[str, ...]) -> Found:
    """
    `path` itself, or the files of `formats` in the folder `path`, for the source `name`. Raises
    UserError if there is none, or if nearly all text in the folder is in files of other formats.
    """
    if not path.is_dir():
        known = format_of(path) in formats
        found = Found([path] if known and path.is_file() else [])
    else:
        found = _in_folder(path, name, formats)
    if not found.files:
        others = found.passed_over()
        raise UserError(
            f"data source {name}: there is no file to read ({', '.join(formats)}, or one of them "
            f"compressed: {', '.join(COMPRESSED)}) at {path}{others and f', only {others}'}; add "
            "one, or name another file or folder"
        )
    return found


def _in_folder(path: Path, name: str, formats: tuple[str, ...]) -> Found:
    found = Found()
    read = unread = 0
    seen: set[tuple[int, int]] = set()
    # Links last: a link to a file that is read anyway adds nothing
    for file in sorted(_walk(path, found.skipped), key=Path.is_symlink):
        try:
            info = file.stat()
        except OSError:
            found.skipped["broken links"] += 1
            continue
        kind, identity = format_of(file), (info.st_dev, info.st_ino)
        if not stat.S_ISREG(info.st_mode):
            found.skipped["pipes, devices or sockets"] += 1
        elif _hidden(file.name):
            found.skipped["hidden files"] += kind in formats
        elif kind not in formats or not _is_data(file, kind):
            ending = os.path.splitext(file.name.lower())[1]
            found.skipped[f"{ending or 'other'} files not read"] += 1
            unread += info.st_size * bool(TEXT_LIKE.fullmatch(ending))
        elif file.is_symlink() and identity in seen:
            found.skipped["links to files that are read already"] += 1
        else:
            seen.add(identity)
            found.files.append(file)
            read += info.st_size
    found.files.sort()
    found.skipped = +found.skipped
    if found.files and unread > max(NOTEWORTHY, 100 * read):
        raise UserError(
            f"data source {name}: only {human(read)} bytes of {path} would be read, and "
            f"{human(unread)} bytes not ({found.passed_over()}): convert these files to .txt or "
            ".jsonl, or name the files that you mean"
        )
    return found


def _hidden(name: str) -> bool:
    """Names that begin with a dot, among them what a Mac puts beside each file, ._NAME."""
    return name.startswith(".") or name == "__MACOSX"


def _is_data(file: Path, kind: str) -> bool:
    """Whether a file of a folder holds rows or text, and not a table or settings beside them."""
    if kind in ONLY_NAMED:
        return False
    if kind != ".json" or file.suffix.lower() in COMPRESSED:
        return True
    try:
        with open(file, "rb") as opened:
            return opened.read(64).lstrip(BEFORE_JSON).startswith(b"[")
    except OSError:
        return True  # reading it will say why


def _walk(path: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Every file below a folder, through links to folders too, but into no folder twice."""

    def unreadable(error: OSError) -> None:
        skipped["folders that cannot be opened"] += 1

    entered: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(path, followlinks=True, onerror=unreadable):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in entered:
            folders.clear()
            skipped["links to folders that are read already"] += 1
            continue
        entered.add((info.st_dev, info.st_ino))
        folders[:] = sorted(f for f in folders if not _hidden(f))
        yield from (Path(folder, file) for file in files)
