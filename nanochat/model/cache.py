"""The key-value cache for decoding: the keys and values of all layers, for a batch of sequences."""

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

# The buffers with a slot per position, of the shape (layer, row, head, slot, width). The others
# have the shape (layer, row, ...), which does not depend on the length of a row.
BY_POSITION = ("k", "v", "w", "tokens")
# On a CPU, a row attends to whole blocks of so many slots, of which those beyond its length are
# masked. Kernels then sum its keys in the same order however long the other rows are, so that the
# results of a row are bitwise the same in every batch.
BLOCK = 16
LEAST_SLOTS = 64  # for the same reason: torch has another kernel for fewer than 400 products


class KVCache:
    """
    Keys and values of every layer for a batch of sequences of different lengths.

    Position p of a row is in slot p. Row b holds its positions 0..lengths[b]-1, and a forward pass
    over T tokens (begin, the layers, advance) writes slots lengths[b]..lengths[b]+T-1. `advance`
    then increases the lengths, by less than T where a row was padded: the slots of padding are
    beyond the row's length, where nothing reads them, and its next tokens overwrite them. Padding
    beyond the capacity goes to one spare slot.

    On a CPU, keys and values are float32, because products of a single query with bfloat16 keys
    take twice as long there. With an attention prior, the tokens and the prior's columns of every
    key are kept as well, once for all layers and heads. Copy heads, convolutions and pair
    embeddings look back a few positions and keep their last inputs: `earlier` is
    {name: (positions, width, dtype)}.

    Between passes, rows can be added (`append`) and removed (`drop`). The buffers behind `k`, `v`
    and the others have memory for more rows than are in use, so that usually only the new rows are
    copied. On a GPU they have a slot for every position from the beginning. On a CPU they have as
    many slots as the longest row needs, and are copied when it enters a new block: reading one
    contiguous piece of memory takes half the time of reading parts of a larger one, which saves far
    more than a copy every BLOCK tokens costs. To store another tensor per row, call `keep`.
    """

    k: Tensor
    v: Tensor
    w: Tensor
    tokens: Tensor
    hidden: Tensor  # (1, row, n_embd), if generation has called keep("hidden", ...)

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
        for name, (n, width, kind) in (earlier or {}).items():
            self.keep(name, k.new_zeros(1, batch, n, width, dtype=kind))
        # For each name in `earlier`: the inputs that were kept, followed by those of this pass
        self._extended: dict[str, Tensor] = {}
        # The positions of the current pass's tokens, (1 or B, T), and the slots that it writes
        self.positions = self._slots = self.tokens.new_zeros(1, 0)
        # The masks of the current pass, by first key and window
        self._masks: dict[tuple[int, int], Tensor | None] = {}

    def keep(self, name: str, buffer: Tensor) -> None:
        """Store a buffer (layer, row, ...); the attribute `name` is a view of the rows in use."""
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
        self._masks = {}

    def _slots_for(self, positions: int, capacity: int) -> int:
        """How many slots rows of so many positions need, with one for padding."""
        return _blocks(min(positions, capacity + 1) if self._grows else capacity + 1)

    def advance(self, counts: int | list[int]) -> None:
        """
        End a pass: each row has `counts` more tokens, of the pass's first ones. ValueError beyond
        the capacity.
        """
        counts = [counts] * len(self.lengths) if isinstance(counts, int) else counts
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        self._check(max(self.lengths))
        padded = min(counts) < self.positions.size(1)
        self._keep_earlier(torch.tensor(counts, device=self.k.device)[:, None] if padded else None)

    def _keep_earlier(self, counts: Tensor | None) -> None:
        """
        Keep the last inputs of each row, which has `counts` (B, 1) more tokens; None means all
        tokens of the pass.
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
        """x (B, T, width) of this pass, preceded by the n inputs kept: (B, n + T, width)."""
        self._extended[name] = torch.cat((getattr(self, name)[0].to(x.dtype), x), 1)
        return self._extended[name]

    # ---- for an attention prior

    def with_earlier_tokens(self, idx: Tensor, memory: int, no_token: int) -> Tensor:
        """
        Store the tokens idx (B, T) of this pass; returns them preceded by the `memory` tokens
        before them, or no_token before the first one: (B, memory + T).
        """
        self._write(self.tokens[0], idx[..., None, None])
        slots = self._slots[:, :1] + torch.arange(-memory, 0, device=idx.device)
        earlier = self.tokens[0, self._rows(), 0, slots.clamp(min=0), 0]
        return torch.cat((earlier.masked_fill(slots < 0, no_token), idx), 1)

    def with_earlier_columns(self, w: Tensor) -> Tensor:
        """Store the prior's columns w (B, T, R) of this pass; returns those of all keys so far."""
        if self.w.size(-1) != w.size(-1):
            self.keep("w", self.w.new_zeros(*self._buffers["w"].shape[:-1], w.size(-1)))
        self._write(self.w[0], w[:, :, None])
        return self.w[0, :, 0] if any(self.lengths) else w

    def _rows(self) -> Tensor:
        return torch.arange(len(self.lengths), device=self.k.device)[:, None]

    def _write(self, kept: Tensor, new: Tensor) -> None:
        """Store `new` (B, T, H, width) of this pass in the buffer `kept` (B, H, slots, width)."""
        kept[self._rows(), :, self._slots] = new.to(kept.dtype)

    def _write_by_row(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._write(self.k[layer], k.transpose(1, 2))
        self._write(self.v[layer], v.transpose(1, 2))

    # ---- changing the batch, between passes

    def expand(self, rows: list[int]) -> "KVCache":
        """
        A new cache whose row r is a copy of this one's row rows[r]. It serves to sample several
        replies after one prefill, and to drop or reorder rows.
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
        larger of the two. If the buffers are too small, they are replaced by buffers with twice the
        rows in use, but with no more than room[0] if these are enough, and, on a GPU, with at least
        room[1] positions.
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
        # Last, so that this cache stays as it was if memory runs out before
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
        """The address of the keys in memory, which changes when the buffers are replaced."""
        return self._buffers["k"].data_ptr()

    def moved(self, rows: int, positions: int) -> "KVCache":
        """A copy with memory for so many rows and positions."""
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
        """Remove a row: the last row is copied to its place."""
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
        Store k, v (B, H_kv, T, D) of the pass and attend from q (B, H, T, D) to all keys that its
        tokens may see, as attention.attend does: (B, H, T, D).
        """
        T, positions = q.size(2), self.positions
        first, end = self._store(layer, k, v, window)
        # Without earlier tokens, this is attention over a whole sequence. Not with FlexAttention,
        # which would be compiled for every length of a prompt.
        is_prefill = self.lengths[0] == 0 and positions.size(0) == 1
        if is_prefill and (bias is None or bias.form != "flex"):
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
        for start in range(0, T, QUERY_BLOCK):  # a bias for all queries would need much memory
            part = slice(start, start + QUERY_BLOCK)
            block = bias._replace(u=bias.u[:, part])
            parts.append(attend_at(positions[:, part], q[:, :, part], K, V, first, window, block))
        return torch.cat(parts, dim=2).to(k.dtype)

    def _store(self, layer: int, k: Tensor, v: Tensor, window: int) -> tuple[int, int]:
        """Store k, v of the pass; returns (first, end): its tokens see keys first..end-1."""
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
        """The mask of attention.visible for the tokens of the pass and these slots."""
        return visible(self.positions, first, end, window)


class OneToken(KVCache):
    """
    A view of the first `rows` rows of a cache, for passes of one token per row that always run the
    same kernels on the same memory, as a CUDA graph needs: the lengths are on the device, and each
    row attends to the first `slots` slots, with a mask for those beyond its length. Call `place`
    before a pass.
    """

    def __init__(self, cache: KVCache, rows: int, slots: int):
        self.__dict__ |= vars(cache)
        self.lengths, self.slots = [1] * rows, slots  # only the number of the lengths is used
        self._buffers, self._extended = {}, {}
        for name, buffer in cache._buffers.items():
            self.keep(name, buffer)

    def place(self, lengths: Tensor, counts: Tensor) -> None:
        """
        Set the lengths of the rows (rows,), and how many tokens each has in the next pass (rows,):
        1, or 0 for a row that does not take part.
        """
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
    """A number of slots, rounded up to whole blocks and LEAST_SLOTS."""
    return max(slots + -slots % BLOCK, LEAST_SLOTS)


def _used(name: str, buffer: Tensor, positions: int) -> Tensor:
    """The part of a buffer that rows of so many positions use."""
    return buffer[:, :, :, :positions] if name in BY_POSITION else buffer
