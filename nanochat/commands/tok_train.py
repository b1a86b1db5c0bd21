"""
Train the tokenizer on the training split of the data, mixed by weight, and save it where every
stage looks for it. A different tokenizer found there is moved aside, because checkpoints made with
it still need it.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.base.common import UserError, base_dir, duration, entry, human, notice, print0
from nanochat.base.files import check_writable
from nanochat.base.knobs import ReadingKnobs, knob, parse
from nanochat.base.progress import progress
from nanochat.data import inventory
from nanochat.data.documents import MAX_CHARACTERS
from nanochat.data.sources import mixed, parts, training_sources
from nanochat.train.chain import Chain, begun
from nanochat.train.scaling import CPU_FLOPS, digits_for, vocabulary_for

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer

SAMPLE_CHARACTERS = 2_000_000  # of validation text, to measure the compression


@dataclass(kw_only=True)
class TrainTokenizerKnobs(ReadingKnobs):
    """Tokenizer"""

    data: tuple[str, ...] = knob(
        (), "text to train on, as for base_train (default: downloaded shards, else tinyworld)"
    )
    vocab_size: int = knob(
        0,
        "tokens in the vocabulary, special ones included (0 = by the size of the text: 2,048 for "
        "0.3 MB, 4,096 for 3 MB, 8,192 from 6 MB on, and on a GPU up to 65,536)",
    )
    digits: int = knob(
        0,
        "maximum digits in one token (0 = 3, or 2 in a vocabulary of up to 2,048); GGUF needs 3 "
        "or 1",
        low=0,
        high=3,
    )
    max_chars: int = knob(2_000_000_000, "read at most this many characters", low=1)
    doc_cap: int = knob(
        MAX_CHARACTERS,
        "read at most this many characters of a document, so that long ones do not dominate",
        low=1,
    )
    dry_run: bool = knob(False, "say what the data holds, and stop")


def capped(
    texts: Iterable[str], knobs: TrainTokenizerKnobs, total: int, counts: Counter[str]
) -> Iterator[str]:
    """
    The texts, cut to doc_cap characters each and max_chars in all; `counts` counts their "chars",
    of which there are up to `total`, and "documents".
    """
    with progress(min(total, knobs.max_chars), "reading", "characters") as bar:
        for text in texts:
            text = text[: min(knobs.doc_cap, knobs.max_chars - counts["chars"])]
            counts.update(chars=len(text), documents=1)
            bar.advance(len(text))
            yield text
            if counts["chars"] >= knobs.max_chars:
                break
    print0(
        f"read {counts['documents']:,} documents, {human(counts['chars'])} characters; now "
        "choosing the tokens"
    )


def save(tokenizer: "Tokenizer", directory: Path) -> None:
    """Save the tokenizer; a different one in `directory` is moved aside first."""
    try:
        old = tokenizer.load(directory)
    except UserError:  # there is none, or only a damaged one
        old = None
    if old and old.fingerprint != tokenizer.fingerprint:
        aside = directory.with_name(f"{directory.name}_{old.fingerprint[:8]}")
        if not aside.exists():
            directory.rename(aside)
        notice(
            f"{directory} held a different tokenizer, which is now in {aside}: models that were "
            "trained with it are loaded with it from there"
        )
    tokenizer.save(directory)


def restore(fingerprint: str) -> bool:
    """Make the tokenizer with this fingerprint the current one again; False if it is gone."""
    from nanochat.data.tokenizer import Tokenizer

    directory = base_dir() / "tokenizer"
    for folder in (directory, directory.with_name(f"tokenizer_{fingerprint[:8]}")):
        with suppress(UserError):  # there is no tokenizer, or only a damaged one
            tokenizer = Tokenizer.load(folder)
            if tokenizer.fingerprint == fingerprint:
                save(tokenizer, directory)
                return True
    return False


def in_chain(chain: Chain, train: Callable[[], dict[str, Any]]) -> None:
    """
    The step of a chain that trains the tokenizer; the diary notes its results. If another chain has
    replaced it before pretraining begins, the tokenizer of this chain is restored.
    """
    diary = chain.diary
    fingerprint = diary.notes.get("fingerprint")
    if fingerprint and not begun("base", diary.tag) and not restore(fingerprint):
        diary.done = [step for step in diary.done if step != "tokenizer"]
    chain.step("tokenizer", "tokenizer", train, noted=dict)


def default_vocabulary(size: float, device_type: str = "auto") -> int:
    """Tokens in the vocabulary of a text of `size` bytes, for the device that will read it."""
    from nanochat.base.runtime import choose_device

    on_cpu = choose_device(device_type).type == "cpu"
    return vocabulary_for(size, CPU_FLOPS if on_cpu else math.inf)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and save the tokenizer; returns its size, fingerprint and compression."""
    knobs, _ = parse(TrainTokenizerKnobs, argv, command="tok_train")
    check_writable(base_dir())

    from nanochat.data.tokenizer import Tokenizer

    sources = training_sources(knobs.data, knobs.skip_bad_rows)
    inventory.show(sources)
    if knobs.dry_run:
        return {}
    names = ", ".join(source.name for source in sources)
    size = sum(part.size for source in sources for part in parts(source, "train"))
    # A PDF is larger than its text
    text_size = min(size, inventory.text_bytes_of(sources), knobs.max_chars)
    vocab_size = knobs.vocab_size or default_vocabulary(text_size)
    print0(f"training a tokenizer with {vocab_size:,} tokens on {names}")
    started = time.monotonic()
    counts: Counter[str] = Counter(chars=0, documents=0)
    texts = capped(mixed(sources, "train"), knobs, size, counts)
    tokenizer = Tokenizer.train(texts, vocab_size, knobs.digits or digits_for(vocab_size))
    seconds = time.monotonic() - started
    sample = list(mixed(sources, "val", max_chars=SAMPLE_CHARACTERS))
    tokens = sum(map(len, tokenizer.encode_batch(sample))) or 1
    tokenizer.bytes_per_token = sum(len(text.encode()) for text in sample) / tokens
    chars_per_token = sum(map(len, sample)) / tokens
    print0(
        f"trained in {duration(seconds)}: {tokenizer.vocab_size:,} tokens; on validation text "
        f"{tokenizer.bytes_per_token:.2f} bytes and {chars_per_token:.2f} characters per token"
    )
    directory = base_dir() / "tokenizer"
    save(tokenizer, directory)
    print0(f"saved to {directory}")
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "seconds": seconds,
        **counts,
        "bytes_per_token": tokenizer.bytes_per_token,
        "chars_per_token": chars_per_token,
    }


if __name__ == "__main__":
    entry(main)
