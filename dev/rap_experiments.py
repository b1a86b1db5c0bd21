"""
The experiments on the attention prior, from tokenizer to summary: what dev/LOG.md says of it was computed by this.

    python dev/rap_experiments.py --texts DIR --env ~/.cache/nanochat/rap_env
    python dev/rap_experiments.py --texts DIR --only prose-small code-small

DIR holds wikipedia/, books/, reddit/ (45 / 40 / 15 %: prose) and dialog/ (conversations, read as plain text); code is Python's own standard
library. Each experiment is one run of scripts.compare and goes on where it was stopped, also on another machine, as the records of all
runs lie in dev/results/; after each, rap_summary.json there is written anew. It trains nothing itself and decides nothing: compare does.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from nanochat import comparison

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "dev" / "results"
RECORDS = "plan.json", "runs.jsonl", "results.json"  # of a comparison
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
TERMS = {
    "no spans": Condition("--generator rules --spans 0"),
    "sparse 90 %": Condition("--generator rules --sparsity 0.9"),
}
CODES = {
    "random codes": Condition("--generator rules --codes hash"),
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
    "prose-codes": Experiment("prose", "small", 3, NONE | RULES | CODES),
}


def sources(corpus: str, texts: Path, base: Path) -> list[str]:
    """The words of --data, with paths from the base folder on: no path of a machine gets into the results."""
    if corpus == "prose":
        if not (base / "texts").exists():
            (base / "texts").symlink_to(texts, target_is_directory=True)
        return [f"{name}=texts/{name}:{weight}" for name, weight in (("wikipedia", 0.45), ("books", 0.40), ("reddit", 0.15))]
    file = base / f"{corpus}.jsonl"
    if corpus == "code" and not file.exists():
        run([str(REPO / "dev" / "python_library.py"), str(file)], base)
    elif not file.exists():
        rows = [json.loads(line) for p in sorted((texts / "dialog").glob("*.jsonl")) for line in p.open(encoding="utf-8")]
        documents = ["\n".join(f"{m['role']}: {m['content']}" for m in row["messages"]) for row in rows if "messages" in row]
        file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents if d.strip()), encoding="utf-8")
    return [f"{corpus}={file.name}"]


def run(words: list[str], base: Path) -> None:
    """A command of this repository, with its own base folder."""
    path = os.pathsep.join(p for p in (str(REPO), os.environ.get("PYTHONPATH")) if p)
    subprocess.run([sys.executable, *words], cwd=base, env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": path}, check=True)


def generated(made: str, base: Path, data: list[str], env: Path) -> str:
    """The artifact that these options of the generator make from a corpus, as a path from the base folder on."""
    out = f"priors/{re.sub(r'[^a-z0-9]+', '-', made.removeprefix('--generator '))}.safetensors"
    if not (base / out).exists():
        mix = [f"{m[1]}:{m[2]}" for d in data if (m := re.fullmatch(r"(\w+)=.*:([\d.]+)", d))]
        words = [str(REPO / "dev" / "generate_rap_prior.py"), "--env", str(env), *shlex.split(made), "--max_lag", "256", "--out", out]
        run([*words, *(["--mix", *mix] if mix else [])], base)
    return out


def experiment(name: str, e: Experiment, base: Path, texts: Path, env: Path, retime: int) -> None:
    """Everything that one experiment needs, and its comparison."""
    base = base / e.corpus
    base.mkdir(parents=True, exist_ok=True)
    data = sources(e.corpus, texts, base)
    if not (base / "tokenizer" / "tokenizer.json").exists():
        run(["-m", "scripts.tok_train", "--vocab_size=4096", "--data", *data], base)
    run(["-m", "scripts.tok_data", "--data", *data], base)
    folder = base / "compare" / name
    if not folder.exists():
        adopt(name, e, folder)
    words = ["-m", "scripts.compare", f"--name={name}", f"--seeds={e.seeds}", f"--common={SIZES[e.size]} --data {shlex.join(data)}"]
    for letter, c in zip("abcdefgh", e.conditions.values(), strict=False):
        rap = f"--rap={generated(c.made, base, data, env)} " if c.made else ""
        words += [f"--{letter}={rap}{c.flags}"]
    run([*words, f"--retime={retime}", "--names", *(n.replace(" ", "-").replace("%", "pct") for n in e.conditions)], base)


def adopt(name: str, e: Experiment, folder: Path) -> None:
    """Begin with the runs in dev/results/: of this experiment, or of others in so far as they are the same (corpus, size and condition)."""
    plan: dict[str, list[str]] = {}
    runs: list[str] = []
    for other in sorted(EXPERIMENTS, key=lambda n: n != name):
        kept = RESULTS / f"rap_{other}.runs.jsonl"
        if EXPERIMENTS[other][:2] != e[:2] or not kept.exists():
            continue
        theirs = json.loads((RESULTS / f"rap_{other}.plan.json").read_text(encoding="utf-8"))
        new = {c: theirs[c] for c in (theirs if other == name else e.conditions) if c in theirs and c not in plan}
        runs += [line for line in kept.read_text(encoding="utf-8").splitlines() if json.loads(line)["condition"] in new]
        plan |= new
    if runs:
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
        (folder / "runs.jsonl").write_text("".join(f"{line}\n" for line in runs), encoding="utf-8")


def summarise(base: Path) -> None:
    """rap_summary.json: corpus -> size -> condition -> n_seeds and every measure as mean, lo, hi; and each comparison's own results."""
    RESULTS.mkdir(exist_ok=True)
    summary: dict[str, dict[str, dict[str, dict]]] = {}
    for name, e in EXPERIMENTS.items():
        folder, kept = base / e.corpus / "compare" / name, RESULTS / f"rap_{name}.results.json"
        for kind in RECORDS if (folder / "results.json").exists() else ():
            shutil.copyfile(folder / kind, RESULTS / f"rap_{name}.{kind}")
        if not kept.exists():
            continue
        results = json.loads(kept.read_text(encoding="utf-8"))  # also of experiments that another machine made
        here = summary.setdefault(e.corpus, {}).setdefault(e.size, {})
        for pair in results["pairs"]:
            if pair["n_seeds"] and pair["n_seeds"] >= here.get(pair["name"], {}).get("n_seeds", 0):
                numbers = {m: {k: pair[m].get(k) for k in ("mean", "lo", "hi", "at_least", "at_most") if k in pair[m]} for m in MEASURES}
                here[pair["name"]] = {"n_seeds": pair["n_seeds"], "experiment": name, **numbers}
    (RESULTS / "rap_summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def picture(out: Path) -> None:
    """Learning curves of the larger comparisons, and below them the tokens that every condition saves, with its interval."""
    kept = {n: json.loads(f.read_text(encoding="utf-8")) for n in EXPERIMENTS if (f := RESULTS / f"rap_{n}.results.json").exists()}
    drawn = [n for n in kept if EXPERIMENTS[n].conditions.keys() <= MAIN.keys()]
    across = max(1, len(drawn))
    figure = Figure(figsize=(4.6 * across, 8), layout="constrained")
    top, below = figure.subfigures(2, 1)
    for ax, name in zip(top.subplots(1, across, squeeze=False)[0], drawn, strict=False):
        lines = (RESULTS / f"rap_{name}.runs.jsonl").read_text(encoding="utf-8").splitlines()
        groups: dict[str, list[dict[str, Any]]] = {c["name"]: [] for c in kept[name]["conditions"] if c["n_seeds"]}
        for r in map(json.loads, lines):
            if r["condition"] in groups and not r.get("error"):
                groups[r["condition"]].append(r)
        comparison.curves(ax, groups, title=f"{name}, bits per byte")
    ax = below.subplots()
    rows = [(f"{n}: {p['name']} ({p['n_seeds']})", p["saved_tokens_pct"]) for n, r in kept.items() for p in r["pairs"]]
    rows = [(label, found) for label, found in rows if found["mean"] is not None]
    for y, (_, found) in enumerate(rows):
        lo, hi = (found["mean"] if found[k] is None else found[k] for k in ("lo", "hi"))
        ax.errorbar(found["mean"], y, xerr=[[found["mean"] - lo], [hi - found["mean"]]], fmt="o", color="#2a6f97", capsize=3)
    ax.axvline(0, color="#888", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [label for label, _ in rows])
    ax.invert_yaxis()
    ax.set_title("tokens saved, %, with 95 % intervals over (paired seeds)")
    figure.savefig(out, dpi=100)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    cache = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    p.add_argument("--texts", type=Path, required=True, help="folder with wikipedia/, books/, reddit/ and dialog/")
    p.add_argument("--base", type=Path, default=cache / "rap_experiments", help="where everything is made")
    p.add_argument("--env", type=Path, default=cache / "rap_env", help="the generator's environment, made if it is not there")
    p.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME", help=", ".join(EXPERIMENTS))
    p.add_argument("--retime", type=int, default=0, metavar="ROUNDS", help="then time the conditions anew: nothing else should run")
    p.add_argument("--conditions", nargs="+", metavar="NAME", help="these alone; the others can follow")
    a = p.parse_args()
    for name in a.only:
        e = EXPERIMENTS[name]
        wanted = {n: c for n, c in e.conditions.items() if n in (a.conditions or e.conditions)}
        try:
            experiment(name, e._replace(conditions=wanted), a.base.resolve(), a.texts.resolve(), a.env.resolve(), a.retime)
        except subprocess.CalledProcessError as failure:  # it said why
            sys.exit(failure.returncode)
        finally:
            summarise(a.base.resolve())
            picture(REPO / "dev" / "rap.png")


if __name__ == "__main__":
    main()
