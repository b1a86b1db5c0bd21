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
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from nanochat.base.common import UserError, base_dir, columns, counted, duration, human, print0
from nanochat.base.hardware import usable_cpus
from nanochat.base.knobs import as_typed, knob, stored_values
from nanochat.data.sources import SHARD_SETS, files, parse_sources
from nanochat.model.config import ArchitectureKnobs
from nanochat.plan import machine, probe, speed
from nanochat.plan.choice import TIE, Candidate, ChoiceKnobs, Plan, candidates
from nanochat.plan.machine import GIB, CardKnobs, Machine
from nanochat.plan.shapes import SizeKnobs, architecture, counts
from nanochat.train.scaling import batch_for, text_for

SHARD_TEXT, SHARD_FILE = 250e6, 100e6  # bytes of text in a shard of web text, and of its file
TASKS = 1e9  # bytes of the data sets of the later stages, about
MOST_GENERATED = 400  # MB of the embedded corpus, which take a minute
TOKENISING = 3.2e6  # bytes per second and core (bench/data.py, two cores of an EPYC Zen 4)
MERGING = 6e6  # the same of training a tokenizer, on at most 2 GB
POINT = 25.0  # seconds that plan probe takes for each measurement, of at most a twelfth of the time
REST = 100.0  # watts of a computer beside its GPU
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
Row = Sequence[str]  # what, figure, source
SOURCES = (
    "[law] a scaling law fitted to many runs   [counted] from the model's shape   [rule] decided "
    "in this project   [specification] computed from the vendor's data, not measured   [judged] by "
    "the authors, not measured   [nanochat, llm.c] scores that these projects published"
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
class PlanKnobs(CardKnobs, ChoiceKnobs):
    """Length and costs"""

    tokens: float = knob(
        0.0, "tokens of pretraining, in place of a budget of time; also give --depth", low=0
    )
    cores: int = knob(0, "cores that tokenise; 0 = those of this machine, 8 beside a --gpu", low=0)
    mbit: float = knob(100.0, "speed of the network in Mbit per second", low=0.1)
    watts: float = knob(
        0.0, "power of the machine; 0 = 100 W and the card's rated power, if it has one", low=0
    )
    price: float = knob(0.3, "price of a kWh", low=0)
    conversations: tuple[str, ...] = knob(
        (), "conversations of the later stages, as for mid_train (default: those for the text)"
    )
    task_dir: str = knob("", "folder with the data sets, as for mid_train, so that none is fetched")


@dataclass(kw_only=True)
class DayKnobs(PlanKnobs):
    """Page"""

    script: str = knob("", "script that the page names as the command (default: one_day.sh)")
    html: str = knob("", "also write the page to this file")
    shell: bool = knob(
        False,
        "for scripts: print shell variables (downloads, vocabulary, rows) to standard output and "
        "the page to standard error; fail if the machine is not enough",
    )


# the machine and the text


def planned_machine(knobs: PlanKnobs) -> Machine:
    """The machine that the knobs name; this one is probed now unless it was before."""
    elsewhere = bool(knobs.gpu or knobs.probe)
    target = machine.named(replace(knobs, dtype="auto") if elsewhere else knobs)
    if elsewhere and knobs.dtype not in ("auto", target.dtype):
        raise UserError(
            f"the speed of {target.name} is known in {target.dtype}, not in {knobs.dtype}: leave "
            "--dtype out"
        )
    if elsewhere or target.points:
        return target
    print0("this machine has no probe yet: measuring a few points", file=sys.stderr)
    given = stored_values(probe.ProbeKnobs, vars(knobs), "plan probe")
    probe.run(probe.ProbeKnobs(**{**given, "out": "", "device_batches": (8,)}))
    return machine.named(knobs)


def text_sizes(data: Sequence[str]) -> list[tuple[float, float]]:
    """
    (share of the tokens, bytes that it holds) of each source; a data set on the hub counts with all
    its shards, because they can be downloaded. UserError for a source without text.
    """
    from nanochat.data.documents import text_bytes

    sizes = []
    for source in parse_sources(data):
        size = 1e6 * source.megabytes
        if source.kind == "shards":
            size = SHARD_TEXT * SHARD_SETS[source.paths[0].name].last
        elif source.kind == "files":
            size = sum(map(text_bytes, files(source)))
            if not size:
                raise UserError(f"the data source {source.name} holds no text: name another")
        sizes.append((source.weight or size, size))
    whole = sum(weight for weight, _ in sizes)
    return [(weight / whole, size) for weight, size in sizes]


def needs(plan: Plan) -> dict[str, Any]:
    """Bytes, seconds and kWh that the chosen run takes, and how often it reads its text."""
    from nanochat.eval.tasks import mixture

    knobs, chosen, spelled = plan.knobs, plan.primary, plan.spelled
    web: dict[str, int] = {}  # shards of each data set of the hub
    read = 0.0
    for source, (share, fresh) in zip(parse_sources(knobs.data), plan.text, strict=True):
        if source.kind == "shards":
            name, fresh = source.paths[0].name, min(fresh, share * chosen.tokens)
            web[name] = min(math.ceil(1.03 * fresh * spelled / SHARD_TEXT), SHARD_SETS[name].last)
        read += fresh
    shards = sum(web.values())
    downloaded = SHARD_FILE * (shards + len(web))
    conversations = mixture.parse(knobs.conversations or mixture.default("mid", knobs.data))
    public = any(source.kind in mixture.DATA_SETS for source in conversations)
    tasks = TASKS * (public and not knobs.task_dir)
    cores = knobs.cores or (8 if knobs.gpu else usable_cpus())
    watts = knobs.watts or plan.machine.gpus * plan.machine.watts + REST
    n = counts(chosen.config)
    return {
        "shards": shards,
        "web": web,
        "cores": cores,
        "download_bytes": downloaded + tasks,
        "tokenizer_seconds": min(2e9, read * spelled) / (MERGING * cores) + 10,
        "tokenising_seconds": read * spelled / (TOKENISING * cores) + 5,
        "disk_bytes": {
            "text": downloaded,
            "questions": tasks,
            "tokens": read * (2 if knobs.vocab <= 1 << 16 else 4),
            # Two of each of three stages, and one that is being written.
            "checkpoints": 7 * (12 * n["total"] - 4 * n["transformer"]),
        },
        "watts": watts,
        "kwh": watts * knobs.budget / 3.6e6,
        "passes": max(share * chosen.tokens / fresh for share, fresh in plan.text),
    }


def check_names(knobs: PlanKnobs) -> None:
    """UserError for a name of a file that a recipe, which is UTF-8, cannot hold."""
    for name in (*knobs.data, *knobs.conversations, knobs.task_dir):
        if re.search(r"[\ud800-\udfff]", name):
            raise UserError(
                f"a recipe cannot hold the name {name!r}, which is not UTF-8: rename the file or "
                "folder"
            )


def planned(knobs: Any, whole: bool = False) -> Plan:
    """
    What follows from the knobs by rule (machine, text, vocabulary, budget); `whole`: with the probe
    and the pilot of a run from the start.
    """
    check_names(knobs)
    if not knobs.tokens:
        _ = knobs.stages  # a missing budget is refused before anything is measured
    elif knobs.budget:
        raise UserError("--tokens and a budget of time set two lengths: give only one of them")
    elif not knobs.depth:
        raise UserError(f"--tokens={knobs.tokens:g} needs a model: add --depth")
    target = planned_machine(knobs)
    given = knobs.data
    knobs = replace(knobs, data=given or (text_for(knobs.budget or 86_400.0),))
    sizes = text_sizes(knobs.data)
    flops = math.inf if knobs.tokens else speed.usual_flops(target, knobs.pretraining_seconds)
    # A run from the start makes its own tokenizer, whatever is there
    elsewhere = whole or bool(knobs.gpu)
    vocabulary = knobs.vocabulary(flops, sum(size for _, size in sizes), elsewhere)
    knobs = replace(knobs, vocab=vocabulary)
    if knobs.tokens:
        knobs = with_hours(knobs, target)
    elif whole:
        probing = POINT * (12 if target.device_type == "cpu" else 72)
        knobs = replace(knobs, pilot=True, used=knobs.used or min(knobs.budget / 12, probing))
    fresh = Plan(knobs, target)
    if not given and fresh.simple:
        fresh = Plan(replace(knobs, data=(generated_text(fresh),)), target)
        sizes = text_sizes(fresh.knobs.data)
    return replace(fresh, text=[(share, size / fresh.spelled) for share, size in sizes])


def with_hours(knobs: Any, target: Machine) -> Any:
    """The knobs with the hours that their tokens take, and with what else tokens set."""
    if knobs.lookback == "auto":  # base_train adds its parts by the budget, and here is none
        knobs = replace(knobs, lookback="off")
    T = knobs.sequence_len or 2048
    knobs = replace(
        knobs,
        hours=1.0,
        aspect_ratio=knobs.aspect_ratio or 64.0,
        sequence_len=T,
        total_batch_size=knobs.total_batch_size or max(T, batch_for(knobs.tokens) // T * T),
    )
    for _ in range(9):  # the time follows from the tokens, and they a little from the time
        (only,) = candidates(Plan(knobs, target))
        knobs = replace(knobs, hours=knobs.hours * knobs.tokens / only.tokens)
    return knobs


def generated_text(fresh: Plan) -> str:
    """
    As much of the embedded corpus as a plan without repeated text reads, in tens of megabytes. A
    run that read 20 MB six times knew them by heart: 0.183 bits per byte of them, and 0.208 of
    text that it had not seen (dev/LOG.md).
    """
    size = fresh.primary.tokens * fresh.spelled
    return f"tinyworld@{min(MOST_GENERATED, max(20, 10 * math.ceil(size / 1e7)))}"


def lacking(plan: Plan) -> list[str]:
    """What does not suffice on this machine, with the figures."""
    disk, knobs = sum(needs(plan)["disk_bytes"].values()), plan.knobs
    faults, free = [], shutil.disk_usage(base_dir()).free
    if free < disk:
        faults.append(
            f"the run needs {human(disk)}B of disk at its peak, and {base_dir()} has "
            f"{human(free)}B free: free some space or set NANOCHAT_BASE_DIR to another disk"
        )
    if knobs.gpu:
        import torch

        if (cards := torch.cuda.device_count()) < knobs.gpus:
            faults.append(
                f"the run is for {counted(knobs.gpus, 'GPUs')}, and this machine has {cards}: set "
                "GPUS to their number, or see with --dry_run --gpu NAME what another card does"
            )
    return faults


def in_words(plan: Plan, candidate: Candidate) -> tuple[str, str]:
    """What the bits per byte of a candidate mean, and where that is known from."""
    if plan.simple:
        return "simple sentences: do not compare this figure with those of web text", "judged"
    return next((words, source) for most, words, source in REFERENCES if candidate.bpb[0] <= most)


# the page


def schedule(plan: Plan, begun: bool) -> list[tuple[str, float, str]]:
    """
    What happens one after the other, its seconds and their source; the clock starts late. `begun`:
    the run is under way, and has its data.
    """
    need, mbit = needs(plan), plan.knobs.mbit
    size = need["download_bytes"]
    rows = [
        (f"download of {human(size)}B", size * 8 / (1e6 * mbit), f"at {mbit:g} Mbit/s"),
        ("train the tokenizer", need["tokenizer_seconds"], "measured on two cores"),
        (f"tokenise on {need['cores']} cores", need["tokenising_seconds"], "measured on two cores"),
        (STAGES["probe"], plan.knobs.used, "rule"),
    ]
    stages = {**plan.knobs.stages, "base_train": plan.primary.seconds}
    later = [(STAGES[name], seconds, "rule") for name, seconds in stages.items()]
    return [row for row in (later if begun else rows + later) if row[1]]


def model_rows(plan: Plan) -> list[list[str]]:
    """The three models of a plan: heads, and a row for each."""
    choice = plan.choice
    rows = ["|bits per byte (90 %)|layers x width|parameters|tokens|tok/s|memory|like"]
    three = {"smaller": choice.smaller, "chosen": choice.primary, "larger": choice.larger}
    for name, c in three.items():
        if c:
            words = in_words(plan, c)[0].split(":")[0].removeprefix("like ")
            rows.append(
                f"{name}|{c.bpb[0]:.3f} ({c.bpb[1]:.3f} to {c.bpb[2]:.3f})|{c.shape[0]} x "
                f"{c.shape[1]}|{human(counts(c.config)['total'])}|{human(c.tokens)}|"
                f"{c.speed.tok_per_sec:,.0f}|{c.memory['total'] / GIB:.1f} GiB|{words}"
            )
    return [row.split("|") for row in rows]


def rows_of(text: str) -> list[Row]:
    """The rows of a section: lines of what, figure and source. A figure may hold the separator."""
    return re.findall(r"(.*?) \| (.*) \| (.*)", text)


def gains(plan: Plan) -> list[Row]:
    """What the page says of a plan: model, quality, text, speed."""
    c, knobs, passes = plan.primary, plan.knobs, needs(plan)["passes"]
    words, known = in_words(plan, c)
    often = "each token once" if passes <= 1 else f"each token {passes:.1f} times"
    if c.seconds < knobs.pretraining_seconds:
        often += (
            "; more would only be learned by heart, so this takes less than its time (nanochat "
            "mine suits small collections)"
        )
    timed = "measured here" if plan.machine.points else "specification"
    timed = "measured on such a machine" if knobs.probe else timed
    contexts = ", then ".join(f"{T:,}" for _, T in c.contexts)
    size, fresh = counts(c.config)["total"], sum(fresh for _, fresh in plan.text)
    names = " ".join(", ".join(knobs.data).split())  # in one line
    parts = "; it has parts that look back, which llama.cpp cannot run (--lookback)"
    rule = f"predictions within {TIE:.0%} count as equal, and the usual shape, then the smallest, "
    rule = "the best prediction " if plan.law(c.config).deep else rule
    return rows_of(f"""\
model | {human(size)} parameters in {counted(c.shape[0], "layers")} of width {c.shape[1]}; \
{rule}is taken\
{parts if c.config.convolutions else ""} | rule
quality | {c.bpb[0]:.3g} bits per byte (about a letter) of text that it has not seen; less is \
better ({c.bpb[1]:.3g} to {c.bpb[2]:.3g} in nine cases of ten) | law
in words | {words} | {known}
compare | on web text, GPT-2 XL (1.6 B parameters) has about 0.75 and GPT-2 124M about 1.03 | \
nanochat, llm.c
text | {human(c.tokens)} tokens (pieces of words) of {names}, which has \
{human(fresh)}: {often} | rule
speed | {c.speed.tok_per_sec:,.0f} tokens per second ({c.speed.lo:,.0f} to {c.speed.hi:,.0f}), in \
steps of {human(c.total_batch_size)}; {c.device_batch_size} rows of {contexts} at a time | \
{timed}""")


def costs(plan: Plan) -> list[Row]:
    """Disk, memory and electricity."""
    need, knobs, parts = needs(plan), plan.knobs, plan.primary.memory
    state, beside, total = (parts[name] / GIB for name in ("state", "beside", "total"))
    disk = need["disk_bytes"]
    by_part = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in disk.items() if size)
    rated = "specification" if plan.machine.watts else "judged"
    return rows_of(f"""\
disk at its peak | {sum(disk.values()) / 1e9:.1f} GB: {by_part} | counted
memory | {total:.1f} of {plan.machine.memory_bytes / GIB:.1f} GiB: weights and what belongs to \
them {state:.1f}, working values {total - state - beside:.1f}, torch itself {beside:.1f} | \
counted
electricity | {need["kwh"]:,.2f} kWh at {need["watts"]:.0f} W: {need["kwh"] * knobs.price:.2f} at \
{knobs.price:g} per kWh (--price) | {"your figure" if knobs.watts else rated}""")


def changes(plan: Plan) -> list[Row]:
    """What would change the choice: more time, memory or text, and a model for llama.cpp."""
    knobs, target, chosen = plan.knobs, plan.machine, plan.primary
    longer = replace(knobs, hours=2 * knobs.hours, minutes=2 * knobs.minutes)
    more = {
        "time": replace(plan, knobs=longer),
        "memory": replace(plan, machine=replace(target, memory_bytes=2 * target.memory_bytes)),
        "text": replace(plan, text=[(share, 2 * fresh) for share, fresh in plan.text]),
    }
    rows = []
    for name, changed in more.items():
        other = changed.primary
        same = "the same model" if other.shape == chosen.shape else "{} x {}".format(*other.shape)
        gain = other.bpb[0] - chosen.bpb[0]
        bpb = f"{other.bpb[0]:.3f} bits per byte ({gain:+.3f})" if gain < -0.0005 else "no better"
        rows.append([f"twice the {name}", f"{same}, {bpb}", "law"])
    if chosen.config.convolutions and not plan.simple:
        plain = replace(plan, knobs=replace(knobs, lookback="off")).primary
        bpb = "{:.3f} bits per byte ({:.3f} to {:.3f})".format(*plain.bpb)
        can = "{} x {}, which llama.cpp can run".format(*plain.shape)
        rows.append(["--lookback=off", f"{can}, {bpb}", "law"])
    return rows


def commands(plan: Plan, script: str) -> list[str]:
    """The commands that do it."""
    knobs = plan.knobs
    if knobs.tokens and script:
        return [f"bash {script}"]
    sources = ["--data", *knobs.data]
    data = shlex.join(sources)
    lines = [f"nanochat dataset -n {n} --set {name}" for name, n in needs(plan)["web"].items()]
    lines.append(f"nanochat tok_train --vocab_size {knobs.vocab} {data}")
    if knobs.tokens:
        return [*lines, f"nanochat base_train {exact_flags(plan)} {data}"]
    sources += ["--conversations", *knobs.conversations] if knobs.conversations else []
    sources += ["--task_dir", knobs.task_dir] if knobs.task_dir else []
    names = [*vars(SizeKnobs()), "lookback", "pretrain", "device_type"]
    names += ["total_batch_size", "device_batch_size"]
    changed = [n for n in names if n != "vocab" and getattr(knobs, n) != getattr(DayKnobs, n)]
    given = "".join(f" --{name}={as_typed(getattr(knobs, name))}" for name in changed)
    given += f" --vocab {knobs.vocab} {shlex.join(sources)}"
    unit, number = ("hours", knobs.hours) if knobs.hours else ("minutes", knobs.minutes)
    length, minutes = f"--{unit} {number:g}", round(knobs.budget / 60)
    script_takes = {"lookback", "device_type"}  # and would choose the rest itself
    if script_takes.issuperset(changed) and minutes >= 10:
        rounded = f"--{unit} {number:.0f}" if number % 1 == 0 else f"--minutes {minutes}"
        whole = f"bash {script or 'runs/one_day.sh'} {rounded}{given}"
        lines.insert(0, f"{whole}    # all of it, or by steps:")
    pilot = " --pilot" if knobs.stages["pilot"] else ""
    lines.append(f"nanochat plan recipe {length}{pilot}{given}")
    if pilot:
        lines.append("nanochat plan pilot")
    recipe = shlex.quote(str(machine.plan_file("", "recipe.toml")))
    for stage in ("base_train", "mid_train", "chat_sft"):
        lines.append(f"nanochat {stage} --recipe {recipe}")
    return [*lines, "nanochat chat_cli"]


def exact_flags(plan: Plan) -> str:
    """The flags of base_train for the model of a plan and its number of tokens."""
    chosen = plan.primary
    parts = architecture(chosen.config).items()
    flags = {
        **chosen.flags(plan.knobs.kv_ratio),
        "num_iterations": round(plan.knobs.tokens / chosen.total_batch_size),
        **{n: part for n, part in parts if part != getattr(ArchitectureKnobs, n)},
    }
    return " ".join(f"--{name}={as_typed(value)}" for name, value in flags.items())


def page(plan: Plan, script: str = "", begun: bool = False) -> dict[str, Any]:
    """
    The page: title, models, sections and commands as text, and the figures behind them. `begun` as
    for schedule.
    """
    target = plan.machine
    many = f"{target.gpus} x " if target.gpus > 1 else ""
    return {
        "title": f"{duration(plan.knobs.budget)} on {many}{target.name}",
        "models": model_rows(plan),
        "sections": {
            "What you get": gains(plan),
            "What it takes": costs(plan),
            "What would change the choice": changes(plan),
        },
        "commands": commands(plan, script),
        "lacking": [] if plan.knobs.gpu else lacking(plan),
        "schedule": schedule(plan, begun),
        "needs": needs(plan),
        "chosen": asdict(plan.primary),
    }


def with_clock(made: dict[str, Any]) -> dict[str, list[Row]]:
    """The sections of a page, with the schedule of a run that begins now."""
    rows, clock = [], datetime.now()
    for name, seconds, source in made["schedule"]:
        begins, clock = clock, clock + timedelta(seconds=seconds)
        span = f"{begins:%a %H:%M} to {clock:%a %H:%M}"
        rows.append([name, f"{duration(seconds):>7}, {span}", source])
    whole = duration(sum(seconds for _, seconds, _ in made["schedule"]))
    rows.append(["all", f"{whole:>7}, and ready on {clock:%A at %H:%M}", "sum"])
    first, *others = made["sections"].items()
    return dict([first, ("When, if you start now", rows), *others])


def show(made: dict[str, Any]) -> None:
    """Print a page."""
    print0(made["title"])
    every = with_clock(made)
    wide = max(len(what) for rows in every.values() for what, _, _ in rows)
    for head, rows in every.items():
        lines = (f"  {what:<{wide}}  {figure}  [{source}]" for what, figure, source in rows)
        print0("", head, *lines, sep="\n")
        if head == "What you get":
            print0(columns(made["models"][0], made["models"][1:]))
    print0(f"\n{SOURCES}\n\nCommands", *made["commands"], sep="\n  ")
    for fault in made["lacking"]:
        print0(f"\nThis machine is not enough: {fault}")


def write_html(made: dict[str, Any], file: str) -> None:
    """Write a page to a file."""
    from html import escape

    from nanochat.study.page import table, write_page

    blocks = {"This machine is not enough": "".join(f"<p>{escape(f)}</p>" for f in made["lacking"])}
    for head, rows in with_clock(made).items():
        lines = (
            f"<dt>{escape(what)}</dt><dd>{escape(figure)}<small>{escape(source)}</small></dd>"
            for what, figure, source in rows
        )
        blocks[head] = f'<dl class="text">{"".join(lines)}</dl>'
    (*heads, _), *rows = made["models"]
    cells = [(name, [(bpb, words), *others]) for name, bpb, *others, words in rows]
    blocks["What you get"] += table(heads, cells)
    lines = "".join(f"<pre>{escape(line)}</pre>" for line in made["commands"])
    blocks["Commands"] = f"{lines}<p><small>{escape(SOURCES)}</small></p>"
    write_page(made["title"], blocks, file)


def run(knobs: DayKnobs) -> dict[str, Any]:
    """Print the page and return it. UserError if nothing can be trained, or with --shell."""
    with redirect_stdout(sys.stderr) if knobs.shell else nullcontext():  # a probe prints, too
        plan = planned(knobs, whole=True)
        made = page(plan, knobs.script)
        show(made)
    if knobs.html:
        write_html(made, knobs.html)
        print0(f"\nwrote {knobs.html}", file=sys.stderr)
    if knobs.shell:
        if faults := lacking(plan):
            raise UserError("; ".join(faults))
        need, rows = made["needs"], plan.primary.device_batch_size
        web = " ".join(f"{name}:{n}" for name, n in need["web"].items())
        print0(
            f"shards={need['shards']}\nvocab={plan.knobs.vocab}\nrows={rows}\nweb='{web}'\n"
            f"text={shlex.quote(plan.knobs.data[0])}"
        )
    return made
