"""
Readers of documents: one function per format, listed in READERS, which takes a file and yields its
texts. Most need a package of the extra `documents`; without it, the error names what to install.

Files may be hostile, so reading them is bounded: a file by MOST_BYTES, an archive's contents by
MOST_UNPACKED and MOST_RATIO, a PDF by SECONDS and MOST_MEMORY in a process of its own. Nothing is
fetched, no macro runs, and no XML entity is expanded. A file that exceeds a bound, or that its
package cannot read, raises a UserError; when a whole folder is read, it is listed in the report.
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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote

from nanochat.base.common import UserError, base_dir, human, optional
from nanochat.base.files import atomic_write
from nanochat.data.folders import in_folder, kind_of
from nanochat.data.rows import Report, encoding_of_html, open_bytes, open_text

MOST_BYTES = 1 << 26  # of one document
MOST_UNPACKED = 1 << 32  # bytes of all members of an archive
MOST_RATIO = 300  # bytes unpacked per byte packed, from SMALL bytes on; text reaches 20
SMALL = 1 << 24
MOST_MEMBERS = 100_000
MOST_LEVELS = 3  # of archives in archives
MOST_NESTED = 4000  # elements within each other in a page: parsing time grows as the square
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
# Elements that surround the text of a page, and the fields of its forms (a CSS selector), but not
# the forms: a whole page of ASP.NET is one. Beyond forms, a button may be a heading
AROUND = (
    "script, style, noscript, template, nav, footer, aside, svg, iframe, select, "
    "form button, form label, form textarea"
)
TAG = re.compile(r"<(/?)([a-zA-Z][\w:-]*+)[^<>]*+>")
EMPTY = re.compile(r"<([a-zA-Z][\w:.-]*+)([^<>]*?)/>")  # in XML, an element without content
# Elements that need no end tag, so they do not count as nested
UNCLOSED = (
    "area base br col dd dt embed hr img input li link meta option p param source td th tr wbr"
)
# Elements whose content is mere text up to the end tag
RAW = "iframe noembed noframes noscript script style textarea title xmp"
# What a parser of XML would repeat, as often as a hostile file asks for it
DECLARATION = re.compile(rb"<!(?:ENTITY|ATTLIST)")
ENCRYPTION = "META-INF/encryption.xml"  # in a book: names its encrypted files
TIMES = re.compile(r"^\s*(?:\d+:)?\d+:\d+[.,]\d+\s+-->")
CUE_TAGS = re.compile(r"<[^<>]{0,80}>|\{\\[^{}]{0,80}\}")


def content(path: Path) -> bytes:
    """The bytes of a file, decompressed. Raises UserError beyond MOST_BYTES."""
    with open_bytes(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"it has more than {human(MOST_BYTES)} bytes: divide it into several files")
    return data


def html(path: Path, report: Report) -> Iterator[str]:
    """The text of a web page without scripts, navigation and form fields, a line per block."""
    yield html_text(content(path), report)


def xhtml(path: Path, report: Report) -> Iterator[str]:
    """The text of a page of XHTML, as of one of HTML."""
    yield html_text(content(path), report, xml=True)


def html_text(data: bytes | str, report: Report, left_out: str = AROUND, xml: bool = False) -> str:
    """
    The text of a page of HTML or, with `xml`, of XHTML, without the elements that the CSS selector
    `left_out` names.
    """
    parser = optional("selectolax.lexbor", "documents").LexborHTMLParser
    if isinstance(data, bytes):
        data = data.decode(encoding_of_html(data, report), "replace")
    page = _with_end_tags(data.replace("\0", ""), xml)
    if _too_deep(page):
        raise UserError(
            f"its elements are nested more than {MOST_NESTED:,} deep: convert it to text"
        )
    tree = parser(page)
    for node in tree.css(left_out):
        node.decompose()
    if tree.root is None:
        return ""
    pieces: list[str] = []
    for node in tree.root.traverse(include_text=True):
        if node.tag == "-text":
            text, before = node.text_content or "", node.prev
            # The end of a block ends a line; br and other empty elements have already begun one
            if before and before.last_child and "\n" in BEFORE.get(before.tag, ""):
                pieces.append("\n")
            in_pre = getattr(node.parent, "tag", "") in ("pre", "code")
            pieces.append(text if in_pre else re.sub(r"\s+", " ", text))
        else:
            pieces.append(BEFORE.get(node.tag or "", ""))
    return tidy("".join(pieces))


def _with_end_tags(page: str, xml: bool) -> str:
    """
    A page with <x></x> for <x/>, which the parser of HTML would take for <x> alone. Outside XML, an
    element of RAW stays as it is: the text of a script may name it.
    """
    stay = f"{UNCLOSED} {'' if xml else RAW}".split()

    def closed(tag: re.Match[str]) -> str:
        name = tag[1]
        return tag[0] if name.lower() in stay else f"<{name}{tag[2]}></{name}>"

    return EMPTY.sub(closed, page)


def _too_deep(page: str) -> bool:
    """Whether more than MOST_NESTED elements of a page are open at once."""
    depth, unclosed = 0, UNCLOSED.split()
    still_open: Counter[str] = Counter()
    for tag in TAG.finditer(page):
        is_end, name = bool(tag[1]), tag[2].lower()
        if name not in unclosed and (still_open[name] or not is_end):
            step = -1 if is_end else 1
            still_open[name] += step
            depth += step
            if depth > MOST_NESTED:
                return True
    return False


def tidy(text: str) -> str:
    """Text without spaces around its lines and with at most one empty line in a row."""
    lines = text.replace("\r\n", "\n").split("\n")  # a pattern for all would be slow on many spaces
    text = "\n".join(line.rstrip(" \t\u00a0").lstrip(" \t") for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


@contextmanager
def _opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an office document or a book. Raises UserError if it would unpack to too much."""
    with zipfile.ZipFile(io.BytesIO(content(path))) as archive:
        sizes = [info.file_size for info in archive.infolist()]
        if sum(sizes) > SMALL + MOST_RATIO * MOST_BYTES // 10 or max(sizes, default=0) > MOST_BYTES:
            raise UserError(
                f"it unpacks to {human(sum(sizes))} bytes, so it is damaged or hostile: leave it "
                "out"
            )
        for name in archive.namelist():
            if name.endswith((".xml", ".rels")):
                _harmless(archive.read(name))
        yield archive


def _harmless(xml: bytes) -> bytes:
    """
    XML as it is. Raises UserError if it declares anything that a parser would repeat; the name of a
    document type, as in chapters of books, declares nothing.
    """
    if DECLARATION.search(xml.replace(b"\0", b"")):  # the zero bytes are those of UTF-16
        raise UserError("it declares XML entities, so it may be hostile: leave it out")
    return xml


def docx(path: Path, report: Report) -> Iterator[str]:
    """The text of a Word document, with its tables and notes, converted by way of HTML."""
    mammoth = optional("mammoth", "documents")
    with _opened_zip(path):
        converted = mammoth.convert_to_html(
            io.BytesIO(content(path)), convert_image=mammoth.images.img_element(lambda image: {})
        )
    yield html_text(converted.value, report)


def odt(path: Path, report: Report) -> Iterator[str]:
    """The paragraphs and headings of an OpenDocument text, which is read like a web page."""
    with _opened_zip(path) as archive:
        yield html_text(archive.read("content.xml"), report, r"text\:tracked-changes", xml=True)


def epub(path: Path, report: Report) -> Iterator[str]:
    """The chapters of a book in the order of its spine, each a text of its own."""
    parse = optional("defusedxml.ElementTree", "documents").fromstring
    with _opened_zip(path) as archive:
        container = parse(archive.read("META-INF/container.xml"))
        package_path = PurePosixPath(container.find(".//{*}rootfile").get("full-path"))
        package = parse(_harmless(archive.read(str(package_path))))
        items = {item.get("id"): item.get("href") for item in package.iterfind(".//{*}item")}
        names = set(archive.namelist())
        encrypted = (
            archive.read(ENCRYPTION).decode("utf-8", "replace") if ENCRYPTION in names else ""
        )
        for reference in package.iterfind(".//{*}itemref"):
            href = unquote((items.get(reference.get("idref")) or "").split("#")[0])
            name = str(package_path.parent / href)
            if name in encrypted:
                raise UserError("it is encrypted (DRM): get a copy without DRM, or leave it out")
            if name in names:
                yield html_text(archive.read(name), report, f"{AROUND}, title", xml=True)
            else:
                report.notes["chapters of books that are missing"] += 1


def pdf(path: Path, report: Report) -> Iterator[str]:
    """
    The text layer of a PDF, with words that are hyphenated at a line end joined. The text is cached
    in the base folder, because a PDF takes long to read and is read several times.
    """
    data = content(path)
    cached = base_dir() / "documents" / f"{hashlib.sha256(data).hexdigest()}.txt"
    if cached.exists():
        text = cached.read_text(encoding="utf-8")
    else:
        text = _pdf_text(data)
        atomic_write(cached, text)
    if not text:
        raise UserError("it has no text layer: if it is a scan, add one with a tool like ocrmypdf")
    yield re.sub(r"([^\W\d_])[-\u00ad]\n([^\W\d_])", r"\1\2", text)


def _pdf_text(data: bytes) -> str:
    optional("pypdf", "documents")
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
        raise UserError(
            f"it takes longer than {SECONDS} seconds to read: convert it to text"
        ) from e
    if done.returncode:
        errors = done.stderr.decode("utf-8", "replace").strip().splitlines()
        what = (errors or ["no memory or time"])[-1][:120]
        raise UserError(f"it cannot be read as a PDF ({what}): convert it to text")
    return tidy(done.stdout.decode("utf-8", "replace").replace("\0", ""))


def rtf(path: Path, report: Report) -> Iterator[str]:
    """The text of a rich text file."""
    convert = optional("striprtf.striprtf", "documents").rtf_to_text
    yield tidy(convert(content(path).decode("latin-1"), errors="replace"))


def eml(path: Path, report: Report) -> Iterator[str]:
    """The subject and the text of an e-mail; addresses, dates and attachments are left out."""
    yield _mail_text(content(path), report)


def mbox(path: Path, report: Report) -> Iterator[str]:
    """The e-mails of a mailbox, each a text of its own, without those that cannot be read."""
    for mail in _mails(path):
        try:
            yield _mail_text(mail, report)
        except Exception as e:  # the email package may raise anything for a malformed e-mail
            # If a library is missing, the error says how to install it
            reason = f": {e}" if isinstance(e.__cause__, ImportError) else ""
            report.notes[f"e-mails without a text that can be read{reason}"] += 1


def _mails(path: Path) -> Iterator[bytes]:
    """The e-mails of a mailbox; those longer than MOST_BYTES lose their end."""
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
        raise UserError(f"it has more than {MOST_PARTS:,} parts: leave it out")
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("plain", "html"))
    if body is None:
        raise UserError("it has no text")
    try:
        text = body.get_content()
    except LookupError:  # an unknown encoding
        payload = body.get_payload(decode=True)
        payload = payload if isinstance(payload, bytes) else b""
        text = payload.decode(encoding_of_html(payload, report), "replace")
    if body.get_content_subtype() == "html":
        text = html_text(text, report)
    subject = str(message.get("subject", "")).strip()
    return tidy(f"{subject}\n\n{text}")


def subtitles(path: Path, report: Report) -> Iterator[str]:
    """The spoken lines of a .srt or .vtt file, without numbers, times, comments and styles."""
    with open_text(path, report) as file:
        lines = file.read(MOST_BYTES).splitlines()
    spoken: list[str] = []
    is_vtt, skipping = "".join(lines[:1]).startswith("WEBVTT"), False
    for before, line, following in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        timed = TIMES.match(line)
        if timed or not before.strip():  # a block begins, which an empty line ends
            skipping = is_vtt and line.startswith(("WEBVTT", "NOTE", "STYLE", "REGION"))
        if timed or skipping or TIMES.match(following):
            continue
        text = CUE_TAGS.sub("", line).strip()
        if text and [text] != spoken[-1:]:  # rolling captions repeat their last line
            spoken.append(text)
    yield "\n".join(spoken)


def notebook(path: Path, report: Report) -> Iterator[str]:
    """The text and the code of a notebook, without what the code printed."""
    try:
        cells = json.loads(content(path))["cells"]
        parts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"it is not a notebook ({type(e).__name__}): leave it out") from e
    yield "\n\n".join(
        f"```\n{text}\n```" if kind == "code" else text for kind, text in parts if text
    )


Reader = Callable[[Path, Report], Iterator[str]]
READERS: dict[str, Reader] = {
    ".html": html,
    ".htm": html,
    ".xhtml": xhtml,
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
    The files of an archive that are of `formats`, in a temporary folder that lasts for the block,
    on the disk of the base folder. The report names them by the archive. Raises UserError for an
    archive that would unpack to too much or cannot be unpacked.
    """
    if report.level >= MOST_LEVELS:
        raise UserError(f"{path} is inside {MOST_LEVELS} other archives: unpack it yourself")
    root = base_dir() / "documents"
    root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nanochat-", dir=root) as temporary:
        folder = Path(temporary)
        try:
            _unpack(path, folder)
        except (UserError, OSError):
            raise
        except Exception as e:  # zipfile and tarfile may raise anything for a damaged archive
            raise UserError(
                f"{path} cannot be unpacked ({type(e).__name__}: {e}): replace it, or leave it out"
            ) from e
        found = in_folder(folder, path.name, formats)
        report.skipped += found.skipped
        report.level += 1
        try:
            yield found.files
        finally:
            report.level -= 1
            report.rename(temporary, str(path))


def _unpack(path: Path, folder: Path) -> None:
    """Unpack an archive into a folder. Raises UserError if it unpacks to too much."""
    archive_size, total = path.stat().st_size, 0
    for number, (name, size, packed, file) in enumerate(_members(path), 1):
        total += size
        ratio = max(size / max(packed or archive_size, 1), total / max(archive_size, 1))
        if (ratio > MOST_RATIO and total > SMALL) or total > MOST_UNPACKED:
            raise UserError(
                f"it unpacks to {human(total)} bytes, {ratio:,.0f} times its size, so it is "
                "hostile or holds no text: leave it out"
            )
        if number > MOST_MEMBERS:
            raise UserError(f"it has more than {MOST_MEMBERS:,} files: unpack it yourself")
        # A path within the folder, whatever the name is
        parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".", "..")] or ["_"]
        parts = [re.sub(r'[\0:*?"<>|\n\r]', "_", part)[-100:] for part in parts][-20:]
        try:
            _copy(file, folder.joinpath(*parts))
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            _copy(file, folder / f"_{number}" / parts[-1])


def _members(path: Path) -> Iterator[tuple[str, int, int, IO[bytes]]]:
    """The files of an archive: name, bytes, bytes in the archive (0 if unknown), and content."""
    # The kind, because a tar archive that ends with a zip archive looks like one
    if kind_of(path) == ".zip" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise UserError(f"{path} is encrypted: unpack it, and name the folder")
                if not info.is_dir():
                    with archive.open(info) as file:
                        yield info.filename, info.file_size, info.compress_size, file
        return
    with open_bytes(path) as raw, tarfile.open(fileobj=raw, mode="r|") as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                with file:
                    yield member.name, member.size, 0, file


def _copy(file: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "xb") as out:
        shutil.copyfileobj(file, out)
