"""
How often the 90 % intervals of the scaling law hold a run that it was not fitted to.

    python dev/law_coverage.py

The runs are those of dev/scaling_law.py, and of the comparisons in dev/results/ those on English
prose with the default parts and at least a hundred steps. Runs whose size and tokens differ by less
than a tenth are one: their mean counts. Each is left out once, its law is fitted to the others and
predicts it. The table says the error over half of the interval's width: above 1 it was missed.

The second table is about the budgets of dev/plan_trial.py: the law is fitted without a budget's
runs, and the model that it would choose for it is compared with the best that was trained.
"""

import json
import math
from collections import defaultdict
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import plan_trial
import scaling_law
import trials

from nanochat.base.common import columns, human, print0
from nanochat.base.knobs import parse
from nanochat.commands.base_train import PretrainKnobs
from nanochat.model.config import GPTConfig
from nanochat.plan.law import LOOKS_BACK, TINYWORLD, Z90, Law
from nanochat.plan.shapes import counts

EXPERIMENTS = {  # in dev/results: conditions that a plan would have chosen, or all that differ in size
    "budget_batch": ("4096", "8192"),
    "budget_rates": ("4096", "8192"),
    "budget_size": ("3x192", "1x128", "2x128", "2x256", "4x256"),
    "budget_english-minutes": ("default", "nocap"),
    "budget_english-tokens": ("default", "nocap", "mlp3", "gqa"),
    "budget_softcap-minutes": ("default",),
    "rap_prose-small": ("none",),
    "rap_prose-large": ("none",),
}
STEPS = 100  # fewer are no plan's choice


def layers_of(flags: list[str]) -> int:
    """The parameters of the layers of a run with these flags."""
    k, _ = parse(PretrainKnobs, flags, command="base_train")
    size: dict[str, Any] = k.dimensions()
    config = GPTConfig(vocab_size=4096, mlp_ratio=k.mlp_ratio, **size)
    return counts(config)["transformer"]


def compared() -> list[scaling_law.Run]:
    """The runs of the comparisons."""
    runs = []
    for name, conditions in EXPERIMENTS.items():
        lines = (trials.RESULTS / f"{name}.runs.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            if row["condition"] in conditions and row["steps"] >= STEPS:
                flags = [f for f in row["flags"] if not f.startswith("--keep")]
                runs.append((float(layers_of(flags)), float(row["tokens"]), row["final_bpb"]))
    return runs


def alike(a: scaling_law.Run, b: scaling_law.Run) -> bool:
    """Whether size and tokens of two runs differ by less than a tenth."""
    return max(abs(math.log(a[0] / b[0])), abs(math.log(a[1] / b[1]))) < 0.1


def merged(runs: list[scaling_law.Run]) -> list[scaling_law.Run]:
    """Runs that are alike as one, with their geometric means."""
    groups: list[list[scaling_law.Run]] = []
    for run in sorted(runs):
        for group in groups:
            if alike(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])
    return [tuple(np.exp(np.log(group).mean(0)).tolist()) for group in groups]


def choices() -> list[tuple[object, ...]]:
    """For each budget: the choice of a law that has not seen it, and what that choice loses."""
    seeds = defaultdict(lambda: defaultdict(list))
    for run in plan_trial.stored(kind="run", by="tokens"):
        seeds[run["data"], run["minutes"]][run["size"]].append(run["final_bpb"])
    rows = []
    for (data, minutes), sizes in seeds.items():
        runs = scaling_law.TINYWORLD if data == "tinyworld" else scaling_law.LOOKING_BACK
        ends = {(int(size.split()[0]), round(fmean(e), 4)): size for size, e in sizes.items()}
        own = {run: ends[run[3], run[2]] for run in runs if (run[3], run[2]) in ends}
        if len(own) < len(sizes) or len(own) < 2:
            continue  # the law was not fitted to it
        law = scaling_law.fit((), [run for run in runs if run not in own])
        chosen, second, *_ = sorted(own, key=lambda run: law.bpb(run[0], run[1], int(run[3])))
        best = min(own, key=lambda run: run[2])
        margin = law.bpb(*second[:2], int(second[3])) / law.bpb(*chosen[:2], int(chosen[3])) - 1
        loss = f"{chosen[2] / best[2] - 1:.2%}"
        rows.append((data, minutes, own[chosen], f"{margin:.2%}", own[best], loss))
    return rows


def main() -> None:
    own = merged([*scaling_law.MEASURED, *compared()])
    laws = {  # ladder, runs made here, those that are left out, and the law of them all
        "ladder": (scaling_law.LADDER, own, scaling_law.LADDER, Law()),
        "here": (scaling_law.LADDER, own, own, Law()),
        "looks back": ((), scaling_law.LOOKING_BACK, scaling_law.LOOKING_BACK, LOOKS_BACK),
        "tinyworld": ((), scaling_law.TINYWORLD, scaling_law.TINYWORLD, TINYWORLD),
    }
    rows, ratios, widths, misses = [], [], [], []
    for about, run in [(about, run) for about, row in laws.items() for run in row[2]]:
        n, d, bpb, *layers = run
        ladder, here, _, whole = laws[about]
        others = [[r for r in runs if r is not run] for runs in (ladder, here)]
        law = replace(scaling_law.fit(*others), spread=whole.spread)
        predicted, width = law.bpb(n, d, *layers), Z90 * law.error(n, d)
        miss = math.log(predicted / bpb)
        ratios.append(abs(miss) / width)
        widths.append(width)
        misses.append(abs(miss))
        figures = (f"{bpb:.3f}", f"{predicted:.3f}", f"{miss:+.1%}", f"{width:.1%}")
        rows.append((about, human(n), human(d), *figures, f"{ratios[-1]:.2f}"))
    print0(columns(("", "layers", "tokens", "was", "law", "error", "90 %", "error / width"), rows))
    held = np.mean(np.array(ratios) <= 1)
    needed = np.quantile(ratios, 0.85)
    print0(
        f"{len(rows)} runs: {held:.0%} held; intervals {1 / needed:.2f} times as wide as a coverage "
        "of 85 % needs"
    )
    heads = ("data", "minutes", "choice", "before the next by", "best", "worse than it by")
    print0(columns(heads, choices()))


if __name__ == "__main__":
    main()
