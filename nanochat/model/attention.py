"""
Causal attention behind one signature.

`attend` serves whole sequences (training, scoring); `cache.KVCache.attend` serves sequences that grow (prefill, decoding). Both
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

from nanochat.base.runtime import compiler_missing


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
        return F.pad(
            s + (self.place_gate[:, None, None] * at).to(w.dtype),
            (0, 0, 0, 0, 0, heads - s.size(1)),
        )

    def onto(self, raw: Tensor, rows: slice, keys: slice, hidden: Tensor, D: int) -> Tensor:
        """q k^T of one block, (B * H_kv, G * rows, keys) and overwritten -> masked scores (B, H, rows, keys), float32 or wider."""
        B, n, (r, c) = self.u.size(0), self.gate.size(0), hidden.shape
        raw = raw.view(B, -1, c)
        raw[:, : n * r].baddbmm_(
            (self.u[:, None, rows] * self.gate[:, None]).flatten(1, 2),
            self.w[:, keys].mT,
            alpha=D**0.5,
        )
        raw = raw.view(B, -1, r, c)
        added = self.place_gate.to(_wide(raw))[:, None, None] * self.block(rows, keys)
        return torch.add(
            F.pad(added, (0, 0, 0, 0, 0, raw.size(1) - n)).masked_fill_(hidden, -torch.inf),
            raw,
            alpha=D**-0.5,
        )

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


def _attend_fused(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None
) -> Tensor:
    if window <= 0 or window >= q.size(2):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=k.size(1) != q.size(1)
        )
    return _attend_band(q, k, v, window, scale)


def _widened(q: Tensor, k: Tensor, v: Tensor, bias: Bias) -> tuple[Tensor, Tensor, Tensor]:
    """[q ; sqrt(D) gate u], [k ; w] and v, padded with zeros to one width that is a multiple of 8: kernels want equal ones."""
    (_, H, T, D), (n, R) = q.shape, bias.gate.shape
    pad = -(D + R) % 8
    u = F.pad((bias.u[:, None] * bias.gate[:, None]) * D**0.5, (0, pad, 0, 0, 0, H - n))
    w = F.pad(bias.w[:, None, :T], (0, pad)).expand(-1, k.size(1), -1, -1)
    return (
        torch.cat((q, u.to(q.dtype)), -1),
        torch.cat((k, w.to(k.dtype)), -1),
        F.pad(v, (0, R + pad)),
    )


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Bias) -> Tensor:
    """The reference: a T x T mask that holds the prior. For short sequences, and for matrices that no few columns can give."""
    T = q.size(2)
    i, j = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)
    hidden = (j > i) | (i - j >= (window or T))
    mask = bias.scores(i[None], 0, T, q.size(1)).masked_fill(hidden, -torch.inf)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.to(q.dtype), enable_gqa=k.size(1) != q.size(1)
    )


@functools.cache
def flex_missing(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Why FlexAttention cannot train here, or '' when it can: its backward exists on CUDA alone, and wide heads may not fit a card."""
    if device.type != "cuda":
        return f"FlexAttention cannot train on {device.type}"
    if missing := compiler_missing(device):
        return missing
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
    ):  # it may be asked for the first time in an evaluation
        q, k, v = (
            torch.zeros(1, 2, 256, 64, device=device, dtype=dtype, requires_grad=True)
            for _ in range(3)
        )
        gates = torch.zeros(
            2, width - 64 if width > 64 else 0, device=device, dtype=dtype, requires_grad=True
        )
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

    return create_block_mask(
        lambda b, h, i, j: (j <= i) & (i - j < (window or T)), None, None, T, T, device=device
    )


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Bias) -> Tensor:
    """FlexAttention: tokens as further columns of q and k, positions looked up in the kernel, blocks beyond the mask left out."""
    D, place = q.size(3), bias.place
    q, k, _ = _widened(q, k, v, bias)
    more = q.size(1) - bias.place_gate.size(0)  # heads without a prior
    gate = F.pad(bias.place_gate, (0, more))
    place = F.pad(place, (0, 0, 0, 0, 0, more)) if place.dim() == 3 else place

    def added(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = torch.where(
            i - j < 0, 0, torch.where(i - j < place.size(-1), i - j, place.size(-1) - 1)
        )
        return score + gate[h] * (
            place[i, j]
            if place.dim() == 2
            else place[h, 0, distance]
            if place.dim() == 3
            else place[distance]
        )

    blocks = bias.blocks if bias.blocks is not None else flex_blocks(q.size(2), window, q.device)
    return _flex(not torch.compiler.is_compiling())(
        q, k, v, score_mod=added, block_mask=blocks, scale=D**-0.5, enable_gqa=True
    )


QUERY_BLOCK = 128  # queries a step of the CPU kernel: one block of scores should stay in the cache


class _BlockAttention(torch.autograd.Function):
    """
    The CPU kernel: blocks of queries against the keys that they can see, as batched matrix products. Those reach the machine's peak where
    torch's fused CPU kernel stays at a tenth of it. One block of scores exists at a time; the backward pass computes them again.
    Scores have the precision of the inputs (a batched product of bfloat16 gives bfloat16), the softmax is float32 or wider.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, window: int, *given: Any
    ) -> Tensor:  # given: the tensors of a Bias
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
        d_given = [
            torch.zeros_like(x, dtype=_wide(q)) if want else None
            for x, want in zip(given, ctx.needs_input_grad[4:], strict=True)
        ]
        dy = grads[0].reshape(q.shape)
        dq, dk, dv = (
            torch.empty_like(q),
            torch.zeros_like(k, dtype=_wide(k)),
            torch.zeros_like(v, dtype=_wide(v)),
        )
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
                    d_given[4] += (
                        ds.view(B, n, r, -1).sum(0, dtype=d_given[4].dtype) * bias.block(rows, keys)
                    ).sum((1, 2))
        d_k, d_v = dk.to(k.dtype).view(B, -1, T, D), dv.to(v.dtype).view(B, -1, T, D)
        d_given = [
            d if d is None else (d * D**0.5).to(x.dtype)
            for d, x in zip(d_given, given, strict=True)
        ]
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
        i, j = (
            torch.arange(start, stop, device=device)[:, None],
            torch.arange(first, stop, device=device)[None, :],
        )
        yield slice(start, stop), slice(first, stop), (j > i) | (i - j >= window)


def _probabilities(
    q: Tensor, k: Tensor, rows: slice, keys: slice, hidden: Tensor, bias: Bias | None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) of one block: (B * H_kv, G, rows, keys) in q's dtype."""
    n, G, _, D = q.shape
    scores = torch.bmm(q[:, :, rows].flatten(1, 2), k[:, keys].mT)
    if bias is None:
        scores = (
            scores.view(n, G, *hidden.shape)
            .to(_wide(q))
            .mul_(D**-0.5)
            .masked_fill_(hidden, -torch.inf)
        )
    else:
        scores = bias.onto(scores, rows, keys, hidden, D).view(n, G, *hidden.shape)
    return torch.softmax(scores, dim=-1).to(q.dtype)


def _attend_band(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None
) -> Tensor:
    """Windowed attention: blocks of queries, each against the band of window + block keys that it can see."""
    B, H, T, D = q.shape
    block = min(window, 128)
    n = -(-T // block)  # blocks, the last one perhaps padded
    q = (
        F.pad(q, (0, 0, 0, n * block - T))
        .view(B, H, n, block, D)
        .transpose(1, 2)
        .reshape(B * n, H, block, D)
    )

    def band(
        x: Tensor,
    ) -> Tensor:  # (B, H_kv, T, D) -> (B * n, H_kv, window + block, D); block b holds keys b*block - window and on
        x = F.pad(x, (0, 0, window, n * block - T)).unfold(
            2, window + block, block
        )  # (B, H_kv, n, D, window + block)
        return x.permute(0, 2, 1, 4, 3).reshape(B * n, x.size(1), window + block, D)

    i = torch.arange(block, device=q.device)[:, None] + window  # a query's slot in its band
    j = torch.arange(window + block, device=q.device)[None, :]
    absolute = (
        j + torch.arange(n, device=q.device)[:, None, None] * block - window
    )  # below 0: left padding
    mask = ((j <= i) & (i - j < window) & (absolute >= 0)).repeat(B, 1, 1)[
        :, None
    ]  # (B * n, 1, block, window + block)
    y = F.scaled_dot_product_attention(
        q, band(k), band(v), attn_mask=mask, scale=scale, enable_gqa=k.size(1) != H
    )
    return y.view(B, n, H, block, D).transpose(1, 2).reshape(B, H, n * block, D)[:, :, :T]
