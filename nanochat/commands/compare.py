"""
Train conditions side by side, several seeds each, and say which differences are real.

    python -m scripts.compare --common="--depth=4 --num_iterations=400" --a="" --b="--activation=silu" --names relu2 silu --seeds=3

Runs go one after another, each a base_train in its own process, the conditions of a seed together and in turns first. Everything lies in
compare/NAME under NANOCHAT_BASE_DIR, which is also the base folder of its runs. The same command goes on where it was interrupted; more
seeds or conditions join what is there. It refuses to go on under other flags than a condition was begun with.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import torch

from nanochat.base import knobs, logbook
from nanochat.base.common import UserError, base_dir, duration, entry, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.base.runtime import Runtime
from nanochat.commands import base_train
from nanochat.data.sources import training_sources
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import prior_artifact
from nanochat.model.checkpoint import list_checkpoints
from nanochat.model.config import ArchitectureKnobs, GPTConfig
from nanochat.model.gpt import GPT
from nanochat.study import comparison
from nanochat.train.horizon import choose_horizon
from nanochat.train.run import OpenRun, resume_knobs

LETTERS = "abcdefgh"
TEXTS = {f"--{name}" for name in ("common", *LETTERS)}
OURS = {
    "seed": "--first_seed and --seeds",
    "model_tag": "--names",
    "resume": "the same command again",
    "new_horizon": "another --name",
}
SHARED = ("tokenizer", "tokens", "shards")  # of the base folder, made once for all runs
PROBED, TIMED = 6, 30  # steps that a dry run, and a round of --retime, takes of every condition


@dataclass(kw_only=True)
class Knobs:
    """Comparison"""

    name: str = knob("", "name of the comparison and its folder (default: the conditions' names)")
    common: str = knob("", "flags of base_train for every condition, in quotes")
    a: str = knob("", "flags of the first condition, the baseline")
    b: str | None = knob(None, "flags of the second condition, and so on")
    c: str | None = knob(None, "third")
    d: str | None = knob(None, "fourth")
    e: str | None = knob(None, "fifth")
    f: str | None = knob(None, "sixth")
    g: str | None = knob(None, "seventh")
    h: str | None = knob(None, "eighth")
    names: tuple[str, ...] = knob(
        (), "names of the conditions, in their order (default: from their flags)"
    )
    seeds: int = knob(3, "runs of every condition", low=1)
    first_seed: int = knob(42, "seed of the first run; the others follow")
    target: str = knob(
        "auto",
        "bits per byte to reach; auto = for each pair the final ones of the run that ended worse",
    )
    points: int = knob(20, "evaluations of a run, where the flags do not set --eval_every", low=2)
    eval_tokens: int = knob(
        1 << 17, "tokens of an evaluation, where the flags do not set --eval_tokens", low=1
    )
    keep: bool = knob(False, "keep the weights of finished runs")
    retime: int = knob(
        0,
        f"after the runs, time all conditions anew by turns: rounds of {TIMED} steps each; seconds follow them",
        low=0,
    )
    dry_run: bool = knob(
        False,
        f"say what would run and for how long, from finished runs or {PROBED} steps of each condition",
    )


@dataclass(frozen=True)
class Condition:
    name: str
    flags: list[str]  # of base_train, all but those in OURS
    knobs: base_train.PretrainKnobs
    looks: int  # evaluations of a run

    @property
    def timed(self) -> float:
        """Its budget in seconds, 0 = none."""
        return 60 * self.knobs.max_minutes + 3600 * self.knobs.max_hours


def conditions_of(k: Knobs) -> list[Condition]:
    """The conditions that were asked for, every flag of theirs checked. UserError names the condition."""
    if k.target != "auto" and not re.fullmatch(r"\d*\.?\d+", k.target):
        raise UserError(f"--target takes auto or a number of bits per byte, not {k.target!r}")
    texts = {x: getattr(k, x) for x in LETTERS if getattr(k, x) is not None}
    if len(texts) < 2:
        raise UserError(
            'one condition is nothing to compare: give a second one, as in --b="--activation=silu"'
        )
    plain = [
        re.sub(r"[^\w.]+", "-", t.replace("--", "")).strip("-_.")[:40] or "baseline"
        for t in texts.values()
    ]
    names = list(k.names) or (plain if len(set(plain)) == len(plain) else list(texts))
    if len(names) != len(texts) or len(set(names)) < len(names):
        raise UserError(
            f"--names gives {len(names)} names ({' '.join(names)}) for {len(texts)} conditions: one each, all different"
        )
    if bad := [n for n in (*names, k.name) if n and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", n)]:
        raise UserError(
            f"{bad[0]!r} cannot be a folder name: use letters, digits, dots, dashes and underscores"
        )
    tokenizer = Tokenizer.load()
    out = []
    for name, (letter, text) in zip(names, texts.items(), strict=True):
        try:
            out.append(_checked(name, shlex.split(k.common) + shlex.split(text), k, tokenizer))
        except (UserError, ValueError) as e:  # ValueError: shlex on a quote that is not closed
            raise UserError(f"condition {name} (--{letter}): {e}") from None
    return out


def _checked(name: str, flags: list[str], k: Knobs, tokenizer: Tokenizer) -> Condition:
    if {"-h", "--help"} & set(flags):
        raise UserError("python -m scripts.base_train -h lists the flags of a condition")
    _, origins = knobs.parse(base_train.PretrainKnobs, flags, command="base_train")
    if taken := [n for n in OURS if origins[n] != "default"]:
        raise UserError(f"--{taken[0]} belongs to the comparison: use {OURS[taken[0]]}")
    ours = {
        "eval_every": f"{1 / k.points:g}",
        "eval_tokens": str(k.eval_tokens),
        "sample_every": "0",
        "keep": "1",
    }
    flags = flags + [f"--{n}={v}" for n, v in ours.items() if origins[n] == "default"]
    given = knobs.parse(base_train.PretrainKnobs, flags, command="base_train")
    b, origins, _ = resume_knobs("base", name, *given)
    training_sources(b.data)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        **b.dimensions(),
        **{f.name: getattr(b, f.name) for f in fields(ArchitectureKnobs)},
    )
    if b.rap:
        prior_artifact.prepare(
            b, config, tokenizer.fingerprint, torch.device("cpu")
        )  # for what it refuses
    print0(f"{name}: {shlex.join(flags)}")
    nowhere = Runtime(torch.device("meta"), torch.float32, 0, 1, 0)
    opened = OpenRun(
        "base",
        b,
        origins,
        nowhere,
        tokenizer,
        GPT.build(config, "meta"),
        Path(),
        None,
        peak_flops=1e12,
        began=0.0,
    )
    with redirect_stdout(io.StringIO()) as said:
        steps = choose_horizon(opened).steps
    if steps or b.total_batch_size:  # else the batch follows from a peak that only a run measures
        print0(said.getvalue(), end="")
    every = b.eval_every
    looks = round(1 / every) if 0 < every < 1 else steps // int(every) if every and steps else 0
    if looks < 2:
        raise UserError(
            f"with --eval_every={every:g} there is no curve to interpolate: lower it, or leave it to --points"
        )
    return Condition(name, flags, b, looks)


class Comparison:
    """A comparison's folder: which flags it was begun with, which runs are finished, one run at a time."""

    def __init__(self, k: Knobs, conditions: list[Condition]):
        self.conditions, self.target, self.keep = (
            conditions,
            None if k.target == "auto" else float(k.target),
            k.keep,
        )
        self.name = k.name or "-vs-".join(c.name for c in conditions)
        self.folder = (base_dir() / "compare" / self.name).resolve()
        n = len(
            conditions
        )  # whatever drifts while the machine works falls on all alike: another condition goes first with every seed
        self.todo = [
            (conditions[(i + j) % n], k.first_seed + i) for i in range(k.seeds) for j in range(n)
        ]
        self.records: list[dict[str, Any]] = []
        begun: dict[str, list[str]] = {}
        if (self.folder / "plan.json").exists():
            begun = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
            self.records = [
                json.loads(line)
                for line in (self.folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
            ]
        for c in conditions:
            if begun.get(c.name, c.flags) != c.flags:
                raise UserError(
                    f"{self.name} has a condition {c.name} that was begun with {shlex.join(begun[c.name])}, not {shlex.join(c.flags)}: "
                    "give it another name, or the comparison another --name"
                )
        self.plan = begun | {c.name: c.flags for c in conditions}

    def done(self, c: Condition, seed: int) -> bool:
        return any(
            (r["condition"], r["seed"]) == (c.name, seed) and not r.get("again")
            for r in self.records
        )

    def usual(self, c: Condition) -> float:
        """Seconds that a run of this condition took, 0 = not known yet."""
        return fmean(
            [
                r["wall_seconds"]
                for r in self.records
                if r["condition"] == c.name and not r.get("error")
            ]
            or [0.0]
        )

    def write(self, record: dict[str, Any] | None = None) -> dict[str, Any]:
        """Add a run; write the plan, all runs, results and page."""
        if record:
            same = (record["condition"], record["seed"])
            self.records = [r for r in self.records if (r["condition"], r["seed"]) != same] + [
                record
            ]
        atomic_write(
            self.folder / "runs.jsonl", "".join(json.dumps(r) + "\n" for r in self.records)
        )
        atomic_write(self.folder / "plan.json", json.dumps(self.plan, indent=1))
        asked = {(c.name, seed) for c, seed in self.todo}
        runs = [r for r in self.records if (r["condition"], r["seed"]) in asked]
        results = comparison.analyse(
            runs, {c.name: shlex.join(c.flags) for c in self.conditions}, self.target
        )
        results = {
            "name": self.name,
            "runs_planned": len(self.todo),
            "runs_finished": len(runs),
            **results,
        }
        atomic_write(self.folder / "results.json", json.dumps(results, indent=1))
        comparison.build(self.name, results, runs, self.folder / "report.html")
        return results

    def pinned(self, c: Condition) -> list[str]:
        """What a run would choose by measuring the machine, as the first finished run (of its condition, for the batch) chose it."""
        good = [r for r in self.records if not r.get("error")]
        auto = {
            n: {o.name for o in self.conditions if getattr(o.knobs, n) == "auto"}
            for n in ("dtype", "compile")
        }
        auto["total_batch_size"] = {c.name} if c.timed and not c.knobs.total_batch_size else set()
        chosen = {
            n: next((r["pins"][n] for r in good if r["condition"] in who), None)
            for n, who in auto.items()
            if c.name in who
        }
        return [f"--{n}={v}" for n, v in chosen.items() if v is not None]

    def start(
        self, base: Path, c: Condition, seed: int, log: IO[bytes], lock: IO[bytes]
    ) -> subprocess.Popen:
        """base_train of one run with `base` as its base folder. It holds the lock as long as it lives, even if this process is killed."""
        for name in SHARED:
            (base_dir() / name).mkdir(exist_ok=True)
            if not (base / name).exists():
                (base / name).unlink(missing_ok=True)
                (base / name).symlink_to(os.path.relpath((base_dir() / name).resolve(), base))
        root = str(Path(base_train.__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        words = [
            *c.flags,
            *self.pinned(c),
            f"--seed={seed}",
            f"--model_tag={c.name}-s{seed}",
            "--resume=auto",
        ]
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "nanochat.commands.base_train", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": path},
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )

    def run(
        self, c: Condition, seed: int, lock: IO[bytes], say: Callable[[Mapping[str, Any]], None]
    ) -> dict[str, Any]:
        """Train one run to its end and return its record, that of a failure too. KeyboardInterrupt after the run has saved itself."""
        directory = self.folder / "checkpoints" / "base" / f"{c.name}-s{seed}"
        log = self.folder / "logs" / f"{c.name}-s{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            process = self.start(self.folder, c, seed, out, lock)
            try:
                while process.poll() is None:
                    time.sleep(0.25)
                    say(_last(directory))
            except BaseException:
                print0("\nthis run saves itself; the same command goes on with it", file=sys.stderr)
                process.terminate()  # once: a second signal would stop it before it has saved
                process.wait()
                raise
        more = {"condition": c.name, "seed": seed, "flags": [*c.flags, *self.pinned(c)]}
        if process.returncode == 0:
            record = comparison.record(directory, **more)
            if record["final_bpb"] is None:
                record["error"] = "its bits per byte are no number"
        else:
            error = _error(log, process.returncode)
            if not _last(directory):
                raise UserError(
                    f"{c.name} with seed {seed} did not start: {error} (all it said is in {log})"
                )
            record = {
                **more,
                "error": error,
                "again": process.returncode != 2,
            }  # 2: its own fault; else something from outside
        return record

    def clear(self, record: Mapping[str, Any]) -> None:
        """Delete the weights of a run that is recorded for good."""
        if not self.keep and not record.get("again"):
            for stored in list_checkpoints(
                self.folder / "checkpoints" / "base" / f"{record['condition']}-s{record['seed']}"
            ):
                shutil.rmtree(stored.path)

    def probe(self, c: Condition, lock: IO[bytes], steps: int = PROBED) -> tuple[float, float]:
        """-> seconds that a run of this condition takes, milliseconds of a step: from first steps in a folder that is deleted again."""
        base = self.folder / "probe"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        directory, log = base / "checkpoints" / "base" / f"{c.name}-s0", base / "log"
        try:
            with open(log, "wb") as out:
                process = self.start(base, c, 0, out, lock)
                try:
                    at = _seen(process, directory, steps)
                finally:
                    process.kill()
                    process.wait()
            if "train" not in at:
                raise UserError(
                    f"condition {c.name} does not start: {_error(log, process.returncode)}"
                )
            step_ms = comparison.record(directory)["step_ms"]
            if c.timed:
                return c.timed, step_ms
            whole = next(
                r["config"]["horizon"]["steps"]
                for r in logbook.read(directory)
                if r["kind"] == "start"
            )
            training = at["train"] - at["eval"] + whole * step_ms / 1e3
            return at["start"] - at["launch"] + (c.looks + 1) * (
                at["eval"] - at["start"]
            ) + training, step_ms
        finally:
            shutil.rmtree(base, ignore_errors=True)

    def retime(self, rounds: int, lock: IO[bytes]) -> dict[str, Any]:
        """Time every condition anew, by turns, and give the runs of the n-th seed the step time of round n (modulo rounds)."""
        times: dict[str, list[float]] = {c.name: [] for c in self.conditions}
        for n in range(rounds):
            for c in self.conditions[n % len(times) :] + self.conditions[: n % len(times)]:
                times[c.name].append(self.probe(c, lock, TIMED)[1])
                print0(f"round {n + 1} of {rounds}: {c.name}, {times[c.name][-1]:.1f} ms a step")
        first = min(seed for _, seed in self.todo)
        for i, r in enumerate(self.records):
            if r["condition"] in times and not r.get("error"):
                self.records[i] = comparison.at_speed(
                    r, times[r["condition"]][(r["seed"] - first) % rounds]
                )
        return self.write()


def _seen(process: subprocess.Popen, directory: Path, steps: int) -> dict[str, float]:
    """When a run wrote its first row of each kind, watched until it has taken so many steps or ended."""
    at = {"launch": time.monotonic()}
    going = True
    while going:
        going = process.poll() is None and _last(directory).get("step", 0) < steps
        time.sleep(0.05)
        for row in logbook.read(directory):
            at.setdefault(row["kind"], time.monotonic())
    return at


def _last(directory: Path) -> dict[str, Any]:
    """The newest row of training in a run's logbook, {} before there is one; reads the end of the file alone."""
    try:
        with open(directory / logbook.FILE, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 16384))
            lines = f.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    rows = (json.loads(line) for line in reversed(lines) if line.startswith(b'{"kind": "train"'))
    return next(rows, {})


def _error(log: Path, status: int) -> str:
    """The sentence with which a run ended."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    said = next(
        (line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), ""
    )
    return said or (
        f"ended by signal {-status} (out of memory?)"
        if status < 0
        else lines[-1]
        if lines
        else f"ended with status {status}"
    )


@contextmanager
def locked(folder: Path) -> Iterator[IO[bytes]]:
    """The comparison's folder for this process and its runs alone. SIGTERM counts as Ctrl+C here."""
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder.name} is being compared already, or its last run still ends: wait for it, or end it"
            ) from None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield f
        finally:
            signal.signal(signal.SIGTERM, before)


def _live(
    work: Comparison, todo: Sequence[tuple[Condition, int]]
) -> Callable[[Mapping[str, Any]], None]:
    """-> say(row): where the first run of `todo` stands and how long all take: a terminal's live line, else a line each half minute."""
    (c, seed), terminal = todo[0], sys.stdout.isatty()
    printed = time.monotonic()

    def say(row: Mapping[str, Any]) -> None:
        nonlocal printed
        if not row or time.monotonic() - printed < (1 if terminal else 30):
            return
        printed = time.monotonic()
        whole = row["seconds"] / max(row["progress"], 1e-3)
        left = duration(whole - row["seconds"] + sum(work.usual(o) or whole for o, _ in todo[1:]))
        n = len(work.todo)
        text = f"run {n - len(todo) + 1} of {n}  {c.name}  seed {seed}  {row['progress']:.0%}  loss {row['loss']:.4f}  {left} left in all"
        print0(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n")

    return say


def _dry_run(
    work: Comparison, todo: Sequence[tuple[Condition, int]], lock: IO[bytes]
) -> dict[str, Any]:
    total = 0.0
    try:
        for c in work.conditions:
            n = sum(o is c for o, _ in todo)
            each = c.timed or work.usual(c) or (work.probe(c, lock)[0] if n else 0.0)
            total += n * each
            print0(f"  {c.name}: {n} runs of about {duration(each)}")
    finally:
        if not (work.folder / "plan.json").exists():
            shutil.rmtree(work.folder)
    print0(f"about {duration(total)} in all")
    return {"runs": len(todo), "seconds": total}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    words: list[str] = []
    for word in (
        sys.argv[1:] if argv is None else argv
    ):  # --b "--activation=silu" is a flag and its value, not two flags
        if words and words[-1] in TEXTS:
            words[-1] += f"={word}"
        else:
            words.append(word)
    k, _ = knobs.parse(Knobs, words, command="compare")
    work = Comparison(k, conditions_of(k))
    if k.retime and any(c.timed for c in work.conditions):
        raise UserError(
            "--retime cannot be used where a run's length is a time: what it learns depends on its speed"
        )
    with locked(work.folder) as lock:
        todo = [(c, seed) for c, seed in work.todo if not work.done(c, seed)]
        print0(
            f"{work.name}: {len(work.todo)} runs, {len(work.todo) - len(todo)} finished, in {work.folder}"
        )
        if k.dry_run:
            return _dry_run(work, todo, lock)
        results = work.write()
        for i, (c, seed) in enumerate(todo):
            print0(
                f"run {len(work.todo) - len(todo) + i + 1} of {len(work.todo)}: {c.name}, seed {seed}"
            )
            if c.timed and c.knobs.compile != "off" and all(o is not c for o, _ in todo[:i]):
                print0(
                    "  first steps that do not count: a budget of time is not to pay for a compilation that other runs find done"
                )
                work.probe(c, lock)
            record = work.run(c, seed, lock, _live(work, todo[i:]))
            results = work.write(record)
            work.clear(record)
            said = (
                record.get("error")
                or f"{record['final_bpb']:.4f} bits per byte, {record['step_ms']:.1f} ms a step"
            )
            print0(f"\r\033[K  {said}" if sys.stdout.isatty() else f"  {said}")
        if k.retime:
            results = work.retime(k.retime, lock)
    for pair in results["pairs"]:
        print0(comparison.text(pair))
    print0(f"{work.folder / 'report.html'}")
    return results


if __name__ == "__main__":
    entry(main)
