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
from functools import cached_property
from typing import Any

from nanochat.base.common import UserError, base_dir, columns, duration, human, print0
from nanochat.base.knobs import knob
from nanochat.data.sources import SHARD_SETS, files, parse_sources
from nanochat.plan import machine, probe
from nanochat.plan.choice import Choice, ChoiceKnobs, assess, choose
from nanochat.plan.law import Law, Text
from nanochat.plan.machine import GIB, Machine, budget_seconds
from nanochat.plan.memory import STATE
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
# Bits per byte of web text up to which words hold, the words, and where they are from. Four runs of
# nanochat at 0.745 to 0.750 scored as GPT-2 XL does in CORE (its dev/LEADERBOARD.md, 2026). llm.c
# measured 3.29 nats per token for GPT-2 124M on FineWeb, which is 1.03 at 4.6 bytes per token. The
# rest is a judgement of the authors from samples, not measured.
REFERENCES = (
    (0.76, "like GPT-2 XL (1.6 B): coherent paragraphs, many true facts, no reasoning", "nanochat"),
    (0.90, "between GPT-2 124M and GPT-2 XL: keeps to its subject, facts often wrong", "judged"),
    (1.05, "like GPT-2 124M: fluent sentences, wrong facts", "llm.c"),
    (1.30, "mostly grammatical sentences that drift from their subject", "judged"),
    (1.70, "phrases and short sentences with little sense", "judged"),
    (2.10, "real words in an order that seldom makes a sentence", "judged"),
    (math.inf, "letters and fragments of words", "judged"),
)
Row = tuple[str, str, str]  # what, figure, source
SOURCES = (
    "[law] a scaling law fitted to many runs   [counted] from the model's shape   "
    "[rule] decided in this project   [specification] the vendor's data   "
    "[judged] by the authors, not measured   [nanochat, llm.c] scores that these projects published"
)
STAGES = {
    "probe": "measure the machine's speed",
    "pilot": "a short trial run",
    "base_train": "pretraining",
    "mid_train": "midtraining",
    "chat_sft": "finetuning",
    "evaluation": "evaluation and report",
}


@dataclass(kw_only=True)
class PlanKnobs(ChoiceKnobs):
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


@dataclass(kw_only=True)
class DayKnobs(PlanKnobs):
    """Page"""

    script: str = knob("", "script that the page names as the command (default: one_day.sh)")
    html: str = knob("", "also write the page to this file")
    shell: bool = knob(
        False,
        "print what is to be downloaded and the vocabulary for a shell, the page beside it; end "
        "with an error if disk or text do not suffice",
    )


# the machine and the text


def planned_machine(knobs: PlanKnobs) -> Machine:
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
    else:
        target = machine.named(knobs.gpu, knobs.gpus, knobs.dtype, knobs.device_type)
    if not target.points and not knobs.gpu:
        print0("this machine has no probe yet: measuring a few points", file=sys.stderr)
        shared = {f.name for f in fields(probe.ProbeKnobs)} & set(vars(knobs)) - {"out", "json"}
        given = {name: getattr(knobs, name) for name in shared}
        probe.run(probe.ProbeKnobs(**given, device_batches=(8,)))
        target = machine.load(machine.folder() / "probe.json")
    return replace(target, memory_bytes=knobs.memory_gb * GIB or target.memory_bytes)


def fresh_text(data: Sequence[str], vocabulary: int) -> Text:
    """
    (share of the tokens, tokens that it holds) of each source; a data set on the hub counts with
    all its shards, because they can be downloaded.
    """
    sources, sizes = parse_sources(data), []
    for source in sources:
        size = 1e6 * source.megabytes
        if source.kind == "shards":
            size = SHARD_TEXT * SHARD_SETS[source.paths[0].name].last
        elif source.kind == "files":
            size = sum(p.stat().st_size * PACKED.get(p.suffix, 1.0) for p in files(source))
        sizes.append(size / bytes_per_token(vocabulary))
    weights = [source.weight or size for source, size in zip(sources, sizes, strict=True)]
    return [(w / sum(weights), size) for w, size in zip(weights, sizes, strict=True)]


@dataclass(frozen=True)
class Plan:
    """A budget with all that follows from it: knobs without gaps, machine, text and choice."""

    knobs: Any  # PlanKnobs, or of a class that extends them
    machine: Machine
    text: Text

    @cached_property
    def choice(self) -> Choice:
        return choose(self.knobs, self.machine, Law(), self.text)

    @cached_property
    def needs(self) -> dict[str, Any]:
        """Bytes, seconds and kWh that the chosen run takes, and how often it reads its text."""
        knobs, chosen, sources = self.knobs, self.choice.primary, parse_sources(self.knobs.data)
        web = [s.paths[0].name for s in sources if s.kind == "shards"]
        tasks = 0.0 if knobs.data == ("tinyworld",) else TASKS
        cores = knobs.cores or (8 if knobs.gpu else os.cpu_count() or 1)
        read = chosen.tokens if web else sum(fresh for _, fresh in self.text)
        spelled, shards = read * bytes_per_token(knobs.vocab), 0
        if web:
            wanted = math.ceil(1.03 * spelled / SHARD_TEXT)
            shards = min(wanted, *(SHARD_SETS[name].last for name in web))
        downloaded = SHARD_FILE * (shards + len(web))
        n = counts(chosen.config)
        checkpoint = 8 * n["transformer"] + 12 * (n["total"] - n["transformer"])
        rated = self.machine.watts
        watts = knobs.watts or (self.machine.gpus * rated + REST if rated else 0.0)
        return {
            "shards": shards,
            "web": web[0] if web else "",
            "cores": cores,
            "download_bytes": downloaded + tasks,
            "checkpoint_bytes": checkpoint,
            "tokenizer_seconds": min(2e9, spelled) / (MERGING * cores) + 10,
            "tokenising_seconds": spelled / (TOKENISING * cores) + 5,
            "disk_bytes": {
                "shards": downloaded,
                "tasks": tasks,
                "tokens": read * (2 if knobs.vocab <= 1 << 16 else 4),
                # Two of each of three stages, and one that is being written.
                "checkpoints": 7 * checkpoint,
            },
            "watts": watts,
            "kwh": watts * budget_seconds(knobs) / 3.6e6,
            "passes": max(share * chosen.tokens / fresh for share, fresh in self.text),
        }


def planned(knobs: Any, whole: bool = False) -> Plan:
    """
    What follows from the knobs by rule (machine, text, vocabulary, budget); `whole`: with the probe
    and the pilot of a run from the start.
    """
    if not knobs.tokens:
        knobs.pretraining_seconds()  # a missing budget is refused before anything is measured
    elif budget_seconds(knobs):
        raise UserError("--tokens and a budget of time set two lengths: give only one of them")
    elif not knobs.depth:
        raise UserError(f"--tokens={knobs.tokens:g} needs a model: add --depth")
    target = planned_machine(knobs)
    knobs = replace(knobs, data=knobs.data or (text_for(budget_seconds(knobs) or 86_400.0),))
    size = bytes_per_token(1) * sum(tokens for _, tokens in fresh_text(knobs.data, 1))
    knobs = replace(knobs, vocab=knobs.vocabulary(bool(knobs.gpu), size))
    if knobs.tokens:
        aspect, T = knobs.aspect_ratio or 64.0, knobs.sequence_len or 2048
        knobs = replace(knobs, hours=1.0, aspect_ratio=aspect, sequence_len=T)
        config = knobs.of_size(knobs.depth, aspect, T)
        for _ in range(9):  # the time follows from the tokens, and they a little from the time
            tokens = assess(knobs, config, target, Law()).tokens
            knobs = replace(knobs, hours=knobs.hours * knobs.tokens / tokens)
    elif whole:
        probing = POINT * (12 if target.device_type == "cpu" else 72)
        used = knobs.used or min(budget_seconds(knobs) / 12, probing)
        knobs = replace(knobs, pilot=True, used=used)
    return Plan(knobs, target, fresh_text(knobs.data, knobs.vocab))


def lacking(plan: Plan) -> list[str]:
    """What does not suffice on this machine, with the figures."""
    disk, passes = sum(plan.needs["disk_bytes"].values()), plan.needs["passes"]
    faults, free = [], shutil.disk_usage(base_dir()).free
    if free < disk:
        faults.append(
            f"the run needs {human(disk)}B of disk at its peak, and {base_dir()} has "
            f"{human(free)}B free: free some space or set NANOCHAT_BASE_DIR to another disk"
        )
    if passes > PASSES and any(s.kind == "files" for s in parse_sources(plan.knobs.data)):
        faults.append(
            f"the run would read your text {passes:.0f} times, and more than {PASSES:.0f} "
            "times teach next to nothing: add text to --data, or give less time"
        )
    return faults


def in_words(bpb: float) -> tuple[str, str]:
    """What bits per byte of web text mean, and where that is known from."""
    return next((words, source) for most, words, source in REFERENCES if bpb <= most)


# the page


def schedule(plan: Plan) -> list[tuple[str, float, str]]:
    """What happens one after the other, its seconds and their source; the clock starts late."""
    need, mbit = plan.needs, plan.knobs.mbit
    size, cores = need["download_bytes"], need["cores"]
    rows = [
        (f"download of {human(size)}B", size * 8 / (1e6 * mbit), f"at {mbit:g} Mbit/s"),
        ("train the tokenizer", need["tokenizer_seconds"], "measured on two cores"),
        (f"tokenise on {cores} cores", need["tokenising_seconds"], "measured on two cores"),
    ]
    stages = {"probe": plan.knobs.used, **plan.knobs.stages()}
    rows += [(STAGES[name], seconds, "rule") for name, seconds in stages.items()]
    return [row for row in rows if row[1]]


def model_rows(choice: Choice) -> list[list[str]]:
    """The three models of a choice: heads, and a row for each."""
    heads = "|layers x width|parameters|tokens|tok/s|bits per byte (90 %)|memory|like"
    rows: list[list[str]] = [[*heads.split("|")]]
    three = {"smaller": choice.smaller, "chosen": choice.primary, "larger": choice.larger}
    for name, c in three.items():
        if c:
            words = in_words(c.bpb[0])[0].split(":")[0].removeprefix("like ")
            row = (
                f"{name}|{c.shape[0]} x {c.shape[1]}|{human(counts(c.config)['total'])}|"
                f"{human(c.tokens)}|{c.speed.tok_per_sec:,.0f}|{c.bpb[0]:.3f} ({c.bpb[1]:.3f} to "
                f"{c.bpb[2]:.3f})|{c.memory['total'] / GIB:.1f} GiB|{words}"
            )
            rows.append(row.split("|"))
    return rows


def rows_of(text: str) -> list[Row]:
    """The rows of a section: lines of what, figure and source."""
    rows = (line.split(" | ") for line in text.splitlines())
    return [(what, figure, source) for what, figure, source in rows]


def gains(plan: Plan) -> list[Row]:
    """What the page says of a plan: model, quality, text, speed."""
    c, knobs, passes = plan.choice.primary, plan.knobs, plan.needs["passes"]
    words, known = in_words(c.bpb[0])
    if knobs.data == ("tinyworld",):
        words, known = "the embedded corpus is far simpler: expect 0.2 to 0.4", "measured here"
    often = "each token once" if passes <= 1 else f"each token {passes:.1f} times"
    timed = "measured here" if plan.machine.points else "specification"
    timed = "measured on such a machine" if knobs.probe else timed
    contexts = " -> ".join(str(T) for _, T in c.contexts)
    return rows_of(f"""\
quality | {c.bpb[0]:.2f} bits per byte of unseen text, less is better ({c.bpb[1]:.2f} to \
{c.bpb[2]:.2f} in nine cases of ten) | law
in words | {words} | {known}
text | {", ".join(knobs.data)}: {human(c.tokens)} tokens, {often} | rule
speed | {c.speed.tok_per_sec:,.0f} tokens per second ({c.speed.lo:,.0f} to {c.speed.hi:,.0f}) | \
{timed}
a step | {human(c.total_batch_size)} tokens, context {contexts}, {c.device_batch_size} rows at a \
time | rule""")


def costs(plan: Plan) -> list[Row]:
    """Disk, memory and electricity."""
    need, knobs, parts = plan.needs, plan.knobs, plan.choice.primary.memory
    state = sum(parts[name] for name in STATE)
    work, beside = parts["allocated"] - state, parts["total"] - parts["allocated"]
    disk = need["disk_bytes"]
    by_part = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in disk.items() if size)
    power, rated = "give --watts to see it", "rule"
    if need["watts"]:
        power = f"{need['kwh']:.1f} kWh, {need['kwh'] * knobs.price:.2f} at {knobs.price:g} per kWh"
        rated = "your figure" if knobs.watts else "specification"
    return rows_of(f"""\
disk at its peak | {sum(disk.values()) / 1e9:.1f} GB: {by_part} | counted
memory | {parts["total"] / GIB:.1f} of {plan.machine.memory_bytes / GIB:.1f} GiB: weights and \
their state {state / GIB:.1f}, activations and loss {work / GIB:.1f}, rest {beside / GIB:.1f} | \
counted
electricity | {power} ({need["watts"]:.0f} W) | {rated}""")


def changes(plan: Plan) -> list[Row]:
    """What would change the choice: more time, more memory, more text."""
    knobs, target, chosen = plan.knobs, plan.machine, plan.choice.primary
    double = replace(knobs, hours=2 * knobs.hours, minutes=2 * knobs.minutes)
    asked = {
        "time": replace(plan, knobs=double),
        "memory": replace(plan, machine=replace(target, memory_bytes=2 * target.memory_bytes)),
        "text": replace(plan, text=[(share, 2 * fresh) for share, fresh in plan.text]),
    }
    rows = []
    for name, changed in asked.items():
        other = changed.choice.primary
        same = "the same model" if other.shape == chosen.shape else "{} x {}".format(*other.shape)
        gain = other.bpb[0] - chosen.bpb[0]
        figure = f"{same}, {other.bpb[0]:.3f} bits per byte ({gain:+.3f})"
        rows.append((f"twice the {name}", figure, "law"))
    return rows


def commands(plan: Plan, script: str) -> list[str]:
    """The commands that do it."""
    knobs, need, c = plan.knobs, plan.needs, plan.choice.primary
    if knobs.tokens and script:
        return [f"bash {script}"]
    length = f"--hours {knobs.hours:g}" if knobs.hours else f"--minutes {knobs.minutes:g}"
    data, recipe = shlex.join(["--data", *knobs.data]), machine.folder() / "recipe.toml"
    download = f"nanochat dataset -n {need['shards']} --set {need['web']}\n" if need["web"] else ""
    tokenizer = f"{download}nanochat tok_train --vocab_size {knobs.vocab} {data}\n"
    if knobs.tokens:
        steps = f"--total_batch_size {c.total_batch_size} --num_iterations {c.steps}"
        size = f"--depth {c.shape[0]} --model_dim {c.shape[1]} --head_dim {c.config.head_dim}"
        return f"{tokenizer}nanochat base_train {size} {steps} {data}".splitlines()
    return f"""\
bash {script or "runs/one_day.sh"} {length} {data}    (all of it), or:
{tokenizer}nanochat plan recipe {length} --pilot --vocab {knobs.vocab} {data}
nanochat base_train --recipe {shlex.quote(str(recipe))}    (then mid_train and chat_sft in the \
same way)
nanochat chat_cli""".splitlines()


def page(plan: Plan, script: str = "") -> dict[str, Any]:
    """The page: title, models, sections and commands as text, and the figures behind them."""
    target = plan.machine
    many = f"{target.gpus} x " if target.gpus > 1 else ""
    return {
        "title": f"{duration(budget_seconds(plan.knobs))} on {many}{target.name}",
        "models": model_rows(plan.choice),
        "sections": {
            "What you get": gains(plan),
            "What it takes": costs(plan),
            "What would change the choice": changes(plan),
        },
        "commands": commands(plan, script),
        "lacking": [] if plan.knobs.gpu else lacking(plan),
        "schedule": schedule(plan),
        "needs": plan.needs,
        "chosen": asdict(plan.choice.primary),
    }


def with_clock(made: dict[str, Any]) -> dict[str, list[Row]]:
    """The sections of a page, with the schedule of a run that begins now."""
    rows, clock = [], datetime.now()
    for name, seconds, source in made["schedule"]:
        begins, clock = clock, clock + timedelta(seconds=seconds)
        span = f"{begins:%a %H:%M} to {clock:%a %H:%M}"
        rows.append((name, f"{duration(seconds):>7}, {span}", source))
    first, *others = made["sections"].items()
    return dict([first, ("When", rows), *others])


def show(made: dict[str, Any]) -> None:
    """Print a page."""
    print0(made["title"])
    every = with_clock(made)
    wide = max(len(what) for rows in every.values() for what, _, _ in rows)
    for head, rows in every.items():
        lines = (f"  {what:<{wide}}  {figure}  [{source}]" for what, figure, source in rows)
        print0("\n".join(["", head, *lines]))
        if head == "What you get":
            print0(columns(made["models"][0], made["models"][1:]))
    print0("\n  ".join([f"\n{SOURCES}\n\nCommands", *made["commands"]]))
    for fault in made["lacking"]:
        print0(f"\nIt does not suffice: {fault}")


def write_html(made: dict[str, Any], file: str) -> None:
    """Write a page to a file."""
    from html import escape

    from nanochat.study.page import table, write_page

    blocks = {"It does not suffice": "".join(f"<p>{escape(f)}</p>" for f in made["lacking"])}
    for head, rows in with_clock(made).items():
        lines = (
            f"<dt>{escape(what)}</dt><dd>{escape(figure)}<small>{escape(source)}</small></dd>"
            for what, figure, source in rows
        )
        blocks[head] = f"<dl>{''.join(lines)}</dl>"
    heads, *rows = made["models"]
    blocks["What you get"] += table(heads, [(name, cells) for name, *cells in rows])
    lines = escape("\n".join(made["commands"]))
    blocks["Commands"] = f'<pre class="wide">{lines}</pre><p><small>{escape(SOURCES)}</small></p>'
    write_page(made["title"], blocks, file)


def run(knobs: DayKnobs) -> dict[str, Any]:
    """Print the page and return it. UserError if nothing can be trained, or with --shell."""
    plan = planned(knobs, whole=True)
    made = page(plan, knobs.script)
    with redirect_stdout(sys.stderr) if knobs.shell else nullcontext():
        show(made)
    if knobs.html:
        write_html(made, knobs.html)
        print0(f"\nwrote {knobs.html}", file=sys.stderr)
    if knobs.shell:
        if faults := lacking(plan):
            raise UserError("; ".join(faults))
        need, text = plan.needs, shlex.quote(plan.knobs.data[0])
        print0(f"shards={need['shards']}\nvocab={plan.knobs.vocab}\nweb={need['web']}\ntext={text}")
    return made
