"""The wheel holds everything: installed elsewhere, it lists its commands and trains."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def nanochat(tmp_path_factory):
    """A function that runs the installed command `nanochat` in an empty folder; it returns the output."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    shutil.copytree(
        ROOT / "nanochat", source / "nanochat", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True)
    home = folder / "venv"
    venv.create(home)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    # The dependencies are those of this environment; the file that makes an editable installation
    # of the project visible here has no effect there.
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = folder.glob("nanochat-*.whl")
    install = [*pip, "--python", home / "bin" / "python", "install", "--ignore-installed"]
    subprocess.run([*install, "--no-deps", "--no-index", wheel], check=True)
    (folder / "elsewhere").mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RANK", "WORLD"))}
    env |= {"NANOCHAT_BASE_DIR": str(folder / "base"), "OMP_NUM_THREADS": "1"}

    def run(*argv: str) -> str:
        command = [home / "bin" / "nanochat", *argv]
        done = subprocess.run(
            command, cwd=folder / "elsewhere", env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_installed_command_lists_all_commands(nanochat):
    listed = nanochat("--help")
    assert "usage: nanochat COMMAND" in listed
    for path in (ROOT / "nanochat" / "commands").glob("[!_]*.py"):
        assert f"  {path.stem} " in listed


def test_the_installed_package_trains(nanochat, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {i}th cat sat on mat number {i}." for i in range(2000)))
    data = ["--data", f"cats={text}"]
    nanochat("tok_train", *data, "--vocab_size=300")
    shape = ["--depth=1", "--model_dim=32", "--head_dim=16", "--sequence_len=64"]
    sizes = ["--total_batch_size=512", "--num_iterations=10", "--eval_tokens=1000"]
    machine = ["--device_type=cpu", "--dtype=float32"]
    printed = nanochat("base_train", *data, *shape, *sizes, *machine)
    assert "step 10" in printed
    assert "RTX 4090" in nanochat("plan", "arch", "--depth=4", "--gpu=rtx4090")  # from gpus.toml


# ---- the packages that the scripts install


CONSTRAINTS = ROOT / "runs" / "constraints.txt"


def test_every_pinned_package_has_hashes_and_names_no_host():
    text = CONSTRAINTS.read_text()
    assert "://" not in text and "--index" not in text and "@" not in text
    entries = runpy.run_path(str(ROOT / "dev" / "constraints.py"))["blocks"](text)
    assert len(entries) > 80
    for entry in entries[1:]:
        if not entry.startswith("#"):
            assert re.match(r"[a-z0-9._-]+==\S+( ; [^\n]+)? \\\n    --hash=sha256:\w{64}", entry), (
                entry
            )


@pytest.mark.parametrize(
    ("extra", "part"), [("serve", 0), ("test", 1), ("export", 1), ("documents", 1)]
)
def test_pins_agree_with_what_the_project_asks_for(extra, part):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *optional["serve"], *optional[extra]]
    text = CONSTRAINTS.read_text()
    until = len(text) if part else text.index("\n# for the tests\n")
    pins = re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", text[:until], re.MULTILINE)
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        if name not in ("torch", "triton", "nanochat"):
            versions = [version for pinned, version in pins if pinned == name]
            assert versions and all(requirement.specifier.contains(v) for v in versions), name


def test_packages_that_differ_are_named(monkeypatch, tmp_path):
    script = runpy.run_path(str(ROOT / "dev" / "constraints.py"))
    text = re.sub(r"(?m)^numpy==\S+", "numpy==0.0.1", CONSTRAINTS.read_text())
    (tmp_path / "constraints.txt").write_text(text)
    monkeypatch.setitem(script["pinned"].__globals__, "FILE", tmp_path / "constraints.txt")
    lines = [line for line in script["differences"]() if line.startswith("numpy ")]
    assert len(lines) == 1 and lines[0].endswith("(runs/constraints.txt: 0.0.1)")
