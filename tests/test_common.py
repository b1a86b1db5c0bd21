"""common: figures and tables for people, and how a command ends."""

import ast
import io
import os
import re
import subprocess
import sys
import unicodedata
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from nanochat.base import common
from nanochat.base.common import (
    RankLost,
    UserError,
    base_dir,
    columns,
    counted,
    duration,
    entry,
    human,
    notice,
    print0,
)
from nanochat.base.progress import StatusLine, progress


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (999, "999"), (999.6, "1k"), (12_582_912, "12.6M"), (-2500, "-2.5k"), (3e15, "3P")],
)
def test_human(n, text):
    assert human(n) == text


def test_one_thing_and_several():
    made = [counted(n, "documents") for n in (0, 1, 2, 3167)]
    assert made == ["0 documents", "1 document", "2 documents", "3,167 documents"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (59.6, "1m00s"), (75, "1m15s"), (7260, "2h01m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_columns_is_a_markdown_table_with_figures_flush_right():
    table = columns(("part", "share"), [("head", "12%"), ("embedding", "7%")])
    assert table.splitlines() == [
        "| part      | share |",
        "| --------- | ----: |",
        "| head      |   12% |",
        "| embedding |    7% |",
    ]


class Refused(UserError):
    status = 3


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UserError("wrong: fix it"), 2, "error: wrong: fix it\n"),
        (Refused("not now"), 3, "error: not now\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_a_command_ends_with_one_line_and_a_status(error, status, printed, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as e:
        entry(main)
    assert e.value.code == status
    assert capsys.readouterr().err == printed


def test_a_bug_keeps_its_stack_trace():
    with pytest.raises(ZeroDivisionError):
        entry(lambda: 1 / 0)


def test_a_base_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(UserError, match="set NANOCHAT_BASE_DIR to a folder"):
        base_dir()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "koi8-r"])
@pytest.mark.parametrize("text", ["река", "中文 🙂", "café", "file \udce9.txt"])
def test_a_console_of_any_encoding_shows_what_it_can(encoding, text):
    """Every command goes through entry(), so none ends because of a character."""
    code = "import sys; from nanochat.base.common import *; entry(lambda: (print0(eval(sys.argv[1])), notice(eval(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, ascii(text)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    shown = text.encode(encoding, "replace")
    assert done.stdout.strip() == shown and shown in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the setting exists only there")
def test_commands_ask_for_memory_in_pieces_that_grow_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    entry(lambda: None)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    entry(lambda: None)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "backend:native"


@pytest.mark.skipif(sys.platform != "linux", reason="the setting exists only there")
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, b"1000"), ({"GOMP_SPINCOUNT": "7"}, b"7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, b"0")],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(given, expected):
    """torch's own OpenMP library says how often it spins: 300,000 times if nobody asks for less."""
    code = "from nanochat.base.common import entry; entry(lambda: __import__('torch'))"
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **given, "OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    shown = re.findall(rb"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not shown:
        pytest.skip("torch is not built with GNU OpenMP")
    assert set(shown) == {expected}


def test_streams_without_an_encoding_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    entry(lambda: print("fine"))
    assert sys.stdout.getvalue() == "fine\n"


LIVES_ON = """
import sys, time
from pathlib import Path
from nanochat.base.common import entry, notice, print0
from nanochat.base.progress import StatusLine, progress
def main():
    line = StatusLine(0, 0)
    print0("begun")
    for i in range(200):
        line.show(f"step {i}")
        if i % 50 == 0:
            notice(f"at {i}")
            time.sleep(0.05)
    with progress(3, "reading") as bar:
        bar.advance()
    Path(sys.argv[1]).write_text("done")
    print0("the last line")
entry(main)
"""


@pytest.mark.parametrize("gone", ["reader", "terminal", "disk", "closed", "all closed"])
def test_a_print_that_fails_costs_the_print_alone(tmp_path, gone):
    """The reader of a pipe ends, a terminal is closed, the log's disk is full, there is none."""
    command = [sys.executable, "-c", LIVES_ON, str(tmp_path / "end")]
    streams: dict = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    if gone == "terminal":
        ours, theirs = os.openpty()
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        os.read(ours, 5)
        os.close(ours)
    elif gone == "reader":
        process = subprocess.Popen(command, stdout=subprocess.PIPE, **streams)
        process.stdout.read(5)
        process.stdout.close()
    elif gone == "disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("this system has no /dev/full")
        with open("/dev/full", "wb") as full:
            process = subprocess.Popen(command, stdout=full, **streams)
    else:
        closed = ">&-" if gone == "closed" else "<&- >&- 2>&-"
        process = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *command], **streams)
    _, errors = process.communicate(timeout=60)
    assert (tmp_path / "end").read_text() == "done"
    assert process.returncode == 0
    assert b"Traceback" not in (errors or b"") and b"Exception" not in (errors or b"")


READER_GONE = """
from nanochat.base.common import entry
def main():
    for i in range(%d):
        print(i, flush=%s)  # as the chat prints, not print0
entry(main)
"""


@pytest.mark.parametrize(
    ("lines", "flush", "status"), [(1, True, 1), (100_000, False, 1), (1, False, 0)]
)
def test_a_command_whose_own_print_finds_no_reader_ends_quietly(lines, flush, status):
    """Within a print, or only when the interpreter writes out what is left."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", READER_GONE % (lines, flush)]
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120, env=env)
    os.close(writing)
    assert (done.returncode, done.stderr) == (status, b"")


CONTROLS = {
    "CSI": "\x1b[2J",
    "a title (OSC 0)": "\x1b]0;owned\x07",
    "a link (OSC 8)": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "the clipboard (OSC 52)": "\x1b]52;c;ZXZpbA==\x07",
    "C1": "\x9b2J\x9d0;x\x9c\x85\x90",
    "back and over": "good\revil\b\b\b\b",
    "form feed, vertical tab": "\x0b\x0c",
    "NUL, bell, delete": "\0\x07\x7f",
    "shift out": "\x0e\x0f",
    "an override": "\u202etxt.exe\u202c",
    "isolates": "\u2066a\u2067b\u2068c\u2069",
    "half a pair": "a\ud800b\udfff",
}


@pytest.mark.parametrize("text", CONTROLS.values(), ids=CONTROLS)
def test_nothing_printed_moves_the_terminal(text, capsys):
    print0("before", text, "after\tx\ny", sep="|")
    notice(text)
    StatusLine().print(text)
    shown = capsys.readouterr()
    for out in (shown.out, shown.err):
        assert not [c for c in out if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
        assert not set(out) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert shown.out.startswith("before|") and "|after\tx\ny\n" in shown.out


def test_ordinary_text_is_printed_as_it_is(capsys):
    text = "añ 漢字 עברית \u200d👨\u200d👩 [red]x[/red] \\ \t\n"
    print0(text, prefix="\033[90m", suffix="\033[0m")
    assert capsys.readouterr().out == f"\033[90m{text}\033[0m\n"


def test_rich_takes_no_markup(monkeypatch):
    """A description such as [red] or [link=...] is shown, not obeyed."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    out = io.StringIO()
    monkeypatch.setattr("rich.console.Console", partial(Console, file=out, force_terminal=True))
    with progress(3, "[link=http://evil]x[/link]\x1b]0;owned\x07", "[red]") as bar:
        bar.advance()
    assert "[link=http://evil]x[/link]" in out.getvalue() and "\x1b]" not in out.getvalue()


def test_every_print_goes_through_the_filter():
    """A print() elsewhere in the package prints constants, printable(...) or JSON."""
    package = Path(common.__file__).parent.parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                for argument in node.args:
                    text = ast.unparse(argument)
                    ours = isinstance(argument, ast.Constant) or "json.dumps" in text
                    assert ours or "printable(" in text, f"{path}, line {node.lineno}: {text}"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/disk/file"), "cannot write /disk/file .No space"),
        (OSError(28, "No space left on device"), "cannot write a file .No space left on device.:"),
        (OSError(30, "Read-only file system", "x"), "cannot write x .Read-only .* NANOCHAT_BASE"),
        (OSError(122, "Disk quota exceeded", "x"), "cannot write x .Disk quota exceeded"),
        (PermissionError(13, "Permission denied", "x"), "no permission for x: allow it with"),
        (MemoryError(), "out of memory: use a smaller model"),
        (OSError(12, "Cannot allocate memory"), "out of memory: use"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), "out of memory: use"),
        (RuntimeError("could not create a primitive"), "out of memory: use"),
        (RuntimeError("could not create a memory object"), "out of memory: use"),
    ],
)
def test_what_a_machine_refuses_is_one_line_in_every_command(error, says, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as e:
        entry(main)
    assert e.value.code == 2
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize("error", [OSError(2, "No such file"), RuntimeError("a bug"), KeyError(1)])
def test_other_exceptions_are_bugs(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        entry(main)


@pytest.mark.parametrize("lost", [None, False, True])
def test_another_rank_prints_what_rank_0_cannot(monkeypatch, capsys, lost):
    """Its own mistake, after a moment; the loss of another rank only if the lower ones are gone."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    error = UserError("wrong") if lost is None else RankLost("gone")
    if lost:
        error.aloud = True
    with pytest.raises(SystemExit):
        entry(lambda: (_ for _ in ()).throw(error))
    shown = {None: "error: rank 1: wrong\n", False: "", True: "error: rank 1: gone\n"}
    assert capsys.readouterr().err == shown[lost]
