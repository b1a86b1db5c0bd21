"""
The experiments on copy heads, convolutions and value embeddings in dev/LOG.md: small models on real
text, each with a schedule of its own length, beside the attention priors.

    python dev/parts_experiments.py --texts DIR                     everything that is missing
    python dev/parts_experiments.py --texts DIR --only prose-240    one experiment
    python dev/parts_experiments.py --texts DIR --share 0/2         every other run, for two processes

DIR is as for rap_experiments.py. Every run adds a line to dev/results/parts.jsonl; runs that stand
there are not repeated, so the experiments resume where they stopped, also on another machine. The
mean of the seeds, with a 95 % interval of paired differences, is printed at the end.
"""

import json
import multiprocessing
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import trials
from rap_experiments import prior

from nanochat.base import logbook
from nanochat.commands import base_train
from nanochat.data.feed import RowFeed, State
from nanochat.study.statistics import interval

RESULTS = trials.RESULTS / "parts.jsonl"
VOCABULARY = 4096
SMALL = (
    "--depth=3 --model_dim=192 --head_dim=32 --sequence_len=256 --eval_every=0 "
    "--eval_tokens=16384 --sample_every=0 --compile=on --dtype=bfloat16 --lookback=off"
)
BOTH = "--copy_heads=1 --convolutions"
BEST = "both, values"
PARTS = {
    "none": "",
    "both": BOTH,
    BEST: f"{BOTH} --value_embeddings",
    "hand": "--rap=hand",
    "rules": "--rap=rules",
    "copy heads": "--copy_heads=1",
    "convolutions": "--convolutions",
    "values": "--value_embeddings",
    "repeats first": "",
}
WARM_UP = 0.05  # of the steps of "repeats first": they read random tokens, repeated
LONG = (500, 4096), (1000, 4096), (1465, 8192), (1648, 16384)  # 2, 4, 12, 27 M tokens
RATES = "--matrix_lr=0.01", "--matrix_lr=0.03", "--embedding_lr=0.05", "--embedding_lr=0.2"
TRIES = (
    "--warmdown_ratio=0.65 --final_lr_frac=0.05",
    "--rope_base=100000",
    "--tie_embeddings",
)
OPTIMIZERS = (
    "--polynomials=jordan --embedding_beta2=0.95 --unembedding_beta2=0.95",  # of version 0.1
    "--polynomials=jordan",
    "--polynomials=minimax",
)


class Run(NamedTuple):
    """One training of a condition."""

    experiment: str
    condition: str
    seed: int
    flags: str  # of base_train; --rap=NAME stands for the prior of that generator

    @property
    def key(self) -> tuple[str, str, int]:
        return self.experiment, self.condition, self.seed


def small(
    corpus: str, condition: str, seed: int, steps: int = 240, extra: str = "", batch: int = 2048
) -> Run:
    """A run of so many steps of `batch` tokens; `extra` are flags beside those of the condition."""
    rate = "" if "embedding_lr=" in extra else "--embedding_lr=0.1 "
    name = f"{condition}, {extra}" if extra else condition
    length = f"--total_batch_size={batch} --num_iterations={steps} {rate}"
    return Run(f"{corpus}-{steps}", name, seed, f"{SMALL} {length}{PARTS[condition]} {extra}")


def planned() -> Iterator[Run]:
    """All runs, the most telling first."""
    seeds = 1, 2, 3
    for seed in seeds:
        for corpus in ("prose", "code"):
            for condition in ("none", BEST, "both", "hand", "rules"):
                yield small(corpus, condition, seed)
    for seed in seeds:
        for condition in ("copy heads", "convolutions", "values"):
            yield small("prose", condition, seed)
    for seed in seeds[:2]:  # the best rates of both sides
        for extra in RATES:
            for condition in ("none", BEST):
                yield small("prose", condition, seed, extra=extra)
    for seed in seeds[:2]:
        for extra in TRIES:
            yield small("prose", BEST, seed, extra=extra)
    for steps in (160, 400):
        for seed in seeds:
            for condition in ("none", BEST, "rules"):
                yield small("prose", condition, seed, steps)
    for seed in seeds[:2]:
        for steps, batch in LONG:
            for condition in ("none", BEST, "rules", "repeats first"):
                yield small("prose", condition, seed, steps, batch=batch)
    for seed in seeds:
        for extra in OPTIMIZERS:
            yield small("prose", BEST, seed, extra=extra)


def finished() -> list[dict[str, Any]]:
    """The records of all runs so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def repeated(rows: int, width: int, vocab_size: int, seed: int) -> torch.Tensor:
    """(rows, width) random token ids; each row repeats its first 8 to width / 2 tokens."""
    generator = np.random.default_rng(seed)
    period = generator.integers(8, width // 2, size=(rows, 1))
    once = generator.integers(vocab_size, size=(rows, width))
    return torch.from_numpy(np.take_along_axis(once, np.arange(width) % period, axis=1))


def begin_with_repeats(share: float, vocab_size: int) -> None:
    """
    Let training in this process read `repeated` rows in the first `share` of its steps, from which
    a model of the usual architecture learns to copy.
    """
    original = RowFeed._steps

    def steps(self: RowFeed, state: State) -> Iterator[tuple[torch.Tensor, torch.Tensor, State]]:
        for inputs, targets, after in original(self, state):
            if self.total_steps and after["step"] <= share * self.total_steps:
                rows, width = inputs.shape
                ids = repeated(rows, width + 1, vocab_size, after["step"])
                inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            yield inputs, targets, after

    RowFeed._steps = steps


def command(words: list[str], base: Path, condition: str) -> None:
    """Run base_train in this process, which was forked for it: torch is imported only once."""
    if condition.startswith("repeats first"):
        begin_with_repeats(WARM_UP, VOCABULARY)
    with (base / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    os.chdir(base)
    base_train.main(words)


def train(run: Run, texts: Path, root: Path) -> dict[str, Any] | None:
    """Train and return {val_bpb, tokens, seconds, cpu_seconds}; None if the run failed."""
    corpus = run.experiment.partition("-")[0]
    base = root / corpus
    data = trials.prepared(corpus, texts, base, VOCABULARY)
    flags = run.flags
    for generator in ("hand", "rules"):
        if f"--rap={generator}" in flags:
            path = prior(f"--generator {generator}", base, data, root / "rap_env")
            flags = flags.replace(f"--rap={generator}", f"--rap={path}")
    folder = base / "checkpoints" / "base" / "parts"
    shutil.rmtree(folder, ignore_errors=True)
    words = ["--model_tag=parts", "--keep=1", f"--seed={run.seed}", *flags.split(), "--data", *data]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    child = multiprocessing.get_context("fork").Process(
        target=command, args=(words, base, run.condition)
    )
    child.start()
    child.join()
    if child.exitcode:
        print(f"{run.key} failed: see {base / 'log.txt'}", flush=True)
        return None
    last = {row["kind"]: row for row in logbook.read(folder)}
    return {
        "val_bpb": last["eval"]["val_bpb"],
        "tokens": last["summary"]["tokens"],
        "seconds": round(last["summary"]["seconds"], 1),
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, 1),
    }


def report(records: list[dict[str, Any]]) -> None:
    """Print the mean of every condition and its paired difference to none."""
    by: dict[tuple[str, str], dict[int, float]] = {}
    for r in records:
        by.setdefault((r["experiment"], r["condition"]), {})[r["seed"]] = r["val_bpb"]
    for (experiment, condition), runs in by.items():
        baseline = by.get((experiment, "none"), {})
        differences = [bpb - baseline[seed] for seed, bpb in runs.items() if seed in baseline]
        line = f"{experiment:<12} {condition:<14} {sum(runs.values()) / len(runs):.4f}"
        if condition != "none" and len(differences) > 1:
            change = interval(differences)
            line += f"  {change['mean']:+.4f} ({change['lo']:+.4f} to {change['hi']:+.4f})"
        print(f"{line}  {len(runs)} seeds")


def main() -> None:
    names = list(dict.fromkeys(run.experiment for run in planned()))
    parser = trials.command_line(__doc__ or "", "parts", names)
    parser.add_argument("--share", default="0/1", help="I/N: every N-th run, from number I on")
    options = parser.parse_args()
    first, step = map(int, options.share.split("/"))
    for run in list(planned())[first::step]:
        done = {(r["experiment"], r["condition"], r["seed"]) for r in finished()}
        if run.experiment not in options.only or run.key in done:
            continue
        if result := train(run, options.texts.resolve(), options.base.resolve()):
            record = dict(zip(("experiment", "condition", "seed"), run.key, strict=True))
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "flags": run.flags, **result}) + "\n")
    report(finished())


if __name__ == "__main__":
    main()
