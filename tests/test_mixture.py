"""
Mixtures of conversations: their names on the command line, slices and epochs, the validation split,
rendering only once, the defaults of the stages.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny

from nanochat.base import hardware
from nanochat.base.common import UserError
from nanochat.commands import base_train, chat_sft, mid_train
from nanochat.data import shapes
from nanochat.data.sources import only_tinyworld
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.tasks import data, mixture
from nanochat.model import checkpoint


def conversation(i):
    return {
        "messages": [
            {"role": "user", "content": f"Say {i}."},
            {"role": "assistant", "content": f"{i}!"},
        ],
        "id": i,
    }


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(conversation(i)) for i in range(400)) + "\n\n")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["How many r are in strawberry? Say 12! Hello, I am Ada."], 300)


def texts(shards, tokenizer):
    return [tokenizer.decode(shards.tokens(i)) for i in range(len(shards))]


def test_specs(file):
    sources = mixture.parse(
        [
            "tinyworld@500:2",
            f"mine={file}:1",
            "more=GSM8K:.5",
            f"less={file}@30:3",
            "spellingbee@7:1",
        ]
    )
    assert [(s.name, s.kind, s.count, s.weight) for s in sources] == [
        ("tinyworld", "tinyworld", 500, 2.0),
        ("mine", "files", None, 1.0),
        ("more", "gsm8k", None, 0.5),
        ("less", "files", 30, 3.0),
        ("spellingbee", "spellingbee", 7, 1.0),
    ]
    assert sources[1].paths == sources[3].paths == (file,)
    for bad, says in {
        ("tinyworld@many",): "number of conversations",
        ("gsm8k@0",): "number of conversations",
        (f"{file}@0",): "number of conversations",
        ("tinyworld@" + "9" * 30,): "below a billion",
        ("tinyworld@²",): "number of conversations",
        ("tinyworld:" + "9" * 400,): "weight inf",
        ("mmlu:0",): "weight above 0",
        ("fineweb-edu",): "holds text",
        ("nonsense",): "spellingbee",
        ("gsm8k", "gsm8k"): "two data sources",
        ("gsm8k:1", "mmlu"): "mmlu has no weight",
        (): "names no conversations",
    }.items():
        with pytest.raises(UserError, match=says):
            mixture.parse(bad)


def test_a_stage_s_default_follows_what_the_base_was_trained_on():
    for stage in ("mid", "sft"):
        for alone in (["tinyworld"], ["a=tinyworld@5:1", "tinyworld:2"]):
            assert [s.kind for s in mixture.parse(mixture.default(stage, alone))] == ["tinyworld"]
        for other in (["tinyworld", "books=b:1"], ["tinyworlds"], ["fineweb-edu"]):
            assert mixture.parse(mixture.default(stage, other))[0].kind != "tinyworld"
    assert not only_tinyworld([]), "text that is not yet chosen"
    kinds = {
        stage: {s.kind for s in mixture.parse(mixture.default(stage, ["wikipedia=x"]))}
        for stage in ("mid", "sft")
    }
    assert kinds["mid"] == {"smoltalk", "mmlu", "gsm8k", "spellingbee", "identity"}
    assert kinds["sft"] == {
        "arc-easy",
        "arc-challenge",
        "smoltalk",
        "gsm8k",
        "spellingbee",
        "identity",
    }


def test_own_conversations_are_divided_by_content(file):
    read = lambda: data.read_items(shapes.conversation, [file])  # noqa: E731
    train, val = (list(mixture.split_of(read, split)) for split in ("train", "val"))
    assert len(train) + len(val) == 400 and 8 <= len(val) <= 30
    file.write_text(
        file.read_text()
        + "\n".join(json.dumps(conversation(i)) for i in (*range(400, 420), 3, 3))
        + "\n"
    )
    assert not {c["id"] for c in mixture.split_of(read, "train")} & {c["id"] for c in val}, (
        "adding some moves none across"
    )
    for n, held in ((2, 1), (20, 2), (3, 1)):
        file.write_text("\n".join(json.dumps(conversation(i)) for i in range(n)))
        assert len(list(mixture.split_of(read, "val"))) == held, "a small file has some too"
    file.write_text(json.dumps(conversation(1)) + "\n" + json.dumps(conversation(1)))
    with pytest.raises(UserError, match="fewer than two different conversations"):
        list(mixture.split_of(read, "val"))
    pair = {"prompt": "Question?", "response": "Answer."}
    file.write_text("\n".join(map(json.dumps, (pair, conversation(1)))))
    assert [c["messages"][1]["content"] for c in read()] == ["Answer.", "1!"]
    for bad, says in (
        ("{", "invalid JSON"),
        ('{"text": "x"}', '"messages"'),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role"),
        ('{"prompt": "x"}', "response"),
        ('"x"', "expected an object"),
    ):
        file.write_text(f"{json.dumps(pair)}\n{bad}\n")
        with pytest.raises(UserError, match=f"mine.jsonl, line 2: .*{says}"):
            list(read())


def test_slices_and_epochs(file, tokenizer):
    def texts_of(spec, split="train", seed=0):
        ((shards, _),) = mixture.shards([spec], split, tokenizer, seed)
        return texts(shards, tokenizer)

    whole, val = texts_of(f"mine={file}"), texts_of(f"mine={file}", "val")
    assert len(whole) + len(val) == 400 and not set(whole) & set(val)
    assert len(texts_of(f"mine={file}@50")) == 50 and set(texts_of(f"mine={file}@50")) < set(whole)
    assert (
        texts_of(f"mine={file}@50", seed=1) != texts_of(f"mine={file}@50")
        and texts_of(f"mine={file}@50", "val") == val
    )
    twice = Counter(texts_of(f"mine={file}@{2 * len(whole)}"))
    assert set(twice) == set(whole) and set(twice.values()) == {2}


def test_what_was_rendered_is_not_rendered_again(file, tokenizer, monkeypatch):
    specs = [f"mine={file}@9", "spellingbee@20", "identity@20", "tinyworld@12"]
    first = [s.sha256 for s, _ in mixture.shards(specs, "train", tokenizer, name="Ada")]

    def refuse(*_):
        raise AssertionError("rendered again")

    with monkeypatch.context() as m:
        m.setattr(data, "read", refuse)
        m.setattr(Tokenizer, "render_conversation", refuse)
        assert [s.sha256 for s, _ in mixture.shards(specs, "train", tokenizer, name="Ada")] == first
        for changed in ({"seed": 1}, {"name": "Bea"}):
            with pytest.raises(AssertionError):
                mixture.shards(specs, "train", tokenizer, **{"name": "Ada", **changed})
    ((named, _),) = mixture.shards(["identity@40"], "train", tokenizer, name="Bea")
    assert "Bea" in "".join(texts(named, tokenizer)) and "nanochat." not in "".join(
        texts(named, tokenizer)
    )
    file.write_text(file.read_text().replace("!", "?"))
    ((again, _),) = mixture.shards(specs[:1], "train", tokenizer)
    assert again.sha256 != first[0] and "?" in texts(again, tokenizer)[0], (
        "another content is another source"
    )


def test_the_default_stages_train_on_data_of_a_folder(tmp_path, monkeypatch, capsys):
    from test_tasks import ARC, GSM8K, MMLU, lines

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(mixture, "COUNTS", dict.fromkeys(mixture.COUNTS, (60, 10)))
    monkeypatch.setattr(
        hardware, "measured_peak", lambda *_: 1e12
    )  # measuring takes longer than all that is tested here
    flags = tiny.workplace(tmp_path)
    rows = {
        "smoltalk/train.jsonl": lines(map(conversation, range(30))),
        "gsm8k/train.jsonl": lines(GSM8K),
        "mmlu/dev/x.csv": MMLU,
        "arc_easy/train.jsonl": lines(ARC),
        "ARC-Challenge/train.jsonl": lines(ARC),
    }
    for name, text in rows.items():
        (tmp_path / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tasks" / name).write_text(text)
    base_train.main([*flags, "--num_iterations=1"])
    monkeypatch.setenv("HOME", str(tmp_path))
    own = [
        "--device_type=cpu",
        "--dtype=float32",
        "--eval_tokens=2000",
        "--task_dir=~/tasks",
        "--name=Ada",
    ]
    mid_train.main([*own, "--num_iterations=1"])
    chat_sft.main([*own, "--num_iterations=1", "--conversations_per_step=4"])
    for stage in ("mid", "sft"):
        kept = checkpoint.locate(stage).meta["knobs"]
        assert tuple(kept["data"]) == mixture.DEFAULTS[stage][0] and kept["name"] == "Ada"
    assert f"conversations: {' '.join(mixture.DEFAULTS['mid'][0])}" in capsys.readouterr().out
    assert {
        p.name.split("-conversations-")[0]
        for p in Path(tmp_path / "tokens").glob("*-conversations-*")
    } == {
        "smoltalk",
        "gsm8k",
        "mmlu",
        "arc-easy",
        "arc-challenge",
        "spellingbee",
        "identity",
    }


def test_dialogs_of_real_people(tmp_path, monkeypatch):
    from test_tasks import SHARED

    dialogs = sorted((SHARED / "dialog").glob("*_small.jsonl")) + sorted(
        (SHARED / "dialog").glob("topical_val.jsonl")
    )
    if not dialogs:
        pytest.skip("the folder with real data is not here")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer = Tokenizer.train(["plain"], 265)
    for shards, _ in mixture.shards(
        [f"d{i}={path}@40" for i, path in enumerate(dialogs)], "train", tokenizer
    ):
        masks = [shards.mask(i) for i in range(40)]
        assert len(shards) == 40 and all(m is not None and m.any() for m in masks)


def test_a_folder_of_chats_needs_a_person(tmp_path, tokenizer):
    for name in ("one", "two"):
        lines = (f"1/2/20, 9:{i:02d} - {'Ada' if i % 2 else 'Bob'}: {name} {i}" for i in range(40))
        gap = ("1/3/20, 9:00 - Bob: Hi", "1/3/20, 9:01 - Ada: Yes", f"1/4/20, 9:00 - Bob: {name}")
        (tmp_path / f"{name}.txt").write_text("\n".join((*lines, *gap, "1/4/20, 9:02 - Ada: No")))
    (tmp_path / "README.md").write_text("Read me.")
    spec = [f"chat={tmp_path}"]
    with pytest.raises(
        UserError, match=r"no conversations in 3 files; .*one\.txt: it is a chat of Ada, Bob"
    ):
        mixture.shards(spec, "train", tokenizer)
    ((shards, _),) = mixture.shards(spec, "train", tokenizer, me="Ada")
    assert len(shards) == 5 and shards.notes.total() == 1, "one of six is for validation"
