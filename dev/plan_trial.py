"""
Compare a plan's choice with reality: for budgets of minutes on this machine, the model that `plan
recipe` chooses against three neighbours: the smaller and the larger model of its page, and the best
other prediction.

    python dev/plan_trial.py --texts DIR --minutes 3 10 30
    python dev/plan_trial.py --minutes 3 --data tinyworld --plan_only
    python dev/plan_trial.py --texts DIR --minutes 30 --data prose --seed 43 --only 2x128 2x192

DIR holds wikipedia/, books/, reddit/ (45 / 40 / 15 %). A budget becomes tokens for each model, at
the speed that dev/results/plan_trial_probe.json says; if it is missing, this machine is probed first,
while nothing else should run. Each run trains on its tokens with its own whole schedule, so that
the result does not depend on how busy the machine is meanwhile; with --by minutes it takes its time
instead. Each plan and each run is one row of dev/results/plan_trial.jsonl, and a row that is there
is not made again, on whatever machine. To see what a changed planner chooses, delete the rows of
plans: runs belong to a size, and count again.
"""

import json
import math
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import trials
from scipy import stats

from nanochat.base.common import columns, human, print0
from nanochat.study.records import record

ROWS = trials.RESULTS / "plan_trial.jsonl"
PROBE = trials.RESULTS / "plan_trial_probe.json"
VOCABULARY = {"tinyworld": 2048, "prose": 8192}
ROLES = "chosen", "smaller", "larger", "next"
EVALUATION = ["--eval_every=0", "--eval_tokens=65536", "--sample_every=0", "--keep=1"]
Row = dict[str, Any]
stored, add = partial(trials.stored, ROWS), partial(trials.add, ROWS)


def recipe(base: Path, minutes: float, words: list[str]) -> tuple[Row, Row]:
    """The plan that `plan recipe` writes as JSON, and the flags of base_train in its recipe."""
    file = base / "plan" / "trial.toml"
    if not PROBE.exists():
        sizes = ["--depths", "1", "2", "3", "4", "6", "--compile=on", "--limit_minutes=60"]
        trials.run(["-m", "scripts.plan", "probe", *sizes, f"--out={PROBE}"], base)
    length = [f"--minutes={minutes:g}", f"--out={file}", f"--probe={PROBE}"]
    trials.run(["-m", "scripts.plan", "recipe", *length, *words], base)
    flags = tomllib.loads(file.read_text(encoding="utf-8"))["base_train"]
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8")), flags


def neighbours(plan: Row) -> Iterator[tuple[str, Row]]:
    """(role, candidate) of the four models of a plan, without those that it has not."""
    taken: list[tuple[int, int]] = []
    four = {"chosen": plan["primary"], "smaller": plan["smaller"], "larger": plan["larger"]}
    able = [c for c in plan["candidates"] if not c["why"]]
    for role in ROLES:
        candidate = four.get(role) or next((c for c in able if shape(c) not in taken), None)
        if candidate and shape(candidate) not in taken:
            taken.append(shape(candidate))
            yield role, candidate


def size_of(flags: Row) -> str:
    return f"{flags['depth']} x {flags['model_dim']}"


def shape(candidate: Row) -> tuple[int, int]:
    return candidate["config"]["n_layer"], candidate["config"]["n_embd"]


def plan(base: Path, data: str, words: list[str], minutes: float) -> list[Row]:
    """The rows of the plan of a budget, one for each model to be trained."""
    rows = stored(kind="plan", data=data, minutes=minutes)
    if rows:
        return rows
    whole, _ = recipe(base, minutes, words)
    for role, c in neighbours(whole):
        depth, width = shape(c)
        size = [f"--depth={depth}", f"--model_dim={width}"]
        single, flags = recipe(base, minutes, [*words, *size])
        c = single["primary"]
        predicted = {"bpb": c["bpb"], "speed": c["speed"], "tokens": round(c["tokens"])}
        row = {"kind": "plan", "data": data, "minutes": minutes, "role": role, **predicted}
        rows.append(add({**row, "machine": single["machine"]["name"], "flags": flags}))
    return rows


def train(base: Path, planned: Row, by: str, seed: int) -> None:
    """Train what a row of a plan asks for, unless its run is stored."""
    flags = dict(planned["flags"])
    names = {"data": planned["data"], "minutes": planned["minutes"], "size": size_of(flags)}
    names |= {"by": by, "seed": seed}
    if stored(kind="run", **names):
        return
    tag = "-".join(str(value).replace(" ", "") for value in names.values())
    if by == "tokens":
        flags["max_minutes"] = 0
        flags["num_iterations"] = max(1, planned["tokens"] // flags["total_batch_size"])
        flags["compile"] = "off" if planned["minutes"] < 3 else "on"
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no_{name}"]
        elif isinstance(value, list):
            words += [f"--{name}", *value]
        else:
            words += [f"--{name}={value}"]
    run = ["-m", "scripts.base_train", *words, *EVALUATION]
    trials.run([*run, f"--model_tag={tag}", f"--seed={seed}", "--resume=auto"], base)
    made = record(base / "checkpoints" / "base" / tag)
    add({"kind": "run", **names, **{n: made[n] for n in ("final_bpb", "steps", "tokens")}})


def seed_noise() -> tuple[float, int]:
    """
    (standard deviation of a run among the seeds of its model, as a share of bits per byte; its
    degrees of freedom), pooled over the models that were trained with several seeds.
    """
    seeds = defaultdict(list)
    for run in stored(kind="run"):
        seeds[run["data"], run["minutes"], run["size"]].append(math.log(run["final_bpb"]))
    squares = sum((end - fmean(ends)) ** 2 for ends in seeds.values() for end in ends)
    freedom = sum(len(ends) - 1 for ends in seeds.values())
    return math.sqrt(squares / max(1, freedom)), freedom


def within_noise(chosen: list[float], best: list[float], noise: float, freedom: int) -> bool:
    """
    Whether the mean of the chosen model lies above that of the best one by no more than seeds alone
    give in 19 of 20 cases (Student's t, one-sided).
    """
    most = float(stats.t.ppf(0.95, freedom)) * noise * math.sqrt(1 / len(chosen) + 1 / len(best))
    return math.log(fmean(chosen) / fmean(best)) <= most


def report() -> None:
    """Predicted and measured, and whether each choice was best within the noise of seeds."""
    noise, freedom = seed_noise()
    lines, best, near, budgets = [], 0, 0, 0
    for first in stored(kind="plan", role="chosen"):
        budget = {name: first[name] for name in ("data", "minutes")}
        measured = {}
        for planned in stored(kind="plan", **budget):
            size = size_of(planned["flags"])
            runs = stored(kind="run", size=size, **budget)
            if not runs:
                continue
            ends = measured[planned["role"]] = [r["final_bpb"] for r in runs]
            predicted = "{:.3f} ({:.3f} to {:.3f})".format(*planned["bpb"])
            end = " ".join(f"{bpb:.4f}" for bpb in ends)
            lines.append((*budget.values(), planned["role"], size, human(runs[0]["tokens"])))
            lines[-1] += (predicted, end)
        if len(measured) == len(stored(kind="plan", **budget)):
            chosen, first_of_all = measured["chosen"], min(measured.values(), key=fmean)
            budgets += 1
            best += chosen == first_of_all
            near += within_noise(chosen, first_of_all, noise, freedom)
    heads = ("data", "minutes", "", "depth x width", "tokens", "bits per byte", "were")
    print0(columns(heads, lines))
    print0(
        f"of {budgets} budgets, the choice is the best of its neighbours in {best}, and no further "
        f"from the best than seeds explain in {near} (a seed moves a run by {noise:.2%}: "
        f"{freedom} repeated runs)"
    )


def main() -> None:
    parser = trials.command_line(__doc__ or "", "plan_trial", [], needs_texts=False)
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 10, 30])
    parser.add_argument("--data", nargs="+", choices=VOCABULARY, default=list(VOCABULARY))
    parser.add_argument("--by", choices=("tokens", "minutes"), default="tokens")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", nargs="+", help="sizes to train, such as 2x128; default: all")
    parser.add_argument("--plan_only", action="store_true", help="make the plans, train nothing")
    options = parser.parse_args()
    if "prose" in options.data and not options.texts:
        parser.error("--data prose also needs --texts DIR")
    for minutes in options.minutes:
        for data in options.data:
            base, vocabulary = (options.base / data).resolve(), VOCABULARY[data]
            words = ["--data", *trials.prepared(data, options.texts, base, vocabulary)]
            words = [] if data == "tinyworld" else words  # of which a plan takes what it reads
            planned = plan(base, data, [*words, f"--vocab={vocabulary}"], minutes)
            for row in planned if not options.plan_only else ():
                size = size_of(row["flags"]).replace(" ", "")
                if not options.only or size in options.only:
                    train(base, row, options.by, options.seed)
                    report()
    report()


if __name__ == "__main__":
    main()
