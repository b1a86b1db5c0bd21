"""
The order of rows: a pure function of the data, the seed and the row length.

Each source is shuffled as a whole, once per epoch. Blocks of about two million tokens are drawn
from the sources by their weights and packed, and the rows of a block are shuffled. A position is
therefore a few numbers, and resuming costs the packing of one block. Where the row length changes
within a block, the rest of the block is packed again at the new length; no token is lost or
repeated.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from nanochat.base.strangers import missing
from nanochat.data.packing import Packing, one_a_row, pack
from nanochat.data.shards import Shards

BLOCK_TOKENS = 1 << 21  # enough for the packer to leave no holes, few enough to pack quickly
IGNORED = -1  # a target that takes no part in the loss
Mode = Literal["packed", "padded"]
State = dict[str, Any]  # a position in the order, as JSON can hold it


@dataclass(frozen=True, eq=False)
class Block:
    """Packed documents: document d of the packing is document[d] of shards[owner[d]]."""

    shards: Sequence[Shards]
    owner: np.ndarray  # (documents,) int64
    document: np.ndarray  # (documents,) int64
    packing: Packing

    def repacked(self, rows: np.ndarray, sequence_len: int) -> "Block":
        """The documents of these rows at another length; adjacent pieces of a document join."""
        p = self.packing
        row_of_piece = np.repeat(np.arange(len(p)), np.diff(p.first))
        pieces = np.flatnonzero(np.isin(row_of_piece, rows))
        pieces = pieces[np.lexsort((p.start[pieces], p.document[pieces]))]
        document, start, stop = p.document[pieces], p.start[pieces], p.stop[pieces]
        separate = (document[1:] != document[:-1]) | (start[1:] != stop[:-1])
        first = np.append(True, separate)[: len(pieces)]
        last = np.append(separate, True)[: len(pieces)]
        document = document[first]
        packing = pack(stop[last], sequence_len + 1, start[first])
        return Block(self.shards, self.owner[document], self.document[document], packing)

    def fill(self, row: int, ids: np.ndarray, targets: np.ndarray) -> None:
        """Write a row into arrays of <|bos|> and of IGNORED, (sequence_len + 1,) each."""
        p, place = self.packing, 0
        for piece in range(int(p.first[row]), int(p.first[row + 1])):
            d, start, stop = int(p.document[piece]), int(p.start[piece]), int(p.stop[piece])
            shard, i = self.shards[self.owner[d]], int(self.document[d])
            mask = shard.mask(i)
            if start > 0:  # a later piece of a document: ids already has its <|bos|> here
                targets[place] = shard.bos if mask is None else IGNORED
                place += 1
            span = slice(place, place + stop - start)
            ids[span] = targets[span] = shard.tokens(i)[start:stop]
            if mask is not None:
                targets[span][mask[start:stop] == 0] = IGNORED
            place = span.stop


def pack_block(
    shards: Sequence[Shards],
    owner: np.ndarray,
    document: np.ndarray,
    sequence_len: int,
    mode: Mode = "packed",
) -> Block:
    """Documents document[d] of shards[owner[d]], packed into rows of sequence_len + 1 tokens."""
    lengths = np.zeros(len(document), dtype=np.int64)
    for i, shard in enumerate(shards):
        lengths[owner == i] = shard.lengths[document[owner == i]]
    packing = (pack if mode == "packed" else one_a_row)(lengths, sequence_len + 1)
    return Block(shards, owner, document, packing)


@dataclass(frozen=True)
class RowOrder:
    """
    The order in which a feed draws its rows. Holds no state: `start` and `rows` return positions as
    dicts that JSON can hold.
    """

    shards: tuple[Shards, ...]
    weights: tuple[float, ...]
    sequence_len: int
    epochs: int | None  # None: endless
    seed: int
    mode: Mode

    @property
    def total(self) -> int:
        """Tokens of all sources."""
        return sum(s.total for s in self.shards)

    @property
    def quota(self) -> list[int]:
        """Tokens that each source contributes to an epoch."""
        return [round(self.total * weight / sum(self.weights)) for weight in self.weights]

    def rows_per_epoch(self) -> float:
        """
        About how many rows an epoch has. A padded row holds one document; packed rows are assumed
        to be as full as those of the first block.
        """
        if self.mode == "padded":
            sources = zip(self.quota, self.shards, strict=True)
            return sum(q * len(s) / s.total for q, s in sources)
        packing = next(self.rows(self.start()))[0].packing
        drawn = int((packing.stop - packing.start).sum())
        return sum(self.quota) * len(packing) / drawn

    def start(self) -> State:
        """The position before the first row."""
        return {
            "seed": self.seed,
            "sequence_len": self.sequence_len,
            "epochs": self.epochs,
            "documents": [len(s) for s in self.shards],
            "tokens": [s.total for s in self.shards],
            "quota": self.quota,
            "sha256": [s.sha256 for s in self.shards],
            "step": 0,
            "progress": 0.0,
            "epoch": 0,
            "block": 0,
            "row": 0,  # rows taken from the block
            "cuts": [],  # [sequence_len, rows taken] of each earlier packing of the block
            # Where the block begins in each source; drawn: tokens drawn in this epoch
            "sources": [{"epoch": 0, "document": 0, "drawn": 0} for _ in self.shards],
        }

    @property
    def blocks(self) -> int:
        """Blocks of an epoch."""
        return max(1, round(self.total / BLOCK_TOKENS))

    def fault(self, position: State) -> str:
        """
        Why no run over these sources can be at this position; "" if one can. The types of the
        values are not checked.
        """
        start = self.start()
        if absent := missing(position, sorted(start)):
            return absent
        sources = position["sources"]
        if position["block"] >= self.blocks or len(sources) != len(self.shards):
            return f"block {position['block']} of {self.blocks}, in {len(sources)} sources"
        for source, shards in zip(sources, self.shards, strict=True):
            if missing(source, [*start["sources"][0]]) or source["document"] > len(shards):
                return f"{source} of {len(shards)} documents"
        lengths = [position["sequence_len"], *(cut[0] for cut in position["cuts"] if len(cut) == 2)]
        if len(lengths) <= len(position["cuts"]) or not all(0 < n <= 2**20 for n in lengths):
            return f"rows of {position['sequence_len']} tokens after the cuts {position['cuts']}"
        return ""

    def rows(self, position: State) -> Iterator[tuple[Block, int, State]]:
        """(block, row in it, changed fields of the position) of every row after `position`."""
        epoch, number = position["epoch"], position["block"]
        first, cuts = position["row"], position["cuts"]
        sources, quota, blocks = position["sources"], self.quota, self.blocks

        @lru_cache(maxsize=len(self.shards))
        def shuffled_source(i: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
            """The documents of source i in the order of an epoch, and where each ends in tokens."""
            order = self._shuffled(len(self.shards[i]), epoch, i, 0)
            return order, np.cumsum(self.shards[i].lengths[order])

        while self.epochs is None or epoch < self.epochs:
            begin, sources = sources, [dict(s) for s in sources]
            before = sum(s["drawn"] for s in begin)
            # In integers, so that without weights the last document of an epoch meets the quota
            goals = [q * (number + 1) // blocks for q in quota]
            owner, document = _draw(sources, goals, shuffled_source)
            tokens = sum(s["drawn"] for s in sources) - before
            lengths = [*(length for length, _ in cuts), self.sequence_len]
            block = pack_block(self.shards, owner, document, lengths[0], self.mode)
            order = self._shuffled(len(block.packing), epoch, number, 1)
            for i, (_, taken) in enumerate(cuts, 1):
                used = tokens * taken / max(1, len(order))
                before, tokens = before + used, tokens - used
                block = block.repacked(order[taken:], lengths[i])
                order = self._shuffled(len(block.packing), epoch, number, 1, i)
            for row in range(first, len(order)):
                progress = 0.0
                if self.epochs:
                    drawn = before + tokens * (row + 1) / len(order)
                    progress = min(1.0, (epoch + drawn / sum(quota)) / self.epochs)
                yield (
                    block,
                    int(order[row]),
                    {
                        "epoch": epoch,
                        "block": number,
                        "row": row + 1,
                        "cuts": cuts,
                        "sources": begin,
                        "progress": progress,
                    },
                )
            number, first, cuts = number + 1, 0, []
            if number == blocks:
                epoch, number = epoch + 1, 0
                for source, q in zip(sources, quota, strict=True):
                    source["drawn"] -= q  # tokens beyond the quota count towards the next epoch

    def _shuffled(self, n: int, *key: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *key]).permutation(n)


def _draw(
    sources: list[dict[str, int]],
    goals: list[int],
    shuffled_source: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """(owner, document) of the next block's documents; moves `sources` to its end."""
    owner, document = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for i, (source, goal) in enumerate(zip(sources, goals, strict=True)):
        while source["drawn"] < goal:
            order, ends = shuffled_source(i, source["epoch"])
            begin = source["document"]
            before = int(ends[begin - 1]) if begin else 0
            enough = int(np.searchsorted(ends, before + goal - source["drawn"])) + 1
            stop = min(enough, len(order))
            document.append(order[begin:stop])
            owner.append(np.full(stop - begin, i))
            source["drawn"] += int(ends[stop - 1]) - before
            source["document"] = stop
            if stop == len(order):
                source["epoch"], source["document"] = source["epoch"] + 1, 0
    return np.concatenate(owner), np.concatenate(document)


def at_length(position: State, length: int) -> State:
    """The position at which the rest of the block is packed again, into rows of another length."""
    cuts = [*position["cuts"], [position["sequence_len"], position["row"]]]
    return {**position, "sequence_len": length, "cuts": cuts, "row": 0}
