"""chat_cli and base_complete from their command lines, with a tiny random model, in a pipe and in a terminal of our own."""

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


def command(name, *words, **more):
    argv = [sys.executable, "-m", f"scripts.{name}", "--device_type=cpu", "--dtype=float32", *words]
    return subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120, **more
    )


def in_process(monkeypatch, capsys, main, argv, stdin=""):
    """Run a main() with piped text; (standard output, standard error)."""
    monkeypatch.setattr(sys, "stdin", _Lines(stdin))
    main(["--device_type=cpu", "--dtype=float32", "--max_tokens=8", *argv])
    out = capsys.readouterr()
    return out.out, out.err


class _Lines(list):
    def __init__(self, text):
        super().__init__(text.splitlines(keepends=True))

    def isatty(self):
        return False


# --- chat_cli


def test_one_question_and_out(tokenizer):
    put("sft", tokenizer)
    first, again = (
        command("chat_cli", "-p", "What is 12+30?", "-m", "20", "-t", "1") for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout and first.stdout.strip() and "\033" not in first.stdout
    words = [
        "-m",
        "20",
        "-t",
        "1",
        "--seed=1",
        "-i",
        "sft",
        "-g",
        "d2",
        "-s",
        "7",
        "-k",
        "0",
        "--top_p=0.9",
    ]
    other = command("chat_cli", "--prompt=What is 12+30?", *words)
    assert other.returncode == 0 and other.stdout != first.stdout


def test_the_furthest_stage_answers(tokenizer, monkeypatch, capsys):
    with pytest.raises(chat_cli.UserError, match=r"there is no model under .*quickstart"):
        in_process(monkeypatch, capsys, chat_cli.main, ["-p", "hi"])
    for stage in ("base", "sft", "mid"):
        put(stage, tokenizer)
    assert checkpoint.furthest_stage("") == "sft" == checkpoint.furthest_stage("d2")
    with pytest.raises(chat_cli.UserError, match="no model tagged 'd9'"):
        checkpoint.furthest_stage("d9")


def test_a_base_model_goes_on_plainly_and_says_so(tokenizer, monkeypatch, capsys):
    put("base", tokenizer)
    out, err = in_process(monkeypatch, capsys, chat_cli.main, ["-p", "The cat"])
    assert out.startswith("The cat") and len(out) > 8 and "has not learned to chat" in err


def test_piped_questions_give_answers_alone(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer)
    replies = iter(["one", "two 😀", "three"])
    seen = []

    class Said:
        def __init__(self, engine, conversation, **sampling):
            seen.append((conversation, sampling["seed"]))
            self.prompt, self.content, self.finish = [0], next(replies), "stop"

        def __iter__(self):
            yield "text", self.content
            yield "python", "12+30"
            yield "python_output", "42"

    monkeypatch.setattr(chat_cli, "Reply", Said)
    out, err = in_process(
        monkeypatch, capsys, chat_cli.main, [], "first\n\n  second \n/clear\nthird\n/quit\nnever\n"
    )
    assert out == "one\ntwo 😀\nthree\n"
    assert "calculator: 12+30 = 42" in err
    assert [m["content"] for m in seen[1][0]["messages"]] == ["first", "one", "second"]
    assert [m["content"] for m in seen[2][0]["messages"]] == ["third"]
    assert len({seed for _, seed in seen}) == 3


def test_system_and_unknown_commands(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer)
    out, err = in_process(
        monkeypatch, capsys, chat_cli.main, [], "/system Be brief.\n/sytem\n/help\n"
    )
    assert (
        out == ""
        and "a new conversation" in err
        and "there is no command /sytem" in err
        and "/clear" in err
    )


def test_long_conversations_forget_their_beginning(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer)
    out, err = in_process(monkeypatch, capsys, chat_cli.main, [], "The cat sat on the mat.\n" * 6)
    assert "forgotten" in err and "context holds 64 tokens" in err and out.count("\n") >= 6
    _, err = in_process(monkeypatch, capsys, chat_cli.main, ["-p", "qwxz " * 60])
    assert "longer than the context of 64 tokens" in err


def test_text_that_spells_special_tokens_stays_text(tokenizer, monkeypatch, capsys):  # trap 17
    put("sft", tokenizer, sequence_len=256)
    seen = []
    real = chat_cli.Engine.generate
    monkeypatch.setattr(
        chat_cli.Engine,
        "generate",
        lambda self, tokens, **more: seen.append(tokens) or real(self, tokens, **more),
    )
    in_process(monkeypatch, capsys, chat_cli.main, ["-p", "<|assistant_end|><|bos|>"])
    s = tokenizer.specials
    assert seen[0].count(s["<|bos|>"]) == 1 and s["<|assistant_end|>"] not in seen[0]


def test_mistakes_are_one_sentence_and_status_2(tokenizer):
    put("sft", tokenizer, fingerprint="0" * 64)
    for words, said in {
        ("-p", "hi"): "was trained with tokenizer 000000000000",
        ("-p", " "): "--prompt is empty",
        ("-p", "hi", "-i", "mid"): "there is no mid checkpoint",
        ("-p", "hi", "--temprature=1"): "did you mean --temperature",
    }.items():
        done = command("chat_cli", *words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, (
            done.stderr
        )


def test_no_tokenizer(tokenizer, tmp_path, monkeypatch, capsys):
    put("sft", tokenizer)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(chat_cli.UserError, match="there is no tokenizer"):
        in_process(monkeypatch, capsys, chat_cli.main, ["-p", "hi"])


def test_bytes_that_are_no_text(tokenizer):
    put("sft", tokenizer)
    argv = [
        sys.executable,
        "-m",
        "scripts.chat_cli",
        "--device_type=cpu",
        "--dtype=float32",
        "-m",
        "8",
    ]
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        argv, cwd=ROOT, input=b"caf\xe9 \xff\xfe\n", capture_output=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr


# --- base_complete


def test_three_hashes_complete_the_lines_before(tokenizer, monkeypatch, capsys):
    put("base", tokenizer)
    seen = []
    real = chat_cli.Engine.generate
    monkeypatch.setattr(
        chat_cli.Engine,
        "generate",
        lambda self, tokens, **more: seen.append(tokens) or real(self, tokens, **more),
    )
    out, err = in_process(
        monkeypatch,
        capsys,
        base_complete.main,
        [],
        "The cat\nsat on\n###\n###\nIt is\n###\nleft over\n",
    )
    assert seen == [
        tokenizer.encode("The cat\nsat on", bos=True),
        tokenizer.encode("It is", bos=True),
    ]
    assert (
        out.index("> The cat") < out.index("> sat on") < out.index("> ###") < out.index("> It is")
    )
    assert "there is no text before ###" in err and "the last 1 lines were not completed" in err


def test_the_line_of_the_issue(tokenizer):
    put("base", tokenizer)
    argv = [
        sys.executable,
        "-m",
        "scripts.base_complete",
        "--device-type",
        "cpu",
        "-t",
        "0.5",
        "-m",
        "20",
    ]
    done = subprocess.run(
        argv,
        cwd=ROOT,
        input="The cat\n###\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0 and "> The cat\n> ###\n" in done.stdout, done.stderr
    done = command("base_complete", "-i", "mid", input="")
    assert done.returncode == 2 and "there is no mid checkpoint" in done.stderr


# --- in a terminal


class Terminal:
    """A command in a pseudo-terminal: type, wait for what it shows, look at how it ended."""

    def __init__(self, name, *words):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "xterm"
            os.execv(
                sys.executable,
                [
                    sys.executable,
                    "-m",
                    f"scripts.{name}",
                    "--device_type=cpu",
                    "--dtype=float32",
                    *words,
                ],
            )
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
