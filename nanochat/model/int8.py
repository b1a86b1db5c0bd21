"""
Matrix products of training in 8-bit integers (--matmul=int8): GeForce cards multiply these at four
times the rate of bfloat16.

Each row of both factors is divided by its own scale and rounded; sums are exact, in 32 bits. The
forward product and the gradient of the input are computed like this. The gradient of the weight,
whose errors would add up over the run, and the head are not. A CPU computes with the same integers,
so that the effect of rounding on a loss can be measured without a GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MOST = 127


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, K) as whole numbers from -127 to 127, int8, and the scale of each row, (R,) float32."""
    x = x.float()
    scale = x.abs().amax(1).clamp(min=1e-12) / MOST
    return (x / scale[:, None]).round().to(torch.int8), scale


@torch.library.custom_op("nanochat::int8_product", mutates_args=())
def int8_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, half: bool) -> Tensor:
    """
    (a b^T) * scale_a[:, None] * scale_b: int8 a (M, K), b (N, K) -> (M, N), in bfloat16 if `half`,
    else in float32.
    """
    dtype = torch.bfloat16 if half else torch.float32
    if a.device.type == "cuda":
        from nanochat.model.int8_kernel import product

        return product(a, b, scale_a, scale_b, dtype)
    return (torch.ops.aten._int_mm(a, b.t()) * scale_a[:, None] * scale_b).to(dtype)


@int8_product.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, half: bool) -> Tensor:
    dtype = torch.bfloat16 if half else torch.float32
    return a.new_empty(a.size(0), b.size(0), dtype=dtype)


@register_flop_formula(torch.ops.nanochat.int8_product)
def _(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """
    The FLOPs of the product. Without them, compiled code takes it for free, and computes it again
    in the backward pass instead of keeping the result.
    """
    return 2 * a[0] * a[1] * b[0]


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.master, weight = weight.dtype, weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return _multiplied(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (x, weight), (dy,) = ctx.saved_tensors, grads
        if x.device.type == "cuda" and x.dtype is not torch.float32:
            dw = torch.mm(dy.t(), x, out_dtype=torch.float32)
        else:
            dw = dy.t() @ x
        return _multiplied(dy, weight.t()), dw.to(ctx.master)


def _multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, K) times weight (N, K) transposed, in 8-bit integers: (R, N) in x's dtype."""
    (a, scale_a), (b, scale_b) = quantized(x), quantized(weight)
    half = x.dtype is torch.bfloat16
    return torch.ops.nanochat.int8_product(a, b, scale_a, scale_b, half).to(x.dtype)


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear in 8-bit integers: x (..., K), weight (N, K) in any dtype -> (..., N) in x's."""
    y: Any = _Int8Linear.apply(x.reshape(-1, x.size(-1)), weight)
    return y.view(*x.shape[:-1], weight.size(0))
