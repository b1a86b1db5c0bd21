"""
Causal attention behind one signature, and the key-value cache that decoding keeps.

`attend` serves whole sequences (training, scoring); `KVCache.attend` serves sequences that grow (prefill, decoding). Both
mean the same: query i sees key j when j <= i and, in a windowed layer, i - j < window. Nothing T x T is ever built for a
whole sequence: full layers run the fused causal kernel, windowed layers run it block by block over a band of keys. A prior (`Bias`)
adds to the scores in either, in one of three ways that agree: "factored" (further columns of q and k), "flex" and "dense".
It refuses nothing and knows no parameters; rotation and normalisation of q and k are the model's business.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.runtime import compiler_missing


class Bias(NamedTuple):
    """
    What a prior adds to the scores of a layer's first n heads, after their division by sqrt(D), at query i and key j:
    sum_r gate[h, r] u[i, r] w[j, r] + place_gate[h] * place[i - j], or place[h, i - j], or place[i, j].
    """

    u: Tensor  # (B, T, R): what is looked up for the queries
    w: Tensor  # (B, keys, R): and for the keys, from position 0 on
    gate: Tensor  # (n, R)
    place: Tensor  # (C,) by distance, the last entry standing for all beyond, (n, 1, C) by head, or (C, C); 0 for a fused kernel
    place_gate: Tensor  # (n,)
    backend: str = "factored"
    blocks: Any = None  # for flex: its mask of whole blocks

    def scores(self, i: Tensor, first: int, end: int, heads: int) -> Tensor:
        """For queries at positions i (1 or B, T, 1) and keys first..end-1: (B, heads, T, keys) in w's dtype, anything where j > i."""
        w = self.w[:, None, first:end]
        s = (self.u[:, None].to(w.dtype) * self.gate[:, None].to(w.dtype)) @ w.mT
        at = _place(self.place, i, torch.arange(first, end, device=i.device))
        return F.pad(s + (self.place_gate[:, None, None] * at).to(w.dtype), (0, 0, 0, 0, 0, heads - s.size(1)))

    def onto(self, raw: Tensor, rows: slice, keys: slice, hidden: Tensor, D: int) -> Tensor:
        """q k^T of one block, (B * H_kv, G * rows, keys) and overwritten -> masked scores (B, H, rows, keys), float32 or wider."""
        B, n, (r, c) = self.u.size(0), self.gate.size(0), hidden.shape
        raw = raw.view(B, -1, c)
        raw[:, : n * r].baddbmm_((self.u[:, None, rows] * self.gate[:, None]).flatten(1, 2), self.w[:, keys].mT, alpha=D**0.5)
        raw = raw.view(B, -1, r, c)
        added = self.place_gate.to(_wide(raw))[:, None, None] * self.block(rows, keys)
        return torch.add(F.pad(added, (0, 0, 0, 0, 0, raw.size(1) - n)).masked_fill_(hidden, -torch.inf), raw, alpha=D**-0.5)

    def block(self, rows: slice, keys: slice) -> Tensor:
        i, j = (torch.arange(s.start, s.stop, device=self.place.device) for s in (rows, keys))
        return _place(self.place, i[:, None], j)


def _place(place: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The prior of positions at queries i (..., T, 1) and keys j (keys,): (..., 1 or n, T, keys); anything where j > i."""
    if place.dim() == 2:
        return place[i, j].unsqueeze(-3)
    return place.view(-1, place.size(-1))[:, (i - j).clamp(0, place.size(-1) - 1)].movedim(0, -3)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int = 0, bias: Bias | None = None) -> Tensor:
    """
    Causal attention over a whole sequence, softmax(q k^T / sqrt(D) + bias) v.

    q: (B, H, T, D); k, v: (B, H_kv, T, D) with H a multiple of H_kv; window: keys a query sees, itself included (0 = all).
    Returns (B, H, T, D).
    """
    T, D = q.shape[2:]
    if bias is not None and bias.backend != "factored":
        return (_attend_flex if bias.backend == "flex" else _attend_dense)(q, k, v, window, bias)
    if q.device.type == "cpu":
        return _BlockAttention.apply(q, k, v, window if 0 < window < T else T, *(bias or ())[:5])  # type: ignore[return-value]
    if bias is not None:
        q, k, v = _widened(q, k, v, bias)
        return _attend_fused(q, k, v, window, D**-0.5)[..., :D]
    return _attend_fused(q, k, v, window)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> Tensor:
    if window <= 0 or window >= q.size(2):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.size(1) != q.size(1))
    return _attend_band(q, k, v, window, scale)


def _widened(q: Tensor, k: Tensor, v: Tensor, bias: Bias) -> tuple[Tensor, Tensor, Tensor]:
    """[q ; sqrt(D) gate u], [k ; w] and v, padded with zeros to one width that is a multiple of 8: kernels want equal ones."""
    (_, H, T, D), (n, R) = q.shape, bias.gate.shape
    pad = -(D + R) % 8
    u = F.pad((bias.u[:, None] * bias.gate[:, None]) * D**0.5, (0, pad, 0, 0, 0, H - n))
    w = F.pad(bias.w[:, None, :T], (0, pad)).expand(-1, k.size(1), -1, -1)
    return torch.cat((q, u.to(q.dtype)), -1), torch.cat((k, w.to(k.dtype)), -1), F.pad(v, (0, R + pad))


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Bias) -> Tensor:
    """The reference: a T x T mask that holds the prior. For short sequences, and for matrices that no few columns can give."""
    T = q.size(2)
    i, j = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)
    hidden = (j > i) | (i - j >= (window or T))
    mask = bias.scores(i[None], 0, T, q.size(1)).masked_fill(hidden, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), enable_gqa=k.size(1) != q.size(1))


@functools.cache
def flex_missing(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why FlexAttention cannot train here, or '' when it can: its backward exists on CUDA alone, and wide heads may not fit a card."""
    if device.type != "cuda":
        return f"FlexAttention cannot train on {device.type}"
    if missing := compiler_missing(device):
        return missing
    with torch.inference_mode(False), torch.enable_grad():  # it may be asked for the first time in an evaluation
        q, k, v = (torch.zeros(1, 2, 256, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        gates = torch.zeros(2, width - 64 if width > 64 else 0, device=device, dtype=dtype, requires_grad=True)
        u = torch.zeros(1, 256, gates.size(1), device=device, dtype=dtype)
        place = u.new_zeros(256), u.new_zeros(2).requires_grad_()
        try:
            _attend_flex(q, k, v, 0, Bias(u, u, gates, *place)).sum().backward()
        except Exception as e:  # whatever the compiler or the card refuses: factored serves
            return f"FlexAttention fails here ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
    return ""


@functools.cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


@functools.lru_cache(maxsize=64)
def flex_blocks(T: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < (window or T)), None, None, T, T, device=device)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Bias) -> Tensor:
    """FlexAttention: tokens as further columns of q and k, positions looked up in the kernel, blocks beyond the mask left out."""
    D, place = q.size(3), bias.place
    q, k, _ = _widened(q, k, v, bias)
    more = q.size(1) - bias.place_gate.size(0)  # heads without a prior
    gate = F.pad(bias.place_gate, (0, more))
    place = F.pad(place, (0, 0, 0, 0, 0, more)) if place.dim() == 3 else place

    def added(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = torch.where(i - j < 0, 0, torch.where(i - j < place.size(-1), i - j, place.size(-1) - 1))
        return score + gate[h] * (place[i, j] if place.dim() == 2 else place[h, 0, distance] if place.dim() == 3 else place[distance])

    blocks = bias.blocks if bias.blocks is not None else flex_blocks(q.size(2), window, q.device)
    return _flex(not torch.compiler.is_compiling())(q, k, v, score_mod=added, block_mask=blocks, scale=D**-0.5, enable_gqa=True)


QUERY_BLOCK = 128  # queries a step of the CPU kernel: one block of scores should stay in the cache


class _BlockAttention(torch.autograd.Function):
    """
    The CPU kernel: blocks of queries against the keys that they can see, as batched matrix products. Those reach the machine's peak where
    torch's fused CPU kernel stays at a tenth of it. One block of scores exists at a time; the backward pass computes them again.
    Scores have the precision of the inputs (a batched product of bfloat16 gives bfloat16), the softmax is float32 or wider.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, window: int, *given: Any) -> Tensor:  # given: the tensors of a Bias
        B, H, T, D = q.shape
        bias = Bias(*given) if given else None
        q, k, v = _by_kv_head(q, k.size(1)), k.flatten(0, 1), v.flatten(0, 1)
        y = torch.empty_like(q)
        for rows, keys, hidden in _blocks(T, window, q.device):
            p = _probabilities(q, k, rows, keys, hidden, bias)
            y[:, :, rows] = torch.bmm(p.flatten(1, 2), v[:, keys]).view(y[:, :, rows].shape)
        ctx.save_for_backward(q, k, v, y, *given)
        ctx.shape, ctx.window = (B, H, T, D), window
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, *grads):
        (q, k, v, y, *given), (B, H, T, D) = ctx.saved_tensors, ctx.shape
        bias = Bias(*given) if given else None
        d_given = [torch.zeros_like(x, dtype=_wide(q)) if want else None for x, want in zip(given, ctx.needs_input_grad[4:], strict=True)]
        dy = grads[0].reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=_wide(k)), torch.zeros_like(v, dtype=_wide(v))
        delta = (dy.to(_wide(y)) * y).sum(-1, keepdim=True)  # (B * H_kv, G, T, 1)
        for rows, keys, hidden in _blocks(T, ctx.window, q.device):
            p = _probabilities(q, k, rows, keys, hidden, bias)
            dy_rows, q_rows = dy[:, :, rows].flatten(1, 2), q[:, :, rows].flatten(1, 2)
            dp = torch.bmm(dy_rows, v[:, keys].mT).view(p.shape)
            ds = ((dp - delta[:, :, rows]) * p).mul_(D**-0.5).to(q.dtype).flatten(1, 2)
            dq[:, :, rows] = torch.bmm(ds, k[:, keys]).view(dq[:, :, rows].shape)
            dk[:, keys] += torch.bmm(ds.mT, q_rows)
            dv[:, keys] += torch.bmm(p.flatten(1, 2).mT, dy_rows)
            if bias is not None:  # of a gate: the sum of ds times what it scales
                n, r = bias.gate.size(0), hidden.size(0)
                ds = ds.view(B, H * r, -1)[:, : n * r]
                if d_given[2] is not None:
                    sums = torch.bmm(ds, bias.w[:, keys]).view(B, n, r, -1)
                    d_given[2] += torch.einsum("bnir,bir->nr", sums, bias.u[:, rows])
                if d_given[4] is not None:
                    d_given[4] += (ds.view(B, n, r, -1).sum(0, dtype=d_given[4].dtype) * bias.block(rows, keys)).sum((1, 2))
        d_k, d_v = dk.to(k.dtype).view(B, -1, T, D), dv.to(v.dtype).view(B, -1, T, D)
        d_given = [d if d is None else (d * D**0.5).to(x.dtype) for d, x in zip(d_given, given, strict=True)]
        return dq.view(B, H, T, D), d_k, d_v, None, *d_given


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


def _probabilities(q: Tensor, k: Tensor, rows: slice, keys: slice, hidden: Tensor, bias: Bias | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) of one block: (B * H_kv, G, rows, keys) in q's dtype."""
    n, G, _, D = q.shape
    scores = torch.bmm(q[:, :, rows].flatten(1, 2), k[:, keys].mT)
    if bias is None:
        scores = scores.view(n, G, *hidden.shape).to(_wide(q)).mul_(D**-0.5).masked_fill_(hidden, -torch.inf)
    else:
        scores = bias.onto(scores, rows, keys, hidden, D).view(n, G, *hidden.shape)
    return torch.softmax(scores, dim=-1).to(q.dtype)


def _attend_band(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> Tensor:
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
    y = F.scaled_dot_product_attention(q, band(k), band(v), attn_mask=mask, scale=scale, enable_gqa=k.size(1) != H)
    return y.view(B, n, H, block, D).transpose(1, 2).reshape(B, H, n * block, D)[:, :, :T]


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
        self, n_layer: int, batch: int, n_kv_head: int, capacity: int, head_dim: int, device: torch.device | str, dtype: torch.dtype
    ):
        dtype = torch.promote_types(dtype, torch.float32) if torch.device(device).type == "cpu" else dtype
        self.k = torch.zeros(n_layer, batch, n_kv_head, capacity + 1, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.w = self.k.new_zeros(1, batch, 1, capacity + 1, 0)  # of the width that the first pass brings
        self.tail = self._seen = torch.zeros(batch, 0, dtype=torch.int64, device=device)  # before the pass under way, and with it
        self._memory = 0  # tokens of a tail
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
        if m := self._memory:
            at = torch.tensor(counts, device=self.tail.device)[:, None] + torch.arange(m, device=self.tail.device)
            self.tail = self._seen.gather(1, at)

    def look(self, seen: Tensor, w: Tensor) -> Tensor:
        """Keep what a prior saw (B, tail + T tokens) and looked up (B, T, R) in the pass under way; the look-ups of all keys so far."""
        self._seen, self._memory = seen, seen.size(1) - w.size(1)
        if self.w.size(-1) != w.size(-1):
            self.w = self.w.new_zeros(*self.w.shape[:-1], w.size(-1))
        self.w[0, torch.arange(w.size(0), device=w.device)[:, None], 0, self._slots] = w.to(self.w.dtype)
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

    def drop(self, row: int) -> None:
        """Forget a row at the cost of copying one: the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            used = self.lengths[last]
            for x in (self.k, self.v, self.w):
                x[:, row, :, :used] = x[:, last, :, :used]
            self.tail[row] = self.tail[last]
            self.lengths[row] = self.lengths[last]
        self.k, self.v, self.w, self.tail = self.k[:, :last], self.v[:, :last], self.w[:, :last], self.tail[:last]
        self.lengths.pop()

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int = 0, bias: Bias | None = None
    ) -> Tensor:
        """Write k, v (B, H_kv, T, D) at `positions` (from `positions(T)`) and attend from q (B, H, T, D) to all that a query may see."""
        B, T = q.size(0), q.size(2)
        K, V = self.k[layer], self.v[layer]
        if positions.size(0) == 1:  # rows equally long: a plain slice
            start, end = self.lengths[0], self.lengths[0] + T
            if end > self.capacity:
                raise ValueError(f"the cache holds {self.capacity} positions, {end} were asked of it")
            K[:, :, start:end] = k
            V[:, :, start:end] = v
            if start == 0:
                return attend(q, k, v, window, bias)
        else:
            b = torch.arange(B, device=q.device)[:, None]
            K[b, :, self._slots] = k.transpose(1, 2).to(K.dtype)
            V[b, :, self._slots] = v.transpose(1, 2).to(V.dtype)
            end = min(max(self.lengths) + T, self.capacity)
        first = max(0, min(self.lengths) + 1 - window) if window > 0 else 0  # older keys are beyond every query's window
        K, V = K[:, :, first:end], V[:, :, first:end]
        if bias is None:
            return self._over(K, V, q, first, positions, window).to(k.dtype)
        parts = range(0, T, QUERY_BLOCK)  # its scores are numbers a head, too large for all queries at once
        cut = [(slice(s, s + QUERY_BLOCK), bias._replace(u=bias.u[:, s : s + QUERY_BLOCK])) for s in parts]
        return torch.cat([self._over(K, V, q[:, :, s], first, positions[:, s], window, b) for s, b in cut], dim=2).to(k.dtype)

    def _over(
        self, K: Tensor, V: Tensor, q: Tensor, first: int, positions: Tensor, window: int, bias: Bias | None = None
    ) -> Tensor:
        """Attend from q (B, H, T, D) to K, V (B, H_kv, keys, D), whose keys begin at position `first`."""
        B, H, T, D = q.shape
        mask, G = None, H // K.size(1)
        i, j = positions[:, :, None], torch.arange(first, first + K.size(2), device=q.device)
        if T > 1 or positions.size(0) > 1:  # a single query of rows equally long sees all that is left: no mask
            mask = j <= i  # (1 or B, T, keys)
            if window > 0:
                mask &= i - j < window
        if bias is not None:
            scores = bias.scores(i, first, first + K.size(2), H).to(K.dtype)
            mask = (scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)).reshape(B, H // G, G * T, -1)
        elif mask is not None:
            mask = mask.repeat(1, G, 1)[:, None]
        # The query heads of a group become further queries of their shared head: no kernel falls back on copying keys
        y = F.scaled_dot_product_attention(q.to(K.dtype).reshape(B, H // G, -1, D), K, V, attn_mask=mask)
        return y.reshape(B, H, T, D)
