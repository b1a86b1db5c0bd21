"""
Train a model on your own text, from nothing to a chat, offline and in one go.

    nanochat mine FOLDER                       half an hour
    nanochat mine FOLDER NOTES.txt --hours 8   more text, more time
    nanochat mine FOLDER --dry_run             only says what was found and what would be trained

The text is read, a tokenizer and a model of a size that suits text and time are trained on it, then
on conversations: made from the text, of your own if there are some, and small talk, facts and sums
from the embedded corpus. At the end it says what the model can do and what it copied. If
interrupted, the same command continues.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.base import logbook
from nanochat.base.common import UserError, entry, human, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob, parse
from nanochat.model.stages import STAGES, run_directory
from nanochat.train.chain import USUAL, Chain, Diary, expected_speed
from nanochat.train.knobs import MachineKnobs
from nanochat.train.scaling import (
    COMPILE_PAYS_SECONDS,
    USEFUL_PASSES,
    batch_for,
    context_for,
    shape_for,
    vocabulary_for,
)

if TYPE_CHECKING:
    from nanochat.data.sources import Source

SHARES = {"base": 0.55, "mid": 0.3, "sft": 0.15}  # of the time
TITLES = {"base": "pretraining", "mid": "midtraining", "sft": "finetuning"}
CLOSING_SECONDS = 45.0  # questions and samples at the end
STAGE_SECONDS = 20.0  # opening and compiling a stage
COMPILING_PEAK = 2e11  # FLOP/s of matrix products
SHORT_FLOPS = 1e15  # below which a context of 256 tokens is enough
LEAST = 20_000  # characters
LEAST_MINUTES, LEAST_SECONDS = 5, 60.0  # of the chain, of a stage
# Conversations and steps with which the quickstart's model learned to converse
MADE, MID_STEPS, SFT_STEPS, CONVERSATIONS_PER_STEP = 12_000, 720, 150, 64
QUESTIONS = 60  # of each kind made from the text; a third as many of the embedded corpus


@dataclass(kw_only=True)
class MineKnobs(MachineKnobs):
    """Your own text"""

    data: tuple[str, ...] = knob(
        (), "files and folders with your text: PATH[#FIELD], as for base_train", positional=True
    )
    minutes: float = knob(0.0, "time for everything (default: 30)", low=0, high=1e6)
    hours: float = knob(0.0, "the same in hours", low=0, high=1e5)
    name: str = knob("nanochat", "what the model calls itself")
    me: str = knob("", "the person of a chat export whom the model is to answer like")
    start: str = knob(
        "",
        "tag of a model to continue from, with its tokenizer, such as quickstart (default: none)",
        alias="--from",
    )
    vocab_size: int = knob(0, "tokens in the vocabulary (0 = by the size of the text)", low=0)
    model_tag: str = knob("mine", "name of the model's folders")
    dry_run: bool = knob(False, "only say what was found and what would be trained")
    seconds_used: float = knob(0.0, "seconds spent before this command started", low=0)


# ---- reading


def read_all(knobs: MineKnobs, folder: Path) -> dict[str, Any]:
    """
    Write everything that is found to text.jsonl and own.jsonl in `folder`, so that a later start
    finds the same even if your files have changed. Returns counts, and the inventory in lines.
    """
    from nanochat.data import conversations, documents, inventory, rows, sources
    from nanochat.eval.tasks.customjson import conversation

    folder.mkdir(parents=True, exist_ok=True)
    named = sources.parse_sources(knobs.data)
    taken = inventory.take(named, knobs.me or None)
    counts: Counter[str] = Counter(documents=0, characters=0, bytes=0, conversations=0)
    report = rows.Report(limit=1 << 30)  # the inventory names what cannot be used
    with (
        (folder / "text.jsonl").open("w", encoding="utf-8") as text_file,
        (folder / "own.jsonl").open("w", encoding="utf-8") as own_file,
    ):
        for source, found in zip(named, taken, strict=True):
            texts = documents.read_all(sources.files(source), source.field, report)
            for text in found.kept(texts) if found.documents else ():
                text_file.write(json.dumps({"text": text}) + "\n")
                counts["documents"] += 1
                counts["characters"] += len(text)
                counts["bytes"] += len(text.encode())
            for path in map(Path, found.conversations):
                for _, row in conversations.read(path, report, knobs.me or None, alone=False):
                    with suppress(UserError):  # the inventory names it
                        talk = {"messages": conversation(row)["messages"]}
                        own_file.write(json.dumps(talk) + "\n")
                        counts["conversations"] += 1
    if counts["characters"] < LEAST:
        raise UserError(
            f"{' '.join(knobs.data)} holds only {counts['characters']:,} characters of text, too "
            f"few to learn a language from: give at least {LEAST:,}; a good start is 300,000"
        )
    return {**counts, "inventory": inventory.as_lines(taken)}


def write_conversations(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Make conversations from the training text, and questions from the held-out text."""
    from nanochat.eval.own_text import documents
    from nanochat.eval.tasks.owntext import JUDGED, KINDS, TextQuestions

    source = own_source(folder)
    train = TextQuestions(documents(source, "train"))
    held_out = TextQuestions(documents(source, "val"), train.words)
    made = list(train.conversations(seed, KINDS, count))
    asked = [q for kind in JUDGED for q in held_out.conversations(seed, [kind], QUESTIONS)]
    for name, items in (("made", made), ("questions", asked)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        atomic_write(folder / f"{name}.jsonl", lines)
    return {"made": len(made), "questions": len(asked)}


def own_source(folder: Path) -> "Source":
    """The text that was read, as a source."""
    from nanochat.data.sources import training_sources

    return training_sources([f"text={folder / 'text.jsonl'}"])[0]


# ---- planning


def minutes_of(knobs: MineKnobs) -> float:
    """The time for everything. UserError if it is given twice."""
    if knobs.minutes and knobs.hours:
        raise UserError(
            f"--minutes={knobs.minutes:g} and --hours={knobs.hours:g} set two budgets: give one"
        )
    minutes = knobs.minutes or 60 * knobs.hours or 30.0
    if minutes < LEAST_MINUTES:
        raise UserError(
            f"{minutes:g} minutes are too few for a tokenizer, three stages and questions: give "
            f"--minutes={LEAST_MINUTES} or more"
        )
    return minutes


def seconds_for(stage: str, knobs: MineKnobs, diary: Diary) -> float:
    """
    The time of a stage: its share of what is left for it and the later ones, or a minute if that
    is more, because a chain that runs over its time is worth more than one that breaks off.
    """
    left = 60 * minutes_of(knobs) - diary.seconds - CLOSING_SECONDS
    later = list(SHARES)[list(SHARES).index(stage) :]
    return max(LEAST_SECONDS, left * SHARES[stage] / sum(SHARES[name] for name in later))


def plan_base(knobs: MineKnobs, diary: Diary, tokens: int, vocab_size: int) -> str:
    """The flags of pretraining: a size, a batch and a length that suit time and text."""
    seconds = seconds_for("base", knobs, diary)
    _, peak = expected_speed(knobs, vocab_size=vocab_size, sequence_len=256, n_head=4, n_kv_head=4)
    flops = USUAL * peak * seconds
    worth = USEFUL_PASSES * tokens
    depth, width = shape_for(flops, worth, vocab_size)
    speed, _ = expected_speed(
        knobs,
        vocab_size=vocab_size,
        n_layer=depth,
        n_embd=width,
        n_head=width // 64,
        n_kv_head=width // 64,
        sequence_len=256,
    )
    expected = min(worth, speed * seconds)
    batch, context = batch_for(expected), 256 if flops < SHORT_FLOPS else context_for(flops)
    print0(
        f"{human(tokens)} tokens of text, {depth} layers of width {width}: about "
        f"{human(speed)} tokens per second, {speed * seconds / tokens:.1f} passes in "
        f"{seconds / 60:.1f} minutes"
    )
    if speed * seconds > worth:
        print0(
            f"more than {USEFUL_PASSES} passes would only learn the text by heart, so pretraining "
            f"ends after {USEFUL_PASSES}: more text would help, more time would not"
        )
    diary.notes["batch"] = batch
    # compiling takes 30 s on two idle cores with such a peak, and longer on slow or busy ones
    compiling = seconds >= COMPILE_PAYS_SECONDS * max(0.5, COMPILING_PEAK / peak)
    # a run of several passes looks after each of them whether held-out loss has turned
    every = f" --eval_every={-(-tokens // batch)}" if expected > 2 * tokens else ""
    return (
        f"--depth={depth} --model_dim={width} --head_dim=64 --sequence_len={context} "
        f"--total_batch_size={batch} --num_iterations={max(1, round(worth / batch))} "
        f"--max_minutes={seconds / 60:.2f} --patience=2"
        + every
        + ("" if compiling else " --compile=off")
    )


def plan_later(stage: str, knobs: MineKnobs, diary: Diary) -> str:
    """
    The length of a later stage: its share of the time, or the steps after which the quickstart's
    model had learned to converse, or as many as pretraining had, whichever comes first.
    """
    seconds = seconds_for(stage, knobs, diary)
    rows = {row["kind"]: row for row in logbook.read(run_directory("base", knobs.model_tag))}
    speed, before = rows["summary"]["tok_per_sec"], rows["summary"]["step"]
    steps, tokens = max(MID_STEPS, before), diary.notes.get("batch", 4096)
    if stage == "sft":
        steps, tokens = max(SFT_STEPS, before // 5), 2 * tokens
    if steps * tokens / speed + STAGE_SECONDS < seconds:
        return f"--num_iterations={steps}"
    return f"--max_minutes={seconds / 60:.2f}"


def render(stage: str, knobs: MineKnobs, specs: Sequence[str]) -> None:
    """Tokenise the conversations of a later stage, whose own time is then left for training."""
    from nanochat.eval.tasks import mixture
    from nanochat.model.checkpoint import locate

    tokenizer = locate("base", knobs.model_tag).tokenizer()
    for split, seed in (("train", int(stage == "sft")), ("val", 0)):
        mixture.shards(specs, split, tokenizer, seed=seed, name=knobs.name)


def conversations_for(knobs: MineKnobs, folder: Path, own: int) -> list[str]:
    """The data of the later stages: what was made, what was found, the embedded corpus, a name."""
    embedded = f"tinyworld@{min(16_000, round(1000 * minutes_of(knobs)))}"
    shares = {f"made={folder / 'made.jsonl'}": 0.4, embedded: 0.35, "identity@400": 0.05}
    if own > 1:
        shares[f"own={folder / 'own.jsonl'}"] = 0.4
    return [f"{source}:{share}" for source, share in shares.items()]


def conversation_flags(
    stage: str, knobs: MineKnobs, folder: Path, specs: Sequence[str]
) -> list[str]:
    """The flags of a later stage, except its length."""
    flags = ["--data", *specs, f"--name={knobs.name}", "--warmdown_ratio=1"]
    if stage == "mid":
        replay = 1.6 if knobs.start else 0.4
        return [*flags, "--text", f"text={folder / 'text.jsonl'}:{replay}", "--lr_scale=0.5"]
    return [*flags, f"--conversations_per_step={CONVERSATIONS_PER_STEP}", "--init_lr_frac=0.5"]


# ---- the chain


def train_tokenizer(knobs: MineKnobs, folder: Path, size: int) -> dict[str, int]:
    """Train a tokenizer on the text and a little of the embedded corpus; tokens of the text."""
    from nanochat.commands import tok_train
    from nanochat.data.shards import prepare
    from nanochat.data.tokenizer import Tokenizer

    vocab_size = knobs.vocab_size or vocabulary_for(size)
    text = f"text={folder / 'text.jsonl'}"
    tok_train.main(["--data", f"{text}:0.85", "tinyworld@2:0.15", f"--vocab_size={vocab_size}"])
    tokenizer = Tokenizer.load()
    tokens = prepare(own_source(folder), "train", tokenizer).total
    return {"tokens": tokens, "vocab_size": tokenizer.vocab_size}


def take_over(knobs: MineKnobs) -> None:
    """Copy the pretrained model that --from names under the tag of this one."""
    from nanochat.model.checkpoint import locate

    checkpoint = locate("base", knobs.start)
    target = run_directory("base", knobs.model_tag)
    shutil.copytree(checkpoint.path, target / checkpoint.path.name, dirs_exist_ok=True)
    shutil.copy(checkpoint.path.parent / logbook.FILE, target)


def report(knobs: MineKnobs, folder: Path) -> dict[str, Any]:
    """Everything that is measured at the end; also kept in summary.json."""
    from nanochat.eval import own_text
    from nanochat.eval.tasks import owntext, tinyworld
    from nanochat.export.target import destinations
    from nanochat.model.checkpoint import load_for_inference

    machine = {name: getattr(knobs, name) for name in ("device_type", "dtype", "seed")}
    source, tag = own_source(folder), knobs.model_tag
    base = load_for_inference("base", tag, **machine)
    found = {
        "bits_per_byte": own_text.predictors(base, source),
        "samples": own_text.samples(base, source, knobs.seed),
        "destinations": destinations(base.model.config, base.tokenizer.digits),
    }
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = owntext.tasks([json.loads(line) for line in lines])
    chat = load_for_inference("sft", tag, **machine)
    found["own"] = own_text.answers(chat, tasks, QUESTIONS)
    found["embedded"] = own_text.answers(chat, list(tinyworld.TASKS.values()), QUESTIONS // 3)
    atomic_write(folder / "summary.json", json.dumps(found, indent=1))
    return found


def verdict(knobs: MineKnobs, found: dict[str, Any], minutes: float) -> str:
    """What was measured, for people, and how to go on."""
    from nanochat.eval import own_text

    kinds = {**found["own"]["kinds"], **found["embedded"]["kinds"]}
    tag = knobs.model_tag
    return "\n".join(
        [
            "",
            *own_text.sample_lines(found["samples"]),
            "",
            *own_text.predictor_lines(found["bits_per_byte"]),
            "",
            *own_text.answer_lines({"kinds": kinds}),
            "",
            f"{minutes:.1f} minutes in all",
            f"to talk to it:        nanochat chat_cli -g {tag}     (or nanochat serve -g {tag})",
            f"to let it continue:   nanochat base_complete -g {tag}",
            f"to take it elsewhere: {found['destinations']}",
        ]
    )


def prepare(chain: Chain, knobs: MineKnobs, folder: Path) -> None:
    """Read the text, make conversations from it, and train or take over a tokenizer."""
    notes = chain.diary.notes
    notes |= chain.step("reading", "reading", lambda: read_all(knobs, folder)) or {}
    print0("\n".join(notes["inventory"]))
    count = min(MADE, round(MADE * minutes_of(knobs) / 20))
    making = lambda: write_conversations(folder, count, knobs.seed)  # noqa: E731
    notes |= chain.step("conversations", "conversations", making) or {}
    print0(f"made from the text: {notes['made']:,} conversations")
    if knobs.start:
        chain.step("base", "taking over", lambda: take_over(knobs))
    else:
        training = lambda: train_tokenizer(knobs, folder, notes["bytes"])  # noqa: E731
        notes |= chain.step("tokenizer", "tokenizer", training) or {}


def train(chain: Chain, stage: str, knobs: MineKnobs, folder: Path) -> None:
    """Run a stage that is not done, or continue it."""
    diary = chain.diary
    notes = diary.notes
    if stage == "base":
        flags = [f"--data=text={folder / 'text.jsonl'}"]
        if stage not in diary.lengths:
            diary.lengths[stage] = plan_base(knobs, diary, notes["tokens"], notes["vocab_size"])
    else:
        specs = conversations_for(knobs, folder, notes["conversations"])
        flags = conversation_flags(stage, knobs, folder, specs)
        rendering = lambda: render(stage, knobs, specs)  # noqa: E731
        chain.step(f"data of {stage}", "conversations", rendering)
        if stage not in diary.lengths:
            diary.lengths[stage] = plan_later(stage, knobs, diary)
    command = import_module(f"nanochat.commands.{STAGES[stage].command}").main
    chain.train(stage, TITLES[stage], command, knobs, knobs.model_tag, flags)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    knobs, _ = parse(MineKnobs, argv, command="mine")
    minutes_of(knobs)
    if not knobs.data:
        raise UserError("mine needs your text: nanochat mine FOLDER")
    diary = Diary("mine", knobs.model_tag, knobs.seconds_used)
    folder = diary.path.with_suffix("")
    paths = [str(Path(word).expanduser().resolve()) for word in knobs.data]
    if diary.notes.setdefault("data", paths) != paths:
        raise UserError(
            f"the model {knobs.model_tag} was begun on {' '.join(diary.notes['data'])}: "
            "give the same text to continue, or --model_tag=NAME for another model"
        )
    if knobs.dry_run:
        print0("\n".join(read_all(knobs, folder)["inventory"]))
        return {}
    print0("loading torch")
    chain = Chain(diary)
    print0(f"(details: {diary.log})\n")
    prepare(chain, knobs, folder)
    if "sft" in diary.done:
        print0("everything is trained, so it is only measured again; --model_tag=NAME trains anew")
    for stage in SHARES:
        if stage not in diary.done:
            train(chain, stage, knobs, folder)
    with chain.display.working("questions"):
        found = report(knobs, folder)
    print0(verdict(knobs, found, diary.seconds / 60))
    return found


if __name__ == "__main__":
    entry(main)
