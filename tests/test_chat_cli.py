"""
chat_cli and base_complete with a tiny random model: in this process, in a pipe and in a
pseudo-terminal.
"""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.base.common import UserError, entry
from nanochat.chat.generate import Engine, Token
from nanochat.commands import base_complete, chat_cli
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

ROOT = Path(__file__).resolve().parent.parent
READY = "\033[?2004h"  # what prompt_toolkit tells a terminal when it begins to ask
TEXT = "The cat sat on the mat. What is 12+30? It is 42. Grüße, 世界 😀😀. " * 20


def put(stage, tokenizer, tag="d2", fingerprint=None, sequence_len=64):
    config = GPTConfig(
        sequence_len=sequence_len,
        vocab_size=tokenizer.vocab_size,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        n_embd=32,
    )
    m = GPT.build(config)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.3, generator=g)
    meta = {
        "config": config.to_dict(),
        "tokenizer": fingerprint or tokenizer.fingerprint,
    }
    optim = {"nothing": torch.zeros(1)}
    return checkpoint.save(
        checkpoint.run_directory(stage, tag), 7, dict(m.named_parameters()), optim, meta
    )


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    t = Tokenizer.train([TEXT], 300)
    t.save(tmp_path / "tokenizer")
    return t


WHERE = ["--device_type=cpu", "--dtype=float32"]


def in_process(monkeypatch, capsys, main, argv, stdin=""):
    """Run a main() with piped text; (standard output, standard error)."""
    monkeypatch.setattr(sys, "stdin", _Lines(stdin))
    main([*WHERE, "--max_tokens=8", *argv])
    out = capsys.readouterr()
    return out.out, out.err


def status_and_error(monkeypatch, capsys, main, argv):
    """Run a main() as its command does; (exit status, standard error)."""
    monkeypatch.setattr(sys, "argv", ["command", *WHERE, *argv])
    with pytest.raises(SystemExit) as e:
        entry(main)
    return e.value.code, capsys.readouterr().err


def piped(name, *words, **more):
    """Run a command in a process of its own."""
    argv = [sys.executable, "-m", f"scripts.{name}", *WHERE, *words]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=120, **more)


class _Lines(list):
    def __init__(self, text):
        super().__init__(text.splitlines(keepends=True))

    def isatty(self):
        return False


# --- chat_cli


def test_one_question_and_out(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer)

    def ask(*words):
        return in_process(monkeypatch, capsys, chat_cli.main, words)[0]

    words = ("-p", "What is 12+30?", "-m", "20", "-t", "1")
    first = ask(*words)
    assert first == ask(*words) and first.strip() and "\033" not in first
    others = ["--seed=1", "-i", "sft", "-g", "d2", "-s", "7", "-k", "0", "--top_p=0.9"]
    assert ask("--prompt=What is 12+30?", "-m", "20", "-t", "1", *others) != first


def test_the_furthest_stage_answers(tokenizer, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"there is no model under .*quickstart"):
        in_process(monkeypatch, capsys, chat_cli.main, ["-p", "hi"])
    for stage in ("base", "sft", "mid"):
        put(stage, tokenizer)
    assert [checkpoint.choose(tag=tag)[0] for tag in ("", "d2")] == ["sft", "sft"]
    assert checkpoint.choose("mid")[0] == "mid"
    with pytest.raises(UserError, match="no model tagged 'd9'"):
        checkpoint.choose(tag="d9")
    with pytest.raises(UserError, match="no model at step 8 "):
        checkpoint.choose(step=8)


def test_the_tag_saved_last_comes_first_and_damage_is_passed_over(tokenizer, capsys):
    def chosen():
        stage, found = checkpoint.choose()
        return f"{found.tag}/{stage}"

    def saved(stage, tag, when):
        path = put(stage, tokenizer, tag).path
        os.utime(path, (when, when))
        return path

    saved("rl", "d4", 1000)
    assert chosen() == "d4/rl"
    saved("base", "d6", 2000)
    assert chosen() == "d6/base"  # another model's chain is under way
    saved("mid", "d4", 3000)
    assert chosen() == "d4/rl"  # the furthest stage, whichever stage was saved last
    sft = saved("sft", "d6", 4000)
    saved("rl", "d6.old", 5000)  # a run that was set aside comes last
    assert chosen() == "d6/sft"
    (sft / "model.safetensors").write_bytes(b"torn")
    assert chosen() == "d6/base" and "skipping the damaged checkpoint" in capsys.readouterr().err


def test_a_base_model_goes_on_plainly_and_says_so(tokenizer, monkeypatch, capsys):
    put("base", tokenizer)
    out, err = in_process(monkeypatch, capsys, chat_cli.main, ["-p", "The cat"])
    assert out.startswith("The cat") and len(out) > 8 and "has not learned to chat" in err


def test_piped_questions_give_replies_alone(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer)
    replies = iter(["one", "two 😀", "three"])
    prompts, seeds = [], []

    def spoken(self, tokens, **sampling):
        """What a model might generate: a reply, and then a call of the calculator."""
        prompts.append(tokens)
        seeds.append(sampling["seed"])
        special = tokenizer.specials
        ids = [*tokenizer.encode(next(replies)), special["<|python_start|>"]]
        ids += [*tokenizer.encode("12+30"), special["<|python_end|>"], special["<|output_start|>"]]
        ids += [*tokenizer.encode("42"), special["<|output_end|>"]]
        yield [Token(0, id, "") for id in ids]
        yield [Token(0, special["<|assistant_end|>"], "stop")]

    monkeypatch.setattr(Engine, "generate", spoken)
    questions = "first\n\n  second \n/clear\nthird\n/quit\nnever\n"
    out, err = in_process(monkeypatch, capsys, chat_cli.main, [], questions)
    assert out == "one\ntwo 😀\nthree\n"
    assert err.count("calculator: 12+30 = 42\n") == 3
    shown = [tokenizer.decode(tokens) for tokens in prompts]
    assert "first" in shown[1] and "one" in shown[1] and "second" in shown[1]
    assert "third" in shown[2] and not any(word in shown[2] for word in ("first", "one", "two"))
    assert len(set(seeds)) == 3


def test_system_and_unknown_commands(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer)
    out, err = in_process(
        monkeypatch, capsys, chat_cli.main, [], "/system Be brief.\n/sytem\n/help\n"
    )
    assert out == "" and "new conversation" in err
    assert "there is no command /sytem" in err and "/clear" in err


def test_long_conversations_forget_their_beginning(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer)
    out, err = in_process(monkeypatch, capsys, chat_cli.main, [], "The cat sat on the mat.\n" * 6)
    assert (
        "forgot the oldest messages" in err
        and "context holds 64 tokens" in err
        and out.count("\n") >= 6
    )
    _, err = in_process(monkeypatch, capsys, chat_cli.main, ["-p", "qwxz " * 60])
    assert "the message exceeds the context of 64 tokens" in err


def prompts_of(monkeypatch):
    """A list that gets the prompt of each generation."""
    prompts, generate = [], Engine.generate
    monkeypatch.setattr(
        Engine,
        "generate",
        lambda self, tokens, **more: prompts.append(tokens) or generate(self, tokens, **more),
    )
    return prompts


def test_text_that_spells_special_tokens_stays_text(tokenizer, monkeypatch, capsys):  # trap 17
    put("sft", tokenizer, sequence_len=256)
    prompts = prompts_of(monkeypatch)
    in_process(monkeypatch, capsys, chat_cli.main, ["-p", "<|assistant_end|><|bos|>"])
    s = tokenizer.specials
    assert prompts[0].count(s["<|bos|>"]) == 1 and s["<|assistant_end|>"] not in prompts[0]


def test_mistakes_are_one_line_and_status_2(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer, fingerprint="0" * 64)
    for words, said in {
        ("-p", "hi"): "was trained with tokenizer 000000000000",
        ("-p", " "): "--prompt is empty",
        ("-p", "hi", "-i", "mid"): "there is no mid checkpoint",
        ("-p", "hi", "--temprature=1"): "did you mean --temperature",
    }.items():
        status, error = status_and_error(monkeypatch, capsys, chat_cli.main, words)
        assert status == 2 and error.count("\n") == 1 and said in error, error


def test_no_tokenizer(tokenizer, tmp_path, monkeypatch, capsys):
    put("sft", tokenizer)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="there is no tokenizer"):
        in_process(monkeypatch, capsys, chat_cli.main, ["-p", "hi"])


def test_bytes_that_are_not_text(tokenizer, monkeypatch):
    put("sft", tokenizer)
    question = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xff\xfe\n"), encoding="utf-8")
    answer = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # which cannot write all characters
    monkeypatch.setattr(sys, "stdin", question)
    monkeypatch.setattr(sys, "stdout", answer)
    entry(lambda: chat_cli.main([*WHERE, "-m", "50"]))
    answer.flush()
    assert b"?" in answer.buffer.getvalue()


# --- base_complete


def test_three_hashes_complete_the_lines_before(tokenizer, monkeypatch, capsys):
    put("base", tokenizer)
    prompts = prompts_of(monkeypatch)
    text = "The cat\nsat on\n###\n###\nIt is\n###\nleft over\n"
    out, err = in_process(monkeypatch, capsys, base_complete.main, [], text)
    assert prompts == [
        tokenizer.encode("The cat\nsat on", bos=True),
        tokenizer.encode("It is", bos=True),
    ]
    shown = ("> The cat", "> sat on", "> ###", "> It is")
    assert sorted(shown, key=out.index) == list(shown)
    assert (
        "there is no text before ###" in err
        and "the text after the last ### was not completed" in err
    )


def test_piped_text_is_completed_in_a_process_of_its_own(tokenizer, monkeypatch, capsys):
    put("base", tokenizer)
    words = ["--device-type", "cpu", "-t", "0.5", "-m", "20"]
    done = piped("base_complete", *words, input=b"The cat\n###\n")
    assert done.returncode == 0 and b"> The cat\n> ###\n" in done.stdout, done.stderr
    status, error = status_and_error(monkeypatch, capsys, base_complete.main, ["-i", "mid"])
    assert status == 2 and "there is no mid checkpoint" in error


# --- in a terminal


class Terminal:
    """A command in a pseudo-terminal: type, wait for what it shows, look at how it ended."""

    def __init__(self, name, *words):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "xterm"
            argv = [sys.executable, "-m", f"scripts.{name}", *WHERE, *words]
            os.execv(sys.executable, argv)
        self.shown = ""

    def wait(self, text, seconds=60.0):
        """Until `text` is shown beyond what was waited for before."""
        until = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < until, self.shown
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    new = os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError as e:
                    raise AssertionError(self.shown) from e
                self.shown += new
                if "\033[6n" in new:  # it asks where the cursor is
                    os.write(self.fd, b"\033[1;1R")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def end(self, seconds=30.0):
        """Its exit status; what it still shows is read meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError:  # the other side is gone
                    break
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it does not end; it showed {self.shown!r}")


def test_chat_in_a_terminal(tokenizer, tmp_path):
    put("sft", tokenizer, sequence_len=4096)
    t = Terminal("chat_cli", "-m", "4000", "-t", "0")
    t.wait("sft model d2")
    t.wait(READY)
    t.type("/help\r")
    t.wait("/clear")
    t.wait(READY)
    t.type("The cat\r")
    t.wait("The cat")
    time.sleep(1.0)
    t.type("\x03")  # stops the reply, if it has not ended of itself
    t.wait(READY, 90)
    t.type("\x03")  # leaves
    assert t.end() == 0
    assert "The cat" in (tmp_path / "chat_history").read_text()
    assert "Traceback" not in t.shown


def test_completing_in_a_terminal(tokenizer):
    put("base", tokenizer)
    t = Terminal("base_complete", "-m", "12")
    t.wait("completes the lines before it")
    for line in ("The cat", "###"):
        t.wait(READY)
        t.type(line + "\r")
    t.wait("###")
    t.wait(READY)
    t.type("\x03")
    assert t.end() == 0 and "Traceback" not in t.shown
