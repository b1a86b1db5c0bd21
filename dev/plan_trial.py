"""
Compare a plan with reality: `plan recipe` for a time budget on this machine, the run it asks for,
and runs of the next-best candidates of its table with the same budget.

    python dev/plan_trial.py --texts DIR --minutes 20

DIR holds wikipedia/, books/, reddit/ (45 / 40 / 15 %). Run nothing else on the machine. The script
resumes after an interruption. It writes dev/results/plan_trial.json and dev/plan_trial.png.
"""

import json
from pathlib import Path
from typing import Any

import trials
from matplotlib.figure import Figure

from nanochat.base import logbook
from nanochat.base.common import columns, print0
from nanochat.study.comparison_page import draw_curves
from nanochat.study.records import record

NEXT = 2  # candidates to try besides the chosen one
SIZES = "depth", "model_dim", "total_batch_size", "device_batch_size"
PREDICTED = (
    *SIZES,
    "tok_per_sec",
    "tok_per_sec_lo",
    "tok_per_sec_hi",
    "tokens",
    "peak_memory_bytes",
    "bpb",
    "bpb_lo",
    "bpb_hi",
)


def planned(base: Path, minutes: float, words: list[str], out: str) -> dict[str, Any]:
    """The JSON that `plan recipe` writes beside plan/`out`.toml; made if it is missing."""
    file = base / "plan" / f"{out}.json"
    if not file.exists():
        run = [
            "-m",
            "scripts.plan",
            "recipe",
            f"--minutes={minutes:g}",
            f"--model_tag={out}",
            f"--out=plan/{out}.toml",
        ]
        trials.run([*run, *words], base)
    return json.loads(file.read_text(encoding="utf-8"))


def flat(candidate: dict[str, Any]) -> dict[str, Any]:
    """A candidate of a plan with its size, speed, loss and their intervals as single figures."""
    config = candidate["config"]
    figures = {"depth": config["n_layer"], "model_dim": config["n_embd"]}
    for name, field in (("tok_per_sec", "speed"), ("bpb", "bpb")):
        names = (name, f"{name}_lo", f"{name}_hi")
        figures |= dict(zip(names, candidate[field], strict=True))
    return {**candidate, **figures}


def trained(base: Path, out: str) -> dict[str, Any]:
    """
    The record of the run that a recipe asks for, with its tokens per second; trained if missing.
    """
    trials.run(
        ["-m", "scripts.base_train", "--recipe", f"plan/{out}.toml", "--resume=auto", "--keep=1"],
        base,
    )
    directory = base / "checkpoints" / "base" / out
    run = record(directory)
    rate = run["tokens"] / run["seconds"]
    return run | {
        "tok_per_sec": rate,
        "processes": sum(r.get("kind") == "start" for r in logbook.read(directory)),
    }


def report(trial: dict[str, Any]) -> None:
    """Prediction and measurement side by side."""
    rows = []
    for r in trial["runs"]:
        p, m = r["predicted"], r["measured"]
        over = {n: m[n] / p[n] - 1 for n in ("tok_per_sec", "tokens", "peak_memory_bytes")}
        late = m["wall_seconds"] / trial["pretraining_seconds"] - 1
        rows.append(
            [
                r["name"],
                r["shape"],
                f"{p['tok_per_sec']:,.0f}",
                f"{over['tok_per_sec']:+.1%}",
                f"{p['tokens'] / 1e6:.2f}M",
                f"{over['tokens']:+.1%}",
                f"{p['peak_memory_bytes'] / 2**30:.2f} GiB",
                f"{over['peak_memory_bytes']:+.1%}",
                f"{p['bpb']:.3f} ({p['bpb_lo']:.3f}-{p['bpb_hi']:.3f})",
                f"{m['final_bpb']:.4f}",
                f"{late:+.2%}",
            ]
        )
    heads = (
        "",
        "depth x width",
        "tok/s",
        "was",
        "tokens",
        "were",
        "memory",
        "was",
        "bits per byte",
        "were",
        "overrun",
    )
    print0(columns(heads, rows))


def picture(trial: dict[str, Any], out: Path) -> None:
    """Draw the learning curves of the runs, and their predicted and measured results."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_curves(
        left, {f"{r['name']}: {r['shape']}": [r["measured"]] for r in trial["runs"]}, x="seconds"
    )
    for y, r in enumerate(trial["runs"]):
        p = r["predicted"]
        right.errorbar(
            p["bpb"],
            y,
            xerr=[[p["bpb"] - p["bpb_lo"]], [p["bpb_hi"] - p["bpb"]]],
            fmt="o",
            color="#888",
            capsize=3,
        )
        right.plot(r["measured"]["final_bpb"], y, "D", color="#d9541e")
    right.set_yticks(range(len(trial["runs"])), [r["shape"] for r in trial["runs"]])
    right.invert_yaxis()
    right.set_title("predicted, 90 %; measured (red)")
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = trials.command_line(__doc__ or "", "plan_trial", [])
    parser.add_argument("--minutes", type=float, default=20, help="the whole budget")
    parser.add_argument("--vocab", type=int, default=8192)
    options = parser.parse_args()
    base = options.base.resolve()
    data = ["--data", *trials.prepared("prose", options.texts.resolve(), base, options.vocab)]
    plan = planned(base, options.minutes, data, "chosen")
    first = flat(plan["primary"])
    shape = first["depth"], first["model_dim"]
    others = [c for c in map(flat, plan["candidates"]) if (c["depth"], c["model_dim"]) != shape]
    others.sort(key=lambda c: c["bpb"])
    trial: dict[str, Any] = {
        "machine": plan["machine"]["name"],
        "minutes": options.minutes,
        "runs": [],
    }
    trial["pretraining_seconds"] = plan["pretraining_seconds"]
    for i, c in enumerate((first, *others[:NEXT])):
        name = f"next-{i}" if i else "chosen"
        if i:
            size = [f"--depth={c['depth']}", f"--model_dim={c['model_dim']}"]
            words = [*data, *size, "--probe=plan/probe.json"]
            c = flat(planned(base, options.minutes, words, name)["primary"])
        predicted = {n: c[n] for n in PREDICTED}
        run = {
            "name": name,
            "shape": f"{c['depth']} x {c['model_dim']}",
            "predicted": predicted,
            "measured": trained(base, name),
        }
        trial["runs"].append(run)
        report(trial)
        trials.RESULTS.mkdir(exist_ok=True)
        (trials.RESULTS / "plan_trial.json").write_text(
            json.dumps(trial, indent=1) + "\n", encoding="utf-8"
        )
        picture(trial, trials.REPO / "dev" / "plan_trial.png")


if __name__ == "__main__":
    main()
