"""
Finds documents that are nearly equal to an earlier one: those that share at least SIMILAR of their
5-word sequences, as estimated from sketches of them.

A sketch holds the hashes of a document's sequences that are below a limit, which is chosen so that
about KEPT of them are. A sequence is kept by its hash, not by its place, so two documents keep the
same ones of those that they share. The hashes of two sketches below the lower of their limits are
a fair sample of both documents (Beyer et al. 2007, "distinct-value estimation under multiset
operations"). With 128 hashes, an estimate of 0.8 is within 0.07 in 95 of 100 cases. Only documents
that share one of their LOWEST smallest hashes are compared; 0.2 % of the pairs with 0.8 in common
share none.

Words end at white space of ASCII and are hashed by their first and last 8 bytes and their length,
all of a batch at once with numpy: about 100 MB/s.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from nanochat.data.ahead import batches

SIMILAR = 0.8
SHORTEST = 50  # words; shorter documents are not compared
SHINGLE = 5  # words
KEPT = 128  # hashes of a document, about
FEWEST = 32  # if a repetitive document would keep fewer hashes, its lowest KEPT ones are kept
LOWEST = 4
PROBES = 4  # documents that the index holds per hash, at most
BATCH_CHARACTERS = 1 << 18  # small enough for the caches
FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, of mixed bits
HIGHEST = (1 << 64) - 1
T = TypeVar("T")


class Sketch(NamedTuple):
    """(n,) uint64: the different hashes up to `limit` of a document, in ascending order."""

    hashes: np.ndarray
    limit: int

    def similarity(self, other: "Sketch") -> float:
        """The estimated share of sequences in common, 0 to 1."""
        limit = np.uint64(min(self.limit, other.limit))
        a, b = (s.hashes[: np.searchsorted(s.hashes, limit, "right")] for s in (self, other))
        common = len(np.intersect1d(a, b, assume_unique=True))
        return common / max(1, len(a) + len(b) - common)


class Similar:
    """The sketches of earlier documents, to compare later ones with."""

    def __init__(self) -> None:
        self.sketches: list[Sketch] = []
        self.index: dict[int, int] = {}  # hash, or one of the PROBES next numbers -> sketch

    def to_an_earlier_one(self, sketch: Sketch | None) -> bool:
        """Whether a document is similar to an earlier one; if not, it is remembered."""
        if sketch is None:
            return False
        lowest, free, compared = sketch.hashes[:LOWEST].tolist(), [], set[int]()
        for low in lowest:
            for place in range(low, low + PROBES):
                if (i := self.index.get(place)) is None:
                    free.append(place)
                    break
                if i not in compared and self.sketches[i].similarity(sketch) >= SIMILAR:
                    return True
                compared.add(i)
        self.index.update(dict.fromkeys(free, len(self.sketches)))
        self.sketches.append(sketch)
        return False


def sketched(items: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T, Sketch | None]]:
    """Texts and what belongs to them, with their sketches; None for texts that are too short."""
    for batch in batches(items, lambda item: len(item[0]), BATCH_CHARACTERS):
        found = sketches([text for text, _ in batch])
        for (text, other), sketch in zip(batch, found, strict=True):
            yield text, other, sketch


def sketches(texts: Sequence[str]) -> list[Sketch | None]:
    """The sketch of each text, None for a text of fewer than SHORTEST words."""
    encoded = [text.encode() for text in texts]
    words, starts = _words(b"\n".join([b" " * 7, *encoded, b" " * 8]))
    bounds = np.cumsum([8, *(len(text) + 1 for text in encoded)])
    first = np.searchsorted(starts, bounds)  # word of each text
    sequences = _sequences(words)
    counts = np.diff(first) - SHINGLE + 1  # sequences of each text
    shares = np.minimum(1.0, KEPT / np.maximum(counts, 1))
    limits = [HIGHEST if share == 1 else int(share * HIGHEST) for share in shares.tolist()]
    out: list[Sketch | None] = []
    for begin, count, limit in zip(first.tolist(), counts.tolist(), limits, strict=False):
        if count <= SHORTEST - SHINGLE:
            out.append(None)
            continue
        own = sequences[begin : begin + count]
        hashes = np.unique(own[own <= np.uint64(limit)])
        if len(hashes) < min(FEWEST, count):
            hashes = np.unique(own)[:KEPT]
            limit = int(hashes[-1]) if len(hashes) == KEPT else HIGHEST
        out.append(Sketch(hashes, limit))
    return out


def _words(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """
    The hashes of the words of a text, and where they begin: (words,) uint64 and int64. The text has
    at least 7 characters of white space in front of the first word and 8 behind the last.
    """
    space = np.frombuffer(data, np.uint8) <= 32
    edges = np.flatnonzero(space[:-1] != space[1:]) + 1
    starts, ends = edges[::2], edges[1::2]
    eight = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # the 8 bytes from each place on
    lengths = ends - starts
    outside = (8 * (8 - np.minimum(lengths, 8))).astype(np.uint64)
    words = ((eight[starts] << outside) * FIRST) ^ (eight[ends - 8] >> outside)
    words += lengths.astype(np.uint64)
    return _mixed(words), starts


def _sequences(words: np.ndarray) -> np.ndarray:
    """(words,) uint64 -> (words - 4,): the hash of each five words in a row."""
    n = max(0, len(words) - SHINGLE + 1)
    total = np.zeros(n, np.uint64)
    for i in range(SHINGLE):
        total = total * SECOND + words[i : i + n]
    return _mixed(total)


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 hashes whose highest bits depend on all bits."""
    values = values * FIRST
    values ^= values >> np.uint64(32)
    return values * SECOND
