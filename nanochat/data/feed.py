"""
Feeds turn token shards into the batches of one optimizer step after another.

order.py decides the order of rows; a step takes the next `rows` of them, and ranks and
micro-batches only divide a step. Resuming on other data is an error. summary.py says what a feed
will draw, and what padded rows cut off.
"""

from collections.abc import Generator, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from nanochat.base.common import UserError
from nanochat.data.ahead import read_ahead
from nanochat.data.contexts import Contexts
from nanochat.data.order import IGNORED, Block, Mode, RowOrder, State, at_length, pack_block
from nanochat.data.shards import Shards

PREFETCH = 4  # steps prepared in advance


@dataclass(frozen=True)
class Batch:
    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -1 = ignored
    weights: torch.Tensor | None = None  # (B, T) float32; None = 1 everywhere
    valid: int | None = None  # targets that are not ignored, if the feed has counted them

    def count(self) -> int:
        """Targets that are not ignored. On a GPU, counting waits for the device."""
        return int((self.targets >= 0).sum()) if self.valid is None else self.valid


def _materialise(
    rows: Sequence[tuple[Block, int]], width: int, bos: int, at_least: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (inputs, targets) of rows: (max(len(rows), at_least), width) int64 each; all targets of rows
    beyond len(rows) are ignored.
    """
    shape = max(len(rows), at_least), width + 1
    ids, targets = np.full(shape, bos, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for i, (block, row) in enumerate(rows):
        block.fill(row, ids[i], targets[i])
    return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())


def micro_batch_rows(rows: int, device_rows: int, rank: int = 0, world_size: int = 1) -> int:
    """Rows of a rank's largest micro-batch in a step of `rows` rows."""
    own = max(1, rows * (rank + 1) // world_size - rows * rank // world_size)
    micro_batches = -(-own // device_rows)
    return -(-own // micro_batches)


def row_width(longest: int, most: int, few: bool = False) -> int:
    """
    Tokens per row of a batch whose longest row has `longest`: a multiple of 64, or, if `few`
    (because each shape is compiled), a power of two from 128 on; at most `most`.
    """
    width = 64 * max(1, -(-longest // 64))
    if few:
        width = 1 << max(7, (width - 1).bit_length())
    return min(most, width)


class RowFeed:
    """
    next(feed) -> this rank's micro-batches of one optimizer step of `rows` rows, cut evenly into at
    most `device_rows` rows each; a rank without a row gets one whose targets are all ignored. Ends
    after total_steps or epochs, whose last step may be short; without both it never ends.

    An epoch has as many tokens as the sources together, divided by weight; without weights by size,
    so that every document comes once. Mode "packed" packs documents into rows of sequence_len + 1
    tokens. Mode "padded" gives each document its own row, truncated at sequence_len + 1 tokens
    and as wide as the longest of the step, rounded up by row_width.

    With context stages (packed rows), `rows` and `device_rows` belong to the longest context,
    sequence_len; at a shorter one both grow so that their tokens stay the same. `set_progress`
    moves to the next stage, and `numbers` reports it to the log. `order` is the order of its rows,
    at the current context.

    `step` and `progress` (0 to 1; 0 if endless) are the position after the steps that were
    returned, not after those that are prefetched. device_rows (of the current context) may be
    lowered at any time: it changes how a step is cut, never which rows it has.
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
        few_widths: bool = False,
    ):
        sources = tuple(source for source, _ in shards)
        weights = tuple(weight or source.total for source, weight in shards)
        self.rows, self.device_rows, self.total_steps = rows, device_rows, total_steps
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.few_widths = few_widths
        self.order = RowOrder(sources, weights, sequence_len, epochs, seed, mode)
        self._contexts = contexts or Contexts(((0.0, sequence_len),))
        self._prefetched: Generator | None = None
        self._set_length(self._contexts.at(0.0))
        self._state = self.order.start()

    @property
    def step(self) -> int:
        return self._state["step"]

    @property
    def progress(self) -> float:
        return self._state["progress"]

    @property
    def micro_batch(self) -> tuple[int, int]:
        """(rows, tokens per row) of micro-batches; 0 tokens if the width varies by step."""
        rows = micro_batch_rows(self.rows, self.device_rows, self.rank, self.world_size)
        return rows, 0 if self.order.mode == "padded" else self.order.sequence_len

    @property
    def numbers(self) -> dict[str, int]:
        return {"context": self.order.sequence_len} if len(self._contexts.stages) > 1 else {}

    def set_progress(self, progress: float) -> str:
        """
        Move to the context stage for a progress (0 to 1); call this before each step. A context
        that was reached is kept even if the progress decreases. Returns what changed, in words.
        """
        before, length = self.order.sequence_len, self._contexts.at(progress)
        if length <= before:
            return ""
        self.close()
        self._state = at_length(self._state, length)
        self._set_length(length)
        return f"context {before} -> {length}, {self.rows} rows a step"

    def _set_length(self, length: int) -> None:
        """Give rows `length` tokens from now on; steps and micro-batches keep their tokens."""
        before = self.order.sequence_len
        self.order = replace(self.order, sequence_len=length)
        self.rows = self.rows * before // length
        self.device_rows = max(1, self.device_rows * before // length)

    def __iter__(self) -> "RowFeed":
        return self

    def __next__(self) -> list[Batch]:
        if self._prefetched is None:
            # A copy, so that the thread does not keep a discarded feed alive
            self._prefetched = read_ahead(copy(self)._steps(self._state), PREFETCH)
        inputs, targets, self._state = next(self._prefetched)
        cuts = -(-len(inputs) // self.device_rows)
        pairs = zip(inputs.tensor_split(cuts), targets.tensor_split(cuts), strict=True)
        return [
            Batch(
                i.to(self.device, non_blocking=True),
                t.to(self.device, non_blocking=True),
                valid=int((t >= 0).sum()),
            )
            for i, t in pairs
        ]

    def _steps(self, state: State) -> Iterator[tuple[torch.Tensor, torch.Tensor, State]]:
        """For each step: inputs and targets of this rank's rows, and the state after the step."""
        order, stream = self.order, self.order.rows(state)
        while self.total_steps is None or state["step"] < self.total_steps:
            drawn = list(islice(stream, self.rows))
            if not drawn:
                return
            rows = [(block, row) for block, row, _ in drawn]
            _, _, changes = drawn[-1]
            state = {**state, **changes, "step": state["step"] + 1}
            if self.total_steps:
                by_steps = min(1.0, state["step"] / self.total_steps)
                state["progress"] = max(state["progress"], by_steps)
            width = order.sequence_len
            if order.mode == "padded":
                longest = max(int(block.packing.stop[row]) for block, row in rows) - 1
                width = row_width(longest, width, self.few_widths)
            begin = len(rows) * self.rank // self.world_size
            end = len(rows) * (self.rank + 1) // self.world_size
            inputs, targets = _materialise(rows[begin:end], width, order.shards[0].bos)
            if self.device.type == "cuda":
                inputs, targets = inputs.pin_memory(), targets.pin_memory()
            yield inputs, targets, state

    def state_dict(self) -> State:
        """The position after the last step that was returned, as values that JSON can hold."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """
        Continue from a position on the same data and seed. Raises UserError if these differ or the
        position is impossible. With another sequence length, the rest of its block is packed again.
        """
        for name in ("seed", "documents", "tokens", "quota"):
            if state[name] != self._state[name]:
                raise UserError(
                    f"cannot resume, because the {name} of the data changed from {state[name]} "
                    f"to {self._state[name]}: restore the data, or start a new run"
                )
        stored = state.get("sha256", self._state["sha256"])  # earlier versions stored none
        for shards, before in zip(self.order.shards, stored, strict=False):
            if shards.sha256 != before:
                raise UserError(
                    f"cannot resume, because {shards.name} does not hold the data with which the "
                    "run was started: restore the data, or start a new run"
                )
        state = {**state, "sha256": self._state["sha256"]}
        if fault := self.order.fault(state):
            raise UserError(
                f"cannot resume, because the checkpoint's position in the data is impossible "
                f"({fault}): choose an earlier checkpoint, or start a new run"
            )
        self.close()
        if state["sequence_len"] in self._contexts.lengths:
            self._set_length(state["sequence_len"])
        elif self.order.mode == "packed":
            state = at_length(state, self.order.sequence_len)
        # If the length of the run has changed, so has its progress
        epochs, progress = self.order.epochs, 0.0
        if self.total_steps:
            progress = state["step"] / self.total_steps
        elif epochs:
            progress = state["progress"] * (state["epochs"] or 0) / epochs
        self._state = {
            **state,
            "sequence_len": self.order.sequence_len,
            "epochs": epochs,
            "progress": min(1.0, progress),
        }

    def close(self) -> None:
        """Stop the prefetching thread; next() starts another one at the same position."""
        if self._prefetched:
            self._prefetched.close()
            self._prefetched = None


def eval_documents(shards: Shards, max_tokens: int | None = None) -> np.ndarray:
    """
    (documents,) int64: the documents that eval_batches reads, in one fixed shuffled order, up to
    max_tokens tokens of them (None = all).
    """
    order = np.random.default_rng(0).permutation(len(shards))
    if max_tokens is not None:
        order = order[: int(np.searchsorted(np.cumsum(shards.lengths[order]), max_tokens)) + 1]
    return order


def eval_batches(
    shards: Shards,
    *,
    rows_per_batch: int,
    sequence_len: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    whole: bool = False,
) -> Iterator[Batch]:
    """
    The same packed rows on every call: the documents of eval_documents. The ranks share the rows;
    which rows there are does not depend on world_size or rows_per_batch, and a rank without rows
    yields nothing. All batches of a rank have the same shape: the last one is filled up with
    ignored rows. If `whole`, that shape always has rows_per_batch rows.
    """
    order = eval_documents(shards, max_tokens)
    block = pack_block([shards], np.zeros_like(order), order, sequence_len)
    rows = [(block, row) for row in range(rank, len(block.packing), world_size)]
    size = rows_per_batch if whole else min(rows_per_batch, len(rows))
    for i in range(0, len(rows), max(size, 1)):
        inputs, targets = _materialise(rows[i : i + size], sequence_len, shards.bos, at_least=size)
        yield Batch(inputs.to(device), targets.to(device))
