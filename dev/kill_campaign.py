"""
Kill training with kill -9 again and again, resume it, and compare the end bitwise with a run that
nobody killed: weights, optimizer, losses and evaluations, over the four stages and over two ranks.

    PYTHONPATH=tests python dev/kill_campaign.py --kills=200 --folder=/tmp/kills

Half of the kills come at random moments; the others are aimed at the writing of a checkpoint, at
its metadata and at tokenising. Every run is a tiny model on a CPU. The script resumes after an
interruption: each kill and each comparison is a row of dev/results/kill_campaign.json. A series that
differs keeps its folder. The exit status says whether all were equal.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny  # pyright: ignore[reportMissingImports]
import torch

from nanochat.base import hardware, logbook
from nanochat.base.common import entry
from nanochat.base.files import atomic_write, sha256_file
from nanochat.commands import base_train, chat_rl, chat_sft, mid_train
from nanochat.eval.tasks import mixture
from nanochat.model.checkpoint import newest
from nanochat.train import rollout

RESULTS = Path(__file__).resolve().parent / "results" / "kill_campaign.json"
LATER = ["--num_iterations=20", "--eval_every=4", "--save_every=3", "--eval_tokens=2000"]
STAGES: dict[str, tuple[str, Any, list[str]]] = {  # name -> stage, command and flags
    "base": ("base", base_train, ["--num_iterations=40", "--eval_every=7", "--save_every=5"]),
    "mid": ("mid", mid_train, [*LATER, "--data=tinyworld@300", "--total_batch_size=1024"]),
    "sft": (
        "sft",
        chat_sft,
        [*LATER, "--data=tinyworld@300", "--source=mid", "--conversations_per_step=8"],
    ),
    "rl": (
        "rl",
        chat_rl,
        [
            *("--num_iterations=8", "--eval_every=4", "--save_every=2", "--eval_items=6"),
            *("--num_items=60", "--questions_per_step=3", "--samples=3", "--max_tokens=12"),
        ],
    ),
    "two ranks": ("base", base_train, ["--num_iterations=30", "--eval_every=7", "--save_every=5"]),
}
COMMON = ["--model_tag=t", "--compile=off", "--device_type=cpu", "--dtype=float32"]
NUMBERS = "loss", "lr_mult", "tokens", "reward", "val_bpb", "pass@1"  # that must be equal


def prepare() -> None:
    """What makes a tiny run quick, and gives an untrained policy rewards to learn from."""
    torch.set_num_threads(1)
    hardware.measured_peak = lambda *_: 1e11
    mixture.COUNTS["tinyworld"] = 300, 40
    rollout.reward = lambda tokenizer, question, reply: float(sum(reply.tokens) % 2)


def start(base: Path, stage: str, flags: Sequence[str], log: Path) -> list[int]:
    """Fork the processes of a run, one per rank; returns their ids."""
    ranks = 2 if stage == "two ranks" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        os.environ["NANOCHAT_BASE_DIR"] = str(base)
        if ranks > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        run_and_exit(lambda: STAGES[stage][1].main([*COMMON, *flags]))
    return pids


def run_and_exit(main: Callable[[], object]) -> None:
    """Run a command in this forked process and end with its exit status."""
    status = 1
    try:
        entry(main)
        status = 0
    except SystemExit as e:
        status = int(e.code or 0)
    finally:
        os._exit(status)


def ended(pids: Sequence[int]) -> bool:
    """Whether one of the processes has ended; it stays for `collect`."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return any(os.waitid(os.P_PID, pid, flags) is not None for pid in pids)


def collect(pids: Sequence[int]) -> list[int]:
    """Wait for the processes; returns their exit statuses, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def end_the_others(pids: Sequence[int], victim: int) -> bool:
    """
    Wait until the other ranks have noticed that one is gone. After 20 seconds they get SIGTERM, as
    from torchrun: a rank that waits for one that never joined notices nothing. Returns whether.
    """
    until = time.monotonic() + 20
    others = [pid for pid in pids if pid != victim]
    while running := [pid for pid in others if not ended([pid])]:
        if time.monotonic() > until:
            for pid in running:
                os.kill(pid, signal.SIGTERM)
            return True
        time.sleep(0.02)
    return False


def facts(run: Path) -> dict[str, Any]:
    """What must be the same at the end of every run."""
    checkpoint = newest(run, optimizer=True)
    if checkpoint is None:
        return {}
    rows = [row for row in logbook.read(run) if row["kind"] in ("train", "eval", "sample")]
    return {
        "step": checkpoint.step,
        "done": checkpoint.meta["done"],
        "best": checkpoint.meta["best"],
        "weights": sha256_file(checkpoint.path / "model.safetensors"),
        "optimizer": sha256_file(checkpoint.path / "optim.safetensors"),
        "rows": [[row["kind"], row["step"], *map(row.get, NUMBERS)] for row in rows],
        "left over": sorted(
            p.name for p in (*run.glob(".*"), *run.glob("*/.*"), *run.glob("damaged*"))
        ),
    }


class Campaign:
    """The folders of a campaign and its results."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.results: dict[str, Any] = {"machine": platform.platform(), "kills": [], "series": []}
        if RESULTS.exists():
            self.results = json.loads(RESULTS.read_text(encoding="utf-8"))
            self.results.pop("table", None)

    def write(self) -> None:
        """Write the results, with their sums first."""
        kills, series = self.results["kills"], self.results["series"]
        table = {}
        for stage in STAGES:
            done = [s for s in series if s["stage"] == stage]
            table[stage] = {
                "kills": sum(s["kills"] for s in done),
                "series": len(done),
                "equal": sum(s["equal"] for s in done),
                "during": Counter(k["during"] for k in kills if k["stage"] == stage),
            }
        atomic_write(RESULTS, json.dumps({**self.results, "table": table}, indent=1))

    @property
    def total(self) -> int:
        """Kills of the series that were compared."""
        return sum(series["kills"] for series in self.results["series"])

    def _train(self, base: Path, stage: str, flags: Sequence[str]) -> None:
        """Train without a kill; the output is in `base`/log."""
        if any(collect(start(base, stage, flags, base / "log"))):
            raise SystemExit(f"{stage} failed: see {base / 'log'}")

    def seed(self) -> tuple[Path, list[str]]:
        """The base folder with a tokenizer and the models that stages start from; base's flags."""
        seed, stored = self.folder / "seed", self.folder / "flags.json"
        if not stored.exists():
            flags = tiny.workplace(self._fresh("text"))
            shutil.rmtree(seed, ignore_errors=True)
            shutil.copytree(self.folder / "text", seed)
            for stage, own in (("base", flags), ("mid", []), ("sft", [])):
                self._train(seed, stage, [*own, *STAGES[stage][2], "--num_iterations=4"])
            shutil.rmtree(seed / "tokens")
            atomic_write(stored, json.dumps(flags))
        return seed, json.loads(stored.read_text(encoding="utf-8"))

    def _fresh(self, name: str) -> Path:
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def place(self, stage: str, name: str) -> tuple[Path, Path]:
        """(base folder, run folder) of a run that is about to start."""
        seed, _ = self.seed()
        base = self.folder / name
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(seed, base)
        run = base / "checkpoints" / STAGES[stage][0] / "t"
        shutil.rmtree(run, ignore_errors=True)
        return base, run

    def reference(self, stage: str) -> tuple[dict[str, Any], float]:
        """The facts of a run without a kill, and its seconds."""
        file = self.folder / f"reference {stage}.json"
        if not file.exists():
            base, run = self.place(stage, f"reference {stage}")
            began = time.monotonic()
            self._train(base, stage, self.flags(stage))
            atomic_write(file, json.dumps([facts(run), time.monotonic() - began]))
        return tuple(json.loads(file.read_text(encoding="utf-8")))

    def flags(self, stage: str) -> list[str]:
        own = self.seed()[1] if STAGES[stage][0] == "base" else []
        return [*own, *STAGES[stage][2]]

    def series(self, stage: str, most: int) -> None:
        """Kill and resume one run until it ends by itself, at most `most` times, and compare it."""
        expected, seconds = self.reference(stage)
        base, run = self.place(stage, "place")
        log, kills = base / "log", []
        while True:
            pids = start(base, stage, [*self.flags(stage), "--resume=auto"], log)
            during = self._moment(pids, base, run, seconds) if len(kills) < most else "the end"
            if during == "the end":
                break
            victim = self.rng.choice(pids)  # of two ranks one; the other must end by itself
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            told = end_the_others(pids, victim)
            collect(pids)
            checkpoint = newest(run)
            kills.append(
                {
                    "stage": stage,
                    "during": during,
                    "rank": pids.index(victim),
                    "newest": checkpoint.step if checkpoint else None,
                    "others ended after": round(time.monotonic() - killed, 1),
                    "told by the launcher": told,
                }
            )
        statuses = collect(pids)
        got = facts(run)
        differ = [name for name in expected if got.get(name) != expected[name]]
        clean = not any(statuses) and b"Traceback" not in log.read_bytes()
        equal = clean and not differ and not list((base / "tokens").glob(".build*"))
        self.results["kills"] += kills
        self.results["series"].append(
            {
                "stage": stage,
                "kills": len(kills),
                "equal": equal,
                "differ": differ,
                "exit": statuses,
            }
        )
        self.write()
        if not equal:
            base.rename(self.folder / f"differs {int(time.time())}")
        print(f"{stage}: {len(kills)} kills, equal: {equal} {differ or ''}", flush=True)

    def _moment(self, pids: Sequence[int], base: Path, run: Path, seconds: float) -> str:
        """Wait for the moment of the next kill; says what it meets, or "the end" of the run."""
        aims = {
            "a save": lambda: any(run.glob(".step_*.tmp")),
            "metadata": lambda: any(run.glob("step_*/.*.tmp")),
            "tokenising": lambda: any((base / "tokens").glob(".build*")),
        }
        aim = self.rng.choice(["random", "random", "random", *aims])
        until = time.monotonic() + self.rng.choice(
            [self.rng.uniform(0, seconds / 4), self.rng.uniform(0, seconds)]
        )
        while time.monotonic() < until and not (aim in aims and aims[aim]()):
            if ended(pids):
                return "the end"
            time.sleep(0.0005 if aim in aims else 0.002)
        time.sleep(self.rng.uniform(0, 0.003))
        if ended(pids):
            return "the end"
        return next((name for name in aims if aims[name]()), "other work")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # pyright: ignore
    parser.add_argument("--kills", type=int, default=200, help="kills in all")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so long (0 = never)")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs lie")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--most", type=int, default=12, help="kills per series")
    options = parser.parse_args()
    prepare()
    campaign = Campaign(options.folder.resolve(), random.Random())
    end = time.monotonic() + 60 * options.minutes
    while campaign.total < options.kills and (not options.minutes or time.monotonic() < end):
        counts = Counter(dict.fromkeys(options.stages, 0))
        for series in campaign.results["series"]:
            if series["stage"] in counts:
                counts[series["stage"]] += series["kills"]
        campaign.series(min(counts, key=lambda stage: counts[stage]), options.most)
    bad = [series for series in campaign.results["series"] if not series["equal"]]
    print(f"{campaign.total} kills, {len(campaign.results['series'])} series, {len(bad)} differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
