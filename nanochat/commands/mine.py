"""
Train a model on your own text, from nothing to a chat, offline and in one go.

    nanochat mine FOLDER                       half an hour
    nanochat mine FOLDER NOTES.txt --hours 8   more text, more time
    nanochat mine FOLDER --dry_run             only says what was found

The command reads the text, and trains a tokenizer and a model, whose size suits the text and the
time, on it and on the embedded corpus, which teaches what a small text cannot: answers, small talk
and sums. Then it trains the model on conversations that it makes from the text, and on your own if
there are any. At the end it says what the model can do and what it copied. If interrupted, the same
command continues.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanochat.base import logbook
from nanochat.base.common import UserError, base_dir, entry, human, print0, user_path
from nanochat.base.files import atomic_write, write_json
from nanochat.base.knobs import knob, parse
from nanochat.commands import tok_train
from nanochat.data import conversations, documents, inventory, rows, sources
from nanochat.eval.tasks import text_questions, tinyworld
from nanochat.export.target import choose_target
from nanochat.model.stages import STAGES, run_directory, step_folders
from nanochat.tinyworld.conversations import EVERYDAY
from nanochat.train.chain import USUAL, Chain, Diary, begun, expected_speed
from nanochat.train.knobs import MachineKnobs
from nanochat.train.scaling import (
    COMPILE_PAYS_SECONDS,
    EVERYDAY_TOKENS,
    USEFUL_PASSES,
    batch_for,
    context_for,
    shape_for,
    split_budget,
    text_tokens,
)

SHARES = {"base": 0.42, "mid": 0.41, "sft": 0.17}  # of the time for training
TITLES = {"base": "pretraining", "mid": "midtraining", "sft": "finetuning"}
CLOSING_SECONDS = 45.0  # questions and samples at the end
STAGE_SECONDS = 20.0  # opening and compiling a stage
COMPILING_PEAK = 2e11  # FLOP/s of matrix products; see compiling()
SHORT_FLOPS = 1e15  # below which a context of 256 tokens is enough
LEAST_CHARACTERS = 20_000  # of text
# Of text, and of conversations, so that reading takes little of the time. Fewer than
# inventory.LIMIT, so that the copy is counted as a whole
MOST_CHARACTERS = 250_000_000
TELLING = 20  # characters of a line that is hardly repeated by chance
MINUTES = 30.0  # of the chain, unless they are given
LEAST_MINUTES = 5  # of the chain
LEAST_SECONDS = 60.0  # of a stage
# An earlier quickstart's model learned to converse with half of these conversations and steps; the
# other half is for the text
CONVERSATIONS, MID_STEPS, SFT_STEPS = 12_000, 1200, 200
CONVERSATIONS_PER_STEP = 64
CHARACTERS_PER_CONVERSATION = 100  # of the text, at least, per conversation made from it
BYTES_PER_TOKEN = 4.0  # of a stored conversation, about
EMBEDDED_TEXT = "everyday=tinyworld"
READY_MADE = "quickstart"  # tag of a model that one can continue from
TALK = "Hello!", "What is your name?", "My name is Mia. I like apples.", "How much is 7 plus 5?"
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
    me: str = knob("", "your name in a chat export: the model learns to answer as this person")
    start: str = knob(
        "",
        "tag of a model to continue from, with its tokenizer, such as quickstart (default: none)",
        alias="--from",
    )
    everyday: float = knob(
        0.6,
        "share of the embedded corpus: small talk, stories, sums; at most 0.6 M tokens (0 = none)",
        low=0,
        high=0.95,
    )
    vocab_size: int = knob(
        0, "tokens in the vocabulary (0 = by the size of the text, up to 8,192 on a CPU)", low=0
    )
    model_tag: str = knob("mine", "name of the model's folders")
    dry_run: bool = knob(False, "only say what was found")
    seconds_used: float = knob(0.0, "seconds spent before this command started", low=0)


# ---- reading


def read_all(knobs: MineKnobs, folder: Path) -> dict[str, Any]:
    """
    Copy the text to text.jsonl in `folder`, and your own conversations to own.jsonl, so that a
    later start has the same data even if your files have changed. Of each, the first
    MOST_CHARACTERS characters are copied. Returns their counts, and the inventory as lines to
    print.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = sources.parse_sources(knobs.data)
    if weights := [source for source in named if source.weight is not None]:
        raise UserError(
            f"{weights[0].name} has a weight of {weights[0].weight:g}, but mine learns from all of "
            "your text alike: leave the weights out"
        )
    inventories = inventory.take(named, knobs.me or None)
    if knobs.me:
        check_person(knobs.me, inventories)
    counts: Counter[str] = Counter()
    report = rows.Report(limit=1 << 30)  # the inventory names what cannot be used
    with (
        (folder / "text.jsonl").open("w", encoding="utf-8") as text_file,
        (folder / "own.jsonl").open("w", encoding="utf-8") as own_file,
    ):
        for source, found in zip(named, inventories, strict=True):
            paths = sources.files(source) if found.documents else []
            for text in found.kept(documents.read_all(paths, source.field, report), paths):
                if counts["characters"] >= MOST_CHARACTERS:
                    break
                text_file.write(json.dumps({"text": text}) + "\n")
                counts.update(documents=1, characters=len(text), bytes=len(text.encode()))
            for path in map(Path, found.conversations):
                if counts["conversation_characters"] >= MOST_CHARACTERS:
                    break
                for _, row in conversations.read(path, report, knobs.me or None, alone=False):
                    if counts["conversation_characters"] >= MOST_CHARACTERS:
                        break
                    item = conversations.checked(row)
                    if isinstance(item, dict):  # else it is a problem that the inventory names
                        own_file.write(json.dumps({"messages": item["messages"]}) + "\n")
                        counts["conversation_characters"] += len(str(item["messages"]))
    if counts["characters"] < LEAST_CHARACTERS:
        raise UserError(
            f"{' '.join(knobs.data)} holds only {counts['characters']:,} characters of text, too "
            f"few to learn a language from: give at least {LEAST_CHARACTERS:,}; a good start is "
            "300,000"
        )
    lines = [*inventory.as_lines(inventories), *limit_lines(counts, named)]
    return {**counts, **unseen_conversations(folder), "inventory": lines}


def limit_lines(counts: Mapping[str, int], named: Sequence[sources.Source]) -> list[str]:
    """A line that says of which files not all is read; else no line."""
    if all(n < MOST_CHARACTERS for name, n in counts.items() if "characters" in name):
        return []
    size = sum(documents.text_bytes(path) for source in named for path in sources.files(source))
    return [
        f"  of these files, which hold about {human(size)} bytes, only the first "
        f"{human(MOST_CHARACTERS)} characters of text and of conversations are used: name the most "
        "important files first, or train on all of them with base_train"
    ]


def check_person(me: str, inventories: Sequence[Any]) -> None:
    """UserError unless one of the inventories has a chat in which this person writes."""
    counts = [n for found in inventories for n in found.conversations.values()]
    if not any("chats" in n for n in counts):
        problems = (problem for found in inventories for problem in found.conversation_problems)
        reason = next(problems, "there is none")
        raise UserError(f"--me={me} writes in no chat of this text; {reason}")


def unseen_conversations(folder: Path) -> dict[str, int]:
    """
    Remove from own.jsonl duplicates, and conversations with a line of the held-out text: chats are
    in both, and the two are split separately. Returns how many conversations are left, and their
    bytes.
    """
    path = folder / "own.jsonl"
    if not path.stat().st_size:
        return {"conversations": 0, "conversation_bytes": 0}

    from nanochat.eval import own_text

    def without_name(line: str) -> str:
        return line.partition(": ")[2].strip() or line.strip()

    held_out = {
        line
        for text in own_text.documents(own_source(folder), "val")
        for line in map(without_name, text.splitlines())
        if len(line) >= TELLING
    }
    kept = []
    for row in dict.fromkeys(path.read_text(encoding="utf-8").splitlines()):
        text = "\n".join(str(message["content"]) for message in json.loads(row)["messages"])
        if held_out.isdisjoint(map(without_name, text.splitlines())):
            kept.append(row + "\n")
    atomic_write(path, "".join(kept))
    return {"conversations": len(kept), "conversation_bytes": sum(map(len, kept))}


def write_conversations(folder: Path, count: int, seed: int) -> dict[str, int]:
    """
    Make conversations from the training text (made.jsonl), and questions from the held-out text
    (questions.jsonl). Returns their counts, and the bytes of the former.
    """
    from nanochat.eval import own_text

    source = own_source(folder)
    train = text_questions.TextQuestions(own_text.documents(source, "train"))
    held_out = text_questions.TextQuestions(own_text.documents(source, "val"), train.words)
    made = list(train.conversations(seed, text_questions.KINDS, count))
    asked = [
        q for kind in text_questions.JUDGED for q in held_out.conversations(seed, [kind], QUESTIONS)
    ]
    for name, items in (("made", made), ("questions", asked)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        atomic_write(folder / f"{name}.jsonl", lines)
    size = (folder / "made.jsonl").stat().st_size
    return {"made": len(made), "made_bytes": size, "questions": len(asked)}


def own_source(folder: Path) -> sources.Source:
    """The text in text.jsonl, as a source."""
    return sources.training_sources([f"text={folder / 'text.jsonl'}"])[0]


# ---- planning


def minutes_of(knobs: MineKnobs) -> float:
    """The minutes for everything. UserError if they are given twice, or too few."""
    if knobs.minutes and knobs.hours:
        raise UserError(
            f"--minutes={knobs.minutes:g} and --hours={knobs.hours:g} set two budgets: give one"
        )
    minutes = knobs.minutes or 60 * knobs.hours or MINUTES
    if minutes < LEAST_MINUTES:
        raise UserError(
            f"{minutes:g} minutes are too few for a tokenizer, three stages and questions: give "
            f"--minutes={LEAST_MINUTES} or more"
        )
    return minutes


def seconds_for(stage: str, knobs: MineKnobs, diary: Diary) -> float:
    """
    The time of a stage: its share of the time that is left for it and the later ones, but at least
    a minute, because a chain that takes longer is worth more than one that is incomplete.
    """
    later = dict(list(SHARES.items())[list(SHARES).index(stage) :])
    return max(LEAST_SECONDS, split_budget(max(1.0, seconds_left(knobs, diary)), later)[stage])


def seconds_left(knobs: MineKnobs, diary: Diary) -> float:
    """The time that is left for training; below 0 if the chain is late."""
    return 60 * knobs.minutes - diary.seconds - CLOSING_SECONDS


def plan_base(knobs: MineKnobs, diary: Diary, tokens: int, vocab_size: int) -> str:
    """The flags of pretraining: a size, a batch and a length that suit time and text."""
    seconds = seconds_for("base", knobs, diary)
    useful = USEFUL_PASSES * tokens
    shape = {"vocab_size": vocab_size, "sequence_len": 256}
    _, peak = expected_speed(knobs, n_head=4, n_kv_head=4, **shape)
    flops_left = USUAL * peak * seconds_left(knobs, diary)
    # Each of the three stages reads the embedded corpus once
    depth, width = shape_for(flops_left, useful + 3 * EVERYDAY_TOKENS, vocab_size)
    heads = width // 64
    speed, _ = expected_speed(
        knobs, n_layer=depth, n_embd=width, n_head=heads, n_kv_head=heads, **shape
    )
    own, embedded = text_tokens(speed * seconds, useful, knobs.everyday)
    expected, flops = own + embedded, USUAL * peak * seconds
    batch, context = batch_for(expected), 256 if flops < SHORT_FLOPS else context_for(flops)
    diary.notes |= {
        "text": {"own": round(own), "embedded": round(embedded)},
        "expected_speed": round(speed),
        "batch": batch,
    }
    print0(
        f"{human(tokens)} tokens of text, {depth} layers of width {width}: about "
        f"{human(speed)} tokens per second; {own / tokens:.1f} passes over the text and "
        f"{human(embedded)} tokens of the embedded corpus in {expected / speed / 60:.1f} minutes"
    )
    if own >= useful:
        print0(
            f"more than {USEFUL_PASSES} passes would only memorise the text: more text would help, "
            "more time would not"
        )
    flags = (
        f"--depth={depth} --model_dim={width} --head_dim=64 --sequence_len={context} "
        f"--total_batch_size={batch} --max_minutes={seconds / 60:.2f} --patience=2 "
        "--warmdown_ratio=1 --final_lr_frac=0"
    )
    if own >= useful:  # else a machine that is faster than expected reads more
        flags += f" --num_iterations={max(1, round(expected / batch))}"
    if own > 2 * tokens:  # evaluate after every pass, to see whether held-out loss still falls
        flags += f" --eval_every={math.ceil(tokens * expected / (own * batch))}"
    return f"{flags} --lookback=on{compiling(seconds, peak)}"


def compiling(seconds: float, peak: float) -> str:
    """
    The flag " --compile=off" for a stage that is too short to compile, else "". Compiling takes
    30 s on two idle cores with a peak of COMPILING_PEAK, and longer on slow or busy ones. Later
    stages inherit the flag.
    """
    pays = seconds >= COMPILE_PAYS_SECONDS * max(0.5, COMPILING_PEAK / peak)
    return "" if pays else " --compile=off"


def plan_later(stage: str, knobs: MineKnobs, diary: Diary) -> str:
    """
    The flags of a later stage's length: its share of the time or most_steps, whichever ends first.
    """
    seconds, speed = seconds_for(stage, knobs, diary), diary.notes["speed"]
    steps, tokens = most_steps(stage, diary), diary.notes["batch"]
    if stage == "sft":
        tokens *= 2
    if steps * tokens / speed + STAGE_SECONDS < seconds:
        length = f"--num_iterations={steps}"
    else:
        length = f"--max_minutes={seconds / 60:.2f}"
    if stage == "mid":  # a model that was taken over had another batch
        length += f" --total_batch_size={tokens}" + diary.notes.get("compiling", "")
    return length


def most_steps(stage: str, diary: Diary) -> int:
    """
    Steps after which a later stage ends even if there is time left: enough to learn to converse or,
    if that is more, as many as in pretraining (a fifth as many in finetuning).
    """
    pretraining = diary.notes["steps"]
    return max(SFT_STEPS, pretraining // 5) if stage == "sft" else max(MID_STEPS, pretraining)


def shares_of(stage: str, knobs: MineKnobs, folder: Path, diary: Diary) -> dict[str, float]:
    """
    {source: share} of a later stage: the conversations made from your text, your own, those about
    the model's name, and those of the embedded corpus; in midtraining also your text. Nothing of
    yours is read more often than is useful; the embedded corpus has the rest.
    """
    notes, has_text = diary.notes, stage == "mid"
    everyday = knobs.everyday / 2 if knobs.start else knobs.everyday  # it converses already
    expected = min(
        most_steps(stage, diary) * notes["batch"],
        seconds_for(stage, knobs, diary) * notes["speed"],
    )

    def limited(share: float, tokens: float, passes: float = USEFUL_PASSES) -> float:
        """The share, of what `everyday` leaves, but no more than so many passes over the tokens."""
        return min(share * (1 - everyday), passes * tokens / expected)

    # Pretraining has read the text already, unless a model was taken over
    passes = USEFUL_PASSES if knobs.start else 1
    text = limited(0.5, notes["tokens"], passes) if has_text else 0.0
    own = 0.0
    if notes["conversations"] > 1:
        own = limited(0.6, notes["conversation_bytes"] / BYTES_PER_TOKEN)
    rest = max(0.2, 1 - (text + own) / (1 - everyday))
    made = limited(rest, notes["made_bytes"] / BYTES_PER_TOKEN)
    embedded = 1 - text - own - made if everyday else 0.0
    shares = {
        f"made={folder / 'made.jsonl'}": made,
        f"own={folder / 'own.jsonl'}": own,
        "identity@400": 0.05,
        f"everyday@{min(32_000, round(1600 * knobs.minutes))}": embedded,
    }
    if has_text:
        shares[f"text={folder / 'text.jsonl'}"] = text
        shares[embedded_text(embedded * expected)] = embedded / 5
    return {source: round(share, 4) for source, share in shares.items() if share >= 0.001}


def embedded_text(tokens: float) -> str:
    """The embedded corpus as a source, as large as a stage needs that reads so many tokens."""
    return f"{EMBEDDED_TEXT}@{min(9, max(1, round(tokens * BYTES_PER_TOKEN / 1e6)))}"


def later_flags(stage: str, name: str, shares: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """(the conversations of a later stage, its flags except its length); `name`: the model's."""
    named = [f"{source}:{share}" for source, share in shares.items()]
    texts = [source for source in named if source.startswith(("text=", EMBEDDED_TEXT))]
    specs = [source for source in named if source not in texts]
    flags = ["--data", *specs, f"--name={name}", "--warmdown_ratio=1"]
    if stage == "sft":
        flags += [f"--conversations_per_step={CONVERSATIONS_PER_STEP}", "--init_lr_frac=0.5"]
    else:
        flags.append("--lr_scale=0.5")
    if texts:
        flags += ["--text", *texts]
    return specs, flags


# ---- the chain


def train_tokenizer(knobs: MineKnobs, folder: Path, size: int) -> dict[str, Any]:
    """
    Train a tokenizer on the text and half as much of the embedded corpus. Returns its size and
    fingerprint, and how many tokens the text has.
    """
    from nanochat.data.shards import prepare
    from nanochat.data.tokenizer import Tokenizer

    vocab_size = knobs.vocab_size or tok_train.default_vocabulary(size, knobs.device_type)
    data = [f"text={folder / 'text.jsonl'}:0.67"]
    if knobs.everyday:
        data.append(f"tinyworld@{min(2, max(0.05, size / 2e6)):.2f}:0.33")
    trained = tok_train.main(["--data", *data, f"--vocab_size={vocab_size}", "--digits=2"])
    return {
        "tokens": prepare(own_source(folder), "train", Tokenizer.load()).total,
        **{name: trained[name] for name in ("vocab_size", "fingerprint")},
    }


def take_over(knobs: MineKnobs, folder: Path, diary: Diary) -> dict[str, Any]:
    """
    Copy the furthest stage of the model that --from names, to take the place of a pretrained model.
    Returns what later stages need to know about pretraining.
    """
    from nanochat.data.shards import prepare
    from nanochat.model.checkpoint import choose

    _, checkpoint = choose(tag=knobs.start)
    config = checkpoint.config.to_dict()
    target = run_directory("base", knobs.model_tag)
    shutil.copytree(checkpoint.path, target / checkpoint.path.name, dirs_exist_ok=True)
    names = "vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "sequence_len"
    speed, peak = expected_speed(knobs, **{name: config[name] for name in names})
    seconds = seconds_for("mid", knobs, diary)
    return {
        "tokens": prepare(own_source(folder), "train", checkpoint.tokenizer()).total,
        "speed": speed,
        "steps": 0,
        "batch": batch_for(speed * seconds),
        "compiling": compiling(seconds, peak),
    }


def report(knobs: MineKnobs, folder: Path) -> dict[str, Any]:
    """What is measured at the end; it is also written to summary.json."""
    from nanochat.eval import own_text
    from nanochat.model.checkpoint import load_for_inference

    machine = {name: getattr(knobs, name) for name in ("device_type", "dtype", "seed")}
    source, tag = own_source(folder), knobs.model_tag
    chat = load_for_inference("sft", tag, **machine)
    stages = ["mid"] if knobs.start else ["base", "mid"]
    writers = {stage: load_for_inference(stage, tag, **machine) for stage in stages}
    bits = {stage: own_text.bits_per_byte(loaded, source) for stage, loaded in writers.items()}
    writer = min(bits, key=bits.__getitem__)  # the stage that predicts the text best
    exports = True  # whether transformers can run the model
    try:
        choose_target(chat.model.config, chat.tokenizer.digits, "hf")
    except UserError:
        exports = False
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    everyday = [tinyworld.TASKS[kind] for kind in dict.fromkeys(EVERYDAY)]
    results = {
        "writer": writer,
        "bits_per_byte": {
            "model": bits[writer],
            "after finetuning": own_text.bits_per_byte(chat, source),
            **own_text.other_predictors(chat, source),
        },
        "samples": own_text.samples(writers[writer], source, knobs.seed),
        "exports": exports,
        "talk": own_text.replies(chat, [*TALK, *text_questions.about_names(questions, 2)]),
        "own": own_text.answers(chat, text_questions.tasks(questions), QUESTIONS),
        "embedded": own_text.answers(chat, everyday, QUESTIONS // 3),
    }
    write_json(folder / "summary.json", results)
    return results


def slow_lines(notes: Mapping[str, Any]) -> list[str]:
    """A line about a machine that was less than half as fast as planned; else no line."""
    expected = notes.get("expected_speed", 0)
    if notes["speed"] * 2 > expected:
        return []
    return [
        f"the machine trained at {human(notes['speed'])} tokens per second, but the plan expected "
        f"{human(expected)}: if it was busy, train again under another --model_tag=NAME while it "
        "is not, or with more minutes, for a better model"
    ]


def verdict(knobs: MineKnobs, results: dict[str, Any], diary: Diary) -> str:
    """What was measured, and how to go on, as text to print."""
    from nanochat.eval import own_text

    kinds = {**results["own"]["kinds"], **results["embedded"]["kinds"]}
    tag = knobs.model_tag
    with_code = "" if results["exports"] else " --with_code"
    return "\n".join(
        [
            "",
            *own_text.sample_lines(results["samples"]),
            "",
            *own_text.predictor_lines(results["bits_per_byte"]),
            "",
            *own_text.answer_lines(kinds),
            "",
            "What it replies in a chat:",
            *(f"    {asked}\n    > {reply}" for asked, reply in results["talk"]),
            "",
            f"{diary.seconds / 60:.1f} minutes in all",
            *slow_lines(diary.notes),
            f"to talk to it:        nanochat chat_cli -g {tag}     (or nanochat serve -g {tag})",
            f"to let it continue:   nanochat base_complete -g {tag} -i {results['writer']}",
            f"its curves:           {base_dir() / 'report' / tag}.html",
            f"to take it elsewhere: nanochat export -g {tag}{with_code}",
        ]
    )


def prepare(chain: Chain, knobs: MineKnobs, folder: Path) -> None:
    """Read the text, make conversations from it, and train or take over a tokenizer."""
    notes = chain.diary.notes
    chain.step("reading", "reading", lambda: read_all(knobs, folder), noted=dict)
    print0("\n".join(notes["inventory"]))
    count = min(
        CONVERSATIONS,
        round(CONVERSATIONS * knobs.minutes / 20),
        max(400, notes["characters"] // CHARACTERS_PER_CONVERSATION),
    )
    chain.step(
        "conversations",
        "conversations",
        lambda: write_conversations(folder, count, knobs.seed),
        noted=dict,
    )
    print0(f"made from the text: {notes['made']:,} conversations")
    if knobs.start:
        chain.step("base", "taking over", lambda: take_over(knobs, folder, chain.diary), noted=dict)
        return
    if step_folders(run_directory("rl", READY_MADE)) and "tokenizer" not in chain.diary.done:
        print0(
            f"a model {READY_MADE} is trained here: --from {READY_MADE} --model_tag NAME keeps "
            "its answers to everyday questions and learns less of your text"
        )
    tok_train.in_chain(chain, lambda: train_tokenizer(knobs, folder, notes["bytes"]))


def pretrained(tag: str) -> dict[str, Any]:
    """Steps and tokens per second of pretraining. Its last start may have had no step to train."""
    rows = logbook.by_kind(run_directory("base", tag))
    speeds = [rows.get(kind, {}).get("tok_per_sec", 0.0) for kind in ("summary", "train")]
    return {
        "speed": next(speed for speed in speeds if speed > 0),
        "steps": rows.get("summary", rows["train"])["step"],
    }


def train(chain: Chain, stage: str, knobs: MineKnobs, folder: Path) -> None:
    """Run a stage that is not done, or continue it."""
    from nanochat.eval.tasks import mixture
    from nanochat.model.checkpoint import locate

    diary, tag = chain.diary, knobs.model_tag
    notes = diary.notes
    if stage == "base":
        if stage not in diary.lengths:
            diary.lengths[stage] = plan_base(knobs, diary, notes["tokens"], notes["vocab_size"])
        own, embedded = notes["text"]["own"], notes["text"]["embedded"]
        flags = ["--data", f"text={folder / 'text.jsonl'}:{own}"]
        flags += [f"{embedded_text(embedded)}:{embedded}"] if embedded else []
    else:
        if not notes.get("speed"):
            notes |= pretrained(tag)
        name = f"data of {stage}"
        if name not in notes:  # decided once, because the shares depend on the time that is left
            notes[name] = shares_of(stage, knobs, folder, diary)
        specs, flags = later_flags(stage, knobs.name, notes[name])

        def render() -> None:
            """Tokenise the conversations before the stage's own time starts."""
            mixture.of_stage(stage, specs, locate("base", tag).tokenizer(), name=knobs.name)

        chain.step(name, "conversations", render)
        if stage not in diary.lengths:
            diary.lengths[stage] = plan_later(stage, knobs, diary)
    diary.save()  # so that a stage that is killed continues with this length
    command = import_module(f"nanochat.commands.{STAGES[stage].command}").main
    chain.train(stage, TITLES[stage], command, knobs, tag, flags)


def budget(knobs: MineKnobs, diary: Diary) -> MineKnobs:
    """
    The knobs with minutes alone: those with which the chain was begun unless others are given now;
    in that case, the stages that have not begun are planned again.
    """
    minutes = minutes_of(knobs)
    before = diary.notes.get("minutes", minutes)
    if not (knobs.minutes or knobs.hours):
        minutes = before
    diary.notes["minutes"] = minutes
    if minutes != before:
        diary.replan()
        for stage in SHARES:
            name = f"data of {stage}"
            if name in diary.notes and not begun(stage, knobs.model_tag):
                del diary.notes[name]
                diary.done = [step for step in diary.done if step != name]
    return replace(knobs, minutes=minutes, hours=0.0)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    knobs, _ = parse(MineKnobs, argv, command="mine")
    minutes_of(knobs)
    if not knobs.data:
        raise UserError("mine needs your text: nanochat mine FOLDER")
    diary = Diary("mine", knobs.model_tag, knobs.seconds_used)
    folder = diary.path.with_suffix("")
    paths = [str(user_path(word).resolve()) for word in knobs.data]
    if "reading" not in diary.done:
        diary.notes["data"] = paths
    if diary.notes["data"] != paths:
        raise UserError(
            f"the model {knobs.model_tag} was begun on {' '.join(diary.notes['data'])}: "
            "give the same text to continue, or --model_tag=NAME for another model"
        )
    if knobs.dry_run:  # elsewhere, not to replace the text of a model that was begun
        with TemporaryDirectory() as elsewhere:
            print0("\n".join(read_all(knobs, Path(elsewhere))["inventory"]))
        return {}
    print0("loading torch")
    knobs = budget(knobs, diary)
    chain = Chain(diary)
    print0(f"(details: {diary.log})\n")
    prepare(chain, knobs, folder)
    if "sft" in diary.done:
        print0("everything is trained, so it is only measured again; --model_tag=NAME trains anew")
    for stage in SHARES:
        if stage not in diary.done:
            train(chain, stage, knobs, folder)
    with chain.display.working("questions"):
        results = report(knobs, folder)
    print0(verdict(knobs, results, diary))
    return results


if __name__ == "__main__":
    entry(main)
