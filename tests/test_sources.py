"""Sources: specifications, the files they name, the validation split, and mixtures."""

import gzip
import json
import random
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.base.common import UserError
from nanochat.data import inventory
from nanochat.data.shards import prepare
from nanochat.data.sources import (
    SHARD_SETS,
    ShardSet,
    Source,
    files,
    mixed,
    parse_sources,
    parts,
    training_sources,
)
from nanochat.data.split import Division, pieces, place


def source(path, field=None, name="s"):
    return Source(name, (path,), None, field)


def documents(s, split):
    return mixed([s], split)


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
            (parsed,) = parse_sources([spec])
            assert str(parsed.paths[0]) == name, spec
            assert parsed.weight == (0.5 if spec != name and ":0.5" in spec else None)
            assert parsed.field == ("body" if "#body" in spec else None)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no data source given"),
        (["nowhere/at/all"], "nowhere/at/all does not exist"),
        (["n=nowhere:0.3"], "nowhere does not exist;"),
        (["a=.:0", "b=.:1"], "weight 0"),
        (["a=.:1", "b=."], "b has no weight"),
        (["a=.", "a=."], "two data sources are called a"),
        (["tinyworld@0"], "must have a size above 0"),
        (["tinyworld@1000001"], "must have a size above 0"),
        (["tinyworld@" + "9" * 400], "must have a size above 0"),
        (["a=.:" + "9" * 400], "weight inf"),
        (["~nobodyatall/x"], "no home folder ~nobodyatall"),
        (["\0"], "does not exist"),
    ],
)
def test_bad_specifications(specs, message):
    with pytest.raises(UserError, match=message):
        parse_sources(specs)


# --- files


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
    found = [str(path.relative_to(tmp_path)) for path in files(source(tmp_path))]
    assert found == ["README.md", "a.txt", "b/1.txt", "b/2.txt", "c/d/e.jsonl"]


def test_sources_without_text(tmp_path):
    """Trap 27: an empty folder, one without text files, empty files, a file of another kind."""
    with pytest.raises(UserError, match=r"no file to read \(\.txt, \.html, .*, \.jsonl, "):
        files(source(tmp_path))
    (tmp_path / "a.png").write_bytes(b"PNG")
    with pytest.raises(UserError, match=r"no file to read .* only 1 \.png files not read"):
        files(source(tmp_path))
    with pytest.raises(UserError, match=r"no file to read .* at .*a\.png"):
        files(source(tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"no file to read .* at .*gone\.txt"):
        files(source(tmp_path / "gone.txt"))
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UserError, match="fewer than two different documents"):
        parts(source(tmp_path), "train")


@pytest.mark.parametrize(("name", "again"), [("a.eml", True), ("a.zip", True), ("a.txt", False)])
def test_what_a_new_package_may_read_is_read_again(tmp_path, monkeypatch, name, again):
    jsonl(tmp_path / "rows.jsonl", [{"text": f"document {i}"} for i in range(30)])
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("b.eml", "Subject: Hello\n\nGood day.")
    if not name.endswith("zip"):
        (tmp_path / name).write_text("Subject: Hello\n\nGood day.")
    identities = []
    for packages in ([], ["selectolax"]):
        monkeypatch.setattr(inventory, "installed", lambda packages=packages: packages)
        (part,) = parts(source(tmp_path), "train")
        identities.append(part.identity)
    assert (identities[0] != identities[1]) == again


def test_a_compressed_file_of_another_format_is_tokenised_again(tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "VALIDATION_SHARE", 0.05)  # so that both are divided alike
    rows = [json.dumps({"text": f"document {i}<|endoftext|>"}) for i in range(600)]
    found = []
    for name in ("dump.txt.gz", "dump.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
        shards = prepare(source(tmp_path / name), "train", Letters(), tmp_path / "tokens")
        found.append(["".join(map(chr, shards.tokens(i)[1:])) for i in range(len(shards))])
    assert any("{" in text for text in found[0]) and not any("{" in text for text in found[1])


def test_a_file_of_two_sources_is_named(tmp_path, capsys):
    diary = tmp_path / "notes" / "diary"
    diary.mkdir(parents=True)
    other = jsonl(tmp_path / "notes" / "a.jsonl", [{"text": "A note."}])
    file = jsonl(diary / "a.jsonl", [{"text": "A day.", "title": "Monday"}])
    training_sources([f"diary={diary}", f"rest={other}"])
    training_sources([f"titles={file}#title", f"texts={file}#text"])
    assert capsys.readouterr().err == ""
    training_sources([f"diary={diary}", f"all={other.parent}"])
    said = capsys.readouterr().err
    assert f"the data sources diary and all both read {file}" in said and said.count("\n") == 1


# --- the validation split


def splits(s):
    return [list(documents(s, split)) for split in ("train", "val")]


def test_about_one_percent_and_all_of_both(tmp_path):
    rows = [f"document {i}" for i in range(5000)]
    train, val = splits(source(jsonl(tmp_path / "a.jsonl", [{"text": r} for r in rows])))
    assert sorted(train + val) == sorted(rows) and 25 < len(val) < 75


def test_membership_is_by_content(tmp_path):
    """Added, renamed, reordered or converted files move no document; copies are removed."""
    rows = [f"document {i}" for i in range(2000)]
    jsonl(tmp_path / "m.jsonl", [{"text": r} for r in rows])
    _, val = splits(source(tmp_path))
    jsonl(tmp_path / "a.jsonl", [{"text": f"other {i}"} for i in range(1000)])
    (tmp_path / "m.jsonl").rename(tmp_path / "z.jsonl")
    random.Random(0).shuffle(rows)
    pq.write_table(pa.table({"text": rows}), tmp_path / "copy.parquet")
    train, larger = splits(source(tmp_path))
    assert set(val) == {t for t in larger if t.startswith("document")} and not set(train) & set(
        larger
    )
    assert all(larger.count(t) == 1 for t in val), "the copy is removed"


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


def test_a_long_document_is_divided_without_loss():
    text = "x " * 3000 + " " * 2000 + "".join(f"line {i}\n" for i in range(400)) + "\n" * 900
    parts = list(pieces(text, 500))
    assert "".join(parts) == text and all(part.strip() or len(part) <= 500 for part in parts)
    assert parts[-1].strip(), "what is blank at the end belongs to the last piece"
    divided = Division(sorted(map(place, parts))[4], 500)
    held = [part.strip("\n") for part in parts if place(part) <= divided.share and part.strip()]
    assert list(divided.texts(text, "val")) == held and len(held) >= 3
    train = "".join(divided.texts(text, "train"))
    assert not any(part in train for part in held)
    total = sum(map(len, held)) + len(train)
    assert len(text) - total < 100 + 900, "only line breaks at the ends are lost"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setitem(SHARD_SETS, "climbmix", ShardSet("karpathy/climbmix-400b-shuffle", last=9))
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

    def encode_batch(self, texts, bos=False):
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
        UserError,
        match=r"train split .* has no shard .*python -m nanochat\.dataset -n 15 --set climbmix",
    ):
        list(documents(shards(9), "train"))
    (shards(9).paths[0] / "shard_00009.parquet").unlink()
    with pytest.raises(UserError, match=r"val split .* has no shard .*shard_00009\.parquet is val"):
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
    usual, large = (
        list(parts(source, "val")[0].documents())
        for source in parse_sources(["tinyworld", "large=tinyworld@90"])
    )
    assert usual == large, "bits per byte of both can be compared"
    assert sum(len(t.encode()) for t in usual) == pytest.approx(400_000, rel=0.01)
