"""
One page about a budget: which model it trains, how good that will be, what it takes, and the
commands.

    nanochat plan day --hours 24 --gpu rtx4090
    nanochat plan day --hours 3 --data wiki=DIR:0.6 books=DIR:0.4 --html day.html

Every figure names its source: measured here or on such a card, specification, law (the scaling law
of plan/law.py), counted (from the model's shape) or rule (decided in this project). The same page
comes as text, as HTML (--html) and as JSON (--json).
"""

import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from nanochat.base.common import UserError, base_dir, columns, duration, human, print0
from nanochat.base.knobs import knob
from nanochat.data.sources import SHARD_SETS, files, parse_sources
from nanochat.plan import machine, memory, probe
from nanochat.plan.choice import Candidate, Choice, ChoiceKnobs, assess, choose
from nanochat.plan.law import Law, Text
from nanochat.plan.machine import GIB, Machine, budget_seconds
from nanochat.plan.shapes import counts
from nanochat.train.scaling import bytes_per_token, text_for

SHARD_TEXT, SHARD_FILE = 250e6, 100e6  # bytes of text in a shard of web text, and of its file
TASKS = 1e9  # bytes of the conversations and questions of the later stages, about
PACKED = {".parquet": 2.5, ".gz": 3.0, ".zst": 3.0}  # bytes of text per byte of a file
TOKENISING = 3.2e6  # bytes per second and core (bench/data.py, two cores of an EPYC Zen 4)
MERGING = 6e6  # the same of training a tokenizer, on at most 2 GB
POINT = 25.0  # seconds that plan probe takes for each measurement, of at most a twelfth of the time
REST = 100.0  # watts of a computer beside its GPU
PASSES = 40.0  # over a text: more teach next to nothing (Muennighoff et al. 2023)
# Bits per byte of web text up to which the words hold: a judgement of the authors, not measured.
REFERENCES = (
    (0.76, "like GPT-2 XL (1.6 B): coherent paragraphs, many true facts, no reasoning"),
    (0.84, "between GPT-2 124M and GPT-2 XL: keeps to its subject, facts often wrong"),
    (1.00, "like GPT-2 124M: fluent sentences, wrong facts"),
    (1.30, "mostly grammatical sentences that drift from their subject"),
    (1.70, "phrases and short sentences with little sense"),
    (2.10, "real words in an order that seldom makes a sentence"),
    (math.inf, "letters and fragments of words"),
)
Row = tuple[str, str, str]  # what, figure, source
SOURCES = (
    "[law] a scaling law fitted to many runs   [counted] from the model's shape   "
    "[rule] decided in this project   [specification] the vendor's data   "
    "[judged] by the authors, not measured"
)
STAGES = {
    "probe": "measure the machine's speed",
    "pilot": "short trial runs",
    "base_train": "pretraining",
    "mid_train": "midtraining",
    "chat_sft": "finetuning",
    "evaluation": "evaluation and report",
}


@dataclass(kw_only=True)
class DayKnobs(ChoiceKnobs):
    """Day"""

    gpu: str = knob("", "plan for this GPU, for example rtx4090 (default: this machine)")
    gpus: int = knob(1, "number of these GPUs", low=1)
    probe: str = knob(
        "",
        "use this file from plan probe (default: the one in the base folder, if it was "
        "measured on this machine)",
    )
    memory_gb: float = knob(
        0.0, "memory of the device (default: the GPU's, or what is free here)", low=0
    )
    tokens: float = knob(
        0.0, "tokens of pretraining, in place of a budget of time; also give --depth", low=0
    )
    cores: int = knob(0, "cores that tokenise; 0 = those of this machine, 8 beside a --gpu", low=0)
    mbit: float = knob(100.0, "speed of the network in Mbit per second", low=0.1)
    watts: float = knob(0.0, "power of the machine; 0 = the card's rated power and 100 W", low=0)
    price: float = knob(0.3, "price of a kWh", low=0)
    json: bool = knob(False, "print only JSON")


K = TypeVar("K", bound=DayKnobs)


@dataclass(kw_only=True)
class PageKnobs(DayKnobs):
    """Page"""

    script: str = knob("runs/one_day.sh", "script that the page names as the command")
    html: str = knob("", "also write the page to this file")
    check: bool = knob(False, "end with an error if disk or data do not suffice")
    shell: bool = knob(
        False, "print what is to be downloaded and the vocabulary for a shell, the page beside it"
    )


# the machine and the text


def planned_machine(knobs: DayKnobs) -> Machine:
    """
    The machine that is planned for: a card by name, the machine of a probe, or this one, which is
    probed now unless it was before. UserError for two of them and for an unknown card.
    """
    if knobs.gpu and knobs.probe:
        raise UserError(
            f"--gpu={knobs.gpu} and --probe={knobs.probe} describe two machines: give only one "
            "of them"
        )
    if knobs.probe:
        target = machine.load(knobs.probe)
    elif knobs.gpu:
        target = replace(machine.of_card(knobs.gpu), gpus=knobs.gpus)
    else:
        target = _this_machine(knobs)
    return replace(target, memory_bytes=knobs.memory_gb * GIB) if knobs.memory_gb else target


def _this_machine(knobs: DayKnobs) -> Machine:
    target, file = machine.here(knobs.device_type, knobs.dtype), machine.folder() / "probe.json"
    if file.exists():
        probed = machine.load(file)
        identity = ("name", "device_type", "dtype")
        if all(getattr(probed, name) == getattr(target, name) for name in identity):
            return probed
    print0(
        "this machine has no probe yet: measuring a few points (plan probe measures more)",
        file=sys.stderr,
    )
    shared = {f.name for f in fields(probe.ProbeKnobs)} & {f.name for f in fields(knobs)}
    given = {name: getattr(knobs, name) for name in shared - {"out", "json"}}
    probe.run(probe.ProbeKnobs(**given, device_batches=(8,)))
    return machine.load(file)


def fresh_text(data: Sequence[str], vocabulary: int) -> Text:
    """
    (share of the tokens, tokens that it holds) of each source; a data set on the hub counts with
    all its shards, because they can be downloaded.
    """
    sources, sizes = parse_sources(data), []
    for source in sources:
        if source.kind == "shards":
            size = SHARD_TEXT * SHARD_SETS[source.paths[0].name].last
        elif source.kind == "tinyworld":
            size = 1e6 * source.megabytes
        else:
            size = sum(p.stat().st_size * PACKED.get(p.suffix, 1.0) for p in files(source))
        sizes.append(size / bytes_per_token(vocabulary))
    weights = [source.weight or size for source, size in zip(sources, sizes, strict=True)]
    return [(w / sum(weights), size) for w, size in zip(weights, sizes, strict=True)]


def settled(knobs: K, target: Machine) -> tuple[K, Text]:
    """The knobs with what follows by rule (text, vocabulary, budget), and the fresh text."""
    if knobs.tokens and budget_seconds(knobs):
        raise UserError("--tokens and a budget of time set two lengths: give only one of them")
    if knobs.tokens and not knobs.depth:
        raise UserError(f"--tokens={knobs.tokens:g} needs a model: add --depth")
    seconds = budget_seconds(knobs) or 86_400.0
    data = knobs.data or (text_for(seconds),)
    knobs = replace(knobs, data=data)
    knobs = replace(knobs, vocab=knobs.vocabulary(elsewhere=bool(knobs.gpu)))
    if knobs.tokens:
        knobs = replace(
            knobs,
            hours=1.0,
            aspect_ratio=knobs.aspect_ratio or 64.0,
            sequence_len=knobs.sequence_len or 2048,
        )
        config = knobs.of_size(knobs.depth, knobs.aspect_ratio, knobs.sequence_len)
        for _ in range(3):  # the time follows from the tokens, and they a little from the time
            assessed = assess(knobs, config, target, Law())
            knobs = replace(knobs, hours=knobs.hours * knobs.tokens / max(1.0, assessed.tokens))
    return knobs, fresh_text(data, knobs.vocab)


# what it takes


def needs(knobs: DayKnobs, target: Machine, chosen: Candidate, text: Text) -> dict[str, Any]:
    """Bytes, seconds and kWh that the run of a candidate takes, and how often it reads its text."""
    web = [s for s in parse_sources(knobs.data) if s.kind == "shards"]
    cores = knobs.cores or (8 if knobs.gpu else os.cpu_count() or 1)
    spelled = bytes_per_token(knobs.vocab)
    read = chosen.tokens if web else sum(fresh for _, fresh in text)
    shards = math.ceil(1.03 * chosen.tokens * spelled / SHARD_TEXT) if web else 0
    shards = min(shards, *(SHARD_SETS[s.paths[0].name].last for s in web)) if web else 0
    simple = [s.kind for s in parse_sources(knobs.data)] == ["tinyworld"]
    download = SHARD_FILE * (shards + len(web)) + (0 if simple else TASKS)
    n = counts(chosen.config)
    checkpoint = 8 * n["transformer"] + 12 * (n["total"] - n["transformer"])
    disk = {
        "shards": SHARD_FILE * (shards + len(web)),
        "tasks": 0 if simple else TASKS,
        "tokens": read * (2 if knobs.vocab <= 1 << 16 else 4),
        # Two of each of three stages, and one that is being written.
        "checkpoints": 7 * checkpoint,
    }
    watts = knobs.watts or (target.gpus * target.watts + REST if target.watts else 0.0)
    seconds = budget_seconds(knobs)
    return {
        "shards": shards,
        "web": web[0].paths[0].name if web else "",
        "vocabulary": knobs.vocab,
        "cores": cores,
        "download_bytes": download,
        "download_seconds": download * 8 / (1e6 * knobs.mbit),
        "tokenizer_seconds": min(2e9, read * spelled) / (MERGING * cores) + 10,
        "tokenising_seconds": read * spelled / (TOKENISING * cores) + 5,
        "checkpoint_bytes": checkpoint,
        "disk_bytes": disk,
        "watts": watts,
        "kwh": watts * seconds / 3.6e6,
        "passes": max(share * chosen.tokens / fresh for share, fresh in text),
        "memory_bytes": memory.predict(
            chosen.config,
            chosen.device_batch_size,
            chosen.config.sequence_len,
            dtype=target.dtype,
            device_type=target.device_type,
            compiled=target.compiles(knobs.pretraining_seconds()),
            world_size=target.gpus,
        ),
    }


def lacking(knobs: DayKnobs, need: dict[str, Any]) -> list[str]:
    """What does not suffice on this machine, with the figures."""
    disk, free = sum(need["disk_bytes"].values()), shutil.disk_usage(base_dir()).free
    faults = []
    if free < disk:
        faults.append(
            f"the run needs {human(disk)}B of disk at its peak, and {base_dir()} has "
            f"{human(free)}B free: free some space or set NANOCHAT_BASE_DIR to another disk"
        )
    own = any(source.kind == "files" for source in parse_sources(knobs.data))
    if own and need["passes"] > PASSES:
        faults.append(
            f"the run would read your text {need['passes']:.0f} times, and more than {PASSES:.0f} "
            "times teach next to nothing: add text to --data, or give less time"
        )
    return faults


def in_words(bpb: float) -> tuple[str, str]:
    """What bits per byte of web text mean, and where that is known from."""
    return next((words, "judged") for most, words in REFERENCES if bpb <= most)


# the page


def schedule(knobs: DayKnobs, need: dict[str, Any]) -> list[tuple[str, float, str]]:
    """What happens one after the other, its seconds and their source; the clock starts late."""
    before = [
        (
            f"download of {human(need['download_bytes'])}B",
            need["download_seconds"],
            f"at {knobs.mbit:g} Mbit/s",
        ),
        ("train the tokenizer", need["tokenizer_seconds"], "measured on two cores"),
        (f"tokenise on {need['cores']} cores", need["tokenising_seconds"], "measured on two cores"),
    ]
    stages = {"probe": knobs.used, **knobs.stages()}
    return [
        row
        for row in [*before, *((STAGES[name], s, "rule") for name, s in stages.items())]
        if row[1]
    ]


def model_rows(choice: Choice) -> list[list[str]]:
    """The three models of a choice: heads, and a row for each."""
    heads = [
        "",
        "layers x width",
        "parameters",
        "tokens",
        "tok/s",
        "bits per byte (90 %)",
        "memory",
        "like",
    ]
    rows = [heads]
    three = {"smaller": choice.fallback, "chosen": choice.primary, "larger": choice.larger}
    for name, c in three.items():
        if c:
            rows.append(
                [
                    name,
                    f"{c.config.n_layer} x {c.config.n_embd}",
                    human(c.parameters),
                    human(c.tokens),
                    f"{c.speed.tok_per_sec:,.0f}",
                    "{:.3f} ({:.3f} to {:.3f})".format(*c.bpb),
                    f"{c.memory_bytes / GIB:.1f} GiB",
                    in_words(c.bpb[0])[0].split(":")[0].removeprefix("like "),
                ]
            )
    return rows


def changes(knobs: DayKnobs, target: Machine, text: Text, chosen: Candidate) -> list[Row]:
    """What would change the choice: more time, more memory, more text."""
    double = {"hours": 2 * knobs.hours, "minutes": 2 * knobs.minutes}
    roomy = replace(target, memory_bytes=2 * target.memory_bytes)
    plenty = [(share, 2 * fresh) for share, fresh in text]
    asked = {
        "twice the time": (replace(knobs, **double), target, text),
        "twice the memory": (knobs, roomy, text),
        "twice the text": (knobs, target, plenty),
    }
    rows = []
    for name, (k, m, t) in asked.items():
        other = choose(k, m, Law(), t).primary
        same = "the same model" if other.shape == chosen.shape else "{} x {}".format(*other.shape)
        gain = other.bpb[0] - chosen.bpb[0]
        rows.append((name, f"{same}, {other.bpb[0]:.3f} bits per byte ({gain:+.3f})", "law"))
    return rows


def sections(
    knobs: DayKnobs, target: Machine, choice: Choice, text: Text, need: dict[str, Any]
) -> dict[str, list[Row]]:
    """The page without its table of models: headings and rows (what, figure, source)."""
    chosen, speed_source = choice.primary, "measured here" if target.points else "specification"
    if knobs.probe:
        speed_source = "measured on such a machine"
    words, known = in_words(chosen.bpb[0])
    if list(knobs.data) == ["tinyworld"]:
        words, known = "the embedded corpus is far simpler: expect 0.2 to 0.4", "measured here"
    parts, disk = need["memory_bytes"], need["disk_bytes"]
    state = parts["weights"] + parts["gradients"] + parts["optimizer"]
    beside = parts["total"] - parts["allocated"]
    work = parts["allocated"] - state
    lo, hi = chosen.speed.lo, chosen.speed.hi
    power = f"{need['kwh']:.1f} kWh, {need['kwh'] * knobs.price:.2f} at {knobs.price:g} per kWh"
    rated = "your figure" if knobs.watts else "specification"
    contexts = " -> ".join(str(T) for _, T in chosen.contexts)
    passes = "each token once" if need["passes"] <= 1 else f"each token {need['passes']:.1f} times"
    return {
        "What you get": [
            (
                "quality",
                "{:.2f} bits per byte of unseen text, less is better ({:.2f} to {:.2f} in nine "
                "cases of ten)".format(*chosen.bpb),
                "law",
            ),
            ("in words", words, known),
            ("text", f"{', '.join(knobs.data)}: {human(chosen.tokens)} tokens, {passes}", "rule"),
            (
                "speed",
                f"{chosen.speed.tok_per_sec:,.0f} tokens per second ({lo:,.0f} to {hi:,.0f})",
                speed_source,
            ),
            (
                "a step",
                f"{human(chosen.total_batch_size)} tokens, context {contexts}, "
                f"{chosen.device_batch_size} rows at a time",
                "rule",
            ),
        ],
        "What it takes": [
            (
                "disk at its peak",
                f"{sum(disk.values()) / 1e9:.1f} GB: "
                + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in disk.items() if size),
                "counted",
            ),
            (
                "memory",
                f"{parts['total'] / GIB:.1f} of {target.memory_bytes / GIB:.1f} GiB: weights and "
                f"their state {state / GIB:.1f}, activations and loss {work / GIB:.1f}, "
                f"rest {beside / GIB:.1f}",
                "counted",
            ),
            (
                "electricity",
                f"{power} ({need['watts']:.0f} W)" if need["watts"] else "give --watts to see it",
                rated if need["watts"] else "",
            ),
        ],
        "What would change the choice": changes(knobs, target, text, chosen),
    }


def when(made: dict[str, Any]) -> list[Row]:
    """The schedule of a page that begins now."""
    rows, clock = [], datetime.now()
    for name, seconds, source in made["schedule"]:
        begins, clock = clock, clock + timedelta(seconds=seconds)
        rows.append(
            (name, f"{duration(seconds):>7}, {begins:%a %H:%M} to {clock:%a %H:%M}", source)
        )
    return rows


def commands(knobs: DayKnobs, need: dict[str, Any], script: str) -> list[str]:
    """The commands that do it."""
    length = f"--hours {knobs.hours:g}" if knobs.hours else f"--minutes {knobs.minutes:g}"
    data = shlex.join(["--data", *knobs.data])
    if knobs.tokens:
        return [f"bash {script}"]
    recipe = f"nanochat plan recipe {length} --pilot --vocab {need['vocabulary']} {data}"
    by_hand = [
        f"nanochat tok_train --vocab_size {need['vocabulary']} {data}",
        recipe,
        f"nanochat base_train --recipe {shlex.quote(str(machine.folder() / 'recipe.toml'))}    "
        "(then mid_train and chat_sft in the same way)",
        "nanochat chat_cli",
    ]
    if need["web"]:
        by_hand.insert(0, f"nanochat dataset -n {need['shards']} --set {need['web']}")
    return [f"bash {script} {length} {data}    (all of it), or:", *by_hand]


def planned(knobs: K, whole: bool = False) -> tuple[K, Machine, Choice, Text]:
    """
    The knobs with what follows from them, the machine, the choice and the text; `whole`: with the
    probe and the pilot of a run from the start.
    """
    if not knobs.tokens:
        knobs.pretraining_seconds()  # a missing budget is refused before anything is measured
    target = planned_machine(knobs)
    knobs, text = settled(knobs, target)
    if whole and not knobs.tokens:
        probing = POINT * (12 if target.device_type == "cpu" else 72)
        used = knobs.used or min(budget_seconds(knobs) / 12, probing)
        knobs = replace(knobs, pilot=True, used=used)
    return knobs, target, choose(knobs, target, Law(), text), text


def page(
    knobs: DayKnobs, target: Machine, choice: Choice, text: Text, script: str
) -> dict[str, Any]:
    """The page: title, models, sections and commands as text, and the figures behind them."""
    need = needs(knobs, target, choice.primary, text)
    many = f"{target.gpus} x " if target.gpus > 1 else ""
    return {
        "title": f"{duration(budget_seconds(knobs))} on {many}{target.name}",
        "models": model_rows(choice),
        "sections": sections(knobs, target, choice, text, need),
        "commands": commands(knobs, need, script),
        "lacking": [] if knobs.gpu else lacking(knobs, need),
        "schedule": schedule(knobs, need),
        "needs": need,
        "chosen": asdict(choice.primary),
    }


def whole(made: dict[str, Any]) -> dict[str, list[Row]]:
    """The sections of a page with the clock."""
    first, *others = made["sections"].items()
    return dict([first, ("When", when(made)), *others])


def show(made: dict[str, Any]) -> None:
    """Print a page."""
    print0(made["title"])
    every = whole(made)
    wide = max(len(what) for rows in every.values() for what, _, _ in rows)
    for head, rows in every.items():
        print0(f"\n{head}")
        for what, figure, source in rows:
            print0(f"  {what:<{wide}}  {figure}" + (f"  [{source}]" if source else ""))
        if head == "What you get":
            print0(columns(made["models"][0], made["models"][1:]))
    print0(f"\n{SOURCES}")
    print0("\nCommands\n" + "\n".join(f"  {line}" for line in made["commands"]))
    for fault in made["lacking"]:
        print0(f"\nIt does not suffice: {fault}")


def write_html(made: dict[str, Any], file: str) -> None:
    """Write a page to a file."""
    from html import escape

    from nanochat.study.page import table, write_page

    heads, *rows = made["models"]
    blocks = {}
    for head, lines in whole(made).items():
        body = "".join(
            f"<dt>{escape(what)}</dt><dd>{escape(figure)}<small>{escape(source)}</small></dd>"
            for what, figure, source in lines
        )
        blocks[head] = f"<dl>{body}</dl>"
    blocks["What you get"] += table(heads, [(name, cells) for name, *cells in rows])
    blocks["Commands"] = f'<pre class="wide">{escape(chr(10).join(made["commands"]))}</pre>'
    blocks["Commands"] += f"<p><small>{escape(SOURCES)}</small></p>"
    faults = "".join(f"<p>{escape(fault)}</p>" for fault in made["lacking"])
    write_page(made["title"], {"It does not suffice": faults, **blocks}, file)


def run(knobs: PageKnobs) -> dict[str, Any]:
    """Print the page and return it. UserError if nothing can be trained, or with --check."""
    settled_knobs, target, choice, text = planned(knobs, whole=True)
    made = page(settled_knobs, target, choice, text, knobs.script)
    with redirect_stdout(sys.stderr) if knobs.shell else nullcontext():
        show(made)
    if knobs.html:
        write_html(made, knobs.html)
        print0(f"\nwrote {knobs.html}", file=sys.stderr)
    if knobs.check and (faults := lacking(settled_knobs, made["needs"])):
        raise UserError("; ".join(faults))
    if knobs.shell:
        need = made["needs"]
        print0(f"shards={need['shards']}\nvocab={need['vocabulary']}\nweb={need['web']}")
        print0(f"text={shlex.quote(settled_knobs.data[0])}")
    return made
