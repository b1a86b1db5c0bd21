"""
The runs behind the rules for small corpora in nanochat/train/scaling.py: one author's prose of 0.3,
1 and 3 MB, of which a tenth is held out by document.

    python dev/mine_experiments.py --texts BOOK [BOOK ...]              what is left to run
    python dev/mine_experiments.py --texts BOOK [BOOK ...] --only KEY   one of them

Every finished run is a line of dev/results/mine.jsonl with its curve of held-out bits per byte, and
is not run again. dev/LOG.md has the tables.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results" / "mine.jsonl"
BATCH = 4096
DOCUMENT = 2000  # characters
SHARE = 0.1  # held out
MACHINE = "--device_type=cpu --dtype=bfloat16 --compile=off --keep=1 --sample_every=0"
FLAGS = f"--head_dim=64 --sequence_len=256 --total_batch_size={BATCH} --lookback=on {MACHINE}"


class Arm(NamedTuple):
    """One run: megabytes of text, vocabulary, passes over the text, layers, width, other flags."""

    megabytes: float
    vocabulary: int
    passes: float
    depth: int = 3
    width: int = 128
    flags: str = ""
    seed: int = 1

    @property
    def key(self) -> str:
        parts = [f"{self.megabytes:g}MB v{self.vocabulary} p{self.passes:g}"]
        parts += [f"{self.depth}x{self.width}", self.flags.replace("--", ""), f"s{self.seed}"]
        return " ".join(filter(None, parts))


ARMS = [
    # how many passes before held-out loss turns, and a schedule that is over by then
    Arm(0.3, 1024, 24),
    Arm(0.3, 1024, 4),
    # the vocabulary, at equal passes
    *(Arm(0.3, v, 4) for v in (512, 2048, 4096)),
    Arm(1, 2048, 5),
    # size, and weight decay, where the text is used up
    Arm(0.3, 1024, 4, width=256),
    Arm(0.3, 1024, 4, depth=2, width=64),
    Arm(0.3, 1024, 4, flags="--weight_decay=0.3"),
    Arm(0.3, 1024, 8, flags="--weight_decay=0.3"),
    *(Arm(1, v, 3) for v in (1024, 2048, 4096, 8192)),
    Arm(0.3, 1024, 8),
    # second seeds
    *(Arm(0.3, v, 4, seed=2) for v in (512, 1024, 2048, 4096)),
    *(Arm(3, v, 1) for v in (2048, 4096, 8192)),
]


def texts(books: list[str], folder: Path, megabytes: float) -> Path:
    """The first megabytes of the books in documents of DOCUMENT characters, one per line."""
    path = folder / "text.jsonl"
    if not path.exists():
        text = "\n".join(Path(book).read_text(encoding="utf-8") for book in books)
        text = text[: int(megabytes * 1e6)]
        cuts = range(0, len(text), DOCUMENT)
        rows = [json.dumps({"text": text[cut : cut + DOCUMENT]}) for cut in cuts]
        path.write_text("\n".join(rows), encoding="utf-8")
    return path


def run(arm: Arm, books: list[str], base: Path) -> dict:
    """Train one arm in a folder of its own; its line of results."""
    folder = base / f"{arm.megabytes:g}-{arm.vocabulary}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    from nanochat.base import logbook
    from nanochat.commands import base_train, tok_train
    from nanochat.data import inventory, sources
    from nanochat.data.shards import prepare
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.stages import run_directory

    inventory.VALIDATION_SHARE = SHARE
    path = texts(books, folder, arm.megabytes)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        tok_train.main([f"--vocab_size={arm.vocabulary}", f"--data=text={path}"])
    tokenizer = Tokenizer.load()
    (source,) = sources.training_sources([f"text={path}"])
    tokens = prepare(source, "train", tokenizer).total
    steps = round(arm.passes * tokens / BATCH)
    tag = arm.key.replace(" ", "_").replace("=", "-")
    began = time.monotonic()
    base_train.main(
        [
            f"--data=text={path}",
            f"--depth={arm.depth}",
            f"--model_dim={arm.width}",
            f"--num_iterations={steps}",
            f"--eval_every={max(1, round(min(1, arm.passes / 6) * tokens / BATCH))}",
            "--eval_tokens=1000000",
            f"--seed={arm.seed}",
            f"--model_tag={tag}",
            "--resume=auto",
            *FLAGS.split(),
            *arm.flags.split(),
        ]
    )
    rows = logbook.read(run_directory("base", tag))
    curve = [
        (round(row["tokens"] / tokens, 2), round(row["val_bpb"], 4))
        for row in rows
        if row["kind"] == "eval"
    ]
    train = [row["loss"] for row in rows if row["kind"] == "train"][-20:]
    return {
        "key": arm.key,
        **arm._asdict(),
        "tokens_per_pass": tokens,
        "steps": steps,
        "curve": curve,
        "best": min(curve, key=lambda point: point[1]),
        "last_train_loss": round(sum(train) / len(train), 4),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--base", default="mine_experiments")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    done = set()
    if RESULTS.exists():
        done = {json.loads(line)["key"] for line in RESULTS.read_text().splitlines()}
    for arm in ARMS:
        if arm.key in done or options.only not in ("", arm.key):
            continue
        if options.list:
            print(arm.key)
            continue
        result = run(arm, options.texts, Path(options.base))
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
