"""
Conversations to train on: named on the command line, rendered once with their supervision masks, mixed by weight.

    tinyworld[@N][:weight]            N conversations of the embedded corpus (default 40,000)
    name=FILE.jsonl[:weight]          one conversation a line, see tasks/customjson.py
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanochat import tinytalk
from nanochat.common import UserError
from nanochat.dataset import Source, parse_sources
from nanochat.tasks import customjson
from nanochat.tokenizer import Tokenizer
from nanochat.tokens import Shards, prepare_conversations

TINYWORLD_CONVERSATIONS = {"train": 40_000, "val": 2_000}


def parse(specs: Sequence[str]) -> list[tuple[Source, int]]:
    """Specifications -> (source, number of conversations asked of a generator). UserError for what cannot be read as conversations."""
    out = []
    for spec in specs:
        head, at, tail = spec.partition("@")
        count, colon, weight = tail.partition(":")
        if head.split("=")[-1] == "tinyworld" and at:
            if not count.isdigit() or int(count) < 1:
                raise UserError(f"conversations {spec}: give a whole number of them, as in tinyworld@{TINYWORLD_CONVERSATIONS['train']}")
            out.append((head + colon + weight, int(count)))
        else:
            out.append((spec, TINYWORLD_CONVERSATIONS["train"]))
    sources = parse_sources([spec for spec, _ in out])
    for s in sources:
        if s.kind == "shards":
            raise UserError(f"{s.name} holds text, not conversations: name a .jsonl file of conversations, or tinyworld")
    return [(s, n) for s, (_, n) in zip(sources, out, strict=True)]


def shards(specs: Sequence[str], split: str, tokenizer: Tokenizer, seed: int = 0) -> list[tuple[Shards, float | None]]:
    """The split of every named source with its weight; `seed` chooses which conversations a generator makes."""
    made = []
    for source, count in parse(specs):
        name = f"{source.name}-talk-{split}"
        if source.kind == "tinyworld":
            n = count if split == "train" else TINYWORLD_CONVERSATIONS["val"]
            identity = f"tinyworld {tinyworld_version()} {split} {seed} {n}"
            conversations: Iterator[dict[str, Any]] = itertools.islice(tinytalk.conversations(seed, split), n)
        else:
            identity = None
            conversations = customjson.conversations(source.paths, split)
        made.append((prepare_conversations(name, conversations, tokenizer, identity=identity), source.weight))
    return made


def tinyworld_version() -> str:
    """A hash of the generator's own files, so that what an older version made is not taken for what this one makes."""
    digest = hashlib.sha256()
    for path in sorted(Path(tinytalk.__file__).parent.glob("tiny*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
