"""
Text -> token shards on disk: each text is tokenised once, on all cores, and read through a memory
map from then on.

A shard is a folder: tokens.bin (uint16, or uint32 if the vocabulary needs it), offsets.npy (int64,
where each document begins, and the end), mask.bin for conversations (uint8, 1 = to be predicted)
and meta.json. Every document starts with <|bos|>. The folder name holds a hash of what the shard
was made from (the files' contents, split, tokenizer), so whatever changes is tokenised again and
the rest is reused. A shard is built in a temporary folder and renamed, so it is complete or absent,
and an interrupted run continues with the next one. meta.json holds the SHA-256 of the other files:
opening a shard in which a bit has changed, or shards of two tokenizers together, is an error. Files
are hashed once and again only when they may have changed (see base/files.py).
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanochat.base.common import UserError, base_dir, notice, rank, world_size
from nanochat.base.files import Hashes, locked, write_json
from nanochat.base.progress import ProgressBar, progress
from nanochat.data.ahead import batches, read_ahead
from nanochat.data.rows import Report, of_each
from nanochat.data.sources import Part, Source, parts

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer

FORMAT = 2  # raise it whenever the same files would become other tokens
Encoded = tuple[Sequence, Sequence]  # the ids of some documents, and their masks if there are any
BATCH_CHARACTERS = 1 << 21  # per call of the tokenizer: little memory, and all cores busy


class Shards:
    """
    Token shards as one list of documents; reads only the pages that are asked for.
    lengths: (documents,) int64, tokens of each with its <|bos|>; total: their sum; sha256: of all
    tokens and boundaries; divided: whether the validation split was taken out of the same
    documents; notes: what the readers noted, as text -> count (see rows.Report).
    """

    def __init__(self, name: str, folders: Sequence[Path], divided: bool = False):
        self.name, self.divided = name, divided
        hashes = _hashes(folders[0].parent)
        opened = [_open(folder, hashes) for folder in folders]
        hashes.save()
        metas, self._tokens, self._masks, self._offsets = zip(*opened, strict=True)
        if len({m["tokenizer"] for m in metas}) != 1:
            raise UserError(
                f"the token shards of {name} are from different tokenizers: delete "
                f"{folders[0].parent} and start again"
            )
        self.bos: int = metas[0]["bos"]
        self.sha256 = hashlib.sha256("".join(m["sha256"] for m in metas).encode()).hexdigest()
        self._first = np.cumsum([0] + [m["documents"] for m in metas])
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])
        self.total = int(self.lengths.sum())
        self.masked = self._masks[0] is not None
        self.notes: Counter[str] = Counter()
        for meta in metas:
            self.notes.update(meta.get("notes", {}))

    def __len__(self) -> int:
        return len(self.lengths)

    def _locate(self, i: int) -> tuple[int, slice]:
        """The shard that holds document i, and the document's tokens in it."""
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        offsets, i = self._offsets[shard], i - int(self._first[shard])
        return shard, slice(int(offsets[i]), int(offsets[i + 1]))

    def tokens(self, i: int) -> np.ndarray:
        """Document i: (lengths[i],) uint16 or uint32, a view of the file."""
        shard, span = self._locate(i)
        return self._tokens[shard][span]

    def mask(self, i: int) -> np.ndarray | None:
        """(lengths[i],) uint8, 1 where document i is to be predicted; None means everywhere."""
        shard, span = self._locate(i)
        mask = self._masks[shard]
        return None if mask is None else mask[span]

    def to_predict(self, width: int | None = None) -> np.ndarray:
        """
        (documents,) int64: how many of the first `width` tokens (None = all) of each document are
        to be predicted. <|bos|>, which begins every document, never is.
        """
        lengths = self.lengths if width is None else np.minimum(self.lengths, width)
        if not self.masked:
            return np.maximum(lengths - 1, 0)
        counts = []
        for mask, offsets, first in zip(self._masks, self._offsets, self._first, strict=False):
            begin = np.asarray(offsets[:-1])
            ends = begin + lengths[first : first + len(begin)]
            bounds = np.stack([begin, ends], axis=1).ravel()
            one_more = np.append(mask, 0)  # reduceat takes no bound at the very end
            counts.append(np.add.reduceat(one_more, bounds, dtype=np.int64)[::2])
        return np.concatenate(counts)


def prepare(
    source: Source, split: str, tokenizer: "Tokenizer", directory: Path | None = None
) -> Shards:
    """
    The documents of a split ("train" or "val") as token shards in `directory` (default: tokens/ in
    the base folder). Shards of earlier runs are reused. Raises UserError if the source cannot be
    read or has no text, if a file changes meanwhile, or if the disk is full.
    """
    root = Path(directory or base_dir() / "tokens")
    split_parts = parts(source, split)
    hashes = _hashes(root)  # after parts(), which may have hashed the files

    def folder_of(part: Part) -> Path:
        contents = of_each(part.paths, hashes.of)
        key = _key({**part.identity, "contents": contents}, tokenizer)
        return root / f"{source.name}-{split}-{key}"

    all_parts = {folder_of(part): part for part in split_parts}
    hashes.save()
    with _missing(root, [*all_parts]) as missing:
        size = sum(all_parts[folder].size for folder in missing)
        with progress(size, f"tokenising {source.name} ({split})", "bytes of text") as bar:
            for folder in missing:
                part = all_parts[folder]
                _build(folder, tokenizer, _encoded(part, tokenizer, bar), part.report)
                unchanged = False
                with suppress(UserError):  # a file is gone
                    unchanged = folder_of(part) == folder
                if not unchanged:
                    shutil.rmtree(folder)
                    raise UserError(
                        f"a file of the data source {source.name} changed while it was read: run "
                        "again when no other program writes to it"
                    )
        shards = Shards(source.name, [*all_parts], divided=source.kind == "files")
    now = time.time()
    if rank() == 0:  # tells dev/generate_rap_prior.py which shards belong together
        for folder in all_parts:
            with suppress(OSError):
                os.utime(folder, (now, now))
    _check_bad_rows(shards, source.skip_bad_rows)
    if not len(shards):
        raise UserError(
            f"data source {source.name} has no text in its {split} split: add more documents"
        )
    return shards


def prepare_conversations(
    name: str,
    conversations: Iterable[dict],
    tokenizer: "Tokenizer",
    directory: Path | None = None,
    *,
    identity: str,
    divided: bool = False,
    report: Report | None = None,
) -> Shards:
    """
    Conversations as token shards with supervision masks, in the order given. `identity` states what
    they are made from (a seed and a count, the hash of a file): if an earlier run rendered the
    same, its shard is reused and `conversations` is not even iterated. `divided`: see Shards.
    `report` is filled in by what reads the conversations.
    """
    root, report = Path(directory or base_dir() / "tokens"), report or Report()
    folder = root / f"{name}-{_key({'conversations': identity}, tokenizer)}"
    with _missing(root, [folder]) as missing:
        if missing:
            with progress(None, f"rendering {name}", "conversations") as bar:
                _build(
                    folder, tokenizer, _rendered(conversations, tokenizer, bar), report, masked=True
                )
        shards = Shards(name, [folder], divided)
    _check_bad_rows(shards, report.limit)
    if not len(shards):
        shutil.rmtree(folder)
        raise UserError(f"there are no conversations in {name}: add at least one")
    return shards


def _check_bad_rows(shards: Shards, limit: int) -> None:
    """Raise UserError if an earlier run left out more rows than this one may."""
    count = shards.notes["bad rows skipped"]
    if count > limit:
        raise UserError(
            f"{shards.name} has {count} rows that cannot be used, and an earlier run left them "
            f"out: give --skip_bad_rows {count} again, or correct them"
        )


def _key(identity: dict, tokenizer: "Tokenizer") -> str:
    text = json.dumps([FORMAT, identity, tokenizer.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _encoded(part: Part, tokenizer: "Tokenizer", bar: ProgressBar) -> Iterator[Encoded]:
    """The texts of a part, tokenised in batches; a thread reads the next batch meanwhile."""
    for batch in read_ahead(batches(part.documents(), len, BATCH_CHARACTERS), 1):
        ids = tokenizer.encode_batch(batch, bos=True)
        bar.advance(sum(len(text.encode()) for text in batch))
        yield ids, []


def _rendered(
    conversations: Iterable[dict], tokenizer: "Tokenizer", bar: ProgressBar
) -> Iterator[Encoded]:
    for conversation in conversations:
        ids, mask = tokenizer.render_conversation(conversation)
        bar.advance()
        yield [ids], [mask]


def _build(
    folder: Path,
    tokenizer: "Tokenizer",
    batches: Iterable[Encoded],
    report: Report,
    masked: bool = False,
) -> None:
    """Write a shard to a temporary folder and rename it at the end; a failure leaves nothing."""
    temporary = folder.with_name(f".build-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, tokenizer, batches, report, masked)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except OSError as e:
        raise UserError(
            f"cannot write tokens to {folder} ({e.strerror}): free some space or set "
            "NANOCHAT_BASE_DIR to another disk"
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path, tokenizer: "Tokenizer", batches: Iterable[Encoded], report: Report, masked: bool
) -> None:
    """Write the files of a shard."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    names = ["tokens.bin", "mask.bin"] if masked else ["tokens.bin"]
    lengths: list[int] = []
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "wb")) for name in names]
        for ids, masks in batches:
            for file, arrays, kind in zip(files, (ids, masks), (dtype, "uint8"), strict=False):
                file.write(np.concatenate([np.asarray(a, dtype=kind) for a in arrays]).tobytes())
            lengths.extend(map(len, ids))
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / "offsets.npy", offsets)
    hashes = _hashes(folder.parent)
    meta = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos,
        "dtype": dtype,
        "mask": masked,
        "documents": len(lengths),
        "tokens": int(offsets[-1]),
        "files": {name: hashes.of(folder / name) for name in (*names, "offsets.npy")},
        "notes": dict(report.notes),
    }
    hashes.save()
    write_json(folder / "meta.json", {**meta, "sha256": _seal(meta)})


def _seal(meta: dict) -> str:
    """The SHA-256 of a shard's metadata, which include those of its files."""
    meta = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _hashes(root: Path) -> Hashes:
    return Hashes(root / ".hashes.json")


@contextmanager
def _missing(root: Path, folders: list[Path]) -> Iterator[list[Path]]:
    """
    The folders that are not complete, for this process to build. One process builds at a time;
    others (ranks, other runs) wait and then find the result. Takes no lock if nothing is missing.
    """
    if all(map(_usable, folders)):
        yield []
        return
    waiting = f"another process is writing tokens to {root}: waiting for it"
    is_own_rank = world_size() > 1  # then no notice
    with locked(root / ".lock", waiting="" if is_own_rank else waiting):
        for abandoned in root.glob(".build-*"):  # left by a killed run; nobody else is building
            shutil.rmtree(abandoned, ignore_errors=True)
        yield [folder for folder in folders if not _usable(folder)]


def _usable(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        hashes = _hashes(folder.parent)
        _open(folder, hashes)
        hashes.save()
        return True
    except UserError as e:
        notice(f"{e}; tokenising again")
        return False


def _open(folder: Path, hashes: Hashes) -> tuple[dict, np.ndarray, np.ndarray | None, np.ndarray]:
    """The metadata, tokens, mask and offsets of a shard; UserError if any of them has changed."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["sha256"] != _seal(meta):
            raise ValueError("meta.json changed since it was written")
        for name, digest in meta["files"].items():
            if hashes.of(folder / name) != digest:
                raise ValueError(f"{name} changed since it was written")
        tokens = _map(folder / "tokens.bin", meta["dtype"], meta["tokens"])
        mask = _map(folder / "mask.bin", "uint8", meta["tokens"]) if meta["mask"] else None
        return meta, tokens, mask, np.load(folder / "offsets.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"the token shard {folder} is damaged ({type(e).__name__}: {e}): delete it and run "
            "again"
        ) from e


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    """(size,) array of a file. An empty file, as of a shard without documents, cannot be mapped."""
    if size == 0:
        return np.zeros(0, dtype=dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", shape=(size,))
    return np.asarray(mapped)  # the subclass is slow
