"""The inventory: counts that are right, duplicates that are removed, and nothing that is lost silently."""

import errno
import json
import os
import random
import zipfile
from itertools import chain
from pathlib import Path

import pytest

from nanochat.base.common import UserError
from nanochat.data import inventory
from nanochat.data.shards import prepare
from nanochat.data.sources import mixed, parse_sources

WORDS = [f"word{i}" for i in range(2000)]


class Letters:
    fingerprint, bos, vocab_size = "letters", 0, 1 << 21

    def encode_batch(self, texts, bos=False):
        return [[0] * bos + [ord(c) for c in text] for text in texts]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def prose(seed, words=200):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def jaccard(a, b):
    """The share of 5-word sequences that two texts have in common, exactly."""
    first, second = (
        {tuple(t.split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in (a, b)
    )
    return len(first & second) / len(first | second)


def changed(text, places):
    words = text.split()
    for place in places:
        words[place] = "changed"
    return " ".join(words)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.md").write_text(prose(i))
    return folder


def take(*paths, me=None):
    return inventory.take(parse_sources([str(path) for path in paths]), me)


def texts(folder):
    sources = parse_sources([str(folder)])
    return [list(mixed(sources, split)) for split in ("train", "val")]


def test_counts_and_what_is_held_out(folder, monkeypatch):
    (folder / "a.png").write_bytes(b"x")
    (folder / "empty.txt").write_bytes(b"")
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr("x/y.txt", prose(100))
        archive.writestr("x/y.png", "x")
    (source,) = take(folder)
    assert source.read == {".md": 30, ".txt": 1, ".zip": 1}
    assert source.documents == 31
    assert source.characters == sum(len(prose(i)) for i in (*range(30), 100))
    names = {os.path.relpath(name, folder): reason for reason, name in source.skipped}
    assert names == {
        "a.png": ".png files not read",
        "empty.txt": "it has no text",
        "z.zip/x/y.png": ".png files not read",
    }
    train, val = texts(folder)
    assert source.held_out == (len(val), sum(map(len, val))) and len(val) + len(train) == 31
    shards = prepare(parse_sources([str(folder)])[0], "train", Letters())
    assert len(shards) == len(train)
    again = take(folder)
    assert vars(again[0]) == json.loads(json.dumps(vars(source))), "it is kept"
    monkeypatch.setattr(inventory, "_survey", None)
    assert take(folder) == again


def test_equal_and_nearly_equal_documents_are_removed(folder):
    original = prose(0)
    near = changed(original, [50])
    other = changed(original, range(0, 200, 8))
    assert jaccard(original, near) > 0.9 and jaccard(original, other) < 0.5
    for name, text in (("x1", original), ("x2", near), ("x3", other), ("x4", near)):
        (folder / f"{name}.md").write_text(text)
    (source,) = take(folder)
    assert (source.documents, source.exact, source.near) == (34, 2, 1)
    assert source.removed_characters == len(original) + 2 * len(near)
    assert sorted([*chain(*texts(folder))]) == sorted([*map(prose, range(30)), other])


def test_equal_documents_are_removed_from_all_parts_of_a_source(folder, monkeypatch):
    with zipfile.ZipFile(folder / "0.zip", "w") as archive:  # it is read first
        archive.writestr("x.txt", prose(2))
    (folder / "x.md").write_text(prose(0))
    (folder / "y.jsonl").write_text("\n".join([json.dumps({"text": prose(50)})] * 2))
    (folder / "z.md").write_text(prose(50))
    monkeypatch.setattr("nanochat.data.sources.PART_BYTES", 1)
    assert sorted([*chain(*texts(folder))]) == sorted(map(prose, [*range(30), 50]))


def test_short_documents_are_removed_only_if_they_are_equal(tmp_path):
    rows = [f"the sum of {i} and 1 is {i + 1}" for i in range(100)] * 2
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (source,) = take(path)
    assert (source.documents, source.exact, source.near) == (200, 100, 0)
    assert sorted([*chain(*texts(path))]) == sorted(rows[:100])


def test_a_new_file_is_noticed(folder):
    assert take(folder)[0].documents == 30
    (folder / "new.md").write_text(prose(99))
    assert take(folder)[0].documents == 31


def test_the_first_ten_of_each_reason_are_shown_and_all_are_kept(folder):
    for i in range(25):
        (folder / f"p{i:02d}.png").write_bytes(b"x")
    (found,) = take(folder)
    (line,) = (line for line in found.lines() if ".png" in line)
    assert "skipped: 25, .png files not read: " in line and ", and 15 more" in line
    assert line.count(".png") == 11
    kept = json.loads(Path(found.file).read_text())
    assert len(kept["skipped"]) == 25


def test_conversations_are_counted_and_their_problems_named(folder):
    talk = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    rows = [json.dumps(talk)] * 5 + ['{"messages": [{"role": "robot", "content": "x"}]}', "{"]
    (folder / "talk.jsonl").write_text("\n".join(rows))
    (folder / "qa.csv").write_text("question,answer\nQ,A\nR,B\n")
    (folder / "chat.txt").write_text("User: Hi\nAssistant: Hello\n" * 20)
    (source,) = take(folder)
    counts = {os.path.basename(name): c for name, c in source.conversations.items()}
    assert counts == {
        "talk.jsonl": {"messages": 5},
        "qa.csv": {"question and answer": 2},
        "chat.txt": {"chats": 1},
    }
    assert len(source.conversation_problems) == 2 and "line 6" in source.conversation_problems[0]
    assert not source.skipped and source.documents == 31, "a chat is text too"
    assert "conversations: 5 messages, 2 question and answer, 1 chats in 3 files" in "\n".join(
        source.lines()
    )


def test_a_chat_whose_assistant_is_named(folder):
    (folder / "chat.txt").write_text("1/2/20, 9:00 - Ada: Hi\n1/2/20, 9:01 - Bob: Yes\n" * 9)
    (source,) = take(folder, me="Bob")
    assert list(source.conversations.values()) == [{"chats": 1}]
    (source,) = take(folder)
    assert not source.conversations
    assert any('--me "Ada"' in problem for problem in source.conversation_problems)


def test_conversations_alone(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"prompt": "Q", "response": "A"}\n' * 3)
    (found,) = take(path)
    assert found.documents == 0 and list(found.conversations.values()) == [
        {"prompt and response": 3}
    ]
    with pytest.raises(UserError, match="holds conversations: train on them with"):
        texts(path)


def test_rows_whose_field_is_named_are_text_alone(tmp_path):
    rows = [{"prompt": "Q", "response": "A", "post": {"body": prose(i)}} for i in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (both,) = take(path)
    assert list(both.conversations.values()) == [{"prompt and response": 9}]
    (named,) = take(f"{path}#post.body")
    assert named.documents == 9 and not named.conversations and not named.conversation_problems


def test_a_file_that_is_deleted_meanwhile_is_named(folder, monkeypatch):
    real = inventory.find

    def find_and_delete(*args):
        found = real(*args)
        (folder / "07.md").unlink()
        return found

    monkeypatch.setattr(inventory, "find", find_and_delete)
    with pytest.raises(UserError, match=r"cannot read .*07\.md"):
        take(folder)


def test_what_is_long_odd_and_repeated(folder):
    (folder / "long.md").write_text(prose(500, 600))
    (folder / "odd.md").write_text("0101 #### " * 60)
    for i in range(8):
        (folder / f"page{i}.md").write_text(f"Cookie settings of this page\n{prose(900 + i)}")
    (source,) = take(folder)
    assert "long.md" in source.longest[0][1] and source.longest[0][0] == len(prose(500, 600))
    assert "odd.md" in source.oddest[0][1] and source.oddest[0][0] == 0
    assert source.repeated_lines == [(8, "Cookie settings of this page")]


def test_languages(tmp_path):
    pytest.importorskip("py3langid", reason="needs the extra documents")
    said = {
        "en": "It was a quiet day, and nobody said a word about the boat that was gone. ",
        "de": "Es war ein ruhiger Tag, und niemand sprach über das Boot, das fort war. ",
        "ru": "Это был тихий день, и никто не говорил о лодке, которая ушла утром. ",
    }
    for code, text in said.items():
        (tmp_path / f"{code}.txt").write_text(text * 3)
    assert take(tmp_path)[0].languages == dict.fromkeys(said, 1)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EFBIG, errno.EACCES])
def test_without_temporary_files_no_language_is_guessed(folder, monkeypatch, capsys, fault):
    """The library unpacks its model into one; a full disk must not end a training for it."""
    library = pytest.importorskip("py3langid", reason="needs the extra documents")

    def classify(text):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(library, "classify", classify)
    assert take(folder)[0].languages == {}
    assert (
        f"languages are not guessed, because temporary files cannot be written ([Errno {fault}]"
        in (capsys.readouterr().err)
    )


def test_bad_rows_and_guesses_are_said(folder):
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    pytest.importorskip("charset_normalizer", reason="needs the extra documents")
    (folder / "old.txt").write_bytes(
        ("Größe und Straße, müde Männer hörten früh auf. " * 3).encode("cp1252")
    )
    lines = "\n".join(inventory.as_lines(take(folder)))
    assert "rows that cannot be used: 1: " in lines and "rows.jsonl, line 2" in lines
    assert "files read as CP1252 (guessed): 1" in lines
    with pytest.raises(UserError, match="--skip_bad_rows 1"):
        texts(folder)


def test_of_a_large_source_the_first_part_is_looked_at(folder, monkeypatch):
    monkeypatch.setattr(inventory, "LIMIT", 10_000)
    (source,) = take(folder)
    assert not source.complete and 10_000 <= source.characters < 12_000
    assert "only the first 10k characters were read" in source.lines()[0]


def test_files_that_may_not_be_read_and_loops_of_links(folder, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "07.md" not in str(path) and real(path, mode)
    )
    (folder / "loop").symlink_to(folder)
    (folder / "self.md").symlink_to("self.md")
    (source,) = take(folder)
    assert source.documents == 29
    assert {reason: os.path.basename(name) for reason, name in source.skipped} == {
        "files that you have no permission to read": "07.md",
        "links to folders that are read already": "loop",
        "broken links": "self.md",
    }


@pytest.mark.parametrize("command", ["tok_train", "tok_data"])
def test_a_dry_run_stops_after_it(folder, command, capsys):
    import importlib

    done = importlib.import_module(f"nanochat.commands.{command}").main(
        [f"--data={folder}", "--dry_run"]
    )
    assert done == {} and "corpus: 30 documents" in capsys.readouterr().out
    assert not (folder.parent / "base" / "tokenizer").exists()
