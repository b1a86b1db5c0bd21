"""
Cross entropy of a linear head with a soft cap, without ever holding the logits of a whole batch.

The head's product, the cap and the softmax run over a few hundred rows at a time. Where gradients
are needed, they are computed in the same pass: no chunk is computed twice, and memory holds one
chunk of logits. Targets of -1 are ignored.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits per chunk. On a CPU, the few temporaries of this size should fit its cache. On a GPU,
# compiled code holds two of them in the compute dtype; eager code holds five in float32.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25, "meta": 1 << 25}
COMPILED_ELEMENTS = {"cuda": 1 << 27, "meta": 1 << 27}
# On a CPU, the d(loss)/d(logits) of so many chunks are kept for one product with the inputs.
BLOCK_CHUNKS = {"cpu": 8}
MOST_EXPONENT = 60.0  # exp() of it, summed over any vocabulary, fits float32


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32; softcap 0 means none."""
    logits = logits.float()
    if softcap <= 0:
        return logits
    # tanh(x) = 2 sigmoid(2 x) - 1, and sigmoid is six times as fast on a CPU
    return torch.sigmoid(logits * (2 / softcap)) * (2 * softcap) - softcap


def _chunk_both(x: Tensor, w: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """
    The losses of the rows (R), 0 where the target is -1, and d(loss)/d(uncapped logits) / 4 (R, V)
    in x's dtype. x (R, D), w (V, D), targets (R).
    """
    z, s = (x @ w.t()).float(), None
    if softcap > 0:
        s = z.mul_(2 / softcap).sigmoid_()
        z = (s * (2 * softcap)).sub_(softcap)
    if not 0 < softcap <= MOST_EXPONENT:  # else the cap itself keeps exp() finite
        z = z - z.amax(-1, keepdim=True)
    index = targets.clamp(min=0)[:, None]
    of_target = z.gather(1, index)
    e = z.exp_()
    total = e.sum(-1, keepdim=True)
    nll = (total.log() - of_target).squeeze(1) * (targets >= 0)
    d = e.mul_(1 / total)
    if torch.compiler.is_compiling():  # a scatter would split what is otherwise one kernel
        d = d - (torch.arange(d.size(1), device=d.device) == index).float()
    else:
        d = d.scatter_add_(1, index, d.new_full((), -1.0).expand(index.shape))
    if s is not None:
        d = d.mul_(torch.addcmul(s, s, s, value=-1))  # tanh' = 1 - tanh^2 = 4 s (1 - s)
    else:
        d = d.mul_(0.25)
    return nll, d.to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum(weights * nll); the forward pass computes the gradients of x and w chunk by chunk."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        softcap: float,
        compiled: bool,
    ) -> Tensor:
        x, weight = x.detach(), weight.detach()  # compiled chunks are the same in evaluations
        R, w, rows = x.size(0), weight.to(x.dtype), chunk_rows(x, weight, compiled)
        both, block_chunks = _both(compiled), BLOCK_CHUNKS.get(x.device.type, 1)
        block_rows = rows * block_chunks
        dx = torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        kept = x.new_empty(min(block_rows, R) if block_chunks > 1 else 0, weight.size(0))
        for start in range(0, R, block_rows):
            block, d = slice(start, min(start + block_rows, R)), kept
            for at in range(start, block.stop, rows):
                chunk = slice(at, min(at + rows, block.stop))
                nll, d = both(x[chunk], w, targets[chunk], softcap)
                total += (nll * weights[chunk]).sum()
                if block_chunks > 1:
                    kept[at - start : chunk.stop - start] = d
                    d = kept[: chunk.stop - start]
            scale = (4 * weights[block, None]).to(x.dtype)
            torch.mul(d @ w, scale, out=dx[block])
            _add_product(dw, d.t(), x[block] * scale)
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *grads):
        dx, dw = ctx.saved_tensors
        g = grads[0]
        return dx * g.to(dx.dtype), (dw.mul_(g)).to(ctx.weight_dtype), None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; total is float32, and a GPU also sums half precision in it."""
    if total.device.type == "cuda" and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


_compiled: dict[str, Any] = {}


def _both(compiled: bool) -> Any:
    if not compiled:
        return _chunk_both
    if "both" not in _compiled:
        _compiled["both"] = torch.compile(_chunk_both, dynamic=False)
    return _compiled["both"]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    softcap: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """
    The sum over valid positions of weights * -log softmax(cap(x W^T))[target]: a float32 scalar,
    0 when no target is valid.

    x (..., D) in the compute dtype; weight (V, D); targets (...) int64, -1 ignored; weights (...)
    or None for ones. compiled: use torch.compile for the chunks.
    """
    x, targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    if weights is None:
        weights = torch.ones_like(targets, dtype=torch.float32)
    # masked_fill, not a product: an ignored position must not count, even if its weight is NaN
    weights = weights.reshape(-1).float().masked_fill(targets < 0, 0.0)
    total: Any = _LinearCrossEntropy.apply(x, weight, targets, weights, softcap, compiled)
    return total


@torch.no_grad()
def token_losses(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0, compiled: bool = False
) -> Tensor:
    """
    The negative log-likelihood of each target in nats, 0 where it is -1, in the shape of targets;
    arguments as for linear_cross_entropy.
    """
    w, flat = weight.detach().to(x.dtype), x.detach().reshape(-1, x.size(-1))
    rows = chunk_rows(flat, weight, compiled)
    if compiled:  # the code of training also computes gradients, but it is there already
        both, ids = _both(compiled), targets.reshape(-1)
        chunks = zip(flat.split(rows), ids.split(rows), strict=True)
        return torch.cat([both(x, w, y, softcap)[0] for x, y in chunks]).view(targets.shape)
    losses = [
        F.cross_entropy(capped(chunk @ w.t(), softcap), target, ignore_index=-1, reduction="none")
        for chunk, target in zip(flat.split(rows), targets.reshape(-1).split(rows), strict=True)
    ]
    return torch.cat(losses).view(targets.shape)


def chunk_rows(x: Tensor, weight: Tensor, compiled: bool = False) -> int:
    """
    The rows per chunk of x (R, D): R divided evenly if a suitable divisor is near, so that all
    chunks have the same shape.
    """
    elements = CHUNK_ELEMENTS.get(x.device.type, 1 << 25)
    if compiled:
        elements = COMPILED_ELEMENTS.get(x.device.type, elements)
    most = max(1, elements // weight.size(0))
    count = x.size(0)
    if count <= most:
        return count
    chunks = -(-count // most)
    even = next((n for n in range(chunks, 2 * chunks) if count % n == 0), chunks)
    return -(-count // even)
