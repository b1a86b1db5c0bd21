"""Tokenise text ahead of a run: the token shards that base_train would make first, for whoever wants to look at them before."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.base import knobs
from nanochat.base.common import entry, print0
from nanochat.base.knobs import knob
from nanochat.data.shards import prepare
from nanochat.data.sources import training_sources
from nanochat.data.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Knobs:
    """Data"""

    data: tuple[str, ...] = knob(
        (), "text, as base_train takes it (default: downloaded shards, else tinyworld)"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    k, _ = knobs.parse(Knobs, argv, command="tok_data")
    tokenizer = Tokenizer.load()
    tokens = {}
    for source in training_sources(k.data):
        for split in ("train", "val"):
            shards = prepare(source, split, tokenizer)
            tokens[f"{source.name}-{split}"] = shards.total
            print0(f"{source.name} ({split}): {len(shards):,} documents, {shards.total:,} tokens")
    return tokens


if __name__ == "__main__":
    entry(main)
