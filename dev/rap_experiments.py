"""
The experiments on the attention prior in dev/LOG.md, from tokenizer to summary.

    python dev/rap_experiments.py --texts DIR --env ~/.cache/nanochat/rap_env
    python dev/rap_experiments.py --texts DIR --only prose-small code-small

DIR holds wikipedia/, books/, reddit/ (45 / 40 / 15 %: prose) and dialog/ (conversations, read as
plain text); slots are the dialogues that serve a task, code is Python's own standard library, and
tables are invented (made_tables.py). Each experiment is one comparison
(trials.py); dev/results/rap_summary.json and dev/rap.png are rewritten after each.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import trials
from matplotlib.figure import Figure

from nanochat.study.comparison_page import draw_curves

MEASURES = "saved_tokens_pct", "saved_seconds_pct", "final_bpb_delta", "step_time_pct"
RUN = (
    "--embedding_lr=0.1 --sequence_len=256 --total_batch_size=2048 --eval_every=0.1 "
    "--eval_tokens=16384 --sample_every=0 --compile=on"
)
SIZES = {  # 1.3 M and 5.3 M matrix parameters
    "small": f"--depth=3 --model_dim=192 --head_dim=32 --num_iterations=400 {RUN}",
    "large": f"--depth=3 --model_dim=384 --head_dim=64 --num_iterations=500 {RUN}",
}


class Condition(NamedTuple):
    generator: str | None  # its options; None = no prior
    flags: str = ""  # of base_train


class Experiment(NamedTuple):
    corpus: str
    size: str
    seeds: int
    conditions: dict[str, Condition]  # the first is the baseline


NONE = {"none": Condition(None)}
MAIN = NONE | {
    "rules": Condition("--generator rules"),
    "correlation": Condition("--generator correlation"),
    "rectified": Condition("--generator rectified"),
    "warmstart": Condition("--generator rules", "--rap_mode=warmstart --rap_alpha=4"),
}
RULES = {"rules": MAIN["rules"]}
GATES = {
    "all alike": Condition("--generator rules", "--rap_lead=0"),
    "fixed": Condition("--generator rules", "--rap_gate=fixed"),
    "annealed": Condition("--generator rules", "--rap_gate=annealed"),
    "half the heads": Condition("--generator rules", "--rap_heads=0.5"),
    "first layer": Condition("--generator rules", "--rap_layers=1"),
}
TERMS = {"no spans": Condition("--generator rules --spans 0")}
SPARSE = {
    "sparse 50 %": Condition("--generator rules --sparsity 0.5"),
    "sparse 90 %": Condition("--generator rules --sparsity 0.9"),
}
CODES = {"random codes": Condition("--generator rules --codes hash")}
RANKS = {
    "16 bits": Condition("--generator rules --code_bits 16 --pair_bits 16"),
    "64 bits": Condition("--generator rules --code_bits 64 --pair_bits 64"),
}
HAND = {"hand": Condition("--generator hand")}
MATCHED = {"rules matched": Condition("--generator rules --others matched")}
PARTS = {  # of the prior written by hand
    "hand without own": Condition("--generator hand --features copy copy_pair"),
    "hand without spans": Condition("--generator hand --spans 0"),
}
EXPERIMENTS = {
    # what does the fit add to rules that anyone can write down?
    "prose-hand": Experiment("prose", "small", 3, NONE | RULES | HAND),
    "code-hand": Experiment("code", "small", 3, NONE | RULES | HAND),
    # where could it add something? each has a structure that the rules by hand do not name
    "code-matched": Experiment("code", "small", 2, NONE | RULES | HAND | MATCHED),
    "dialogues-hand": Experiment("dialogues", "small", 2, NONE | RULES | HAND | MATCHED),
    "slots-hand": Experiment("slots", "small", 2, NONE | RULES | HAND | MATCHED),
    "tables-hand": Experiment("tables", "small", 2, NONE | RULES | HAND | MATCHED),
    "prose-small": Experiment("prose", "small", 5, MAIN),
    "code-small": Experiment("code", "small", 5, MAIN),
    "prose-large": Experiment("prose", "large", 3, NONE | RULES),
    "code-large": Experiment("code", "large", 3, NONE | RULES),
    "dialogues-small": Experiment("dialogues", "small", 3, NONE | RULES),
    "prose-gates": Experiment("prose", "small", 3, NONE | RULES | GATES),
    "prose-terms": Experiment("prose", "small", 3, NONE | RULES | TERMS),
    "prose-sparse": Experiment("prose", "small", 3, NONE | RULES | SPARSE),
    "prose-codes": Experiment("prose", "small", 3, NONE | RULES | CODES),
    "prose-ranks": Experiment("prose", "small", 3, NONE | RULES | RANKS),
}


def prior(generator: str, base: Path, data: list[str], env: Path) -> str:
    """
    The prior that these options of the generator make of a corpus, relative to the base folder. Its
    curve of distances has no end unless they say it, as when these experiments began.
    """
    out = f"priors/{re.sub(r'[^a-z0-9]+', '-', generator.removeprefix('--generator '))}.safetensors"
    if not (base / out).exists():
        mix = [f"{m[1]}:{m[2]}" for d in data if (m := re.fullmatch(r"(\w+)=.*:([\d.]+)", d))]
        words = [str(trials.REPO / "dev" / "generate_rap_prior.py"), *shlex.split(generator)]
        if "hand" not in words:  # which reads no text
            words += [] if "--band" in words else ["--band", "0"]
            words += ["--env", str(env), "--max_lag", "256", *(["--mix", *mix] if mix else [])]
        trials.run([*words, "--out", out], base)
    return out


def run_experiment(name: str, wanted: Sequence[str] | None, options: argparse.Namespace) -> None:
    """Make the tokenizer, the priors and the comparison of one experiment."""
    experiment = EXPERIMENTS[name]
    base = options.base.resolve() / experiment.corpus
    data = trials.prepared(experiment.corpus, options.texts.resolve(), base, 4096)
    flags = {}
    for label, condition in experiment.conditions.items():
        if label in (wanted or experiment.conditions):
            rap = ""
            if condition.generator:
                rap = f"--rap={prior(condition.generator, base, data, options.env.resolve())} "
            flags[label.replace(" ", "-").replace("%", "pct")] = rap + condition.flags
    related = [
        f"rap_{other}"
        for other, e in EXPERIMENTS.items()
        if other != name and e[:2] == experiment[:2]
    ]
    trials.compare(
        f"rap_{name}",
        base,
        f"{SIZES[experiment.size]} --data {shlex.join(data)}",
        experiment.seeds,
        flags,
        related,
        options.retime,
    )


def summarise() -> None:
    """
    rap_summary.json: corpus -> size -> condition -> n_seeds and every measure as mean, lo, hi.
    `timed`: the seconds are of a quiet machine, by turns (--retime); where it is false other work
    ran beside it, and its seconds and step times say little.
    """
    summary: dict[str, dict[str, dict[str, dict]]] = {}
    for name, results in stored_results().items():
        e = EXPERIMENTS[name]
        runs = (trials.RESULTS / f"rap_{name}.runs.jsonl").read_text(encoding="utf-8").splitlines()
        timed = all(json.loads(line).get("retimed", False) for line in runs)
        here = summary.setdefault(e.corpus, {}).setdefault(e.size, {})
        for pair in results["pairs"]:
            if pair["n_seeds"] and pair["n_seeds"] >= here.get(pair["name"], {}).get("n_seeds", 0):
                numbers = {
                    m: {
                        k: pair[m].get(k)
                        for k in ("mean", "lo", "hi", "at_least", "at_most")
                        if k in pair[m]
                    }
                    for m in MEASURES
                }
                here[pair["name"]] = {
                    "n_seeds": pair["n_seeds"],
                    "experiment": name,
                    "timed": timed,
                    **numbers,
                }
    (trials.RESULTS / "rap_summary.json").write_text(
        json.dumps(summary, indent=1) + "\n", encoding="utf-8"
    )


def stored_results() -> dict[str, dict[str, Any]]:
    """The results of all experiments so far, from any machine."""
    files = {n: trials.RESULTS / f"rap_{n}.results.json" for n in EXPERIMENTS}
    return {n: json.loads(f.read_text(encoding="utf-8")) for n, f in files.items() if f.exists()}


def picture(out: Path) -> None:
    """
    Learning curves of the larger comparisons, and below them the tokens that every condition saves,
    with its interval.
    """
    results = stored_results()
    drawn = [n for n in results if EXPERIMENTS[n].conditions.keys() <= MAIN.keys()]
    across = max(1, len(drawn))
    figure = Figure(figsize=(4.6 * across, 9), layout="constrained")
    top, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for ax, name in zip(top.subplots(1, across, squeeze=False)[0], drawn, strict=False):
        lines = (trials.RESULTS / f"rap_{name}.runs.jsonl").read_text(encoding="utf-8").splitlines()
        groups: dict[str, list[dict[str, Any]]] = {
            c["name"]: [] for c in results[name]["conditions"] if c["n_seeds"]
        }
        for r in map(json.loads, lines):
            if r["condition"] in groups and not r.get("error"):
                groups[r["condition"]].append(r)
        draw_curves(ax, groups, title=f"{name}, bits per byte")
    ax = below.subplots()
    rows = []
    for (
        name,
        r,
    ) in results.items():  # what an ablation shares with its main comparison is drawn once
        pairs = [
            p
            for p in r["pairs"]
            if p["saved_tokens_pct"]["mean"] is not None
            and (name in drawn or p["name"] not in MAIN)
        ]
        rows += [(f"{name}: {p['name']} ({p['n_seeds']})", p["saved_tokens_pct"]) for p in pairs]
    for y, (_, saved) in enumerate(rows):
        lo, hi = (saved["mean"] if saved[k] is None else saved[k] for k in ("lo", "hi"))
        ax.errorbar(
            saved["mean"],
            y,
            xerr=[[saved["mean"] - lo], [hi - saved["mean"]]],
            fmt="o",
            color="#2a6f97",
            capsize=3,
        )
    ax.axvline(0, color="#888", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [label for label, _ in rows])
    ax.invert_yaxis()
    ax.set_title("tokens saved, %, with 95 % intervals over (paired seeds)")
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = trials.command_line(__doc__ or "", "rap_experiments", list(EXPERIMENTS))
    cache = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    parser.add_argument(
        "--env",
        type=Path,
        default=cache / "rap_env",
        help="the generator's environment, created if needed",
    )
    options = parser.parse_args()
    for name in options.only:
        try:
            run_experiment(name, options.conditions, options)
        finally:
            summarise()
            picture(trials.REPO / "dev" / "rap.png")


if __name__ == "__main__":
    main()
