"""
How fast text becomes tokens and tokens become batches: MB/s of tokenisation (reading, hashing and
writing included), rows per second of the feed at each sequence length, padding, and the time to
resume. Uses the tokenizer given or trains one on a sample. Prints a table and a line of JSON; the
token shards go to a temporary folder.

    python -m bench.data                                  (4 MB of the embedded corpus)
    python -m bench.data --data books=DIR:0.4 wiki=DIR:0.6 --vocab_size 16384
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.base.common import columns, entry
from nanochat.base.knobs import knob, parse
from nanochat.data.feed import RowFeed
from nanochat.data.shards import Shards, prepare
from nanochat.data.sources import mixed, parse_sources
from nanochat.data.tokenizer import Tokenizer


@dataclass
class BenchDataKnobs:
    data: tuple[str, ...] = knob(("tinyworld@4",), "sources of text")
    vocab_size: int = knob(8192, "size of the tokenizer trained here", low=512)
    max_chars: int = knob(4_000_000, "characters to train it on", low=1)
    tokenizer: str = knob("", "the folder of a trained tokenizer to use instead")
    rows: int = knob(64, "rows per step", low=1)
    seconds: float = knob(3.0, "how long to read batches at each sequence length", low=0.1)


def main() -> None:
    """Measure; print the tables and the line of JSON."""
    knobs, _ = parse(BenchDataKnobs, command="bench.data")
    sources = parse_sources(knobs.data)
    if knobs.tokenizer:
        tokenizer = Tokenizer.load(Path(knobs.tokenizer))
    else:
        tokenizer = Tokenizer.train(mixed(sources, max_chars=knobs.max_chars), knobs.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        weighted, tokenised, rows = [], {}, []
        bytes_in_all = seconds_in_all = 0.0
        for source in sources:
            started = time.perf_counter()
            shards = prepare(source, "train", tokenizer, Path(folder))
            seconds = time.perf_counter() - started
            size = text_bytes(shards, tokenizer)
            bytes_in_all, seconds_in_all = bytes_in_all + size, seconds_in_all + seconds
            weighted.append((shards, source.weight))
            tokenised[source.name] = {
                "mb_per_s": round(size / seconds / 1e6, 2),
                "bytes_per_token": round(size / shards.total, 3),
                "tokens": shards.total,
            }
            rows.append((source.name, f"{len(shards):,}", *tokenised[source.name].values()))
        print(columns(("source", "documents", "MB/s", "bytes/token", "tokens"), rows))
        feed = {T: measure_feed(weighted, knobs, T) for T in (256, 512, 1024, 2048)}
    table = [
        (
            T,
            f"{f['rows_per_s']:,}",
            f"{f['rows_per_s'] * T / 1e6:.2f}",
            f"{f['padding']:.3%}",
            f["resume_ms"],
        )
        for T, f in feed.items()
    ]
    print("\n" + columns(("T", "rows/s", "M tokens/s", "padding", "resume (ms)"), table) + "\n")
    result = {
        "vocab_size": tokenizer.vocab_size,
        "tokenise": tokenised,
        "feed": feed,
        "mb_per_s": round(bytes_in_all / seconds_in_all / 1e6, 2),
    }
    print(json.dumps(result))


def text_bytes(shards: Shards, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that the shards hold."""
    bytes_of = tokenizer.token_bytes()
    return sum(int(bytes_of[shards.tokens(i)].sum()) for i in range(len(shards)))


def measure_feed(shards: list, knobs: BenchDataKnobs, sequence_len: int) -> dict[str, float]:
    """
    Rows per second while nothing else runs, the share of padded targets, and the milliseconds from
    a stored position to its batch.
    """

    def new_feed() -> RowFeed:
        return RowFeed(shards, rows=knobs.rows, device_rows=knobs.rows, sequence_len=sequence_len)

    feed = new_feed()
    next(feed)  # packs the first block
    rows = padding = 0
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < knobs.seconds:
        (batch,) = next(feed)
        rows += len(batch.inputs)
        padding += int((batch.targets < 0).sum())
    state = feed.state_dict()
    feed.close()
    resumed = new_feed()
    resumed.load_state_dict(state)
    started = time.perf_counter()
    next(resumed)
    resume = 1e3 * (time.perf_counter() - started)
    resumed.close()
    return {
        "rows_per_s": round(rows / seconds),
        "padding": round(padding / max(rows * sequence_len, 1), 6),
        "resume_ms": round(resume, 1),
    }


if __name__ == "__main__":
    entry(main)
