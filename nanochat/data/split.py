"""
The validation split: a document or a conversation belongs to it when a hash of its content is small
enough. Adding, moving or reordering files therefore moves nothing from one split to the other, and
two copies of a text are always in the same split.

A few long documents cannot be divided so: the one book among ten short texts would be all of
validation, or none of it. There, validation takes pieces from within the documents, each decided by
the hash of the piece, and training keeps what lies between them in one document.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nanochat.data.documents import MAX_CHARACTERS, cut_point

LEAST = 8  # documents that a small source gives to validation, but at most a tenth of them


def place(text: str) -> float:
    """Where a text falls in 0..1, decided by its content alone; the distribution is uniform."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def cutoff(places: Iterable[float], share: float) -> float | None:
    """
    The place up to which a text is validation: `share`, or more where that leaves fewer than LEAST
    different texts. Reads no further than it must, so a large source costs a few hundred texts.
    None if there are fewer than two different texts.
    """
    seen: set[float] = set()
    below = 0
    for p in places:
        below += p <= share and p not in seen
        seen.add(p)
        if below == LEAST:
            return share
    if len(seen) < 2:
        return None
    wanted = max(1, min(LEAST, len(seen) // 10))
    return max(share, heapq.nsmallest(wanted, seen)[-1])


MOST = 0.2  # of the characters; where validation would take more, it takes pieces of documents
PIECES = 100  # into which a source is then divided, as its size allows
SHORTEST_PIECE = 256  # characters


@dataclass(frozen=True)
class Division:
    """Texts with a place up to `share` are validation; with `piece`, pieces of that length are."""

    share: float
    piece: int | None = None

    def texts(self, document: str, split: str) -> Iterator[str]:
        """What a document gives to a split, "train" or "val"."""
        if self.piece is None:
            if (place(document) <= self.share) == (split == "val"):
                yield document
            return
        between: list[str] = []
        for piece in pieces(document, self.piece):
            if place(piece) > self.share:
                between.append(piece)
                continue
            if split == "val":
                yield from [piece.strip("\n")] * bool(piece.strip())
            elif (text := "".join(between).strip("\n")).strip():
                yield text
            between = []
        if split == "train" and (text := "".join(between).strip("\n")).strip():
            yield text


def division(documents: Iterable[str], share: float) -> Division | None:
    """
    How to divide a source of which validation is to have about `share`. Reads no more than cutoff.
    None if there are fewer than two different texts, even in pieces.
    """
    sizes: dict[float, int] = {}
    read: list[str] = []

    def places() -> Iterator[float]:
        for text in documents:
            where = place(text)
            sizes[where] = len(text)
            read.append(text)
            yield where

    limit = cutoff(places(), share)
    total = sum(sizes.values())
    if limit is not None and sum(n for p, n in sizes.items() if p <= limit) <= MOST * total:
        return Division(limit)
    piece = min(MAX_CHARACTERS, max(SHORTEST_PIECE, total // PIECES))
    in_pieces = (place(part) for text in read for part in pieces(text, piece))
    limit = cutoff(in_pieces, share)
    return None if limit is None else Division(limit, piece)


def pieces(text: str, limit: int) -> Iterator[str]:
    """A text in pieces of at most `limit` characters, cut as documents.py cuts; none is blank."""
    start, visible = 0, len(text.rstrip())
    while len(text) - start > limit:
        end = cut_point(text, start + limit // 2, start + limit)
        if end < visible:
            yield text[start:end]
            start = end
        else:
            break
    yield text[start:]
