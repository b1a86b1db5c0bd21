"""
How fast text becomes tokens and tokens become batches: MB/s tokenised (reading, hashing and writing included), rows/s of the feed for
each sequence length, padding, and the time to resume. Uses the tokenizer given or trains one on a sample. A table, then a line of JSON.
It keeps nothing: the token shards go to a temporary folder.

    python -m bench.data                                  (4 MB of the embedded corpus)
    python -m bench.data --data books=DIR:0.4 wiki=DIR:0.6 --vocab_size 16384
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.base.common import entry
from nanochat.base.knobs import knob, parse
from nanochat.data.feed import RowFeed
from nanochat.data.shards import prepare
from nanochat.data.sources import mixed, parse_sources
from nanochat.data.tokenizer import Tokenizer


@dataclass
class Knobs:
    data: tuple[str, ...] = knob(("tinyworld@4",), "sources of text")
    vocab_size: int = knob(8192, "of the tokenizer trained here", low=512)
    max_chars: int = knob(4_000_000, "characters to train it on", low=1)
    tokenizer: str = knob("", "the folder of a trained tokenizer to use instead")
    rows: int = knob(64, "rows of a step", low=1)
    seconds: float = knob(3.0, "of reading batches, for each sequence length", low=0.1)


def main() -> None:
    """Measure, print the table and the line of JSON."""
    k, _ = parse(Knobs, command="bench.data")
    sources = parse_sources(k.data)
    tokenizer = (
        Tokenizer.load(Path(k.tokenizer))
        if k.tokenizer
        else Tokenizer.train(mixed(sources, max_chars=k.max_chars), k.vocab_size)
    )
    result: dict = {"vocab_size": tokenizer.vocab_size, "tokenise": {}, "feed": {}}
    with tempfile.TemporaryDirectory() as folder:
        shards, seconds, size = [], 0.0, 0
        print(
            f"{'source':<16} {'documents':>10} {'tokens':>12} {'MB':>8} {'MB/s':>8} {'bytes/token':>12}"
        )
        for source in sources:
            began = time.perf_counter()
            made = prepare(source, "train", tokenizer, Path(folder))
            took = time.perf_counter() - began
            seconds, size = seconds + took, size + made.text_bytes
            shards.append((made, source.weight))
            per_token, rate = made.text_bytes / made.total, made.text_bytes / took / 1e6
            print(
                f"{source.name:<16} {len(made):>10,} {made.total:>12,} {made.text_bytes / 1e6:>8.1f} {rate:>8.2f} {per_token:>12.2f}"
            )
            result["tokenise"][source.name] = {
                "mb_per_s": round(rate, 2),
                "bytes_per_token": round(per_token, 3),
                "tokens": made.total,
            }
        result["mb_per_s"] = round(size / seconds / 1e6, 2)
        print(f"\n{'T':>6} {'rows/s':>10} {'M tokens/s':>11} {'padding':>9} {'resume':>9}")
        for T in (256, 512, 1024, 2048):
            result["feed"][T] = measure = read(shards, k, T)
            million = measure["rows_per_s"] * T / 1e6
            print(
                f"{T:>6} {measure['rows_per_s']:>10,} {million:>11.2f} {measure['padding']:>9.3%} {measure['resume_ms']:>6.0f} ms"
            )
    print(json.dumps(result))


def read(shards: list, k: Knobs, sequence_len: int) -> dict[str, float]:
    """Rows a second while nothing else runs, the share of padded targets, milliseconds from a stored position to its batch."""

    def feed() -> RowFeed:
        return RowFeed(
            shards, rows=k.rows, device_rows=k.rows, sequence_len=sequence_len, total_steps=None
        )

    running = feed()
    next(running)  # the first block is packed
    rows = padding = 0
    began = time.perf_counter()
    while (took := time.perf_counter() - began) < k.seconds:
        (batch,) = next(running)
        rows += len(batch.inputs)
        padding += int((batch.targets < 0).sum())
    state = running.state_dict()
    running.close()
    resumed = feed()
    resumed.load_state_dict(state)
    began = time.perf_counter()
    next(resumed)
    resume = 1e3 * (time.perf_counter() - began)
    resumed.close()
    share = padding / max(rows * sequence_len, 1)
    return {
        "rows_per_s": round(rows / took),
        "padding": round(share, 6),
        "resume_ms": round(resume, 1),
    }


if __name__ == "__main__":
    entry(main)
