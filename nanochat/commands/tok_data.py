"""
Tokenise text and conversations in advance: make the token shards that base_train, mid_train and
chat_sft would otherwise make first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.base.common import counted, entry, print0, user_path
from nanochat.base.knobs import ConversationKnobs, knob, parse
from nanochat.data import inventory
from nanochat.data.shards import prepare
from nanochat.data.sources import default_sources, training_sources
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.tasks import mixture


@dataclass(kw_only=True)
class TokenizeKnobs(ConversationKnobs):
    """Data"""

    data: tuple[str, ...] = knob(
        (), "text, as for base_train (default: downloaded shards, else tinyworld)"
    )
    conversations: tuple[str, ...] = knob(
        (),
        "also tokenise these conversations, named as in --data of mid_train and chat_sft; "
        "default = those that these commands choose by default after this text",
    )
    task_dir: str = knob("", "folder with the data sets, as for mid_train")
    dry_run: bool = knob(False, "say what the data holds, and stop")


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Tokenise both splits of every source; returns their tokens, as in {"books-train": N}."""
    knobs, _ = parse(TokenizeKnobs, argv, command="tok_data")
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
    if knobs.conversations:
        tokens |= conversations(knobs, tokenizer)
    return tokens


def conversations(knobs: TokenizeKnobs, tokenizer: Tokenizer) -> dict[str, int]:
    """Tokenise the conversations of the later stages; returns their tokens."""
    folder = user_path(knobs.task_dir) if knobs.task_dir else None
    tokens = {}
    for stage in ("mid", "sft"):
        specs = knobs.conversations
        if specs == ("default",):
            specs = mixture.default(stage, knobs.data or default_sources())
        splits = mixture.of_stage(
            stage,
            specs,
            tokenizer,
            folder=folder,
            name=knobs.name,
            skip_bad_rows=knobs.skip_bad_rows,
            me=knobs.me,
        )
        for split, shards in splits.items():
            count = sum(part.total for part, _ in shards)
            tokens[f"conversations-{stage}-{split}"] = count
            print0(f"conversations of {stage} ({split}): {count:,} tokens")
    return tokens


if __name__ == "__main__":
    entry(main)
