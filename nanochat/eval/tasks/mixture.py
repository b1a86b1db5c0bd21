"""
Conversations to train on: named on the command line, rendered once with their supervision masks,
and mixed by weight.

    NAME[@N][:WEIGHT]                smoltalk, mmlu, gsm8k, arc-easy, arc-challenge: data sets
                                     tinyworld, everyday, spellingbee, identity: N are generated
    NAME=PATH[@N][:WEIGHT]           your own (see data/shapes.py and data/dialogue.py)

For a data set or a file, @N draws N conversations at random, and repeats them if there are fewer.
About one conversation in fifty, chosen by a hash of its content, is for validation and never
trained on. The test splits that the authors published are used by the evaluations only.
"""

import heapq
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError
from nanochat.base.strangers import shown
from nanochat.data import conversations as own
from nanochat.data import dialogue, shapes
from nanochat.data.folders import CONVERSATIONS, find
from nanochat.data.inventory import installed
from nanochat.data.rows import Report
from nanochat.data.shards import Shards, prepare_conversations
from nanochat.data.sources import (
    Source,
    check_mixture,
    check_weight,
    only_tinyworld,
    parse_sources,
)
from nanochat.data.split import cutoff, is_too_much, place
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.tasks import arc, gsm8k, identity, mmlu, smoltalk, spellingbee
from nanochat.eval.tasks.common import Item
from nanochat.eval.tasks.data import DataSet, digest, read_items
from nanochat.tinyworld import conversations as tinyworld
from nanochat.tinyworld import generator_files

DATA_SETS: dict[str, DataSet] = {
    "smoltalk": smoltalk.DATA,
    "mmlu": mmlu.DATA,
    "gsm8k": gsm8k.DATA,
    **{name.lower(): data for name, data in arc.DATA.items()},
}
GENERATORS = {  # (seed, split, the model's name) -> an endless stream of conversations
    "tinyworld": lambda seed, split, name: tinyworld.conversations(seed, split),
    "everyday": lambda seed, split, name: tinyworld.conversations(seed, split, tinyworld.EVERYDAY),
    "spellingbee": lambda seed, split, name: spellingbee.conversations(seed, split),
    "identity": identity.conversations,
}
COUNTS = {  # how many are generated: (for training by default, for validation)
    "tinyworld": (40_000, 2_000),
    "everyday": (20_000, 1_000),
    "spellingbee": (20_000, 1_000),
    "identity": (1_000, 50),
}
NAMES = ", ".join([*DATA_SETS, *GENERATORS])
VALIDATION_SHARE, VALIDATION_LIMIT = 0.02, 2_000
# Midtraining shows many conversations, question formats, the calculator and the name; finetuning a
# smaller, cleaner selection. The second choice is for models pretrained on tinyworld alone.
DEFAULTS = {
    "mid": (("smoltalk", "mmlu", "gsm8k", "spellingbee", "identity"), ("tinyworld",)),
    "sft": (
        ("arc-easy", "arc-challenge", "gsm8k", "smoltalk@10000", "spellingbee@600", "identity"),
        ("tinyworld@8000",),
    ),
}


@dataclass(frozen=True)
class ConversationSource(Source):
    """One source of conversations; `kind` is a name of DATA_SETS or GENERATORS, or "files"."""

    count: int | None = None  # None: all, each once; the default of COUNTS for a generator


def default(stage: str, texts: Sequence[str]) -> tuple[str, ...]:
    """What a stage ("mid", "sft") trains on by default, after pretraining on `texts`."""
    return DEFAULTS[stage][only_tinyworld(texts)]


def parse(specs: Sequence[str]) -> list[ConversationSource]:
    """
    The sources that `specs` (see the top of this file) name. Raises UserError if one cannot be read
    as conversations, if two share a name, or if only some have a weight.
    """
    if not specs:
        raise UserError(f"--data names no conversations: give it a .jsonl file or some of {NAMES}")
    sources = [_parse(spec) for spec in specs]
    check_mixture(sources)
    return sources


def _parse(spec: str) -> ConversationSource:
    m = re.fullmatch(r"(?:([\w.-]+)=)?([\w-]+)(?:@([^:]*))?(?::(\d+\.?\d*|\.\d+))?", spec)
    if m and (kind := m[2].lower()) in {*DATA_SETS, *GENERATORS}:
        weight = float(m[4]) if m[4] else None
        check_weight(spec, weight)
        return ConversationSource(m[1] or kind, weight=weight, kind=kind, count=_count(spec, m[3]))
    m = re.fullmatch(r"(.+)@(\w*)((?::[^/]*)?)", spec)
    try:
        (source,) = parse_sources([m[1] + m[3] if m else spec])
    except UserError as e:
        raise UserError(
            f"{e}; conversations are files ({', '.join(CONVERSATIONS)}), or {NAMES}"
        ) from e
    if source.kind != "files":
        raise UserError(
            f"{source.name} holds text, not conversations: name a file of conversations, or {NAMES}"
        )
    count = _count(spec, m[2] if m else None)
    return ConversationSource(source.name, source.paths, source.weight, count=count)


def _count(spec: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise UserError(
            f"{shown(spec)} has @{shown(text)}, which is not a number of conversations above 0 and "
            "below a billion: write for example tinyworld@40000"
        )
    return int(text)


def shards(
    specs: Sequence[str],
    split: str,
    tokenizer: Tokenizer,
    seed: int = 0,
    folder: Path | None = None,
    name: str = "nanochat",
    skip_bad_rows: int = 0,
    me: str | None = None,
) -> list[tuple[Shards, float | None]]:
    """
    The split ("train", "val") of each named source, with its weight. `seed` decides what is
    generated and what @N draws, `folder` holds data sets (see data.py), and `name` is what the
    model calls itself. `skip_bad_rows` rows of a source of your own may be left out, and `me` is
    the person of a chat who becomes the assistant. What an earlier call rendered is reused.
    UserError if a source has no conversations, or more bad rows.
    """
    # Conversations that another version of the code made must not be reused
    readers = [Path(str(module.__file__)) for module in (shapes, dialogue, own)]
    version = digest([*generator_files(), *sorted(Path(__file__).parent.glob("*.py")), *readers])
    out = []
    for source in parse(specs):
        report, skipped = Report(), Counter()
        if source.kind in GENERATORS:
            default_count, val_count = COUNTS[source.kind]
            count = val_count if split == "val" else source.count or default_count
            key = f"{seed} {count} {name if source.kind == 'identity' else ''}"
            stream = GENERATORS[source.kind](seed, split, name)
            conversations = itertools.islice(stream, count)
        else:
            if source.kind in DATA_SETS:
                data, reader = DATA_SETS[source.kind], ""
                paths = data.files("train", folder)
                items = partial(read_items, data.item, paths, report)
            else:
                report = Report(skip_bad_rows)
                files = find(source.paths, source.name, CONVERSATIONS)
                paths, skipped = files.files, files.reasons()
                rows = partial(own.read, me=me, alone=len(paths) == 1)
                items = partial(read_items, shapes.conversation, paths, report, rows)
                reader = f"{me or ''}{installed()}"  # packages that read documents in archives
            drawn = f"{seed} {source.count}" if split == "train" and source.count else ""
            key = f"{digest(paths)} {drawn}{reader}"
            conversations = _selected(partial(_read, items, report), split, source.count, seed)
        shards = prepare_conversations(
            f"{source.name}-conversations-{split}",
            conversations,
            tokenizer,
            identity=f"{source.kind} {version} {split} {key}",
            divided=source.kind == "files" and not source.count,
            report=report,
        )
        shards.notes += skipped
        out.append((shards, source.weight))
    return out


def of_stage(
    stage: str, specs: Sequence[str], tokenizer: Tokenizer, **options: Any
) -> dict[str, list[tuple[Shards, float | None]]]:
    """Both splits as "mid" or "sft" reads them; `options` are those of shards()."""
    seed = int(stage == "sft")
    return {
        "train": shards(specs, "train", tokenizer, seed, **options),
        "val": shards(specs, "val", tokenizer, **options),
    }


def _read(items: Callable[[], Iterator[Item]], report: Report) -> Iterator[Item]:
    """
    All conversations of a source; `report` lists what cannot be read. Raises UserError if there
    are none because files were skipped.
    """
    report.clear()  # of an earlier pass over the source
    is_empty = True
    for item in items():
        is_empty = False
        yield item
    report.finish()
    if is_empty and report.skipped:
        reason, file = min(report.skipped, key=lambda skip: own.NO_CONVERSATIONS in skip[0])
        raise UserError(
            f"there are no conversations in {len(report.skipped):,} files; {file}: {reason}"
        )
    report.notes.update(f"files skipped: {reason}" for reason, _ in report.skipped)


def _selected(
    read: Callable[[], Iterator[Item]], split: str, count: int | None, seed: int
) -> Iterator[Item]:
    """The conversations of a split: at most VALIDATION_LIMIT of "val", `count` of "train"."""
    part = split_of(read, split)
    if split == "val":
        yield from itertools.islice(part, VALIDATION_LIMIT)
    elif count is None:
        yield from part
    else:
        rng = random.Random(seed)
        sample = heapq.nsmallest(count, part, key=lambda _: rng.random())
        yield from itertools.islice(itertools.cycle(sample), count)


def split_of(read: Callable[[], Iterator[Item]], split: str) -> Iterator[Item]:
    """
    The conversations of a split, which a hash of their content decides (see data/split.py):
    VALIDATION_SHARE of them are "val", or more in a small source. Equal conversations are in the
    same split. If "val" would have too many characters, long conversations are for training only.
    Raises UserError if there are fewer than two different ones.
    """
    sizes: dict[float, int] = {}

    def places() -> Iterator[float]:
        for item in read():
            position = _place(item)
            sizes[position] = _characters(item)
            yield position

    share, longest = cutoff(places(), VALIDATION_SHARE), math.inf
    if share is None:
        raise UserError(
            "there are fewer than two different conversations, so none is left for validation: "
            "add more conversations"
        )
    if is_too_much(sizes, share):
        limit = sum(sizes.values()) / 20
        of_short = cutoff((p for p, size in sizes.items() if size <= limit), VALIDATION_SHARE)
        if of_short is not None:
            share, longest = of_short, limit
    for item in read():
        in_val = _place(item) <= share and _characters(item) <= longest
        if in_val == (split == "val"):
            yield item


def _characters(conversation: Item) -> int:
    return sum(len(str(message["content"])) for message in conversation["messages"])


def _place(conversation: Item) -> float:
    """A number from 0 to 1 that depends only on what the conversation says."""
    return place(json.dumps(conversation["messages"], sort_keys=True))
