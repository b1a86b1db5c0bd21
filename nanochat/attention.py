"""
Causal attention behind one signature, and the key-value cache that decoding keeps.

`attend` serves whole sequences (training, scoring); `KVCache.attend` serves sequences that grow (prefill, decoding). Both
mean the same: query i sees key j when j <= i and, in a windowed layer, i - j < window. Nothing T x T is ever built for a
whole sequence: full layers run the fused causal kernel, windowed layers run it block by block over a band of keys.
It refuses nothing and knows no parameters; rotation and normalisation of q and k are the model's business.
"""

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
    if window <= 0 or window >= T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) != q.size(1))
    return _attend_band(q, k, v, window)


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
    what padding wrote lies beyond the row's length, is seen by nobody, and is overwritten by the row's next tokens.
    """

    def __init__(self, n_layer: int, batch: int, n_kv_head: int, capacity: int, head_dim: int, device: torch.device | str, dtype: torch.dtype):
        self.k = torch.zeros(n_layer, batch, n_kv_head, capacity, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * batch  # on the host: planning a step never waits for the device

    @property
    def capacity(self) -> int:
        return self.k.size(3)

    def positions(self, T: int) -> Tensor:
        """The absolute positions of the next T tokens: (1, T) when all rows are equally long, else (B, T); padding stays in range."""
        rows = self.lengths[:1] if self.uniform else self.lengths
        start = torch.tensor(rows, device=self.k.device)[:, None]
        return (start + torch.arange(T, device=self.k.device)).clamp_(max=self.capacity - 1)

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
        index = torch.tensor(rows, device=self.k.device)
        new.k, new.v = self.k.index_select(1, index), self.v.index_select(1, index)
        new.lengths = [self.lengths[r] for r in rows]
        return new

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int = 0) -> Tensor:
        """Write k, v (B, H_kv, T, D) at `positions` (from `positions(T)`) and attend from q (B, H, T, D) to all that a query may see."""
        B, H, T, _ = q.shape
        gqa = k.size(1) != H
        K, V = self.k[layer], self.v[layer]
        if positions.size(0) == 1:  # rows equally long: a plain slice
            start = self.lengths[0]
            if start + T > self.capacity:
                raise ValueError(f"the cache holds {self.capacity} positions, {start + T} were asked of it")
            K[:, :, start : start + T] = k
            V[:, :, start : start + T] = v
            if start == 0:
                return attend(q, k, v, window)
            if T == 1:  # one query sees every key in reach: no mask at all
                first = max(0, start + 1 - window) if window > 0 else 0
                return F.scaled_dot_product_attention(q, K[:, :, first : start + 1], V[:, :, first : start + 1], enable_gqa=gqa)
        else:
            b = torch.arange(B, device=q.device)[:, None]
            K[b, :, positions] = k.transpose(1, 2)
            V[b, :, positions] = v.transpose(1, 2)
        end = min(max(self.lengths) + T, self.capacity)
        j = torch.arange(end, device=q.device)
        i = positions[:, :, None]  # (1 or B, T, 1)
        mask = j <= i
        if window > 0:
            mask &= i - j < window
        return F.scaled_dot_product_attention(q, K[:, :, :end], V[:, :, :end], attn_mask=mask[:, None], enable_gqa=gqa)
