"""
Documents as people have them, and as somebody makes them to break a reader: every file is read, or
listed with its reason, and the files beside it are read all the same.
"""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import re
import struct
import tarfile
import zipfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_documents import read as read_alone

from nanochat.base.common import UserError
from nanochat.data import documents, inventory, readers, rows
from nanochat.data.folders import DOCUMENTS, ROWS, TEXT, find
from nanochat.data.rows import Report
from nanochat.data.shards import prepare
from nanochat.data.sources import parse_sources

for package in ("charset_normalizer", "selectolax", "mammoth", "defusedxml", "pypdf", "striprtf"):
    pytest.importorskip(package, reason="needs the extra documents")

STORY = "It was a day like any other, and the boat was gone. "
WORD = '<?xml version="1.0"?>{}<w:document xmlns:w="http://schemas.openxmlformats.org/'
WORD += 'wordprocessingml/2006/main"><w:body>{}</w:body></w:document>'
OPEN = '<?xml version="1.0"?>{}<o:document-content xmlns:o="urn:oasis:names:tc:opendocument:xmlns:'
OPEN += (
    'office:1.0" xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0"><o:body>{}</o:body>'
)
OPEN += "</o:document-content>"
LAUGHS = '<!DOCTYPE x [<!ENTITY a0 "ha">'
LAUGHS += "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)) + "]>"


def zipped(files, pack=zipfile.ZIP_DEFLATED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", pack) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def docx(body, doctype=""):
    relations = (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    )
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    relations += f'<Relationship Id="r" Type="{kind}" Target="word/document.xml"/></Relationships>'
    types = '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>'
    document = WORD.format(doctype, body)
    return zipped(
        {"[Content_Types].xml": types, "_rels/.rels": relations, "word/document.xml": document}
    )


def paragraph(text):
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def odt(body, doctype=""):
    mimetype = "application/vnd.oasis.opendocument.text"
    return zipped({"mimetype": mimetype, "content.xml": OPEN.format(doctype, body)})


def epub(chapters, doctype="", spine=None, more=()):
    container = '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    container += '<rootfile full-path="OPS/book.opf"/></rootfiles></container>'
    items = "".join(f'<item id="i{n}" href="c%20{n}.xhtml"/>' for n in range(len(chapters)))
    order = spine if spine is not None else range(len(chapters))
    refs = "".join(f'<itemref idref="i{n}"/>' for n in order)
    package = f'<?xml version="1.0"?>{doctype}<package xmlns="http://www.idpf.org/2007/opf">'
    package += f"<manifest>{items}</manifest><spine>{refs}</spine></package>"
    files = {
        f"OPS/c {n}.xhtml": f"<html><title>T</title><p>{text}</p></html>"
        for n, text in enumerate(chapters)
    }
    start = {"mimetype": "application/epub+zip", "META-INF/container.xml": container}
    return zipped({**start, "OPS/book.opf": package, **files, **dict(more)})


def pdf(text, kids="[3 0 R]", stream=None, filters=""):
    data = stream if stream is not None else f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids {kids} /Count 1 >>".encode(),
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(data)} {filters} >>\nstream\n".encode() + data + b"\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, item)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + end


def mail(subject, body, kind="plain", charset="utf-8"):
    head = f"From: a@x.org\nTo: b@x.org\nSubject: {subject}\nMIME-Version: 1.0\n"
    head += f"Content-Type: text/{kind}; charset={charset}\n\n"
    return head.encode() + body.encode(charset)


def zeros(megabytes):
    """A raw deflate stream of zeros, in no time: the same block again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + block * (megabytes - 1) + packer.flush()


def zip_of_zeros(name, megabytes=1024, declared=None):
    """A zip archive of one file of zeros, which may declare another size than it has."""
    data, size = zeros(megabytes), (megabytes << 20) if declared is None else declared
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(data), size, len(name), 0)
    local = b"PK\x03\x04" + common + name
    central = b"PK\x01\x02" + struct.pack("<H", 20) + common
    central += struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    return local + data + central + b"PK\x05\x06" + end


def gzip_of_zeros(megabytes=1024):
    return b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + zeros(megabytes) + bytes(8)


def tar_of(files, *others):
    """An archive of files, and of a link, a device and the like."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind in others:
            info = tarfile.TarInfo(f"{kind!r}.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return data.getvalue()


def notebook(*cells):
    return json.dumps({"cells": [{"cell_type": k, "source": [s]} for k, s in cells]}).encode()


def parquet(columns):
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return data.getvalue()


def nested(levels, name="a.txt", content=STORY):
    for level in range(levels):
        content = zipped({name: content})
        name = f"{level}.zip"
    return content


READABLE = {
    "page.html": (
        b"<html><head><title>T</title><script>var x</script></head><body><nav>menu</nav><h1>Head"
        b"</h1><p>One <b>bold</b>\nword &amp; more.</p><ul><li>a</li><li>b</li></ul>tail</body>",
        "T\n\nHead\n\nOne bold word & more.\n\na\nb\ntail",
    ),
    "cp1252.html": ('<meta charset="windows-1252"><p>Größe'.encode("cp1252"), "Größe"),
    "letter.docx": (docx(paragraph("One &lt;") + paragraph("Two")), "One <\n\nTwo"),
    "letter.odt": (
        odt("<text:h>Head</text:h><text:p>One<text:tab/>two <text:span>x</text:span></text:p>"),
        "Head\n\nOne\ttwo x",
    ),
    "book.epub": (epub(["First", "Second"], spine=[1, 0]), ["Second", "First"]),
    "paper.pdf": (pdf("A text in a PDF."), "A text in a PDF."),
    "rich.rtf": (rb"{\rtf1\ansi A \b bold\b0  word, \'e9.\par Two}", "A bold word, é.\nTwo"),
    "one.eml": (mail("Boats", "They are gone.\n"), "Boats\n\nThey are gone."),
    "charset.eml": (mail("A", "b").replace(b"utf-8", b"nonsense"), "A\n\nb"),
    "broken.mbox": (
        b"From a Mon\nContent-Type: image/png\n\nxx\n\nFrom b Tue\n" + mail("Two", "2"),
        "Two\n\n2",
    ),
    "page.eml": (mail("Boats", "<p>Gone, <b>é</b>", "html", "latin-1"), "Boats\n\nGone, é"),
    "all.mbox": (
        b"From a@x.org Mon\n"
        + mail("One", "1\n>From here\n\n")
        + b"From b Tue\n"
        + mail("Two", "2"),
        ["One\n\n1\nFrom here", "Two\n\n2"],
    ),
    "film.srt": (
        b"1\r\n00:00:01,000 --> 00:00:02,000\r\n<i>Hi.</i>\r\n\r\n2\r\n00:00:03,000 --> 0:0:4,0\r\nYes\r\n",
        "Hi.\nYes",
    ),
    "film.vtt": (b"WEBVTT\n\n00:01.000 --> 00:02.000 align:left\nHi.\nHi.\n", "Hi."),
    "work.ipynb": (notebook(("markdown", "# T"), ("code", "x = 1")), "# T\n\n```\nx = 1\n```"),
    "notes.md": (b"# Notes\n\n*one*", "# Notes\n\n*one*"),
    "code.py": (b"def f():\n    return 1\n", "def f():\n    return 1"),
    "noextension": (b"Only text.", "Only text."),
    "wrong.txt": (pdf("A PDF all the same."), "A PDF all the same."),
    "wrong.doc.docx": (rb"{\rtf1\ansi Rich}", "Rich"),
    "old.html.gz": (gzip.compress(b"<p>packed"), "packed"),
    "all.zip": (zipped({"b/x.md": "two", "a.html": "<p>one"}), ["one", "two"]),
    "all.tar.gz": (tar_of({"../../a.txt": b"one", "/etc/b.txt": b"two"}), ["one", "two"]),
    "deep.zip": (nested(3), STORY.strip("\n")),
    "rows.zip": (zipped({"a.jsonl": '{"text": "row"}\n'}), "row"),
    "twice.zip": (zipped({"a.txt": "one", "a.txt/b.txt": "two"}), ["two", "one"]),
    "koi8.txt": (("Это простой русский текст о море и лодке. " * 4).strip().encode("koi8-r"), None),
    "cp1251.txt": (
        ("Это простой русский текст о море и лодке. " * 4).strip().encode("cp1251"),
        None,
    ),
    "sjis.txt": (
        ("これは日本語の文章です。船は朝早く霧の中に消えました。" * 4).encode("shift-jis"),
        None,
    ),
    "gbk.txt": (("这是一个关于大海和小船的简单故事。" * 6).encode("gbk"), None),
    "cp1252.txt": (
        ("Größe und Straße, müde Männer hörten früh auf. " * 3).strip().encode("cp1252"),
        None,
    ),
    "bom.txt": ("Größe".encode("utf-16"), "Größe"),
    "crlf.txt": (b"\xef\xbb\xbfone\r\ntwo\rthree", "one\ntwo\nthree"),
    "stray.txt": ("Größe für Straße, schön".encode() + b"\xff", "Größe für Straße, schön\ufffd"),
    "new\nline.txt": (b"named oddly", "named oddly"),
    "surrogate.jsonl": (b'{"text": "a \\ud800"}', "a \ufffd"),
    "excel.csv": (b'\xef\xbb\xbftext;n\r\n"One; two";1\r\n', "One; two"),
    "saved.txt": (b"<!DOCTYPE html>\n<p>A page all the same.", "A page all the same."),
    "wide.txt": (STORY.encode("utf-32"), STORY),
    "old mac.txt": (b"one\rtwo", "one\ntwo"),
    "joined.txt.gz": (gzip.compress(b"one ") + gzip.compress(b"two"), "one two"),
    "unpacker.zip": (b"MZ" + bytes(500) + zipped({"a.txt": "one"}), "one"),
    "elsewhere.zip": (zipped({"../../a.txt": "one", "/etc/b.txt": "two", "C:\\c.txt": "three"}), ["three", "one", "two"]),
    "names.zip": (zipped({"a\nb.txt": "one", "A.TXT": "two"}), ["two", "one"]),
    "devices.tar": (tar_of({"a.txt": b"one"}, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE), "one"),
    "lists.jsonl": (b'\xef\xbb\xbf{"text": ["one", "two"]}\r\n\r\n{"text": "three"}\r\n', ["one\ntwo", "three"]),
    "x" * 251 + ".txt": (b"a long name", "a long name"),
    "$(touch x);%s.txt": (b"an odd name", "an odd name"),
    "last.tar": (gzip.decompress(tar_of({"a.txt": b"one", "z.zip": zipped({"b.txt": "two"})})), ["one", "two"]),
    "empty.xhtml": (b'<html><head><title/><script src="x.js"/></head><body><p>One</p></body></html>', "One"),
    "empty.epub": (epub(['One<script src="x.js"/></p><style/><title/><p>Two']), "One\n\nTwo"),
    "empty.odt": (odt("<text:tracked-changes/><text:p>One<text:line-break/>two</text:p>"), "One\ntwo"),
    "second.epub": (epub(["One"], more={"OPS/toc.xml": '<!DOCTYPE ncx PUBLIC "-//NISO//DTD ncx 2005-1//EN" "http://x.org/ncx.dtd"><ncx/>'}), "One"),
    "form.html": (b"<form><h1>Head</h1><label>Name <input></label><button>Go</button><p>One<br>two</form>", "Head\n\nOne\ntwo"),
    "shapes.html": (b"<svg>" + b"<path/>" * 5000 + b"</svg><div/>One", "One"),
    "quoted.html": (b"<script>$('<script/>')</script><p>One", "One"),
    "endless.html": (b"<p>One</p><" + b"a" * 1_000_000, "One"),
    "utf16.html": ('<meta charset="utf-16"><p>Größe'.encode(), "Größe"),
    "latin1.html": ('<meta charset="iso-8859-1"><p>“Größe”'.encode("cp1252"), "“Größe”"),
    "blocks.vtt": (
        b"WEBVTT\nKind: captions\nLanguage: en\n\nSTYLE\n::cue { color: red }\n\nNOTE by Ada\nand Bob\n\n"
        b"1\n00:01.000 --> 00:02.000\nNOTE it well.\n",
        "NOTE it well.",
    ),
    "note.srt": (b"1\n00:00:01,000 --> 00:00:02,000\nNOTE the hour.\nSTYLE it.\n", "NOTE the hour.\nSTYLE it."),
}  # fmt: skip
ENCODED = {
    "koi8": "koi8-r",
    "cp1251": "cp1251",
    "sjis": "shift-jis",
    "gbk": "gbk",
    "cp1252": "cp1252",
}


# Files of text in the archives of READABLE, innermost archives included
MEMBERS = sum(
    {
        "all.zip": 2,
        "all.tar.gz": 2,
        "deep.zip": 3,
        "rows.zip": 1,
        "twice.zip": 2,
        "unpacker.zip": 1,
        "elsewhere.zip": 3,
        "names.zip": 2,
        "devices.tar": 1,
        "last.tar": 3,
    }.values()
)


def read(path, report=None):
    return list(documents.read_all([path], None, report or Report()))


@pytest.mark.parametrize("name", READABLE)
def test_formats_of_people(tmp_path, name):
    data, wanted = READABLE[name]
    (tmp_path / name).write_bytes(data)
    (path,) = find([tmp_path], "s", (*TEXT, *ROWS)).files
    report = Report()
    wanted = data.decode(ENCODED[name.split(".")[0]]) if wanted is None else wanted
    assert read(path, report) == ([wanted] if isinstance(wanted, str) else wanted)
    assert not report.skipped and not report.problems
    if name.split(".")[0] in ENCODED and name.endswith(".txt"):
        assert any("guess" in note for note in report.notes), "a guess is reported"


def test_files_of_an_archive_whose_names_lead_nowhere_are_all_read(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"..": "one", "./..": "two"}))
    assert sorted(read(tmp_path / "a.zip")) == ["one", "two"]


def twins():
    """A parquet file with two columns of one name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table([pa.array([STORY]), pa.array(["x"])], names=["text", "text"])
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


HOSTILE = {
    "twins.parquet": (twins(), "several columns called .text"),
    "empty.txt": (b"", "no text"),
    "blank.md": (b" \n\n ", "no text"),
    "empty.pdf": (b"", "cannot be read as a PDF|no text"),
    "empty.docx": (b"", "cannot"),
    "empty.zip": (b"", "cannot be unpacked"),
    "empty.json": (b"", ".json files not read"),
    "empty.parquet": (b"", "cannot read"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "zero bytes|not UTF-8"),
    "zeros.txt": (bytes(5000), "zero bytes|not UTF-"),
    "zeros.md.gz": (gzip_of_zeros(), "zero bytes|not UTF-"),
    "zeros.html.gz": (gzip_of_zeros(), "more than 67.1M bytes"),
    "late.txt": (b"text " * 300_000 + b"\0", "zero bytes"),
    "bomb.zip": (zip_of_zeros(b"a.txt"), "unpacks to 1.07G bytes, 1,0.. times"),
    "liar.zip": (zip_of_zeros(b"a.txt", declared=100), "cannot"),
    "bomb.docx": (zip_of_zeros(b"word/document.xml"), "unpacks to 1.07G"),
    "bomb.tgz": (
        gzip.compress(tarfile.TarInfo("a").tobuf()[:124] + b"20000000000\0" + bytes(376)),
        "cannot|hostile",
    ),
    "nested.zip": (nested(6), "inside 3 other archives"),
    "locked.zip": (
        zipped({"a.txt": STORY}).replace(
            b"PK\x01\x02\x14\x03\x14\0\0", b"PK\x01\x02\x14\x03\x14\0\1"
        ),
        "encrypted",
    ),
    "cut.zip": (zipped({"a.txt": STORY * 99})[:60], "cannot"),
    "laughs.docx": (docx(paragraph("&a11;"), LAUGHS), "declares XML entities"),
    "laughs.odt": (odt("<text:p>&a11;</text:p>", LAUGHS), "declares XML entities"),
    "laughs.epub": (epub(["&a11;"], LAUGHS), "declares XML entities"),
    "attributes.epub": (
        epub(["x"], '<!DOCTYPE package [<!ATTLIST item x CDATA "ha">]>'),
        "declares XML entities",
    ),
    "wide.docx": (
        zipped({"word/document.xml": LAUGHS.encode("utf-16")}),
        "declares XML entities",
    ),
    "outside.odt": (
        odt("<text:p>&x;</text:p>", '<!DOCTYPE x [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
        "declares XML entities",
    ),
    "deep.docx": (docx("<w:p>" * 20_000 + "</w:p>" * 20_000), "cannot be read|no text"),
    "notxml.docx": (docx("<w:p>"), "cannot be read"),
    "nobook.epub": (zipped({"mimetype": "application/epub+zip"}), "cannot be read"),
    "locked.epub": (
        epub(["x"], more={"META-INF/encryption.xml": '<r URI="OPS/c 0.xhtml"/>'}),
        "encrypted",
    ),
    "gone.epub": (epub([], spine=[7]), "no text"),
    "loop.pdf": (pdf("x", kids="[2 0 R]"), "cannot be read as a PDF|no text layer"),
    "cut.pdf": (pdf("x")[:150], "cannot be read as a PDF|no text layer"),
    "scan.pdf": (pdf("", stream=b""), "no text layer"),
    "bomb.pdf": (
        pdf("", stream=b"x\x9c" + zeros(512), filters="/Filter /FlateDecode"),
        "cannot be read as a PDF|no text layer",
    ),
    "broken.rtf": (b"{\\rtf1 " + b"{" * 50_000, "no text|cannot"),
    "nothing.eml": (b"Content-Type: image/png\n\nxx", "no text"),
    "odd.ipynb": (b'{"cells": [1]}', "not a notebook"),
    "deep.ipynb": (b"[" * 200_000, "not a notebook"),
    "deep.json": (b"[" * 200_000, "invalid JSON|Recursion"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 9999)[:40], "cannot read"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
    "sheet.txt": (zipped({"xl/workbook.xml": "x"}), ".xlsx files not read"),
    "word97.txt": (b"\xd0\xcf\x11\xe0" + bytes(600), ".doc files not read"),
    "numbers.parquet": (parquet({"score": [1, 2]}), "has no field text"),
    "years.parquet": (parquet({"text": [1984, 1999]}), "holds a int"),
    "talk.jsonl": (b'{"messages": [{"role": "user", "content": "x"}]}', "holds conversations"),
    "huge.csv": (
        b'text\n"' + b"x" * (1 << 20) + b'"\n"' + b"unfinished",
        "cannot read|unexpected end",
    ),
    "nul.csv": (b'text\n"a\0b"\n', "cannot read|zero"),
    "mark.txt": (b"\xef\xbb\xbf", "no text"),
    "odd16.txt": ("one".encode("utf-16")[:-1], "cannot read"),
    "deep.html": (b"<div>" * 100_000 + b"x", "4,000 deep"),
    "stray.html": (b"<div></b>" * 5000 + b"x", "4,000 deep"),
    "scripts.html": (b"<script>var x</script><!-- x", "no text"),
    "parts.eml": (
        b'Content-Type: multipart/mixed; boundary="x"\n\n'
        + b"--x\nContent-Type: text/plain\n\nh\n" * 20_000,
        "5,000 parts",
    ),
    "forwarded.eml": (b"Content-Type: message/rfc822\n\n" * 2000, "cannot be read|no text"),
    "base64.eml": (b"Content-Transfer-Encoding: base64\n\n!!!!", "no text"),
    "links.tar": (tar_of({}, tarfile.SYMTYPE), "no text"),
    "wrong.zip": (
        zipped({"a.txt": STORY}, zipfile.ZIP_STORED).replace(b"boat", b"bOat", 1),
        "Bad CRC",
    ),
    "folders.zip": (zipped({"a/": "", "a/b/": ""}), "no text"),
    "trailing.txt.gz": (gzip.compress(b"x") + b"garbage", "cannot read"),
    "cut.txt.xz": (lzma.compress(STORY.encode() * 99)[:70], "cannot read"),
    "zeros.txt.bz2": (bz2.compress(bytes(50 << 20), 1), "zero bytes"),
    "plain.docx": (STORY.encode(), "not a zip file"),
    "null.ipynb": (b'{"cells": null}', "not a notebook"),
    "null.jsonl": (b"null\n", "line 1: expected an object with a text field"),
    "digits.jsonl": (b'{"text": "x", "n": ' + b"9" * 10_000 + b"}\n", "line 1: invalid JSON"),
    "header.csv": (b"text\n", "no text"),
    "times.srt": (b"1\n00:00:01,000 --> 00:00:02,000\n", "no text"),
    "program": (b"\x7fELF" + bytes(200), "other files not read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_listed_and_the_others_are_read(tmp_path, name):
    data, reason = HOSTILE[name]
    (tmp_path / "a good one.txt").write_text(STORY)
    (tmp_path / "z good one.txt").write_text(STORY[::-1])
    (tmp_path / name).write_bytes(data)
    found = find([tmp_path], "s", (*TEXT, *ROWS))
    report = Report(limit=10)
    texts = list(documents.read_all(found.files, None, report))
    assert texts[0] == STORY and texts[-1] == STORY[::-1]
    assert all("\0" not in text for text in texts)
    listed = {
        os.path.relpath(where, tmp_path).split("/")[0]: why
        for why, where in (*found.skipped, *report.skipped)
    }
    assert list(listed) == [name]
    assert re.search(reason, listed[name]), listed[name]


class Letters:
    fingerprint, bos, vocab_size = "letters", 0, 1 << 21

    def encode_batch(self, texts, bos=False):
        return [[0] * bos + [ord(c) for c in text] for text in texts]


def test_all_of_them_in_one_folder(tmp_path, monkeypatch):
    """The inventory accounts for every file, and what is trained on is what it counted."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "all of it"
    folder.mkdir()
    both = {**HOSTILE, **READABLE}
    slow = ["wrong.txt"]
    names = [n for n in both if not n.endswith("pdf") and n not in slow]
    for name in names:
        (folder / name).write_bytes(both[name][0])
    (folder / "rows.jsonl").write_text('{"text": "' + STORY * 40 + '"}\n{"text": "short"}\n')
    (source,) = parse_sources([f"all={folder}"])
    known = inventory.of(source)
    listed = {os.path.relpath(where, folder).split("/")[0] for _, where in known.skipped}
    assert [os.path.basename(name) for name in known.conversations] == ["talk.jsonl"]
    assert listed == set(HOSTILE) & set(names) - {"talk.jsonl"}
    assert sum(known.read.values()) == len(names) + 1 - len(listed) - 1 + MEMBERS
    shards = [prepare(source, split, Letters()) for split in ("train", "val")]
    kept = known.characters - known.removed_characters
    assert known.held_out[1] == int((shards[1].lengths - 1).sum())
    if known.piece is None:
        assert sum(int((s.lengths - 1).sum()) for s in shards) == kept
        assert sum(map(len, shards)) == known.documents - known.exact - known.near


def test_a_pdf_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "a.pdf").write_bytes(pdf("Kept text."))
    assert read(tmp_path / "a.pdf") == ["Kept text."]
    monkeypatch.setattr(readers, "_pdf_text", None)
    assert read(tmp_path / "a.pdf") == ["Kept text."]


def test_without_a_library_the_message_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.html").write_text("<p>x")
    (tmp_path / "b.txt").write_text("text")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    report = Report()
    assert list(documents.read_all(find([tmp_path], "s", TEXT).files, None, report)) == ["text"]
    ((reason, name),) = report.skipped
    assert 'pip install -e ".[documents]"' in reason and name.endswith("a.html")


def test_without_a_library_a_mailbox_of_pages_names_the_extra(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    (tmp_path / "a.mbox").write_bytes(b"From a Mon\n" + mail("A", "<p>x", "html"))
    monkeypatch.setattr("importlib.import_module", missing)
    report = Report()
    assert read(tmp_path / "a.mbox", report) == []
    assert "the package selectolax cannot be used" in str(report.notes)
    assert 'pip install -e ".[documents]"' in str(report.notes)


def test_archives_are_unpacked_on_the_disk_of_the_base_folder(tmp_path, monkeypatch):
    """A message about a full disk names this folder; /tmp is small on many machines."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    (tmp_path / "a.zip").write_bytes(zipped({"a.txt": "one"}))
    assert read(tmp_path / "a.zip") == ["one"]
    assert not [*(tmp_path / "base" / "documents").iterdir()]


def test_a_file_that_is_deleted_while_it_is_read_is_listed(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(STORY)
    report = Report()
    texts = documents.read_all(paths, None, report)
    assert next(texts) == STORY
    paths[0].unlink()
    assert [*texts] == [STORY]
    ((reason, name),) = report.skipped
    assert reason.startswith("cannot read it") and name == str(paths[0])


@pytest.mark.parametrize(
    ("page", "encoding"),
    [
        (b'<meta charset="klingon"><p>x', "utf-8"),
        (b'<meta charset="punycode"><p>x-y', "utf-8"),
        (
            b"<p>"
            + b"a" * (1 << 20)
            + ("Größe und Straße, müde Männer hörten früh auf. " * 3).encode("cp1252"),
            "cp1252",
        ),
    ],
    ids=["unknown", "not of a page", "late"],
)
def test_encodings_of_odd_pages(page, encoding):
    assert rows.encoding_of_html(page, Report()) == encoding


def test_a_megabyte_of_spaces_is_tidied_at_once():
    text = "a" + " " * 1_000_000 + "b"
    assert readers.tidy(f" {text} \n \n\n{text}\n") == f"{text}\n\n{text}"


def test_every_extension_has_its_reader():
    assert set(readers.READERS) == set(DOCUMENTS)


FIELDS = [
    {
        "id": 1,
        "title": "T",
        "post": {"body": "B", "tags": ["x", "y"]},
        "c": [{"t": "1"}, {"t": "2"}],
    }
]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "zip"])
@pytest.mark.parametrize(
    ("field", "wanted"),
    [
        ("title", "T"),
        ("post.body", "B"),
        ("post.tags", "x\ny"),
        ("c.t", "1\n2"),
        ("{title}\\n\\n{post.body}", "T\n\nB"),
        ("Title: {title}", "Title: T"),
    ],
)
def test_nested_fields_and_templates(tmp_path, form, field, wanted):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(FIELDS), path)
    elif form == "zip":
        path.write_bytes(zipped({"a.jsonl": json.dumps(FIELDS[0])}))
    else:
        path.write_text(json.dumps(FIELDS[0]))
    (source,) = parse_sources([f"posts={path}:0.5#{field}"])
    assert (source.field, source.weight, source.paths) == (field, 0.5, (path,))
    (turned,) = parse_sources([f"posts={path}#{field}:0.5"])
    assert turned == source
    assert read_alone(path, source.field) == [wanted]


@pytest.mark.parametrize("field", ["post.nothing", "{title} {gone}", "post"])
def test_fields_that_are_not_there(tmp_path, field):
    (tmp_path / "a.jsonl").write_text(json.dumps(FIELDS[0]))
    with pytest.raises(UserError, match=r"no field .*only id, title, post\.body|holds a dict"):
        read_alone(tmp_path / "a.jsonl", field)


def test_a_part_that_is_one_bad_file_stops_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr("nanochat.data.sources.PART_BYTES", 100)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"{i} " + STORY)
    (folder / "z.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    (folder / "z.txt.gz").write_bytes(gzip.compress(STORY.encode() * 100)[:-40])
    (source,) = parse_sources([str(folder)])
    shards = [prepare(source, split, Letters()) for split in ("train", "val")]
    assert sum(map(len, shards)) == 12
    assert sum("skipped" in note for note in shards[0].notes) == 2


def test_a_file_of_rows_without_text_is_one_skipped_file(tmp_path):
    people = [{"name": "Ada", "born": 1815}] * 5000
    (tmp_path / "people.json").write_text(json.dumps(people))
    (tmp_path / "words.json").write_text('{"messages": {"hello": "Hallo"}}')
    (tmp_path / "a.txt").write_text(STORY)
    report = Report()
    assert [*documents.read_all(sorted(tmp_path.iterdir()), None, report)] == [STORY]
    report.finish()  # no row is bad
    assert len(report.skipped) == 2 and "only name, born" in report.skipped[0][0]
    with pytest.raises(UserError, match="no field text"):
        [*documents.read_all([tmp_path / "people.json"], None, Report())]


def test_no_space_on_the_disk_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(OSError, match="No space"), rows.reading(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_numbers_in_a_template(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "Emma", "year": 1815, "score": 4.5}\n')
    read = read_alone(tmp_path / "a.jsonl", "{title} ({year}): {score}")
    assert read == ["Emma (1815): 4.5"]


@pytest.mark.parametrize("where", [100, 999])
def test_a_quotation_mark_in_a_table_loses_one_row(tmp_path, where):
    table = [f"{i}\tLine {i} of the table." for i in range(1000)]
    table[where] = f'{where}\t"Hello", she said.'
    (tmp_path / "a.tsv").write_text("\n".join(["id\ttext", *table]) + "\n")
    report = Report(limit=1)
    assert len([*documents.read_all([tmp_path / "a.tsv"], None, report)]) == 999
    assert len(report.problems) == 1 and f"line {where + 2}:" in report.problems[0]


def test_a_quotation_mark_that_ends_elsewhere_melts_no_rows(tmp_path):
    table = [f"{i}\tLine {i} of the table." for i in range(100)]
    table[20], table[60] = '20\t"Hello', '60\tshe said"'
    (tmp_path / "a.tsv").write_text("\n".join(["id\ttext", *table]) + "\n")
    report = Report(limit=1)
    texts = [*documents.read_all([tmp_path / "a.tsv"], None, report)]
    assert max(map(len, texts)) < 40 and len(report.problems) == 1
