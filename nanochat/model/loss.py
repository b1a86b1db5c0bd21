"""
Cross entropy of a linear head with a soft cap, without ever holding the logits of a whole batch.

The head's product, cap and softmax run over a few hundred rows at a time; where gradients are wanted they are formed in the
same pass, so no chunk is computed twice and memory stays at one chunk of logits. It refuses no target: -1 is ignored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = {
    "cpu": 1 << 19,
    "cuda": 1 << 27,
    "meta": 1 << 27,
}  # logits of one chunk: a CPU's few temporaries should stay in its cache
BLOCK_CHUNKS = {
    "cpu": 8,
    "cuda": 1,
}  # chunks whose d(loss)/d(logits) are kept, in the compute dtype, for one product with the inputs


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32; softcap 0 means none."""
    logits = (
        logits.float()
    )  # tanh(x) = 2 sigmoid(2 x) - 1, and a CPU's sigmoid is six times as fast
    return (
        torch.sigmoid(logits * (2 / softcap)) * (2 * softcap) - softcap if softcap > 0 else logits
    )


def _chunk_forward(x: Tensor, w: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Negative log-likelihood of each row, 0 where the target is -1. x (R, D), w (V, D), targets (R) -> (R) float32."""
    return F.cross_entropy(capped(x @ w.t(), softcap), targets, ignore_index=-1, reduction="none")


def _chunk_both(x: Tensor, w: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """The rows' losses (R), 0 where the target is -1, and their d/d(uncapped logits) / 4 (R, V) in x's dtype."""
    z, s = (x @ w.t()).float(), None
    if softcap > 0:
        s = z.mul_(
            2 / softcap
        ).sigmoid_()  # the cap is softcap * (2 s - 1); the softmax does not mind the constant
        z = s * (2 * softcap)
    d = torch.log_softmax(z, dim=-1)
    index = targets.clamp(min=0)[:, None]
    nll = -d.gather(1, index).squeeze(1) * (targets >= 0)
    d = d.exp_().scatter_add_(1, index, d.new_full((), -1.0).expand(index.shape))
    d = (
        d.mul_(torch.addcmul(s, s, s, value=-1)) if s is not None else d.mul_(0.25)
    )  # tanh' = 1 - tanh^2 = 4 s (1 - s)
    return nll, d.to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum(weights * nll) with the gradients of x and w formed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, softcap: float, both
    ) -> Tensor:
        w, rows = weight.to(x.dtype), chunk_rows(x, weight)
        block = rows * BLOCK_CHUNKS.get(x.device.type, 1)
        dx = torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        d = torch.empty(min(block, x.size(0)), weight.size(0), dtype=x.dtype, device=x.device)
        for first in range(0, x.size(0), block):
            whole = slice(first, min(first + block, x.size(0)))
            for at in range(first, whole.stop, rows):
                part = slice(at, min(at + rows, whole.stop))
                nll, d[at - first : part.stop - first] = both(x[part], w, targets[part], softcap)
                total += (nll * weights[part]).sum()
            here = d[: whole.stop - first]
            scale = (4 * weights[whole, None]).to(x.dtype)
            torch.mul(here @ w, scale, out=dx[whole])
            dw += here.t() @ (x[whole] * scale)
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *grads):
        dx, dw = ctx.saved_tensors
        g = grads[0]
        return dx * g.to(dx.dtype), (dw.mul_(g)).to(ctx.weight_dtype), None, None, None, None


_compiled: dict[str, object] = {}


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    softcap: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """
    The sum over valid positions of weights * -log softmax(cap(x W^T))[target]: a float32 scalar, 0 when no target is valid.

    x (..., D) in the compute dtype; weight (V, D); targets (...) int64, -1 ignored; weights (...) or None for ones.
    """
    x, targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    weights = (
        torch.ones_like(targets, dtype=torch.float32)
        if weights is None
        else weights.reshape(-1).float()
    )
    weights = weights.masked_fill(
        targets < 0, 0.0
    )  # not a product: whatever stands at an ignored position, NaN too, must not count
    both = _chunk_both
    if compiled:
        both = _compiled.setdefault("both", torch.compile(_chunk_both, dynamic=False))
    return _LinearCrossEntropy.apply(x, weight, targets, weights, softcap, both)  # type: ignore[return-value]


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """Each position's negative log-likelihood in nats, 0 where the target is -1; same shapes as linear_cross_entropy -> targets' shape."""
    flat, t = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    w = weight.to(x.dtype)
    rows = chunk_rows(flat, weight)
    parts = [
        _chunk_forward(flat[at : at + rows], w, t[at : at + rows], softcap)
        for at in range(0, flat.size(0), rows)
    ]
    return torch.cat(parts).view(targets.shape)


def chunk_rows(x: Tensor, weight: Tensor) -> int:
    """Rows a chunk: a divisor of the row count where one is near, so that every chunk has one shape."""
    most = max(1, CHUNK_ELEMENTS.get(x.device.type, 1 << 25) // weight.size(0))
    n = x.size(0)
    if n <= most:
        return n
    pieces = -(-n // most)
    even = next((p for p in range(pieces, 2 * pieces) if n % p == 0), pieces)
    return -(-n // even)
