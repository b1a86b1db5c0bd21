"""
Causal attention, with one function for every device: `attend`.

`attend` is for whole sequences (training, scoring); `cache.KVCache.attend` is for sequences that
grow (prefill, decoding). Both compute the same: query i sees key j when j <= i and, in a layer with
a window, i - j < window. An attention prior (`Bias`) is added to the scores in one of three forms
with the same result: "factored" (extra columns of q and k), "flex" (FlexAttention) and "dense" (a
T x T mask; the other forms never build anything T x T). The model rotates and normalises q and k
before it calls these functions.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.base.common import UserError, notice
from nanochat.base.runtime import compiler_missing


class Bias(NamedTuple):
    """
    What a prior adds to the scores of a layer's first n heads, after their division by sqrt(D).
    For head h, query i and key j it is

        sum_g gate[h, g] sum_r u[i, r] w[j, r]  +  place_gate[h] * place[...]

    The first sum goes over the groups of the prior's terms and r over the columns of group g: these
    terms depend on tokens. `place` is the term that depends on positions only; it is indexed with
    [i - j], [h, i - j] or [i, j], depending on its shape.
    """

    u: Tensor  # (B, T, R), one row per query
    w: Tensor  # (B, keys, R), one row per key, from position 0
    gate: Tensor  # (n, groups)
    # (C,) or (n, 1, C) by distance, where the last entry is for C - 1 and more; or (C, C). All
    # zeros where a kernel cannot look positions up: then they are columns of u and w.
    place: Tensor
    place_gate: Tensor  # (n,)
    columns: tuple[int, ...]  # how many columns each group has; their sum is R
    reach: int | None = None  # place is 0 from this distance on; None: not known
    form: str = "factored"
    block_mask: Any = None  # FlexAttention's BlockMask, in the flex form

    def scores(self, i: Tensor, first: int, end: int, heads: int) -> Tensor:
        """
        The bias for queries at positions i (1 or B, T, 1) and keys first..end-1:
        (B, heads, T, keys) in w's dtype. Entries where j > i are meaningless: mask them.
        """
        w = self.w[:, None, first:end]
        scores = (self.u[:, None].to(w.dtype) * self.column_gates()[:, None].to(w.dtype)) @ w.mT
        place = _look_up(self.place, i, torch.arange(first, end, device=i.device))
        scores = scores + (self.place_gate[:, None, None] * place).to(w.dtype)
        return _pad_heads(scores, heads)

    def column_gates(self) -> Tensor:
        """The gate of every column: (n, R)."""
        gates = zip(self.gate.unbind(1), self.columns, strict=True)
        return torch.cat([self.gate[:, :0], *(g[:, None].expand(-1, n) for g, n in gates)], 1)

    def block(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """
        The bias of one block before its gates, in float32 or wider: the products u w^T of all
        groups, (B, groups, rows * keys), and place for those of the keys that are within reach,
        (1 or n, rows, near keys). These are the last ones of the block.
        """
        u, w, wide = self.u[:, rows], self.w[:, keys], _wide(self.u)
        products = u.new_empty(u.size(0), len(self.columns), u.size(1), w.size(1), dtype=wide)
        start = 0
        for group, width in enumerate(self.columns):
            stop = start + width
            products[:, group] = torch.bmm(u[..., start:stop], w[..., start:stop].mT)
            start = stop
        if self.reach is None:
            first = keys.start
        elif self.reach == 0:
            first = keys.stop
        else:
            first = max(keys.start, rows.start + 1 - self.reach)
        j = torch.arange(first, keys.stop, device=u.device)
        i = torch.arange(rows.start, rows.stop, device=u.device)[:, None]
        return products.flatten(2), _look_up(self.place, i, j).to(wide)

    def add_to_scores(self, scores: Tensor, block: tuple[Tensor, Tensor], D: int) -> None:
        """
        In place: divide the products q k^T of a block, (B, H, rows, keys), by sqrt(D), and add the
        bias, of which `block` is what self.block returned.
        """
        products, place = block
        n = self.gate.size(0)
        scores[:, n:] *= D**-0.5
        gate = self.gate.to(scores.dtype).expand(scores.size(0), -1, -1)
        scores[:, :n].flatten(2).baddbmm_(gate, products, beta=D**-0.5)
        near = scores[:, :n, :, scores.size(3) - place.size(2) :]
        near += self.place_gate.to(scores.dtype)[:, None, None] * place

    def gate_gradients(self, ds: Tensor, block: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """
        One block's part of the gradients of gate and place_gate, from the gradients ds of its
        scores, (B, H, rows, keys): sums of ds times the ungated bias that self.block returned.
        """
        products, place = block
        ds = ds[:, : self.gate.size(0)]
        near = ds[..., ds.size(3) - place.size(2) :].sum(0)
        d_gate = torch.bmm(ds.flatten(2), products.mT).sum(0)
        return d_gate, (near * place).sum((1, 2))


def _look_up(place: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """place at queries i (..., T, 1) and keys j (keys,): (..., 1 or n, T, keys)."""
    if place.dim() == 2:
        return place[i, j.clamp(max=place.size(1) - 1)].unsqueeze(-3)
    distance = (i - j).clamp(0, place.size(-1) - 1)
    return place.view(-1, place.size(-1))[:, distance].movedim(0, -3)


def _pad_heads(x: Tensor, heads: int) -> Tensor:
    """(..., n, rows, keys) -> (..., heads, rows, keys): the heads without a prior get zeros."""
    return F.pad(x, (0, 0, 0, 0, 0, heads - x.size(-3)))


# At most one document begins in so many positions. The number of documents is then bounded, so
# memory for them can be allocated on a GPU without the host knowing how many there are.
CELL = 16


def document_starts(idx: Tensor, bos: int) -> Tensor:
    """
    For each token in idx (B, T), the position at which its document begins: (B, T). A document
    begins at a token `bos`, unless another one has begun earlier in the same CELL positions.
    """
    B, T = idx.shape
    begins = F.pad(idx == bos, (0, -T % CELL)).view(B, -1, CELL)
    begins = (begins & (begins.cumsum(2) == 1)).view(B, -1)[:, :T]
    return torch.where(begins, torch.arange(T, device=idx.device), 0).cummax(1).values


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int = 0,
    bias: Bias | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """
    Causal attention over a whole sequence: softmax(q k^T / sqrt(D) + bias) v.

    q (B, H, T, D); k, v (B, H_kv, T, D) with H a multiple of H_kv. window: how many keys a query
    sees, including its own (0 = all). starts (B, T): the first key that each query may see, from
    document_starts. Returns (B, H, T, D). UserError for starts together with a bias of the dense or
    flex form.
    """
    T = q.size(2)
    if starts is not None and bias is not None and bias.form != "factored":
        raise UserError(
            f"--document_attention cannot be combined with a prior in the {bias.form} form: leave "
            "out --document_attention or --rap"
        )
    if bias is not None and bias.form == "flex":
        return attend_flex(q, k, v, window, bias)
    if bias is not None and bias.form == "dense":
        return attend_at(torch.arange(T, device=q.device)[None], q, k, v, 0, window, bias)
    if q.device.type == "cpu":
        window = window if 0 < window < T else T
        fields = bias[:7] if bias is not None else ()  # u to reach: autograd wants plain tensors
        y: Any = _BlockAttention.apply(q, k, v, window, starts, *fields)
        return y
    return attend_fused(q, k, v, window, bias, starts)


def visible(positions: Tensor, first: int, end: int, window: int) -> Tensor | None:
    """
    Which of the keys first..end-1 the queries at `positions` (1 or B, T) see: a boolean mask (1 or
    B, T, keys), or None for a single query on a GPU, which sees them all.
    """
    if positions.numel() == 1 and positions.device.type != "cpu":
        return None
    i, j = positions[:, :, None], torch.arange(first, end, device=positions.device)
    mask = j <= i
    return mask & (i - j < window) if window > 0 else mask


def score_mask(seen: Tensor | None, H: int, H_kv: int, dtype: torch.dtype) -> Tensor | None:
    """
    The mask that `attend_at` adds to the scores, from that of `visible` (1 or B, T, keys): 0 for
    keys that are seen, -inf for the others, (1 or B, 1, T * H / H_kv, keys); None stays None.
    """
    if seen is None:
        return None
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return mask.repeat(1, H // H_kv, 1)[:, None]


def attend_at(
    positions: Tensor,
    q: Tensor,
    K: Tensor,
    V: Tensor,
    first: int,
    window: int,
    bias: Bias | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """
    Attend from q (B, H, T, D) at `positions` (1 or B, T) to the keys and values K, V
    (B, H_kv, keys, D) of the positions from `first` on: (B, H, T, D). `mask` is score_mask's,
    if the caller has it already.
    """
    B, H, T, D = q.shape
    H_kv, end = K.size(1), first + K.size(2)
    if mask is None:
        mask = score_mask(visible(positions, first, end, window), H, H_kv, K.dtype)
    if bias is not None:
        scores = bias.scores(positions[:, :, None], first, end, H).to(K.dtype)
        scores = scores.reshape(B, H_kv, -1, K.size(2))
        mask = scores if mask is None else scores + mask
    # Query heads that share a key head become additional queries of one head, so that no kernel has
    # to copy keys.
    q = q.to(K.dtype).reshape(B, H_kv, -1, D)
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, K, V, attn_mask=mask).reshape(B, H, T, D)
    # Not the fused kernel: with several threads, its rounding of a row depends on the other rows
    scores = torch.bmm(q.flatten(0, 1) * D**-0.5, K.flatten(0, 1).mT).view(B, H_kv, -1, K.size(2))
    p = torch.softmax(scores if mask is None else scores.add_(mask), -1)
    return torch.bmm(p.flatten(0, 1), V.flatten(0, 1)).view(B, H, T, D)


# ---- GPUs: torch's fused kernels


def attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    bias: Bias | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """
    `attend` by torch's fused kernels, with a bias as additional columns of q and k. Without flash
    attention, windows and documents become a mask, and keys are copied for the heads that share
    them: torch would otherwise hold all scores of grouped heads at once.
    """
    T, D = q.shape[2:]
    if bias is not None:
        q, k, v = _with_columns(q, k, v, bias)
    flash = has_flash(q.device, q.dtype, q.size(3))
    group, mask = q.size(1) // k.size(1), None
    window = window if 0 < window < T else 0
    if (window or starts is not None) and flash:
        y = _attend_varlen(q, k, v, window, D**-0.5, starts)
    else:
        if group > 1 and not flash:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        positions = torch.arange(T, device=q.device)
        if window or starts is not None:
            mask = visible(positions[None], 0, T, window)
        if starts is not None:
            seen = positions >= starts[:, :, None]
            mask = (seen if mask is None else mask & seen)[:, None]
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=D**-0.5, enable_gqa=k.size(1) < q.size(1)
        )
    return y if bias is None else y[..., :D]


def has_flash(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """
    Whether torch can train heads of this width with flash attention. No other of its kernels lets
    query heads share keys, or skips the keys before a window.
    """
    half = dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        # Their shared memory is too small for the gradients of 193 to 224
        geforce = (card.major == 8 and card.minor >= 6) or card.major == 12
        return half and card.major >= 8 and not (geforce and 192 < width <= 224)
    return half and device.type == "meta"  # where the memory of a GPU is traced


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, starts: Tensor | None
) -> Tensor:
    """
    Flash attention with a window (0 = none) or within documents. The whole batch becomes one row of
    sequences, which are rows of T tokens or documents. The host does not know how many documents
    there are: it passes as many as there can be, and those that are missing are empty.
    """
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = q.shape
    if starts is None:
        bounds = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    else:
        begins = (starts == torch.arange(T, device=q.device)).flatten()
        most_documents = B * (T // CELL + 2)
        bounds = torch.nonzero_static(begins, size=most_documents + 1, fill_value=B * T)
        bounds = bounds.flatten().int()
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    y: Any = varlen_attn(
        q,
        k,
        v,
        bounds,
        bounds,
        T,
        T,
        scale=scale,
        window_size=(window - 1, 0),
        enable_gqa=k.size(1) < q.size(1),
    )
    return y.unflatten(0, (B, T)).transpose(1, 2)


def _with_columns(q: Tensor, k: Tensor, v: Tensor, bias: Bias) -> tuple[Tensor, Tensor, Tensor]:
    """
    q and k with the columns of a bias appended, [q ; sqrt(D) gate u] and [k ; w], and v. All three
    are padded with zeros to the same width, a multiple of 8 as kernels demand.
    """
    D, R = q.size(3), bias.u.size(2)
    pad = -(D + R) % 8
    u = _pad_heads((bias.u[:, None] * bias.column_gates()[:, None]) * D**0.5, q.size(1))
    w = bias.w[:, None, : q.size(2)].expand(-1, k.size(1), -1, -1)
    q = torch.cat((q, F.pad(u, (0, pad)).to(q.dtype)), -1)
    k = torch.cat((k, F.pad(w, (0, pad)).to(k.dtype)), -1)
    return q, k, F.pad(v, (0, R + pad))


# ---- forms of a prior that look positions up


def attention_form(
    form: str, device: torch.device, dtype: torch.dtype, width: int, look_up: bool
) -> str:
    """
    The form in which a prior is added on this device: `form` if possible, else another one, with a
    notice where FlexAttention is missing. A CPU has all forms but flex. width: of a head, including
    the prior's columns. look_up: the prior has positions that are not columns of u and w, so that
    GPUs cannot use the factored form.
    """
    look_up = look_up and device.type != "cpu"
    if look_up and form == "factored":
        form = "flex"
    if form == "flex" and (missing := flex_missing(device, dtype, width)):
        form = "dense" if look_up else "factored"
        notice(f"{missing}: the prior is added in the {form} form")
    return form


def attend_flex(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Bias) -> Tensor:
    """
    `attend` by FlexAttention: the terms that depend on tokens are additional columns of q and k,
    and the kernel looks up those that depend on positions.
    """
    _, H, T, D = q.shape
    C = bias.place.size(-1)
    q, k, _ = _with_columns(q, k, v, bias)
    gate = F.pad(bias.place_gate, (0, H - bias.place_gate.size(0)))
    place = _pad_heads(bias.place, H) if bias.place.dim() == 3 else bias.place

    def add_place(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = torch.where(i - j < 0, 0, torch.where(i - j < C, i - j, C - 1))
        if place.dim() == 1:
            return score + gate[h] * place[distance]
        return score + gate[h] * (place[i, j] if place.dim() == 2 else place[h, 0, distance])

    mask = bias.block_mask if bias.block_mask is not None else flex_mask(T, window, q.device)
    flex = _flex_attention(not torch.compiler.is_compiling())
    return flex(q, k, v, score_mod=add_place, block_mask=mask, scale=D**-0.5, enable_gqa=True)


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


@functools.lru_cache(maxsize=64)
def flex_mask(T: int, window: int, device: torch.device) -> Any:
    """FlexAttention's BlockMask for T positions with a window (0 = none); cached."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < (window or T))

    with torch.inference_mode(False):  # a reply may need it first, and training cannot save such
        return create_block_mask(visible, None, None, T, T, device=device)


@functools.cache
def flex_missing(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """
    Why FlexAttention cannot train on this device with heads of this width; '' when it can. Its
    backward pass exists only on CUDA, and wide heads may not fit the GPU's shared memory.
    """
    if device.type != "cuda":
        return f"FlexAttention cannot train on {device.type}"
    if missing := compiler_missing(device):
        return missing
    with torch.inference_mode(False), torch.enable_grad():  # the caller may be an evaluation
        new = functools.partial(torch.zeros, device=device, dtype=dtype)
        q, k, v = (new(1, 2, 256, 64, requires_grad=True) for _ in range(3))
        R = max(0, width - 64)
        u = new(1, 256, R)
        gate, place_gate = new(2, 1, requires_grad=True), new(2, requires_grad=True)
        try:
            attend_flex(q, k, v, 0, Bias(u, u, gate, new(256), place_gate, (R,))).sum().backward()
        except Exception as e:  # of the compiler or the GPU, of any kind: use another form
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            return f"FlexAttention fails here ({reason})"
    return ""


# ---- CPUs: blocks of batched matrix products

QUERY_BLOCK = 128  # queries per step of the CPU kernel: a block of scores should fit the cache


class _BlockAttention(torch.autograd.Function):
    """
    The CPU kernel: batched matrix products of one block of queries with the keys that it can see.
    These products run at the machine's peak; torch's fused CPU kernel reaches a tenth of it. One
    block of scores exists at a time, and the backward pass computes it again. Scores have the
    precision of the inputs (a batched product of bfloat16 gives bfloat16); the softmax is in
    float32 or wider.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int,
        starts: Tensor | None,
        *fields: Any,
    ) -> Tensor:
        shape, bias = q.shape, Bias(*fields) if fields else None
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        q = q.reshape(k.size(0), -1, *q.shape[2:])  # (B * H_kv, G, T, D)
        y = torch.empty_like(q)
        for rows, keys, hidden in _blocks(q, window, starts):
            p, _ = _probabilities(q, k, rows, keys, hidden, bias)
            y[:, :, rows] = torch.bmm(p.flatten(1, 2), v[:, keys]).view(y[:, :, rows].shape)
        ctx.save_for_backward(q, k, v, y, starts, *fields[:5])
        ctx.shape, ctx.window, ctx.fields = shape, window, fields[5:]
        return y.view(shape)

    @staticmethod
    def backward(ctx, *grads):
        (q, k, v, y, starts, *bias_tensors), (B, H, T, D) = ctx.saved_tensors, ctx.shape
        bias = Bias(*bias_tensors, *ctx.fields) if bias_tensors else None
        learned = any(ctx.needs_input_grad[5:])  # the gates of the bias are parameters
        d_gate = d_place_gate = None
        wide = _wide(q)
        dy, dq = grads[0].reshape(q.shape), torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        delta = (dy.to(wide) * y).sum(-1, keepdim=True)  # (B * H_kv, G, T, 1)
        for rows, keys, hidden in _blocks(q, ctx.window, starts):
            p, added = _probabilities(q, k, rows, keys, hidden, bias)
            dy_rows, q_rows = dy[:, :, rows].flatten(1, 2), q[:, :, rows].flatten(1, 2)
            dp = torch.bmm(dy_rows, v[:, keys].mT).view(p.shape)
            ds = (dp - delta[:, :, rows]) * p
            if bias is not None and learned:
                block_ds = ds.view(B, H, *hidden.shape[-2:])
                gate_part, place_part = bias.gate_gradients(block_ds, added)
                d_gate = gate_part if d_gate is None else d_gate + gate_part
                d_place_gate = place_part if d_place_gate is None else d_place_gate + place_part
            ds = ds.mul_(D**-0.5).to(q.dtype).flatten(1, 2)
            dq[:, :, rows] = torch.bmm(ds, k[:, keys]).view(dq[:, :, rows].shape)
            dk[:, keys] += torch.bmm(ds.mT, q_rows)
            dv[:, keys] += torch.bmm(p.flatten(1, 2).mT, dy_rows)
        dk, dv = dk.to(k.dtype).view(B, -1, T, D), dv.to(v.dtype).view(B, -1, T, D)
        dq = dq.view(B, H, T, D)
        if bias is None:
            return dq, dk, dv, None, None
        if d_gate is not None and d_place_gate is not None:
            d_gate = d_gate.to(bias.gate.dtype)
            d_place_gate = d_place_gate.to(bias.place_gate.dtype)
        # None: window, starts, and the fields of the bias that have no gradient
        return dq, dk, dv, None, None, None, None, d_gate, None, d_place_gate, None, None


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for such an x."""
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(q: Tensor, window: int, starts: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """
    For each block of the queries q (B * H_kv, G, T, D): the slice of its rows, the slice of the
    keys that any of them sees, and a mask to add to its scores, 0 where a key is seen and else
    -inf: (1, 1, rows, keys), or (B, 1, rows, keys) with starts, in float32 or wider.
    """
    T = q.size(2)
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        first = max(0, start - window + 1)
        i = torch.arange(start, stop, device=q.device)[:, None]
        j = torch.arange(first, stop, device=q.device)
        hidden = torch.zeros(1, 1, stop - start, stop - first, dtype=_wide(q), device=q.device)
        hidden.masked_fill_((j > i) | (i - j >= window), -torch.inf)
        if starts is not None:
            earlier = j < starts[:, None, start:stop, None]
            hidden = hidden.expand_as(earlier).masked_fill(earlier, -torch.inf)
        yield slice(start, stop), slice(first, stop), hidden


def _probabilities(
    q: Tensor, k: Tensor, rows: slice, keys: slice, hidden: Tensor, bias: Bias | None
) -> tuple[Tensor, Any]:
    """
    softmax(q k^T / sqrt(D) + bias + hidden) of one block, (B * H_kv, G, rows, keys) in q's dtype,
    and the bias in this block, from Bias.block, if there is one.
    """
    heads, G, _, D = q.shape
    block = hidden.shape[-2:]
    scores = torch.bmm(q[:, :, rows].flatten(1, 2), k[:, keys].mT)
    scores = scores.view(heads, G, *block).to(_wide(q))
    added = None
    if bias is None:
        scores.mul_(D**-0.5)
    else:
        added = bias.block(rows, keys)
        bias.add_to_scores(scores.view(bias.u.size(0), -1, *block), added, D)
    scores.view(hidden.size(0), -1, *block).add_(hidden)
    return torch.softmax(scores, dim=-1).to(q.dtype), added
