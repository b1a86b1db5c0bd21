"""The sandbox: attacks are contained, honest programs run, and without a sandbox nothing runs."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attacks
import pytest
from attacks import ATTACKS

from nanochat.base.common import UserError
from nanochat.eval import sandbox as execution
from nanochat.eval.sandbox import OUTPUT, Outcome, run

ROOT = Path(__file__).resolve().parents[1]
DATA = (
    Path(os.environ.get("NANOCHAT_SHARED_DATA") or ROOT.parent / "shared/data")
    / "humaneval/HumanEval.jsonl"
)
NOBODY = 12345  # the normal user that root becomes here


@functools.cache
def refusal() -> str:
    return execution.missing()


@pytest.fixture
def sandbox():
    if refusal():
        pytest.skip(refusal())


def running(marker: str) -> list[str]:
    """The command lines of the processes that have the marker in them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_text(errors="replace")
        except OSError:  # gone meanwhile
            continue
        found += [text] if marker in text else []
    return found


def soon(condition, seconds: float = 60.0) -> bool:
    """Whether the condition comes true in time: the kernel takes a moment to end processes."""
    deadline = time.monotonic() + seconds
    while (
        not (met := condition()) and time.monotonic() < deadline
    ):  # asked once: what holds now need not hold a moment later
        time.sleep(0.02)
    return bool(met)


class Outside:
    """What the attacks are after: servers that count visitors, a secret file, a secret variable."""

    def __init__(self, folder: Path):
        self.visits: list[str] = []
        self.secret, self.path, abstract = (
            folder / "secret",
            folder / "socket",
            f"nanochat-{uuid.uuid4().hex}",
        )
        self.secret.write_text("the secret")
        self.secret.chmod(0o644)
        self.open = os.open(self.secret, os.O_RDONLY)
        os.set_inheritable(self.open, True)
        self.tcp = self.serve(socket.AF_INET, ("127.0.0.1", 0))
        self.servers = [
            self.tcp,
            self.serve(socket.AF_UNIX, str(self.path)),
            self.serve(socket.AF_UNIX, "\0" + abstract),
        ]
        self.facts = {
            "PORT": str(self.tcp.getsockname()[1]),
            "SOCKET": str(self.path),
            "ABSTRACT": abstract,
            "PID": str(os.getpid()),
            "SECRET": str(self.secret),
            "HOME": str(Path.home()),
            "HERE": __file__,
        }

    def serve(self, family: int, address) -> socket.socket:
        server = socket.socket(family)
        server.bind(address)
        server.listen()
        threading.Thread(target=self.count, args=(server,), daemon=True).start()
        return server

    def count(self, server: socket.socket) -> None:
        while True:
            try:
                server.accept()
            except OSError:  # closed at the end
                return
            self.visits.append(str(server.getsockname()))


@pytest.fixture(scope="module")
def outside():
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)
        patch.setenv("NANOCHAT_TEST_SECRET", "the secret")
        world = Outside(Path(folder))
        yield world
        os.close(world.open)
        for server in world.servers:
            server.close()


def normal_user(outside: Outside, facts: dict[str, str]) -> dict[str, Outcome]:
    """The attacks tried by a normal user, with a Python and a copy of the code they can read."""
    if os.geteuid() != 0:
        pytest.skip("this is a normal user already")
    folder = outside.secret.parent / "code"
    for name in ("__init__", "base/__init__", "base/common", "eval/__init__", "eval/sandbox"):
        target = folder / "nanochat" / f"{name}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "nanochat" / f"{name}.py", target)
    shutil.copy(attacks.__file__, folder)

    def as_user(python: str, *arguments: str) -> subprocess.CompletedProcess:
        who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        return subprocess.run(
            [python, *arguments],
            **who,
            cwd=folder,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )

    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            tried = as_user(
                python,
                "-c",
                "from nanochat.eval import sandbox; print(sandbox.missing())",
            )
        except OSError:  # not there, or not for this user
            continue
        if tried.returncode == 0:
            break
    else:
        pytest.skip("no Python 3.11 here that a normal user may run")
    if tried.stdout.strip():
        pytest.skip(f"as a normal user: {tried.stdout.strip()}")
    tried = as_user(python, "attacks.py", json.dumps(facts))
    assert tried.returncode == 0, tried.stderr
    return {name: Outcome(**outcome) for name, outcome in json.loads(tried.stdout).items()}


@pytest.fixture(scope="module", params=["as I am", "as a normal user"])
def outcomes(request, outside):
    if refusal():
        pytest.skip(refusal())
    marker = uuid.uuid4().hex
    if request.param == "as I am":
        found = attacks.attempt({**outside.facts, "marker": marker, "UID": str(os.getuid())})
    else:
        found = normal_user(outside, {**outside.facts, "marker": marker, "UID": str(NOBODY)})
    assert soon(lambda: not running(marker), 10), running(marker)
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_contained(outcomes, name):
    attack, outcome = ATTACKS[name], outcomes[name]
    assert re.fullmatch(attack.reason, outcome.reason), outcome
    assert re.fullmatch(attack.stdout, outcome.stdout), outcome
    assert outcome.passed == (attack.reason == "")
    assert len(outcome.stdout) + len(outcome.stderr) <= OUTPUT + 3 * 2**16
    assert "the secret" not in outcome.stdout + outcome.stderr


def test_nobody_was_reached(outcomes, outside):
    assert outcomes and not outside.visits
    with socket.create_connection(
        outside.tcp.getsockname(), 5
    ):  # while a visitor from here is seen
        assert soon(lambda: len(outside.visits) == 1)
    outside.visits.clear()


def test_a_token_in_sight_would_be_found(sandbox, monkeypatch):
    """The attack that walks the frames works: it finds a token that is kept in a variable."""
    attack, token = ATTACKS["walking the frames"].program, os.urandom(32)
    monkeypatch.setattr(execution.secrets, "token_bytes", lambda _: token)
    outcome = run(attack)
    assert not outcome.passed and token.hex() not in outcome.stdout
    careless = execution._HARNESS.replace(
        "os.write({proof}, os.read(0, {size}) +",
        "kept = os.read(0, {size})\nos.write({proof}, kept +",
    )
    monkeypatch.setattr(execution, "_HARNESS", careless)
    assert token.hex() in run(attack).stdout


def test_what_passing_does_not_mean(sandbox):
    """A program can fool assertions in its own interpreter, as the module's docstring says."""
    assert run("class A:\n    def __eq__(self, other): return True\nassert A() == 1").passed


def test_deadline_is_kept(sandbox):
    """Not before, and not at the end of a program that would pass without it, after a minute."""
    for program in ("while True: pass", "import time\ntime.sleep(60)"):
        start = time.monotonic()
        assert run(program, seconds=0.3) == Outcome(False, "timeout", "", "")
        assert 0.3 < time.monotonic() - start < 30


def test_ends_with_the_process_that_started_it(sandbox):
    marker = uuid.uuid4().hex
    code = """
import os
from nanochat.eval import sandbox as execution
execution.missing()  # tries the sandbox, which is not the run to wait for
execution._HARNESS = f"# {os.environ['MARKER']}" + execution._HARNESS
execution.run("import signal\\nsignal.pthread_sigmask(0, range(1, 32))\\nwhile True: pass", seconds=600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "MARKER": marker}, cwd=ROOT
    )
    try:
        assert soon(lambda: len(running(marker)) >= 3, 60), (
            parent.poll(),
            running(marker),
        )  # bwrap outside, bwrap inside, Python
    finally:
        parent.kill()
        parent.wait(60)
    assert soon(lambda: not running(marker)), running(marker)


def test_ends_when_interrupted(sandbox, monkeypatch):
    marker = uuid.uuid4().hex
    monkeypatch.setattr(execution, "_HARNESS", f"# {marker}{execution._HARNESS}")
    monkeypatch.setattr(
        execution.selectors.DefaultSelector,
        "select",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        run("while True: pass", seconds=600)
    assert soon(lambda: not running(marker))


HONEST = {
    "": "",
    "print('été 😀')": "été 😀\n",
    "import sys\nprint(sys.stdin.read() == '')": "True\n",
    "# " + "x" * 2**21 + "\nprint(1)": "1\n",
    "print(sorted(globals()))": f"{sorted(['__name__', '__doc__', '__package__', '__loader__', '__spec__', '__builtins__'])}\n",
    "import bz2, ctypes, decimal, hashlib, heapq, itertools, json, math, random, re, statistics, string, typing, unittest\nprint(1)": "1\n",
    "import asyncio\nasync def f(): return 7\nprint(asyncio.run(f()))": "7\n",
    "from concurrent.futures import ThreadPoolExecutor as T\nwith T(4) as t: print(list(t.map(abs, [-1, 2])))": "[1, 2]\n",
    "import typing\nclass A: b: 'A'\nprint(typing.get_type_hints(A)['b'].__name__)": "A\n",
    "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)": "A\n",
    "open('x', 'w').write('y')\nprint(open('/tmp/x').read())": "y\n",
    "if __name__ == '__main__': print(1)": "1\n",
    "import atexit\natexit.register(print, 'bye')": "bye\n",
    "import sys\nprint('e', file=sys.stderr)": "",
    "hash('a')": "",
}

FAILING = {
    "assert 1 == 2, 'no'": "AssertionError: no",
    "import os\nassert os": "",
    "os.getcwd()": "NameError: name 'os' is not defined.*",
    "import numpy": "ModuleNotFoundError: No module named 'numpy'",
    "import pip": "ModuleNotFoundError: No module named 'pip'",
    "def f(:": "SyntaxError: invalid syntax",
    "x = '\ud800'": r"SyntaxError: .*",
    "import sys\nsys.exit(3)": "exit 3",
    "raise SystemExit('words')": "exit 1",
    "import os\nos.abort()": "exit 134",
    "raise MemoryError": "memory",
    "raise ValueError('one\\ntwo')": "two",
    "import resource\n1 / 0": "ZeroDivisionError: .*",
    "print(open('/tmp/x').read())": r"FileNotFoundError: .*",
    "raise ValueError('x' * 10**4)": r"ValueError: x{188}",
    "import sys\nsys.stderr.write('Traceback')\nsys.exit(1)": "exit 1",
}


def test_honest_programs_run(sandbox):
    with ThreadPoolExecutor(2) as pool:
        for program, outcome in zip(HONEST, pool.map(run, HONEST), strict=True):
            assert outcome.passed and not outcome.reason and outcome.stdout == HONEST[program], (
                program[:99],
                outcome,
            )


def test_failures_say_why(sandbox):
    with ThreadPoolExecutor(2) as pool:
        for program, outcome in zip(FAILING, pool.map(run, FAILING), strict=True):
            assert re.fullmatch(FAILING[program], outcome.reason), (program[:99], outcome)
            assert outcome.passed == (FAILING[program] == "")


def test_every_run_is_alike(sandbox):
    program = "print(hash('a'), {'a', 'b', 'c'})"
    assert run(program) == run(program)


def test_memory_limit_is_the_callers(sandbox):
    program = "x = bytearray(100 * 2**20)"
    assert run(program, memory_mb=200).passed
    assert run(program, memory_mb=90).reason == "memory"


def humaneval(step: int) -> None:
    if not DATA.exists():
        pytest.skip(f"needs {DATA.name} in NANOCHAT_SHARED_DATA/humaneval")
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 164
    bodies = [
        (row, body) for row in rows[::step] for body in (row["canonical_solution"], "    pass\n")
    ]
    programs = [
        f"{row['prompt']}{body}\n{row['test']}\ncheck({row['entry_point']})" for row, body in bodies
    ]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda program: run(program, seconds=20.0), programs))
    assert [outcome for outcome in outcomes[::2] if not outcome.passed] == []
    assert [outcome for outcome in outcomes[1::2] if outcome.passed] == []
    assert all(re.match("AssertionError|TypeError", outcome.reason) for outcome in outcomes[1::2])


def test_some_of_humaneval(sandbox):
    humaneval(12)


@pytest.mark.slow
def test_humaneval(sandbox):
    humaneval(1)


@pytest.fixture
def fresh():
    """missing() forgets what it found, before and after."""
    execution.missing.cache_clear()
    yield
    execution.missing.cache_clear()


def refuses() -> str:
    with pytest.raises(UserError) as e:
        run("print(1)")
    assert str(e.value) == execution.missing()
    return execution.missing()


def test_refuses_without_bubblewrap(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install bubblewrap" in refuses()


def test_refuses_elsewhere(fresh, monkeypatch):
    monkeypatch.setattr(execution.platform, "system", lambda: "Darwin")
    assert "needs Linux on x86_64 or aarch64, not Darwin" in refuses()
    execution.missing.cache_clear()
    monkeypatch.setattr(execution.platform, "system", lambda: "Linux")
    monkeypatch.setattr(execution.platform, "machine", lambda: "s390x")
    assert "s390x" in refuses()


@pytest.mark.parametrize(
    "complaint, remedy",
    [
        ("bwrap: No permissions to create new namespace", "docker run --privileged"),
        ("bwrap: Unknown option --size", "bubblewrap 0.7 or later"),
    ],
)
@pytest.mark.parametrize("status", [0, 1])
def test_refuses_where_bubblewrap_fails(fresh, monkeypatch, tmp_path, complaint, remedy, status):
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\necho '{complaint}' >&2\nexit {status}\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(execution.os, "geteuid", lambda: 0)  # no look at this kernel's settings
    assert complaint in refuses() and remedy in refuses()


def test_refuses_a_bubblewrap_that_protects_nothing(sandbox, fresh, monkeypatch, tmp_path):
    """One that just runs what it is given."""
    (tmp_path / "bwrap").write_text(
        '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n'
    )
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "does not work" in refuses()


def test_a_kernel_that_forbids_user_namespaces_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(execution.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(execution, "Path", lambda _, name: tmp_path / name.replace("/", "."))
    assert "container" in execution._remedy("bwrap: setting up uid map: Permission denied")
    (tmp_path / "kernel.apparmor_restrict_unprivileged_userns").write_text("1\n")
    assert "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0" in execution._remedy(
        "bwrap: setting up uid map: Permission denied"
    )


def test_a_sandbox_that_breaks_is_no_failure_of_the_program(sandbox, monkeypatch, tmp_path):
    assert execution.missing() == ""
    for text in ("#!/bin/sh\nexit 0\n", "#!/bin/sh\necho broken >&2\nexit 1\n", "no program\n"):
        (tmp_path / "bwrap").write_text(text)
        (tmp_path / "bwrap").chmod(0o755)
        monkeypatch.setattr(execution.shutil, "which", lambda _: str(tmp_path / "bwrap"))
        with pytest.raises(
            UserError, match=r"failed before the program started|cannot start bubblewrap"
        ):
            run("print(1)")


def test_importing_runs_nothing():
    code = "import sys\nimport nanochat.eval.sandbox as e\nassert e.missing.cache_info().currsize == 0\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "machine, header", [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")]
)
def test_system_call_numbers(machine, header):
    file = Path("/usr/include", header)
    if not file.exists():
        pytest.skip(f"needs {file} (Debian: linux-libc-dev)")
    numbers = {
        name: int(n)
        for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", file.read_text())
    }
    table = {**execution._REFUSED, "clone": execution._CLONE}
    assert {name: numbers.get(name) for name in table} == {
        name: pair[machine] for name, pair in table.items()
    }
    assert numbers["pidfd_send_signal"] == execution._NEW and signal.SIGKILL == 9


def test_no_files_are_left_open(sandbox):
    before = len(os.listdir("/proc/self/fd"))
    for program in ("print(1)", "1/0", "print('x' * 2**22)"):
        run(program)
    with pytest.raises(UserError, match="failed before the program started"):
        run("pass", memory_mb=2**80)
    assert len(os.listdir("/proc/self/fd")) == before
