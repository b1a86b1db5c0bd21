"""The key-value cache of decoding: every layer's keys and values for sequences of any lengths."""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.attention import (
    QUERY_BLOCK,
    Bias,
    attend,
    attend_at,
    score_mask,
    visible,
)

# Kept tensors of the shape (layer, row, head, slot, width), with a slot per position; others have
# the shape (layer, row, ...) and are of one size, however long a row is
BY_POSITION = ("k", "v", "w", "tokens")
# On a CPU, a row attends to whole blocks of so many slots, those beyond its length hidden. Kernels
# then sum its keys in the same order however long the other rows are, so that a row is the same to
# the bit in any company.
BLOCK = 16
LEAST_SLOTS = 64  # likewise: torch multiplies matrices of fewer than 400 products differently


class KVCache:
    """
    Keys and values of every layer for a batch of sequences of different lengths.

    Row b holds its positions 0..lengths[b]-1 in slots of the same numbers. A forward pass over T
    tokens writes slots lengths[b]..lengths[b]+T-1. `advance` then increases the lengths, by less
    than T where a row was padded: what padding wrote lies beyond the row's length, where nothing
    reads it, and is overwritten by the row's next tokens. Padding beyond the capacity goes to one
    spare slot. On a CPU, keys and values are float32: its products of a single query with bfloat16
    keys take twice as long. With an attention prior, the tokens and the prior's columns of every
    key are kept as well, once for all layers and heads. What looks back a few positions (copy
    heads, convolutions, pair embeddings) keeps its last inputs: `earlier` has their number, width
    and type by name.

    Rows come (`append`) and go (`drop`) between passes. The buffers behind `k`, `v` and the others
    have room for more rows than are in use, so that rows that come are copied alone, but for a few
    times when the room must grow. On a GPU they have a slot for every position from the beginning.
    On a CPU they have the slots that the longest row needs, and move whenever it enters a new
    block: reading one contiguous piece of memory takes half the time of reading parts of a larger
    one, which is worth far more than a copy every BLOCK tokens. Another tensor that belongs to the
    rows needs one more `keep`.
    """

    k: Tensor
    v: Tensor
    w: Tensor
    tokens: Tensor
    hidden: Tensor  # (1, row, n_embd), where generation keeps it

    def __init__(
        self,
        n_layer: int,
        batch: int,
        n_kv_head: int,
        capacity: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
        earlier: Mapping[str, tuple[int, int, torch.dtype]] | None = None,
    ):
        inputs = {
            name: torch.zeros((1, batch, n, width), device=device, dtype=kind)
            for name, (n, width, kind) in (earlier or {}).items()
        }
        self._grows = torch.device(device).type == "cpu"
        if self._grows:
            dtype = torch.promote_types(dtype, torch.float32)
        self.capacity = capacity  # positions per row
        self.lengths = [0] * batch  # on the host: planning a step never waits for the device
        self._buffers: dict[str, Tensor] = {}
        shape = (n_layer, batch, n_kv_head, self._slots_for(0, capacity), head_dim)
        k = torch.zeros(shape, device=device, dtype=dtype)
        self.keep("k", k)
        self.keep("v", torch.zeros_like(k))
        self.keep("w", k.new_zeros(1, batch, 1, k.size(3), 0))  # widened by the first pass
        self.keep("tokens", k.new_zeros(1, batch, 1, k.size(3), 1, dtype=torch.int64))
        for name, buffer in inputs.items():
            self.keep(name, buffer)
        # Of the inputs with a name in `earlier`: those kept, and after them those of this pass
        self._extended: dict[str, Tensor] = {}
        # Of the tokens of the current pass, (1 or B, T): their positions, and where it writes them
        self.positions = self._slots = self.tokens.new_zeros(1, 0)
        self._masks: dict[
            tuple[int, int], Tensor | None
        ] = {}  # of the pass, by first key and window

    def keep(self, name: str, buffer: Tensor) -> None:
        """Keep a buffer (layer, row, ...); the attribute of this name shows the rows in use."""
        self._buffers[name] = buffer
        setattr(self, name, buffer[:, : len(self.lengths)])

    def begin(self, T: int) -> None:
        """
        Begin a pass over the next T tokens. Their positions are (1, T) when all rows have the same
        length, else (B, T); those of padding stay below the capacity.
        """
        slots_needed = self._slots_for(max(self.lengths, default=0) + T, self.capacity)
        if slots_needed > self._buffers["k"].size(3):
            self._replace(self._grown(self._buffers["k"].size(1), slots_needed))
        rows = self.lengths[:1] if len(set(self.lengths)) == 1 else self.lengths
        start = torch.tensor(rows, device=self.k.device)[:, None]
        slots = start + torch.arange(T, device=self.k.device)
        self._slots = slots.clamp(max=self.capacity)
        self.positions = slots.clamp_(max=self.capacity - 1)
        self._masks = {}  # the layers share them

    def _slots_for(self, positions: int, capacity: int) -> int:
        """How many slots rows of so many positions need; padding beyond the capacity takes one."""
        return _blocks(min(positions, capacity + 1) if self._grows else capacity + 1)

    def advance(self, counts: int | list[int]) -> None:
        """End a pass: each row has `counts` more tokens. Raises ValueError beyond the capacity."""
        counts = [counts] * len(self.lengths) if isinstance(counts, int) else counts
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        self._check(max(self.lengths))
        padded = min(counts) < self.positions.size(1)
        self._keep_earlier(torch.tensor(counts, device=self.k.device)[:, None] if padded else None)

    def _keep_earlier(self, counts: Tensor | None) -> None:
        """
        Keep the last inputs of each row, which has `counts` (B, 1) more tokens; None: all of them.
        """
        for name, x in self._extended.items():
            kept = getattr(self, name)[0]
            if counts is None:
                kept.copy_(x[:, -kept.size(1) :])
            else:
                kept.copy_(x[self._rows(), counts + torch.arange(kept.size(1), device=x.device)])

    def _check(self, positions: int) -> None:
        if positions > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, but {positions} were requested"
            )

    def with_earlier(self, x: Tensor, name: str) -> Tensor:
        """x (B, T, width) of this pass after the n positions before it: (B, n + T, width)."""
        self._extended[name] = torch.cat((getattr(self, name)[0].to(x.dtype), x), 1)
        return self._extended[name]

    # ---- for an attention prior

    def with_earlier_tokens(self, idx: Tensor, memory: int, no_token: int) -> Tensor:
        """Keep the tokens of this pass; returns them after the `memory` tokens before it."""
        self._write(self.tokens, idx[..., None])
        slots = self._slots[:, :1] + torch.arange(-memory, 0, device=idx.device)
        earlier = self.tokens[0, self._rows(), 0, slots.clamp(min=0), 0]
        return torch.cat((earlier.masked_fill(slots < 0, no_token), idx), 1)

    def with_earlier_columns(self, w: Tensor) -> Tensor:
        """Keep the prior's columns w (B, T, R) of this pass; returns those of all keys so far."""
        if self.w.size(-1) != w.size(-1):
            self.keep("w", self.w.new_zeros(*self._buffers["w"].shape[:-1], w.size(-1)))
        self._write(self.w, w)
        return self.w[0, :, 0] if any(self.lengths) else w

    def _rows(self) -> Tensor:
        return torch.arange(len(self.lengths), device=self.k.device)[:, None]

    def _write(self, kept: Tensor, new: Tensor) -> None:
        kept[0, self._rows(), 0, self._slots] = new.to(kept.dtype)

    def _write_by_row(self, layer: int, k: Tensor, v: Tensor) -> None:
        rows = self._rows()
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            kept[rows, :, self._slots] = new.transpose(1, 2).to(kept.dtype)

    # ---- changing the batch, between passes

    def expand(self, rows: list[int]) -> "KVCache":
        """
        A cache whose row r is a copy of this one's row rows[r]: one prefill for several samples.
        Also drops and reorders rows.
        """
        new = copy.copy(self)
        new.lengths, new._buffers, new._extended = [self.lengths[r] for r in rows], {}, {}
        index, used = torch.tensor(rows, device=self.k.device), max(new.lengths, default=0)
        for name, old in self._buffers.items():
            buffer = old.new_zeros(old.size(0), len(rows), *old.shape[2:])
            _used(name, buffer, used).copy_(_used(name, old, used).index_select(1, index))
            new.keep(name, buffer)
        return new

    def append(self, other: "KVCache", room: tuple[int, int] = (0, 0)) -> None:
        """
        Add the rows of another cache of the same model after this one's. The capacity becomes the
        larger of the two. Where there is no room, this cache's rows move to buffers with twice the
        rows, but not more than room[0] where those suffice, and at least room[1] positions on a
        GPU.
        """
        count, total = len(self.lengths), len(self.lengths) + len(other.lengths)
        capacity, used = max(self.capacity, other.capacity), max(other.lengths, default=0)
        buffers = self._buffers
        slots, rows = self._slots_for(used, capacity), buffers["k"].size(1)
        if total > rows or slots > buffers["k"].size(3):
            slots = max(slots, self._slots_for(0, max(capacity, room[1])), buffers["k"].size(3))
            rows = rows if total <= rows else max(total, min(2 * count, room[0]))
            buffers = self._grown(rows, slots)
        for name, buffer in buffers.items():
            new = _used(name, getattr(other, name), used)
            _used(name, buffer[:, count:total], used).copy_(new)
        # Last, so that a lack of memory leaves this cache as it was
        self.lengths, self.capacity = self.lengths + other.lengths, capacity
        self._replace(buffers)

    def _replace(self, buffers: dict[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            self.keep(name, buffer)

    @property
    def room(self) -> tuple[int, int]:
        """The rows and positions for which there is memory."""
        k = self._buffers["k"]
        return k.size(1), k.size(3) - 1

    @property
    def address(self) -> int:
        """Where the memory of the keys begins: it changes when rows move."""
        return self._buffers["k"].data_ptr()

    def moved(self, rows: int, positions: int) -> "KVCache":
        """A copy with room for so many rows and positions."""
        new = copy.copy(self)
        new.capacity, new._buffers, new._extended = positions, {}, {}
        new._replace(self._grown(rows, _blocks(positions + 1)))
        return new

    def clear(self) -> None:
        """Drop all rows."""
        self.lengths = []

    def _grown(self, rows: int, slots: int) -> dict[str, Tensor]:
        """Copies of the buffers with so many rows and slots."""
        used, grown = max(self.lengths, default=0), {}
        for name, old in self._buffers.items():
            shape = [old.size(0), rows, *old.shape[2:]]
            if name in BY_POSITION:
                shape[3] = slots
            grown[name] = old.new_zeros(shape)
            rows_in_use = grown[name][:, : len(self.lengths)]
            _used(name, rows_in_use, used).copy_(_used(name, getattr(self, name), used))
        return grown

    def drop(self, row: int) -> None:
        """Remove a row at the cost of copying one: the last row takes its place."""
        used = self.lengths.pop()
        last = len(self.lengths)
        for name, buffer in self._buffers.items():
            if row != last:
                kept = _used(name, buffer, used)
                kept[:, row] = kept[:, last]
            self.keep(name, buffer)
        if row != last:
            self.lengths[row] = used

    # ---- attention

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int = 0,
        bias: Bias | None = None,
    ) -> Tensor:
        """
        Write k, v (B, H_kv, T, D) of the pass and attend from q (B, H, T, D) to all that a query
        may see.
        """
        T, positions = q.size(2), self.positions
        first, end = self._store(layer, k, v, window)
        # The pass is all there is; flexible code would be compiled for every length of a prompt
        alone = self.lengths[0] == 0 and positions.size(0) == 1
        if alone and (bias is None or bias.form != "flex"):
            if q.device.type == "cpu" and bias is None:
                q, k, v = (F.pad(x, (0, 0, 0, -T % BLOCK)) for x in (q, k, v))
            return attend(q, k, v, window, bias)[:, :, :T]
        K, V = self.k[layer, :, :, first:end], self.v[layer, :, :, first:end]
        if bias is None or T <= QUERY_BLOCK:
            if (first, window) not in self._masks:
                seen = self._seen(first, end, window)
                self._masks[first, window] = score_mask(seen, q.size(1), K.size(1), K.dtype)
            mask = self._masks[first, window]
            return attend_at(positions, q, K, V, first, window, bias, mask).to(k.dtype)
        parts = []
        for s in range(0, T, QUERY_BLOCK):  # a bias has a score per head: too many for all queries
            part = slice(s, s + QUERY_BLOCK)
            block = bias._replace(u=bias.u[:, part])
            parts.append(attend_at(positions[:, part], q[:, :, part], K, V, first, window, block))
        return torch.cat(parts, dim=2).to(k.dtype)

    def _store(self, layer: int, k: Tensor, v: Tensor, window: int) -> tuple[int, int]:
        """Write k, v of the pass; returns the slots (first, end) between which a query may see."""
        if self.positions.size(0) == 1:  # all rows have the same length: write a slice
            start, end = self.lengths[0], self.lengths[0] + k.size(2)
            self._check(end)
            self.k[layer, :, :, start:end] = k
            self.v[layer, :, :, start:end] = v
        else:
            self._write_by_row(layer, k, v)
            end = min(max(self.lengths) + k.size(2), self.capacity)
        first = max(0, min(self.lengths) + 1 - window) if window > 0 else 0  # no query sees older
        if k.device.type == "cpu":
            end = max(end + -end % BLOCK, LEAST_SLOTS)
            first = max(0, min(first - first % BLOCK, end - LEAST_SLOTS))
        return first, end

    def _seen(self, first: int, end: int, window: int) -> Tensor | None:
        """Which of these slots the queries of the pass see, as `visible`."""
        return visible(self.positions, first, end, window)


class OneToken(KVCache):
    """
    A view of the first `rows` rows of a cache, for passes of one token that always run the same
    kernels on the same memory: the lengths are on the device, and each row attends to the first
    `slots` slots, those beyond its length hidden. `place` says where a pass writes.
    """

    def __init__(self, cache: KVCache, rows: int, slots: int):
        self.__dict__ |= vars(cache)
        self.lengths, self.slots = [1] * rows, slots  # of these lengths, only the number counts
        self._buffers, self._extended = {}, {}
        for name, buffer in cache._buffers.items():
            self.keep(name, buffer)

    def place(self, lengths: Tensor, counts: Tensor) -> None:
        """Set the rows' lengths (rows,), and for each whether it takes part: 1, or 0 if not."""
        self._slots, self._counts = lengths[:, None], counts[:, None]

    def begin(self, T: int) -> None:
        assert T == 1
        self.positions = self._slots.clamp(max=self.capacity - 1)
        self._masks = {}

    def advance(self, counts: int | list[int]) -> None:
        self._keep_earlier(self._counts)

    def _store(self, layer: int, k: Tensor, v: Tensor, window: int) -> tuple[int, int]:
        self._write_by_row(layer, k, v)
        return 0, self.slots

    def _seen(self, first: int, end: int, window: int) -> Tensor:
        i, j = self.positions[:, :, None], torch.arange(end, device=self.positions.device)
        return (j <= i) & (i - j < window) if window > 0 else j <= i


def _blocks(slots: int) -> int:
    """So many slots, rounded up to whole blocks."""
    return max(slots + -slots % BLOCK, LEAST_SLOTS)


def _used(name: str, kept: Tensor, positions: int) -> Tensor:
    """The part of a kept tensor that rows of so many positions use."""
    return kept[:, :, :, :positions] if name in BY_POSITION else kept
