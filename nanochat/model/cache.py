"""
The key-value cache that decoding keeps: keys and values of every layer for a batch of sequences of different lengths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.attention import QUERY_BLOCK, Bias, attend


class KVCache:
    """
    Preallocated keys and values of every layer for a batch of sequences of different lengths.

    Row b holds its positions 0..lengths[b]-1 in slots of the same number, so a slot is its absolute position. A forward pass over
    T tokens writes slots lengths[b]..lengths[b]+T-1; `advance` then moves the lengths on, by fewer than T where a row was padded:
    what padding wrote lies beyond the row's length, is seen by nobody, and is overwritten by the row's next tokens. Padding beyond
    the capacity goes to one spare slot. On a CPU keys and values are float32: for a single bfloat16 query its kernels are ten times slower.
    A prior keeps its look-ups of every key beside them (R numbers, once for all layers and heads), and the last tokens of each row.
    """

    def __init__(
        self,
        n_layer: int,
        batch: int,
        n_kv_head: int,
        capacity: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        dtype = (
            torch.promote_types(dtype, torch.float32)
            if torch.device(device).type == "cpu"
            else dtype
        )
        self.k = torch.zeros(
            n_layer, batch, n_kv_head, capacity + 1, head_dim, device=device, dtype=dtype
        )
        self.v = torch.zeros_like(self.k)
        self.w = self.k.new_zeros(
            1, batch, 1, capacity + 1, 0
        )  # of the width that the first pass brings
        self.tail = self._seen = torch.zeros(
            batch, 0, dtype=torch.int64, device=device
        )  # before the pass under way, and with it
        self._memory = 0  # tokens of a tail
        self._slots = torch.zeros(
            1, 0, dtype=torch.int64
        )  # where the pass under way writes, set by positions()
        self.lengths = [0] * batch  # on the host: planning a step never waits for the device

    @property
    def capacity(self) -> int:
        return self.k.size(3) - 1

    def positions(self, T: int) -> Tensor:
        """The absolute positions of the next T tokens: (1, T) when all rows are equally long, else (B, T); padding stays in range."""
        rows = self.lengths[:1] if self.uniform else self.lengths
        start = torch.tensor(rows, device=self.k.device)[:, None]
        slots = start + torch.arange(T, device=self.k.device)
        self._slots = slots.clamp(max=self.capacity)
        return slots.clamp_(max=self.capacity - 1)

    @property
    def uniform(self) -> bool:
        return all(n == self.lengths[0] for n in self.lengths)

    def advance(self, counts: int | list[int]) -> None:
        counts = [counts] * len(self.lengths) if isinstance(counts, int) else counts
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        if max(self.lengths) > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, {max(self.lengths)} were asked of it"
            )
        if m := self._memory:
            at = torch.tensor(counts, device=self.tail.device)[:, None] + torch.arange(
                m, device=self.tail.device
            )
            self.tail = self._seen.gather(1, at)

    def look(self, seen: Tensor, w: Tensor) -> Tensor:
        """Keep what a prior saw (B, tail + T tokens) and looked up (B, T, R) in the pass under way; the look-ups of all keys so far."""
        self._seen, self._memory = seen, seen.size(1) - w.size(1)
        if self.w.size(-1) != w.size(-1):
            self.w = self.w.new_zeros(*self.w.shape[:-1], w.size(-1))
        self.w[0, torch.arange(w.size(0), device=w.device)[:, None], 0, self._slots] = w.to(
            self.w.dtype
        )
        return self.w[0, :, 0] if any(self.lengths) else w

    def expand(self, rows: list[int]) -> "KVCache":
        """A cache whose row r is a copy of this one's row rows[r]: one prefill for n samples; also drops and reorders rows."""
        new = object.__new__(KVCache)
        new._slots, new.lengths = self._slots, [self.lengths[r] for r in rows]
        index, used = torch.tensor(rows, device=self.k.device), max(new.lengths, default=0)
        new.tail, new._seen, new._memory = self.tail[index], self._seen, self._memory
        for name in ("k", "v", "w"):
            old: Tensor = getattr(self, name)
            copy = old.new_zeros(old.size(0), len(rows), *old.shape[2:])
            copy[:, :, :, :used] = old[:, :, :, :used].index_select(1, index)
            setattr(new, name, copy)
        return new

    def append(self, other: "KVCache") -> None:
        """
        Add the rows of another cache of the same model behind this one's; the capacity becomes the
        larger of the two. Between passes only. Copies both caches once.
        """
        capacity = max(self.capacity, other.capacity)
        caches = [(cache, (0, 0, 0, capacity - cache.capacity)) for cache in (self, other)]
        for name in ("k", "v", "w"):
            grown = [F.pad(getattr(cache, name), padding) for cache, padding in caches]
            setattr(self, name, torch.cat(grown, dim=1))
        self.tail = torch.cat([self.tail, other.tail])
        self.lengths = self.lengths + other.lengths

    def drop(self, row: int) -> None:
        """Forget a row at the cost of copying one: the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            used = self.lengths[last]
            for x in (self.k, self.v, self.w):
                x[:, row, :, :used] = x[:, last, :, :used]
            self.tail[row] = self.tail[last]
            self.lengths[row] = self.lengths[last]
        self.k, self.v, self.w, self.tail = (
            self.k[:, :last],
            self.v[:, :last],
            self.w[:, :last],
            self.tail[:last],
        )
        self.lengths.pop()

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        window: int = 0,
        bias: Bias | None = None,
    ) -> Tensor:
        """Write k, v (B, H_kv, T, D) at `positions` (from `positions(T)`) and attend from q (B, H, T, D) to all that a query may see."""
        B, T = q.size(0), q.size(2)
        K, V = self.k[layer], self.v[layer]
        if positions.size(0) == 1:  # rows equally long: a plain slice
            start, end = self.lengths[0], self.lengths[0] + T
            if end > self.capacity:
                raise ValueError(
                    f"the cache holds {self.capacity} positions, {end} were asked of it"
                )
            K[:, :, start:end] = k
            V[:, :, start:end] = v
            if start == 0:
                return attend(q, k, v, window, bias)
        else:
            b = torch.arange(B, device=q.device)[:, None]
            K[b, :, self._slots] = k.transpose(1, 2).to(K.dtype)
            V[b, :, self._slots] = v.transpose(1, 2).to(V.dtype)
            end = min(max(self.lengths) + T, self.capacity)
        first = (
            max(0, min(self.lengths) + 1 - window) if window > 0 else 0
        )  # older keys are beyond every query's window
        K, V = K[:, :, first:end], V[:, :, first:end]
        if bias is None:
            return self._over(K, V, q, first, positions, window).to(k.dtype)
        parts = range(
            0, T, QUERY_BLOCK
        )  # its scores are numbers a head, too large for all queries at once
        cut = [
            (slice(s, s + QUERY_BLOCK), bias._replace(u=bias.u[:, s : s + QUERY_BLOCK]))
            for s in parts
        ]
        return torch.cat(
            [self._over(K, V, q[:, :, s], first, positions[:, s], window, b) for s, b in cut], dim=2
        ).to(k.dtype)

    def _over(
        self,
        K: Tensor,
        V: Tensor,
        q: Tensor,
        first: int,
        positions: Tensor,
        window: int,
        bias: Bias | None = None,
    ) -> Tensor:
        """Attend from q (B, H, T, D) to K, V (B, H_kv, keys, D), whose keys begin at position `first`."""
        B, H, T, D = q.shape
        mask, G = None, H // K.size(1)
        i, j = positions[:, :, None], torch.arange(first, first + K.size(2), device=q.device)
        if (
            T > 1 or positions.size(0) > 1
        ):  # a single query of rows equally long sees all that is left: no mask
            mask = j <= i  # (1 or B, T, keys)
            if window > 0:
                mask &= i - j < window
        if bias is not None:
            scores = bias.scores(i, first, first + K.size(2), H).to(K.dtype)
            mask = (
                scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)
            ).reshape(B, H // G, G * T, -1)
        elif mask is not None:
            mask = mask.repeat(1, G, 1)[:, None]
        # The query heads of a group become further queries of their shared head: no kernel falls back on copying keys
        y = F.scaled_dot_product_attention(
            q.to(K.dtype).reshape(B, H // G, -1, D), K, V, attn_mask=mask
        )
        return y.reshape(B, H, T, D)
