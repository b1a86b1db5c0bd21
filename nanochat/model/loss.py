"""
Cross entropy of a linear head with a soft cap, without the logits of a whole batch in memory.

The head's product, the cap and the softmax are computed for a chunk of some hundred rows at a
time. In training, the gradients are computed in the same pass: no chunk is computed twice, and
memory holds the logits of one chunk. Targets of -1 are ignored.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits per chunk. On a CPU, the product of every chunk first copies the head's weights into the
# order that its kernels read: with 2^19 logits, the loss took 15 to 60 % more time than with 2^22
# (Zen 3, float32, vocabularies of 2,048 to 16,384; dev/LOG.md). On a GPU, compiled code has two
# tensors of this size in the compute dtype; eager code has five in float32.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25, "meta": 1 << 25}
COMPILED_ELEMENTS = {"cuda": 1 << 27, "meta": 1 << 27}
# A block: the chunks whose d(loss)/d(logits) are kept to be multiplied by the inputs at once. One,
# except on a CPU.
BLOCK_CHUNKS = {"cpu": 2}
# Both on a CPU in half precision, whose products take less of the time, so that it matters more
# that the temporary tensors fit into the cache (Zen 4, bfloat16; larger chunks were not tried).
HALF_ON_CPU = 1 << 19, 8
MOST_EXPONENT = 60.0  # float32 can hold exp() of it, summed over any vocabulary


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap) in float32, in the shape of logits; 0 means no cap."""
    logits = logits.float()
    if softcap <= 0:
        return logits
    # tanh(x) = 2 sigmoid(2 x) - 1, and sigmoid is six times as fast on a CPU
    return torch.sigmoid(logits * (2 / softcap)) * (2 * softcap) - softcap


def _chunk_both(x: Tensor, w: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """
    (losses of the rows (R,), 0 where a target is -1; d(loss)/d(uncapped logits) / 4, (R, V) in x's
    dtype), for x (R, D), w (V, D) and targets (R,). The factor 1/4 saves a multiplication here.
    """
    z, s = (x @ w.t()).float(), None
    if softcap > 0:
        s = z.mul_(2 / softcap).sigmoid_()
        z = (s * (2 * softcap)).sub_(softcap)
    if not 0 < softcap <= MOST_EXPONENT:  # with such a cap, exp() is finite anyway
        z = z - z.amax(-1, keepdim=True)
    index = targets.clamp(min=0)[:, None]
    of_target = z.gather(1, index)
    e = z.exp_()
    total = e.sum(-1, keepdim=True)
    nll = (total.log() - of_target).squeeze(1) * (targets >= 0)
    d = e.mul_(1 / total)
    if torch.compiler.is_compiling():  # a scatter would split this into several kernels
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
        x, weight = x.detach(), weight.detach()  # as in evaluations, for the same compiled code
        R, w = x.size(0), weight.to(x.dtype)
        chunk_size = chunk_rows(x, weight, compiled)
        _, block_chunks = limits(x.device.type, x.dtype != torch.float32, compiled)
        block_size = chunk_size * block_chunks
        losses_and_gradients = _compiled() if compiled else _chunk_both
        dx = torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        block_d = x.new_empty(min(block_size, R) if block_chunks > 1 else 0, weight.size(0))
        for start in range(0, R, block_size):
            block, d = slice(start, min(start + block_size, R)), block_d
            for first in range(start, block.stop, chunk_size):
                chunk = slice(first, min(first + chunk_size, block.stop))
                nll, d = losses_and_gradients(x[chunk], w, targets[chunk], softcap)
                total += (nll * weights[chunk]).sum()
                if block_chunks > 1:
                    block_d[first - start : chunk.stop - start] = d
                    d = block_d[: chunk.stop - start]
            scale = (4 * weights[block, None]).to(x.dtype)  # 4: see _chunk_both
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
    """total += a b, in place. total is float32; a GPU sums products of half precision in it."""
    if total.device.type == "cuda" and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def _compiled() -> Any:
    """_chunk_both as compiled code, of which a process has one version."""
    return torch.compile(_chunk_both, dynamic=False)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    softcap: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """
    The sum over valid positions of weights * -log softmax(cap(x W^T))[target], in nats: a float32
    scalar, 0 when no target is valid.

    x (..., D) in the compute dtype; weight (V, D); targets (...) int64, of which -1 is ignored;
    weights (...) or None for ones. compiled: compute the chunks by compiled code.
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

    def losses(x: Tensor, y: Tensor) -> Tensor:
        if compiled:  # this also computes gradients, but is compiled already, for training
            return _compiled()(x, w, y, softcap)[0]
        return F.cross_entropy(capped(x @ w.t(), softcap), y, ignore_index=-1, reduction="none")

    chunks = map(losses, flat.split(rows), targets.reshape(-1).split(rows))
    return torch.cat([*chunks]).view(targets.shape)


def limits(device: str, half: bool, compiled: bool) -> tuple[int, int]:
    """(logits per chunk, chunks per block) on a kind of device, in half precision or float32."""
    if device == "cpu" and half:
        return HALF_ON_CPU
    elements = CHUNK_ELEMENTS.get(device, 1 << 25)
    if compiled:
        elements = COMPILED_ELEMENTS.get(device, elements)
    return elements, BLOCK_CHUNKS.get(device, 1)


def chunk_rows(x: Tensor, weight: Tensor, compiled: bool = False) -> int:
    """
    The rows per chunk of x (R, D). If R has a suitable divisor, all chunks have the same number of
    rows, and so the same compiled code.
    """
    elements, _ = limits(x.device.type, x.dtype != torch.float32, compiled)
    most = max(1, elements // weight.size(0))
    count = x.size(0)
    if count <= most:
        return count
    chunks = -(-count // most)
    even = next((n for n in range(chunks, 2 * chunks) if count % n == 0), chunks)
    return -(-count // even)
