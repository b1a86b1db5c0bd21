"""
The experiments on the attention prior, from tokenizer to summary: what dev/LOG.md says of it was computed by this.

    python dev/rap_experiments.py --texts DIR --env ~/.cache/nanochat/rap_env
    python dev/rap_experiments.py --texts DIR --only prose-small code-small

DIR holds wikipedia/, books/, reddit/ (45 / 40 / 15 %: prose) and dialog/ (conversations, read as plain text); code is Python's own standard
library. Each experiment is one comparison (trials.py); after each, dev/results/rap_summary.json and dev/rap.png are made anew.
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
RUN = "--embedding_lr=0.1 --sequence_len=256 --total_batch_size=2048 --eval_every=0.1 --eval_tokens=16384 --sample_every=0 --compile=on"
SIZES = {  # 1.3 M and 5.3 M matrix parameters
    "small": f"--depth=3 --model_dim=192 --head_dim=32 --num_iterations=400 {RUN}",
    "large": f"--depth=3 --model_dim=384 --head_dim=64 --num_iterations=500 {RUN}",
}


class Condition(NamedTuple):
    made: str | None  # options of the generator; None: no prior
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
EXPERIMENTS = {
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


def generated(made: str, base: Path, data: list[str], env: Path) -> str:
    """The artifact that these options of the generator make from a corpus, as a path from the base folder on."""
    out = f"priors/{re.sub(r'[^a-z0-9]+', '-', made.removeprefix('--generator '))}.safetensors"
    if not (base / out).exists():
        mix = [f"{m[1]}:{m[2]}" for d in data if (m := re.fullmatch(r"(\w+)=.*:([\d.]+)", d))]
        words = [
            str(trials.REPO / "dev" / "generate_rap_prior.py"),
            "--env",
            str(env),
            *shlex.split(made),
        ]
        trials.run(
            [*words, "--max_lag", "256", "--out", out, *(["--mix", *mix] if mix else [])], base
        )
    return out


def experiment(name: str, wanted: Sequence[str] | None, a: argparse.Namespace) -> None:
    """Everything that one experiment needs, and its comparison."""
    e, base = EXPERIMENTS[name], a.base.resolve() / EXPERIMENTS[name].corpus
    data = trials.prepared(e.corpus, a.texts.resolve(), base, 4096)
    flags = {}
    for n, c in e.conditions.items():
        if n in (wanted or e.conditions):
            rap = f"--rap={generated(c.made, base, data, a.env.resolve())} " if c.made else ""
            flags[n.replace(" ", "-").replace("%", "pct")] = rap + c.flags
    kin = [f"rap_{n}" for n, o in EXPERIMENTS.items() if n != name and o[:2] == e[:2]]
    trials.compare(
        f"rap_{name}",
        base,
        f"{SIZES[e.size]} --data {shlex.join(data)}",
        e.seeds,
        flags,
        kin,
        a.retime,
    )


def summarise() -> None:
    """
    rap_summary.json: corpus -> size -> condition -> n_seeds and every measure as mean, lo, hi. `timed`: the seconds are of a quiet machine,
    by turns (--retime); where it is false other work ran beside it, and its seconds and step times say little.
    """
    summary: dict[str, dict[str, dict[str, dict]]] = {}
    for name, results in kept().items():
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


def kept() -> dict[str, dict[str, Any]]:
    """The results of all experiments so far, by whatever machine."""
    files = {n: trials.RESULTS / f"rap_{n}.results.json" for n in EXPERIMENTS}
    return {n: json.loads(f.read_text(encoding="utf-8")) for n, f in files.items() if f.exists()}


def picture(out: Path) -> None:
    """Learning curves of the larger comparisons, and below them the tokens that every condition saves, with its interval."""
    found = kept()
    drawn = [n for n in found if EXPERIMENTS[n].conditions.keys() <= MAIN.keys()]
    across = max(1, len(drawn))
    figure = Figure(figsize=(4.6 * across, 9), layout="constrained")
    top, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for ax, name in zip(top.subplots(1, across, squeeze=False)[0], drawn, strict=False):
        lines = (trials.RESULTS / f"rap_{name}.runs.jsonl").read_text(encoding="utf-8").splitlines()
        groups: dict[str, list[dict[str, Any]]] = {
            c["name"]: [] for c in found[name]["conditions"] if c["n_seeds"]
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
    ) in found.items():  # what an ablation shares with the comparison before it is drawn once
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
    p = trials.options(__doc__ or "", "rap_experiments", list(EXPERIMENTS))
    cache = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    p.add_argument(
        "--env",
        type=Path,
        default=cache / "rap_env",
        help="the generator's environment, made if it is not there",
    )
    a = p.parse_args()
    for name in a.only:
        try:
            experiment(name, a.conditions, a)
        finally:
            summarise()
            picture(trials.REPO / "dev" / "rap.png")


if __name__ == "__main__":
    main()
