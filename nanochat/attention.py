"""
Causal attention behind one signature, and the key-value cache that decoding keeps.

`attend` serves whole sequences (training, scoring); `KVCache.attend` serves sequences that grow (prefill, decoding). Both
mean the same: query i sees key j when j <= i and, in a windowed layer, i - j < window. Nothing T x T is ever built for a
whole sequence: full layers run the fused causal kernel, windowed layers run it block by block over a band of keys.
It refuses nothing and knows no parameters; rotation and normalisation of q and k are the model's business.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """
    Causal attention over a whole sequence, softmax(q k^T / sqrt(D)) v.

    q: (B, H, T, D); k, v: (B, H_kv, T, D) with H a multiple of H_kv; window: keys a query sees, itself included (0 = all).
    Returns (B, H, T, D).
    """
    T = q.size(2)
    if q.device.type == "cpu":
        return _BlockAttention.apply(q, k, v, window if 0 < window < T else T)  # type: ignore[return-value]
    if window <= 0 or window >= T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) != q.size(1))
    return _attend_band(q, k, v, window)


QUERY_BLOCK = 128  # queries a step of the CPU kernel: one block of scores should stay in the cache


class _BlockAttention(torch.autograd.Function):
    """
    The CPU kernel: blocks of queries against the keys that they can see, as batched matrix products. Those reach the machine's peak where
    torch's fused CPU kernel stays at a tenth of it. One block of scores exists at a time; the backward pass computes them again.
    Scores have the precision of the inputs (a batched product of bfloat16 gives bfloat16), the softmax is float32 or wider.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        B, H, T, D = q.shape
        q, k, v = _by_kv_head(q, k.size(1)), k.flatten(0, 1), v.flatten(0, 1)
        y = torch.empty_like(q)
        for rows, keys, hidden in _blocks(T, window, q.device):
            p = _probabilities(q, k, rows, keys, hidden)
            y[:, :, rows] = torch.bmm(p.flatten(1, 2), v[:, keys]).view(y[:, :, rows].shape)
        ctx.save_for_backward(q, k, v, y)
        ctx.shape, ctx.window = (B, H, T, D), window
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, *grads):
        (q, k, v, y), (B, H, T, D) = ctx.saved_tensors, ctx.shape
        dy = grads[0].reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=_wide(k)), torch.zeros_like(v, dtype=_wide(v))
        delta = (dy.to(_wide(y)) * y).sum(-1, keepdim=True)  # (B * H_kv, G, T, 1)
        for rows, keys, hidden in _blocks(T, ctx.window, q.device):
            p = _probabilities(q, k, rows, keys, hidden)
            dy_rows, q_rows = dy[:, :, rows].flatten(1, 2), q[:, :, rows].flatten(1, 2)
            dp = torch.bmm(dy_rows, v[:, keys].mT).view(p.shape)
            ds = ((dp - delta[:, :, rows]) * p).mul_(D**-0.5).to(q.dtype).flatten(1, 2)
            dq[:, :, rows] = torch.bmm(ds, k[:, keys]).view(dq[:, :, rows].shape)
            dk[:, keys] += torch.bmm(ds.mT, q_rows)
            dv[:, keys] += torch.bmm(p.flatten(1, 2).mT, dy_rows)
        return dq.view(B, H, T, D), dk.to(k.dtype).view(B, -1, T, D), dv.to(v.dtype).view(B, -1, T, D), None


def _by_kv_head(q: Tensor, n_kv_head: int) -> Tensor:
    """(B, H, T, D) -> (B * H_kv, G, T, D): the G query heads that share a key-value head side by side."""
    B, H, T, D = q.shape
    return q.reshape(B * n_kv_head, H // n_kv_head, T, D)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(T: int, window: int, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """(query rows, keys that any of them sees, mask of the pairs among these that are hidden (rows, keys)) for every block."""
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        first = max(0, start - window + 1)
        i, j = torch.arange(start, stop, device=device)[:, None], torch.arange(first, stop, device=device)[None, :]
        yield slice(start, stop), slice(first, stop), (j > i) | (i - j >= window)


def _probabilities(q: Tensor, k: Tensor, rows: slice, keys: slice, hidden: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) of one block: (B * H_kv, G, rows, keys) in q's dtype."""
    n, G, _, D = q.shape
    scores = torch.bmm(q[:, :, rows].flatten(1, 2), k[:, keys].mT).view(n, G, *hidden.shape)
    scores = scores.to(_wide(q)).mul_(D**-0.5).masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1).to(q.dtype)


def _attend_band(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Windowed attention: blocks of queries, each against the band of window + block keys that it can see."""
    B, H, T, D = q.shape
    block = min(window, 128)
    n = -(-T // block)  # blocks, the last one perhaps padded
    q = F.pad(q, (0, 0, 0, n * block - T)).view(B, H, n, block, D).transpose(1, 2).reshape(B * n, H, block, D)

    def band(x: Tensor) -> Tensor:  # (B, H_kv, T, D) -> (B * n, H_kv, window + block, D); block b holds keys b*block - window and on
        x = F.pad(x, (0, 0, window, n * block - T)).unfold(2, window + block, block)  # (B, H_kv, n, D, window + block)
        return x.permute(0, 2, 1, 4, 3).reshape(B * n, x.size(1), window + block, D)

    i = torch.arange(block, device=q.device)[:, None] + window  # a query's slot in its band
    j = torch.arange(window + block, device=q.device)[None, :]
    absolute = j + torch.arange(n, device=q.device)[:, None, None] * block - window  # below 0: left padding
    mask = ((j <= i) & (i - j < window) & (absolute >= 0)).repeat(B, 1, 1)[:, None]  # (B * n, 1, block, window + block)
    y = F.scaled_dot_product_attention(q, band(k), band(v), attn_mask=mask, enable_gqa=k.size(1) != H)
    return y.view(B, n, H, block, D).transpose(1, 2).reshape(B, H, n * block, D)[:, :, :T]


class KVCache:
    """
    Preallocated keys and values of every layer for a batch of sequences of different lengths.

    Row b holds its positions 0..lengths[b]-1 in slots of the same number, so a slot is its absolute position. A forward pass over
    T tokens writes slots lengths[b]..lengths[b]+T-1; `advance` then moves the lengths on, by fewer than T where a row was padded:
    what padding wrote lies beyond the row's length, is seen by nobody, and is overwritten by the row's next tokens. Padding beyond
    the capacity goes to one spare slot. On a CPU keys and values are float32: for a single bfloat16 query its kernels are ten times slower.
    """

    def __init__(
        self, n_layer: int, batch: int, n_kv_head: int, capacity: int, head_dim: int, device: torch.device | str, dtype: torch.dtype
    ):
        dtype = torch.promote_types(dtype, torch.float32) if torch.device(device).type == "cpu" else dtype
        self.k = torch.zeros(n_layer, batch, n_kv_head, capacity + 1, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self._slots = torch.zeros(1, 0, dtype=torch.int64)  # where the pass under way writes, set by positions()
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
            raise ValueError(f"the cache holds {self.capacity} positions, {max(self.lengths)} were asked of it")

    def expand(self, rows: list[int]) -> "KVCache":
        """A cache whose row r is a copy of this one's row rows[r]: one prefill for n samples; also drops and reorders rows."""
        new = object.__new__(KVCache)
        new._slots, new.lengths = self._slots, [self.lengths[r] for r in rows]
        index, used = torch.tensor(rows, device=self.k.device), max(new.lengths, default=0)
        for name in ("k", "v"):
            old: Tensor = getattr(self, name)
            copy = old.new_zeros(old.size(0), len(rows), *old.shape[2:])
            copy[:, :, :, :used] = old[:, :, :, :used].index_select(1, index)
            setattr(new, name, copy)
        return new

    def drop(self, row: int) -> None:
        """Forget a row at the cost of copying one: the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            used = self.lengths[last]
            self.k[:, row, :, :used] = self.k[:, last, :, :used]
            self.v[:, row, :, :used] = self.v[:, last, :, :used]
            self.lengths[row] = self.lengths[last]
        self.k, self.v = self.k[:, :last], self.v[:, :last]
        self.lengths.pop()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int = 0) -> Tensor:
        """Write k, v (B, H_kv, T, D) at `positions` (from `positions(T)`) and attend from q (B, H, T, D) to all that a query may see."""
        B, H, T, D = q.shape
        K, V = self.k[layer], self.v[layer]
        mask = None
        if positions.size(0) == 1:  # rows equally long: a plain slice
            start, end = self.lengths[0], self.lengths[0] + T
            if end > self.capacity:
                raise ValueError(f"the cache holds {self.capacity} positions, {end} were asked of it")
            K[:, :, start:end] = k
            V[:, :, start:end] = v
            if start == 0:
                return attend(q, k, v, window)
        else:
            b = torch.arange(B, device=q.device)[:, None]
            K[b, :, self._slots] = k.transpose(1, 2).to(K.dtype)
            V[b, :, self._slots] = v.transpose(1, 2).to(V.dtype)
            end = min(max(self.lengths) + T, self.capacity)
        first = max(0, min(self.lengths) + 1 - window) if window > 0 else 0  # older keys are beyond every query's window
        if T > 1 or positions.size(0) > 1:  # a single query of rows equally long sees all that is left: no mask
            i, j = positions[:, :, None], torch.arange(first, end, device=q.device)
            mask = j <= i  # (1 or B, T, keys)
            if window > 0:
                mask &= i - j < window
            mask = mask.repeat(1, H // k.size(1), 1)[:, None]
        # The query heads of a group become further queries of their shared head: no kernel falls back on copying keys
        q = q.to(K.dtype).reshape(B, k.size(1), -1, D)
        y = F.scaled_dot_product_attention(q, K[:, :, first:end], V[:, :, first:end], attn_mask=mask)
        return y.reshape(B, H, T, D).to(k.dtype)
