"""
Documents -> rows: the only packer. Pure: it sees lengths and returns indices, reads no token and draws no random number.

A row has `width` places. It opens with the longest document left and goes on with whichever fits best: one or two that fill it exactly,
else the longest that it still holds. (Best-fit decreasing, Johnson et al., 1974, without the look at pairs left twice the padding.)
Only a document longer than a row is split: its first piece fills a row, and every later piece begins with a fresh <|bos|> that stands
for what came before. Its last piece is split again where that fills a hole which nothing else fits. So every row starts with <|bos|>,
and since that is the only token of a row that is never predicted, no token of a text is dropped, repeated or left unpredicted.
It refuses to choose, order or shuffle: that is the feed's.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Pieces sorted by row: piece p is tokens start[p]:stop[p] of document[p]; row r holds the pieces first[r]:first[r + 1]."""

    document: np.ndarray  # (pieces,) int64
    start: np.ndarray  # (pieces,) int64; above 0 for the later pieces of a split document, which take one place more for their <|bos|>
    stop: np.ndarray  # (pieces,) int64
    first: np.ndarray  # (rows + 1,) int64

    def __len__(self) -> int:
        return len(self.first) - 1


def pack(lengths: np.ndarray, width: int, begin: np.ndarray | None = None) -> Packing:
    """
    Pack documents of `lengths` tokens (their <|bos|> included) into rows of `width` places. Documents of length 0 take no part. Where
    `begin` is given, tokens begin[d]:lengths[d] of each are packed, what is left of documents whose start was used before.
    The same lengths give the same rows. One or two seconds for a million documents.
    """
    if width < 2:
        raise ValueError(f"a row of {width} places predicts nothing")
    lengths = np.asarray(lengths, dtype=np.int64)
    begin = np.zeros_like(lengths) if begin is None else np.asarray(begin, dtype=np.int64)
    # A document longer than a row fills rows with its first `width` tokens, then with width - 1 and a <|bos|>, as long as some are left.
    first = begin + width - (begin > 0)  # where the first row that it fills would stop
    full = np.where(lengths > first, -((first - lengths) // (width - 1)), 0)
    document = np.repeat(np.arange(len(lengths)), full)
    number = np.arange(len(document)) - np.repeat(np.cumsum(full) - full, full)
    stop = first[document] + number * (width - 1)
    start = np.where(number > 0, stop - (width - 1), begin[document])
    begin = np.where(full > 0, first + (full - 1) * (width - 1), begin)  # of what is left
    pieces, rows = _best_fit(lengths, begin, width)
    pieces = np.array(pieces, dtype=np.int64).reshape(-1, 4)
    row = np.concatenate([np.arange(len(document)), pieces[:, 3] + len(document)])
    document, start, stop = (
        np.concatenate([a, pieces[:, i]]) for i, a in enumerate((document, start, stop))
    )
    order = np.lexsort(
        (start, document, row)
    )  # within a row as the documents came: not longest first, which would bias positions
    counts = np.bincount(row, minlength=len(row) and rows)
    return Packing(
        document[order],
        start[order],
        stop[order],
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def one_a_row(lengths: np.ndarray, width: int) -> Packing:
    """One document a row, those longer than `width` tokens truncated: the layout of finetuning."""
    lengths = np.asarray(lengths, dtype=np.int64)
    n = len(lengths)
    return Packing(
        np.arange(n), np.zeros(n, dtype=np.int64), np.minimum(lengths, width), np.arange(n + 1)
    )


def _best_fit(
    lengths: np.ndarray, begin: np.ndarray, width: int
) -> tuple[list[tuple[int, int, int, int]], int]:
    """Place tokens begin[d]:lengths[d] of each document, split or not if begin[d] > 0. -> pieces (document, start, stop, row); rows."""
    left: list[list[tuple[int, int, int]]] = [
        [] for _ in range(width + 1)
    ]  # (document, start, stop) by size, those to be split first
    used = mirror = tails = (
        0  # bit n of used, bit width - n of mirror: size n is left; bit n of tails: with one that may be split
    )
    smallest = max(
        2, width // 16
    )  # a hole below this stays one: a piece put there would hardly have a context

    def add(d: int, start: int, stop: int) -> None:
        nonlocal used, mirror, tails
        size = stop - start + (start > 0)
        used, mirror = used | 1 << size, mirror | 1 << width - size
        tails |= (start > 0) << size
        left[size].insert(0 if start else len(left[size]), (d, start, stop))

    def take(size: int, which: int = -1) -> tuple[int, int, int]:
        nonlocal used, mirror, tails
        piece = left[size].pop(which)
        if not left[size]:
            used, mirror = used ^ 1 << size, mirror ^ 1 << width - size
        if not left[size] or not left[size][0][1]:
            tails &= ~(1 << size)
        return piece

    def fitting(free: int) -> int:
        """The size to go on with in a row with `free` places, 0 if none is left that fits."""
        if used >> free & 1:
            return free
        pairs = used & mirror >> width - free & (1 << free) - 2  # sizes n with another of free - n
        if free % 2 == 0 and len(left[free // 2]) < 2:
            pairs &= ~(1 << free // 2)
        if (
            upper := pairs >> (free + 1) // 2
        ):  # the most equal pair: very short documents stay, which fit anywhere
            return (free + 1) // 2 + (upper & -upper).bit_length() - 1
        return max(0, (used & (1 << free) - 1).bit_length() - 1)

    for d, start, stop in zip(range(len(lengths)), begin.tolist(), lengths.tolist(), strict=True):
        if stop:
            add(d, start, stop)
    pieces, row = [], 0
    while used:
        free = width
        while size := fitting(free):
            pieces.append((*take(size), row))
            free -= size
        if free >= smallest and (longer := tails >> free + 1):
            d, start, stop = take(free + longer.bit_length(), 0)
            pieces.append((d, start, start + free - 1, row))
            add(d, start + free - 1, stop)
        row += 1
    return pieces, row
