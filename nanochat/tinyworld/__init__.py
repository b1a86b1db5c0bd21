"""The embedded corpus: a small consistent world, its documents and its conversations."""

from pathlib import Path


def generator_files() -> list[Path]:
    """The files that determine what is generated. Keys of cached text contain a hash of them."""
    return sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".toml"))
