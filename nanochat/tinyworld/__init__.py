"""The embedded corpus: a small consistent world, its documents and its conversations."""

from pathlib import Path


def generator_files() -> list[Path]:
    """The files that decide what is generated; keys of cached text contain their hash."""
    return sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".toml"))
