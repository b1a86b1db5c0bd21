"""knobs: precedence, every spelling of a flag, and a one-line message for every mistake."""

import dataclasses
import importlib
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.base import knobs
from nanochat.base.common import UserError
from nanochat.base.knobs import knob


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of the model."""

    depth: int = knob(20, "layers", low=1)
    kv_ratio: float = knob(1.0, "key-value heads as a share of heads", low=0, high=1)
    tie_embeddings: bool = knob(False, "one table for embedding and head")
    activation: Literal["relu2", "gelu"] = knob("relu2", "of the MLP")
    model_dim: int | None = knob(None, "width; none = depth * aspect_ratio")


@dataclasses.dataclass(frozen=True)
class Train(Shape):
    """A made-up command."""

    run: str = knob("dummy", "name of the run")
    data: tuple[str, ...] = knob((), "sources of text")
    ratio: float = knob(20.0, "tokens per parameter")
    prompt: str | None = knob(None, "a prompt", alias="-p")
    compile: bool | None = knob(None, "none = when it pays")
    modes: tuple[Literal["eager", "compiled"], ...] = knob(("eager",), "what to measure")


def read(*argv: str, **kwargs) -> Train:
    return knobs.parse(Train, argv, command="base_train", **kwargs)[0]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--depth=4", {"depth": 4}),
        ("--depth 4", {"depth": 4}),
        ("-- --depth=4", {"depth": 4}),
        ("--depth 4 --depth 6", {"depth": 6}),
        ("--model_dim=512", {"model_dim": 512}),
        ("--model-dim=512", {"model_dim": 512}),
        ("--model-dim none", {"model_dim": None}),
        ("--ratio=-1", {"ratio": -1.0}),
        ("--ratio -1", {"ratio": -1.0}),
        ("--ratio -1e-3", {"ratio": -1e-3}),
        ("--tie_embeddings", {"tie_embeddings": True}),
        ("--tie-embeddings --run x", {"tie_embeddings": True, "run": "x"}),
        ("--tie_embeddings=True", {"tie_embeddings": True}),
        ("--tie_embeddings 1", {"tie_embeddings": True}),
        ("--tie_embeddings=0", {"tie_embeddings": False}),
        ("--tie_embeddings False", {"tie_embeddings": False}),
        ("--no-tie_embeddings", {"tie_embeddings": False}),
        ("--no_tie_embeddings", {"tie_embeddings": False}),
        ("--no-compile", {"compile": False}),
        ("--compile", {"compile": True}),
        ("--compile none", {"compile": None}),
        ("--data a b:0.4 c", {"data": ("a", "b:0.4", "c")}),
        ("--data a --depth 3 --data b", {"data": ("a", "b"), "depth": 3}),
        ("--data=a=x:1 b --run=z", {"data": ("a=x:1", "b"), "run": "z"}),
        ("--data=", {"data": ()}),
        ("--run=", {"run": ""}),
        ("-p hello", {"prompt": "hello"}),
        ("--activation gelu", {"activation": "gelu"}),
        ("--modes compiled", {"modes": ("compiled",)}),
        ("--modes eager compiled", {"modes": ("eager", "compiled")}),
        ("--modes eager --modes=compiled", {"modes": ("eager", "compiled")}),
    ],
)
def test_spellings(argv, expected):
    assert read(*argv.split()) == Train(**expected)


def test_a_prompt_may_begin_with_a_dash():
    assert read("-p", "- a list\n- of things").prompt == "- a list\n- of things"
    assert read("-p=-x").prompt == "-x"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--dept=4", ["--dept", "did you mean --depth?"]),
        ("--modeldim 4", ["--modeldim", "--model_dim"]),
        ("-q 4", ["-q"]),
        ("--depth=four", ["--depth", "a whole number", "'four'"]),
        ("--depth=4.5", ["--depth", "a whole number", "'4.5'"]),
        ("--depth", ["--depth needs a value"]),
        ("--depth --run x", ["--depth needs a value"]),
        ("--depth=0", ["--depth", "at least 1", "0"]),
        ("--kv_ratio=1.5", ["--kv_ratio", "at most 1", "1.5"]),
        ("--kv_ratio=nan", ["--kv_ratio", "nan"]),
        ("--tie_embeddings=maybe", ["--tie_embeddings", "true or false", "'maybe'"]),
        ("--no-tie_embeddings=1", ["--no-tie_embeddings", "no value"]),
        ("--no-depth", ["--no-depth"]),
        ("--activation=swish", ["--activation", "relu2, gelu", "'swish'"]),
        ("--modes eager swift", ["--modes", "eager, compiled", "'swift'"]),
        ("--data", ["--data needs a value"]),
        ("stray", ["'stray'"]),
        ("--depth 4 5", ["'5'"]),
        ("--recipe", ["--recipe"]),
        ("--recipe=missing.toml", ["missing.toml"]),
    ],
)
def test_mistakes_are_one_sentence(argv, words):
    with pytest.raises(UserError) as e:
        read(*argv.split())
    assert all(w in str(e.value) for w in words), str(e.value)
    assert "\n" not in str(e.value)


def test_precedence_and_origins(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[all]\ndepth = 5\nrun = "all"\nunrelated = 1\n[base_train]\nrun = "mine"\nmodel-dim = 64\ndata = ["a", "b"]\n'
    )
    values, origins = knobs.parse(
        Train,
        [f"--recipe={recipe}", "--activation=relu2"],
        command="base_train",
    )
    assert values == Train(
        depth=5,
        run="mine",
        model_dim=64,
        data=("a", "b"),
        activation="relu2",
    )
    assert origins["depth"] == origins["run"] == f"recipe {recipe}"
    assert origins["activation"] == "command line"
    assert origins["kv_ratio"] == "default"
    table = knobs.show(values, origins).splitlines()
    assert len(table) == len(dataclasses.fields(Train))
    assert all(line.endswith("default") for line in table[-3:]) and not table[0].endswith("default")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[base_train]\ndepht = 4", ["depht", "did you mean depth?"]),
        ('[base_train]\ndepth = "4"', ["depth", "a whole number", "'4'"]),
        ("[base_train]\ndepth = true", ["depth", "True"]),
        ("[base_train]\ndepth = 0", ["depth", "at least 1"]),
        ('[base_train]\ndata = "a"', ["data", "one or more values"]),
        ("[base_trian]\ndepth = 4", ["base_trian", "did you mean base_train?"]),
        ("depth = 4", ["depth", "[base_train]"]),
        ("[base_train\n", ["not valid TOML"]),
    ],
)
def test_recipe_mistakes_are_one_sentence(tmp_path, text, words):
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    with pytest.raises(UserError) as e:
        read("--recipe", str(recipe))
    assert all(w in str(e.value) for w in words) and str(recipe) in str(e.value), str(e.value)


def test_a_recipe_may_say_none(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[base_train]\nmodel_dim = "none"\n')
    assert read("--recipe", str(recipe)).model_dim is None


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        read("--depth=4", "-h", description="Pretrain a model.")
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert (
        "Pretrain a model." in out and "A made-up command:" in out and "Shape of the model:" in out
    )
    assert out.index("--run TEXT") < out.index("--depth N")  # the command's own knobs come first
    assert (
        "layers [20]" in out
        and "-p, --prompt" in out
        and "--[no-]tie_embeddings" in out
        and "relu2|gelu" in out
    )
    assert not any(c in out for c in "│╭━")


def test_positional():
    @dataclasses.dataclass
    class Report:
        out: str = knob("report.html", "file to write", alias="-o")
        directories: tuple[str, ...] = knob((), "runs", positional=True)

    values, _ = knobs.parse(Report, ["a", "-o", "x.html", "b"], command="report")
    assert values == Report("x.html", ("a", "b"))
    assert "[DIRECTORIES ...]" in knobs.usage(Report, command="report")


def test_classes_with_the_same_heading_share_a_section_of_the_help():
    @dataclasses.dataclass(kw_only=True)
    class Common:
        """Machine"""

        first: int = knobs.knob(1, "a number")

    @dataclasses.dataclass(kw_only=True)
    class Own(Common):
        """Machine"""

        second: int = knobs.knob(2, "another number")

    page = knobs.usage(Own, command="own")
    assert page.count("Machine:") == 1
    assert page.index("--second") < page.index("--first") < page.index("General:")


sources = st.lists(st.from_regex(r"[a-z/][\w=:/. ]*", fullmatch=True), min_size=1)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    depth=st.integers(1, 10**12), ratio=st.floats(allow_nan=False), data=sources, flag=st.booleans()
)
def test_what_is_written_is_read(depth, ratio, data, flag):
    got = read(
        f"--depth={depth}", "--ratio", str(ratio), "--data", *data, f"--tie_embeddings={flag}"
    )
    assert got == Train(depth=depth, ratio=ratio, data=tuple(data), tie_embeddings=flag)


def test_parsing_does_not_import_torch():
    code = "import sys, nanochat.base.knobs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_recipe_as_editors_save_it(tmp_path, encoding):
    """Notepad and PowerShell write a byte-order mark before UTF-8 or UTF-16."""
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(mark + "# café\r\n[base_train]\r\ndepth = 7\r\n".encode(encoding))
    assert read("--recipe", str(recipe)).depth == 7


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 99999999999999999999, -(2**63)])
@pytest.mark.parametrize("command", ["base_train", "chat_sft", "chat_rl", "chat_cli", "base_eval"])
def test_a_seed_is_within_bounds(command, seed):
    module = importlib.import_module(f"nanochat.commands.{command}")
    with pytest.raises(UserError, match=r"--seed must be at (least 0|most 9223372036854775807)"):
        module.main([f"--seed={seed}"])


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_every_seed_within_bounds_works(seed):
    import torch

    from nanochat.train.knobs import MachineKnobs

    values, _ = knobs.parse(MachineKnobs, [f"--seed={seed}"], command="base_train")
    torch.manual_seed(values.seed)
    np.random.default_rng([values.seed, 1])
    tiny.model(values.seed)
