"""Muon and AdamW against torch.optim; orthogonalisation against the SVD; state that comes back."""

from collections import Counter

import pytest
import tiny
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.model.gpt import GPT
from nanochat.train import optim
from nanochat.train.optim import Group, MuonAdamW, orthogonalize

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
    return MuonAdamW([Group(kind, [f"p{i}" for i in range(len(params))], params, **settings)], ns)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay):
    a, b = parameters([(64, 32), (7, 5), (3, 2)]), parameters([(64, 32), (7, 5), (3, 2)])
    mine = ours("adamw", a, lr=0.01, weight_decay=decay, betas=(0.8, 0.95), eps=1e-10)
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
            lambda g, dtype: _zeropower_via_newtonschulz(g, optim.NS_COEFFICIENTS, 5, 1e-7),
        )
    a, b = parameters(), parameters()
    mine = ours("muon", a, lr=0.02, weight_decay=decay, momentum=0.9)
    theirs = torch.optim.Muon(
        b, lr=0.02, weight_decay=decay, momentum=0.9, nesterov=True, adjust_lr_fn="original"
    )
    for step in range(10):
        for params, optimizer in ((a, mine), (b, theirs)):
            give(params, step)
            optimizer.step()
    for p, q, start in zip(a, b, parameters(), strict=True):
        apart, went = (p - q).norm().item(), (q - start).norm().item()
        assert (
            apart < (1e-6 if shared else 0.03) * went
        )  # our products of bfloat16 are grouped otherwise


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (3, 40, 24)])
def test_orthogonalisation_keeps_the_directions_and_evens_the_lengths(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    got = orthogonalize(g, torch.float32)
    assert got.shape == g.shape
    aligned = u.mT @ got.double() @ vh.mT  # diagonal, for an odd polynomial of the singular values
    lengths = aligned.diagonal(dim1=-2, dim2=-1)
    assert (aligned - torch.diag_embed(lengths)).abs().max() < 1e-4
    assert lengths.min() > 0.5 and lengths.max() < 1.3
    assert (orthogonalize(g, torch.bfloat16).double() - got.double()).norm() < 0.05 * got.norm()
    torch.testing.assert_close(orthogonalize(g * 1e-4, torch.float32), got, rtol=0.02, atol=0.01)


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
