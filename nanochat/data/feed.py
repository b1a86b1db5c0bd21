"""
Feeds: token shards -> the batches of one optimizer step after another.

The order of rows is a pure function of the data, the seed and the row length: each source is shuffled whole, once an epoch; blocks of
about two million tokens are drawn from the sources by their weights, packed, and their rows shuffled; a step takes the next `rows` rows.
Ranks and micro-batches only divide a step. So a position is a few numbers, and going on from it costs the packing of one block.
Where the row length changes in mid-block, what is left of the block is packed again at the new one: no token is lost or comes twice.
It refuses to resume on other data, and drops nothing silently: conversations cut in padded mode are counted and said.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from nanochat.base.common import UserError, notice
from nanochat.data.contexts import Contexts
from nanochat.data.packing import Packing, one_a_row, pack
from nanochat.data.shards import Shards

BLOCK_TOKENS = (
    1 << 21
)  # rows enough for best-fit to leave no holes, few enough that packing them again costs nothing
PREFETCH = 4  # steps made ahead
IGNORED = -1
Mode = Literal["packed", "padded"]


@dataclass(frozen=True)
class Batch:
    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -1 = ignored
    weights: torch.Tensor | None = None  # (B, T) float32; None = 1 everywhere


@dataclass(frozen=True, eq=False)
class _Block:
    """Packed documents: the d-th is document[d] of shards[owner[d]]."""

    shards: Sequence[Shards]
    owner: np.ndarray
    document: np.ndarray
    packing: Packing

    @classmethod
    def of(
        cls,
        shards: Sequence[Shards],
        owner: np.ndarray,
        document: np.ndarray,
        mode: Mode,
        sequence_len: int,
    ) -> "_Block":
        lengths = np.zeros(len(document), dtype=np.int64)
        for i, s in enumerate(shards):
            lengths[owner == i] = s.lengths[document[owner == i]]
        return cls(
            shards,
            owner,
            document,
            (pack if mode == "packed" else one_a_row)(lengths, sequence_len + 1),
        )

    def rest(self, rows: np.ndarray, sequence_len: int) -> "_Block":
        """What stands in these rows, packed again for another length; pieces of a document that meet become one."""
        p = self.packing
        pieces = np.flatnonzero(np.isin(np.repeat(np.arange(len(p)), np.diff(p.first)), rows))
        pieces = pieces[np.lexsort((p.start[pieces], p.document[pieces]))]
        document, start, stop = p.document[pieces], p.start[pieces], p.stop[pieces]
        opens = np.append(True, (document[1:] != document[:-1]) | (start[1:] != stop[:-1]))[
            : len(pieces)
        ]
        closes = np.append(opens[1:], True)[: len(pieces)]
        document = document[opens]
        packing = pack(stop[closes], sequence_len + 1, start[opens])
        return _Block(self.shards, self.owner[document], self.document[document], packing)

    def size(self, row: int) -> int:
        """Tokens of a padded row."""
        return int(self.packing.stop[row])

    def fill(self, row: int, ids: np.ndarray, targets: np.ndarray) -> None:
        """Write a row over arrays of <|bos|> and of IGNORED, (T + 1,) each."""
        p, at = self.packing, 0
        for piece in range(int(p.first[row]), int(p.first[row + 1])):
            d, start, stop = int(p.document[piece]), int(p.start[piece]), int(p.stop[piece])
            shard, i = self.shards[self.owner[d]], int(self.document[d])
            mask = shard.mask(i)
            if start > 0:  # a later piece: its <|bos|> is there already
                targets[at] = shard.bos if mask is None else IGNORED
                at += 1
            end = at + stop - start
            ids[at:end] = shard.tokens(i)[start:stop]
            targets[at:end] = (
                ids[at:end] if mask is None else np.where(mask[start:stop], ids[at:end], IGNORED)
            )
            at = end


def _materialise(
    rows: Sequence[tuple[_Block, int]], width: int, bos: int, at_least: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets) of rows, (max(rows, at_least), width) each; rows beyond those given are all ignored."""
    n = max(len(rows), at_least)
    ids, targets = (
        np.full((n, width + 1), bos, dtype=np.int64),
        np.full((n, width + 1), IGNORED, dtype=np.int64),
    )
    for i, (block, row) in enumerate(rows):
        block.fill(row, ids[i], targets[i])
    return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())


@dataclass(frozen=True)
class _Plan:
    """The order of all rows, and what this rank takes of them; no state, no thread."""

    shards: tuple[Shards, ...]
    weights: tuple[float | None, ...]
    rows: int
    sequence_len: int
    total_steps: int | None
    epochs: int | None
    seed: int
    rank: int
    world_size: int
    mode: Mode
    pin: bool

    @property
    def total(self) -> int:
        return sum(s.total for s in self.shards)

    @property
    def quota(self) -> list[int]:
        """Tokens of each source in an epoch."""
        weights = [
            s.total if w is None else w for s, w in zip(self.shards, self.weights, strict=True)
        ]
        return [round(self.total * w / sum(weights)) for w in weights]

    def start(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "sequence_len": self.sequence_len,
            "epochs": self.epochs,
            "documents": [len(s) for s in self.shards],
            "tokens": [s.total for s in self.shards],
            "quota": self.quota,
            "step": 0,
            "progress": 0.0,
            "epoch": 0,  # of the last row handed out; the next one is found from its block and the number of rows taken of it
            "block": 0,
            "row": 0,
            "cuts": [],  # [sequence_len, rows taken] of each packing that this block had before the present one
            "sources": [
                {"epoch": 0, "document": 0, "drawn": 0} for _ in self.shards
            ],  # where the block begins; drawn: tokens this epoch
        }

    def steps(
        self, state: dict[str, Any]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """(inputs, targets of this rank's rows, the state after it) of each step from `state` on."""
        stream = self._stream(state)
        while self.total_steps is None or state["step"] < self.total_steps:
            taken = []
            for block, row, after in stream:
                taken.append((block, row))
                state = {**state, **after}
                if len(taken) == self.rows:
                    break
            if not taken:
                return
            state = {**state, "step": state["step"] + 1}
            if self.total_steps:
                state["progress"] = min(
                    1.0,
                    max(
                        state["progress"] if self.epochs else 0.0, state["step"] / self.total_steps
                    ),
                )
            width = self.sequence_len
            if self.mode == "padded":  # few widths, so that a compiled model meets few shapes
                longest = max(block.size(row) for block, row in taken) - 1
                width = min(width, 64 * max(1, -(-longest // 64)))
            mine = taken[
                len(taken) * self.rank // self.world_size : len(taken)
                * (self.rank + 1)
                // self.world_size
            ]
            inputs, targets = _materialise(mine, width, self.shards[0].bos)
            yield (
                (inputs.pin_memory(), targets.pin_memory(), state)
                if self.pin
                else (inputs, targets, state)
            )

    def _stream(self, state: dict[str, Any]) -> Iterator[tuple[_Block, int, dict[str, Any]]]:
        """(block, row, the position behind it) for every row from a state on, until the epochs are over."""
        epoch, number, first, cuts = state["epoch"], state["block"], state["row"], state["cuts"]
        sources = [dict(s) for s in state["sources"]]
        quota, blocks = self.quota, max(1, round(self.total / BLOCK_TOKENS))
        orders: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        while self.epochs is None or epoch < self.epochs:
            begin, drawn = [dict(s) for s in sources], sum(s["drawn"] for s in sources)
            # In integers, so that without weights the quota is met exactly by the last document of the epoch
            goals = [q * (number + 1) // blocks for q in quota]
            lengths = [*(length for length, _ in cuts), self.sequence_len]
            block = _Block.of(
                self.shards, *self._draw(sources, goals, orders), self.mode, lengths[0]
            )
            gained = sum(s["drawn"] for s in sources) - drawn
            order = np.random.default_rng([self.seed, epoch, number, 1]).permutation(
                len(block.packing)
            )
            for i, (_, taken) in enumerate(cuts, 1):
                used = gained * taken / max(1, len(order))
                drawn, gained = drawn + used, gained - used
                block = block.rest(order[taken:], lengths[i])
                order = np.random.default_rng([self.seed, epoch, number, 1, i]).permutation(
                    len(block.packing)
                )
            for row in range(first, len(order)):
                share = (
                    (epoch + (drawn + gained * (row + 1) / len(order)) / sum(quota)) / self.epochs
                    if self.epochs
                    else 0.0
                )
                place = {
                    "epoch": epoch,
                    "block": number,
                    "row": row + 1,
                    "cuts": cuts,
                    "sources": begin,
                    "progress": min(1.0, share),
                }
                yield block, int(order[row]), place
            number, first, cuts = number + 1, 0, []
            if number == blocks:
                epoch, number = epoch + 1, 0
                for source, q in zip(sources, quota, strict=True):
                    source["drawn"] -= q  # what was drawn beyond the quota counts in the next epoch

    def _draw(
        self, sources: list[dict[str, int]], goals: list[int], orders: dict
    ) -> tuple[np.ndarray, np.ndarray]:
        """The (owner, document) pairs of the next block; moves `sources` behind them."""
        owner, document = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for i, (source, goal) in enumerate(zip(sources, goals, strict=True)):
            while source["drawn"] < goal:
                key = i, source["epoch"]
                if key not in orders:
                    order = np.random.default_rng([self.seed, source["epoch"], i, 0]).permutation(
                        len(self.shards[i])
                    )
                    orders[key] = order, np.cumsum(self.shards[i].lengths[order])
                order, ends = orders[key]
                begin = source["document"]
                before = int(ends[begin - 1]) if begin else 0
                stop = min(
                    int(np.searchsorted(ends, before + goal - source["drawn"])) + 1, len(order)
                )
                document.append(order[begin:stop])
                owner.append(np.full(stop - begin, i))
                source["drawn"] += int(ends[stop - 1]) - before
                source["document"] = stop
                if stop == len(order):
                    source["epoch"], source["document"] = source["epoch"] + 1, 0
                    del orders[key]
        return np.concatenate(owner), np.concatenate(document)


class RowFeed:
    """
    next(feed) -> this rank's micro-batches of one optimizer step of `rows` rows, cut evenly into at most `device_rows` rows each; a rank
    without a row gets one that is all ignored. Ends after total_steps or epochs (whose last step may be short); without both, never.

    An epoch is as many tokens as the sources hold together, shared out by weight; without weights by size, so every document once.
    mode "packed": whole documents packed into rows of sequence_len + 1 tokens. mode "padded": one document a row, truncated at
    sequence_len + 1 tokens (`truncated` counts those of an epoch), as wide as the step's longest, rounded up to 64.

    With context stages (packed rows), `rows` and `device_rows` are those of the longest context, sequence_len; at a shorter one both grow
    so that their tokens stay the same. `set_progress` moves on to the next stage; `numbers` tells the log of it.

    step, progress (0..1; 0 while endless) and epoch (from 0) are of what was handed out, however much is prefetched.
    device_rows (of the present context) may be lowered at any time: it changes how a step is cut, never which rows it has.
    """

    def __init__(
        self,
        shards: Sequence[tuple[Shards, float | None]],
        *,
        rows: int,
        device_rows: int,
        sequence_len: int,
        total_steps: int | None = None,
        epochs: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        mode: Mode = "packed",
        contexts: Contexts | None = None,
    ):
        if min(rows, device_rows, sequence_len) < 1:
            raise UserError(
                f"rows ({rows}), device rows ({device_rows}) and sequence length ({sequence_len}) must all be at least 1"
            )
        _check([s for s, _ in shards])
        self.device_rows, self.device = device_rows, torch.device(device)
        sources, weights = tuple(s for s, _ in shards), tuple(w for _, w in shards)
        pin = self.device.type == "cuda"
        self._plan = _Plan(
            sources,
            weights,
            rows,
            sequence_len,
            total_steps,
            epochs,
            seed,
            rank,
            world_size,
            mode,
            pin,
        )
        self._contexts, self._ahead = contexts or Contexts(((0.0, sequence_len),)), None
        self._use(self._contexts.at(0.0))
        self._state = self._plan.start()
        self.truncated = 0
        if mode == "padded":
            self.truncated = sum(int((s.lengths > sequence_len + 1).sum()) for s in sources)
            if self.truncated:
                notice(
                    f"{self.truncated:,} of {sum(map(len, sources)):,} conversations have over {sequence_len} tokens and are cut there"
                )

    @property
    def step(self) -> int:
        return self._state["step"]

    @property
    def epoch(self) -> int:
        return self._state["epoch"]

    @property
    def progress(self) -> float:
        return self._state["progress"]

    @property
    def numbers(self) -> dict[str, int]:
        return {"context": self._plan.sequence_len} if len(self._contexts.stages) > 1 else {}

    def set_progress(self, progress: float) -> str:
        """
        To be told before a step what share of the run is over: goes on with rows of that stage's context. A context once reached is kept,
        also where progress falls back. Returns what changed, in words.
        """
        before, length = self._plan.sequence_len, self._contexts.at(progress)
        if length <= before:
            return ""
        self.close()
        self._state = _at_length(self._state, length)
        self._use(length)
        return f"context {before} -> {length}, {self._plan.rows} rows a step"

    def _use(self, length: int) -> None:
        """Rows of this many tokens from now on, and as many tokens a step and a micro-batch as before."""
        before = self._plan.sequence_len
        self._plan = replace(
            self._plan, rows=self._plan.rows * before // length, sequence_len=length
        )
        self.device_rows = max(1, self.device_rows * before // length)

    def __iter__(self) -> "RowFeed":
        return self

    def __next__(self) -> list[Batch]:
        if self._ahead is None:
            self._ahead = _Prefetch(self._plan.steps(self._state))
        inputs, targets, self._state = next(self._ahead)
        cuts = -(-len(inputs) // self.device_rows)
        pairs = zip(inputs.tensor_split(cuts), targets.tensor_split(cuts), strict=True)
        return [
            Batch(i.to(self.device, non_blocking=True), t.to(self.device, non_blocking=True))
            for i, t in pairs
        ]

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last step handed out: JSON-able, a few numbers a source."""
        return {**self._state, "sources": [dict(s) for s in self._state["sources"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position on the same data and seed; with another sequence length, what is left of its block is packed for that."""
        for what in ("seed", "documents", "tokens", "quota"):
            if state[what] != self._state[what]:
                changed = f"its {what} changed from {state[what]} to {self._state[what]}"
                raise UserError(
                    f"cannot go on from this place in the data: {changed}; restore it or start afresh"
                )
        self.close()
        state = {"cuts": [], **state, "sources": [dict(s) for s in state["sources"]]}
        if state["sequence_len"] in self._contexts.lengths:
            self._use(state["sequence_len"])
        elif self._plan.mode == "packed":
            state = _at_length(state, self._plan.sequence_len)
        if (
            self._plan.total_steps
        ):  # the length of the run may be another one now: so is the share of it that is done
            progress = min(1.0, state["step"] / self._plan.total_steps)
        else:
            progress = (
                min(1.0, state["progress"] * (state["epochs"] or 0) / self._plan.epochs)
                if self._plan.epochs
                else 0.0
            )
        self._state = {
            **state,
            "sequence_len": self._plan.sequence_len,
            "epochs": self._plan.epochs,
            "progress": progress,
        }

    def close(self) -> None:
        """Stop the prefetching thread; next() starts another at the same place."""
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def __del__(self):
        if getattr(self, "_ahead", None):
            self.close()


def _at_length(state: dict[str, Any], length: int) -> dict[str, Any]:
    """The position in a feed of packed rows where the rest of its block is packed for another length."""
    return {
        **state,
        "sequence_len": length,
        "cuts": [*state["cuts"], [state["sequence_len"], state["row"]]],
        "row": 0,
    }


def eval_batches(
    shards: Shards,
    *,
    rows_per_batch: int,
    sequence_len: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """
    The same packed rows at every call: documents in one fixed shuffled order, up to max_tokens of them (None = all). Ranks share the
    rows, and one without any yields nothing; the union does not depend on world_size or rows_per_batch. All batches of a rank have one
    shape: the last is filled up with ignored rows.
    """
    _check([shards])
    order = np.random.default_rng(0).permutation(len(shards))
    if max_tokens is not None:
        order = order[: int(np.searchsorted(np.cumsum(shards.lengths[order]), max_tokens)) + 1]
    block = _Block.of([shards], np.zeros(len(order), dtype=np.int64), order, "packed", sequence_len)
    rows = [(block, row) for row in range(rank, len(block.packing), world_size)]
    size = min(rows_per_batch, len(rows))
    for i in range(0, len(rows), max(size, 1)):
        inputs, targets = _materialise(rows[i : i + size], sequence_len, shards.bos, at_least=size)
        yield Batch(inputs.to(device), targets.to(device))


def _check(shards: Sequence[Shards]) -> None:
    if (
        not shards
        or not all(map(len, shards))
        or len({(s.fingerprint, s.bos) for s in shards}) != 1
    ):
        raise UserError(
            f"a feed needs sources with documents, all of one tokenizer, not: {', '.join(s.name for s in shards) or 'none'}"
        )


class _Prefetch:
    """An iterator run ahead in a thread. What it raises is raised by next(). close() ends the thread, wherever it is."""

    def __init__(self, iterator: Iterator):
        self.queue, self.stop, self.end = queue.Queue(PREFETCH), threading.Event(), None
        self.thread = threading.Thread(target=self._run, args=(iterator,), name="feed", daemon=True)
        self.thread.start()

    def _run(self, iterator: Iterator) -> None:
        try:
            for item in iterator:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as e:
            self._put((None, e))

    def _put(self, item: tuple) -> bool:
        while not self.stop.is_set():
            try:
                self.queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Any:
        if self.end is None:
            item, self.end = self.queue.get()
            if self.end is None:
                return item
        raise self.end

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
