"""
The validation split: a document or a conversation belongs to it when a hash of its content is small
enough. Adding, moving or reordering files therefore moves nothing from one split to the other, and
two copies of a text in one source are always in the same split. Two sources may hold out different
shares, so sources.training_sources() gives a notice if they read the same file.

A few long documents cannot be divided so: the one book among ten short texts would be all of
validation, or none of it. There, validation takes pieces from within the documents, each decided by
the hash of the piece, and training keeps what lies between them in one document.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from nanochat.data.documents import MAX_CHARACTERS, cut_point

LEAST = 8  # documents that a small source gives to validation, but at most a tenth of them
MOST = 0.2  # of the characters: if validation would take more, it takes pieces of documents
PIECES = 100  # pieces that such a source is divided into, if it is large enough
SHORTEST_PIECE = 256  # characters


def place(text: str) -> float:
    """Where a text falls in 0..1, decided by its content alone; the distribution is uniform."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def cutoff(places: Iterable[float], share: float) -> float | None:
    """
    The place up to which a text is validation: `share`, or more if that would leave fewer than
    LEAST different texts. Reads no further than necessary: a few hundred texts of a large source.
    None if there are fewer than two different texts.
    """
    seen: set[float] = set()
    below = 0
    for p in places:
        if p <= share and p not in seen:
            below += 1
        seen.add(p)
        if below == LEAST:
            return share
    if len(seen) < 2:
        return None
    wanted = max(1, min(LEAST, len(seen) // 10))
    return max(share, heapq.nsmallest(wanted, seen)[-1])


@dataclass(frozen=True)
class Division:
    """
    Documents whose place is at most `share` are validation; with `piece`, pieces of documents, of
    about that many characters, are.
    """

    share: float
    piece: int | None = None

    def texts(self, document: str, split: str) -> Iterator[str]:
        """What a document gives to a split, "train" or "val"."""
        if self.piece is None:
            if (place(document) <= self.share) == (split == "val"):
                yield document
            return
        val, train = [], [""]  # train: the text between two pieces of validation
        for piece in pieces(document, self.piece):
            if place(piece) > self.share:
                train[-1] += piece
            else:
                val.append(piece)
                train.append("")
        for text in train if split == "train" else val:
            if text.strip():
                yield text.strip("\n")


def division(documents: Iterable[str], share: float) -> Division | None:
    """
    How to divide a source of which validation should have about `share`. Reads as little as
    cutoff(). None if there are fewer than two different texts, even in pieces.
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
    if limit is not None and not is_too_much(sizes, limit):
        return Division(limit)
    piece = min(MAX_CHARACTERS, max(SHORTEST_PIECE, sum(sizes.values()) // PIECES))
    in_pieces = (place(part) for text in read for part in pieces(text, piece))
    limit = cutoff(in_pieces, share)
    return None if limit is None else Division(limit, piece)


def is_too_much(sizes: Mapping[float, int], limit: float) -> bool:
    """Whether texts {place: characters} with places up to `limit` have more than MOST of all."""
    return sum(n for p, n in sizes.items() if p <= limit) > MOST * sum(sizes.values())


def pieces(text: str, limit: int) -> Iterator[str]:
    """A text in pieces of at most `limit` characters, cut as documents.py does; none is blank."""
    start, visible = 0, len(text.rstrip())
    while len(text) - start > limit:
        end = cut_point(text, start + limit // 2, start + limit)
        if end >= visible:
            break
        yield text[start:end]
        start = end
    yield text[start:]
