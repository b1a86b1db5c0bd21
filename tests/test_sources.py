import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.base.common import UserError
from nanochat.data import sources as dataset
from nanochat.data.shards import prepare
from nanochat.data.sources import Source, cut, documents, mixed, parse_sources, parts


def source(path, field=None, name="s"):
    return Source(name, (path,), None, field)


def read(path, field=None):
    return list(documents(source(path, field)))


def jsonl(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


# --- specifications


def test_specifications(tmp_path):
    folder = tmp_path / "my texts"
    folder.mkdir()
    one, two, three = parse_sources(
        [f"books={folder}:0.4#body", f"{folder}:.5", f"x={folder}#body:1"]
    )
    assert (one.name, one.paths, one.weight, one.field) == ("books", (folder,), 0.4, "body")
    assert (two.name, two.paths, two.weight, two.field) == ("my_texts", (folder,), 0.5, None)
    assert (three.weight, three.field) == (1, "body")


def test_specifications_of_what_is_built_in(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    a, b, c, d = parse_sources(
        ["tinyworld:1", "small=tinyworld@2.5:2", "fineweb-edu:1", "web=climbmix:1"]
    )
    assert (a.kind, a.name, a.megabytes, a.weight) == ("tinyworld", "tinyworld", 20, 1)
    assert (b.kind, b.name, b.megabytes, b.weight) == ("tinyworld", "small", 2.5, 2)
    assert (c.kind, c.name, c.paths) == (
        "shards",
        "fineweb-edu",
        (tmp_path / "shards" / "fineweb-edu",),
    )
    assert (d.kind, d.name) == ("shards", "web")


def test_paths_with_odd_signs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("C:\\texts", "notes:2", "a=b", "c#d", "plain"):
        (tmp_path / name).mkdir()
        for spec in (name, f"n={name}", f"{name}:0.5", f"n={name}:0.5", f"n={name}:0.5#body"):
            (found,) = parse_sources([spec])
            assert str(found.paths[0]) == name, spec
            assert found.weight == (0.5 if spec != name and ":0.5" in spec else None)
            assert found.field == ("body" if "#body" in spec else None)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no data source given"),
        (["nowhere/at/all"], "there is no nowhere/at/all"),
        (["n=nowhere:0.3"], "there is no nowhere;"),
        (["a=.:0", "b=.:1"], "weight 0"),
        (["a=.:1", "b=."], "b has no weight"),
        (["a=.", "a=."], "two data sources are called a"),
        (["tinyworld@0"], "asks for no text"),
        (["\0"], "there is no"),
    ],
)
def test_bad_specifications(specs, message):
    with pytest.raises(UserError, match=message):
        parse_sources(specs)


# --- files


def test_every_form_gives_the_same_documents(tmp_path):
    rows = ["One.", "Two\n\nparagraphs.", "Drei äöü €, 中文 and 🙂."]
    jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": t} for t in rows])
    pq.write_table(pa.table({"id": [1, 2, 3], "text": rows}), tmp_path / "b.parquet")
    for i, t in enumerate(rows):
        (tmp_path / f"c{i}.txt").write_text(t)
    assert read(tmp_path) == rows * 3


def test_folders_are_read_in_order_and_through(tmp_path):
    for name in (
        "b/2.txt",
        "b/1.txt",
        "a.txt",
        "c/d/e.jsonl",
        ".hidden.txt",
        ".git/x.txt",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert read(tmp_path) == ["a.txt", "b/1.txt", "b/2.txt", "c/d/e.jsonl"]


def test_fields(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"title": "t", "content": "c", "body": "b"}])
    assert read(path) == ["c"] and read(path, "title") == ["t"]
    pq.write_table(pa.table({"n": [1, 2], "body": ["x", None]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == ["x"]


def test_rows_without_text_are_passed_over(tmp_path):
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
    path.write_bytes(b"a" * position + b"\xff" + b"b" * 20)
    with pytest.raises(UserError, match=rf"a\.txt is not UTF-8 at byte {position}:"):
        read(path)
    path.write_bytes("é".encode() + b"a" * position + b"\xc3")
    with pytest.raises(UserError, match=rf"at byte {position + 2}:"):
        read(path)


def test_errors_name_the_place(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, message in [
        (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2, is not JSON"),
        (b'{"text": "a"}\n[1]\n', r"line 2, holds a list"),
        (b'{"text": "a"}\n{"text": 5}\n', r"line 2: the field holds a int"),
        (b'{"text": "a"}\n\xff\n', r"not UTF-8 at byte 14 \(line 2\)"),
        (
            b'{"prompt": "a", "response": "b"}\n',
            r"line 1, has no field text or content or body, only prompt, response.*PATH#FIELD",
        ),
        (b'{"messages": []}\n', r"conversations, train on them with mid_train"),
        (b"[" * 100_000, r"line 1, is not JSON"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match="has no field nope, only text"):
        read(jsonl(path, [{"text": "a"}]), "nope")


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
        with pytest.raises(UserError, match=r"a\.parquet is no readable parquet file"):
            read(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="column text holds int64"):
        read(path)
    pq.write_table(pa.table({"other": ["a"]}), path)
    with pytest.raises(UserError, match=r"has no field text.*only other"):
        read(path)


def test_nothing_there(tmp_path):
    """Trap 27: an empty folder, one without text files, empty files, a file of another kind."""
    with pytest.raises(UserError, match=r"has no \.txt, \.jsonl, \.parquet file"):
        read(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"has no \.txt"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"data files end in \.txt"):
        read(tmp_path / "a.pdf")
    (tmp_path / "b.txt").write_text("")
    assert read(tmp_path) == []
    with pytest.raises(UserError, match="fewer than two different documents"):
        parts(source(tmp_path), "train")


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


# --- the validation split


def splits(s):
    return [list(documents(s, split)) for split in ("train", "val")]


def test_about_one_percent_and_all_of_both(tmp_path):
    rows = [f"document {i}" for i in range(5000)]
    train, val = splits(source(jsonl(tmp_path / "a.jsonl", [{"text": r} for r in rows])))
    assert sorted(train + val) == sorted(rows) and 25 < len(val) < 75


def test_membership_is_by_content(tmp_path):
    """Adding files, renaming them, another order or another format moves no document across; copies stay together."""
    rows = [f"document {i}" for i in range(2000)]
    jsonl(tmp_path / "m.jsonl", [{"text": r} for r in rows])
    _, val = splits(source(tmp_path))
    jsonl(tmp_path / "a.jsonl", [{"text": f"other {i}"} for i in range(1000)])
    (tmp_path / "m.jsonl").rename(tmp_path / "z.jsonl")
    random.Random(0).shuffle(rows)
    pq.write_table(pa.table({"text": rows}), tmp_path / "copy.parquet")
    train, more = splits(source(tmp_path))
    assert set(val) == {t for t in more if t.startswith("document")} and not set(train) & set(more)
    assert all(more.count(t) == 2 for t in val)


@pytest.mark.parametrize("n", [2, 3, 20, 100, 700])
def test_small_sources_have_a_validation_split_too(tmp_path, n):
    train, val = splits(
        source(jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(n)]))
    )
    assert min(8, n // 10) <= len(val) or n < 10
    assert val and train and len(train) + len(val) == n


def test_one_document_cannot_be_split(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "the same"}] * 50)
    with pytest.raises(UserError, match="fewer than two different documents"):
        splits(source(path))


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setitem(
        dataset.SHARD_SETS, "climbmix", dataset.ShardSet("karpathy/climbmix-400b-shuffle", last=9)
    )
    folder = tmp_path / "shards" / "climbmix"
    folder.mkdir(parents=True)

    def put(*numbers):
        for i in numbers:
            pq.write_table(
                pa.table({"text": [f"shard {i} document {j}" for j in range(100)]}),
                folder / f"shard_{i:05d}.parquet",
            )
        return parse_sources(["climbmix"])[0]

    return put


class Letters:
    fingerprint, bos, vocab_size = "letters", 0, 1000

    def encode_batch(self, texts, bos=False, threads=None):
        return [[0] * bos + [ord(c) for c in text] for text in texts]


def test_the_last_shard_is_validation_whatever_else_is_there(shards):
    """Trap 26: the same documents and the same hash with one training shard and with four."""
    one = shards(0, 9)
    hashes = {prepare(one, "val", Letters()).sha256}
    assert list(documents(one, "val")) == [f"shard 9 document {j}" for j in range(100)]
    four = shards(1, 2, 8)
    hashes.add(prepare(four, "val", Letters()).sha256)
    assert len(hashes) == 1 and len(prepare(four, "train", Letters())) == 400
    assert not any(t.startswith("shard 9") for t in documents(four, "train"))


def test_no_training_shard_is_promoted(shards):
    with pytest.raises(
        UserError, match=r"no training shards.*python -m nanochat\.dataset -n 15 --set climbmix"
    ):
        list(documents(shards(9), "train"))
    (shards(9).paths[0] / "shard_00009.parquet").unlink()
    with pytest.raises(UserError, match=r"validation shard .*shard_00009\.parquet is absent"):
        list(documents(shards(0, 1), "val"))


# --- mixtures


def test_mixtures_keep_their_shares_throughout(tmp_path):
    for name, length in (("a", 50), ("b", 400)):
        (tmp_path / name).mkdir()
        jsonl(
            tmp_path / name / "x.jsonl",
            [{"text": f"{name}{i:04d}" + name * length} for i in range(800)],
        )
    sources = parse_sources([f"{tmp_path}/a:0.25", f"{tmp_path}/b:0.75"])
    got = list(mixed(sources, max_chars=40_000))
    assert 40_000 <= sum(map(len, got)) < 40_500
    assert sum(len(t) for t in got if t[0] == "a") / sum(map(len, got)) == pytest.approx(
        0.25, abs=0.02
    )
    everything = list(mixed(sources))
    assert (
        len(everything)
        == len(set(everything))
        == sum(len(list(documents(s, "train"))) for s in sources)
    )
    by_size = list(mixed(parse_sources([f"{tmp_path}/a", f"{tmp_path}/b"]), max_chars=100_000))
    assert sum(len(t) for t in by_size if t[0] == "a") / sum(map(len, by_size)) == pytest.approx(
        55 / 460, abs=0.04
    )


def test_the_embedded_corpus():
    small = parse_sources(["tinyworld@0.2"])[0]
    train, val = splits(small)
    assert sum(len(t.encode()) for t in train) == pytest.approx(200_000, rel=0.05)
    assert val and not set(train) & set(val)
    assert splits(small) == [train, val]
