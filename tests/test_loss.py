"""The chunked loss against a plain one in float64: values, gradients, targets, weights, chunks."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.model import loss
from nanochat.model.loss import capped, chunk_rows, linear_cross_entropy, token_losses

ROWS, D, V = 24, 16, 61


def problem(dtype=torch.float32, seed: int = 0, scale: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, ROWS // 2, D, generator=g) * scale).to(dtype).requires_grad_()
    w = torch.randn(V, D, generator=g).requires_grad_()
    targets = torch.randint(0, V, (2, ROWS // 2), generator=g)
    targets[0, :5] = -1
    targets[1, -1] = -1
    return x, w, targets, torch.randn(2, ROWS // 2, generator=g)


def reference(x, w, targets, weights, softcap):
    """(loss, dx, dw, nll of every position) in float64 by autograd through whole logits."""
    x, w = x.detach().double().requires_grad_(), w.detach().to(x.dtype).double().requires_grad_()
    z = x @ w.t()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    nll = F.cross_entropy(
        z.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
    ).view(targets.shape)
    total = (nll * (1 if weights is None else weights.double())).sum()
    total.backward()
    return total.detach(), x.grad, w.grad, nll.detach()


@pytest.mark.parametrize("softcap", [0.0, 15.0, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, V, 5 * V, 7 * V + 3, 12 * V, 1 << 21])
def test_value_and_gradients(softcap, weighted, chunk, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", chunk)
    x, w, targets, weights = problem()
    weights = weights if weighted else None
    total = linear_cross_entropy(x, w, targets, weights, softcap)
    (total * 0.37).backward()
    want, dx, dw, _ = reference(x, w, targets, weights, softcap)
    assert total.dtype == torch.float32 and total.shape == ()
    torch.testing.assert_close(total.double(), want, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), 0.37 * dx, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(w.grad.double(), 0.37 * dw, rtol=1e-5, atol=1e-5)
    assert not x.grad[0, :5].any(), "an ignored position learns nothing"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("softcap", [0.0, 15.0, 59.0, 61.0, 200.0, 1000.0])
def test_logits_in_the_hundreds_are_exact(softcap, sign):
    """Capped logits have no maximum subtracted before exp(), except under a very high cap."""
    x, w, targets, _ = problem()
    with torch.no_grad():  # all of a row near the cap, or all near its negative
        x[..., 0], w[:, 0] = 40 * sign, 20 + torch.arange(V) / V
    total = linear_cross_entropy(x, w, targets, None, softcap)
    total.backward()
    want, dx, dw, _ = reference(x, w, targets, None, softcap)
    torch.testing.assert_close(total.double(), want, rtol=2e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), dx, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(w.grad.double(), dw, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_the_form_that_is_compiled(softcap, monkeypatch):
    """Without a scatter: the same values and gradients, to the last digits."""
    x, w, targets, weights = problem()
    linear_cross_entropy(x, w, targets, weights, softcap).backward()
    plain, x.grad, w.grad = (x.grad, w.grad), None, None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    total = linear_cross_entropy(x, w, targets, weights, softcap)
    total.backward()
    want, dx, dw, _ = reference(x, w, targets, weights, softcap)
    torch.testing.assert_close(total.double(), want, rtol=2e-6, atol=1e-5)
    for grad, exact, other in zip((x.grad, w.grad), (dx, dw), plain, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=2e-7)


def test_a_gpu_gets_larger_chunks_when_compiled():
    """Eager code has five temporaries of float32 per logit, compiled code two of bfloat16."""
    x, head = torch.empty(98304, 8, device="meta"), torch.empty(24576, 8, device="meta")
    assert chunk_rows(x, head) == 1024 and chunk_rows(x, head, compiled=True) == 4096
    for elements in (loss.CHUNK_ELEMENTS, loss.COMPILED_ELEMENTS):
        assert elements["cuda"] == elements["meta"]


def test_a_negative_weight_pushes_the_other_way():
    x, w, targets, weights = problem()
    gradients = []
    for sign in (1, -1):
        x.grad = w.grad = None
        linear_cross_entropy(x, w, targets, sign * weights, 15.0).backward()
        gradients.append((x.grad.clone(), w.grad.clone()))
    for plus, minus in zip(*gradients, strict=True):
        torch.testing.assert_close(plus, -minus, rtol=1e-5, atol=1e-7)


def test_weights_at_ignored_positions_do_not_count():
    x, w, targets, weights = problem()
    other = weights.masked_fill(targets < 0, 1e30)
    assert torch.equal(
        linear_cross_entropy(x, w, targets, weights, 15.0),
        linear_cross_entropy(x, w, targets, other, 15.0),
    )
    broken = weights.masked_fill(targets < 0, torch.nan)
    assert torch.equal(
        linear_cross_entropy(x, w, targets, weights, 15.0),
        linear_cross_entropy(x, w, targets, broken, 15.0),
    )


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ignored_is_zero(softcap, dtype):
    x, w, targets, weights = problem(dtype)
    total = linear_cross_entropy(x, w, torch.full_like(targets, -1), weights, softcap)
    total.backward()
    assert total.item() == 0
    assert not x.grad.any() and not w.grad.any()
    assert not token_losses(x, w, torch.full_like(targets, -1), softcap).any()


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_bfloat16(softcap):
    x, w, targets, weights = problem(torch.bfloat16)
    total = linear_cross_entropy(x, w, targets, weights, softcap)
    total.backward()
    want, dx, dw, _ = reference(x, w, targets, weights, softcap)
    assert x.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    assert abs(total.item() - want.item()) < 0.02 * weights.abs().sum()
    for got, ideal in ((x.grad, dx), (w.grad, dw)):
        assert (got.double() - ideal).norm() < 0.02 * ideal.norm()


@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_huge_logits_stay_finite(softcap):
    x, w, targets, weights = problem(scale=1e4)
    total = linear_cross_entropy(x, w, targets, weights, softcap)
    total.backward()
    assert total.isfinite() and x.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 7 * V + 3, 1 << 21])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_token_losses(softcap, chunk, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", chunk)
    x, w, targets, _ = problem()
    nll = token_losses(x, w, targets, softcap)
    torch.testing.assert_close(
        nll.double(), reference(x, w, targets, None, softcap)[3], rtol=1e-5, atol=1e-5
    )
    assert nll.shape == targets.shape and not nll.requires_grad
    torch.testing.assert_close(
        nll.sum(), linear_cross_entropy(x, w, targets, None, softcap).detach()
    )


def test_the_cap_is_tanh():
    z = torch.linspace(-200, 200, 1001)
    torch.testing.assert_close(capped(z, 15.0), 15 * torch.tanh(z / 15), rtol=1e-5, atol=1e-5)
    assert torch.equal(capped(z, 0.0), z)
    assert capped(z.bfloat16(), 15.0).dtype == torch.float32


@pytest.mark.parametrize("n", [1, 2, 97, 1000, 4096])
def test_chunks_hold_what_they_may(n, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 100 * V)
    rows = chunk_rows(torch.empty(n, D), torch.empty(V, D))
    assert 1 <= rows <= 100
    assert -(-n // rows) < 2 * -(-n // 100) + 1


def test_whole_logits_never_exist():
    """Peak memory of the largest tensor made inside stays at a block, not rows x vocabulary."""
    rows, vocab = 4096, 4096
    x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with Watch():
        linear_cross_entropy(x, w, torch.randint(0, vocab, (rows,)), None, 15.0).backward()
    assert 0 < largest <= loss.CHUNK_ELEMENTS["cpu"] * loss.BLOCK_CHUNKS["cpu"] < rows * vocab


def test_half_precision_on_a_cpu_has_chunks_that_fit_its_cache():
    head = torch.empty(4096, 8)
    rows = [
        chunk_rows(torch.empty(8192, 8, dtype=d), head) for d in (torch.float32, torch.bfloat16)
    ]
    assert rows == [1024, 128]
