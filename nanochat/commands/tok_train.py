"""
Train the tokenizer on the training split of the data, in proportion to the weights of a mixture, and save it where every stage looks
for it. A tokenizer that was there and differs is moved aside, not destroyed: checkpoints made with it need it.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.base import knobs
from nanochat.base.common import UserError, base_dir, duration, entry, human, notice, print0
from nanochat.base.knobs import knob
from nanochat.data.documents import MAX_CHARACTERS
from nanochat.data.sources import mixed, parts, training_sources
from nanochat.data.tokenizer import Tokenizer

SAMPLE_CHARS = 2_000_000  # of validation text, to measure the bytes a token


@dataclass(kw_only=True)
class Knobs:
    """Tokenizer"""

    data: tuple[str, ...] = knob(
        (), "text to train on, as for base_train (default: downloaded shards, else tinyworld)"
    )
    vocab_size: int = knob(65_536, "tokens of the vocabulary, special ones included")
    max_chars: int = knob(2_000_000_000, "characters to read at most", low=1)
    doc_cap: int = knob(
        MAX_CHARACTERS,
        "characters of a document to read at most, so that long ones do not dominate",
        low=1,
    )


class Reading:
    """Texts pass through: each is capped, all are counted, and what has been read is shown."""

    def __init__(self, texts: Iterable[str], k: Knobs, total: int):
        self.texts, self.doc_cap, self.max_chars, self.total = (
            texts,
            k.doc_cap,
            k.max_chars,
            max(1, min(total, k.max_chars)),
        )
        self.chars = self.documents = 0

    def __iter__(self) -> Iterator[str]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
        )
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task("reading", total=self.total, done="")
            shown = time.monotonic()
            for text in self.texts:
                text = text[: min(self.doc_cap, self.max_chars - self.chars)]
                self.chars += len(text)
                self.documents += 1
                yield text
                if self.chars >= self.max_chars:
                    break
                bar.update(task, completed=self.chars, done=f"{human(self.chars)} characters")
                if not console.is_terminal and time.monotonic() - shown > 15:
                    shown = time.monotonic()
                    print0(
                        f"  read {human(self.chars)} characters, about {min(1.0, self.chars / self.total):.0%}"
                    )
        print0(f"read {self.documents:,} documents, {human(self.chars)} characters; merging")


def put(tokenizer: Tokenizer, directory: Path) -> None:
    """Save; a different tokenizer that stands there is moved aside."""
    try:
        old = Tokenizer.load(directory)
    except UserError:  # none, or damaged: nothing to keep
        old = None
    if old and old.fingerprint != tokenizer.fingerprint:
        aside = directory.with_name(f"{directory.name}_{old.fingerprint[:8]}")
        if not aside.exists():
            directory.rename(aside)
        notice(
            f"a different tokenizer was in {directory}: it is now {aside}, and what was trained with it does not load with the new one"
        )
    tokenizer.save(directory)


def main(argv: Sequence[str] | None = None) -> dict:
    k, _ = knobs.parse(Knobs, argv, command="tok_train", description=__doc__ or "")
    sources = training_sources(k.data)
    print0(
        f"training a tokenizer of {k.vocab_size:,} tokens on {', '.join(source.name for source in sources)}"
    )
    began = time.monotonic()
    reading = Reading(
        mixed(sources, "train"),
        k,
        sum(part.size for source in sources for part in parts(source, "train")),
    )
    tokenizer = Tokenizer.train(reading, k.vocab_size)
    seconds = time.monotonic() - began
    directory = base_dir() / "tokenizer"
    put(tokenizer, directory)

    sample = list(mixed(sources, "val", max_chars=SAMPLE_CHARS))
    tokens = sum(map(len, tokenizer.encode_batch(sample))) or 1
    bytes_per_token = sum(len(text.encode()) for text in sample) / tokens
    chars_per_token = sum(map(len, sample)) / tokens
    print0(
        f"trained in {duration(seconds)} on {reading.chars:,} characters of {reading.documents:,} documents"
    )
    print0(
        f"{tokenizer.vocab_size:,} tokens; on validation text {bytes_per_token:.2f} bytes and {chars_per_token:.2f} characters a token"
    )
    print0(f"saved to {directory}")
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "seconds": seconds,
        "chars": reading.chars,
        "documents": reading.documents,
        "bytes_per_token": bytes_per_token,
        "chars_per_token": chars_per_token,
    }


if __name__ == "__main__":
    entry(main)
