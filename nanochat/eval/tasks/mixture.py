"""
Conversations to train on: named on the command line, rendered once with their supervision masks, mixed by weight.

    NAME[@N][:weight]                smoltalk, mmlu, gsm8k, arc-easy, arc-challenge: data sets, see tasks/data.py
                                     tinyworld, spellingbee, identity: generated, N of them
    name=FILE.jsonl[@N][:weight]     the user's own, one conversation a line, see tasks/customjson.py

Of what is read, @N takes N conversations drawn at random, and goes through them again (epochs) where there are fewer. About one in fifty,
by a hash of its content, is for validation: training never sees it, and the published test splits are left to the evaluations.
"""

import heapq
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nanochat.base.common import UserError
from nanochat.data.shards import Shards, prepare_conversations
from nanochat.data.sources import parse_sources
from nanochat.data.split import cutoff, place
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.tasks import (
    arc,
    common,
    customjson,
    data,
    gsm8k,
    identity,
    mmlu,
    smoltalk,
    spellingbee,
)
from nanochat.eval.tasks.common import Item
from nanochat.tinyworld import conversations as tinytalk
from nanochat.tinyworld import generator_files

READ: dict[str, tuple[data.DataSet, data.Make]] = {
    "smoltalk": (smoltalk.DATA, customjson.conversation),
    "mmlu": (mmlu.DATA, mmlu.item),
    "gsm8k": (gsm8k.DATA, gsm8k.item),
    **{name.lower(): (d, arc.item) for name, d in arc.DATA.items()},
}
MADE = {
    "tinyworld": (40_000, 2_000),
    "spellingbee": (20_000, 1_000),
    "identity": (1_000, 50),
}  # where no number is given; for validation
VALIDATION_SHARE, VALIDATION_MOST = 0.02, 2_000
# Much talk, forms of questions, the tool, the name; then a smaller and cleaner cut. Second: after pretraining on tinyworld alone
DEFAULTS = {
    "mid": (("smoltalk", "mmlu", "gsm8k", "spellingbee", "identity"), ("tinyworld",)),
    "sft": (
        ("arc-easy", "arc-challenge", "gsm8k", "smoltalk@10000", "spellingbee@600", "identity"),
        ("tinyworld@8000",),
    ),
}


@dataclass(frozen=True)
class Spec:
    """One source of conversations. kind: a name of READ or MADE, or "files"; count None: all there are, once."""

    name: str
    kind: str
    count: int | None = None
    weight: float | None = None
    paths: tuple[Path, ...] = ()


def default(stage: str, texts: Sequence[str]) -> tuple[str, ...]:
    """What a stage ("mid", "sft") trains on when nothing is named, after pretraining on `texts`."""
    return DEFAULTS[stage][
        all(re.fullmatch(r"(?:[\w.-]+=)?tinyworld(?:[@:].*)?", text) for text in texts)
    ]


def parse(specs: Sequence[str]) -> list[Spec]:
    """Specifications as the file's docstring shows them. UserError for what cannot be read as conversations. Weights: of all or of none."""
    found = [_parse(spec) for spec in specs]
    if not found:
        raise UserError(
            f"no conversations are named: give --data a file or some of {', '.join([*READ, *MADE])}"
        )
    names = [s.name for s in found]
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(
            f"two sources are called {twice[0]}: give each its own name, as in {twice[0]}2={twice[0]}"
        )
    bare = [s.name for s in found if s.weight is None]
    if 0 < len(bare) < len(found):
        raise UserError(
            f"{bare[0]} has no weight and others have: give all a weight, as in {bare[0]}:0.5, or none"
        )
    return found


def _parse(spec: str) -> Spec:
    m = re.fullmatch(r"(?:([\w.-]+)=)?([\w-]+)(?:@([^:]*))?(?::(\d+\.?\d*|\.\d+))?", spec)
    if m and (kind := m[2].lower()) in {*READ, *MADE}:
        return Spec(m[1] or kind, kind, _count(spec, m[3]), _weight(spec, m[4]))
    m = re.fullmatch(r"(.+)@(\w*)((?::[^/]*)?)", spec)
    try:
        source = parse_sources([m[1] + m[3] if m else spec])[0]
    except UserError as e:
        raise UserError(
            f"{e}; conversations are in .jsonl files, or {', '.join([*READ, *MADE])}"
        ) from e
    if source.kind == "shards":
        raise UserError(
            f"{source.name} holds text, not conversations: name a .jsonl file of conversations, or {', '.join([*READ, *MADE])}"
        )
    return Spec(
        source.name, "files", _count(spec, m[2] if m else None), source.weight, source.paths
    )


def _count(spec: str, text: str | None) -> int | None:
    if text is not None and (not text.isdigit() or int(text) < 1):
        raise UserError(
            f"conversations {spec}: give a whole number of them after @, as in tinyworld@{MADE['tinyworld'][0]}"
        )
    return int(text) if text else None


def _weight(spec: str, text: str | None) -> float | None:
    if text is not None and float(text) <= 0:
        raise UserError(f"conversations {spec}: give a weight above 0, or leave them out")
    return float(text) if text else None


def shards(
    specs: Sequence[str],
    split: str,
    tokenizer: Tokenizer,
    seed: int = 0,
    folder: Path | None = None,
    name: str = "nanochat",
) -> list[tuple[Shards, float | None]]:
    """
    The split ("train", "val") of every named source with its weight. `seed` chooses what a generator makes and what a slice takes;
    `folder`: where data sets are, see tasks/data.py; `name`: who the model says it is. What an earlier call rendered is not rendered anew.
    """
    out = []
    for s in parse(specs):
        what, conversations = (
            _made(s, split, seed, name) if s.kind in MADE else _read(s, split, seed, folder)
        )
        out.append(
            (
                prepare_conversations(
                    f"{s.name}-talk-{split}", conversations, tokenizer, identity=what
                ),
                s.weight,
            )
        )
    return out


def _made(s: Spec, split: str, seed: int, name: str) -> tuple[str, Iterator[Item]]:
    """What generated conversations depend on, and these."""
    n = MADE[s.kind][1] if split == "val" else s.count or MADE[s.kind][0]
    if s.kind == "identity":
        what, stream = f"{_version(identity)} {name}", identity.conversations(seed, split, name)
    else:
        module = {"tinyworld": tinytalk, "spellingbee": spellingbee}[s.kind]
        what, stream = _version(module), module.conversations(seed, split)
    return f"{s.kind} {what} {split} {seed} {n}", itertools.islice(stream, n)


def _read(s: Spec, split: str, seed: int, folder: Path | None) -> tuple[str, Iterator[Item]]:
    """What conversations of files depend on, and these."""
    if s.kind == "files":
        paths, make = customjson.files(s.paths), customjson.conversation
    else:
        paths, make = data.files(READ[s.kind][0], "train", folder), READ[s.kind][1]

    def conversations() -> Iterator[Item]:
        part = split_of(lambda: data.made(make, paths), split)
        if split == "val":
            yield from itertools.islice(part, VALIDATION_MOST)
        elif s.count is None:
            yield from part
        else:
            rng = random.Random(seed)
            drawn = heapq.nsmallest(
                s.count, part, key=lambda _: rng.random()
            )  # a random sample, however long the stream
            yield from itertools.islice(itertools.cycle(drawn), s.count)

    drawn = f" {seed} {s.count}" if split == "train" and s.count else ""
    return (
        f"{s.kind} {_version(sys.modules[make.__module__])} {data.digest(paths)} {split}{drawn}",
        conversations(),
    )


def split_of(read: Callable[[], Iterator[Item]], split: str) -> Iterator[Item]:
    """
    The conversations of a split, by a hash of their content (data/split.py): VALIDATION_SHARE of them are "val", or of few a tenth, so that a small file has some too. One that comes twice is on one side. UserError where there are not two different ones.
    """
    share = cutoff(map(_place, read()), VALIDATION_SHARE)
    if share is None:
        raise UserError(
            "there are not two different conversations, and one is needed to validate on: give more of them"
        )
    return (
        conversation
        for conversation in read()
        if (_place(conversation) <= share) == (split == "val")
    )


def _place(conversation: Item) -> float:
    """The place of a conversation in 0..1, by its content alone."""
    return place(json.dumps(conversation["messages"], sort_keys=True))


def _version(module: ModuleType) -> str:
    """A hash of the files that make a source's conversations, so that what an older version made is not taken for what this one makes."""
    return data.digest(
        [
            *generator_files(),
            *(Path(m.__file__ or "") for m in (module, common, data, sys.modules[__name__])),
        ]
    )
