"""
The runs behind the rules for small corpora in nanochat/train/scaling.py: prose of one author (0.3
to 3 MB) or of several (10 and 30 MB), and source code, of which a tenth is held out by document. An
Arm is pretraining alone; a Mix goes on to a model that converses, with some share of the embedded
corpus in every stage.

    python dev/mine_experiments.py --texts BOOK [BOOK ...]              what is left to run
    python dev/mine_experiments.py --texts BOOK [BOOK ...] --only KEY   one of them

Every finished run is a line of dev/results/mine.jsonl with its curve of held-out bits per byte, and
is not run again. dev/LOG.md has the tables.
"""

import argparse
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from rap_experiments import prior

RESULTS = Path(__file__).parent / "results" / "mine.jsonl"
BATCH = 4096
DOCUMENT = 2000  # characters
SHARE = 0.1  # held out
SIZES = (2, 64), (3, 256)
FALLING = "--warmdown_ratio=1"
PLAIN = "--lookback=off"
HAND = "--lookback=off --rap=hand"  # the attention prior that needs no text
TEXTS = (1, 4096), (3, 4096)  # megabytes, vocabulary
LARGER = (5, 4096, 2), (20, 8192, 1)  # megabytes, vocabulary, passes
FLOAT32 = "--dtype=float32"  # for a CPU without products in bfloat16
MACHINE = "--device_type=cpu --dtype=bfloat16 --compile=off --keep=1 --sample_every=0"
FLAGS = f"--head_dim=64 --sequence_len=256 --total_batch_size={BATCH} --lookback=on {MACHINE}"


class Arm(NamedTuple):
    """One run: megabytes of text, vocabulary, passes over the text, layers, width, other flags."""

    megabytes: float
    vocabulary: int
    passes: float
    depth: int = 3
    width: int = 128
    flags: str = ""
    seed: int = 1
    kind: str = "prose"  # or code

    @property
    def key(self) -> str:
        parts = [self.kind] if self.kind != "prose" else []
        parts += [f"{self.megabytes:g}MB v{self.vocabulary} p{self.passes:g}"]
        parts += [f"{self.depth}x{self.width}", self.flags.replace("--", ""), f"s{self.seed}"]
        return " ".join(filter(None, parts))


class Mix(NamedTuple):
    """
    A chain of three stages in steps of BATCH tokens, finetuning in steps of 32 conversations.
    `everyday`: the share of the embedded corpus; `start`: tag of a model in the folder
    --ready that it goes on from, with its tokenizer; `talk`: the generated conversations.
    Chains that differ only in what follows pretraining share it.
    """

    megabytes: float
    everyday: float
    steps: tuple[int, int, int] = (100, 100, 30)
    depth: int = 4
    width: int = 256
    vocabulary: int = 2048
    start: str = ""
    seed: int = 1
    talk: str = "tinyworld"

    @property
    def key(self) -> str:
        parts = [f"chain {self.megabytes:g}MB everyday {self.everyday:g}"]
        parts += [f"{self.depth}x{self.width} v{self.vocabulary}", "+".join(map(str, self.steps))]
        parts += [f"from {self.start}"] if self.start else []
        parts += [self.talk] if self.talk != "tinyworld" else []
        return " ".join([*parts, f"s{self.seed}"])


SHORT = (250, 135, 50)  # 1.8 M tokens
MIXES = [
    # how much of the embedded corpus beside 3 MB
    *(
        Mix(3, share, SHORT, 2, 128, 4096, seed=seed, talk="everyday")
        for seed in (1, 2)
        for share in (0.6, 0.3, 0.0, 0.8)
    ),
    # a model of its own, or one that goes on from the quickstart and reads as much of the text
    *(
        Mix(megabytes, everyday, start=start, talk="everyday")
        for megabytes in (1, 0.3)
        for everyday, start in ((0.5, ""), (0.3, "quickstart"))
    ),
]
ARMS = [
    # how many passes, each with its own schedule, and the vocabulary, by the amount of text
    *(Arm(0.3, 2048, p, seed=seed) for seed in (1, 2, 3) for p in (2, 4, 8)),
    *(Arm(0.3, v, 4, seed=seed) for seed in (1, 2, 3) for v in (1024, 4096)),
    *(Arm(1, 4096, p, seed=seed) for seed in (1, 2) for p in (2, 4, 8)),
    *(Arm(1, v, 4, seed=seed) for seed in (1, 2) for v in (2048, 8192)),
    *(Arm(3, 4096, p, seed=seed) for seed in (1, 2) for p in (1, 2, 3, 4, 8)),
    *(Arm(3, 8192, 2, seed=seed) for seed in (1, 2)),
    # three passes, and with a rate that falls from the beginning, as in `nanochat mine`
    *(Arm(0.3, 2048, 3, flags=f, seed=s) for s in (1, 2) for f in ("", FALLING)),
    *(Arm(1, 4096, 3, flags=f, seed=s) for s in (1, 2) for f in ("", FALLING)),
    *(Arm(1, 8192, 2, seed=seed) for seed in (1, 2)),
    # size, and weight decay, where the text is used up
    *(Arm(0.3, 2048, 4, depth, width, seed=seed) for seed in (1, 2) for depth, width in SIZES),
    *(Arm(0.3, 2048, 8, flags="--weight_decay=0.3", seed=seed) for seed in (1, 2)),
    # another kind of text
    *(Arm(0.3, 2048, p, seed=seed, kind="code") for seed in (1, 2) for p in (2, 3, 4, 8)),
    *(Arm(1, 4096, p, seed=seed, kind="code") for seed in (1, 2) for p in (2, 3, 4, 8)),
    # what looking back is worth: copy heads, convolutions and value embeddings, or a prior
    *(Arm(mb, v, 2, flags=f, seed=s) for s in (1, 2) for mb, v in TEXTS for f in (PLAIN, HAND)),
    *(
        Arm(mb, v, p, flags=f"{f} {FLOAT32}".strip(), seed=s)
        for s in (1, 2)
        for mb, v, p in LARGER
        for f in ("", PLAIN, HAND)
    ),
    *(Arm(10, 8192, p, seed=seed) for seed in (1, 2) for p in (1, 2, 3, 4)),
    *(Arm(10, 8192, 1, flags=flags) for flags in (PLAIN, HAND)),
    *(Arm(30, 8192, p) for p in (0.5, 1)),
    # a schedule that is far too long
    Arm(0.3, 2048, 24),
]


def texts(books: list[str], folder: Path, megabytes: float) -> Path:
    """The first megabytes of the books in documents of DOCUMENT characters, one per line."""
    path = folder / "text.jsonl"
    if not path.exists():
        text = "\n".join(Path(book).read_text(encoding="utf-8") for book in books)
        text = text[: int(megabytes * 1e6)]
        cuts = range(0, len(text), DOCUMENT)
        rows = [json.dumps({"text": text[cut : cut + DOCUMENT]}) for cut in cuts]
        path.write_text("\n".join(rows), encoding="utf-8")
    return path


def run(arm: Arm, books: list[str], base: Path) -> dict:
    """Train one arm in a folder of its own; its line of results."""
    folder = base / f"{arm.kind}-{arm.megabytes:g}-{arm.vocabulary}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    from nanochat.base import logbook
    from nanochat.commands import base_train, tok_train
    from nanochat.data import inventory, sources
    from nanochat.data.shards import prepare
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.stages import run_directory

    inventory.VALIDATION_SHARE = SHARE
    path = texts(books, folder, arm.megabytes)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        words = [f"--vocab_size={arm.vocabulary}", "--digits=2", f"--data=text={path}"]
        tok_train.main(words)
    tokenizer = Tokenizer.load()
    (source,) = sources.training_sources([f"text={path}"])
    tokens = prepare(source, "train", tokenizer).total
    steps = round(arm.passes * tokens / BATCH)
    tag = arm.key.replace(" ", "_").replace("=", "-")
    flags = arm.flags
    if "--rap=hand" in flags:
        flags = flags.replace("hand", str(folder / prior("--generator hand", folder, [], folder)))
    began = time.monotonic()
    base_train.main(
        [
            f"--data=text={path}",
            f"--depth={arm.depth}",
            f"--model_dim={arm.width}",
            f"--num_iterations={steps}",
            f"--eval_every={max(1, round(min(1, arm.passes / 6) * tokens / BATCH))}",
            "--eval_tokens=1000000",
            f"--seed={arm.seed}",
            f"--model_tag={tag}",
            "--resume=auto",
            *FLAGS.split(),
            *flags.split(),
        ]
    )
    rows = logbook.read(run_directory("base", tag))
    curve = [
        (round(row["tokens"] / tokens, 2), round(row["val_bpb"], 4))
        for row in rows
        if row["kind"] == "eval"
    ]
    train = [row["loss"] for row in rows if row["kind"] == "train"][-20:]
    return {
        "key": arm.key,
        **arm._asdict(),
        "tokens_per_pass": tokens,
        "steps": steps,
        "curve": curve,
        "best": min(curve, key=lambda point: point[1]),
        "last_train_loss": round(sum(train) / len(train), 4),
        "seconds": round(time.monotonic() - began, 1),
    }


def run_mix(mix: Mix, books: list[str], base: Path, ready: Path) -> dict:
    """Train the stages of a chain and measure it as `nanochat mine` does; its line of results."""
    folder = base / f"chain-{mix.megabytes:g}-{mix.start or mix.vocabulary}"
    folder.mkdir(parents=True, exist_ok=True)
    if mix.start:
        shutil.copytree(ready / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    from nanochat.base import logbook
    from nanochat.commands import base_train, chat_sft, mid_train, mine, tok_train
    from nanochat.data import inventory
    from nanochat.eval import own_text
    from nanochat.model.checkpoint import load_for_inference
    from nanochat.model.stages import run_directory

    inventory.VALIDATION_SHARE = SHARE
    text = texts(books, folder, mix.megabytes)
    made = folder / "made"
    if not (made / "questions.jsonl").exists():
        made.mkdir(exist_ok=True)
        shutil.copy(text, made)
        mine.write_conversations(made, 6000, 1)
    tag = re.sub(r"[ =+]", "-", mix.key)
    base_tag = re.sub(r"[ =+]", "-", mix._replace(talk="tinyworld", steps=mix.steps[:1]).key)
    e = mix.everyday
    began = time.monotonic()
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        words = f"--vocab_size={mix.vocabulary} --digits=2 --data text={text}:0.5 tinyworld@2:0.5"
        tok_train.main(words.split())
    own = [f"text={text}:{1 - e}"] if e < 1 else []
    both = [*own, f"tinyworld@9:{e}"] if e else own
    if mix.start:
        furthest = ready / "checkpoints" / "rl" / mix.start
        shutil.copytree(furthest, run_directory("base", tag), dirs_exist_ok=True)
    shared = f"--resume=auto --seed={mix.seed} --eval_tokens=32768 {MACHINE}"
    shape = f"--depth={mix.depth} --model_dim={mix.width} --head_dim=64 --sequence_len=256"
    base_steps, mid_steps, sft_steps = mix.steps
    talk = [f"made={made / 'made.jsonl'}:{0.45 * (1 - e) + 0.02}", "identity@400:0.05"]
    talk += [f"{mix.talk}@6000:{0.75 * e + 0.02}"]
    replay = [
        own[0].replace(f":{1 - e}", f":{0.5 * (1 - e)}"),
        *([f"tinyworld@9:{e / 4}"] if e else []),
    ]
    if not mix.start:
        flags = (
            f"{shape} --total_batch_size={BATCH} --lookback=on --warmdown_ratio=1 "
            "--final_lr_frac=0 --eval_every=0.25"
        )
        words = [*shared.split(), *flags.split(), f"--num_iterations={base_steps}"]
        base_train.main([*words, f"--model_tag={base_tag}", "--data", *both])
        shutil.copytree(
            run_directory("base", base_tag), run_directory("base", tag), dirs_exist_ok=True
        )
    flags = f"--total_batch_size={BATCH} --lr_scale=0.5 --warmdown_ratio=1 --eval_every=0.5"
    mid_steps += base_steps if mix.start else 0
    shared += f" --model_tag={tag}"
    mid_train.main(
        [
            *shared.split(),
            *flags.split(),
            f"--num_iterations={mid_steps}",
            "--data",
            *talk,
            "--text",
            *replay,
        ]
    )
    flags = "--conversations_per_step=32 --init_lr_frac=0.5 --warmdown_ratio=1 --eval_every=0"
    chat_sft.main(
        [*shared.split(), *flags.split(), f"--num_iterations={sft_steps}", "--data", *talk]
    )
    found: dict = {}
    for stage in ("base", "mid", "sft"):
        rows = logbook.by_kind(run_directory(stage, tag))
        numbers = {
            k: round(v, 4) for k, v in rows.get("eval", {}).items() if k.startswith("val_bpb")
        }
        loaded = load_for_inference(stage, tag, device_type="cpu", dtype="bfloat16", seed=1)
        source = mine.own_source(folder)
        numbers["own"] = round(own_text.bits_per_byte(loaded, source), 4)
        found[stage] = numbers
        if stage == "sft":
            found["asked"] = answers(loaded, made)
    return {"key": mix.key, **mix._asdict(), **found, "seconds": round(time.monotonic() - began)}


def answers(loaded: Any, folder: Path) -> dict:
    """Accuracies on held-out questions by kind."""
    from nanochat.eval import own_text
    from nanochat.eval.tasks import text_questions, tinyworld

    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    own = text_questions.tasks([json.loads(line) for line in lines])
    asked = {"own": own, "everyday": list(tinyworld.TASKS.values())}
    found = {name: own_text.answers(loaded, tasks, 40) for name, tasks in asked.items()}
    return {
        name: {kind: round(r["accuracy"], 3) for kind, r in summary["kinds"].items()}
        | {"all": round(summary["accuracy"], 3)}
        for name, summary in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--code", nargs="+", default=[], help="source files, for kind code")
    parser.add_argument("--only", default="")
    parser.add_argument("--base", default="mine_experiments")
    parser.add_argument("--ready", default="", help="base folder with a trained quickstart")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    done = set()
    if RESULTS.exists():
        done = {json.loads(line)["key"] for line in RESULTS.read_text().splitlines()}
    for arm in [*MIXES, *ARMS]:
        if arm.key in done or options.only not in ("", arm.key):
            continue
        if options.list:
            print(arm.key)
            continue
        base = Path(options.base).resolve()
        if isinstance(arm, Mix):
            result = run_mix(arm, options.texts, base, Path(options.ready))
        else:
            result = run(arm, options.code if arm.kind == "code" else options.texts, base)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
