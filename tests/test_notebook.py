"""nanochat.load and nanochat.train, and the notebook page of the documentation, executed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

import nanochat
from nanochat.base.common import UserError
from nanochat.chat.generate import Engine
from nanochat.commands import tok_train

PAGE = Path(__file__).resolve().parent.parent / "docs" / "notebook.md"
TINY = {
    "device_type": "cpu",
    "dtype": "float32",
    "depth": 1,
    "model_dim": 32,
    "head_dim": 16,
    "sequence_len": 128,
    "total_batch_size": 512,
    "eval_tokens": 2000,
    "num_iterations": 2,
}
SFT = {"device_type": "cpu", "dtype": "float32", "source": "base", "data": ["tinyworld@30"]}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    """A base folder with a base model and a finetuned one, both trained for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("notebook")))
        matplotlib.use("agg")
        tok_train.main(["--data", "tinyworld@0.2", "--vocab_size=400"])
        base = nanochat.train("base", data=("tinyworld@0.2",), model_tag="toy", **TINY)
        sft = nanochat.train("sft", eval_tokens=2000, num_iterations=1, **SFT)
        yield base, sft


def test_importing_is_instant_and_leaves_both_meanings_of_train():
    code = """if True:
        import sys, nanochat
        assert "torch" not in sys.modules
        from nanochat.train import schedule
        assert callable(nanochat.train) and nanochat.train.schedule is schedule
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_refused_leaves_no_run_locked():
    from nanochat.base.files import reserved
    from nanochat.model.stages import lock_file, run_directory

    with pytest.raises(UserError, match="nowhere does not exist"):
        nanochat.train("base", data=("nowhere",), model_tag="none", **TINY)
    assert not reserved(lock_file(run_directory("base", "none")))


def test_a_loaded_model_says_what_it_is_and_chats():
    chat = nanochat.load("sft", device_type="cpu")
    assert re.fullmatch(r"<nanochat sft model toy, step 1, \d+\.\d M parameters>", repr(chat)), (
        repr(chat)
    )
    reply = chat("Hello", max_tokens=8, seed=3)
    assert isinstance(reply, str)
    assert reply == "".join(chat.stream("Hello", max_tokens=8, seed=3))
    assert chat([{"role": "user", "content": "Hello"}], max_tokens=8, seed=3) == reply
    assert nanochat.load(device_type="cpu").loaded.stage == "sft"  # the furthest stage


def test_what_the_context_does_not_hold_is_left_out_with_a_notice(monkeypatch, capsys):
    prompts, generate = [], Engine.generate

    def watched(self, tokens, **sampling):
        prompts.append(tokens)
        return generate(self, tokens, **sampling)

    monkeypatch.setattr(Engine, "generate", watched)
    chat = nanochat.load("sft", device_type="cpu")
    question = {"role": "user", "content": "Hello"}
    turns = [question, {"role": "assistant", "content": "Hi"}]
    for call, given, lost in (
        (chat, [*turns * 60, question], "oldest messages"),
        (chat, "word " * 300, "first tokens"),
        (chat.complete, "word " * 300, "first tokens"),
    ):
        call(given, max_tokens=8)
        assert len(prompts.pop()) <= chat.model.config.sequence_len - 8
        assert lost in capsys.readouterr().err
    chat("Hello", max_tokens=8)
    assert capsys.readouterr().err == ""


def test_completion_follows_the_logits():
    base = nanochat.load("base", "toy", device_type="cpu")
    tokens = base.tokenizer.encode("The cat", bos=True)
    logits = base.logits(tokens)
    assert logits.shape == (len(tokens), base.tokenizer.vocab_size)
    assert logits.dtype == torch.float32
    likeliest = base.tokenizer.decode([int(logits[-1].argmax())])
    assert base.complete("The cat", max_tokens=1, temperature=0.0) == likeliest


def test_a_run_has_its_metrics_its_plot_and_its_model(models):
    base, sft = models
    assert [row["step"] for row in base.metrics if row["kind"] == "train"] == [1, 2]
    assert base.summary["tokens"] == 1024 and (sft.stage, sft.tag) == ("sft", "toy")
    figure = base.plot()
    loss, bpb = figure.axes
    assert list(loss.lines[0].get_xdata()) == [1, 2] and len(bpb.lines[0].get_xdata()) > 0
    assert "base model toy, step 2" in repr(base.load())


def test_a_run_with_nothing_to_do_is_the_one_that_was_asked_for(models):
    base, _ = models
    newer = shutil.copytree(base.directory, base.directory.with_name("newer"))
    later = base.directory.stat().st_mtime + 1000
    for folder in newer.glob("step_*"):
        os.utime(folder, (later, later))
    again = nanochat.train("base", model_tag=base.tag, resume="auto")
    shutil.rmtree(newer)
    assert (again.stage, again.tag) == ("base", base.tag)


def test_more_tokens_than_the_context_holds_are_refused(models):
    chat = models[0].load()
    with pytest.raises(UserError, match=r"reads 1 to [\d,]+ tokens at a time \(got 5,000\)"):
        chat.logits([1] * 5000)
    with pytest.raises(UserError, match="there are no tokens"):
        chat.logits([])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nanochat.train("base", dept=4), r"no flag --dept \(did you mean --depth\?\)"),
        (lambda: nanochat.train("base", keep=0), r"--keep must be at least 1 \(got 0\)"),
        (lambda: nanochat.train("pretrain"), r"no stage 'pretrain': choose one of base"),
        (lambda: nanochat.load("rl"), "no rl checkpoint"),
        (lambda: nanochat.load("base")("Hello"), r"has not learned to chat: use \.complete"),
        (lambda: nanochat.load("sft")([{"content": "Hello"}]), "message 0: expected role 'user'"),
    ],
)
def test_mistakes_are_refused_as_on_the_command_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_the_page_runs_as_it_stands(capsys):
    """Only the ten minutes of training are cut to two steps."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    arguments = ", ".join(f"{name}={value!r}" for name, value in TINY.items())
    shortened = code.replace("depth=4, max_minutes=10", f"data=['tinyworld@0.2'], {arguments}")
    assert shortened != code
    exec(compile(shortened, str(PAGE), "exec"), {})
    assert "<nanochat sft model toy, step 1," in capsys.readouterr().out
