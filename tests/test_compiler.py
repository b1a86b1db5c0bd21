"""The compiler of a run: damaged files, failures, signals, seconds, compiling ahead."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

from nanochat.base import common
from nanochat.base.common import UserError
from nanochat.model import loss
from nanochat.train import compiler
from nanochat.train.compiler import (
    Ahead,
    cache_folder,
    guarded,
    remove_all,
    remove_damaged,
    writable_cache,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def library():
    """The bytes of a shared library."""
    import _ctypes

    return Path(_ctypes.__file__).read_bytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(compiler.FOLDER, str(tmp_path / "compiled"))
    torch.compiler.reset()
    yield tmp_path / "compiled"
    torch.compiler.reset()


DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "header only": lambda data: data[:64],
    "less than a header": lambda data: data[:20],
    "without its end": lambda data: data[:-1000],
    "of zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"this is no library, whatever its name says " * 100,
}


@pytest.mark.skipif(sys.platform != "linux", reason="libraries are ELF files on Linux")
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_libraries_are_removed_and_others_stay(folder, library, kind, capsys):
    good, bad = folder / "ab" / "cabc.main.so", folder / "cd" / "sub" / "ccde.main.so"
    for path in (good, bad):
        path.parent.mkdir(parents=True)
        path.write_bytes(library)
    other = bad.with_suffix(".cpp")
    other.write_text("")
    bad.write_bytes(DAMAGE[kind](library))
    assert remove_damaged(folder) == 1
    assert good.exists() and other.exists() and not bad.exists()
    assert "removed 1 damaged file of an interrupted compilation" in capsys.readouterr().err
    assert remove_damaged(folder) == 0 and capsys.readouterr().err == ""


def test_everything_of_torch_is_removed_and_nothing_else(folder):
    for name in ("ab", "fxgraph", "aotautograd", "holidays", "ABC"):
        (folder / name).mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "cd").symlink_to(folder / "holidays")
    remove_all(folder)
    assert {p.name for p in folder.iterdir()} == {"holidays", "ABC", "notes.txt", "cd"}


def failing_backend(failures: int, error: Exception):
    """A compiler that fails so many times."""
    left = [failures]

    def backend(graph, inputs):
        if left[0]:
            left[0] -= 1
            raise error
        return graph.forward

    return backend


ERRORS = [
    ImportError("/x/cab.so: file too short"),
    OSError("invalid ELF header"),
    subprocess.CalledProcessError(1, "g++"),
    EOFError("Ran out of input"),
]


@pytest.mark.parametrize("failures", [0, 1, 5])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_failure_costs_speed_and_no_step(folder, failures, error, capsys, tmp_path):
    """Once: compiled again. Always: the run continues without compiled code, with the same losses."""
    (folder / "fxgraph").mkdir(parents=True)
    m = tiny.model(n_layer=1)
    for block in m.blocks:
        block.compile(dynamic=False, backend=failing_backend(failures, error))
    m.compiled = True
    compiler._watch.install()
    b = tiny.batch()

    def step():
        m.zero_grad()
        hidden = m(b.inputs)
        hidden.float().square().sum().backward()
        return float(hidden.detach().float().sum())

    value = guarded(m, step)
    plain = tiny.model(n_layer=1)
    assert value == pytest.approx(float(plain(b.inputs).detach().float().sum()), rel=1e-5)
    assert m.embed.weight.grad is not None
    err = capsys.readouterr().err
    assert m.compiled == (failures < 2)
    assert err.count("\n") == min(failures, 2) and "Traceback" not in err
    assert (folder / "fxgraph").exists() == (failures == 0)
    assert ("running without torch.compile" in err) == (failures > 1)


def test_more_shapes_than_the_limit_are_an_error_in_tests(folder):
    """Torch alone would run what comes then without the compiler and say nothing."""
    double = torch.compile(lambda x: x + x, dynamic=False, backend=CompileCounter())
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (2, 3):
            double(torch.ones(n))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            double(torch.ones(4))


def test_errors_of_others_are_not_the_compilers(folder):
    m = tiny.model(n_layer=1)
    m.compiled = True
    for error in (UserError("disk full"), ValueError("a bug"), torch.OutOfMemoryError("CUDA")):
        calls = []

        def work(error=error, calls=calls):
            calls.append(1)
            raise error

        with pytest.raises(type(error)):
            guarded(m, work)
        assert calls == [1] and m.compiled


def test_signals_wait_for_the_compiler(folder):
    """A signal that arrives while the compiler runs is delivered after it, once."""
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda *_: seen.append(time.monotonic()))
    try:
        during = []

        def backend(graph, inputs):
            os.kill(os.getpid(), signal.SIGTERM)
            # the mask is what a C++ compiler inherits
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            during.append((len(seen), {signal.SIGINT, signal.SIGTERM} <= blocked))
            return graph.forward

        m = tiny.model(n_layer=1)
        m.blocks[0].compile(dynamic=False, backend=backend)
        m.compiled = True
        compiler._watch.install()
        m(tiny.batch().inputs)
        assert during[0][1] and len(seen) == len(during)
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_compiling_ahead_leaves_nothing_to_compile_and_no_trace(folder, monkeypatch):
    layers, head = CompileCounter(), CompileCounter()
    m = tiny.model(n_layer=2)
    before = tiny.weights(m)
    for block in m.blocks:
        block.compile(dynamic=False, backend=layers)
    both = torch.compile(loss._chunk_both, dynamic=False, backend=head)
    monkeypatch.setattr(loss, "_compiled", lambda: both)
    m.compiled = True
    compiler._watch.install()
    waited = compiler.seconds()
    Ahead.current = Ahead(m, 8, 16)
    assert Ahead.current.wait() >= 0.0 and Ahead.current is None
    assert layers.frame_count == head.frame_count == 1
    assert all(p.grad is None for p in m.parameters())
    assert compiler.seconds() == waited, "nothing in the foreground waited for it"
    m.loss(tiny.batch().inputs, tiny.batch().targets).backward()
    assert layers.frame_count == head.frame_count == 1 and tiny.same(before, tiny.weights(m))


def test_compiling_ahead_uses_the_settings_of_the_run(monkeypatch):
    """torch keeps them per thread: the saved activations of a whole run depended on this one."""
    m, seen = tiny.model(), []

    def loss(inputs, targets):
        seen.append(torch._functorch.config.activation_memory_budget)
        return m.embed.weight.sum()

    monkeypatch.setattr(m, "loss", loss)
    with torch._functorch.config.patch(activation_memory_budget=0.7):
        Ahead.current = Ahead(m, 8, 16)
        Ahead.current.wait()
    assert seen == [0.7]


def test_memory_that_runs_out_while_compiling_ahead_is_free_for_the_first_step(monkeypatch):
    m, held = tiny.model(), []

    def loss(inputs, targets):
        x = torch.ones(8)
        held.append(weakref.ref(x))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(m, "loss", loss)
    Ahead.current = ahead = Ahead(m, 8, 16)
    assert ahead.wait() >= 0.0 and Ahead.current is None
    assert held[0]() is None


def test_a_run_that_is_refused_does_not_wait_for_the_compiler(folder):
    m, begun = tiny.model(n_layer=2), []
    started, go = threading.Event(), threading.Event()

    def backend(graph, inputs):
        begun.append(1)
        started.set()
        go.wait(60)
        return graph.forward

    for block in m.blocks:  # two compilations
        block.compile(dynamic=block is m.blocks[1], backend=backend)
    m.compiled = True
    compiler._watch.install()
    ahead = Ahead.current = Ahead(m, 8, 16)
    assert started.wait(60)
    before = time.monotonic()
    ahead.abandon()
    assert time.monotonic() - before < 30 and Ahead.current is None and not ahead.ended.is_set()
    go.set()
    assert ahead.ended.wait(60) and begun == [1]
    assert not [s for s in signal.pthread_sigmask(signal.SIG_BLOCK, []) if s == signal.SIGINT]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_ctrl_c_while_the_compiler_is_waited_for(folder, times, monkeypatch):
    """Python aborts if it ends while a thread is in the compiler, so entry() ends the process."""
    monkeypatch.setattr(common, "unstoppable", running := [])
    monkeypatch.setattr(compiler, "unstoppable", running)
    m, begun, go, ended = tiny.model(n_layer=1), threading.Event(), threading.Event(), []
    here = threading.main_thread().ident

    def backend(graph, inputs):
        begun.set()
        go.wait(600)
        ended.append(1)
        return graph.forward

    m.blocks[0].compile(dynamic=False, backend=backend)
    m.compiled = True
    compiler._watch.install()
    Ahead.current = ahead = Ahead(m, 8, 16)
    assert begun.wait(600)
    for _ in range(times):
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.1, lambda: signal.pthread_kill(here, signal.SIGINT)).start()
            ahead.wait()
    ahead.abandon()
    assert Ahead.current is None and not ended and running[0]()
    exits = []
    monkeypatch.setattr("os._exit", exits.append)
    for error, status in ((KeyboardInterrupt(), 130), (UserError("refused"), 2)):
        with pytest.raises(SystemExit):
            common.entry(lambda error=error: (_ for _ in ()).throw(error))
        assert exits.pop() == status
    common.entry(lambda: None)
    assert not exits, "at the end of its work it waits"
    go.set()
    assert ahead.ended.wait(600)
    assert ended and not running[0]()


@pytest.mark.parametrize("name", ["plain", "with a space", "it's", "ünïcode"])
def test_the_folder_of_compiled_code(tmp_path, monkeypatch, name):
    """In the base folder, unless torch would split its path, or the user named another."""
    monkeypatch.delenv(compiler.FOLDER, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / name))
    ours = tmp_path / name / "compiled"
    assert (cache_folder() == ours) == (name == "plain")
    monkeypatch.setenv(compiler.FOLDER, str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("kind", ["a file", "below a file", "a broken link", "/proc"])
def test_a_folder_that_cannot_be_written_costs_the_cache_alone(folder, kind, monkeypatch, capsys):
    if kind == "/proc":
        monkeypatch.setenv(compiler.FOLDER, "/proc/compiled")
    elif kind == "a broken link":
        folder.symlink_to("nowhere/at all")
    else:
        folder.write_text("")
        name = folder / "inside" if kind == "below a file" else folder
        monkeypatch.setenv(compiler.FOLDER, str(name))
    other = writable_cache()
    assert other.is_dir() and other != folder and cache_folder() == other
    assert f"of this run goes to {other}" in capsys.readouterr().err
    assert writable_cache() == other and not capsys.readouterr().err
    other.rmdir()


PROGRAM = """
import sys, torch
sys.path.insert(0, "tests")
import tiny
from nanochat.train import compiler
m = tiny.randomise(tiny.model(n_layer=1))
compiler.prepare(m)
b = tiny.batch()
loss = compiler.guarded(m, lambda: m.loss(b.inputs, b.targets))
loss.backward()
print(float(loss), m.compiled)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["empty", "half", "of zeros", "every file empty", "killed"])
def test_a_real_cache_that_is_damaged(tmp_path, kind):
    """The next process compiles again, or runs without: the same loss, no trace."""
    folder = tmp_path / "compiled"
    env = {**os.environ, compiler.FOLDER: str(folder), "PYTHONPATH": str(ROOT)}

    def run():
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    if kind == "killed":
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env)
        stop = time.monotonic() + 120
        while not list(folder.glob("*/*.cpp")) and time.monotonic() < stop:
            time.sleep(0.05)
        process.kill()
        process.wait(60)
    else:
        first = run()
        assert first.returncode == 0, first.stderr
        pattern = "**/*" if kind == "every file empty" else "**/*.so"
        for path in folder.glob(pattern):
            if path.is_file():
                damage = DAMAGE.get(kind, DAMAGE["empty"])
                path.write_bytes(damage(path.read_bytes()))
    done = run()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    loss, compiled = done.stdout.split()[-2:]
    b = tiny.batch()
    expected = float(tiny.randomise(tiny.model(n_layer=1)).loss(b.inputs, b.targets))
    assert float(loss) == pytest.approx(expected, rel=1e-4) and compiled == "True"
    shutil.rmtree(folder, ignore_errors=True)
