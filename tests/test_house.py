"""
The rules of the house: the import ladder, imports without side effects, sizes, forbidden constructs,
command lines that parse, and flags that do not change by accident. After a deliberate change of a
flag, run `python tests/test_house.py` and review the difference in tests/golden/flags.json.
"""

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import resource
import runpy
import shlex
import subprocess
import sys
import tokenize
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanochat import __main__ as front  # noqa: E402
from nanochat.base import knobs  # noqa: E402
from nanochat.base.commands import command_names  # noqa: E402
from nanochat.base.common import UserError  # noqa: E402

FLAGS = ROOT / "tests" / "golden" / "flags.json"
PACKAGE = sorted(p for p in (ROOT / "nanochat").rglob("*.py"))
COMMANDS = sorted(p for p in (ROOT / "nanochat/commands").glob("*.py") if p.stem != "__init__")
SCRIPTS = sorted(p for p in (ROOT / "scripts").glob("*.py") if p.stem != "__init__")
SOURCES = [
    *PACKAGE,
    *SCRIPTS,
    *sorted((ROOT / "bench").glob("*.py")),
    *sorted((ROOT / "dev").glob("*.py")),
]
SHELL = sorted((ROOT / "runs").glob("*.sh"))
ALIASES = {"chat_web": "serve"}  # scripts under a second name: nanochat's users know chat_web
SHIPPED = sorted(ROOT.glob("nanochat/export/modeling_*.py"))  # copied into exports, never imported
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MUST_WORK = """
python -m scripts.tok_train --vocab_size=24576 --max_chars=2000000000
python -m scripts.base_train --depth=4 --model_dim=512 --head_dim=64 --num_iterations=954 --target_param_data_ratio=-1 \\
    --device_batch_size=48 --run=$WANDB_RUN
torchrun --standalone --nproc_per_node=2 -m scripts.base_train -- --depth=4
python -m scripts.base_complete --device-type cpu -t 0.5 -m 200
python -m scripts.chat_cli -i sft -p "Hello there"
python -m nanochat.dataset -n 15
"""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def extras() -> set[str]:
    """The import names of the optional packages, which may be missing when a module is imported."""
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return {
        re.split(r"[\[<>=~! ]", need)[0].replace("-", "_")
        for needs in optional.values()
        for need in needs
    }


# ---- structure


def test_the_ladder():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_says_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), (
        "every file needs a docstring that says what it is for"
    )


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_a_command_is_one_thin_main(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    main = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"), None)
    assert main is not None and len(main.args.defaults) == len(main.args.args), "main(argv=None)"
    assert ast.unparse(tree.body[-1]).endswith("entry(main)") and ast.unparse(
        tree.body[-1]
    ).startswith("if __name__ == '__main__'")


def test_every_command_has_a_script():
    assert [p.stem for p in SCRIPTS if p.stem not in ALIASES] == [p.stem for p in COMMANDS]
    for path in SCRIPTS:
        command = ALIASES.get(path.stem, path.stem)
        assert f"from nanochat.commands.{command} import main" in path.read_text(encoding="utf-8")


# ---- size and form

# Python tokens per room, without comments and docstrings. "." are the files directly in nanochat/;
# a room within a room counts on its own. Lower a ceiling when you delete something; raise it in the
# commit that needs it, and say there what the feature adds.
CEILINGS = {
    ".": 1_485,
    "base": 13_080,
    "tinyworld": 9_550,
    "data": 36_840,
    "model": 26_875,
    "chat": 8_755,
    "chat/serve": 10_865,
    "eval": 20_200,
    "train": 21_595,
    "study": 13_595,
    "plan": 16_085,
    "export": 9_070,
    "commands": 23_465,
}


def tokens_of(path: Path) -> int:
    """Python tokens of a file, without comments, docstrings and line structure."""
    text = path.read_text(encoding="utf-8")
    uncounted = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
    read = tokenize.generate_tokens(io.StringIO(text).readline)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = sum(
        ast.get_docstring(node, clean=False) is not None
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented)
    )
    return sum(token.type not in uncounted for token in _strings_as_one(read)) - docstrings


def _strings_as_one(read):
    """The tokens of Python 3.11, to which an f-string is one: later ones count its parts."""
    depth = 0
    for token in read:
        name = tokenize.tok_name[token.type]
        depth -= name.endswith("STRING_END")
        if not depth and not name.endswith("STRING_END"):
            yield token
        depth += name.endswith("STRING_START")


def room_of(path: Path) -> str:
    """The longest key of CEILINGS that contains the file."""
    folder = path.relative_to(ROOT / "nanochat").parent
    rooms = [room for room in CEILINGS if room != "." and folder.is_relative_to(room)]
    return max(rooms, key=len, default=str(folder))


def test_every_room_has_a_ceiling():
    assert {room_of(path) for path in PACKAGE} <= set(CEILINGS)


@pytest.mark.parametrize("room", CEILINGS)
def test_a_room_stays_below_its_ceiling(room):
    sizes = {name_of(p): tokens_of(p) for p in PACKAGE if room_of(p) == room}
    total = sum(sizes.values())
    assert total <= CEILINGS[room], (
        f"{room} has {total:,} tokens: delete something, or raise its ceiling and say why "
        f"({', '.join(f'{name} {n:,}' for name, n in sizes.items())})"
    )


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_function_is_too_complex(path):
    radon = pytest.importorskip("radon.complexity")
    blocks = radon.cc_visit(path.read_text(encoding="utf-8"))
    complex_ones = {f"{name_of(path)} {b.name}" for b in blocks if b.complexity > 20}
    assert complex_ones == set()


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_line_is_longer_than_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert not wide, f"lines {wide}"


# ---- imports have no side effects

WATCH = r"""
import importlib, logging, os, random, signal, sys, threading
import rich.style  # which draws a number from the global generator as it is imported
import torch
def state():
    return {"threads": threading.active_count(), "environment": dict(os.environ), "folder": os.getcwd(), "random": hash(random.getstate()),
            "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], "log handlers": list(logging.root.handlers),
            "seed": torch.initial_seed(), "dtype": torch.get_default_dtype(), "torch threads": torch.get_num_threads()}
before = state()
def probe(name):
    def refuse(*args, **kwargs):
        raise AssertionError(f"{name}() called while importing")
    return refuse
for place, name in [(torch.cuda, "is_available"), (torch.cuda, "device_count"), (torch.cuda, "_lazy_init"), (torch, "compile"),
                    (torch.backends.mps, "is_available"), (torch, "set_num_threads"), (torch, "manual_seed")]:
    setattr(place, name, probe(name))
for module in sys.argv[2:]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] not in sys.argv[1].split(","):
            raise
changed = {k: (before[k], v) for k, v in state().items() if v != before[k]}
assert not changed, changed
"""


def test_importing_has_no_side_effects(tmp_path):
    for folder in ("home", "work"):
        (tmp_path / folder).mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT", "PYTEST", "XDG"))}
    env = kept | {
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    modules = [module_of(p) for p in [*PACKAGE, *SCRIPTS] if p not in SHIPPED]
    command = [sys.executable, "-c", WATCH, ",".join(extras()), *modules]
    done = subprocess.run(command, cwd=tmp_path / "work", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


HELP = r"""
import resource, sys
from nanochat.base.commands import command_names
sys.modules["torch"] = None  # importing it now fails
for name in command_names():
    try:
        module = __import__(f"nanochat.commands.{name}", fromlist=["main"])
        for path, _ in getattr(module, "commands", dict)().values():
            __import__(path)
    except ImportError as e:
        print(name, e)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_utime + usage.ru_stime, file=sys.stderr)
"""


def least(seconds: Callable[[], float], limit: float) -> float:
    """Of up to three measurements, until one is below the limit: a busy machine is slower."""
    measured = [seconds()]
    while min(measured) >= limit and len(measured) < 3:
        measured.append(seconds())
    return min(measured)


def test_help_needs_no_torch():
    """Command modules import torch, and the modules that need it, only inside functions."""

    def seconds() -> float:
        """Of all commands together."""
        command = [sys.executable, "-c", HELP]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "", done.stdout
        return float(done.stderr.split()[-1])

    assert least(seconds, 2.0) < 2.0


@pytest.mark.parametrize("line", ["", "--help", "tok_train -h", "base_train -h", "plan memory -h"])
def test_help_is_instant(line):
    """Measured in processor time, because other processes may be busy."""
    command = [sys.executable, "-m", "nanochat", *line.split()]

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert least(seconds, 0.7) < 0.7


def test_the_front_door_lists_every_command_without_torch():
    code = "import sys, runpy; sys.argv = ['']; runpy.run_module('nanochat', run_name='__main__'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in COMMANDS:
        assert re.search(rf"^  {path.stem} +\w", done.stdout, re.MULTILINE), (
            f"{path.stem} is missing in the list of commands"
        )


@pytest.mark.parametrize("line", ["", "base_train -h", "plan -h", "models", "base_trian"])
def test_a_reader_that_has_gone_ends_no_command_with_a_stack_trace(line, tmp_path):
    """`nanochat ... | head -1`, and head was quicker: nobody reads the pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "nanochat", *line.split()]
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env["PYTHONUNBUFFERED"] = ""
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env=env, timeout=120
    )
    os.close(writing)
    wrong = line == "base_trian"
    assert done.returncode == (2 if wrong else 0)
    assert done.stderr.count("\n") == wrong and ("did you mean" in done.stderr) == wrong


def test_the_front_door_runs_a_command_and_suggests_the_nearest_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanochat", "report", "-h"])
    with pytest.raises(SystemExit) as e:
        front.main()
    assert e.value.code == 0 and "usage: nanochat report" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["nanochat", "base_trian"])
    with pytest.raises(UserError, match="did you mean base_train"):
        front.main()


# ---- forbidden constructs


UNSAFE = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cutlass"}


def offences(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [where + f"import {n}" for n in names if n.split(".")[0] in UNSAFE]
        if isinstance(node, ast.ExceptHandler) and (
            node.type is None or [type(n) for n in node.body] == [ast.Pass]
        ):
            found.append(where + "an error is swallowed silently")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "os.system", "yaml.load"):
            found.append(where + called)
        if options.get("weights_only") == "False" or (
            called == "torch.load" and options.get("weights_only") != "True"
        ):
            found.append(where + "torch.load without weights_only")
        if (
            options.get("allow_pickle") == "True"
            or options.get("shell") == "True"
            or options.get("trust_remote_code") == "True"
        ):
            found.append(where + ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_there_is_no_forbidden_construct(path):
    assert offences(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_forbidden_constructs_are_recognised():
    bad = [
        "import pickle",
        "from dill import load",
        "eval('1')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
    ]
    for code in [
        *bad,
        "np.load(f, allow_pickle=True)",
        "run(c, shell=True)",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept: g()",
    ]:
        assert offences(ast.parse(code)), code
    assert (
        offences(
            ast.parse(
                "model.eval(); torch.load(f, weights_only=True)\ntry: f()\nexcept OSError: g()"
            )
        )
        == []
    )


def test_no_file_names_a_path_of_a_machine_or_a_registry():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = (
        [ROOT / f for f in listed.stdout.splitlines()]
        if listed.returncode == 0
        else [*SOURCES, *SHELL, README]
    )
    words = (
        "/" + "work/",
        "/" + "root/",
        r"/home/\w",
        r"/Us" r"ers/\w",
        r"/tmp/\w+/\w",
        r"py" r"pi\.org",
        "pythonhosted",
        "index-url",
    )
    named = re.compile("|".join(words))
    found = []
    for f in files:
        if f.is_file() and f.suffix in (".py", ".sh", ".md", ".toml", ".json", ".html", ".txt", ""):
            lines = f.read_text(encoding="utf-8", errors="ignore").splitlines()
            found += [
                f"{name_of(f)}:{i}: {m[0]}"
                for i, line in enumerate(lines, 1)
                if (m := named.search(line)) and f != Path(__file__)
            ]
    assert found == []


# ---- command lines


def knobs_of(module_name: str) -> type:
    """
    The knobs of a command: the one dataclass that its module defines and whose name ends with Knobs. A class
    that another of them extends is shared with other commands and does not count.
    """
    module = importlib.import_module(module_name)
    defined = [
        c
        for name, c in vars(module).items()
        if name.endswith("Knobs") and isinstance(c, type) and c.__module__ == module_name
    ]
    (cls,) = [c for c in defined if not any(c in other.__mro__[1:] for other in defined)]
    return cls


def knob_classes(command: str) -> dict[str, type]:
    """
    The classes that a command parses its flags into: {"base_train": PretrainKnobs}. A command of several
    declares the module of each in commands(): {"plan memory": MemoryKnobs, "plan arch": ArchKnobs, ...}.
    """
    module = importlib.import_module(f"nanochat.commands.{command}")
    if several := getattr(module, "commands", None):
        return {f"{command} {name}": knobs_of(path) for name, (path, _) in several().items()}
    return {command: knobs_of(module.__name__)}


def command_lines(text: str) -> list[tuple[str, list[str]]]:
    """
    Every `nanochat X ...`, `-m scripts.X ...` or `-m nanochat.X ...` in a shell text: the command and its
    words, with 1 for each variable.
    """
    found = []
    start = r"(?:-m[ \t]+(?:scripts\.|nanochat\.|nanochat[ \t]+)|^[ \t]*nanochat[ \t]+(?=\w))"
    lines = re.compile(start + r"(\w+)(?=([^\n]*))", re.MULTILINE)
    for m in lines.finditer(text.replace("\\\n", " ")):
        rest = re.sub(r"\d?>>?\s*(&\d|\S+)", " ", m[2])
        rest = re.sub(
            r'"?\$(@|\*|\{\w+\[@\](\+"\$\{\w+\[@\]\}"|[^}]*)\})"?', " ", rest
        )  # "$@" and arrays can hold anything
        rest = re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", "1", rest)
        lexer = shlex.shlex(rest.replace("`", " ; "), posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if set(word) <= set("();<>|&"):
                break
            words.append(word)
        found.append((m[1], words))
    return found


def check(command: str, words: list[str]) -> None:
    classes = knob_classes(command)
    if command not in classes and words:  # a command with subcommands
        command, words = f"{command} {words[0]}", words[1:]
    elif command not in classes:  # its list of subcommands
        return
    assert command in classes, f"{command}: choose from {', '.join(classes)}"
    if not {"-h", "--help"} & set(words):
        knobs.parse(classes[command], words, command=command)


def code_of(page: Path) -> str:
    """The code blocks of a Markdown page without those in Python, and its inline code, line by line."""
    text = page.read_text(encoding="utf-8")
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    blocks = [code for language, code in fence.findall(text) if language != "python"]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", fence.sub("", text))])


def all_lines() -> list[tuple[str, str, list[str]]]:
    texts = {
        "the issue": MUST_WORK,
        **{name_of(p): code_of(p) for p in PAGES},
        **{name_of(p): p.read_text(encoding="utf-8") for p in SHELL},
    }
    return [
        (where, command, words)
        for where, text in texts.items()
        for command, words in command_lines(text)
        if not command.isupper()  # COMMAND, NAME
    ]


@pytest.mark.parametrize(
    ("where", "command", "words"),
    all_lines(),
    ids=lambda v: v if isinstance(v, str) else " ".join(v)[:60],
)
def test_every_command_line_parses(where, command, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    written_earlier = [  # recipes that a command before this one writes
        i
        for i, word in enumerate(words)
        if word == "--recipe" and not Path(words[i + 1]).expanduser().exists()
    ]
    skipped = {*written_earlier, *(i + 1 for i in written_earlier)}
    check(command, [word for i, word in enumerate(words) if i not in skipped])


def test_command_lines_are_found():
    first = '"$PY" -m scripts.a --b=$X --c "two words" \\\n  --d ${Y:-3} "$@" > log 2>&1 || exit 1'
    second = "torchrun -m scripts.b -- --e && python -m nanochat f # g\nnanochat h --i 2"
    assert command_lines(first) == [("a", ["--b=1", "--c", "two words", "--d", "1"])]
    assert command_lines(second) == [("b", ["--", "--e"]), ("f", []), ("h", ["--i", "2"])]


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.toml")), ids=name_of)
def test_every_recipe_parses(path):
    for table in tomllib.loads(path.read_text(encoding="utf-8")):
        if table in command_names():
            for command, cls in knob_classes(table).items():
                knobs.parse(cls, ["--recipe", str(path)], command=command)


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_every_shell_script_is_valid(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["sh", "py", "toml", "json", "md"])
def test_a_checkout_has_lf_on_every_system(kind, tmp_path):
    """git for Windows would write CRLF, which bash refuses and which changes hashes of files."""
    (tmp_path / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    (tmp_path / f"a.{kind}").write_bytes(b"one\ntwo\n")
    git = ["git", "-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / f"a.{kind}").unlink()
    subprocess.run([*git, "checkout", "-q", "--", "."], cwd=tmp_path, check=True)
    assert (tmp_path / f"a.{kind}").read_bytes() == b"one\ntwo\n"


def help_of(name: str, *words: str) -> str:
    """The help of a command at a width of 100 columns, as dev/commands_page.py has it printed."""
    main = importlib.import_module(f"nanochat.commands.{name}").main
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*words, "-h"])
    return printed.getvalue().strip()


def test_the_page_of_commands_is_current(monkeypatch, capsys):
    """Each help is made in this process, and two of them in processes of their own as well."""
    script = runpy.run_path(str(ROOT / "dev" / "commands_page.py"))
    monkeypatch.setenv("COLUMNS", "100")
    for words in (["base_train"], ["plan", "memory"]):
        assert script["help_of"](*words) == help_of(*words)
    monkeypatch.setitem(script["main"].__globals__, "help_of", help_of)
    monkeypatch.setattr(sys, "argv", ["commands_page.py", "--check"])
    assert script["main"]() == 0, capsys.readouterr().out


# ---- flags are frozen


def flags(cls: type) -> dict[str, str]:
    """The type and default of every flag, in words."""
    hints = typing.get_type_hints(cls)
    return {
        f.name: f"{getattr(t, '__name__', t) if type(t := hints[f.name]) is type else t} = {f.default!r}"
        for f in dataclasses.fields(cls)
    }


def all_flags() -> dict[str, dict[str, str]]:
    return {
        name: flags(cls)
        for command in command_names()
        for name, cls in knob_classes(command).items()
    }


@pytest.mark.parametrize("command", command_names())
def test_flags_are_frozen(command):
    frozen = json.loads(FLAGS.read_text()) if FLAGS.exists() else {}
    for name, cls in knob_classes(command).items():
        assert flags(cls) == frozen.get(name), (
            f"the flags of {name} changed; if you meant it, run python tests/test_house.py"
        )


@pytest.mark.parametrize("command", command_names())
def test_every_knob_is_explained_and_no_alias_is_taken_twice(command):
    for cls in knob_classes(command).values():
        assert dataclasses.is_dataclass(cls)
        assert [f.name for f in dataclasses.fields(cls) if not f.metadata.get("help")] == []
        aliases = [f.metadata["alias"] for f in dataclasses.fields(cls) if f.metadata.get("alias")]
        assert len(aliases) == len(set(aliases))


if __name__ == "__main__":
    FLAGS.parent.mkdir(exist_ok=True)
    FLAGS.write_text(json.dumps(all_flags(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {FLAGS}: review the difference before you commit it")
