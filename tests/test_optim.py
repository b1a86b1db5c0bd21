"""Muon and AdamW against torch.optim; orthogonalisation against the SVD; state that comes back."""

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import linprog
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.model.gpt import GPT
from nanochat.train import optim
from nanochat.train.optim import Group, MuonAdamW, orthogonalize
from nanochat.train.polynomials import POLYNOMIALS

SHAPES = [(64, 32), (32, 64), (64, 32), (48, 48), (8, 64), (1, 16)]


def parameters(shapes=SHAPES, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]


def gradients(step: int, shapes=SHAPES) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=g) * 10.0 ** (i - 2) for i, s in enumerate(shapes)]


def give(params, step: int) -> None:
    for p, g in zip(params, gradients(step, [p.shape for p in params]), strict=True):
        p.grad = g.clone()


def ours(kind: str, params, ns=torch.bfloat16, **settings) -> MuonAdamW:
    named = {f"p{i}": p for i, p in enumerate(params)}
    return MuonAdamW([Group(kind, named, **settings)], ns)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay):
    a, b = parameters([(64, 32), (7, 5), (3, 2)]), parameters([(64, 32), (7, 5), (3, 2)])
    mine = ours("adamw", a, lr=0.01, weight_decay=decay, betas=(0.8, 0.95))
    theirs = torch.optim.AdamW(
        b, lr=0.01, weight_decay=decay, betas=(0.8, 0.95), eps=1e-10, fused=True
    )
    plain = torch.optim.AdamW(
        c := parameters([(64, 32), (7, 5), (3, 2)]),
        lr=0.01,
        weight_decay=decay,
        betas=(0.8, 0.95),
        eps=1e-10,
    )
    for step in range(10):
        for params, optimizer in ((a, mine), (b, theirs), (c, plain)):
            give(params, step)
            optimizer.step()
    for p, q, r in zip(a, b, c, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("shared", [False, True], ids=["own products", "torch's products"])
def test_muon_is_torchs(decay, shared, monkeypatch):
    if shared:
        monkeypatch.setattr(
            optim,
            "orthogonalize",
            lambda g, dtype, steps: _zeropower_via_newtonschulz(g, steps[0], len(steps), 1e-7),
        )
    a, b = parameters(), parameters()
    mine = ours("muon", a, lr=0.02, weight_decay=decay)
    mine.polynomials = POLYNOMIALS["jordan"]
    theirs = torch.optim.Muon(
        b, lr=0.02, weight_decay=decay, momentum=0.9, nesterov=True, adjust_lr_fn="original"
    )
    for step in range(10):
        for params, update in ((a, partial(mine.step, momentum=0.9)), (b, theirs.step)):
            give(params, step)
            update()
    for p, q, start in zip(a, b, parameters(), strict=True):
        apart, went = (p - q).norm().item(), (q - start).norm().item()
        assert (
            apart < (1e-6 if shared else 0.03) * went
        )  # our products of bfloat16 are grouped otherwise


def after(x, name: str):
    """What singular values become, as float64."""
    for a, b, c in POLYNOMIALS[name]:
        x = a * x + b * x**3 + c * x**5
    return x


def minimax(low: float, high: float) -> tuple[list[float], float]:
    """The odd quintic with the least largest distance from 1 on [low, high], and that distance."""
    x = np.union1d(np.linspace(low, high, 2000), np.geomspace(low, high, 2000))
    powers, ones = np.stack([x, x**3, x**5], 1), np.ones((len(x), 1))
    solved = linprog(  # the least t with -t <= polynomial - 1 <= t at every x
        [0, 0, 0, 1],
        np.block([[powers, -ones], [-powers, -ones]]),
        np.concatenate([ones, -ones])[:, 0],
        bounds=[(None, None)] * 3 + [(0, None)],
    )
    return list(solved.x[:3]), solved.x[3]


def test_the_polynomials_are_minimax():
    low, high = 0.01, 1.0
    for step in POLYNOMIALS["minimax"]:
        best, error = minimax(low, 1.02 * high)  # a margin for rounding
        assert step == pytest.approx(best, rel=2e-4)
        low, high = 1 - error, 1 + error
    assert error == pytest.approx(0.288, abs=1e-3)


def test_singular_values_end_in_a_band():
    x = torch.logspace(-2, 0, 10_000, dtype=torch.float64)
    assert (after(x, "minimax") - 1).abs().max() < 0.29
    small = torch.logspace(-8, -2, 1000, dtype=torch.float64)
    assert (after(small, "minimax") / small).min() > 70  # they grow by 76 or a little less


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("least", [None, 1e-2, 1e-8])  # singular values of a random matrix, or down
@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (3, 40, 24)])
def test_orthogonalisation_keeps_the_directions_and_evens_the_lengths(shape, least, name):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    if least:
        s = torch.logspace(0, math.log10(least), s.size(-1), dtype=torch.float64).expand_as(s)
        g = u @ torch.diag_embed(s) @ vh
    s = s / s.norm(dim=-1, keepdim=True)
    got = orthogonalize(g, torch.float64, POLYNOMIALS[name])
    aligned = u.mT @ got @ vh.mT  # diagonal, for odd polynomials of the singular values
    torch.testing.assert_close(aligned, torch.diag_embed(after(s, name)), rtol=0, atol=1e-5)
    assert (aligned.diagonal(dim1=-2, dim2=-1) - 1)[s > 0.01].abs().max() < 0.32
    for dtype, error in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        rough = orthogonalize(g.float(), dtype, POLYNOMIALS[name])
        if least == 1e-8:  # what the dtype cannot hold grows as well
            error = 0.5
        assert rough.dtype == dtype and (rough.double() - got).norm() < error * got.norm()
    tiny_gradient = orthogonalize(g.float() * 1e-4, torch.float32, POLYNOMIALS[name])
    assert (tiny_gradient.double() - got).norm() < 0.02 * got.norm()


@pytest.mark.parametrize("shape", [(1, 16), (6, 12), (48, 192), (192, 48)])
def test_rounding_does_not_lengthen_a_gradient_of_rank_one(shape):
    """Its singular value is 1 after scaling, where rounding up would leave the interval."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        column, row = torch.randn(shape[0], 1, generator=g), torch.randn(1, shape[1], generator=g)
        got = orthogonalize(column @ row + 1e-4 * torch.randn(shape, generator=g), torch.bfloat16)
        assert 0.7 < torch.linalg.matrix_norm(got.float(), 2) < 1.3


def test_orthogonalising_nothing_gives_nothing():
    assert not orthogonalize(torch.zeros(2, 8, 4)).any()


def test_tall_matrices_move_further():
    p = parameters([(64, 16), (16, 64)])
    before = [q.detach().clone() for q in p]
    o = ours("muon", p, lr=1.0, ns=torch.float32)
    give(p, 0)
    o.step()
    moved = [(q - b).norm().item() for q, b in zip(p, before, strict=True)]
    assert moved[0] / moved[1] == pytest.approx(2.0, rel=0.1)  # sqrt(64 / 16)


def test_the_multiplier_scales_every_rate_and_zero_stands_still():
    for kind in ("adamw", "muon"):
        a, b, c = parameters(), parameters(), parameters()
        for params, lr, mult in ((a, 0.01, 0.5), (b, 0.005, 1.0), (c, 0.01, 0.0)):
            give(params, 0)
            ours(kind, params, lr=lr, weight_decay=0.1).step(mult)
        assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(a, b, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(c, parameters(), strict=True))


def test_a_missing_gradient_counts_as_zero():
    for kind in ("adamw", "muon"):
        a, b = parameters(), parameters()
        o, other = ours(kind, a, lr=0.01), ours(kind, b, lr=0.01)
        for step in range(3):
            give(a, step)
            give(b, step)
            if step == 1:
                a[0].grad, b[0].grad = None, torch.zeros_like(b[0])
            o.step()
            other.step()
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        o.zero_grad()
        assert all(p.grad is None for p in a)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_state_comes_back(kind):
    whole, first = parameters(), parameters()
    o, begun = ours(kind, whole, lr=0.02), ours(kind, first, lr=0.02)
    for step in range(6):
        give(whole, step)
        o.step(1 - step / 6, 0.8 + step / 50)
    for step in range(3):
        give(first, step)
        begun.step(1 - step / 6, 0.8 + step / 50)
    state = {k: t.clone() for k, t in begun.state_tensors().items()}
    assert len(state) == len(first) * (2 if kind == "adamw" else 1)
    rest = [torch.nn.Parameter(p.detach().clone()) for p in first]
    ended = ours(kind, rest, lr=0.02)
    ended.load_state_tensors(state, begun.steps)
    for t in state.values():
        t.fill_(torch.nan)  # what was loaded is the optimizer's own
    for step in range(3, 6):
        give(rest, step)
        ended.step(1 - step / 6, 0.8 + step / 50)
    assert all(torch.equal(p, q) for p, q in zip(whole, rest, strict=True))


def test_missing_state_is_an_error():
    o = ours("muon", parameters(), lr=0.1)
    with pytest.raises(KeyError):
        o.load_state_tensors({}, 3)


IDLE = (
    *("alias", "as_strided", "detach", "expand", "select", "slice", "t", "transpose", "unbind"),
    *("view", "_unsafe_view", "empty_like", "empty", "new_empty"),
)


class Launches(TorchDispatchMode):
    """Counts the operators that would launch a kernel: not views, and nothing but memory."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).removeprefix("aten.")
        self.seen[name] += name not in IDLE
        return func(*args, **(kwargs or {}))


def test_an_update_on_a_gpu_launches_as_much_for_any_depth():
    """On the meta device, which takes the way of GPUs: matrices of one shape at once."""
    counts = {}
    for depth in (2, 12):
        m = GPT.build(tiny.config(n_layer=depth, n_kv_head=4), "meta")
        o = tiny.optimizer(m)
        for p in m.parameters():
            p.grad = torch.empty_like(p)
        o.step()  # makes the state
        with Launches() as launches:
            o.step()
        counts[depth] = sum(launches.seen.values())
    assert counts[2] == counts[12] <= 90, launches.seen
