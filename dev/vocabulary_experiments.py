"""
How many tokens a vocabulary should have, at equal time: models of several sizes read English prose
(45 / 40 / 15 %) with vocabularies of several sizes, each for the tokens that it reads in so many
minutes on one core.

    python dev/vocabulary_experiments.py --texts DIR --speeds                 first, on a quiet machine
    python dev/vocabulary_experiments.py --texts DIR --minutes 12.5 --vocab 4096 8192 --sizes 2x128
    python dev/vocabulary_experiments.py --texts DIR --minutes 50 --vocab 8192 --sizes 2x192 --lookback off

DIR is as for plan_trial.py. --speeds measures each model on one thread, twice in turn. Every run has
its own whole schedule, and its bits per byte are of about 400 KB of each source, whatever the
vocabulary. Speeds and runs are rows of dev/results/vocabulary.jsonl; a row that is there is not
made again.
"""

from functools import partial
from typing import Any

import trials

from nanochat.base.common import columns, human, print0
from nanochat.model.config import GPTConfig
from nanochat.plan import machine
from nanochat.study.records import record
from nanochat.train.scaling import LookbackKnobs, batch_for, bytes_per_token, embedding_rate

ROWS = trials.RESULTS / "vocabulary.jsonl"
VOCABULARIES = 2048, 4096, 8192, 16384, 32768
SIZES = "2x128", "2x192", "3x192", "4x256"
T, MICRO_ROWS = 512, 8
EVAL_BYTES = 400_000  # of each source, about
stored, add = partial(trials.stored, ROWS), partial(trials.add, ROWS)


def measure(vocab: int, size: str, lookback: Any, again: int) -> None:
    """Add the speed of a model on this machine, in tokens per second."""
    names = {"kind": "speed", "vocab": vocab, "size": size, "lookback": lookback, "round": again}
    if stored(**names):
        return
    depth, width = map(int, size.split("x"))
    heads = width // 64
    parts = LookbackKnobs(lookback=lookback).lookback_parts(0, True, heads, vocab)
    shape = {"n_layer": depth, "n_embd": width, "n_head": heads, "n_kv_head": heads}
    config = GPTConfig(vocab_size=vocab, sequence_len=T, softcap=0.0, **shape, **parts)
    here = machine.here("cpu", "auto")
    of_step = {"rows": MICRO_ROWS, "accumulation": 2, "compiled": True, "seconds": 8}
    where = {"device_type": "cpu", "dtype": here.dtype}
    made = machine.in_process({"config": vars(config), **of_step, **where})
    print0(f"{vocab:>6} {size} lookback {lookback}: {made['tok_per_sec']:,.0f} tokens per second")
    add({**names, **made, "peak_flops": here.peak_flops})


def train(options: Any, vocab: int, size: str) -> None:
    """Train a model for the tokens that it reads in the time, unless its run is stored."""
    lookback, seed, minutes = options.lookback, options.seed, options.minutes
    names = {"kind": "run", "minutes": minutes, "vocab": vocab, "size": size}
    names |= {"lookback": lookback, "seed": seed}
    speeds = stored(kind="speed", vocab=vocab, size=size, lookback=lookback)
    if stored(**names) or not speeds:
        return
    rate = sum(row["tok_per_sec"] for row in speeds) / len(speeds)
    tokens = minutes * 60 * rate
    batch = batch_for(tokens)
    base = (options.base / str(vocab)).resolve()
    data = trials.prepared("prose", options.texts, base, vocab)
    depth, width = size.split("x")
    tag = f"{minutes:g}-{size}-{lookback}-{seed}"
    words = [f"--depth={depth}", f"--model_dim={width}", "--head_dim=64", f"--sequence_len={T}"]
    words += [f"--num_iterations={round(tokens / batch)}", f"--total_batch_size={batch}"]
    words += [f"--device_batch_size={MICRO_ROWS}", f"--embedding_lr={embedding_rate(batch):.6g}"]
    words += [f"--lookback={lookback}", "--softcap=0", "--compile=on", f"--seed={seed}"]
    read = round(EVAL_BYTES / bytes_per_token(vocab) / T) * T
    words += ["--eval_every=0", f"--eval_tokens={read}", "--sample_every=0", "--keep=1"]
    words += [f"--model_tag={tag}", "--resume=auto", "--save_minutes=5", "--data", *data]
    trials.run(["-m", "scripts.base_train", *words], base)
    made = record(base / "checkpoints" / "base" / tag)
    add({**names, **{n: made[n] for n in ("final_bpb", "steps", "tokens")}, "speed": rate})


def report() -> None:
    lines = []
    for row in sorted(stored(kind="run"), key=lambda r: (r["minutes"], r["vocab"], r["size"])):
        named = (row[n] for n in ("minutes", "vocab", "size", "lookback", "seed"))
        lines.append((*map(str, named), human(row["tokens"]), f"{row['final_bpb']:.4f}"))
    heads = "minutes", "vocabulary", "size", "lookback", "seed", "tokens", "bits per byte"
    print0(columns(heads, lines))


def main() -> None:
    parser = trials.command_line(__doc__ or "", "vocabulary", [])
    parser.add_argument("--minutes", type=float, default=12.5)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--lookback", choices=("on", "off"), default="on")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--speeds", action="store_true", help="only measure the speeds")
    options = parser.parse_args()
    every = [(vocab, size) for vocab in options.vocab for size in options.sizes]
    for again in (1, 2) if options.speeds else ():
        for vocab, size in every:
            measure(vocab, size, options.lookback, again)
    for vocab, size in () if options.speeds else every:
        train(options, vocab, size)
    report()


if __name__ == "__main__":
    main()
