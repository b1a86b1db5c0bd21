"""
Sources of text: a user's .txt, .jsonl and .parquet files, the embedded corpus, and web-text shards of the hub; their mixtures and their
validation split. A source is written as `PATH` or `name=PATH`, followed by `:weight` (its share of the tokens) and `#field` as needed:

    books=~/books:0.4    posts=dump.jsonl:0.15#body    tinyworld    tinyworld@5:0.2 (5 MB of it)    fineweb-edu    climbmix

A .txt file is cut into documents of about 16,000 characters where a paragraph ends (else a line, a sentence, a word); line breaks at a
cut are dropped, and so are documents of white space alone. Other files hold one document a row. A document is validation when a hash of
its text says so, about 1 % of them: adding or moving files moves no document across, and copies of a document are on one side. The last
shard of a hub set is its validation. It refuses to guess: text that is not UTF-8, a damaged file, a missing field or a missing
validation shard is an error that names the place.
`python -m nanochat.dataset -n 15` downloads hub shards.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat.base.common import UserError, base_dir
from nanochat.data.split import cutoff, place
from nanochat.tinyworld import generator_files

CUT = 16_384  # characters of a document cut from a .txt file, at most
VALIDATION_SHARE = 0.01
PART_BYTES = (
    1 << 28
)  # files are tokenised in groups of this size: what is added later, or done when interrupted, is not done again
TEXT_FIELDS = "text", "content", "body", "document", "article", "story", "passage", "message"
SUFFIXES = ".txt", ".jsonl", ".parquet"


@dataclass(frozen=True)
class ShardSet:
    """Parquet shards of a hub data set, shard_00000 to shard_`last`, of which the last is validation."""

    repo: str
    last: int

    def file(self, i: int) -> str:
        return f"shard_{i:05d}.parquet"


SHARD_SETS = {
    "fineweb-edu": ShardSet("karpathy/fineweb-edu-100b-shuffle", last=1822),
    "climbmix": ShardSet("karpathy/climbmix-400b-shuffle", last=6542),
}


@dataclass(frozen=True)
class Source:
    """kind: "files", "tinyworld" or "shards"; weight None = by size; field None = the first of TEXT_FIELDS that a row has."""

    name: str
    paths: tuple[Path, ...] = ()
    weight: float | None = None
    field: str | None = None
    kind: str = "files"
    megabytes: float = 20.0  # of the embedded corpus


@dataclass(frozen=True)
class Part:
    """What is tokenised in one go: `identity` changes whenever its text may have changed; size: bytes to expect, for a progress bar."""

    identity: dict[str, Any]
    size: int
    read: Callable[[], Iterator[str]]


def parse_sources(specs: Sequence[str]) -> list[Source]:
    """Specifications as the file's docstring shows them -> sources. Weights: of all or of none."""
    if not specs:
        raise UserError(
            "no data source given: name a file, a folder, tinyworld, fineweb-edu or climbmix"
        )
    sources = [_parse(spec) for spec in specs]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two data sources are called {name}: give each its own name, as in {name}2=PATH"
            )
    bare = [source.name for source in sources if source.weight is None]
    if 0 < len(bare) < len(sources):
        raise UserError(
            f"data source {bare[0]} has no weight and others have: give all a weight, as in {bare[0]}=PATH:0.5, or none"
        )
    return sources


def default_sources() -> list[str]:
    """What to train on when no data is named: a downloaded shard set, else the embedded corpus."""
    for name in SHARD_SETS:
        source = parse_sources([name])[0]
        if source.paths[0].is_dir() and any(source.paths[0].glob("*.parquet")):
            return [name]
    return ["tinyworld"]


def training_sources(specs: Sequence[str]) -> list[Source]:
    """The sources that specs name (without any, the default ones); UserError if files are missing."""
    sources = parse_sources(specs or default_sources())
    for source in sources:
        if source.kind != "tinyworld":
            files(source)
    return sources


def _parse(spec: str) -> Source:
    readings: list[tuple[str | None, str, float | None, str | None]] = [(None, *_suffixes(spec))]
    if m := re.match(r"([A-Za-z0-9][\w.-]*)=(.+)$", spec):
        readings.append((m[1], *_suffixes(m[2])))
    # A reading that names something there wins, the one without a name first: signs in a path, as in C:\texts or a=b, are no syntax then
    name, rest, weight, field = next((r for r in readings if _exists(r[1])), readings[-1])
    if weight is not None and weight <= 0:
        raise UserError(
            f"data source {spec} has weight {weight:g}: give a weight above 0, or leave the source out"
        )
    if m := re.fullmatch(r"tinyworld(?:@(\d+\.?\d*|\.\d+))?", rest):
        if m[1] and float(m[1]) <= 0:
            raise UserError(
                f"data source {spec} asks for no text: give the megabytes wanted, as in tinyworld@20"
            )
        return Source(
            name or "tinyworld",
            weight=weight,
            kind="tinyworld",
            megabytes=float(m[1] or Source.megabytes),
        )
    if rest in SHARD_SETS:
        return Source(name or rest, (base_dir() / "shards" / rest,), weight, field, kind="shards")
    path = Path(rest).expanduser()
    if not path.exists():
        raise UserError(
            f"data source {spec}: there is no {path}; give an existing file or folder, tinyworld, {' or '.join(SHARD_SETS)}"
        )
    name = name or re.sub(r"[^\w.-]", "_", path.resolve().stem) or "data"
    return Source(name, (path,), weight, field)


def _suffixes(text: str) -> tuple[str, float | None, str | None]:
    """PATH[:weight][#field], the two in either order -> (path, weight, field)."""
    weight = field = None
    while not _exists(text):
        if field is None and (m := re.match(r"(.+)#([^#/\\:]+)$", text)):
            text, field = m.groups()
        elif weight is None and (m := re.match(r"(.+):(\d+\.?\d*|\.\d+)$", text)):
            text, weight = m[1], float(m[2])
        else:
            break
    return text, weight, field


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a null character
        return False


def files(source: Source, split: str | None = None) -> list[Path]:
    """The files a source reads (for a split, where that matters), sorted by path."""
    if source.kind == "shards":
        return _shard_files(source, split)
    found = []
    for path in source.paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        inside = [
            p for p in inside if not any(name.startswith(".") for name in p.relative_to(path).parts)
        ]
        if path.is_dir() and not inside:
            raise UserError(
                f"the folder {path} (data source {source.name}) has no {', '.join(SUFFIXES)} file: put text there"
            )
        if path.is_file() and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"cannot read {path}: data files end in {', '.join(SUFFIXES)}")
        if not path.exists():
            raise UserError(
                f"data source {source.name}: there is no {path}; give an existing file or folder"
            )
        found += inside or [path]
    return found


def _shard_files(source: Source, split: str | None) -> list[Path]:
    folder = source.paths[0]
    known = SHARD_SETS[folder.name]
    validation = folder / known.file(known.last)
    train = sorted(p for p in folder.glob("shard_*.parquet") if p != validation)
    get = f"run `python -m nanochat.dataset -n 15 --set {folder.name}`"
    if split != "train" and not validation.exists():
        raise UserError(
            f"the validation shard {validation} is absent, and no training shard may stand in for it: {get}"
        )
    if split != "val" and not train:
        raise UserError(f"there are no training shards in {folder}: {get}")
    return {"train": train, "val": [validation], None: [*train, validation]}[split]


def documents(source: Source, split: str | None = None) -> Iterator[str]:
    """The texts of a split ("train", "val"; None: of both, but for the embedded corpus), in the order of the files."""
    if split is None and source.kind != "tinyworld":
        for path in files(source):
            yield from _read(path, source.field)
        return
    for part in parts(source, split or "train"):
        yield from part.read()


def parts(source: Source, split: str) -> list[Part]:
    """A split as parts that are read, and tokenised, independently of each other."""
    if split not in ("train", "val"):
        raise ValueError(f"no such split: {split}")
    if source.kind == "tinyworld":
        return [_tinyworld_part(source, split)]
    paths = files(source, split)
    share = _validation_share(source) if source.kind == "files" else None
    groups, size = [[]], 0
    for path in paths:
        if size >= PART_BYTES or (groups[-1] and source.kind == "shards"):
            groups, size = [*groups, []], 0
        groups[-1].append(path)
        size += path.stat().st_size
    return [_part(source, split, group, share) for group in groups]


def _part(source: Source, split: str, group: list[Path], share: float | None) -> Part:
    stats = [(p, p.stat()) for p in group]
    made_from = [[p.name, s.st_size, s.st_mtime_ns] for p, s in stats]
    identity = {
        "files": made_from,
        "field": source.field,
        "split": split,
        "share": share,
        "cut": CUT,
    }

    def read() -> Iterator[str]:
        for path in group:
            for text in _read(path, source.field):
                if share is None or (place(text) <= share) == (split == "val"):
                    yield text

    return Part(identity, sum(_text_bytes(p, s.st_size) for p, s in stats), read)


def _tinyworld_part(source: Source, split: str) -> Part:
    size = int(source.megabytes * 1e6 * (1 if split == "train" else 0.02))

    def read() -> Iterator[str]:
        from nanochat.tinyworld.documents import documents as generated

        left = size
        for text in generated(seed=0, split=split):
            yield text
            left -= len(text.encode())
            if left <= 0:
                return

    # The generator is part of what decides the text: its files are hashed, so that a newer one is tokenised afresh
    generator = generator_files()
    code = hashlib.sha256(b"".join(p.read_bytes() for p in generator)).hexdigest()
    return Part({"tinyworld": code, "bytes": size, "split": split}, size, read)


def _validation_share(source: Source) -> float:
    """The place (see split.py) up to which a document of this source is validation."""
    share = cutoff(map(place, documents(source)), VALIDATION_SHARE)
    if share is None:
        raise UserError(
            f"data source {source.name} has fewer than two different documents, so none is left for "
            "validation: add text"
        )
    return share


def mixed(
    sources: Sequence[Source], split: str = "train", max_chars: int | None = None
) -> Iterator[str]:
    """
    Documents of all sources, interleaved so that at any point each has given its share of the characters (by weight; without weights
    by size). A source that is exhausted leaves its share to the others. Ends after max_chars characters.
    """
    splits = {source.name: parts(source, split) for source in sources}
    weights = {
        source.name: source.weight or 1 + sum(part.size for part in splits[source.name])
        for source in sources
    }
    streams = {
        name: chain.from_iterable(part.read() for part in split) for name, split in splits.items()
    }
    given = dict.fromkeys(streams, 0)
    while streams and (max_chars is None or sum(given.values()) < max_chars):
        name = min(streams, key=lambda n: given[n] / weights[n])
        text = next(streams[name], None)
        if text is None:
            del streams[name]
            continue
        given[name] += len(text)
        yield text


def _read(path: Path, field: str | None) -> Iterator[str]:
    """The documents of one file. None of them is white space alone, and all of them can be written as UTF-8."""
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        for text in readers[path.suffix.lower()](path, field):
            if text and not text.isspace():
                yield text
    except OSError as e:
        raise UserError(
            f"cannot read {path} ({e.strerror or e}): check the file, or leave it out"
        ) from e


def _read_txt(path: Path, field: str | None) -> Iterator[str]:
    return cut(_decode(path))


def _decode(path: Path) -> Iterator[str]:
    """The text of a file in pieces, \\r\\n as \\n, a byte-order mark dropped. Never holds more than a mebibyte."""
    decoder, newlines = (
        codecs.getincrementaldecoder("utf-8")(),
        io.IncrementalNewlineDecoder(None, translate=True),
    )
    with open(path, "rb") as f:
        done = False
        while not done:
            pending, offset = len(decoder.getstate()[0]), f.tell()
            chunk = f.read(1 << 20)
            done = not chunk
            try:
                text = newlines.decode(decoder.decode(chunk, final=done), final=done)
                yield text if offset else text.removeprefix("\ufeff")
            except UnicodeDecodeError as e:
                raise UserError(
                    f"{path} is not UTF-8 at byte {offset - pending + e.start}: convert it, for example with iconv"
                ) from e


def cut(pieces: Iterable[str], limit: int = CUT) -> Iterator[str]:
    """Text, arriving in pieces of any size, -> documents of at most `limit` characters, cut in their last half where it hurts least."""
    text, at = "", 0
    for piece in pieces:
        text, at = text[at:] + piece, 0
        while len(text) - at > limit:
            end = _cut_place(text, at, at + limit)
            yield text[at:end].strip("\n")
            at = end
    yield text[at:].strip("\n")


def _cut_place(text: str, start: int, stop: int) -> int:
    middle = (start + stop) // 2
    for sign in ("\n\n", "\n"):
        if (i := text.rfind(sign, middle, stop)) >= 0:
            return i + len(sign)
    sentences = max(
        text.rfind(sign, middle, stop) for sign in (". ", "! ", "? ", '." ', '?" ', '!" ', "。")
    )
    word = text.rfind(" ", middle, stop)
    i = text.find(" ", sentences, stop) if sentences >= 0 else word
    return (i if i >= 0 else sentences if sentences >= 0 else stop - 1) + 1


def _read_jsonl(path: Path, field: str | None) -> Iterator[str]:
    with open(path, "rb") as f:
        offset = 0
        for number, line in enumerate(f, 1):
            try:
                decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                place = f"byte {offset + e.start} (line {number})"
                raise UserError(
                    f"{path} is not UTF-8 at {place}: convert it, for example with iconv"
                ) from e
            offset += len(line)
            if not decoded.strip():
                continue
            try:
                row = json.loads(decoded)
            except (ValueError, RecursionError) as e:
                raise UserError(
                    f"{path}, line {number}, is not JSON ({e}): mend or delete the line"
                ) from e
            if isinstance(row, str):
                row = {"text": row}
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}, line {number}, holds a {type(row).__name__}: each line is to be an object with a text field"
                )
            text = row.get(_field(row, field, f"{path}, line {number},"))
            if text is None:
                continue
            if not isinstance(text, str):
                raise UserError(
                    f"{path}, line {number}: the field holds a {type(text).__name__}, not text; name a text field with #FIELD"
                )
            yield _well_formed(text)


def _read_parquet(path: Path, field: str | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            column = _field(file.schema_arrow.names, field, str(path))
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(
                    f"{path}: column {column} holds {kind}, not text; name a text column with #FIELD"
                )
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path} is no readable parquet file ({str(e).splitlines()[0][:120]}): fetch or make it again"
        ) from e


def _field(names: Iterable[str], wanted: str | None, place: str) -> str:
    names = list(names)
    candidates = [wanted] if wanted else TEXT_FIELDS
    for name in candidates:
        if name in names:
            return name
    talk = "messages" in names and not wanted
    hint = (
        "these are conversations, train on them with mid_train or chat_sft"
        if talk
        else "name a field of text with PATH#FIELD"
    )
    raise UserError(
        f"{place} has no field {' or '.join(candidates[:3])}, only {', '.join(map(str, names)) or 'none'}: {hint}"
    )


def _well_formed(text: str) -> str:
    """JSON can spell half a surrogate pair, which no UTF-8 can hold: pairs are joined, a lone half becomes U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text_bytes(path: Path, size: int) -> int:
    """Roughly how much text a file holds: for a parquet file what its columns unpack to, which its footer states."""
    if path.suffix.lower() != ".parquet":
        return size
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as e:
        raise UserError(
            f"{path} is no readable parquet file ({str(e).splitlines()[0][:120]}): fetch or make it again"
        ) from e
    return sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
