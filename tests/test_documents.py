"""Readers of .txt, .jsonl and .parquet files: documents, and errors that name the place."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.base.common import UserError
from nanochat.data import documents, rows
from nanochat.data.documents import cut


def read(path, field=None):
    """
    The documents of a file, or of the files of a folder in the order of their names. UserError at
    the end of a file if rows of it cannot be used.
    """
    texts = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        report = documents.Report()
        texts += documents.read(file, field, report)
        report.finish()
    return texts


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def test_every_form_gives_the_same_documents(tmp_path):
    rows = ["One.", "Two\n\nparagraphs.", "Drei äöü €, 中文 and 🙂."]
    jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": t} for t in rows])
    pq.write_table(pa.table({"id": [1, 2, 3], "text": rows}), tmp_path / "b.parquet")
    for i, t in enumerate(rows):
        (tmp_path / f"c{i}.txt").write_text(t)
    assert read(tmp_path) == rows * 3


def test_fields(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"title": "t", "content": "c", "body": "b"}])
    assert read(path) == ["c"] and read(path, "title") == ["t"]
    pq.write_table(pa.table({"n": [1, 2], "body": ["x", None]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == ["x"]


def test_rows_without_text_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\ufeff{"text": "one"}\r\n\n{"text": null}\n{"text": ""}\n{"text": " \\n "}\n"bare"\n'
    )
    assert read(path) == ["one", "bare"]


def test_a_lone_surrogate_becomes_a_replacement(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud800 b"}\n{"text": "\\ud83d\\ude42"}\n{"text": "é \\udc00"}\n')
    assert read(path) == ["a \ufffd b", "🙂", "é \ufffd"]


def test_newlines_and_byte_order_marks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\n")
    assert read(path) == ["one\ntwo\nthree"]


def test_a_megabyte_of_spaces(tmp_path):
    """Trap 27: as a text of its own, within one, and in a row of a file."""
    (tmp_path / "a.txt").write_text("start" + " " * 1_000_000 + "end")
    jsonl(tmp_path / "b.jsonl", [{"text": "x" + " " * 1_000_000 + "y"}])
    (tmp_path / "c.txt").write_text(" " * 1_000_000)
    first, last, row = read(tmp_path)
    assert first.startswith("start ") and last.endswith(" end") and len(row) == 1_000_002


@pytest.mark.parametrize("position", [0, 10, (1 << 20) - 1, 1 << 20, (1 << 20) + 5])
def test_text_that_is_not_utf8_is_located(tmp_path, position):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * position + b"\xff\1\2\x81\3\x8d\xfe\4" * 99)
    with pytest.raises(UserError, match=rf"a\.txt is not UTF-8 at byte {position}:"):
        read(path)
    path.write_bytes("é".encode() + b"a" * position + b"\xc3")
    report = documents.Report()
    text = "".join(documents.read(path, None, report))
    assert (text[0], text[-1], len(text)) == ("é", "\ufffd", position + 2)
    assert report.notes["files with damaged bytes, read as U+FFFD"] == 1


def test_errors_name_the_place(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, message in [
        (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2: invalid JSON"),
        (b'{"text": "a"}\n[1]\n', r"line 2: expected an object .* got a list"),
        (b'{"text": "a"}\n{"text": 5}\n', r"line 2: the field text holds a int"),
        (b'{"text": "a"}\n\xff\n', r"line 2: invalid JSON \(.*can't decode byte 0xff"),
        (
            b'{"title": "a", "response": "b"}\n',
            r"line 1: it has no field text or content or body, only title, response.*PATH#FIELD",
        ),
        (b'{"messages": []}\n', r"conversations: train on them with mid_train"),
        (b'{"prompt": "a", "response": "b"}\n', r"conversations: train on them with mid_train"),
        (b"[" * 100_000, r"line 1: invalid JSON"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match="has no field nope, only text"):
        read(jsonl(path, [{"text": "a"}]), "nope")


def test_json_that_is_too_long_to_be_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_ROW", 100)
    values = [{"text": f"text {i}"} for i in range(20)]
    path = jsonl(tmp_path / "a.json", values)
    assert len(read(path)) == 20
    path.write_text(json.dumps(values, indent=1))
    with pytest.raises(UserError, match=r"a\.json has more than 100 bytes .* to \.jsonl"):
        read(path)


def test_unreadable_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"document {i} " * 50 for i in range(5000)]}), path)
    whole = path.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        b"",
        b"PAR1 no parquet at all",
        whole[:2000] + bytes(4000) + whole[6000:],
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*a\.parquet \("):
            read(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: the field text holds a int"):
        read(path)
    pq.write_table(pa.table({"other": ["a"]}), path)
    with pytest.raises(UserError, match=r"has no field text.*only other"):
        read(path)


# --- cutting


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet="ab .!\n", max_size=400),
    st.lists(st.integers(1, 50), max_size=10),
    st.integers(4, 60),
)
def test_cutting_loses_nothing_but_line_breaks(text, sizes, limit):
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    got = list(cut([*pieces, text[at:]], limit))
    assert all(len(piece) <= limit for piece in got)
    at = 0
    for piece in got:
        gap = text.index(piece, at)
        assert not text[at:gap].strip("\n")
        at = gap + len(piece)
    assert not text[at:].strip("\n")


def test_cuts_fall_where_they_hurt_least():
    assert list(cut(["aaaa\n\nbb. bb\nbbb bbbb"], 14)) == ["aaaa\n\nbb. bb", "bbb bbbb"]
    assert list(cut(["One two. Three four five"], 15)) == ["One two. ", "Three four five"]
    assert list(cut(["one two three four"], 10)) == ["one two ", "three four"]
    assert list(cut(["abcdefghijkl"], 5)) == ["abcde", "fghij", "kl"]


def test_a_book_gives_many_documents(tmp_path):
    paragraph = "It was a bright cold day in April, and the clocks were striking thirteen. " * 10
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"{i} {paragraph}" for i in range(500)))
    docs = read(path)
    assert "\n\n".join(docs) == path.read_text() and len(docs) == pytest.approx(
        len(path.read_text()) / 16_000, rel=0.1
    )


@pytest.mark.parametrize("length", [32, 100])
def test_lines_on_both_sides_of_a_megabyte_are_kept(tmp_path, length):
    """A piece of a mebibyte that ends with a line takes nothing from the next one."""
    lines = [f"{i:07d} {'word ' * 40}"[: length - 1] for i in range((3 << 20) // length)]
    path = tmp_path / "long.txt"
    path.write_text("\n".join(lines) + "\n")
    assert len(path.read_bytes()) > 2 << 20
    assert "\n".join(read(path)).split("\n") == lines
