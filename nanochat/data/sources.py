"""
Sources of text: a user's files (see folders.py), the embedded corpus, and shards of web text from
the hub; their mixtures and their validation split. A source is written as PATH or NAME=PATH, with
:WEIGHT (its share of the tokens) and #FIELD after it as needed:

    books=~/books:0.4    posts=dump.jsonl:0.15#body    tinyworld    tinyworld@5:0.2 (5 MB of it)
    dump.jsonl#post.body    'dump.jsonl#{title}\\n\\n{post.body}'
    fineweb-edu    climbmix

About 1 % of the documents are validation (see split.py). The last shard of a hub data set is its
validation split; a missing one is an error, and no training shard ever takes its place.
`python -m nanochat.dataset -n 15` downloads hub shards.
"""

import hashlib
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from nanochat.base.common import UserError, base_dir, notice, user_path
from nanochat.base.strangers import shown
from nanochat.data import inventory
from nanochat.data.ahead import batches
from nanochat.data.documents import MAX_CHARACTERS, read_all, text_bytes
from nanochat.data.folders import ARCHIVES, DOCUMENTS, READABLE, find, format_of, kind_of
from nanochat.data.rows import Report, of_each
from nanochat.tinyworld import generator_files

# Files are tokenised in groups of at least this size. Adding a file, or continuing after an
# interruption, does not repeat the groups that are finished.
PART_BYTES = 1 << 28
MOST_MEGABYTES = 1_000_000  # of the embedded corpus
READER = 5  # version of how files are read; a change leads to new token shards

NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)$")
# A field, post.body, or a template of several, {title}\\n\\n{body}
FIELD = re.compile(r"(.+?)#([^#/\\:]+|[^#{}]*\{[^{}]+\}.*)$", re.DOTALL)


@dataclass(frozen=True)
class ShardSet:
    """The shards of a data set on the hub, shard_00000 to shard_LAST; the last is validation."""

    repo: str
    last: int

    def file(self, number: int) -> str:
        """The file name of a shard."""
        return f"shard_{number:05d}.parquet"


SHARD_SETS = {
    "fineweb-edu": ShardSet("karpathy/fineweb-edu-100b-shuffle", last=1822),
    "climbmix": ShardSet("karpathy/climbmix-400b-shuffle", last=6542),
}


@dataclass(frozen=True)
class Source:
    """
    One source of text. `kind` is "files", "tinyworld" or "shards". Without a weight, a source
    counts by its size; without a field, the text of a row is in the first of TEXT_FIELDS that the
    row has.
    """

    name: str
    paths: tuple[Path, ...] = ()
    weight: float | None = None
    field: str | None = None
    kind: str = "files"
    megabytes: float = 20.0  # of the embedded corpus
    skip_bad_rows: int = 0  # rows that cannot be read and may be left out


@dataclass(frozen=True)
class Part:
    """
    A unit of tokenisation. `identity` and the contents of the files `paths` determine its text;
    `size` is an estimate of its bytes; `documents` reads it and fills in the report.
    """

    identity: dict[str, Any]
    size: int
    documents: Callable[[], Iterator[str]]
    paths: tuple[Path, ...] = ()
    report: Report = field(default_factory=Report)


def parse_sources(specs: Sequence[str]) -> list[Source]:
    """
    The sources that `specs` (see the top of this file) name. Raises UserError if one cannot be
    read, if two share a name, or if only some have a weight.
    """
    if not specs:
        raise UserError(
            "no data source given: name a file, a folder, tinyworld, fineweb-edu or climbmix"
        )
    sources = [_parse(spec) for spec in specs]
    check_mixture(sources)
    return sources


def check_mixture(sources: Sequence[Source]) -> None:
    """Raise UserError if two sources share a name, or if only some have a weight."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two data sources are called {name}: give each its own name, as in {name}2=PATH"
            )
    check_weights(sources)


def check_weights(sources: Sequence[Source]) -> None:
    """
    Raise UserError if only some sources of a mixture have a weight: the others count by their
    tokens, so a weight of 1 beside 152,131 tokens would hardly ever be drawn.
    """
    unweighted = [source.name for source in sources if source.weight is None]
    if 0 < len(unweighted) < len(sources):
        raise UserError(
            f"data source {unweighted[0]} has no weight, but others have one: give every source a "
            f"weight, as in {unweighted[0]}=PATH:0.5, or none"
        )


def check_weight(spec: str, weight: float | None) -> None:
    """Raise UserError if the weight of the source `spec`, if it has one, is 0 or infinite."""
    if weight is not None and not 0 < weight < math.inf:
        raise UserError(
            f"data source {shown(spec)} has weight {weight:g}: give a weight above 0, or leave it "
            "out"
        )


def default_sources() -> list[str]:
    """What to train on when no data is named: downloaded shards, else the embedded corpus."""
    for name in SHARD_SETS:
        if any(_shard_folder(name).glob("*.parquet")):
            return [name]
    return ["tinyworld"]


def only_tinyworld(specs: Sequence[str]) -> bool:
    """Whether the embedded corpus, of any size, is the only text that `specs` name."""
    own = (re.fullmatch(r"(?:[\w.-]+=)?tinyworld(?:[@:].*)?", spec) for spec in specs)
    return bool(specs) and all(own)


def training_sources(specs: Sequence[str], skip_bad_rows: int = 0) -> list[Source]:
    """
    The sources that `specs` name, or the default ones. Up to `skip_bad_rows` rows that cannot be
    read may be left out of each. Raises UserError if files are missing. A notice names a file that
    two sources read, because each of them decides by itself which text is validation.
    """
    sources = [
        replace(source, skip_bad_rows=skip_bad_rows)
        for source in parse_sources(specs or default_sources())
    ]
    readers: dict[tuple[Any, ...], str] = {}  # file and field -> the source that reads it
    shared: dict[tuple[str, str], Path] = {}
    for source in sources:
        for path in files(source):
            info = path.stat()
            first = readers.setdefault((info.st_dev, info.st_ino, source.field), source.name)
            if first != source.name and source.kind == "files":
                shared.setdefault((first, source.name), path)
    for (first, second), path in shared.items():
        notice(
            f"the data sources {first} and {second} both read {path}: text that one holds out may "
            "be trained on in the other, so their bits per byte may be too good; name every file "
            "in one source only"
        )
    return sources


def _shard_folder(name: str) -> Path:
    return base_dir() / "shards" / name


def name_of(spec: str) -> str:
    """The name of a source that is written as `spec`, whose files need not exist any more."""
    if m := NAMED.match(spec):
        return m[1]
    return PurePath(_split_suffixes(spec)[0]).stem or "data"


def _parse(spec: str) -> Source:
    name = None
    rest, weight, field = _split_suffixes(spec)
    # The whole may be a path that exists, as in C:\texts or a=b; else it may begin with NAME=
    if not _exists(rest) and (m := NAMED.match(spec)):
        name = m[1]
        rest, weight, field = _split_suffixes(m[2])
    check_weight(spec, weight)
    if m := re.fullmatch(r"tinyworld(?:@(\d+\.?\d*|\.\d+))?", rest):
        megabytes = float(m[1] or Source.megabytes)
        if not 0 < megabytes <= MOST_MEGABYTES:
            raise UserError(
                f"data source {spec} must have a size above 0 and up to {MOST_MEGABYTES:,} MB: "
                "give the megabytes that you want, as in tinyworld@20"
            )
        return Source(name or "tinyworld", (), weight, kind="tinyworld", megabytes=megabytes)
    if rest in SHARD_SETS:
        return Source(name or rest, (_shard_folder(rest),), weight, field, kind="shards")
    path = user_path(rest)
    if not path.exists():
        raise UserError(
            f"data source {spec}: {path} does not exist; give an existing file or folder, "
            f"tinyworld, {' or '.join(SHARD_SETS)}"
        )
    name = name or re.sub(r"[^\w.-]", "_", path.resolve().stem) or "data"
    return Source(name, (path,), weight, field)


def _split_suffixes(text: str) -> tuple[str, float | None, str | None]:
    """PATH[:WEIGHT][#FIELD], the suffixes in either order, as (path, weight, field)."""
    weight = field = None
    while not _exists(text):
        if weight is None and (m := re.match(r"(.+):(\d+\.?\d*|\.\d+)$", text)):
            text, weight = m[1], float(m[2])
        elif field is None and (m := FIELD.match(text)):
            text, field = m.groups()
        else:
            break
    return text, weight, field


def _exists(path: str) -> bool:
    try:
        return user_path(path).exists()
    except (OSError, UserError, ValueError):  # too long, no such user, a null character
        return False


def files(source: Source, split: str = "train") -> list[Path]:
    """
    The files of a source, sorted by path; `split` matters for shards only. Raises UserError if
    there are none.
    """
    if source.kind == "shards":
        return _shard_files(source, split)
    return find(source.paths, source.name, READABLE).files


def _shard_files(source: Source, split: str) -> list[Path]:
    folder = source.paths[0]
    shard_set = SHARD_SETS[folder.name]
    validation = folder / shard_set.file(shard_set.last)
    shards = {*folder.glob("shard_*.parquet")}
    by_split = {"train": sorted(shards - {validation}), "val": [*(shards & {validation})]}
    for name, paths in by_split.items():
        if not paths:
            raise UserError(
                f"the {name} split of {folder.name} has no shard in {folder} ({validation.name} is "
                f"val, all others are train): run `python -m nanochat.dataset -n 15 --set "
                f"{folder.name}`"
            )
    return by_split[split]


def parts(source: Source, split: str) -> list[Part]:
    """A split ("train" or "val") in parts that are read and tokenised independently."""
    if source.kind == "tinyworld":
        return [_tinyworld_part(source, split)]
    paths = files(source, split)
    if source.kind == "shards":
        return [_part(source, split, [path], 1, None) for path in paths]
    known = _inventory(source)
    groups = batches(paths, lambda path: path.stat().st_size, PART_BYTES)
    return [_part(source, split, group, len(paths), known) for group in groups]


def _part(
    source: Source,
    split: str,
    paths: list[Path],
    count: int,
    known: inventory.SourceInventory | None,
) -> Part:
    """The part `paths` of a source of `count` files, of which the inventory `known` is taken."""
    division = known and known.division
    kinds = of_each(paths, kind_of if known else format_of)  # shards need not be opened
    identity = {
        "formats": kinds,
        "field": source.field,
        "split": split,
        "share": division and division.share,
        "cut": MAX_CHARACTERS,
    }
    if known and division:
        identity |= {"reader": READER, "piece": division.piece}
        identity["left out"] = known.left_out(paths)
        if known.skipped:  # a reason may vanish, as when a missing package is installed
            identity["skipped"] = sorted({reason for reason, _ in known.skipped})
        if not {*DOCUMENTS, *ARCHIVES}.isdisjoint(kinds):  # some of their text may need one
            identity["packages"] = inventory.installed()
    report = Report(source.skip_bad_rows)

    def texts() -> Iterator[str]:
        report.clear()
        read = read_all(paths, source.field, report, count)
        if known and division:
            for text in known.kept(read, paths):
                yield from division.texts(text, split)
        else:
            yield from read
        report.finish()
        report.notes.update(f"skipped: {reason}" for reason, _ in report.skipped)
        if division and division.piece:
            report.notes["characters per piece held out of long documents"] = division.piece

    return Part(identity, sum(map(text_bytes, paths)), texts, tuple(paths), report)


def _tinyworld_part(source: Source, split: str) -> Part:
    megabytes = source.megabytes
    if split == "val":  # the same for all larger ones, so that their bits per byte can be compared
        megabytes = 0.02 * min(megabytes, Source.megabytes)
    size = int(megabytes * 1e6)

    def texts() -> Iterator[str]:
        from nanochat.tinyworld.documents import documents as generated

        remaining = size
        for text in generated(seed=0, split=split):
            yield text
            remaining -= len(text.encode())
            if remaining <= 0:
                return

    # The generator decides the text, so a newer generator must lead to new token shards
    code = hashlib.sha256(b"".join(p.read_bytes() for p in generator_files())).hexdigest()
    return Part({"tinyworld": code, "bytes": size, "split": split}, size, texts)


def _inventory(source: Source) -> inventory.SourceInventory:
    """The inventory of a source of files. UserError if it cannot be divided into two splits."""
    known = inventory.of(source)
    if known.division is None:
        report = Report(source.skip_bad_rows)
        deque(read_all(files(source), source.field, report), maxlen=0)
        report.finish()  # bad rows may be the reason; then this error names them
        raise UserError(
            f"data source {source.name} has fewer than two different documents, so none is left "
            "for validation: add more text"
        )
    return known


def mixed(
    sources: Sequence[Source], split: str = "train", max_chars: int | None = None
) -> Iterator[str]:
    """
    Documents of all sources, interleaved so that at any point each source has given its share of
    the characters: by its weight, or else by its size. When a source runs out, the others go on.
    Ends after `max_chars` characters (None = no limit).
    """
    weights, streams = {}, {}
    for source in sources:
        split_parts = parts(source, split)
        weights[source.name] = source.weight or 1 + sum(part.size for part in split_parts)
        streams[source.name] = chain.from_iterable(part.documents() for part in split_parts)
    given = dict.fromkeys(streams, 0)
    while streams and (max_chars is None or sum(given.values()) < max_chars):
        name = min(streams, key=lambda name: given[name] / weights[name])
        text = next(streams[name], None)
        if text is None:
            del streams[name]
            continue
        given[name] += len(text)
        yield text
