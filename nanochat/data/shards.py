"""
Text -> token shards on the disk: each text is tokenised once, with all cores, and read ever after through a memory map.

A shard is a folder: tokens.bin (uint16, or uint32 when the vocabulary needs it), offsets.npy (int64: where each document begins, and the
end), mask.bin for conversations (uint8: 1 = to be predicted) and meta.json. Every document starts with <|bos|>. The folder's name holds
a hash of what it was made from (files, sizes, times, split, tokenizer): what changed is made anew, what did not is reused.
A shard is built beside and renamed: it is whole or absent, and an interrupted run goes on with the next one.
It refuses to open a shard that was cut short, and never mixes tokens of two tokenizers.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanochat.base.common import UserError, base_dir, duration, human, notice, rank
from nanochat.base.files import atomic_write
from nanochat.data.sources import Source, parts

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer

FORMAT = 1
BATCH_CHARACTERS = 1 << 21  # of one call of the tokenizer: bounds memory, and keeps all cores busy


class Shards:
    """
    Token shards seen as one list of documents. Reads nothing but the pages it is asked for.
    lengths: (documents,) int64, tokens of each with its <|bos|>; total: their sum; text_bytes: UTF-8 bytes of the texts, 0 for
    conversations; sha256: of every token and border.
    """

    def __init__(self, name: str, folders: Sequence[Path]):
        self.name = name
        metas = [_read_meta(folder) for folder in folders]
        if len({(m["tokenizer"], m["vocab_size"], m["bos"]) for m in metas}) != 1:
            raise UserError(
                f"the token shards of {name} are from different tokenizers: delete {folders[0].parent} and start again"
            )
        self.fingerprint: str = metas[0]["tokenizer"]
        self.vocab_size: int = metas[0]["vocab_size"]
        self.bos: int = metas[0]["bos"]
        self.text_bytes: int = sum(m["text_bytes"] for m in metas)
        self.sha256 = hashlib.sha256("".join(m["sha256"] for m in metas).encode()).hexdigest()
        self._tokens = [
            _map(folder / "tokens.bin", m["dtype"])
            for folder, m in zip(folders, metas, strict=True)
        ]
        self._masks = [
            _map(folder / "mask.bin", "uint8") if m["mask"] else None
            for folder, m in zip(folders, metas, strict=True)
        ]
        self._offsets = [np.load(folder / "offsets.npy", mmap_mode="r") for folder in folders]
        self._first = np.cumsum([0] + [m["documents"] for m in metas])
        self.lengths = np.concatenate([np.diff(o) for o in self._offsets])
        self.total = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def masked(self) -> bool:
        """Whether the documents say which of their tokens are to be predicted."""
        return any(m is not None for m in self._masks)

    def _span(self, i: int) -> tuple[int, int, int]:
        part = int(np.searchsorted(self._first, i, side="right")) - 1 if len(self._first) > 2 else 0
        offsets, i = self._offsets[part], i - int(self._first[part])
        return part, int(offsets[i]), int(offsets[i + 1])

    def tokens(self, i: int) -> np.ndarray:
        """Document i: (lengths[i],) uint16 or uint32, a view of the file."""
        part, start, stop = self._span(i)
        return self._tokens[part][start:stop]

    def mask(self, i: int) -> np.ndarray | None:
        """(lengths[i],) uint8: 1 where document i's token is to be predicted; None = everywhere."""
        part, start, stop = self._span(i)
        mask = self._masks[part]
        return None if mask is None else mask[start:stop]


def prepare(
    source: Source, split: str, tokenizer: "Tokenizer", directory: Path | None = None
) -> Shards:
    """The documents of a split ("train", "val"), tokenised now or found where an earlier run left them, by default base_dir()/tokens."""
    root = Path(directory or base_dir() / "tokens")
    todo = parts(source, split)
    folders = [root / f"{source.name}-{split}-{_key(part.identity, tokenizer)}" for part in todo]
    total = sum(part.size for part in todo) if split == "train" else None
    with _lock(root, folders), _Progress(f"tokenising {source.name} ({split})", total) as progress:
        for part, folder in zip(todo, folders, strict=True):
            if _usable(folder):
                progress.skip(part.size)
                continue
            with _build(folder, tokenizer, masked=False) as writer:
                for ids, n_bytes in _encode(part.read(), tokenizer):
                    writer.add(ids, None, n_bytes)
                    progress.add(n_bytes, sum(map(len, ids)))
        shards = Shards(source.name, folders)
    if not len(shards):
        raise UserError(
            f"data source {source.name} has no text in its {split} split: give it more documents"
        )
    return shards


def prepare_conversations(
    name: str,
    conversations: Iterable[dict],
    tokenizer: "Tokenizer",
    directory: Path | None = None,
    identity: str | None = None,
) -> Shards:
    """
    Conversations, rendered with their supervision masks, in their order. `identity` names what they are made from (a seed and a count, a
    file's hash): when an earlier run rendered the same, `conversations` is not even iterated. Without it they are rendered every time.
    """
    root = Path(directory or base_dir() / "tokens")
    folder = root / f"{name}-{_key({'conversations': identity}, tokenizer)}"
    with _lock(root, [folder] if identity else []):
        if identity is None or not _usable(folder):
            with (
                _build(folder, tokenizer, masked=True) as writer,
                _Progress(f"rendering {name}", None) as progress,
            ):
                for conversation in conversations:
                    ids, mask = tokenizer.render_conversation(conversation)
                    writer.add([ids], [mask], 0)
                    progress.add(0, len(ids))
                if not writer.lengths:
                    raise UserError(f"there are no conversations in {name}: give at least one")
        return Shards(name, [folder])


def _key(identity: dict, tokenizer: "Tokenizer") -> str:
    return hashlib.sha256(
        json.dumps([FORMAT, identity, tokenizer.fingerprint], sort_keys=True).encode()
    ).hexdigest()[:16]


def _encode(documents: Iterator[str], tokenizer: "Tokenizer") -> Iterator[tuple[list, int]]:
    """Batches of (ids of each document, UTF-8 bytes of all): one batch is tokenised, by all cores, while the next is read."""
    with ThreadPoolExecutor(1) as ahead:
        running = None
        for batch in _batches(documents):
            following = (
                ahead.submit(tokenizer.encode_batch, batch, bos=True),
                sum(len(text.encode()) for text in batch),
            )
            if running:
                yield running[0].result(), running[1]
            running = following
        if running:
            yield running[0].result(), running[1]


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    def __init__(self, folder: Path, tokenizer: "Tokenizer", masked: bool):
        self.folder, self.tokenizer = folder, tokenizer
        self.dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
        self.files = [
            open(folder / name, "wb")  # noqa: SIM115
            for name in (["tokens.bin", "mask.bin"] if masked else ["tokens.bin"])
        ]
        self.hash, self.lengths, self.text_bytes = hashlib.sha256(), [], 0

    def add(self, documents: Sequence, masks: Sequence | None, n_bytes: int) -> None:
        columns = (
            [(documents, self.dtype)]
            if masks is None
            else [(documents, self.dtype), (masks, np.dtype("uint8"))]
        )
        for file, (column, dtype) in zip(self.files, columns, strict=True):
            data = np.concatenate([np.asarray(values, dtype=dtype) for values in column]).tobytes()
            self.hash.update(data)
            file.write(data)
        self.lengths.extend(map(len, documents))
        self.text_bytes += n_bytes

    def finish(self) -> None:
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.hash.update(offsets.tobytes())
        np.save(self.folder / "offsets.npy", offsets)
        meta = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "bos": self.tokenizer.bos,
            "dtype": self.dtype.name,
            "mask": len(self.files) == 2,
            "documents": len(self.lengths),
            "tokens": int(offsets[-1]),
            "text_bytes": self.text_bytes,
            "sha256": self.hash.hexdigest(),
        }
        atomic_write(self.folder / "meta.json", json.dumps(meta, indent=1))


@contextmanager
def _build(folder: Path, tokenizer: "Tokenizer", masked: bool) -> Iterator[_Writer]:
    """Write a shard beside `folder` and rename it when it is whole; a failure leaves nothing behind."""
    beside = folder.with_name(f".build-{folder.name}-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        writer = _Writer(beside, tokenizer, masked)
        yield writer
        writer.finish()
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)
    except OSError as e:
        raise UserError(
            f"cannot write tokens to {folder} ({e.strerror}): free some space or set NANOCHAT_BASE_DIR to another disk"
        ) from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _lock(root: Path, folders: list[Path]) -> Iterator[None]:
    """One process builds; others (ranks, runs) wait and find it done. The lock dies with its process; none is taken if all is there."""
    if folders and all(_usable(folder) for folder in folders):
        yield
        return
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        for abandoned in root.glob(
            ".build-*"
        ):  # of a run that was killed: whoever holds the lock is the only builder
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


def _usable(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        _read_meta(folder)
    except UserError as e:
        notice(f"{e}; tokenising again")
        return False
    return True


def _read_meta(folder: Path) -> dict:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {
            "tokens.bin": meta["tokens"] * np.dtype(meta["dtype"]).itemsize,
            "offsets.npy": 128 + 8 * (meta["documents"] + 1),
        }
        sizes |= {"mask.bin": meta["tokens"]} if meta["mask"] else {}
        wrong = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"the token shard {folder} is damaged ({type(e).__name__}): delete it and run again"
        ) from e
    if wrong:
        raise UserError(
            f"the token shard {folder} is damaged ({wrong[0]} has not the size that meta.json states): delete it and run again"
        )
    return meta


def _map(path: Path, dtype: str) -> np.ndarray:
    # A memory map cannot be empty, a shard can: a group of files without a single validation document. asarray drops the slow subclass.
    return (
        np.asarray(np.memmap(path, dtype=dtype, mode="r"))
        if path.stat().st_size
        else np.zeros(0, dtype=dtype)
    )


class _Progress:
    """A bar on a terminal, shown once the work has taken two seconds, and a closing line of figures."""

    def __init__(self, label: str, total: int | None):
        self.label, self.total, self.bar, self.task = label, total, None, None
        self.began, self.bytes, self.tokens, self.skipped = time.monotonic(), 0, 0, 0

    def skip(self, size: int) -> None:
        self.skipped += size

    def add(self, n_bytes: int, n_tokens: int) -> None:
        self.bytes += n_bytes
        self.tokens += n_tokens
        if self.bar is None and rank() == 0 and time.monotonic() - self.began > 2:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            console = Console(stderr=True)
            label, done = TextColumn("{task.description}"), TextColumn("{task.fields[done]}")
            columns = label, BarColumn(), done, TimeElapsedColumn(), TimeRemainingColumn()
            self.bar = Progress(
                *columns, console=console, transient=True, disable=not console.is_terminal
            )
            self.task = self.bar.add_task(self.label, total=self.total, done="")
            self.bar.start()
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=self.skipped + self.bytes, done=self.figures())

    def figures(self) -> str:
        rate = self.bytes / (time.monotonic() - self.began)
        return f"{human(self.tokens)} tokens" + (
            f" of {human(self.bytes)}B text, {human(rate)}B/s" if self.bytes else ""
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error) -> None:
        if self.bar:
            self.bar.stop()
            if error[0] is None:
                notice(f"{self.label}: {self.figures()}, {duration(time.monotonic() - self.began)}")
