"""
Readers of documents: each takes a file and gives its texts, one function for each format, all in
the table READERS. Most need a library of the extra `documents`; without it, the file is skipped,
and the message names what to install.

What strangers wrote is bounded: a file by MOST_BYTES, what an archive unpacks to by MOST_UNPACKED
and by MOST_RATIO, a PDF by SECONDS and MOST_MEMORY in a process of its own. Nothing is fetched, no
macro runs, and no entity of XML is expanded. A file that exceeds a bound, or that its library
cannot read, is a UserError, which whoever reads a whole folder turns into an entry of the report.
"""

import email
import email.policy
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote

from nanochat.base.common import UserError, base_dir, human
from nanochat.base.files import atomic_write
from nanochat.data.folders import in_folder
from nanochat.data.rows import Report, encoding_of_html, library, open_bytes, open_text

MOST_BYTES = 1 << 26  # of one document
MOST_UNPACKED = 1 << 32  # bytes of all members of an archive
MOST_RATIO = 300  # bytes unpacked per byte packed, from SMALL bytes on; text reaches 20
SMALL = 1 << 24
MOST_MEMBERS = 100_000
MOST_LEVELS = 3  # of archives in archives
MOST_NESTED = 4000  # elements within each other in a page: its parser takes their square
MOST_PARTS = 5000  # of an e-mail
SECONDS = 60  # for one PDF
MOST_MEMORY = 1 << 31
BLOCKS = (
    "address article blockquote center div dl fieldset figcaption figure form h1 h2 h3 h4 h5 h6 hr "
    "legend main ol p pre section summary table title ul text:p text:h"  # the last two of odt
)
BEFORE = {  # an element -> what separates it from the text before it
    **dict.fromkeys(BLOCKS.split(), "\n\n"),
    **dict.fromkeys(("br", "li", "tr", "dt", "dd", "text:line-break"), "\n"),
    **dict.fromkeys(("td", "th", "text:tab"), "\t"),
    "text:s": " ",
}
# What a page has around its text
AROUND = "script, style, noscript, template, nav, footer, aside, form, svg, iframe, select"
TAG = re.compile(r"<(/?)([a-zA-Z][\w:-]*)[^<>]*?(/?)>")
# Elements that need no end; of all others, those that are open nest
UNCLOSED = (
    "area base br col dd dt embed hr img input li link meta option p param source td th tr wbr"
)
LOCKS = "META-INF/encryption.xml"  # of a book
TIMES = re.compile(r"^\s*(?:\d+:)?\d+:\d+[.,]\d+\s+-->")
CUE_TAGS = re.compile(r"<[^<>]{0,80}>|\{\\[^{}]{0,80}\}")


def content(path: Path) -> bytes:
    """The bytes of a file, decompressed. Raises UserError beyond MOST_BYTES."""
    with open_bytes(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"it holds more than {human(MOST_BYTES)} bytes: divide it into several")
    return data


def html(path: Path, report: Report) -> Iterator[str]:
    """The text of a web page without scripts, navigation and forms, a line per block."""
    yield html_text(content(path), report)


def html_text(data: bytes | str, report: Report, left_out: str = AROUND) -> str:
    """The text of a page of HTML, without the elements that the CSS selector `left_out` names."""
    parser = library("selectolax.lexbor").LexborHTMLParser
    if isinstance(data, bytes):
        data = data.decode(encoding_of_html(data, report), "replace")
    if _nested(data) > MOST_NESTED:
        raise UserError(f"its elements lie more than {MOST_NESTED:,} deep within each other")
    tree = parser(data.replace("\0", ""))
    for node in tree.css(left_out):
        node.decompose()
    if tree.root is None:
        return ""
    pieces: list[str] = []
    for node in tree.root.traverse(include_text=True):
        if node.tag == "-text":
            text = node.text_content or ""
            before, parent = node.prev, node.parent
            if before is not None and "\n" in BEFORE.get(before.tag, ""):
                pieces.append("\n")
            in_pre = parent is not None and parent.tag in ("pre", "code", "textarea")
            pieces.append(text if in_pre else re.sub(r"\s+", " ", text))
        else:
            pieces.append(BEFORE.get(node.tag or "", ""))
    return tidy("".join(pieces))


def _nested(page: str) -> int:
    """How many elements of a page are open at once, at most, if no end is implied."""
    depth = deepest = 0
    unclosed = set(UNCLOSED.split())
    for end, name, alone in TAG.findall(page):
        if not alone and name.lower() not in unclosed:
            depth = max(0, depth + (-1 if end else 1))
            deepest = max(deepest, depth)
    return deepest


def tidy(text: str) -> str:
    """Text without blanks around lines and without more than one empty line in a row."""
    text = re.sub(r"[ \t\u00a0]*\n[ \t]*", "\n", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


@contextmanager
def _opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """An office document or a book, whose unpacked size is bounded."""
    with zipfile.ZipFile(io.BytesIO(content(path))) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > SMALL + MOST_RATIO * MOST_BYTES // 10 or any(
            info.file_size > MOST_BYTES for info in archive.infolist()
        ):
            raise UserError(f"it unpacks to {human(unpacked)} bytes: it is damaged or hostile")
        for name in archive.namelist():
            if name.endswith((".xml", ".rels")) and b"<!DOCTYPE" in archive.read(name):
                raise UserError("it declares entities of XML, as no office program does")
        yield archive


def docx(path: Path, report: Report) -> Iterator[str]:
    """The text of a Word document, with its tables and notes, by way of HTML."""
    mammoth = library("mammoth")
    with _opened_zip(path):
        converted = mammoth.convert_to_html(
            io.BytesIO(content(path)), convert_image=mammoth.images.img_element(lambda image: {})
        )
    yield html_text(converted.value, report)


def odt(path: Path, report: Report) -> Iterator[str]:
    """The paragraphs and headings of an OpenDocument text, which is read like a web page."""
    with _opened_zip(path) as archive:
        yield html_text(archive.read("content.xml"), report, r"text\:tracked-changes")


def epub(path: Path, report: Report) -> Iterator[str]:
    """The chapters of a book in the order of its spine, each a text of its own."""
    parse = library("defusedxml.ElementTree").fromstring
    with _opened_zip(path) as archive:
        container = parse(archive.read("META-INF/container.xml"))
        root_file = container.find(".//{*}rootfile")
        package_path = PurePosixPath(root_file.get("full-path") if root_file is not None else "")
        package = parse(archive.read(str(package_path)))
        items = {item.get("id"): item.get("href") for item in package.iterfind(".//{*}item")}
        names = set(archive.namelist())
        locked = archive.read(LOCKS).decode("utf-8", "replace") if LOCKS in names else ""
        for reference in package.iterfind(".//{*}itemref"):
            href = unquote((items.get(reference.get("idref")) or "").split("#")[0])
            name = str(package_path.parent / href)
            if name in locked:
                raise UserError("it is encrypted (DRM): nobody but its reading program can read it")
            if name in names:
                yield html_text(archive.read(name), report, f"{AROUND}, title")
            else:
                report.notes["chapters of books that are missing"] += 1


def pdf(path: Path, report: Report) -> Iterator[str]:
    """
    The text layer of a PDF. Words that a line end divides are joined again. It is kept in the base
    folder, because a PDF takes long to read, and it is read for the inventory and for each split.
    """
    data = content(path)
    kept = base_dir() / "documents" / f"{hashlib.sha256(data).hexdigest()}.txt"
    if kept.exists():
        text = kept.read_text(encoding="utf-8")
    else:
        text = _pdf_text(data)
        atomic_write(kept, text)
    if not text:
        raise UserError("it has no text layer: it may be a scan, for a program such as ocrmypdf")
    yield re.sub(r"([^\W\d_])[-\u00ad]\n([^\W\d_])", r"\1\2", text)


def _pdf_text(data: bytes) -> str:
    library("pypdf")
    program = Path(__file__).with_name("pdf.py")
    try:
        done = subprocess.run(
            [sys.executable, *map(str, (program, SECONDS, MOST_MEMORY, MOST_BYTES))],
            input=data,
            capture_output=True,
            timeout=SECONDS + 10,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise UserError(f"it takes longer than {SECONDS} seconds to read") from e
    if done.returncode:
        errors = done.stderr.decode("utf-8", "replace").strip().splitlines()
        what = (errors or ["no memory or time"])[-1][:120]
        raise UserError(f"it cannot be read as a PDF ({what})")
    return tidy(done.stdout.decode("utf-8", "replace").replace("\0", ""))


def rtf(path: Path, report: Report) -> Iterator[str]:
    """The text of a rich text file."""
    convert = library("striprtf.striprtf").rtf_to_text
    yield tidy(convert(content(path).decode("latin-1"), errors="replace"))


def eml(path: Path, report: Report) -> Iterator[str]:
    """The subject and the text of an e-mail; addresses, dates and attachments are left out."""
    yield _mail_text(content(path), report)


def mbox(path: Path, report: Report) -> Iterator[str]:
    """The e-mails of a mailbox, each a text of its own; one that is broken stops no other."""
    for mail in _mails(path):
        try:
            yield _mail_text(mail, report)
        except Exception:  # the email package raises what it likes
            report.notes["e-mails without a text that can be read"] += 1


def _mails(path: Path) -> Iterator[bytes]:
    """The e-mails of a mailbox, of which very long ones lose their end."""
    mail, blank = bytearray(), True
    with open_bytes(path) as file:
        while line := file.readline(1 << 20):
            if blank and line.startswith(b"From "):
                if mail:
                    yield bytes(mail)
                mail.clear()
            elif len(mail) < MOST_BYTES:
                mail += line.removeprefix(b">") if line.startswith(b">From ") else line
            blank = not line.strip()
    yield bytes(mail)


def _mail_text(data: bytes, report: Report) -> str:
    if data.count(b"\n--") > MOST_PARTS:
        raise UserError(f"it has more than {MOST_PARTS:,} parts")
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("plain", "html"))
    if body is None:
        raise UserError("it has no text")
    try:
        text = body.get_content()
    except LookupError:  # an encoding that nobody knows
        payload = body.get_payload(decode=True)
        payload = payload if isinstance(payload, bytes) else b""
        text = payload.decode(encoding_of_html(payload, report), "replace")
    if body.get_content_subtype() == "html":
        text = html_text(text, report)
    subject = str(message.get("subject", "")).strip()
    return tidy(f"{subject}\n\n{text}")


def subtitles(path: Path, report: Report) -> Iterator[str]:
    """What is said in .srt and .vtt files, a line per line, without numbers and times."""
    with open_text(path, report) as file:
        lines = file.read(MOST_BYTES).splitlines()
    spoken: list[str] = []
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else ""
        header = line.startswith(("WEBVTT", "NOTE", "STYLE", "REGION"))
        if TIMES.match(line) or TIMES.match(following) or header:
            continue
        text = CUE_TAGS.sub("", line).strip()
        if text and text != (spoken or [""])[-1]:  # captions that roll repeat their last line
            spoken.append(text)
    yield "\n".join(spoken)


def notebook(path: Path, report: Report) -> Iterator[str]:
    """The text and the code of a notebook, without what the code printed."""
    try:
        cells = json.loads(content(path))["cells"]
        parts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"it is no notebook ({type(e).__name__})") from e
    fences = ((f"```\n{text}\n```" if kind == "code" else text) for kind, text in parts if text)
    yield "\n\n".join(fences)


Reader = Callable[[Path, Report], Iterator[str]]
READERS: dict[str, Reader] = {
    ".html": html,
    ".htm": html,
    ".xhtml": html,
    ".docx": docx,
    ".odt": odt,
    ".epub": epub,
    ".pdf": pdf,
    ".rtf": rtf,
    ".eml": eml,
    ".mbox": mbox,
    ".srt": subtitles,
    ".vtt": subtitles,
    ".ipynb": notebook,
}


@contextmanager
def unpacked(path: Path, formats: tuple[str, ...], report: Report) -> Iterator[list[Path]]:
    """
    The files of an archive that are of `formats`, in a temporary folder that lasts for the block.
    In the report, they are named by the archive. Raises UserError for an archive that is a bomb.
    """
    if report.level >= MOST_LEVELS:
        raise UserError(f"{path}: it is an archive within {MOST_LEVELS} others: unpack it yourself")
    with tempfile.TemporaryDirectory(prefix="nanochat-") as temporary:
        folder = Path(temporary)
        try:
            _unpack(path, folder)
        except (UserError, OSError):
            raise
        except Exception as e:  # damaged in any way that zipfile and tarfile do not foresee
            raise UserError(f"{path} cannot be unpacked ({type(e).__name__}: {e})") from e
        found = in_folder(folder, path.name, formats)
        report.skipped += found.skipped
        report.level += 1
        try:
            yield found.files
        finally:
            report.level -= 1
            report.rename(temporary, str(path))


def _unpack(path: Path, folder: Path) -> None:
    room = _Room(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise UserError(f"{path} is encrypted: unpack it, and name the folder")
                if not info.is_dir():
                    room.check(info.file_size, info.compress_size)
                    with archive.open(info) as file:
                        room.write(file, folder, info.filename)
        return
    with open_bytes(path) as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                room.check(member.size, 0)
                with file:
                    room.write(file, folder, member.name)


class _Room:
    """What may still be unpacked of an archive."""

    def __init__(self, path: Path):
        self.packed, self.members, self.bytes = path.stat().st_size, 0, 0

    def check(self, size: int, packed: int) -> None:
        """UserError if a member of `size` bytes is too large."""
        self.members += 1
        self.bytes += size
        ratio = max(size / max(packed or self.packed, 1), self.bytes / max(self.packed, 1))
        if (ratio > MOST_RATIO and self.bytes > SMALL) or self.bytes > MOST_UNPACKED:
            raise UserError(
                f"it unpacks to {human(self.bytes)} bytes, {ratio:,.0f} times its size: it is "
                "hostile, or holds no text"
            )
        if self.members > MOST_MEMBERS:
            raise UserError(f"it has more than {MOST_MEMBERS:,} files: unpack it yourself")

    def write(self, file: IO[bytes], folder: Path, name: str) -> None:
        """Unpack a member, at a place within the folder whatever its name is."""
        parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".", "..")]
        parts = [re.sub(r'[\0:*?"<>|\n\r]', "_", part)[-100:] for part in parts][-20:]
        target = folder.joinpath(*parts or ["_"])
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as out:
                shutil.copyfileobj(file, out)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            other = folder / f"_{self.members}" / parts[-1]
            other.parent.mkdir()
            with open(other, "xb") as out:
                shutil.copyfileobj(file, out)
