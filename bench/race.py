"""
The race against a checkout of karpathy/nanochat: the same texts, each with its own tokenizer and its
own code, the same minutes, one scorer over held-out documents. It downloads nothing.

    python -m bench.race --checkout ~/nanochat --texts a.jsonl books.txt --work race --minutes 4
    python -m bench.race ... --legs ours head tuned --seeds 1 2 3 --minutes 6 12
    python -m bench.race ... --sweep_minutes 60 --legs tuned       its learning rates first

Every leg leaves one JSON file in WORK/legs; a leg that has one is not run again, so an interrupted
race continues where it stopped. The last lines are a table of all legs. See bench/race.md.
"""

import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.race_head import bits_per_byte, read
from nanochat.base.common import UserError, columns, duration, entry, notice, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob, parse

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT_EVERY = 60  # one document of so many is held out
CALIBRATION = 40  # steps that measure how long a step of the opponent takes
FACTORS = (0.3, 1.0, 3.0, 10.0)  # of its rates after its own scaling, tried one rate at a time
REFERENCE_BATCH = 2**19  # for which its rates are given: it scales them by the root of the batch
SHAPING = (  # the knobs that must be the same for all legs of a work folder
    "characters",
    "held_out",
    "vocab_size",
    "depth",
    "sequence_len",
    "batch",
    "rows",
    "flags",
    "head_dtype",
)


@dataclass(kw_only=True)
class RaceKnobs:
    """Race"""

    checkout: str = knob("", "folder with a checkout of karpathy/nanochat")
    python: str = knob(
        "", "its Python (default: this one; an empty module stands in for wandb if it is missing)"
    )
    texts: tuple[str, ...] = knob((), "text files, .jsonl with a field text, or .txt")
    work: str = knob("race", "folder for data, models and results")
    characters: int = knob(60_000_000, "characters of text to use, held-out ones included", low=1)
    held_out: int = knob(1_000_000, "characters of held-out text to score at most", low=1)
    vocab_size: int = knob(16_384, "tokens of each tokenizer", low=300)
    depth: int = knob(4, "layers of both models", low=1)
    sequence_len: int = knob(512, "context of both models", low=8)
    batch: int = knob(4096, "tokens per step of the opponent", low=8)
    rows: int = knob(8, "rows of a micro-batch of the opponent", low=1)
    minutes: tuple[float, ...] = knob((4.0,), "lengths of the legs")
    seeds: tuple[int, ...] = knob((1,), "seeds: of our run; of the order of the opponent's texts")
    legs: tuple[Literal["ours", "head", "tuned"], ...] = knob(
        ("ours", "head"),
        "who races: ours = base_train with its defaults, head = the checkout as shipped, tuned = "
        "the checkout with the best rates of the sweep",
    )
    flags: str = knob("", "further flags of our base_train, in one string")
    head_dtype: Literal["", "float32", "bfloat16"] = knob(
        "", "dtype of the opponent (default: its own choice)"
    )
    sweep_minutes: float = knob(0.0, "time for tuning the opponent's rates", low=0)
    sweep_leg: float = knob(3.0, "minutes of each run of the sweep", low=0.01)


@dataclass
class Race:
    """The folders and the environment of a race."""

    knobs: RaceKnobs
    work: Path
    checkout: Path

    def environment(self, base: Path, ours: bool) -> dict[str, str]:
        path = [str(ROOT if ours else self.checkout)]
        if not ours:
            path.append(str(self.work / "stand-ins"))
        dtype = {"NANOCHAT_DTYPE": self.knobs.head_dtype} if self.knobs.head_dtype else {}
        keep = {n: v for n, v in os.environ.items() if n not in ("NANOCHAT_DTYPE", "RANK")}
        return {
            **keep,
            **({} if ours else dtype),
            "PYTHONPATH": os.pathsep.join(path),
            "NANOCHAT_BASE_DIR": str(base),
        }

    def run(self, base: Path, ours: bool, *words: str) -> str:
        """What a command prints; its lines also go to WORK/log.txt. UserError if it fails."""
        python = sys.executable if ours else self.knobs.python or sys.executable
        command = [python, *words]
        with open(self.work / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT if ours else self.checkout,
                env=self.environment(base, ours),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
            lines = []
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                log.write(line)
        if process.wait():
            raise UserError(
                f"{shlex.join(command[:4])} failed: {''.join(lines[-3:]).strip()[-400:]} (all of "
                f"it is in {self.work / 'log.txt'})"
            )
        return "".join(lines)

    def head_base(self, seed: int) -> Path:
        return self.work / f"head-{seed}"


# ---- the texts


def documents(path: Path) -> Iterator[str]:
    """The texts of a file; a .txt file in pieces of about 16,000 characters, cut at paragraphs."""
    if path.suffix == ".jsonl":
        yield from read(path)
        return
    piece = ""
    for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) > 16_000:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def prepare(race: Race) -> None:
    """Split the texts into training and held-out documents, and write both sides' files."""
    k, done = race.knobs, race.work / "texts.json"
    identity = {name: getattr(k, name) for name in SHAPING} | {"texts": list(k.texts)}
    if done.exists():
        stored = json.loads(done.read_text())["identity"]
        for name, value in identity.items():
            if stored.get(name, value) != value:  # earlier races do not say all of them
                raise UserError(
                    f"{race.work} holds a race with another --{name} ({stored[name]} instead "
                    f"of {value}): choose another --work"
                )
        return
    train, held_out, size = [], [], 0
    streams = [documents(Path(t).expanduser()) for t in k.texts]
    given = [0] * len(streams)
    sizes = [Path(t).expanduser().stat().st_size for t in k.texts]
    total = 0
    while streams and total < k.characters:
        i = min(range(len(streams)), key=lambda i: given[i] / sizes[i])
        text = next(streams[i], None)
        if text is None:
            del streams[i], given[i], sizes[i]
            continue
        given[i] += len(text)
        total += len(text)
        if len(train) % HELD_OUT_EVERY == 0 and size < k.held_out:
            held_out.append(text)
            size += len(text)
        train.append(text)
    chosen = set(held_out)
    train = [t for t in train if t not in chosen]
    for name, texts in (("train", train), ("held_out", held_out)):
        lines = (json.dumps({"text": t}, ensure_ascii=False) for t in texts)
        atomic_write(race.work / f"{name}.jsonl", "\n".join(lines) + "\n")
    figures = {"identity": identity, "train": sum(map(len, train)), "held_out": size}
    atomic_write(done, json.dumps(figures, indent=1))


def open_head(race: Race, seed: int) -> Path:
    """The opponent's base folder for a seed: its shards in a shuffled order, and its tokenizer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    base, data = race.head_base(seed), race.head_base(seed) / "base_data_climbmix"
    if not (data / "shard_06542.parquet").exists():
        data.mkdir(parents=True, exist_ok=True)
        texts = read(race.work / "train.jsonl")
        random.Random(seed).shuffle(texts)
        last = texts[: max(1, len(texts) // 100)]
        for name, part in (("shard_00000", texts), ("shard_06542", last)):
            table = pa.table({"text": part})
            pq.write_table(table, data / f"{name}.parquet", row_group_size=256)
    if not (base / "tokenizer" / "token_bytes.pt").exists():
        first = race.head_base(race.knobs.seeds[0])
        if (first / "tokenizer" / "token_bytes.pt").exists():
            shutil.copytree(first / "tokenizer", base / "tokenizer", dirs_exist_ok=True)
        else:
            vocabulary = f"--vocab-size={race.knobs.vocab_size}"
            race.run(base, False, "-m", "scripts.tok_train", vocabulary)
    return base


# ---- legs


def head_flags(k: RaceKnobs, rates: dict[str, float]) -> list[str]:
    """Flags of the opponent: evaluations off, and the rates (as it scales them) if given."""
    scale = (k.batch / REFERENCE_BATCH) ** 0.5
    return [
        f"--depth={k.depth}",
        f"--max-seq-len={k.sequence_len}",
        f"--device-batch-size={k.rows}",
        f"--total-batch-size={k.batch}",
        "--window-pattern=L",  # it recommends this without FlashAttention 3
        *("--eval-every=-1", "--core-metric-every=-1", "--sample-every=-1", "--device-type=cpu"),
        *(f"--{name}-lr={rate / scale:.6g}" for name, rate in rates.items()),
    ]


def step_seconds(output: str) -> list[float]:
    """The seconds of each step that the opponent printed."""
    return [float(ms) / 1000 for ms in re.findall(r"\| dt: ([\d.]+)ms", output)]


def head_pace(race: Race, base: Path) -> float:
    """Seconds of one of its steps: the median of a short run, measured once per race."""
    file = race.work / "pace.json"
    if not file.exists():
        flags = [*head_flags(race.knobs, {}), f"--num-iterations={CALIBRATION}"]
        output = race.run(base, False, "-m", "scripts.base_train", *flags, "--model-tag=pace")
        atomic_write(file, json.dumps(statistics.median(step_seconds(output)[3:])))
    return json.loads(file.read_text())


def head_leg(race: Race, tag: str, minutes: float, seed: int, rates: dict[str, float]) -> dict:
    """Train and score the opponent for so many minutes of steps."""
    base = open_head(race, seed)
    steps = max(1, round(60 * minutes / head_pace(race, base)))
    flags = [*head_flags(race.knobs, rates), f"--num-iterations={steps}", f"--model-tag={tag}"]
    began = time.monotonic()
    output = race.run(base, False, "-m", "scripts.base_train", *flags)
    wall = time.monotonic() - began
    times = step_seconds(output)
    steady = [min(t, 3 * statistics.median(times)) for t in times]  # the first steps compile
    out = race.work / f"score-{tag}.json"
    script = str(Path(__file__).with_name("race_head.py"))
    held_out = str(race.work / "held_out.jsonl")
    race.run(base, False, script, held_out, tag, str(race.knobs.sequence_len), str(out))
    score = json.loads(out.read_text())
    shutil.rmtree(base / "base_checkpoints" / tag, ignore_errors=True)
    return {
        **score,
        "steps": steps,
        "tokens": steps * race.knobs.batch,
        "training_seconds": sum(steady),
        "wall_seconds": wall,
        "flags": flags,
    }


def our_leg(race: Race, tag: str, minutes: float, seed: int) -> dict[str, Any]:
    """Train base_train with its defaults for so many minutes, opening and compiling included."""
    k, base = race.knobs, race.work / "ours"
    data = f"--data=race={race.work / 'train.jsonl'}"
    if not (base / "tokenizer").exists():
        race.run(base, True, "-m", "nanochat", "tok_train", data, f"--vocab_size={k.vocab_size}")
    flags = [
        data,
        f"--depth={k.depth}",
        f"--sequence_len={k.sequence_len}",
        f"--max_minutes={minutes:g}",
        f"--seed={seed}",
        "--device_type=cpu",  # as the opponent's
        *shlex.split(k.flags),
    ]
    began = time.monotonic()
    race.run(base, True, "-m", "nanochat", "base_train", *flags, f"--model_tag={tag}")
    wall = time.monotonic() - began
    from nanochat.base import logbook

    summary = logbook.read(base / "checkpoints" / "base" / tag)[-1]
    spent = summary.get("spent", {})
    bpb, size, parameters = score_ours(race, base, tag)
    shutil.rmtree(base / "checkpoints" / "base" / tag, ignore_errors=True)
    return {
        "bpb": bpb,
        "bytes": size,
        "parameters": parameters,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "training_seconds": spent.get("steps", 0.0) + spent.get("batches", 0.0),
        "wall_seconds": wall,
        "spent": spent,
        "flags": flags,
    }


def score_ours(race: Race, base: Path, tag: str) -> tuple[float, int, int]:
    """(bits per byte, bytes, parameters) of our model on the held-out texts."""
    import torch

    from nanochat.model.checkpoint import load_for_inference

    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    loaded = load_for_inference("base", tag, device_type="cpu")

    def nats(inputs: list[list[int]], targets: list[list[int]]) -> float:
        x, y = torch.tensor(inputs), torch.tensor(targets)
        return float(loaded.model.token_losses(x, y).sum())

    def encode(text: str) -> list[int]:
        return loaded.tokenizer.encode(text, bos=True)

    texts = read(race.work / "held_out.jsonl")
    bpb, size = bits_per_byte(texts, encode, nats, race.knobs.sequence_len)
    return bpb, size, loaded.model.counts()["total"]


def once(race: Race, name: str, leg: Any) -> dict[str, Any]:
    """The result of a leg, from its file if it has one."""
    file = race.work / "legs" / f"{name}.json"
    if not file.exists():
        print0(f"{name} ...")
        result = {"name": name, **leg(), "ended": time.strftime("%Y-%m-%dT%H:%M:%S")}
        file.parent.mkdir(exist_ok=True)
        atomic_write(file, json.dumps(result, indent=1))
    result = json.loads(file.read_text())
    print0(f"{name}: {result['bpb']:.4f} bits per byte after {result['steps']:,} steps")
    return result


def sweep(race: Race) -> dict[str, float]:
    """
    The opponent's best rates: those that it uses as shipped times FACTORS, first Muon's, then the
    embedding's, until the time is over. Every run is a leg of its own.
    """
    k = race.knobs
    scale = (k.batch / REFERENCE_BATCH) ** 0.5
    best = {"matrix": 0.02 * scale, "embedding": 0.3 * scale}
    runs = max(0, int(k.sweep_minutes / k.sweep_leg))
    seen: dict[tuple[float, ...], float] = {}
    for name in ("matrix", "embedding", "matrix"):
        middle = best[name]
        for factor in FACTORS:
            rates = {**best, name: middle * factor}
            key = tuple(round(rate, 8) for rate in rates.values())
            if key in seen:
                continue
            if len(seen) >= runs:
                break
            tag = f"sweep-{k.sweep_leg:g}min-{rates['matrix']:.4g}-{rates['embedding']:.4g}"
            leg = once(race, tag, lambda t=tag, r=rates: head_leg(race, t, k.sweep_leg, 1, r))
            seen[key] = leg["bpb"]
        tried = {f: {**best, name: middle * f} for f in FACTORS}
        scores = {f: seen.get(tuple(round(v, 8) for v in r.values())) for f, r in tried.items()}
        known = {f: score for f, score in scores.items() if score is not None}
        if known:
            best = tried[min(known, key=known.__getitem__)]
    if seen:
        atomic_write(race.work / "sweep.json", json.dumps(best, indent=1))
    return best


def tuned_rates(race: Race) -> dict[str, float]:
    file = race.work / "sweep.json"
    if not file.exists():
        raise UserError(
            "the leg tuned needs the rates of a sweep: give --sweep_minutes, for example 60"
        )
    return json.loads(file.read_text())


def report(race: Race) -> None:
    """Print the table of all legs that have finished."""
    results = [json.loads(f.read_text()) for f in sorted((race.work / "legs").glob("*.json"))]
    rows = [
        (
            r["name"],
            f"{r['parameters']:,}",
            f"{r['tokens'] / 1e6:.2f} M",
            duration(r["training_seconds"]),
            duration(r["wall_seconds"]),
            f"{r['bpb']:.4f}",
        )
        for r in results
    ]
    head = ("leg", "parameters", "tokens", "in steps", "wall clock", "bits per byte")
    print0(columns(head, rows))


def opened(k: RaceKnobs) -> Race:
    """Folders that exist; UserError for a checkout or texts that are not there."""
    checkout, work = Path(k.checkout).expanduser().resolve(), Path(k.work).expanduser().resolve()
    if not k.checkout or not (checkout / "nanochat" / "gpt.py").is_file():
        raise UserError(
            f"--checkout={k.checkout} holds no nanochat/gpt.py: name a folder into which you "
            "cloned karpathy/nanochat"
        )
    paths = {t: Path(t).expanduser() for t in k.texts}
    missing = [t for t, path in paths.items() if not path.is_file() or not path.stat().st_size]
    if missing or not k.texts:
        raise UserError(
            f"{missing[0]} is not a file, or is empty: name text files with --texts"
            if missing
            else "there are no texts: name .jsonl or .txt files with --texts"
        )
    (work / "stand-ins").mkdir(parents=True, exist_ok=True)
    race = Race(k, work, checkout)
    python = k.python or sys.executable
    probe = [python, "-c", "import wandb"]
    if subprocess.run(probe, capture_output=True).returncode:
        (work / "stand-ins" / "wandb.py").write_text('"""Not used: --run is dummy."""\n')
        notice("wandb is not installed: an empty module stands in, since no leg uses it")
    return race


def main(argv: Sequence[str] | None = None) -> None:
    k, _ = parse(RaceKnobs, argv, command="bench.race")
    race = opened(k)
    prepare(race)
    if k.sweep_minutes:
        print0(f"rates of the opponent: {sweep(race)}")
    for minutes in k.minutes:
        for seed in k.seeds:
            for who in k.legs:
                tag = f"{who}-{minutes:g}min-seed{seed}"
                if who == "ours":
                    once(race, tag, lambda t=tag, m=minutes, s=seed: our_leg(race, t, m, s))
                else:
                    rates = tuned_rates(race) if who == "tuned" else {}
                    once(
                        race,
                        tag,
                        lambda t=tag, m=minutes, s=seed, r=rates: head_leg(race, t, m, s, r),
                    )
    report(race)


if __name__ == "__main__":
    entry(main)
