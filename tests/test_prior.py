"""The attention prior: its formulas, every form against a float64 oracle, no prior, caches."""

import pytest
import tiny
import torch
from priors import (
    CPU,
    GPU,
    ORDER,
    C,
    made,
    matrices,
    model_with,
    terms,
    tokens,
    whole,
    with_spans,
    write,
)

from nanochat.base.common import UserError
from nanochat.model import attention, prior_artifact
from nanochat.model.gpt import GPT
from nanochat.model.prior import Prior


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rap_prior.safetensors", terms())


# ---- B is what its formulas say


@pytest.mark.parametrize(
    "columns", [False, True]
)  # positions looked up by the kernel, or as columns of u and w
def test_b_is_that_of_the_formulas(path, columns):
    config, tensors = made(path, GPU if columns else CPU, rap_error=1e-6)
    p = Prior(config.rap, [0, 0], 8)
    p.load_state_dict(tensors)
    idx, given = tokens(), terms()
    want, quick = matrices(given, idx), whole(given, idx)
    for name in ORDER:
        torch.testing.assert_close(quick[name], want[name])
    if columns:
        p.looks_up = lambda device: False
        want["lag"] = (
            (tensors["place_u"] @ tensors["place_w"].T).tril().double().expand(2, C, C)
        )  # tested below
    for g, name in enumerate(ORDER):
        with torch.no_grad():
            p.gates.zero_()
            p.gates[..., g] = 1
            bias = p(idx, torch.float64)[0]
            got = bias.scores(torch.arange(C)[None, :, None], 0, C, 4)
        assert got.shape == (2, 4, C, C) and (not bias.place.any()) == columns
        for h in range(4):
            torch.testing.assert_close(got[:, h].tril(), want[name], atol=2e-5, rtol=1e-4)


def oracle(q, k, v, window, B):
    """softmax(q k^T / sqrt(D) + B) v, dense; B (batch, H, T, T)."""
    T, G = q.size(2), q.size(1) // k.size(1)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    scores = q @ k.repeat_interleave(G, 1).mT / q.size(3) ** 0.5 + B
    scores = scores.masked_fill((j > i) | (i - j >= (window or T)), float("-inf"))
    return torch.softmax(scores, -1) @ v.repeat_interleave(G, 1)


def fused(q, k, v, window, bias):
    """What other devices than a CPU run."""
    return attention.attend_fused(q, k, v, window, bias)


def dense(q, k, v, window, bias):
    return attention.attend(q, k, v, window, bias._replace(form="dense"))


@pytest.mark.parametrize(
    "backend", [attention.attend, fused, dense], ids=["blocks", "fused", "dense"]
)
@pytest.mark.parametrize(
    ("heads", "D", "T", "window", "biased"),
    [
        ((4, 4), 32, 1, 0, 4),
        ((4, 2), 64, 9, 0, 3),
        ((4, 1), 128, 150, 0, 4),
        ((4, 2), 32, 150, 40, 2),
        ((2, 2), 64, 130, 129, 1),
    ],
)
def test_backends_agree_with_the_oracle(tmp_path, backend, heads, D, T, window, biased):
    given = terms(reach=T)
    shape = {"n_head": heads[0], "n_kv_head": heads[1], "n_embd": heads[0] * D, "sequence_len": T}
    where, device = write(tmp_path / "p.safetensors", given), GPU if backend is fused else CPU
    config, tensors = made(where, device, tiny.config(**shape), rap_heads=biased / heads[0])
    p = Prior(config.rap, [0, 0], D).double()
    p.load_state_dict(tensors)
    idx = tokens(T=T)
    want_B = whole(given, idx)
    if backend is fused:
        p.looks_up = lambda device: False
        want_B["lag"] = (
            (tensors["place_u"].double() @ tensors["place_w"].double().T).tril().expand(2, T, T)
        )
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, h, T, D, dtype=torch.float64, generator=g)
        for h in (heads[0], *heads[1:] * 2)
    )
    gates, weights = (
        torch.randn(*s, dtype=torch.float64, generator=g) for s in ((biased, 4), q.shape)
    )
    grads = []
    for kind in ("want", "got"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if kind == "want":
            gate = gates.clone().requires_grad_()
            B = torch.einsum("hg,gbij->bhij", gate, torch.stack([want_B[n] for n in ORDER]))
            y = want = oracle(
                *leaves, window, torch.nn.functional.pad(B, (0, 0, 0, 0, 0, heads[0] - biased))
            )
        else:
            with torch.no_grad():
                p.gates[0] = gates
            gate = p.gates
            y = backend(*leaves, window, p(idx, torch.float64)[0])
            torch.testing.assert_close(y, want, atol=2e-6, rtol=1e-5)
        (y * weights).sum().backward()
        grads.append([x.grad for x in (*leaves, gate)])
    grads[1][3] = grads[1][3][0]
    for name, a, b in zip(["q", "k", "v", "gates"], *grads, strict=True):
        torch.testing.assert_close(
            b, a, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )


@pytest.mark.parametrize("lag", ["lag", "no lag"])
@pytest.mark.parametrize("backend", [attention.attend, dense], ids=["blocks", "dense"])
def test_spans_are_curves_of_single_heads(tmp_path, backend, lag):
    """
    Five items (match, pair, three spans) for four heads: the second layer continues, and a head
    without a span uses lag, or nothing in an artifact without lag.
    """
    T, D = 150 if lag == "lag" else 290, 32
    given = with_spans(T)
    if lag == "no lag":  # and the spans end at distance 26, so that most keys are out of reach
        given["lag"].zero_()
        given["spans"][:, 27:] = 0
    shape = {"n_head": 4, "n_kv_head": 2, "n_embd": 4 * D, "sequence_len": T}
    config, tensors = made(
        write(
            tmp_path / "p.safetensors",
            {name: t for name, t in given.items() if name != "lag" or t.any()}
            | {"spans": given["spans"][:, : 27 if lag == "no lag" else T]},
        ),
        CPU,
        tiny.config(**shape),
        rap_lead=3.0,
    )
    assert config.rap["rows"] == [[0, 0, 1, 2], [3, 0, 0, 1]] and "3 spans" in config.rap["about"]
    assert config.rap["reach"] == (27 if lag == "no lag" else 150)
    leads = torch.full((2, 4, 4), 0.1)
    leads[0, [0, 1, 2, 3], [1, 2, 3, 3]] = leads[1, [0, 1, 2, 3], [3, 1, 2, 3]] = 3.0
    torch.testing.assert_close(tensors["gates"], leads)
    assert torch.equal(
        made(write(tmp_path / "p.safetensors", given), rap_lead=0)[1]["gates"],
        torch.full((2, 4, 4), 0.1),
    )
    p = Prior(config.rap, [0, 40], D).double()
    p.load_state_dict(tensors)
    idx, g = tokens(T=T), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, T, D, dtype=torch.float64, generator=g) for h in (4, 2, 2))
    weights, common = torch.randn(q.shape, dtype=torch.float64, generator=g), whole(given, idx)
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    curves = torch.cat((given["lag"][None], given["spans"])).double()
    for layer, window in enumerate((0, 40)):
        gate = tensors["gates"][layer].double().requires_grad_()
        B = sum(gate[:, g, None, None] * common[n][:, None] for g, n in enumerate(ORDER[:3]))
        B = B + gate[:, 3, None, None] * curves[config.rap["rows"][layer]][:, distance]
        want = oracle(q, k, v, window, B)
        p.zero_grad()
        got = backend(q, k, v, window, p(idx, torch.float64)[layer])
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
        (want * weights).sum().backward()
        (got * weights).sum().backward()
        torch.testing.assert_close(p.gates.grad[layer], gate.grad, atol=1e-5, rtol=1e-4)
        everywhere = p(idx, torch.float64)[layer]._replace(reach=None)  # as in older checkpoints
        torch.testing.assert_close(
            backend(q, k, v, window, everywhere), got, atol=1e-12, rtol=1e-12
        )


def test_who_leads():
    assert prior_artifact.assign_leading_heads(2, 2, 3) == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 0),
        (1, 1, 1),
    ]
    assert prior_artifact.assign_leading_heads(3, 3, 2) == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 2),
        (1, 1, 0),
        (2, 0, 1),
        (2, 1, 2),
    ]
    assert prior_artifact.assign_leading_heads(0, 2, 2) == []


def test_backends_agree_in_lower_precision(path):
    for dtype, near in ((torch.float32, 2e-5), (torch.bfloat16, 0.06)):
        m = model_with(path)
        q, k, v = (
            torch.randn(2, h, C, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2)
        )
        with torch.no_grad():
            exact = m.prior(tokens(), torch.float64)[0]
            exact = exact._replace(gate=exact.gate.double())
            want = attention.attend(q.double(), k.double(), v.double(), 0, exact)
            got = attention.attend(
                q.to(dtype), k.to(dtype), v.to(dtype), 0, m.prior(tokens(), dtype)[0]
            )
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=near, rtol=near)


# ---- no prior, a prior of zeros, some heads and layers


def test_without_a_prior_nothing_is_new():
    m = tiny.model()
    assert m.prior is None and "rap" not in m.config.to_dict()
    assert list(m.state_dict()) == [n for n, _ in m.named_parameters()] and not list(m.buffers())
    assert m.counts()["total"] == sum(p.numel() for p in m.parameters()) and not any(
        row.rate == "gate" for *_, row in m.roster()
    )
    assert {g.optimizer for g in tiny.optimizer(m).groups} == {"adamw", "muon"} and len(
        tiny.optimizer(m).groups
    ) == 3


@pytest.mark.parametrize("what", ["terms", "gates"])
def test_a_prior_of_zeros_is_none(tmp_path, what):
    given = terms()
    if what == "terms":
        given = {
            n: t if n in prior_artifact.CODES else torch.zeros_like(t) for n, t in given.items()
        }
    m = model_with(write(tmp_path / "p.safetensors", given), rap_layers=1, rap_heads=2)
    if what == "gates":
        torch.nn.init.zeros_(m.prior.gates)
    plain = GPT.build(tiny.config())
    plain.load_state_dict({n: t for n, t in m.state_dict().items() if not n.startswith("prior")})
    b = tiny.batch()
    losses = [x.loss(b.inputs, b.targets) for x in (m, plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-5)
    for x in losses:
        x.backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(
            dict(m.named_parameters())[name].grad, p.grad, rtol=1e-4, atol=1e-4
        )


def test_heads_and_layers_that_are_left_free(path):
    m = model_with(path, rap_heads=0.5, rap_layers=1, shape={"n_layer": 3})
    out = m.prior(tokens(), torch.float32)
    assert m.prior.gates.shape == (1, 2, 4) and [b is None for b in out] == [False, True, True]
    scores = out[0].scores(torch.arange(C)[None, :, None], 0, C, 4)
    assert scores[:, :2].abs().sum() > 0 and not scores[:, 2:].any()
    assert m.counts()["total"] == sum(p.numel() for p in m.parameters())
    assert m.counts()["total"] - tiny.model(n_layer=3).counts()["total"] == 8
    assert model_with(path, rap_gate="fixed").counts() == tiny.model().counts()
    for wrong in ({"rap_heads": 5}, {"rap_heads": 1.5}, {"rap_heads": 0}, {"rap_layers": 3}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            made(path, **wrong)


# ---- caches: the same logits whatever the passes


@pytest.mark.parametrize(
    "knobs", [{}, {"attention": "dense"}, {"rap_layers": 1, "rap_heads": 0.5}], ids=str
)
@pytest.mark.parametrize("kind", ["terms", "spans", "bias", "key"])
def test_cached_passes_are_the_whole(tmp_path, kind, knobs):
    matrix = torch.randn(C, C, generator=torch.Generator().manual_seed(4))
    given = {"bias": {"bias": matrix / matrix.tril().abs().max()}, "key": {"key": terms()["key"]}}
    given = (given | {"terms": terms(), "spans": with_spans()})[kind]
    m = model_with(
        write(tmp_path / "p.safetensors", given), shape={"window_pattern": "SL"}, **knobs
    )
    idx = tokens(3)
    with torch.no_grad():
        want = m.logits(m(idx))
        for sizes in ([16], [5, 1, 1, 9], [1] * 16):
            cache, at = m.new_cache(3), 0
            for n in sizes:
                torch.testing.assert_close(
                    m.logits(m(idx[:, at : at + n], cache)),
                    want[:, at : at + n],
                    atol=2e-5,
                    rtol=1e-4,
                )
                cache.advance(n)
                at += n
        # Rows of different lengths, padded with a token that must have no effect; then the rows
        # are reordered, copied and dropped.
        cache = m.new_cache(3)
        for n, counts in ((4, [4, 2, 0]), (3, [3, 0, 0]), (5, [2, 1, 5])):
            part = torch.full((3, n), 7)
            for b, c in enumerate(counts):
                part[b, :c] = idx[b, cache.lengths[b] : cache.lengths[b] + c]
            got = m.logits(m(part, cache))
            for b, c in enumerate(counts):
                torch.testing.assert_close(
                    got[b, :c],
                    want[b, cache.lengths[b] : cache.lengths[b] + c],
                    atol=2e-5,
                    rtol=1e-4,
                )
            cache.advance(counts)
        cache, rows = cache.expand([2, 0, 1, 2]), [2, 0, 1, 2]
        cache.drop(1)
        rows = [2, 2, 1]
        for _ in range(3):
            part = torch.stack(
                [idx[r, n : n + 1] for r, n in zip(rows, cache.lengths, strict=True)]
            )
            got = m.logits(m(part, cache))
            for b, (r, n) in enumerate(zip(rows, cache.lengths, strict=True)):
                torch.testing.assert_close(got[b, 0], want[r, n], atol=2e-5, rtol=1e-4)
            cache.advance(1)


def test_a_prior_looks_back_by_absolute_position(
    tmp_path,
):  # B of a later pass is the matching part of B
    m = model_with(write(tmp_path / "p.safetensors", terms()))
    idx, i = tokens(1), torch.arange(C)[None, :, None]
    with torch.no_grad():
        want = m.prior(idx, torch.float32)[0].scores(i, 0, C, 4)
        cache = m.new_cache(1)
        m(idx[:, :6], cache)
        cache.advance(6)
        cache.begin(4)
        bias = m.prior(idx[:, 6:10], torch.float32, cache)[0]
        got = bias.scores(cache.positions[:, :, None], 0, 10, 4)
    torch.testing.assert_close(got.tril(6), want[:, :, 6:10, :10].tril(6))
