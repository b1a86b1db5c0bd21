"""The embedded corpus: a small consistent world, its documents and its conversations, generated from tinyworld.toml."""

from pathlib import Path


def generator_files() -> list[Path]:
    """The files that decide what is generated; a cache of generated text or tokens carries their hash in its key."""
    return sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".toml"))
