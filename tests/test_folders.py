"""The finder: what it reads in a folder, what it passes over, and that it says so."""

import bz2
import gzip
import html
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_documents import read

from nanochat.base.common import UserError
from nanochat.data import documents
from nanochat.data.folders import ROWS, TEXT, find, format_of
from nanochat.data.rows import Report

STORY = "It was a day like any other, and the boat was gone. "


def names(folder, formats=(*TEXT, *ROWS)):
    found = find([folder], "s", formats)
    return [str(p.relative_to(folder)) for p in found.files], dict(found.reasons())


def put(folder, *files, text=STORY * 20):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


def compressed(path, data):
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(data)
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[path.suffix]
        path.write_bytes(pack(data))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.txt", ".txt"),
        ("A.TXT", ".txt"),
        ("talk.JsonL", ".jsonl"),
        ("a.b.NDJSON.GZ", ".ndjson"),
        ("x.csv.zst", ".csv"),
        ("x.Parquet", ".parquet"),
        ("x.parquet.gz", ""),
        ("x.tar.gz", ".tar"),
        ("gz", ""),
        (".gz", ""),
    ],
)
def test_formats(tmp_path, name, form):
    assert format_of(tmp_path / name) == form


def test_hidden_files_and_those_of_a_mac_are_left_out(tmp_path):
    put(tmp_path, "a.jsonl", "._a.jsonl", ".b.txt", "__MACOSX/c.txt", ".git/d.txt", "sub/._e.TXT")
    put(tmp_path, ".DS_Store", "sub/f.TXT")
    assert names(tmp_path) == (["a.jsonl", "sub/f.TXT"], {"hidden files": 3})
    assert names(tmp_path, ROWS)[0] == ["a.jsonl"], "the same finder for conversations"


def test_what_is_passed_over_is_counted(tmp_path):
    put(tmp_path, "a.txt", "b.ps", "c.PS", "picture.png", "noext", "table.csv", "d/e.xlsx")
    put(tmp_path, "settings.json", text='{"a": 1}')
    put(tmp_path, "rows.json", text='\ufeff [{"text": "x"}]')
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("/nonexistent")
    files, skipped = names(tmp_path)
    assert files == ["a.txt", "noext", "rows.json"]
    assert skipped == {
        ".ps files not read": 2,
        ".png files not read": 1,
        ".csv files not read": 1,
        ".xlsx files not read": 1,
        ".json files not read": 1,
        "pipes, devices or sockets": 1,
        "broken links": 1,
    }
    assert names(tmp_path / "table.csv")[0] == ["."], "a file that is named is read"


def test_links_are_followed_once(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    put(inside, "a.txt", "deep/b.txt")
    put(outside, "c.txt")
    (inside / "deep" / "loop").symlink_to(inside)
    (inside / "self").symlink_to(".")
    (inside / "there").symlink_to(outside)
    (inside / "again").symlink_to(outside)
    (inside / "0.txt").symlink_to(inside / "a.txt")
    (inside / "single.txt").symlink_to(outside / "c.txt")
    files, skipped = names(inside)
    assert len(files) == 3 and {f.split("/")[-1] for f in files} == {"a.txt", "b.txt", "c.txt"}
    assert skipped["links to folders that are read already"] >= 3
    assert skipped["links to files that are read already"] == 2


@pytest.mark.parametrize("others", [["big.doc"], ["x.mobi", "y.7z"], ["a.rar"], ["a.xml.gz"]])
def test_a_folder_of_which_only_the_readme_would_be_read_is_refused(tmp_path, others):
    put(tmp_path, "README.txt", text="Read me.")
    put(tmp_path, *others, text=STORY * 500)
    with pytest.raises(UserError, match=r"only 8 bytes of .* would be read, and .* bytes not \("):
        names(tmp_path)
    put(tmp_path, "picture.png", text=STORY * 50_000)
    put(tmp_path, "corpus.txt", text=STORY * 500)
    assert names(tmp_path)[0] == ["README.txt", "corpus.txt"], "pictures are no text"


@pytest.mark.parametrize(
    "name",
    [b"caf\xe9.txt", b"a\nb.txt", b"-rf.txt", b"x#y:0.5.txt", b"a=b.txt", b"nul\x01.txt", b" .txt"],
)
def test_names_that_are_odd_or_not_utf8(tmp_path, name, capsys):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(STORY.encode() * 9)
    (found,) = find([tmp_path], "s", TEXT).files
    assert read(found) == [STORY * 9]
    with open(path, "wb") as file:
        file.write(b"\xff" + STORY.encode() + b"\0")
    with pytest.raises(UserError, match="holds zero bytes"):
        read(found)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("form", [".txt", ".jsonl", ".csv", ".json"])
def test_compressed_files_are_read_like_others(tmp_path, form, ending):
    texts = [f"{i} {STORY}" for i in range(300)]
    plain = {
        ".txt": "<|endoftext|>".join(texts),
        ".jsonl": "\n".join(json.dumps({"text": t}) for t in texts),
        ".csv": "id,text\n" + "\n".join(f'1,"{t}"' for t in texts),
        ".json": json.dumps([{"text": t} for t in texts]),
    }[form]
    path = tmp_path / f"a{form}{ending}"
    compressed(path, plain.encode())
    assert read(path) == texts
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read|invalid JSON"):
        read(path)


@pytest.mark.parametrize(
    ("name", "pack"), [("a.jsonl", gzip.compress), ("a.txt", bz2.compress), ("a.txt.gz", bytes)]
)
def test_the_content_decides_whether_a_file_is_compressed(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b'{"text": "x"}\n' if "jsonl" in name else b"x\n"))
    assert read(tmp_path / name) == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("pointer", "tool"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("version https://hawser.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("/annex/objects/SHA256E-s9--0.txt\n", "git annex get"),
        ("# xet version 0\nfilesize = 9\n", "git xet checkout"),
    ],
)
def test_a_pointer_is_named_as_what_it_is(tmp_path, name, pointer, tool):
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=f"{name} is a pointer of .*`{tool}`"):
        read(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("form", [".txt", ".jsonl", ".csv", ".json"])
def test_encodings_of_windows(tmp_path, form, encoding):
    text = "A café in Köln, and what was said there."
    content = {
        ".txt": text,
        ".jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\r\n",
        ".csv": f'id,text\r\n1,"{text}"\r\n',
        ".json": json.dumps([{"text": text}], ensure_ascii=False),
    }[form]
    (tmp_path / f"a{form}").write_bytes(content.encode(encoding))
    report = Report()
    assert list(documents.read(tmp_path / f"a{form}", None, report)) == [text]
    assert bool(report.notes) == encoding.startswith("utf-16"), "what was guessed is said"


@pytest.mark.parametrize("data", [bytes(1000), b"text\0more", b"a" * 2_000_000 + b"\0"])
def test_zero_bytes_are_no_text(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.txt (holds zero bytes|is not UTF-)"):
        read(tmp_path / "a.txt")


TYPES = {
    "large": pa.large_string(),
    "view": pa.string_view(),
    "binary": pa.binary(),
    "large binary": pa.large_binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large": pa.dictionary(pa.int8(), pa.large_string()),
}


@pytest.mark.parametrize("kind", [*TYPES, "list", "large list", "list of dictionary"])
def test_every_arrow_type_of_text(tmp_path, kind):
    texts = ["one", "two", "one", None, "ünf"]
    if "list" in kind:
        inner = TYPES["dictionary"] if "dictionary" in kind else pa.string()
        listed = (pa.large_list if "large" in kind else pa.list_)(inner)
        column = pa.array([t and [t, "more"] for t in texts], listed)
        wanted = [f"{t}\nmore" for t in texts if t]
    else:
        column = pa.array(texts).cast(TYPES[kind])
        wanted = [t for t in texts if t]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    assert read(path) == wanted


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a story.\n<|endoftext|>\nanother\n<|endoftext|>\n", ["a story.", "another"]),
        ("one<|endoftext|>two<|endoftext|>three", ["one", "two", "three"]),
        ("<|startoftext|>one<|endoftext|>\n<|startoftext|>two<|endoftext|>", ["one", "two"]),
        ("one\n</s>\ntwo\n </s> \nthree </s> is kept", ["one", "two", "three </s> is kept"]),
        ("one\n<eos>\n<bos>\ntwo", ["one", "two"]),
        ("<|begin_of_text|>one<|end_of_text|>two", ["one", "two"]),
        ("<|bos|>one<|bos|>two", ["one", "two"]),
        ("one\n<EOS>\n<BOS>\ntwo\n[BOS]\nthree", ["one", "two", "three"]),
        ("no separator < | endoftext | >", ["no separator < | endoftext | >"]),
    ],
)
def test_separators_end_a_document(tmp_path, text, parts):
    (tmp_path / "a.txt").write_text(text)
    report = Report()
    assert list(documents.read(tmp_path / "a.txt", None, report)) == parts
    assert bool(report.notes) == (len(parts) > 1)


@pytest.mark.parametrize("form", ["rows.jsonl", "rows.csv", "rows.parquet", "page.html"])
def test_separators_within_rows_and_pages_end_a_document(tmp_path, form):
    texts = [
        "one<|endoftext|>two<|endoftext|>",
        "three\n</s>\nfour",
        "five </s> is kept",
        "<|bos|>six",
    ]
    path, report = tmp_path / form, Report()
    if form.endswith("jsonl"):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif form.endswith("csv"):
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    elif form.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_text(f"<p>{html.escape('one<|endoftext|>two')}</p><p>three</p>" * 50)
    read = list(documents.read(path, None, report))
    if form == "page.html":
        assert len(read) == 51 and not any("<|" in text for text in read)
    else:
        assert read == ["one", "two", "three", "four", "five </s> is kept", "six"]
        assert report.notes["documents ended at <|endoftext|>"] == 2
    assert "documents without text skipped" not in report.notes


@pytest.mark.parametrize("before", [(1 << 20) - k for k in (0, 1, 5, 12, 13, 14, 40)])
def test_no_separator_is_torn(tmp_path, before):
    for filler in ("x" * before, ("y" * 99 + "\n") * (before // 100) + "z" * (before % 100)):
        (tmp_path / "a.txt").write_text(filler + "<|endoftext|>" + "end")
        report = Report()
        read = list(documents.read(tmp_path / "a.txt", None, report))
        assert read[-1] == "end" and report.notes["documents ended at <|endoftext|>"] == 1


def test_bad_rows_are_named_together_and_may_be_left_out(tmp_path):
    good = '{"text": "fine"}\n'
    bad = [
        "{",
        '{"text": 5}',
        '{"other": "x"}',
        '"unfinished',
        "[1]",
        b'{"text": "\xff"}'.decode("latin-1"),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(good + row + "\n" for row in bad), encoding="latin-1")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith("6 rows cannot be used: ")
    assert str(error.value).endswith("; correct or delete them")  # here is no --skip_bad_rows
    assert all(f"line {n}: " in str(error.value) for n in (2, 4, 6, 8, 10))
    report = Report(limit=6)
    assert list(documents.read(path, None, report)) == ["fine"] * 6
    report.finish()
    assert report.notes["bad rows skipped"] == 6
    report = Report(limit=5)
    assert list(documents.read(path, None, report)) == ["fine"] * 6
    with pytest.raises(UserError, match=r"^6 rows cannot be used.*--skip_bad_rows 6$"):
        report.finish()


def test_a_file_of_bad_rows_alone_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 100_000)
    with pytest.raises(UserError, match=r"at least 1,001 rows cannot be used"):
        read(path)


def test_the_base_folder_within_the_texts_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nano"))
    (tmp_path / "nano" / "mine").mkdir(parents=True)
    (tmp_path / "nano" / "mine" / "text.jsonl").write_text('{"text": "our own"}\n')
    (tmp_path / "a.txt").write_text("theirs")
    found = find([tmp_path], "s", (*TEXT, *ROWS))
    assert [file.name for file in found.files] == ["a.txt"]
    assert found.reasons()["the base folder"] == 1


def test_a_whole_export_of_telegram_is_found_behind_its_contacts(tmp_path):
    contacts = [{"first_name": f"Friend {i}", "phone_number": "0" * 20} for i in range(2000)]
    export = {"about": "x", "contacts": {"list": contacts}, "chats": {"list": []}}
    put(tmp_path, "a.txt")
    put(tmp_path, "result.json", text=json.dumps(export))
    assert names(tmp_path)[0] == ["a.txt", "result.json"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(("form", "mark"), [(".csv", ";"), (".tsv", "\t")])
def test_tables_of_windows_are_found_in_a_folder(tmp_path, form, mark, encoding):
    put(tmp_path, "a.txt")
    for name, column in (("b", "Text"), ("c", "score")):
        table = f"{column}{mark}id\r\nOne{mark}1\r\n"
        (tmp_path / f"{name}{form}").write_bytes(table.encode(encoding))
    assert names(tmp_path)[0] == ["a.txt", f"b{form}"]
