"""
Products in 8-bit integers: their rounding and gradients against float64, and the Triton kernel, in
Triton's interpreter and compiled for the GPUs that people have.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from nanochat.model.int8 import int8_linear, int8_product, quantized

ROOT = Path(__file__).resolve().parent.parent


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_row_is_rounded_to_its_own_scale():
    x = draw(7, 40) * torch.logspace(-6, 6, 7)[:, None]
    x[3] = 0
    q, scale = quantized(x)
    assert q.dtype == torch.int8 and q.abs().max() == 127 and q.min() >= -127
    assert ((q * scale[:, None] - x).abs() <= scale[:, None] * 0.5001).all()
    assert (q[3] == 0).all()


@pytest.mark.parametrize("shape", [(32, 64, 48), (33, 1000, 24), (17, 8, 8)])
def test_the_sums_are_exact(shape):
    M, K, N = shape
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-127, 128, (n, K), generator=g).to(torch.int8) for n in (M, N))
    scale_a, scale_b = torch.rand(M, generator=g), torch.rand(N, generator=g)
    want = (a.double() @ b.double().t()) * scale_a.double()[:, None] * scale_b.double()
    got = int8_product(a, b, scale_a, scale_b, False)
    torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_its_gradients(dtype):
    x, w = draw(2, 24, 64, dtype=dtype), draw(40, 64, seed=1, dtype=dtype)
    x.requires_grad_(), w.requires_grad_()
    dy = draw(2, 24, 40, seed=2, dtype=dtype)
    y = int8_linear(x, w)
    y.backward(dy)
    X, W, DY = x.detach().double().flatten(0, 1), w.detach().double(), dy.double().flatten(0, 1)

    def rounded(t):
        q, scale = quantized(t.float())
        return q.double() * scale.double()[:, None]

    near = 1e-6 if dtype is torch.float32 else 5e-3
    assert y.dtype == x.grad.dtype == dtype and w.grad.dtype == dtype
    for got, exact, far in (
        (y.flatten(0, 1), rounded(X) @ rounded(W).t(), X @ W.t()),
        (x.grad.flatten(0, 1), rounded(DY) @ rounded(W.t()).t(), DY @ W),
        (w.grad, DY.t() @ X, DY.t() @ X),
    ):
        assert (got.double() - exact).norm() < near * exact.norm()
        assert (got.double() - far).norm() < 0.02 * far.norm()


def test_the_compiler_can_trace_it_in_one_graph():
    x, w = draw(32, 64).requires_grad_(), draw(24, 64, seed=1)
    traced = torch.compile(int8_linear, backend="aot_eager", fullgraph=True)
    want, got = int8_linear(x, w), traced(x, w)
    assert torch.equal(got, want)
    (dx,), (again,) = (torch.autograd.grad(y.sum(), x) for y in (want, got))
    assert torch.equal(dx, again)


INTERPRETED = """
import torch
from nanochat.model.int8_kernel import product
for M, K, N in ((1, 8, 8), (130, 72, 200), (5, 200, 131)):
    g = torch.Generator().manual_seed(M)
    a, b = (torch.randint(-127, 128, (n, K), generator=g).to(torch.int8) for n in (M, N))
    sa, sb = torch.rand(M, generator=g) + 0.1, torch.rand(N, generator=g) + 0.1
    want = (a.double() @ b.double().t()) * sa.double()[:, None] * sb.double()
    for dtype, near in ((torch.float32, 3e-7), (torch.bfloat16, 8e-3)):  # the interpreter cuts bits off
        got = product(a, b, sa, sb, dtype)
        torch.testing.assert_close(got.double(), want, rtol=near, atol=1e-20)
    # rows that are not next to each other, as those of a transposed factor
    wide = torch.zeros(N, 2 * K, dtype=torch.int8)
    wide[:, ::2] = b
    torch.testing.assert_close(
        product(a, wide[:, ::2], sa, sb, torch.float32).double(), want, rtol=3e-7, atol=1e-20
    )
print("equal")
"""
COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from nanochat.model import int8_kernel as K
pointers = {"a": "*i8", "b": "*i8", "scale_a": "*fp32", "scale_b": "*fp32", "out": "*bf16"}
numbers = dict.fromkeys(("M", "N", "K", "stride_a", "stride_b"), "i32")
fixed = {**K.BLOCK, "GROUP": K.GROUP}
for capability in (80, 86, 89, 90, 120):
    signature = {**pointers, **numbers, **dict.fromkeys(fixed, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(10)}
    source = ASTSource(fn=K.int8_kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": K.WARPS, "num_stages": K.STAGES}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(kernel.asm["cubin"]) > 0 and kernel.metadata.shared <= 99 * 1024
    assert "mma" in kernel.asm["ptx"], "integers are not multiplied by tensor cores"
    print(capability, kernel.metadata.shared)
"""


def python(code, interpret):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_the_kernel_in_the_interpreter_is_exact():
    assert python(INTERPRETED, True) == ["equal"]


def test_the_kernel_compiles_for_every_gpu_and_fits_its_shared_memory():
    said = python(COMPILED, False)
    assert said[::2] == ["80", "86", "89", "90", "120"], said


def test_training_by_integers_learns_almost_the_same():
    finals = []
    for kind in ("bf16", "int8"):
        m = tiny.randomise(tiny.model(n_embd=64))
        m.set_matmul(kind)
        optimizer = tiny.optimizer(m)
        for step in range(30):
            b = tiny.batch(seed=step % 2)
            optimizer.zero_grad()
            loss = m.loss(b.inputs, b.targets) / b.targets.numel()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            finals.append(float(m.loss(b.inputs, b.targets) / b.targets.numel()))
    assert finals[0] != finals[1] == pytest.approx(finals[0], abs=0.05) and finals[1] < 1
