"""
A Triton kernel for the product of two int8 matrices with a scale per row of each: what torch's own
integer product leaves in 32 bits is scaled and rounded before it is written.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# Rows of a and of b and the columns that a block multiplies at a time; warps; stages of loads. A
# test holds their shared memory below the 99 KB of consumer cards.
BLOCK = {"BM": 128, "BN": 128, "BK": 64}
WARPS, STAGES = 8, 4
GROUP = 8  # blocks of rows that share the columns in the cache


@triton.jit
def int8_kernel(
    a,
    b,
    scale_a,
    scale_b,
    out,
    M,
    N,
    K,
    stride_a,
    stride_b,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block (BM, BN) of out = (a b^T) * scale_a[:, None] * scale_b; rows of a, b contiguous."""
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    size = min(rows - first, GROUP)
    row = first + pid % (GROUP * columns) % size
    column = pid % (GROUP * columns) // size
    m, n, k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    at_a = a + m.to(tl.int64)[:, None] * stride_a + k[None, :]
    at_b = b + n.to(tl.int64)[None, :] * stride_b + k[:, None]
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        inside = k < K - start
        x = tl.load(at_a, mask=(m < M)[:, None] & inside[None, :], other=0)
        y = tl.load(at_b, mask=(n < N)[None, :] & inside[:, None], other=0)
        total += tl.dot(x, y, out_dtype=tl.int32)
        at_a += BK
        at_b += BK
    by_row = tl.load(scale_a + m, mask=m < M, other=0.0)
    by_column = tl.load(scale_b + n, mask=n < N, other=0.0)
    z = total.to(tl.float32) * by_row[:, None] * by_column[None, :]
    place = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, z.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """(a b^T) * scale_a[:, None] * scale_b of int8 a (M, K) and b (N, K): (M, N) in dtype."""
    a, b = a.contiguous(), b.contiguous()
    (M, K), N = a.shape, b.size(0)
    out = torch.empty(M, N, dtype=dtype, device=a.device)
    grid = (triton.cdiv(M, BLOCK["BM"]) * triton.cdiv(N, BLOCK["BN"]),)
    launch: Any = int8_kernel[grid]
    launch(
        a,
        b,
        scale_a,
        scale_b,
        out,
        M,
        N,
        K,
        a.stride(0),
        b.stride(0),
        **BLOCK,
        GROUP=GROUP,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out
