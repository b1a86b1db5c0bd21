"""
What reinforcement does, over several seeds: reward, pass@1 and pass@k on held-out questions, by
step, as JSON and as a picture.

    python -m bench.rl_curves --flags="--tasks tinyworld/twostep --num_iterations=60"

Every seed starts from the same finetuned checkpoint and draws its own questions and replies. An
interrupted seed resumes; its folder is under <base>/rl_curves. Before and after training, held-out
questions of every kind are answered greedily. A length in minutes is refused, as a busy machine
would change the curves. The last line is JSON.
"""

import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from nanochat.base import knobs, logbook
from nanochat.base.common import UserError, base_dir, entry, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.commands import chat_rl
from nanochat.model.checkpoint import Checkpoint, locate
from nanochat.study import page
from nanochat.study.statistics import interval


@dataclass(kw_only=True)
class Knobs:
    """Curves of reinforcement"""

    flags: str = knob("--num_iterations=60", "flags of chat_rl, the same for every seed")
    seeds: int = knob(3, "runs; their seeds are 1, 2, ...", low=1)
    source: Literal["sft", "mid"] = knob("sft", "stage to start from", alias="-i")
    model_tag: str = knob("", "tag of the model (default: the one saved last)", alias="-g")
    ask: tuple[str, ...] = knob(
        ("tinyworld",),
        "tasks whose questions are asked before and after, as in chat_eval",
        alias="-a",
    )
    num_items: int = knob(
        3200, "questions of a task (tinyworld: of all its kinds together)", alias="-n", low=1
    )
    out: str = knob("", "the JSON to write (default: rl_curves.json in <base>/rl_curves)")
    png: str = knob("", "the picture to write (default: beside the JSON)")


def place(k: Knobs, start: Path, flags: Sequence[str], seed: int) -> Path:
    """The base folder of one run, with links to the tokenizer and the checkpoint to start from."""
    what = json.dumps([str(start), Checkpoint(start).fingerprint, *flags, k.ask, k.num_items])
    digest, source = hashlib.sha256(what.encode()).hexdigest()[:8], k.source
    base = base_dir() / "rl_curves" / f"{digest}-seed-{seed}"
    links = {
        base / "tokenizer": base_dir() / "tokenizer",
        base / "checkpoints" / source / start.parent.name / start.name: start,
    }
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target.resolve())
    return base


def run(base: Path, command: str, *words: str) -> None:
    """Run a command with `base` as its base folder its output in a log; UserError if it fails."""
    env = {
        **os.environ,
        "NANOCHAT_BASE_DIR": str(base),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    with open(base / "log", "ab") as log:
        status = subprocess.run(
            [sys.executable, "-m", f"scripts.{command}", *words], env=env, stdout=log, stderr=log
        ).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        last = (base / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise UserError(
            f"{command} ended with status {status}: {last.removeprefix('error: ')} "
            f"(its output is in {base / 'log'})"
        )


def record(k: Knobs, start: Path, flags: Sequence[str], seed: int) -> dict[str, Any]:
    """
    Train and ask whatever has not been trained and asked yet. Returns {seed, before, after:
    accuracy by kind, train, eval: rows of the logbook}.
    """
    base, tag = place(k, start, flags, seed), start.parent.name
    asked: dict[str, dict[str, Any]] = {}
    for stage in (k.source, "rl"):
        print0(f"seed {seed}: {'reinforcing' if stage == 'rl' else 'asking'}")
        if stage == "rl":
            run(base, "chat_rl", f"--source={k.source}", f"--seed={seed}", "--resume=auto", *flags)
        directory = base / "checkpoints" / stage / tag
        found = [r for r in logbook.read(directory) if r["kind"] == "chat_eval"]
        if not found:
            run(
                base,
                "chat_eval",
                "-i",
                stage,
                "-n",
                str(k.num_items),
                f"--seed={seed}",
                "-a",
                *k.ask,
            )
            found = [r for r in logbook.read(directory) if r["kind"] == "chat_eval"]
        asked[stage] = {
            name: {n: x[n] for n in ("accuracy", "n", "lo", "hi")}
            for name, x in found[-1]["kinds"].items()
        }
    rows = {
        kind: [r for r in logbook.read(base / "checkpoints" / "rl" / tag) if r["kind"] == kind]
        for kind in ("train", "eval")
    }
    numbers = (
        "step",
        "seconds",
        "reward",
        "zero_variance",
        "truncated",
        "length",
        "rollout_seconds",
    )
    train = [{n: round(r[n], 4) for n in numbers} for r in rows["train"]]
    looks = [
        {n: x for n, x in r.items() if n in ("step", "seconds") or "pass@" in n}
        for r in rows["eval"]
    ]
    return {
        "seed": seed,
        "before": asked[k.source],
        "after": asked["rl"],
        "train": train,
        "eval": looks,
    }


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Held-out accuracy by kind before and after, as means over the seeds; the gain's interval."""
    out = Table(
        "kind",
        "questions",
        "before",
        "after",
        "gain, points",
        title=f"greedy answers, mean of {len(records)} seeds",
    )
    for kind, x in records[0]["before"].items():
        before, after = (
            [100 * r[when][kind]["accuracy"] for r in records] for when in ("before", "after")
        )
        gain = interval([b - a for a, b in zip(before, after, strict=True)])
        spread = f" ({gain['lo']:+.1f} to {gain['hi']:+.1f})" if gain["lo"] is not None else ""
        out.add_row(
            kind,
            f"{x['n']:,}",
            *(f"{sum(v) / len(v):.1f} %" for v in (before, after)),
            f"{gain['mean']:+.1f}{spread}",
        )
    return out


def picture(records: Sequence[dict[str, Any]]) -> bytes:
    """
    Reward of the training questions, and pass@1 and pass@k of held-out ones: the mean over the
    seeds and the band that they span.
    """
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    buffer, ink = io.BytesIO(), "#1d232b"
    with matplotlib.rc_context({**page.RC, "text.color": ink, "axes.labelcolor": ink}):
        figure = Figure(figsize=(9, 3.3), layout="constrained", dpi=150)
        left, right = figure.subplots(1, 2)
        names = [
            n for n in records[0]["eval"][0] if "pass@" in n and not n.endswith(("_lo", "_hi"))
        ]
        for ax, rows, shown in ((left, "train", ["reward"]), (right, "eval", names)):
            runs = [one[rows] for one in records]
            parts = np.array_split(
                np.arange(len(runs[0])), min(len(runs[0]), 24)
            )  # one step's reward is that of few questions
            steps = [np.mean([runs[0][i]["step"] for i in part]) for part in parts]
            for name, colour in zip(shown, page.LIGHT, strict=False):
                y = 100 * np.array(
                    [[np.mean([rs[i][name] for i in part]) for part in parts] for rs in runs]
                )  # seeds x parts
                ax.fill_between(steps, y.min(0), y.max(0), color=colour, alpha=0.18, linewidth=0)
                ax.plot(
                    steps,
                    y.mean(0),
                    color=colour,
                    linewidth=1.8,
                    marker="o",
                    markersize=3,
                    label=name,
                )
            ax.set_xlabel("optimizer steps")
            ax.set_ylim(0, 102)
        left.set_title("Training questions: replies rewarded, %")
        right.set_title("Held-out questions answered, %")
        right.legend(frameon=False, loc="lower right")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(
        Knobs,
        argv,
        command="bench.rl_curves",
        description="Reinforcement over seeds, as JSON and as a picture.",
    )
    flags = shlex.split(k.flags)
    asked, _ = knobs.parse(chat_rl.ReinforceKnobs, flags, command="chat_rl")
    if asked.max_minutes or asked.max_hours:
        raise UserError(
            "the flags give a length in time, in which a busy machine makes fewer steps: give "
            "--num_iterations instead"
        )
    start = locate(k.source, k.model_tag).path
    records = [record(k, start, flags, seed) for seed in range(1, k.seeds + 1)]
    out = Path(k.out) if k.out else base_dir() / "rl_curves" / "rl_curves.json"
    png = Path(k.png) if k.png else out.with_suffix(".png")
    summary = {"flags": flags, "source": k.source, "runs": records}
    atomic_write(out, json.dumps(summary))
    atomic_write(png, picture(records))
    Console(width=None if Console().is_terminal else 140).print(table(records))
    print0(f"{out}\n{png}")
    last = [
        {"seed": r["seed"], **{n: r["eval"][-1][n] for n in r["eval"][-1] if "pass@" in n}}
        for r in records
    ]
    print(json.dumps({"flags": k.flags, "last": last}))
    return summary


if __name__ == "__main__":
    entry(main)
