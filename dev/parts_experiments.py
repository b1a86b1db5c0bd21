"""
The experiments on copy heads and convolutions in dev/LOG.md: small models on real text, with equal
tokens.

    python dev/parts_experiments.py --texts DIR                     everything that is missing
    python dev/parts_experiments.py --texts DIR --only prose-240    one experiment

DIR is as for rap_experiments.py. Every run adds a line to dev/results/parts.jsonl; runs that stand
there are not repeated, so the experiments resume where they stopped, also on another machine. The
mean of the seeds, with a 95 % interval of paired differences, is printed at the end.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import trials

from nanochat.base import logbook
from nanochat.study.statistics import interval

RESULTS = trials.RESULTS / "parts.jsonl"
SMALL = (
    "--depth=3 --model_dim=192 --head_dim=32 --embedding_lr=0.1 --sequence_len=256 "
    "--total_batch_size=2048 --eval_every=0 --eval_tokens=262144 --sample_every=0 --compile=on"
)
PARTS = {
    "none": "",
    "copy heads": "--copy_heads=1",
    "convolutions": "--convolutions",
    "both": "--copy_heads=1 --convolutions",
}


class Run(NamedTuple):
    """One training of a condition, or one chain."""

    experiment: str
    condition: str
    seed: int
    flags: str  # of base_train

    @property
    def key(self) -> tuple[str, str, int]:
        return self.experiment, self.condition, self.seed


def planned() -> Iterator[Run]:
    """All runs, the most telling first."""
    for experiment, steps, seeds in (
        ("prose-240", 240, 3),
        ("code-240", 240, 2),
        ("prose-2000", 2000, 2),
    ):
        for seed in range(1, seeds + 1):
            for condition, flags in PARTS.items():
                if condition in ("none", "both") or steps == 240:
                    length = f"--num_iterations={steps} {SMALL} {flags}"
                    yield Run(experiment, condition, seed, length)


def finished() -> list[dict[str, Any]]:
    """The records of all runs so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def train(run: Run, texts: Path, base: Path) -> dict[str, Any]:
    """Train and return {val_bpb, tokens, seconds}."""
    corpus = run.experiment.partition("-")[0]
    data = trials.prepared(corpus, texts, base / corpus, 4096)
    folder = base / corpus / "checkpoints" / "base" / "parts"
    shutil.rmtree(folder, ignore_errors=True)
    words = f"-m scripts.base_train --model_tag=parts --keep=1 --seed={run.seed} {run.flags}"
    trials.run([*words.split(), "--data", *data], base / corpus)
    rows = logbook.read(folder)
    last = {row["kind"]: row for row in rows}
    summary = last["summary"]
    return {
        "val_bpb": last["eval"]["val_bpb"],
        "tokens": summary["tokens"],
        "seconds": round(summary["seconds"], 1),
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
    options = trials.command_line(__doc__ or "", "parts", names).parse_args()
    done = {(r["experiment"], r["condition"], r["seed"]) for r in finished()}
    for run in planned():
        if run.experiment in options.only and run.key not in done:
            result = train(run, options.texts.resolve(), options.base.resolve())
            record = {**dict(zip(("experiment", "condition", "seed"), run.key, strict=True))}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "flags": run.flags, **result}) + "\n")
    report(finished())


if __name__ == "__main__":
    main()
