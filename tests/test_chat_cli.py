"""
chat_cli and base_complete with a tiny random model: in this process, in a pipe and in a
pseudo-terminal.
"""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import tiny
import torch

from nanochat.base.common import UserError, entry
from nanochat.chat.generate import Engine, Token
from nanochat.commands import base_complete, chat_cli
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.stages import run_directory

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
    return checkpoint.save(run_directory(stage, tag), 7, dict(m.named_parameters()), optim, meta)


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
    assert "there is no command /sytem (did you mean /system?)" in err and "/clear" in err


def test_long_conversations_forget_their_beginning(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer)
    out, err = in_process(monkeypatch, capsys, chat_cli.main, [], "The cat sat on the mat.\n" * 6)
    assert (
        "forgot the oldest messages" in err
        and "context holds 64 tokens" in err
        and out.count("\n") >= 6
    )


def test_a_message_that_is_too_long_leaves_room_and_says_what_it_lost(
    tokenizer, monkeypatch, capsys
):
    prompts = prompts_of(monkeypatch)
    for stage in ("sft", "base"):
        put(stage, tokenizer)
        for system in ("", "/system Be brief.\n"):
            for most in ("8", "4096"):
                words = ["-i", stage, "-m", most, "-t", "0"]
                text = f"{system if stage == 'sft' else ''}{'qwxz ' * 60}the end\n"
                out, err = in_process(monkeypatch, capsys, chat_cli.main, words, text)
                prompt = prompts.pop()
                cut = int(re.search(r"the first ([\d,]+) of the text were cut", err)[1])
                seen, all = map(int, re.search(r"sees (\d+) of (\d+)", err).groups())
                assert cut + seen == all and len(prompt) <= 64 - (16 if most == "8" else 32)
                shown = tokenizer.decode(prompt)
                assert shown.startswith("<|bos|>") and "the end" in shown
                assert out.strip() and ("Be brief." in shown or not system or stage == "base")
    assert "the context of 64 tokens is full" in err  # the base model says why it ended


def prompts_of(monkeypatch):
    """A list that gets the prompt of each generation."""
    prompts, generate = [], Engine.generate
    monkeypatch.setattr(
        Engine,
        "generate",
        lambda self, tokens, **more: prompts.append(tokens) or generate(self, tokens, **more),
    )
    return prompts


def test_memory_that_runs_out_ends_no_chat(tokenizer, monkeypatch, capsys):
    put("sft", tokenizer, sequence_len=256)
    prompts, loads = [], []
    generate, load = Engine.generate, checkpoint.load_for_inference

    def too_large(self, tokens, **sampling):
        prompts.append(tokenizer.decode(tokens))
        if len(prompts) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return generate(self, tokens, **sampling)

    def load_once(*given):
        loads.append(given)
        if len(loads) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(*given)

    monkeypatch.setattr(Engine, "generate", too_large)
    monkeypatch.setattr(checkpoint, "load_for_inference", load_once)
    questions = "one\ntwo\n/model sft\nthree\n"
    _, err = in_process(monkeypatch, capsys, chat_cli.main, [], questions)
    assert err.count("error: out of memory") == len(loads) == 2
    assert "one" in prompts[2] and "two" not in prompts[2] and "three" in prompts[2]
    prompts[:], loads[:] = ["one"], []
    with pytest.raises(RuntimeError):  # one question alone: the command fails
        in_process(monkeypatch, capsys, chat_cli.main, ["-p", "four"])


def test_text_that_spells_special_tokens_stays_text(tokenizer, monkeypatch, capsys):
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

    def __init__(self, name, *words, main=None):
        """A process of its own, or a copy of this one that runs `main`, which starts at once."""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "xterm"
            argv = [sys.executable, "-m", f"scripts.{name}", *WHERE, *words]
            if main is None:
                os.execv(sys.executable, argv)
            os._exit(self._run(main, argv[3:]))
        self.shown = ""

    @staticmethod
    def _run(main, argv):
        torch.set_num_threads(1)  # the threads of this process are not copied
        sys.stdin, sys.stdout, sys.stderr = (open(i, "w" if i else "r") for i in range(3))  # noqa: SIM115
        try:
            entry(lambda: main(argv))
        except SystemExit as e:
            return e.code or 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            return 1
        return 0

    def wait(self, text, seconds=30.0):
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

    def say(self, text, expected, end="\r"):
        """Type a line at the next prompt and wait for what it brings; -> what came before that."""
        self.wait(READY)
        self.type(text + end)
        return self.wait(expected)

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
    t.wait("sft model d2", 120)
    t.wait(READY)
    t.type("/help\r")
    t.wait("/clear")
    t.wait(READY)
    t.type("The cat\r")
    t.wait("The cat")
    time.sleep(1.0)
    t.type("\x03")  # stops the reply, if it has not ended of itself
    t.wait(READY, 90)
    t.type("\x03")
    t.wait("Ctrl+C once more exits")
    t.wait(READY)
    t.type("\x03")
    assert t.end() == 0
    assert "The cat" in (tmp_path / "chat_history").read_text()
    assert (tmp_path / "chat_history").stat().st_mode & 0o777 == 0o600  # for nobody else
    assert "Traceback" not in t.shown


@pytest.fixture
def chat(tokenizer, tmp_path, monkeypatch):
    """
    Opens chats in pseudo-terminals. Their model replies "seed N saw <PROMPT>", with [ and ] around
    turns and | for a line break; "forever" gets a reply without an end, "wait" none, and "how?" how
    it is sampled. While one waits, there is a file waits.
    """
    opened = []
    turns = {"<|bos|>": "", "<|user_start|>": "[", "<|assistant_start|>": "["}
    turns |= {"<|user_end|>": "]", "<|assistant_end|>": "]"}

    def generate(self, tokens, **sampling):
        shown = tokenizer.decode(tokens)
        for name, mark in turns.items():
            shown = shown.replace(name, mark)
        shown = shown.replace("\n", "|")
        text = f"seed {sampling['seed']} at {sampling['temperature']} saw <{shown}>"
        while shown.endswith("wait]["):  # reads its prompt for ever
            (tmp_path / "waits").touch()
            time.sleep(0.02)
        if shown.endswith("[how?]["):
            text = ", ".join(f"{name} {value}" for name, value in sampling.items())
        for id in tokenizer.encode(text):
            yield [Token(0, id, "")]
        while shown.endswith("[forever]["):
            time.sleep(0.02)
            yield [Token(0, tokenizer.encode(".")[0], "")]
        yield [Token(0, tokenizer.specials["<|assistant_end|>"], "stop")]

    def open_chat(stage="sft", *words):
        put(stage, tokenizer, sequence_len=2048)
        t = Terminal("chat_cli", *words, main=chat_cli.main)
        opened.append(t)
        return t

    monkeypatch.setattr(Engine, "generate", generate)
    open_chat.opened = opened
    yield open_chat
    for t in opened:
        t.wait(READY)
        t.type("\x04")
        assert t.end() == 0 and "Traceback" not in t.shown


def test_help_lists_every_command_and_stats_tell_the_state(chat):
    t = chat()
    shown = t.say("/help", "twice on an empty line it exits")
    for name, command in chat_cli.COMMANDS.items():
        assert name in shown and command.help[:20] in shown, command
    t.say("hello", "saw <[hello][>")
    assert re.search(r"90m\[\d+ tokens, [\d.]+[kM]? tokens/s\]", t.wait("\033[0m\r\n"))
    shown = t.say("/stats", "temperature 0.6")
    assert "sft model d2" in shown and "1 questions and answers" in shown and "2,048" in shown


def test_what_begins_with_a_slash_and_a_letter_never_goes_to_the_model(chat):
    t = chat()
    for line, answer in {
        "/hlep": "there is no command /hlep (did you mean /help?)",
        "/QUIT": "there is no command /QUIT (did you mean /quit?)",
        "/etc/passwd is a file": "there is no command /etc/passwd",
        "/undo 3": "/undo takes no argument (got '3')",
        "/save": "/save needs an argument: /save FILE",
        "//etc is a folder": "saw <[/etc is a folder][>",
        "/ and // stay": "[>][/ and // stay][>",
    }.items():
        shown = t.say(line, answer)
        assert "saw" not in shown or "//" in line


def test_retry_undo_and_edit(chat):
    t = chat()
    for command in ("/retry", "/undo", "/edit", "/save x"):
        t.say(command, "there is no question yet")
    t.say("one", "seed 42 at 0.6 saw <[one][>")
    t.say("/retry", "seed 43 at 0.6 saw <[one][>")
    t.say("two", "seed 44 at 0.6 saw <[one][seed 43 at 0.6 saw <[one][>][two][>")
    t.say("/undo", 'took back "two"')
    t.say("/edit three", "seed 45 at 0.6 saw <[three][>")
    t.say("/temperature 0", "temperature 0.0")
    assert "answer stays the same" in t.say("/retry", "seed 46 at 0.0 saw <[three][>")
    t.say("/edit", "three")  # the last question stands at the prompt
    t.type(" and four\r")
    t.wait("seed 47 at 0.0 saw <[three and four][>")
    t.say("/edit", "three and four")
    t.type("\x03five\r")  # the edit is given up
    t.wait("seed 48 at 0.0 saw <[three and four][seed 47")
    t.say("/edit", "five")
    t.type("\x03\x03")  # also by a second one, on the line that is empty now
    t.wait("once more exits")
    t.say("six", "seed 49 at 0.0 saw <[three and four][seed 47")
    t.say("/undo", 'took back "six"')
    t.say("/undo", 'took back "five"')


def test_what_is_stopped_before_it_begins_loses_nothing(chat, tmp_path):
    t, waits = chat(), tmp_path / "waits"

    def stop(line):
        t.wait(READY)
        t.type(line + "\r")
        tiny.wait_until(waits.exists)
        t.type("\x03")
        t.wait("[stopped]")
        waits.unlink()

    t.say("one", "seed 42 at 0.6 saw <[one][>")
    stop("/edit wait")  # the exchange stays
    t.say("two", "saw <[one][seed 42 at 0.6 saw <[one][>][two][>")
    stop("please wait")
    stop("/retry")  # asks that again, not "two"
    t.say("/undo", 'took back "please wait"')
    t.say("/undo", 'took back "two"')
    t.say("three", "saw <[one][seed 42 at 0.6 saw <[one][>][three][>")


def test_save_and_load(chat, tokenizer, tmp_path, capsys):
    t = chat()
    file = tmp_path / "a b.jsonl"
    t.say("/system Be brief.", "new conversation")
    t.say("Grüße 😀", "saw <[Be brief.")
    t.say(f"/save {file}", "wrote 3 messages")
    roles = [m["role"] for m in json.loads(file.read_text())["messages"]]
    assert roles == ["system", "user", "assistant"] and file.read_text().count("\n") == 1
    tokenizer.render_conversation(json.loads(file.read_text()))  # as finetuning does
    before = file.read_bytes()
    t.say("more", "saw")
    t.say(f"/save {file}", "exists: choose another name")
    assert file.read_bytes() == before
    t.say(f"/save --overwrite {file}", "wrote 5 messages")
    t.say(f"/save {tmp_path / 'none' / 'x'}", "choose another file")
    t.say("/clear", "new conversation")
    t.say(f"/load {file}", "read 5 messages")
    shown = t.say("next", "[next][>")
    assert "Model:" in shown and "saw <[Be brief." in shown and "[more]" in shown
    question = {"messages": [{"role": "user", "content": "open question"}]}
    file.write_text(json.dumps(question, indent=1))
    t.say(f"/load {file}", "saw <[open question][>")


def test_what_cannot_be_loaded(chat, tmp_path):
    t = chat()
    t.say("kept", "saw")
    for name, data in {
        "empty": b"",
        "not json": b"{",
        "a list": b"[]",
        "two": b'{"messages": []}\n{"messages": []}\n',
        "no messages": b'{"messages": []}',
        "wrong role": b'{"messages": [{"role": "assistant", "content": "x"}]}',
        "number": b'{"messages": [{"role": "user", "content": 5}]}',
        "bytes": b"\xff\xff\xff",
        "deep": b"[" * 100_000,
    }.items():
        (tmp_path / name).write_bytes(data)
        t.say(f"/load {tmp_path / name}", "it must hold one conversation")
    t.say(f"/load {tmp_path}", "it must hold one conversation")
    t.say("/load /nowhere/to/be/found", "there is no file")
    t.say("next", "saw <[kept][")


def test_system_and_clear(chat):
    t = chat()
    t.say("/system", "there is no instruction")
    t.say("/system Be a pirate.", "new conversation with this instruction")
    t.say("/system", "Be a pirate.")
    assert "Be a pirate." in t.say("hi", "hi][>")
    t.say("/clear", "new conversation")
    t.say("hi", "saw <[hi][>")


def test_settings_are_shown_changed_and_bounded(chat):
    t = chat()
    for line, answer in {
        "/temperature": "[temperature 0.6]",
        "/temperature 1.5": "[temperature 1.5]",
        "/temperature hot": "/temperature must be a number (got 'hot')",
        "/temperature -1": "/temperature must be at least 0 (got -1.0)",
        "/temperature nan": "/temperature must be at least 0",
        "/top_k 0": "[top_k 0]",
        "/top_k 1.5": "/top_k must be a whole number",
        "/top_p 2": "/top_p must be at most 1 (got 2.0)",
        "/top_p 0.9": "[top_p 0.9]",
        "/max_tokens 0": "/max_tokens must be at least 1",
        "/max_tokens 5": "[max_tokens 5]",
        "/seed 7": "[seed 7]",
        "/seed x": "/seed must be a whole number",
        "how?": "temperature 1.5, top_k 0, top_p 0.9, max_tokens 5, seed 7",
        "/stats": "temperature 1.5, top_k 0, top_p 0.9, max_tokens 5, seed 7",
    }.items():
        t.say(line, answer)


@pytest.mark.parametrize("line", ["/quit", "/exit"])
def test_quit_and_exit(chat, line):
    t = chat()
    t.say(f"{line} now", f"{line} takes no argument (got 'now')")
    t.say("hi", "saw <[hi][>")
    t.wait(READY)
    t.type(line + "\r")
    assert t.end() == 0 and "Traceback" not in t.shown
    chat.opened.remove(t)


def test_another_model_answers(chat, tokenizer):
    put("base", tokenizer)
    put("mid", tokenizer, tag="d4", sequence_len=2048)
    t = chat("sft")
    t.say("one", "saw")
    t.say("/model", "sft model d2, step 7")
    t.say("/model rl", "there is no rl checkpoint")
    t.say("/model d9", "no model tagged 'd9'")
    t.say("/model sft/../evil", "cannot be a folder name")
    t.say("/model x/y", "there is no stage in 'x/y'")
    t.say("/model mid/d4", "mid model d4")
    t.say("two", "saw <[one][seed")  # the conversation goes on
    t.say("/model base", "continues your text")
    t.say("/save x", "/save needs a chat model")
    t.say("The cat", "saw <The cat>")
    t.say("/retry", "saw <The cat>")
    t.say("/edit The dog", "saw <The dog>")
    t.say("/model d4", "mid model d4")
    t.say("/system Be brief.", "new conversation")
    t.say("/model base", "continues your text")
    t.say("/stats", "\n0 questions and answers")  # an instruction counts as none


def test_texts_of_several_lines(chat):
    t = chat()
    t.say("one\x1b\rtwo", r"saw <[one|two][>")  # Alt+Enter
    t.say("/clear", "new conversation")
    t.say("one\\\rtwo\\\rthree", r"saw <[one|two|three][>")
    t.say("/clear", "new conversation")
    t.say("\x1b[200~def f():\n    return 1\n\x1b[201~", r"saw <[def f():|    return 1][>")


def test_tab_completes_commands(chat):
    chat().say("/temper\t", "[temperature 0.6]")


def test_ctrl_c_stops_a_reply_or_clears_a_line_and_twice_leaves(chat):
    t = chat()
    t.say("forever", "saw <[forever][>....")
    t.type("\x03")
    t.wait("[stopped]")
    t.say("half a line\x03whole", "[whole][>")  # what was stopped counts, the cleared line does not
    t.say("\x03", "once more exits", end="")
    t.wait(READY)
    t.type("text\x03\x03")  # text in between: it counts anew
    t.wait("once more exits")
    t.wait(READY)
    t.type("\x03")
    assert t.end() == 0
    chat.opened.remove(t)


def test_a_history_that_cannot_be_written_costs_the_history_alone(chat, tmp_path):
    (tmp_path / "chat_history").mkdir()
    t = chat()
    t.say("hi", "saw <[hi][>")
    assert (tmp_path / "chat_history").is_dir()


def test_completing_in_a_terminal(tokenizer):
    put("base", tokenizer)
    t = Terminal("base_complete", "-m", "12", main=base_complete.main)
    t.wait("completes the lines before it")
    for line in ("The cat", "###"):
        t.wait(READY)
        t.type(line + "\r")
    t.wait("###")
    t.wait(READY)
    t.type("\x04")
    assert t.end() == 0 and "Traceback" not in t.shown
