"""
Write runs/constraints.txt, the packages that runs/quickstart.sh and runs/test.sh install, with
versions and hashes; or say which installed packages differ from it.

    python dev/constraints.py                  # needs uv; takes the newest versions that agree
    python dev/constraints.py --differences

Torch is not in the file: a machine without a GPU takes another build of it, which has other hashes,
and pyproject.toml names its version. Neither are the CUDA packages, whose versions torch names.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "runs" / "constraints.txt"
UNPINNED = re.compile(r"(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==")
TESTS = "# for the tests"  # scripts that only train read to this line
HEAD = f"""\
# Versions and hashes for Python 3.11 and newer, written by dev/constraints.py. Packages below the
# line "{TESTS}" are for the tests. Torch is missing: without a GPU, a machine takes another
# build of it.
"""


def blocks(text: str) -> list[str]:
    """The entries of a requirements file, each with its lines of hashes."""
    return [b for b in re.split(r"\n(?=[a-z0-9])", text.strip()) if not UNPINNED.match(b)]


def name_and_version(block: str) -> tuple[str, str]:
    match = re.match(r"([a-z0-9._-]+)==([^\s;\\]+)", block)
    assert match, f"no pinned version in {block[:80]!r}"
    return match[1], match[2]


def compile_pins(extras: Sequence[str], *words: str) -> list[str]:
    """The entries that uv finds for the project with these extras, for all platforms."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--universal", "--generate-hashes"]
    command += ["--python-version=3.11", "--no-header", "--no-annotate", "--quiet", *words]
    command += [f"--extra={extra}" for extra in extras]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return blocks(done.stdout)


def pinned() -> dict[str, set[str]]:
    """Name -> the versions that the file has for it, one for each range of Pythons."""
    versions: dict[str, set[str]] = {}
    lines = FILE.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if "==" in line and not line.startswith(("#", " ")):
            name, version = name_and_version(line)
            versions.setdefault(name, set()).add(version)
    return versions


def differences() -> Iterator[str]:
    """Lines about installed packages that are not of a version in the file."""
    known = pinned()
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        if name in known and distribution.version not in known[name]:
            wanted = " or ".join(sorted(known[name]))
            yield f"{name} {distribution.version} (runs/constraints.txt: {wanted})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--differences", action="store_true", help="compare with what is installed")
    if parser.parse_args().differences:
        print("\n".join(sorted(differences())) or "no package differs from runs/constraints.txt")
        return
    every = compile_pins(["serve", "documents", "test"])
    training = {name_and_version(block)[0] for block in compile_pins(["serve", "documents"])}
    first = [block for block in every if name_and_version(block)[0] in training]
    rest = [block for block in every if name_and_version(block)[0] not in training]
    FILE.write_text("\n".join([HEAD, *first, "", TESTS, *rest, ""]), encoding="utf-8")
    print(f"wrote {FILE}: {len(first)} packages, and {len(rest)} for the tests")


if __name__ == "__main__":
    main()
