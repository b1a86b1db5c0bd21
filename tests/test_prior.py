"""The attention prior: artifacts read and refused, B against its formulas, every backend against a float64 oracle, caches, checkpoints."""

import json
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from nanochat import attention, checkpoint, gpt, prior, trainer
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.prior import Prior, RapKnobs
from scripts import base_train

V, C = 61, 16  # tiny's vocabulary and context
CPU, GPU = torch.device("cpu"), torch.device("cuda")
PRINT = "f" * 64
ORDER = ("key", "match", "pair", "lag")  # of the gates


def terms(seed=0, vocab=V, reach=C, P=8, P2=6):
    """A random artifact with every group."""
    g = torch.Generator().manual_seed(seed)

    def signs(*shape):
        return (torch.randint(0, 2, shape, generator=g) * 2 - 1).to(torch.int8)

    lag = torch.exp(-torch.arange(reach) / 4) + 0.1 * torch.randn(reach, generator=g)
    match = torch.stack([0.02 * torch.randn(P, P, generator=g), torch.eye(P) / P, torch.zeros(P, P)])
    pair = torch.rand(P2, generator=g) / P2
    pair[1] = 0  # some generators leave columns unused
    out = {"lag": lag, "key": torch.randn(vocab, generator=g), "codes": signs(vocab, P), "match": match}
    return out | {"pair_query": signs(vocab, P2), "pair_now": signs(vocab, P2), "pair": pair}


def with_spans(reach=C, seed=0, **more):
    """The same and spans for three heads."""
    return {**terms(seed, reach=reach, **more), "spans": torch.rand(3, reach, generator=torch.Generator().manual_seed(seed))}


def write(path: Path, tensors, **about) -> str:
    meta = {"format": "rap-1", "generator": "rules", "tokenizer": PRINT, **about}
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={n: v for n, v in meta.items() if v})
    return str(path)


def brute(tensors, x, i, j):
    """B_g[i, j] of every group by the formulas of the artifact, for one row of tokens x."""

    def at(name, position):
        return tensors[name][x[position]].double() if position >= 0 else torch.zeros(tensors[name].size(1), dtype=torch.float64)

    out = {}
    if "lag" in tensors:
        out["lag"] = float(tensors["lag"][i - j]) if i - j < tensors["lag"].numel() else 0.0
    if "bias" in tensors:
        out["bias"] = float(tensors["bias"][i, j])
    if "key" in tensors:
        out["key"] = float(tensors["key"][x[j]])
    if "match" in tensors:
        out["match"] = sum(float(at("codes", i) @ m.double() @ at("codes", j - s)) for s, m in enumerate(tensors["match"]))
    if "pair" in tensors:
        mine, theirs = at("pair_query", i - 1) * at("pair_now", i), at("pair_query", j - 2) * at("pair_now", j - 1)
        out["pair"] = float((tensors["pair"].double() * mine * theirs).sum())
    return out


def matrices(tensors, idx):
    """{group: (B, T, T)} by three loops; 0 where j > i."""
    B, T = idx.shape
    out = {}
    for b in range(B):
        for i in range(T):
            for j in range(i + 1):
                for name, value in brute(tensors, idx[b].tolist(), i, j).items():
                    out.setdefault(name, torch.zeros(B, T, T, dtype=torch.float64))[b, i, j] = value
    return out


def whole(tensors, idx):
    """The same at once, for longer rows of a full artifact."""
    T = idx.size(1)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]

    def at(name, s):
        x = tensors[name].double()[idx]
        return torch.cat((torch.zeros_like(x[:, :s]), x[:, : T - s]), 1)

    out = {"lag": torch.nn.functional.pad(tensors["lag"], (0, T)).double()[(i - j).clamp(min=0)].expand(len(idx), -1, -1)}
    out["key"] = tensors["key"].double()[idx][:, None].expand(-1, T, -1)
    out["match"] = sum(at("codes", 0) @ m.double() @ at("codes", s).mT for s, m in enumerate(tensors["match"]))
    mine, theirs = at("pair_query", 1) * at("pair_now", 0), at("pair_query", 2) * at("pair_now", 1)
    out["pair"] = (mine * tensors["pair"].double()) @ theirs.mT
    return {name: B.tril() for name, B in out.items()}


def made(path, device=CPU, config=None, **knobs):
    """(config with the prior, its tensors)."""
    config = config or tiny.config()
    config.rap, tensors = prior.prepare(RapKnobs(rap=path, **knobs), config, PRINT, device)
    return config, tensors


def model_with(path, seed=3, device=CPU, shape=None, **knobs):
    """A random tiny model with a prior, gates of different sizes."""
    config, tensors = made(path, device, tiny.config(**(shape or {})), **{"rap_alpha": 1.0, **knobs})
    m = tiny.randomise(GPT.build(config), seed)
    m.prior.load_state_dict(tensors)
    with torch.no_grad():
        m.prior.gates += 0.5 * torch.randn(m.prior.gates.shape, generator=torch.Generator().manual_seed(seed))
    return m


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rap_prior.safetensors", terms())


def tokens(B=2, T=C, seed=5, few=9):
    """Few different ones, so that tokens and pairs come again."""
    return torch.randint(0, few, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- B is what its formulas say


@pytest.mark.parametrize("columns", [False, True])  # positions looked up by the kernel, or as columns of u and w
def test_b_is_that_of_the_formulas(path, columns):
    config, tensors = made(path, GPU if columns else CPU, rap_error=1e-6)
    p = Prior(config.rap, [0, 0], 8)
    p.load_state_dict(tensors)
    idx, given = tokens(), terms()
    want, quick = matrices(given, idx), whole(given, idx)
    for name in ORDER:
        torch.testing.assert_close(quick[name], want[name])
    if columns:
        p._looks_up = lambda device: False
        want["lag"] = (tensors["place_u"] @ tensors["place_w"].T).tril().double().expand(2, C, C)  # tested below
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
    return attention._attend_fused(*attention._widened(q, k, v, bias), window, q.size(3) ** -0.5)[..., : q.size(3)]


def dense(q, k, v, window, bias):
    return attention.attend(q, k, v, window, bias._replace(backend="dense"))


@pytest.mark.parametrize("backend", [attention.attend, fused, dense], ids=["blocks", "fused", "dense"])
@pytest.mark.parametrize(("heads", "D", "T", "window", "biased"), [
    ((4, 4), 32, 1, 0, 4), ((4, 2), 64, 9, 0, 3), ((4, 1), 128, 150, 0, 4), ((4, 2), 32, 150, 40, 2), ((2, 2), 64, 130, 129, 1),
])  # fmt: skip
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
        p._looks_up = lambda device: False
        want_B["lag"] = (tensors["place_u"].double() @ tensors["place_w"].double().T).tril().expand(2, T, T)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, T, D, dtype=torch.float64, generator=g) for h in (heads[0], *heads[1:] * 2))
    gates, weights = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((biased, 4), q.shape))
    grads = []
    for kind in ("want", "got"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if kind == "want":
            gate = gates.clone().requires_grad_()
            B = torch.einsum("hg,gbij->bhij", gate, torch.stack([want_B[n] for n in ORDER]))
            y = want = oracle(*leaves, window, torch.nn.functional.pad(B, (0, 0, 0, 0, 0, heads[0] - biased)))
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
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("backend", [attention.attend, dense], ids=["blocks", "dense"])
def test_spans_are_curves_of_single_heads(tmp_path, backend):
    """Five items (match, pair, three spans) for four heads: the second layer deals on, and a head without a span has the common lag."""
    T, D, given = 150, 32, with_spans(150)
    shape = {"n_head": 4, "n_kv_head": 2, "n_embd": 4 * D, "sequence_len": T}
    config, tensors = made(write(tmp_path / "p.safetensors", given), CPU, tiny.config(**shape), rap_lead=3.0)
    assert config.rap["rows"] == [[0, 0, 1, 2], [3, 0, 0, 1]] and "3 spans" in config.rap["about"]
    leads = torch.full((2, 4, 4), 0.1)
    leads[0, [0, 1, 2, 3], [1, 2, 3, 3]] = leads[1, [0, 1, 2, 3], [3, 1, 2, 3]] = 3.0
    torch.testing.assert_close(tensors["gates"], leads)
    assert torch.equal(made(write(tmp_path / "p.safetensors", given), rap_lead=0)[1]["gates"], torch.full((2, 4, 4), 0.1))
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


def test_who_leads():
    assert prior.deal(2, 2, 3) == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
    assert prior.deal(3, 3, 2) == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 0), (2, 0, 1), (2, 1, 2)]
    assert prior.deal(0, 2, 2) == []


def test_backends_agree_in_lower_precision(path):
    for dtype, near in ((torch.float32, 2e-5), (torch.bfloat16, 0.06)):
        m = model_with(path)
        q, k, v = (torch.randn(2, h, C, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
        with torch.no_grad():
            exact = m.prior(tokens(), torch.float64)[0]
            exact = exact._replace(gate=exact.gate.double())
            want = attention.attend(q.double(), k.double(), v.double(), 0, exact)
            got = attention.attend(q.to(dtype), k.to(dtype), v.to(dtype), 0, m.prior(tokens(), dtype)[0])
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=near, rtol=near)


# ---- no prior, a prior of zeros, some heads and layers


def test_without_a_prior_nothing_is_new():
    m = tiny.model()
    assert m.prior is None and "rap" not in checkpoint.config_dict(m.config)
    assert list(m.state_dict()) == [n for n, _ in m.named_parameters()] and not list(m.buffers())
    assert m.counts()["total"] == sum(p.numel() for p in m.parameters()) and not any(row.rate == "gate" for *_, row in m.roster())
    assert {g.optimizer for g in tiny.optimizer(m).groups} == {"adamw", "muon"} and len(tiny.optimizer(m).groups) == 3


@pytest.mark.parametrize("what", ["terms", "gates"])
def test_a_prior_of_zeros_is_none(tmp_path, what):  # trap 22
    given = terms()
    if what == "terms":
        given = {n: t if n in prior.CODES else torch.zeros_like(t) for n, t in given.items()}
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
        torch.testing.assert_close(dict(m.named_parameters())[name].grad, p.grad, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("knobs", [{}, {"attention": "dense"}, {"rap_layers": 1, "rap_heads": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["terms", "spans", "bias", "key"])
def test_cached_passes_are_the_whole(tmp_path, kind, knobs):  # traps 20 and 22
    matrix = torch.randn(C, C, generator=torch.Generator().manual_seed(4))
    given = {"bias": {"bias": matrix / matrix.tril().abs().max()}, "key": {"key": terms()["key"]}}
    given = (given | {"terms": terms(), "spans": with_spans()})[kind]
    m = model_with(write(tmp_path / "p.safetensors", given), shape={"window_pattern": "SL"}, **knobs)
    idx = tokens(3)
    with torch.no_grad():
        want = m.logits(m(idx))
        for sizes in ([16], [5, 1, 1, 9], [1] * 16):
            cache, at = m.new_cache(3), 0
            for n in sizes:
                torch.testing.assert_close(m.logits(m(idx[:, at : at + n], cache)), want[:, at : at + n], atol=2e-5, rtol=1e-4)
                cache.advance(n)
                at += n
        # ragged: rows of 7, 2 and 0 tokens so far, padded with a token that must leave no trace; reordered, copied and dropped
        cache = m.new_cache(3)
        for n, counts in ((4, [4, 2, 0]), (3, [3, 0, 0]), (5, [2, 1, 5])):
            part = torch.full((3, n), 7)
            for b, c in enumerate(counts):
                part[b, :c] = idx[b, cache.lengths[b] : cache.lengths[b] + c]
            got = m.logits(m(part, cache))
            for b, c in enumerate(counts):
                torch.testing.assert_close(got[b, :c], want[b, cache.lengths[b] : cache.lengths[b] + c], atol=2e-5, rtol=1e-4)
            cache.advance(counts)
        cache, rows = cache.expand([2, 0, 1, 2]), [2, 0, 1, 2]
        cache.drop(1)
        rows = [2, 2, 1]
        for _ in range(3):
            part = torch.stack([idx[r, n : n + 1] for r, n in zip(rows, cache.lengths, strict=True)])
            got = m.logits(m(part, cache))
            for b, (r, n) in enumerate(zip(rows, cache.lengths, strict=True)):
                torch.testing.assert_close(got[b, 0], want[r, n], atol=2e-5, rtol=1e-4)
            cache.advance(1)


def test_a_prior_looks_back_by_absolute_position(tmp_path):  # trap 22, said plainly: B of a later pass is the matching part of B
    m = model_with(write(tmp_path / "p.safetensors", terms()))
    idx, i = tokens(1), torch.arange(C)[None, :, None]
    with torch.no_grad():
        want = m.prior(idx, torch.float32)[0].scores(i, 0, C, 4)
        cache = m.new_cache(1)
        m(idx[:, :6], cache)
        cache.advance(6)
        positions = cache.positions(4)
        got = m.prior(idx[:, 6:10], torch.float32, cache, positions)[0].scores(positions[:, :, None], 0, 10, 4)
    torch.testing.assert_close(got.tril(6), want[:, :, 6:10, :10].tril(6))


# ---- training, checkpoints


def test_gates_learn_and_resume_is_bit_equal(tmp_path, path):
    whole, halved = model_with(path), model_with(path)
    assert tiny.same(dict(whole.state_dict()), dict(halved.state_dict()))
    start = whole.prior.gates.detach().clone()
    tiny.fit(tmp_path / "a", whole, tiny.ListFeed.random(8), save_every=4, keep=9)
    moved = (whole.prior.gates - start).abs()
    assert moved.min() > 1e-3 and moved.max() < 1  # every gate, at a rate of its own
    again, feed = GPT.build(whole.config), tiny.ListFeed.random(8)
    run, optimizer = tiny.run(tmp_path / "b", again), tiny.optimizer(again)
    trainer.restore(run, checkpoint.folder(tmp_path / "a", 4), again, optimizer, feed)
    trainer.fit(run, again, optimizer, feed, tiny.PLAIN)
    run.logbook.close()
    assert tiny.same(dict(again.state_dict()), dict(whole.state_dict()))
    held = next(g for g in tiny.optimizer(whole, gate_lr=0.3).groups if g.names == ["prior.gates"])
    assert (held.optimizer, held.lr, held.weight_decay) == ("adamw", 0.3, 0.0)


@pytest.mark.parametrize("gate", ["learned", "fixed", "annealed"])
def test_a_checkpoint_carries_the_prior(tmp_path, path, gate):
    m = model_with(path, rap_gate=gate)
    b = tiny.batch()
    meta = {**tiny.meta(m), "config": checkpoint.config_dict(m.config)}
    Path(path).unlink()
    again, _ = checkpoint.load_model(checkpoint.save(tmp_path, 1, m.state_dict(), {}, meta), "cpu", torch.float32)
    with torch.no_grad():
        assert torch.equal(again.logits(again(b.inputs)), m.logits(m(b.inputs)))
    assert again.config == m.config and again.counts() == m.counts()
    bare = checkpoint.save(tmp_path, 2, tiny.model().state_dict(), {}, meta)
    with pytest.raises(UserError, match=r"holds nothing for prior\."):
        checkpoint.load_model(bare, "cpu", torch.float32)
    if gate != "annealed":
        return
    m.prior.annealed = True
    tiny.fit(tmp_path / "run", m)
    assert not m.prior.gates.any()  # and what goes on from it is a model without
    after, _ = checkpoint.load_model(checkpoint.find(tmp_path / "run"), "cpu", torch.float32)
    assert after.prior is None and after.config == tiny.config() and "prior.gates" not in after.state_dict()
    with torch.no_grad():
        torch.testing.assert_close(after.logits(after(b.inputs)), m.logits(m(b.inputs)))


def test_base_train_takes_a_prior_and_needs_it_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    flags = [*tiny.workplace(tmp_path), "--eval_every=0", "--keep=9"]
    about = json.loads((tmp_path / "tokenizer" / "meta.json").read_text())
    artifact = write(tmp_path / "p.safetensors", terms(vocab=about["vocab_size"], reach=64), tokenizer=about["fingerprint"])
    rap = [f"--rap={artifact}", "--rap_alpha=1", "--rap_gate=annealed", "--rap_heads=0.5"]
    base_train.main([*flags, *rap, "--num_iterations=6", "--save_every=3"])
    assert "prior        rules" in capsys.readouterr().out
    run = checkpoint.run_directory("base", "t")
    whole = checkpoint.Tensors(checkpoint.folder(run, 6) / "model.safetensors")
    want = {n: whole[n] for n in whole}
    halfway = checkpoint.Tensors(checkpoint.folder(run, 3) / "model.safetensors")["prior.gates"]
    assert float(halfway.max()) == pytest.approx(2) and float(halfway.min()) == pytest.approx(0.5)  # of --rap_lead and --rap_alpha
    assert not want["prior.gates"].any()
    checkpoint.folder(run, 6).rename(run / "gone")
    Path(artifact).unlink()
    base_train.main([*flags, "--resume=auto"])
    again = checkpoint.Tensors(checkpoint.folder(run, 6) / "model.safetensors")
    assert tiny.same({n: again[n] for n in again}, want)
    with pytest.raises(UserError, match="rap_alpha=1"):
        base_train.main([*flags, "--resume=auto", "--rap_alpha=2"])
    with pytest.raises(UserError, match="name one with --rap"):
        base_train.main([*flags, "--attention=dense", "--num_iterations=1"])


def test_warm_start(tmp_path, path, monkeypatch):
    shape = {"n_embd": 128, "n_head": 4, "n_kv_head": 2, "sequence_len": 64}
    config, tensors = made(path, config=tiny.config(**shape), rap_heads=0.5, rap_layers=1)
    m = tiny.model(**shape)
    prior.warm_start(m, config.rap, tensors, 3.0)
    seen = {}

    def watch(q, k, v, window, bias):
        assert bias is None
        seen.setdefault("scores", []).append(q @ k.repeat_interleave(2, 1).mT / q.size(3) ** 0.5)
        return attention.attend(q, k, v, window)

    idx = tokens(4, 64, few=V)
    monkeypatch.setattr(gpt, "attend", watch)
    with torch.no_grad():
        m(idx)
    same = (idx[:, :, None] == idx[:, None, :]) & torch.ones(64, 64).tril(-1).bool()
    other = (idx[:, :, None] != idx[:, None, :]) & torch.ones(64, 64).tril(-1).bool()
    gap = [[float(s[:, h][same].mean() - s[:, h][other].mean()) for h in range(4)] for s in seen["scores"]]
    assert min(gap[0][:2]) > 1.5 and max(map(abs, gap[0][2:] + gap[1])) < 1.0
    plain = write(tmp_path / "lag.safetensors", {"lag": terms()["lag"]})
    config, tensors = made(plain)
    with pytest.raises(UserError, match="needs a prior with match"):
        prior.warm_start(m, config.rap, tensors, 1.0)


# ---- factors


def test_the_rank_is_the_smallest_that_meets_the_error():
    smooth = torch.exp(-torch.arange(200) / 40)
    ranks = []
    for error in (0.1, 0.02, 0.005):
        u, w, worst = prior.factor_lag(smooth, error)
        i, j = torch.arange(200)[:, None], torch.arange(200)
        off = (u @ w.T - smooth[(i - j).clamp(min=0)]).tril().abs().max()
        assert worst <= error and float(off) == pytest.approx(worst, abs=2e-5) and u.abs().max() <= 1
        assert u.size(1) == 1 or prior.factor_lag(smooth, error, u.size(1) - 1)[2] > error
        ranks.append(u.size(1))
    assert ranks == sorted(ranks) and ranks[-1] < 40
    u, w, worst = prior.factor_lag(torch.eye(200)[3], 0.02, 17)  # too sharp: the columns end, the error is said
    assert u.size(1) == 17 and worst > 0.5
    low = torch.randn(30, 4) @ torch.randn(4, 30)
    u, w, worst = prior.factor_matrix(low, 1e-4)
    assert u.size(1) == 4 and worst < 1e-4 and torch.allclose((u @ w.T).tril(), low.tril(), atol=1e-4)
    assert prior.factor_matrix(torch.randn(90, 90), 1e-3)[0].size(1) == prior.PLACE_COLUMNS
    codes = terms(P=8)["codes"]
    thin = torch.zeros(3, 8, 8)
    thin[1], thin[2] = torch.outer(torch.rand(8), torch.rand(8)), torch.outer(torch.ones(8), torch.ones(8)) * 1e-5
    shifts, query, keys, worst = prior.factor_match(codes, thin, 0.02)
    assert shifts == [1, 2] and query.shape == (8, 1) and keys.shape == (2, 8, 1) and worst <= 0.02


def test_what_an_accelerator_gets(tmp_path):
    """Away from the CPU, lag becomes its fit for good; a matrix of high rank goes to dense; ranks wider than kernels are refused."""
    sharp = 1 / (1 + torch.arange(300.0))
    config, tensors = made(write(tmp_path / "p.safetensors", {"lag": sharp}), GPU, tiny.config(sequence_len=300))
    u, w = tensors["place_u"], tensors["place_w"]
    assert u.size(1) <= 64 and f"rank {u.size(1)}" in config.rap["about"]
    torch.testing.assert_close((u @ w.T)[200, :201].flip(0), tensors["place"][:201], atol=1e-5, rtol=0)
    assert tensors["place"].numel() == 301 and tensors["place"][-1] == 0
    torch.save(torch.randn(300, 300), tmp_path / "m.pt")
    config, tensors = made(str(tmp_path / "m.pt"), GPU, tiny.config(sequence_len=300))
    assert config.rap["attention"] == "dense" and tensors["place"].tril().abs().max() == 1
    wide = write(tmp_path / "w.safetensors", terms(P=200, P2=60))
    with pytest.raises(UserError, match="wider than the 256"):
        made(wide, GPU)
    assert made(wide)[0].rap["attention"] == "factored"
    sharper = write(tmp_path / "s.safetensors", with_spans())
    assert made(sharper, GPU)[0].rap["attention"] == "dense" and made(sharper)[0].rap["attention"] == "factored"
    with pytest.raises(UserError, match="factored cannot add the spans"):
        made(sharper, GPU, attention="factored")


def test_flex_says_why_it_cannot(path, capsys):
    m = model_with(path, attention="flex")
    assert m.config.rap["attention"] == "factored" and "FlexAttention cannot train on cpu" in capsys.readouterr().err
    m.config.rap["attention"] = "flex"  # as a checkpoint from elsewhere says
    with torch.no_grad():
        want, got = model_with(path)(tokens()), [m(tokens()), m(tokens())]
    assert torch.equal(got[0], want) and torch.equal(got[1], want)
    assert capsys.readouterr().err.count("added in the factored form") == 1
    t = dict(m.prior.named_buffers())
    assert m.prior._choose(t, torch.device("mps"), torch.float32) == "dense"  # positions are looked up, as where it was trained
    assert m.prior._choose(t | {"place_u": t["place"]}, torch.device("mps"), torch.float32) == "factored"


@pytest.mark.slow
def test_compiled_equals_eager_with_a_prior(path):
    b, models = tiny.batch(), [model_with(path, rap_layers=1, shape={"n_layer": 3}) for _ in range(2)]
    models[1].compile()
    for m in models:
        m.loss(b.inputs, b.targets).backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["terms", "spans", "bias"])
def test_flex_forward_agrees(tmp_path, kind):
    shape = {"n_embd": 256, "n_head": 4, "sequence_len": 256}
    given = {"terms": terms(reach=256), "spans": with_spans(256), "bias": {"bias": torch.rand(256, 256)}}[kind]
    m = model_with(write(tmp_path / "p.safetensors", given), shape=shape, rap_heads=0.75)
    q, k, v = (torch.randn(2, h, 256, 64, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    with torch.no_grad():
        bias = m.prior(tokens(T=256), torch.float32)[0]
        for window in (0, 100):
            got = attention._attend_flex(q, k, v, window, bias)
            torch.testing.assert_close(got, attention.attend(q, k, v, window, bias), atol=1e-4, rtol=1e-3)


# ---- artifacts that are refused


class Bad:
    def __reduce__(self):
        return (print, ("this must not run",))


def refused(path, says):
    with pytest.raises(UserError, match=says) as e:
        prior.load(str(path), V, PRINT)
    assert "\n" not in str(e.value)


def test_what_is_no_prior(tmp_path, capsys):
    refused(tmp_path / "none.safetensors", "there is no prior")
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    refused(tmp_path / "short.safetensors", "cannot read the prior")
    torch.save(Bad(), tmp_path / "bad.pt")
    refused(tmp_path / "bad.pt", "not loaded, as it might run code")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bad()))
    refused(tmp_path / "plain.pt", "not loaded, as it might run code")
    assert "must not run" not in capsys.readouterr().out
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "dict.pt")
    refused(tmp_path / "dict.pt", "no tensor where one should be")
    refused(write(tmp_path / "a.safetensors", terms(), format="rap-9"), "format 'rap-9', this version reads 'rap-1'")
    refused(write(tmp_path / "a.safetensors", terms(), format=None), "format None")
    refused(write(tmp_path / "a.safetensors", terms(), tokenizer="abc" * 9), "tokenizer abcabcabcabc, this run's is ffffffffffff: generate")
    refused(write(tmp_path / "a.safetensors", terms(), tokenizer=None), "tokenizer unknown")


@pytest.mark.parametrize(("change", "says"), [
    ({"spans": torch.ones(3)}, r"spans of shape \(3,\), not N, T = 16:"),
    ({"spans": torch.ones(2, 16), "lag": None}, "spans without lag"),
    ({"lag": torch.ones(3, 3)}, r"lag of shape \(3, 3\), not T:"),
    ({"key": torch.ones(7)}, r"key of shape \(7,\), not V = 61:"),
    ({"match": torch.ones(2, 8, 7)}, r"match of shape \(2, 8, 7\), not S = 2, P = 8, P = 8"),
    ({"codes": torch.ones(60, 8, dtype=torch.int8)}, r"codes of shape \(60, 8\), not V = 61, P"),
    ({"codes": torch.zeros(61, 8, dtype=torch.int8)}, "codes as torch.int8, not -1 and 1"),
    ({"codes": torch.ones(61, 8)}, "codes as torch.float32, not -1 and 1 as int8"),
    ({"lag": torch.tensor([1.0, float("nan")])}, "lag that are not finite"),
    ({"pair": torch.tensor([float("inf")] * 6)}, "pair that are not finite"),
    ({"key": torch.ones(61, dtype=torch.int64)}, "key as torch.int64, not float32"),
    ({"match": None}, "codes without match"),
    ({"surprise": torch.ones(3)}, "surprise, which is no term"),
    ({"bias": torch.ones(4, 4)}, "bias together with other terms"),
])  # fmt: skip
def test_terms_that_do_not_fit(tmp_path, change, says):
    given = {n: t for n, t in (terms() | change).items() if t is not None}
    refused(write(tmp_path / "a.safetensors", given), says)


@pytest.mark.parametrize(("matrix", "says"), [
    (torch.ones(3, 4), r"bias of shape \(3, 4\)"), (torch.ones(5), r"bias of shape \(5,\)"), (torch.full((2, 2), torch.nan), "not finite"),
])  # fmt: skip
def test_matrices_that_do_not_fit(tmp_path, matrix, says):
    torch.save(matrix, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", says)
    save_file({"anything": matrix}, tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", says)


def test_a_matrix_of_ones_own(tmp_path):
    m = torch.randn(5, 5) * 7
    torch.save(m, tmp_path / "m.pt")
    got, about = prior.load(str(tmp_path / "m.pt"), V, PRINT)
    torch.testing.assert_close(got["bias"], m / m.tril().abs().max())
    assert about.startswith("matrix ")
    _, tensors = made(str(tmp_path / "m.pt"))
    assert tensors["place"].shape == (C, C) and not tensors["place"][5:].any() and not tensors["place"][:, 5:].any()
    torch.testing.assert_close(made(str(tmp_path / "m.pt"), config=tiny.config(sequence_len=4))[1]["place"], got["bias"][:4, :4])
