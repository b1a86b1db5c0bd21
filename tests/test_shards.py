"""Token shards: the round trip, reuse, damage, interruption, and several processes."""

import json
import multiprocessing
import os
import resource

import numpy as np
import pytest

from nanochat.base import files
from nanochat.base.common import UserError
from nanochat.data import inventory
from nanochat.data.shards import Shards, prepare, prepare_conversations
from nanochat.data.sources import Source, parse_sources, parts


class Letters:
    """One token a character. Calls are counted, to see what is made again."""

    bos = 0

    def __init__(self, vocab_size=1000, fingerprint="letters"):
        self.vocab_size, self.fingerprint, self.texts = vocab_size, fingerprint, 0

    def encode_batch(self, texts, bos=False):
        self.texts += len(texts)
        return [[0] * bos + [min(ord(c), self.vocab_size - 1) for c in text] for text in texts]

    def render_conversation(self, conversation):
        self.texts += 1
        ids = [0, *map(ord, conversation["q"]), *map(ord, conversation["a"])]
        return ids, [0] * (1 + len(conversation["q"])) + [1] * len(conversation["a"])


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for f in range(3):
        rows = [{"text": f"Document {f} {i} " + "abcdefg"[: i % 7]} for i in range(400)]
        (folder / f"{f}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return parse_sources([f"stuff={folder}"])[0]


def texts(shards):
    return ["".join(map(chr, shards.tokens(i)[1:])) for i in range(len(shards))]


def test_round_trip(source, tmp_path):
    tokenizer = Letters()
    train, val = (
        prepare(source, split, tokenizer, tmp_path / "tokens") for split in ("train", "val")
    )
    assert len(train) + len(val) == 1200 and 0 < len(val) < 40
    assert not set(texts(train)) & set(texts(val))
    assert all(
        train.tokens(i)[0] == 0 and len(train.tokens(i)) == train.lengths[i]
        for i in range(len(train))
    )
    assert train.tokens(0).dtype == np.uint16 and train.mask(0) is None
    assert train.total == train.lengths.sum() == sum(map(len, texts(train))) + len(train)
    assert (train.bos, train.name) == (0, "stuff")


def test_reused_until_something_changes(source, tmp_path):
    tokenizer, root = Letters(), tmp_path / "tokens"
    first = prepare(source, "train", tokenizer, root)
    n = tokenizer.texts
    again = prepare(source, "train", tokenizer, root)
    assert tokenizer.texts == n and again.sha256 == first.sha256
    prepare(source, "train", Letters(fingerprint="other"), root)
    assert prepare(source, "train", tokenizer, root).sha256 == first.sha256
    os.utime(source.paths[0] / "0.jsonl", (1, 1))  # its content is the same
    assert prepare(source, "train", tokenizer, root).sha256 == first.sha256
    assert tokenizer.texts == n
    with open(source.paths[0] / "1.jsonl", "a") as f:
        f.write('\n{"text": "one more"}')
    assert len(prepare(source, "train", tokenizer, root)) == len(first) + 1


def test_many_parts_read_as_one_and_only_new_ones_are_made(source, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.data.sources.PART_BYTES", 1)
    tokenizer, root = Letters(), tmp_path / "tokens"
    split = prepare(source, "train", tokenizer, root)
    monkeypatch.setattr("nanochat.data.sources.PART_BYTES", 1 << 28)
    whole = prepare(source, "train", tokenizer, root)
    assert texts(split) == texts(whole)
    assert len([p for p in root.iterdir() if p.is_dir()]) == 4  # 3 parts and the whole
    monkeypatch.setattr("nanochat.data.sources.PART_BYTES", 1)
    (source.paths[0] / "9.jsonl").write_text('{"text": "a new file"}')
    n = tokenizer.texts
    assert texts(prepare(source, "train", tokenizer, root)) == [*texts(whole), "a new file"]
    assert tokenizer.texts == n + 1


def test_wide_vocabularies_get_wide_tokens(source, tmp_path):
    for vocab_size, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        shards = prepare(source, "val", Letters(vocab_size, str(vocab_size)), tmp_path / "tokens")
        assert shards.tokens(0).dtype == dtype


def test_conversations_keep_their_masks_and_order(tmp_path):
    tokenizer = Letters()
    rows = [{"q": "why", "a": "b" * n} for n in range(1, 9)]
    shards = prepare_conversations("chat", rows, tokenizer, tmp_path, identity="v1")
    assert [s[3:] for s in texts(shards)] == [r["a"] for r in rows]
    assert shards.mask(1).tolist() == [0, 0, 0, 0, 1, 1]
    n = tokenizer.texts
    prepare_conversations("chat", iter(()), tokenizer, tmp_path, identity="v1")
    assert tokenizer.texts == n
    assert len(prepare_conversations("chat", rows[:2], tokenizer, tmp_path, identity="v2")) == 2
    with pytest.raises(UserError, match="no conversations in empty"):
        prepare_conversations("empty", [], tokenizer, tmp_path, identity="none")


@pytest.mark.parametrize(
    "damage", ["truncate", "short offsets", "no meta", "half a meta", "no offsets"]
)
def test_a_damaged_shard_is_refused_and_made_again(source, tmp_path, damage, capsys):
    tokenizer, root = Letters(), tmp_path / "tokens"
    good = prepare(source, "train", tokenizer, root)
    (folder,) = root.glob("stuff-*")
    if damage == "truncate":
        os.truncate(folder / "tokens.bin", 100)
    elif damage == "short offsets":
        os.truncate(folder / "offsets.npy", os.path.getsize(folder / "offsets.npy") - 8)
    elif damage == "half a meta":
        os.truncate(folder / "meta.json", 20)
    else:
        (folder / {"no meta": "meta.json", "no offsets": "offsets.npy"}[damage]).unlink()
    with pytest.raises(UserError, match="damaged"):
        Shards("stuff", [folder])
    assert prepare(source, "train", tokenizer, root).sha256 == good.sha256
    assert "damaged" in capsys.readouterr().err


def flip(file, bit=0):
    """Change one bit in the middle of a file, with its size and time of change as before."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "offsets.npy", "meta.json"])
def test_a_flipped_bit_is_found_when_a_shard_is_opened(tmp_path, name, capsys):
    tokenizer = Letters()
    rows = [{"q": f"why {n}", "a": "because"} for n in range(50)]

    def made():
        return prepare_conversations("chat", rows, tokenizer, tmp_path, identity="v1")

    good, (folder,) = made().sha256, tmp_path.glob("chat-*")
    assert made().sha256 == good and tokenizer.texts == 50
    for bit in (0, 5):
        flip(folder / name, bit)
        with pytest.raises(UserError, match=r"the token shard .* is damaged .*: delete it and run"):
            Shards("chat", [folder])
        assert made().sha256 == good and tokenizer.texts == 50 * (2 if bit == 0 else 3)
        assert "tokenising again" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["another folder", "written over", "renamed over"])
def test_text_of_the_same_name_size_and_time_is_told_apart(tmp_path, how):
    """Parts of one file, archives with fixed times and cp -p give many such files."""
    for folder, word in (("a", "stone"), ("b", "comet")):
        (tmp_path / folder).mkdir()
        rows = [json.dumps({"text": f"{word} {i}"}) for i in range(100, 300)]
        (tmp_path / folder / "part.jsonl").write_text("\n".join(rows))
        os.utime(tmp_path / folder / "part.jsonl", (1_600_000_000, 1_600_000_000))
    first = texts(prepare(source_of(tmp_path / "a"), "train", Letters(), tmp_path / "tokens"))
    if how == "written over":
        (tmp_path / "a" / "part.jsonl").write_text((tmp_path / "b" / "part.jsonl").read_text())
        os.utime(tmp_path / "a" / "part.jsonl", (1_600_000_000, 1_600_000_000))
    elif how == "renamed over":
        os.replace(tmp_path / "b" / "part.jsonl", tmp_path / "a" / "part.jsonl")
    folder = tmp_path / ("b" if how == "another folder" else "a")
    second = texts(prepare(source_of(folder), "train", Letters(), tmp_path / "tokens"))
    assert {t.split()[0] for t in first} == {"stone"} and {t.split()[0] for t in second} == {
        "comet"
    }


def source_of(folder):
    return parse_sources([f"mine={folder}"])[0]


@pytest.mark.parametrize("how", ["is changed", "is deleted"])
def test_text_that_changes_while_it_is_read_is_refused(source, tmp_path, how):
    class Meanwhile(Letters):
        def encode_batch(self, texts, bos=False):
            path = source.paths[0] / "2.jsonl"
            if how == "is deleted":
                path.unlink(missing_ok=True)
            else:
                with open(path, "a") as f:
                    f.write('\n{"text": "one more"}')
            return super().encode_batch(texts, bos)

    with pytest.raises(UserError, match="stuff changed while it was read: run again"):
        prepare(source, "train", Meanwhile(), tmp_path / "tokens")
    assert not list((tmp_path / "tokens").glob("stuff-*"))


def test_a_file_that_is_deleted_before_it_is_read_is_named(source, tmp_path, monkeypatch):
    def parts_and_no_file(*args):
        found = parts(*args)
        (source.paths[0] / "2.jsonl").unlink()
        return found

    monkeypatch.setattr("nanochat.data.shards.parts", parts_and_no_file)
    with pytest.raises(UserError, match=r"cannot read .*2\.jsonl"):
        prepare(source, "train", Letters(), tmp_path / "tokens")


def test_old_files_are_hashed_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr(files.Hashes, "RECENT", -1)  # as though everything were old
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    counted = []
    real = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: counted.append(path) or real(path))
    for _ in range(3):
        prepare(source, "train", Letters(), tmp_path / "tokens")
    made = ["offsets.npy", "tokens.bin"]
    assert sorted(p.name for p in counted) == ["0.jsonl", "1.jsonl", "2.jsonl", *made]
    (tmp_path / "tokens" / ".hashes.json").write_text('{"1:2": [3], "x": "damaged"')
    prepare(source, "train", Letters(), tmp_path / "tokens")
    assert len(counted) > 5


def test_an_interrupted_build_leaves_nothing_and_a_killed_one_is_swept(source, tmp_path):
    root = tmp_path / "tokens"

    class Interrupted(Letters):
        def encode_batch(self, texts, bos=False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, "train", Interrupted(), root)
    assert not [p for p in root.iterdir() if p.is_dir()]
    (root / ".build-stuff-train-0-99999").mkdir()
    prepare(source, "train", Letters(), root)
    assert len(list(root.glob(".build-*"))) == 0


def test_a_write_that_fails_is_an_error_and_leaves_nothing(source, tmp_path):
    """The limit on the size of a file stands for a full disk."""
    inventory.take([source])  # kept, so that the tokens are what is written first
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write tokens .*File too large.*free some"):
            prepare(source, "train", Letters(), tmp_path / "tokens")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [p for p in (tmp_path / "tokens").iterdir() if p.is_dir()]


def test_a_bad_file_is_an_error_and_leaves_no_shard(source, tmp_path):
    (source.paths[0] / "2.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(UserError, match=r"2\.jsonl, line 2: invalid"):
        prepare(source, "train", Letters(), tmp_path / "tokens")


def _prepare(source, root, results):
    tokenizer = Letters()
    shards = prepare(source, "train", tokenizer, root)
    results.put((tokenizer.texts, shards.sha256))


def test_ranks_share_the_work_of_one(source, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_prepare, args=(source, tmp_path / "tokens", results))
        for _ in range(2)
    ]
    for process in ranks:
        process.start()
    (a, hash_a), (b, hash_b) = results.get(timeout=600), results.get(timeout=600)
    for process in ranks:
        process.join(60)
    assert hash_a == hash_b and min(a, b) == 0 < max(a, b)


def test_two_tokenizers_never_mix(source, tmp_path):
    prepare(source, "train", Letters(), tmp_path)
    prepare(source, "train", Letters(fingerprint="other"), tmp_path)
    with pytest.raises(UserError, match="different tokenizers"):
        Shards("stuff", sorted(tmp_path.glob("stuff-*")))


def test_a_split_without_text(tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(UserError, match="fewer than two different documents"):
        prepare(Source("a", (tmp_path / "a.txt",)), "val", Letters(), tmp_path / "tokens")
