"""tok_train, tok_eval and tok_data, as they are called."""

import json
import threading

import pytest
from test_tokenizer import texts

from nanochat.base.common import UserError
from nanochat.data.tokenizer import Tokenizer


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "made"))
    rows = [json.dumps({"text": f"{i} {text}"}) for i, text in enumerate(texts(200))]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return str(tmp_path / "corpus.jsonl")


def test_tok_train_saves_and_moves_a_different_tokenizer_aside(corpus, tmp_path, capsys):
    from nanochat.commands import tok_train

    first = tok_train.main(["--vocab_size=400", f"--data=mine={corpus}", "--max_chars=2000000000"])
    assert (
        first["vocab_size"] == 400
        and first["documents"] > 150
        and 1 < first["bytes_per_token"] < 10
    )
    assert Tokenizer.load().fingerprint == first["fingerprint"]
    again = tok_train.main(["--vocab-size", "400", "--data", f"mine={corpus}"])
    assert again["fingerprint"] == first["fingerprint"]
    assert "different tokenizer" not in capsys.readouterr().err
    second = tok_train.main(["--vocab_size=401", "--data", f"mine={corpus}"])
    assert "different tokenizer" in capsys.readouterr().err
    assert Tokenizer.load().fingerprint == second["fingerprint"] != first["fingerprint"]
    assert (
        Tokenizer.load(tmp_path / "made" / f"tokenizer_{first['fingerprint'][:8]}").fingerprint
        == first["fingerprint"]
    )


@pytest.mark.parametrize("done", [[], ["tokenizer"]])
def test_a_chain_trains_a_tokenizer_that_is_gone_again(tmp_path, monkeypatch, done):
    """The step is not done if an interruption ended an earlier attempt to train it again."""
    from nanochat.commands import tok_train
    from nanochat.train.chain import Chain, Diary

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    diary = Diary("mine", "m")
    diary.notes, diary.done = {"fingerprint": "0" * 64}, done
    tok_train.in_chain(Chain(diary), lambda: {"fingerprint": "1" * 64})
    assert (diary.done, diary.notes) == (["tokenizer"], {"fingerprint": "1" * 64})


def test_pretraining_says_that_the_tokenizer_was_trained_on_other_text(corpus, tmp_path, capsys):
    from nanochat.commands import base_train, tok_train

    trained = tok_train.main(["--vocab_size=400", "--data", f"mine={corpus}"])
    assert Tokenizer.load().bytes_per_token == trained["bytes_per_token"]
    rows = [json.dumps({"text": f"{n * n:b} {'QWXZ' * (n % 7)} ~{n}~"}) for n in range(100)]
    (tmp_path / "other.jsonl").write_text("\n".join(rows), encoding="utf-8")
    size = "--depth=1 --model_dim=16 --head_dim=8 --sequence_len=32 --total_batch_size=64"
    run = (
        f"{size} --num_iterations=1 --eval_every=0 --eval_tokens=64 --sample_every=0 --compile=off"
    )
    told = {}
    for name in ("corpus", "other"):
        data = f"mine={tmp_path / name}.jsonl"
        base_train.main([*run.split(), f"--data={data}", f"--model_tag={name}"])
        told[name] = capsys.readouterr().err
    assert "a token spells 1." in told["other"] and "tok_train" in told["other"]
    assert "a token spells" not in told["corpus"]


def test_tok_train_reads_no_more_than_asked(corpus):
    from nanochat.commands import tok_train

    done = tok_train.main(
        ["--vocab_size=300", "--data", corpus, "--max_chars=1000", "--doc_cap=90"]
    )
    assert done["chars"] == 1000 and done["documents"] == 12
    with pytest.raises(UserError, match="265"):
        tok_train.main(["--vocab_size=200", "--data", corpus])


@pytest.mark.parametrize("trouble", ["offline", "silent", "none"])
def test_tok_eval(corpus, capsys, monkeypatch, trouble):
    import tiktoken

    from nanochat.commands import tok_eval, tok_train

    arrives = threading.Event()

    def get_encoding(name):
        if trouble == "offline":
            raise ConnectionError("a long story\nabout proxies")
        if trouble == "silent":
            arrives.wait(600)
        return tiktoken.Encoding(
            name,
            pat_str=".",
            mergeable_ranks={bytes([b]): b for b in range(256)},
            special_tokens={},
        )

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(UserError, match="tok_train"):
        tok_eval.main(["--data", corpus])
    tok_train.main(["--vocab_size=400", "--data", f"mine={corpus}"])
    capsys.readouterr()
    join, waits = threading.Thread.join, []
    with monkeypatch.context() as m:
        m.setattr(threading.Thread, "join", lambda t, s=None: waits.append(s) or join(t, s))
        tok_eval.main(["--data", f"mine={corpus}", "--wait=0.3"])
    assert [seconds for seconds in waits if seconds] == [0.3]
    arrives.set()  # only now, so the command has not waited for it
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert {"mine", "(english)", "(code)", "(maths)", "(cjk)", "(emoji)"} <= set(result["texts"])
    assert result["texts"]["mine"]["bytes_per_token"] > 1.5 and all(
        row["exact"] for row in result["texts"].values()
    )
    if trouble == "none":
        assert result["compared_with"] == ["gpt2", "gpt4"] and err == ""
        assert result["texts"]["(english)"]["gpt2"]["bytes_per_token"] == pytest.approx(
            1, abs=0.02
        )  # "." leaves line ends out
    else:
        assert result["compared_with"] == []
        assert err.count("\n") == 1 and "cannot download the vocabularies of gpt2 and gpt4" in err


def test_tok_data_makes_what_training_would(corpus, tmp_path, capsys):
    from nanochat.commands import tok_data, tok_train

    with pytest.raises(UserError, match="tok_train"):
        tok_data.main(["--data", corpus])
    tok_train.main(["--vocab_size=400", f"--data=mine={corpus}"])
    made = tok_data.main(["--data", f"mine={corpus}"])

    def written() -> dict[str, int]:
        files = (tmp_path / "made" / "tokens").glob("*/*")
        return {f"{p.parent.name}/{p.name}": p.stat().st_mtime_ns for p in files}

    before = written()
    assert (
        set(made) == {"mine-train", "mine-val"}
        and made["mine-train"] > 10 * made["mine-val"] > 0
        and len({name.partition("/")[0] for name in before}) == 2
    )
    again = tok_data.main(["--data", f"mine={corpus}"])
    assert again == made and written() == before


@pytest.mark.parametrize(
    ("flags", "digits"),
    [
        (["--vocab_size=2048"], 2),
        (["--vocab_size=2100"], 3),
        (["--vocab_size=2100", "--digits=1"], 1),
    ],
)
def test_larger_vocabularies_can_go_to_gguf(tmp_path, monkeypatch, flags, digits):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    from nanochat.commands import tok_train

    tok_train.main(["--data", "tinyworld@0.5", *flags])
    assert Tokenizer.load().digits == digits


def test_the_vocabulary_follows_the_text_and_not_the_size_of_files(tmp_path, monkeypatch, capsys):
    from nanochat.commands import tok_train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    words = [f"Story {i} of the cat and the dog. " * 5 for i in range(40)]
    for form, filler in (("plain", 0), ("pages", 40_000)):
        folder = tmp_path / form
        folder.mkdir()
        for i, text in enumerate(words):
            page = f"<html><head><style>{'.a{}' * filler}</style></head><p>{text}</p></html>"
            name = f"{i}.html" if filler else f"{i}.txt"
            (folder / name).write_text(page if filler else text)
        tok_train.main([f"--data={folder}"])
    chosen = [line for line in capsys.readouterr().out.splitlines() if "training a tok" in line]
    assert len(chosen) == 2 and chosen[0].split(" on ")[0] == chosen[1].split(" on ")[0]


def test_conversations_are_tokenised_for_both_stages(corpus, tmp_path, monkeypatch, capsys):
    from nanochat.commands import tok_data, tok_train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tok_train.main(["--vocab_size=400", f"--data=mine={corpus}"])
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"It is {i}."},
            ]
        }
        for i in range(40)
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = f"talk={tmp_path / 'talk.jsonl'}"
    made = tok_data.main([f"--data=mine={corpus}", "--conversations", spec])
    stages = {name for name in made if name.startswith("conversations")}
    assert stages == {f"conversations-{s}-{w}" for s in ("mid", "sft") for w in ("train", "val")}
    assert all(made[name] for name in stages)
    with pytest.raises(UserError, match="nope"):
        tok_data.main([f"--data=mine={corpus}", "--conversations", "x=nope.jsonl"])
