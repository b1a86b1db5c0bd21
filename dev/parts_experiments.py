"""
The experiments on copy heads, convolutions, value and pair embeddings in dev/LOG.md: small models
on real text, each with a schedule of its own length, beside the attention priors.

    python dev/parts_experiments.py --texts DIR                     everything that is missing
    python dev/parts_experiments.py --texts DIR --only prose-240    one experiment
    python dev/parts_experiments.py --texts DIR --share 0/2         every other run, for two processes

DIR is as for rap_experiments.py. Every run adds a line to dev/results/parts.jsonl; runs that stand
there are not repeated, so the experiments resume where they stopped, also on another machine; an
interrupted run continues from its last checkpoint. The mean of the seeds, with a 95 % interval of
paired differences, is printed at the end.
"""

import json
import multiprocessing
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import trials
import tries
from rap_experiments import prior

from nanochat.base import logbook
from nanochat.commands import base_train
from nanochat.study.statistics import interval

RESULTS = trials.RESULTS / "parts.jsonl"
VOCABULARIES = {"prose16k": 16384}  # tokens, where not 4,096
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
    "rules, near": "--rap=near",
    "copy heads": "--copy_heads=1",
    "convolutions": "--convolutions",
    "values": "--value_embeddings",
    "repeats first": "",
}
PRIORS = {  # --rap=NAME: flags of the generator
    "hand": "--generator hand",
    "rules": "--generator rules",
    "near": "--generator rules --band 32",  # the curve of distances ends there
}
LENGTHS = 160, 240, 400  # steps of 2,048 tokens
LONG = (500, 4096), (1000, 4096), (1465, 8192), (1648, 16384)  # 2, 4, 12, 27 M tokens
RATES = "--matrix_lr=0.01", "--matrix_lr=0.03", "--embedding_lr=0.05", "--embedding_lr=0.2"
LONGER_FALL = "--warmdown_ratio=0.65 --final_lr_frac=0.05"
TRIES = (  # flags, and names of tries.py
    (LONGER_FALL, ""),
    ("--rope_base=100000", ""),
    ("--tie_embeddings", ""),
    ("--softcap=0", ""),
    ("--warmup_ratio=0.167", ""),  # 40 steps
    ("--weight_decay=0.1", ""),
    ("--weight_decay=0.1", "cautious"),
    *(("", name) for name in ("momentum 0.97", "MLP input 0.4", "backout")),
)
GOOD = (  # of these, what helped, on more seeds and together
    (LONGER_FALL, ""),
    ("--warmdown_ratio=1", ""),
    ("--warmdown_ratio=1 --final_lr_frac=0.05", ""),
    ("--weight_decay=0.1", ""),
)
PAIRS = (1, 2, 5, 10, 20)  # rows of the table of pairs, per token of the vocabulary
SIZES = {  # other models, by what the names of their experiments end with
    "2x128": "--depth=2 --model_dim=128",
    "3x384": "--model_dim=384 --head_dim=64",
    "6x384": "--depth=6 --model_dim=384 --head_dim=64",
}
WIDER = "--depth=4 --model_dim=256 --head_dim=128 --sequence_len=512"  # as --depth=4 alone
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
    flags: str  # of base_train; --rap=NAME stands for one of PRIORS

    @property
    def key(self) -> tuple[str, str, int]:
        return self.experiment, self.condition, self.seed


def small(
    corpus: str,
    condition: str,
    seed: int,
    steps: int = 240,
    extra: str = "",
    tried: str = "",
    batch: int = 2048,
    size: str = "",
) -> Run:
    """
    A run of so many steps of `batch` tokens; `extra` are flags beside those of the condition,
    `tried` is a name of tries.py, and `size` one of SIZES (the small model without).
    """
    rate = "" if "embedding_lr=" in extra else "--embedding_lr=0.1 "
    # The schedule that was the default when these experiments began
    for flag in "--warmdown_ratio=0.4", "--final_lr_frac=0":
        rate += "" if flag.split("=")[0] in extra else f"{flag} "
    name = ", ".join(part for part in (condition, extra, tried) if part)
    length = f"--total_batch_size={batch} --num_iterations={steps} {rate}"
    flags = f"{SMALL} {SIZES.get(size, '')} {length}{PARTS[condition]} {extra}"
    return Run("-".join(filter(None, (corpus, str(steps), size))), name, seed, flags)


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
        for extra, name in TRIES:
            yield small("prose", BEST, seed, extra=extra, tried=name)
    for seed in seeds:
        for extra, name in GOOD:
            yield small("prose", BEST, seed, extra=extra, tried=name)
    for seed in seeds:
        for rows in PAIRS:
            yield small("prose", BEST, seed, extra=f"--pair_embeddings={rows}")
    for seed in seeds[:2]:
        for rows in (0, 5):
            extra = f"{WIDER} --pair_embeddings={rows}"
            yield small("prose16k", BEST, seed, 300, extra, batch=4096)
        yield small("prose16k", BEST, seed, 300, f"{WIDER} {LONGER_FALL}", batch=4096)
        for steps, batch in LONG:
            yield small("prose", BEST, seed, steps, "--pair_embeddings=5", batch=batch)
        fall = f"{LONGER_FALL} --pair_embeddings=5"
        yield small("prose", BEST, seed, 1465, fall, batch=8192)
    for corpus in ("prose", "code"):
        for seed in seeds:
            for condition in ("rules", "rules, near"):
                yield small(corpus, condition, seed, extra="--dtype=float32")
    for steps in (LENGTHS[0], LENGTHS[2]):
        for seed in seeds:
            for condition in ("none", BEST, "rules"):
                yield small("prose", condition, seed, steps)
    for conditions in (("none", BEST), ("rules", "repeats first")):
        for seed in seeds[:2]:
            for steps, batch in LONG:
                for condition in conditions:
                    yield small("prose", condition, seed, steps, batch=batch)
    for condition, extra in (("none", ""), (BEST, "--pair_embeddings=5 ")):
        extra += "--dtype=float32"  # for a CPU without products in bfloat16
        yield small("prose", condition, 1, 1648, extra, batch=16384, size="2x128")
    for size in ("3x384", "6x384"):
        for seed in seeds[:2]:
            for condition, extra in (("none", ""), (BEST, "--pair_embeddings=5")):
                yield small("prose", condition, seed, 1000, extra, batch=4096, size=size)
    for seed in seeds:
        for extra in OPTIMIZERS:
            yield small("prose", BEST, seed, extra=extra)


def finished() -> list[dict[str, Any]]:
    """The records of all runs so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def command(words: list[str], base: Path, condition: str) -> None:
    """Run base_train in this process, which was forked for it: torch is imported only once."""
    for name, change in tries.TRIES.items():
        if name in condition:
            change()
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
    vocabulary = VOCABULARIES.get(corpus, 4096)
    data = trials.prepared(corpus.removesuffix("16k"), texts, base, vocabulary)
    flags = run.flags
    for name, made in PRIORS.items():
        if f"--rap={name}" in flags.split():
            path = prior(made, base, data, root / "rap_env")
            flags = flags.replace(f"--rap={name}", f"--rap={path}")
    tag = re.sub(r"[^\w.-]+", "_", "parts-{}-{}-{}".format(*run.key))
    folder = base / "checkpoints" / "base" / tag
    words = [f"--model_tag={tag}", "--keep=1", "--resume=auto", f"--seed={run.seed}"]
    words += [*flags.split(), "--data", *data]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    child = multiprocessing.get_context("fork").Process(
        target=command, args=(words, base, run.condition)
    )
    child.start()
    child.join()
    if child.exitcode:
        print(f"{run.key} failed: see {base / 'log.txt'}", flush=True)
        return None
    last = logbook.by_kind(folder)
    shutil.rmtree(folder)
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
    for steps in LENGTHS[1:]:
        for condition in (BEST, "rules"):
            if shares := saved(by, condition, steps):
                s = interval(shares)
                print(
                    f"prose, {condition}: {s['mean']:.0%} ({s['lo']:.0%} to {s['hi']:.0%}) fewer "
                    f"tokens than none takes in {steps} steps"
                )


def saved(by: dict[tuple[str, str], dict[int, float]], condition: str, steps: int) -> list[float]:
    """
    For each seed, the share of the tokens of `steps` steps that a condition saves: 1 - n / steps,
    where its runs of LENGTHS have the bits per byte of "none" after `steps` in n steps. These runs
    are interpolated in log n between the two shortest lengths. [] for fewer than three seeds.
    """
    lengths = [by.get((f"prose-{n}", condition), {}) for n in LENGTHS[:2]]
    targets = by.get((f"prose-{steps}", "none"), {})
    shares = []
    for seed in sorted(set(targets).intersection(*lengths)):
        short, longer = (runs[seed] for runs in lengths)
        part = (short - targets[seed]) / (short - longer)
        shares.append(1 - LENGTHS[0] * (LENGTHS[1] / LENGTHS[0]) ** part / steps)
    return shares if len(shares) > 2 else []


def main() -> None:
    names = list(dict.fromkeys(run.experiment for run in planned()))
    parser = trials.command_line(__doc__ or "", "parts", names)
    parser.add_argument("--share", default="0/1", help="I/N: every N-th run, from number I on")
    parser.add_argument("--seeds", type=int, nargs="+", help="run only these seeds")
    options = parser.parse_args()
    first, step = map(int, options.share.split("/"))
    for run in list(planned())[first::step]:
        done = {(r["experiment"], r["condition"], r["seed"]) for r in finished()}
        if run.experiment not in options.only or run.key in done:
            continue
        if options.conditions and run.condition not in options.conditions:
            continue
        if options.seeds and run.seed not in options.seeds:
            continue
        if result := train(run, options.texts.resolve(), options.base.resolve()):
            record = dict(zip(("experiment", "condition", "seed"), run.key, strict=True))
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "flags": run.flags, **result}) + "\n")
    report(finished())


if __name__ == "__main__":
    main()
