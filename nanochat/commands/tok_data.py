"""Tokenise text in advance: make the token shards that base_train would otherwise make first."""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.base.common import counted, entry, print0
from nanochat.base.knobs import ReadingKnobs, knob, parse


@dataclass(kw_only=True)
class TokenizeKnobs(ReadingKnobs):
    """Data"""

    data: tuple[str, ...] = knob(
        (), "text, as for base_train (default: downloaded shards, else tinyworld)"
    )
    dry_run: bool = knob(False, "say what the data holds, and stop")


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Tokenise both splits of every source; returns their tokens, as in {"books-train": N}."""
    knobs, _ = parse(TokenizeKnobs, argv, command="tok_data")

    from nanochat.data import inventory
    from nanochat.data.shards import prepare
    from nanochat.data.sources import training_sources
    from nanochat.data.tokenizer import Tokenizer

    sources = training_sources(knobs.data, knobs.skip_bad_rows)
    inventory.show(sources)
    if knobs.dry_run:
        return {}
    tokenizer = Tokenizer.load()
    tokens = {}
    for source in sources:
        for split in ("train", "val"):
            shards = prepare(source, split, tokenizer)
            tokens[f"{source.name}-{split}"] = shards.total
            documents = counted(len(shards), "documents")
            print0(f"{source.name} ({split}): {documents}, {shards.total:,} tokens")
    return tokens


if __name__ == "__main__":
    entry(main)
