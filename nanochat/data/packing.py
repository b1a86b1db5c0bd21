"""
Documents -> rows: the only packer. It sees lengths and returns indices; it reads no token, draws no
random number, and leaves choosing, ordering and shuffling to order.py.

A row has `width` places. It starts with the longest document that is left and continues with
whatever fits best: one or two documents that fill it exactly, else the longest that fits. (This is
best-fit decreasing, Johnson et al., 1974; without the look at pairs there was twice the padding.)
Only documents longer than a row are split: the first piece fills a row, and each later piece begins
with a new <|bos|> in place of what came before. The last piece is split again where that fills a
hole that nothing else fits. So every row starts with <|bos|>, the only token of a row that is never
predicted, and no token of a text is dropped, repeated or left unpredicted.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """
    Pieces sorted by row: piece p is tokens start[p]:stop[p] of document[p], and row r holds the
    pieces first[r]:first[r + 1]. A piece with start > 0 takes one more place, for its <|bos|>.
    """

    document: np.ndarray  # (pieces,) int64
    start: np.ndarray  # (pieces,) int64
    stop: np.ndarray  # (pieces,) int64
    first: np.ndarray  # (rows + 1,) int64

    def __len__(self) -> int:
        return len(self.first) - 1


def pack(lengths: np.ndarray, width: int, begin: np.ndarray | None = None) -> Packing:
    """
    Pack documents of `lengths` tokens, their <|bos|> included, into rows of `width` places. Given
    `begin`, only tokens begin[d]:lengths[d] of each document are packed, the rest of documents
    whose start was used before. Documents of length 0 are left out. The same lengths give the same
    rows; a million documents take one or two seconds.
    """
    if width < 2:
        raise ValueError(f"a row of {width} places predicts nothing")
    lengths = np.asarray(lengths, dtype=np.int64)
    begin = np.zeros_like(lengths) if begin is None else np.asarray(begin, dtype=np.int64)
    # A document longer than a row fills whole rows: `width` tokens in the first, then width - 1
    # and a <|bos|> in each further one
    first_stop = begin + width - (begin > 0)
    full = np.where(lengths > first_stop, -((first_stop - lengths) // (width - 1)), 0)
    document = np.repeat(np.arange(len(lengths)), full)
    number = np.arange(len(document)) - np.repeat(np.cumsum(full) - full, full)
    stop = first_stop[document] + number * (width - 1)
    start = np.where(number > 0, stop - (width - 1), begin[document])
    begin = np.where(full > 0, first_stop + (full - 1) * (width - 1), begin)  # of the last piece
    pieces, rows = _best_fit(lengths, begin, width)
    pieces = np.array(pieces, dtype=np.int64).reshape(-1, 4)
    row = np.concatenate([np.arange(len(document)), pieces[:, 3] + len(document)])
    document = np.concatenate([document, pieces[:, 0]])
    start = np.concatenate([start, pieces[:, 1]])
    stop = np.concatenate([stop, pieces[:, 2]])
    # Within a row in the order of the documents: longest first would bias positions
    order = np.lexsort((start, document, row))
    counts = np.bincount(row, minlength=len(row) and rows)
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Packing(document[order], start[order], stop[order], first)


def one_a_row(lengths: np.ndarray, width: int) -> Packing:
    """One document per row, truncated at `width` tokens: the layout of finetuning."""
    n = len(lengths)
    stop = np.minimum(np.asarray(lengths, dtype=np.int64), width)
    return Packing(np.arange(n), np.zeros(n, dtype=np.int64), stop, np.arange(n + 1))


def _best_fit(
    lengths: np.ndarray, begin: np.ndarray, width: int
) -> tuple[list[tuple[int, int, int, int]], int]:
    """
    Place tokens begin[d]:lengths[d] of each document; those with begin[d] > 0 may be split. Returns
    pieces (document, start, stop, row) and the number of rows.
    """
    # Pieces (document, start, stop) by size; those that may be split come first
    by_size: list[list[tuple[int, int, int]]] = [[] for _ in range(width + 1)]
    # Bit n of `sizes` and bit width - n of `mirrored`: by_size[n] has pieces. Bit n of
    # `splittable`: by_size[n] has one that may be split.
    sizes = mirrored = splittable = 0
    smallest_hole = max(2, width // 16)  # a piece in a smaller one would have hardly any context

    def add(document: int, start: int, stop: int) -> None:
        nonlocal sizes, mirrored, splittable
        size = stop - start + (start > 0)
        sizes, mirrored = sizes | 1 << size, mirrored | 1 << width - size
        splittable |= (start > 0) << size
        by_size[size].insert(0 if start else len(by_size[size]), (document, start, stop))

    def take(size: int, which: int = -1) -> tuple[int, int, int]:
        nonlocal sizes, mirrored, splittable
        piece = by_size[size].pop(which)
        if not by_size[size]:
            sizes, mirrored = sizes ^ 1 << size, mirrored ^ 1 << width - size
        if not by_size[size] or not by_size[size][0][1]:
            splittable &= ~(1 << size)
        return piece

    def best_size(free: int) -> int:
        """The size of the next piece in a row with `free` places; 0 if nothing fits."""
        if sizes >> free & 1:
            return free
        # Sizes n for which there is also a piece of free - n
        pairs = sizes & mirrored >> width - free & (1 << free) - 2
        half = (free + 1) // 2
        if free % 2 == 0 and len(by_size[half]) < 2:
            pairs &= ~(1 << half)
        if (
            upper := pairs >> half
        ):  # the most equal pair, to keep short documents, which fit anywhere
            return half + (upper & -upper).bit_length() - 1
        return max(0, (sizes & (1 << free) - 1).bit_length() - 1)

    for d, start, stop in zip(range(len(lengths)), begin.tolist(), lengths.tolist(), strict=True):
        if stop:
            add(d, start, stop)
    pieces, row = [], 0
    while sizes:
        free = width
        while size := best_size(free):
            pieces.append((*take(size), row))
            free -= size
        if free >= smallest_hole and (longer := splittable >> free + 1):
            document, start, stop = take(free + longer.bit_length(), 0)
            pieces.append((document, start, start + free - 1, row))
            add(document, start + free - 1, stop)
        row += 1
    return pieces, row
