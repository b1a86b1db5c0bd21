"""The model: counts, conventions, knobs, initialisation, tying, padding of the vocabulary, keys."""

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from nanochat.base.common import UserError
from nanochat.model import checkpoint, gpt
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.scaling import Shape

# ---- counts (facts.md)


def counts(vocab: int, shape: Shape, **arch) -> dict[str, int]:
    return GPT.build(GPTConfig(vocab_size=vocab, **shape.dimensions(), **arch), "meta").counts()


@pytest.mark.parametrize(
    ("vocab", "shape", "tied", "embedding", "transformer", "head", "total"),
    [
        (
            24576,
            Shape(depth=4, model_dim=512, head_dim=64),
            False,
            12_582_912,
            12_582_912,
            12_582_912,
            37_748_736,
        ),
        (
            24576,
            Shape(depth=4, model_dim=512, head_dim=64),
            True,
            12_582_912,
            12_582_912,
            0,
            25_165_824,
        ),
        (24576, Shape(depth=4), False, 6_291_456, 3_145_728, 6_291_456, 15_728_640),
        (65536, Shape(depth=20), False, 83_886_080, 393_216_000, 83_886_080, 560_988_160),
    ],
)
def test_counts(vocab, shape, tied, embedding, transformer, head, total):
    n = counts(vocab, shape, tie_embeddings=tied)
    assert (n["embedding"], n["transformer"], n["head"], n["total"]) == (
        embedding,
        transformer,
        head,
        total,
    )
    assert n["matmul"] == transformer + (embedding if tied else head)


def test_what_the_knobs_save():
    d20, full = Shape(depth=20), counts(65536, Shape(depth=20))
    assert full["total"] - counts(65536, d20, tie_embeddings=True)["total"] == 83_886_080
    assert full["total"] - counts(65536, d20, mlp_ratio=3)["total"] == 65_536_000
    shared = counts(65536, Shape(depth=20, head_dim=64, kv_ratio=0.25))
    assert full["total"] - shared["total"] == 20 * 2 * 1280 * 1280 * 3 // 4
    assert counts(65536, d20, activation="swiglu")["total"] - full["total"] == 20 * 4 * 1280 * 1280


def test_a_quarter_of_a_layer():
    assert (
        counts(24576, Shape(depth=4, model_dim=512, head_dim=64))["transformer"] // 4 == 3_145_728
    )


def test_flops_by_counting_pairs():
    m = tiny.model(window_pattern="SL", sequence_len=12)
    pairs = sum(sum(min(i + 1, w) for i in range(12)) for w in (6, 12))
    assert m.flops_per_token() == pytest.approx(6 * m.counts()["matmul"] + 12 * 4 * 8 * pairs / 12)


# ---- numerical conventions: an independent float64 model


def oracle(m: GPT, idx: torch.Tensor) -> np.ndarray:
    """
    Logits of one row by the conventions of transformers' NanoChat, written plainly: loops over
    positions and heads, rotation by complex numbers.
    """
    c, w = m.config, {n: p.detach().double().numpy() for n, p in m.named_parameters()}
    T, D = idx.numel(), c.n_embd // c.n_head

    def rms(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def rotated(x, position):
        theta = position * c.rope_base ** (-np.arange(0, D, 2) / D)
        z = (x[: D // 2] + 1j * x[D // 2 :]) * np.exp(-1j * theta)
        return rms(np.concatenate([z.real, z.imag]))

    def activation(layer, x):
        h = w[f"blocks.{layer}.mlp.up.weight"] @ x
        if c.activation == "relu2":
            return np.maximum(h, 0) ** 2
        if c.activation == "gelu":
            return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        if c.activation == "silu":
            return h / (1 + np.exp(-h))
        g = w[f"blocks.{layer}.mlp.gate.weight"] @ x
        return g / (1 + np.exp(-g)) * h

    def mixed(name, h):
        if not c.convolutions:
            return h
        weight = w[name]
        return np.stack(
            [h[t] + sum(weight[d] * h[t - d] for d in range(4) if t >= d) for t in range(T)]
        )

    def score_vector(matrix, h, n, copies, t, before):
        """Of head n, the first `copies` of which do not rotate and look `before` tokens back."""
        rows = matrix[n * D : (n + 1) * D]
        if n >= copies:
            return rotated(rows @ h[t], t)
        return rms(rows @ h[t - before]) if t >= before else np.zeros(D)

    x = w["embed.weight"][idx.numpy()]
    if c.pair_embeddings:
        before, rows = [0, *idx.tolist()[:-1]], c.pair_embeddings * c.vocab_size
        pairs = [(2654435761 * a + b) % rows for a, b in zip(before, idx.tolist(), strict=True)]
        x = x + w["pair_table.weight"][pairs]
    x = rms(x)
    copies = c.copy_heads
    for layer in range(c.n_layer):
        a = f"blocks.{layer}.attn."
        h = mixed(f"blocks.{layer}.attn_conv.weight", rms(x))
        q = [
            [
                score_vector(w[a + "q.weight"], h, n, copies * c.n_head // c.n_kv_head, t, 0)
                for n in range(c.n_head)
            ]
            for t in range(T)
        ]
        k = [
            [score_vector(w[a + "k.weight"], h, n, copies, t, 1) for n in range(c.n_kv_head)]
            for t in range(T)
        ]
        v = [
            [w[a + "v.weight"][n * D : (n + 1) * D] @ h[t] for n in range(c.n_kv_head)]
            for t in range(T)
        ]
        if c.value_embeddings and (c.n_layer - 1 - layer) % 2 == 0:
            table = w[f"value_tables.{layer}.weight"]
            for t in range(T):
                gates = 3 / (1 + np.exp(-w[a + "value_gate.weight"] @ h[t][:12]))
                parts = table[idx[t]].reshape(c.n_kv_head, D)
                v[t] = [v[t][n] + gates[n] * parts[n] for n in range(c.n_kv_head)]
        short = c.window_pattern[layer % len(c.window_pattern)] == "S" and layer < c.n_layer - 1
        reach = c.sequence_len // 2 if short else T
        y = np.zeros_like(x)
        for t in range(T):
            for n in range(c.n_head):
                kv, seen = n * c.n_kv_head // c.n_head, range(max(0, t - reach + 1), t + 1)
                s = np.array([q[t][n] @ k[j][kv] for j in seen]) / np.sqrt(D)
                p = np.exp(s - s.max())
                y[t, n * D : (n + 1) * D] = sum(
                    pj * v[j][kv] for pj, j in zip(p / p.sum(), seen, strict=True)
                )
        x = x + y @ w[a + "out.weight"].T
        h = mixed(f"blocks.{layer}.mlp_conv.weight", rms(x))
        x = x + np.stack(
            [w[f"blocks.{layer}.mlp.down.weight"] @ activation(layer, h[t]) for t in range(T)]
        )
    logits = rms(x) @ w["embed.weight" if c.tie_embeddings else "head.weight"][: c.vocab_size].T
    return c.softcap * np.tanh(logits / c.softcap) if c.softcap else logits


KNOBS = [
    {},
    {"activation": "swiglu"},
    {"activation": "gelu"},
    {"activation": "silu"},
    {"mlp_ratio": 2.5},
    {"tie_embeddings": True},
    {"softcap": 0.0},
    {"softcap": 4.0},
    {"rope_base": 500.0},
    {"window_pattern": "SSSL", "n_layer": 5},
    {"n_kv_head": 1},
    {"n_kv_head": 4},
    {"copy_heads": 1},
    {"convolutions": True},
    {"value_embeddings": True, "n_layer": 3},
    {"value_embeddings": True, "copy_heads": 1, "tie_embeddings": True},
    {"copy_heads": 2, "n_kv_head": 4, "convolutions": True, "window_pattern": "S"},
    {"pair_embeddings": 1},
    {"pair_embeddings": 3, "tie_embeddings": True, "value_embeddings": True},
    {
        "tie_embeddings": True,
        "activation": "swiglu",
        "softcap": 0.0,
        "n_kv_head": 1,
        "mlp_ratio": 8 / 3,
        "window_pattern": "S",
    },
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_logits_equal_the_oracle(knobs):
    m = tiny.randomise(tiny.model(**knobs))
    idx = tiny.batch(rows=1).inputs
    with torch.no_grad():
        logits = m.logits(m(idx))[0]
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), oracle(m, idx[0]), atol=2e-4)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_every_knob_trains_decodes_and_comes_back(knobs, tmp_path):
    m = tiny.randomise(tiny.model(**knobs))
    o, b = tiny.optimizer(m), tiny.batch(rows=4)
    losses = []
    for _ in range(4):
        o.zero_grad()
        loss = m.loss(b.inputs, b.targets) / b.targets.numel()
        loss.backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in m.parameters()
        )
        o.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

    with torch.no_grad():
        full = m.logits(m(b.inputs))
        cache, parts = m.new_cache(4), []
        for piece in b.inputs.split([5, 1, 1, 9], dim=1):
            parts.append(m.logits(m(piece, cache)))
            cache.advance(piece.size(1))
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=1e-4)

    stored = checkpoint.save(
        tmp_path, 4, dict(m.named_parameters()), o.state_tensors(), tiny.meta(m)
    )
    again = stored.model("cpu", torch.float32)
    assert again.config == m.config
    assert tiny.same(tiny.weights(again), tiny.weights(m))
    with torch.no_grad():
        assert torch.equal(again.logits(again(b.inputs)), full)


def test_the_default_model_is_the_documented_one():
    c = GPTConfig()
    assert (c.activation, c.mlp_ratio, c.tie_embeddings) == ("relu2", 4.0, False)
    assert (c.softcap, c.rope_base, c.window_pattern) == (15.0, 10000.0, "L")


def test_scores_are_capped_and_the_future_unseen():
    m, b = tiny.randomise(tiny.model(softcap=3.0)), tiny.batch(rows=2)
    other = b.inputs.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 61
    with torch.no_grad():
        x, y = m.logits(m(b.inputs)), m.logits(m(other))
        assert x.abs().max() <= 3
        assert torch.equal(x[:, :9], y[:, :9])
        assert not torch.equal(x[:, 9], y[:, 9])


def test_half_precision_stays_near():
    m, b = tiny.randomise(tiny.model()), tiny.batch()
    low = GPT.build(m.config, "cpu", torch.bfloat16)
    low.load_state_dict(m.state_dict())
    with torch.no_grad():
        x, y = m.logits(m(b.inputs)), low.logits(low(b.inputs))
        assert low(b.inputs).dtype == torch.bfloat16
        assert (x - y).abs().mean() < 0.05 * x.abs().mean()
        assert y.dtype == torch.float32
        z = low.cast_for_inference()
        assert torch.allclose(z.logits(z(b.inputs)), y, atol=0.02)


# ---- the roster


def test_half_precision_sums_the_gradients_of_weights_in_float32(monkeypatch):
    """As on a GPU, whose product returns float32; the sum over micro-batches keeps its digits."""

    def product(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16
        return (a.to(out_dtype) @ b.to(out_dtype)).to(out_dtype)

    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 2, 9, 16, generator=g).bfloat16(), torch.randn(8, 16, generator=g)
    weights = torch.randn(2, 9, 8, generator=g).bfloat16()
    exact = sum(weights.double().flatten(0, 1).T @ part.double().flatten(0, 1) for part in x)
    monkeypatch.setattr(torch, "mm", product)
    errors = []
    for multiply in (
        gpt._HalfProduct.apply,
        lambda a, b: torch.nn.functional.linear(a, b.to(a.dtype)),
    ):
        w.grad = None
        for part in x:
            part = part.clone().requires_grad_()
            y = multiply(part, w.requires_grad_())
            (y * weights).sum().backward()
            expected = weights.float() @ w.detach().bfloat16().float()
            torch.testing.assert_close(part.grad.float(), expected, rtol=0.02, atol=0.05)
        errors.append(float((w.grad.double() - exact).norm() / exact.norm()))
    assert y.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    assert errors[0] < 1e-6 < 1e-4 < errors[1]


def test_a_square_gives_the_gradient_of_its_root():
    """As on a GPU: as near to float64 as what keeps its input."""
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(64, 64, generator=g).bfloat16() for _ in range(2))
    exact = dy.double() * 2 * x.double().clamp(min=0)
    errors = []
    for f in (gpt._SquaredReLU.apply, lambda x: torch.relu(x).square()):
        given = x.clone().requires_grad_()
        f(given).backward(dy)
        assert not given.grad[x <= 0].any()
        errors.append(float((given.grad.double() - exact).norm() / exact.norm()))
    assert errors[0] < 1.5 * errors[1] < 0.01


def test_a_document_is_read_as_if_it_were_alone(tmp_path):
    """Behind another one in a row; the checkpoint knows it, and without the knob nothing changes."""
    m = tiny.randomise(tiny.model(sequence_len=48, document_start=60))
    idx = tiny.batch(rows=2, T=48, vocab=60).inputs
    idx[:, [0, 20]] = 60
    whole, alone = m(idx)[:, 20:], m(idx[:, 20:])
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)
    again = GPTConfig.from_dict(m.config.to_dict())
    assert again.document_start == 60
    m.config.document_start = -1
    assert (m(idx)[:, 20:] - alone).abs().max() > 0.1
    assert "document_start" not in m.config.to_dict()


def test_an_uncovered_parameter_is_an_error():
    m = tiny.model()
    m.gain = torch.nn.Parameter(torch.zeros(1))
    for use in (m.roster, m.counts, m.init_weights, lambda: tiny.optimizer(m)):
        with pytest.raises(RuntimeError, match="gain is covered by 0 rows"):
            use()


def test_a_parameter_covered_twice_is_an_error(monkeypatch):
    monkeypatch.setattr(
        gpt, "ROSTER", (*gpt.ROSTER, gpt.ROSTER[2]._replace(pattern=r"blocks\.0\..*"))
    )
    with pytest.raises(RuntimeError, match="covered by 2 rows"):
        tiny.model()


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_one_entry_in_the_optimizer(tied):
    m = tiny.model(tie_embeddings=tied)
    held = [p.data_ptr() for p in tiny.optimizer(m).params]
    assert sorted(held) == sorted(p.data_ptr() for p in m.parameters())
    assert len(set(held)) == len(held)


# ---- initialisation


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_init_fills_every_parameter(knobs):
    m = GPT.build(tiny.config(**knobs))
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(torch.nan)
    m.init_weights(3)
    assert all(p.isfinite().all() for p in m.parameters())
    assert all(p.dtype == torch.float32 for p in m.parameters())


def test_init_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = tiny.model(seed=5), tiny.model(seed=5), tiny.model(seed=6)
    assert torch.equal(torch.rand(1), expected)
    assert tiny.same(tiny.weights(a), tiny.weights(b))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_init_has_the_documented_spread():
    m = tiny.model(n_embd=128, vocab_size=4096)
    assert float(m.embed.weight.detach().std()) == pytest.approx(1.0, rel=0.02)
    assert float(m.head.weight.detach().std()) == pytest.approx(0.001, rel=0.02)
    for name, p in m.blocks.named_parameters():
        expected = 0.0 if name.endswith(("out.weight", "down.weight")) else 128**-0.5
        assert float(p.detach().std()) == pytest.approx(expected, rel=0.05), name


def test_a_copy_head_finds_what_followed_before_any_training():
    c = {"n_embd": 256, "n_head": 4, "n_kv_head": 4}
    m = tiny.model(copy_heads=1, **c)
    attn, idx = m.blocks[0].attn, torch.tensor([[3, 7, 9, 4, 11, 5, 3, 20, 8, 3]])
    with torch.no_grad():
        x = m.embed(idx)
        h = torch.nn.functional.rms_norm(x, (256,))
        q, k = (linear(h)[0, :, :64] for linear in (attn.q, attn.k))
        q, k = (torch.nn.functional.rms_norm(y, (64,)) for y in (q, k))
        k = torch.cat((torch.zeros(1, 64), k[:-1]))  # the key of the token before
        looks = (q[-1] @ k.T / 8).softmax(-1)
    assert set(looks.topk(2).indices.tolist()) == {1, 7}  # 7 and 20 followed the two earlier 3s
    plain = tiny.model(**c).blocks[0].attn
    assert not torch.equal(plain.q.weight[:64], plain.k.weight[:64])
    assert torch.equal(attn.q.weight[:64], attn.k.weight[:64])
    assert not torch.equal(attn.q.weight[64:128], attn.k.weight[64:128])


def test_the_first_loss_is_that_of_guessing():
    m, b = tiny.model(), tiny.batch()
    assert m.loss(b.inputs, b.targets).item() / b.targets.numel() == pytest.approx(
        np.log(61), abs=0.01
    )


# ---- tying


def test_tying_survives_construction_loading_and_training(tmp_path):
    m = tiny.model(tie_embeddings=True)
    assert [n for n, _ in m.named_parameters() if "embed" in n or "head" in n] == ["embed.weight"]
    assert m.head_weight.data_ptr() == m.embed.weight.data_ptr()
    assert m.counts()["total"] == sum(p.numel() for p in m.parameters())
    assert m.counts()["head"] == 0
    stored = checkpoint.save(tmp_path, 0, dict(m.named_parameters()), {}, tiny.meta(m))
    assert "head.weight" not in load_file(stored.path / "model.safetensors")
    again = stored.model("cpu", torch.float32)
    assert again.head_weight.data_ptr() == again.embed.weight.data_ptr()
    o, b = tiny.optimizer(again), tiny.batch()
    again.loss(b.inputs, b.targets).backward()
    o.step()
    assert again.head_weight.data_ptr() == again.embed.weight.data_ptr()
    assert torch.equal(again.head_weight, again.embed.weight[:61])
    assert not torch.equal(again.embed.weight, m.embed.weight)


# ---- padding of the vocabulary


@pytest.mark.parametrize("tied", [False, True])
def test_padding_ids_take_no_part(tied):
    m, b = tiny.randomise(tiny.model(tie_embeddings=tied)), tiny.batch()
    table = m.embed.weight if tied else m.head.weight
    assert table.size(0) == 64
    before = m.loss(b.inputs, b.targets).item()
    with torch.no_grad():
        table[61:] = 1e4
    assert m.loss(b.inputs, b.targets).item() == before
    assert m.logits(m(b.inputs)).size(-1) == 61
    m.loss(b.inputs, b.targets).backward()
    assert not table.grad[61:].any()
    tiny.optimizer(m).step()
    assert (table[61:] == 1e4).all()


# ---- shapes that make no model


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"n_embd": 30}, "30 cannot be divided into 4 heads"),
        ({"n_embd": 36}, "36 cannot be divided into 4 heads of an even width"),
        ({"n_kv_head": 3}, "4 query heads cannot share 3"),
        ({"copy_heads": 2}, "copy_heads 2 must be below the 2 key-value heads"),
        ({"copy_heads": -1}, "copy_heads -1 must be"),
        ({"pair_embeddings": -1}, "pair_embeddings must be 0"),
        ({"pair_embeddings": 65}, "pair_embeddings must be at most 64"),
        ({"n_layer": 0}, r"n_layer must be .* \(got 0\)"),
        ({"mlp_ratio": -1.0}, r"mlp_ratio must be .* \(got -1.0\)"),
        ({"softcap": -1.0}, r"softcap must be .* \(got -1.0\)"),
        ({"window_pattern": "SX"}, "'SX'"),
        ({"window_pattern": ""}, "''"),
        ({"rope_base": 0.0}, r"rope_base must be .* \(got 0.0\)"),
        ({"mlp_ratio": float("nan")}, r"mlp_ratio must be .* \(got nan\)"),
        ({"softcap": float("nan")}, r"softcap must be .* \(got nan\)"),
    ],
)
def test_impossible_shapes(knobs, says):
    with pytest.raises(UserError, match=says):
        tiny.config(**knobs)


# ---- compilation


def test_the_compiler_has_room_for_the_shapes_of_a_run():
    """Two windows, five widths and three numbers of rows; conftest makes the limit an error."""
    m = tiny.model(window_pattern="SL", sequence_len=40)
    torch.compiler.reset()
    with torch.compiler.set_stance("default", force_backend="eager"):
        m.compile()
        for rows, T in [(2, 8), (2, 12), (2, 16), (2, 24), (2, 40), (1, 40), (3, 40)]:
            b = tiny.batch(rows=rows, T=T)
            m(b.inputs).sum().backward()
    torch.compiler.reset()


def test_keys_are_clean(tmp_path):
    plain, compiled = (
        tiny.model(),
        tiny.model().compile(),
    )  # nothing is compiled before the first call
    assert [n for n, _ in compiled.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(compiled.state_dict()) == list(plain.state_dict())
    stored = checkpoint.save(
        tmp_path, 0, dict(compiled.named_parameters()), {}, tiny.meta(compiled)
    )
    assert not any("_orig_mod" in name for name in load_file(stored.path / "model.safetensors"))
    stored.load_weights(plain)
    stored = checkpoint.save(tmp_path, 1, dict(plain.named_parameters()), {}, tiny.meta(plain))
    stored.load_weights(compiled)


@pytest.mark.parametrize(
    ("knobs", "graphs"),
    [
        ({}, 1),
        ({"copy_heads": 1, "convolutions": True, "pair_embeddings": 2}, 1),
        ({"copy_heads": 1, "value_embeddings": True}, 2),  # every other layer has a table
    ],
    ids=str,
)
def test_all_layers_share_their_compiled_code(knobs, graphs):
    torch._dynamo.reset()
    m, counter = tiny.randomise(tiny.model(n_layer=5, **knobs)), CompileCounter()
    for block in m.blocks:
        block.compile(backend=counter, dynamic=False)
    m.compiled = True
    m(tiny.batch().inputs)  # without the loss, which compiles for seconds
    torch._dynamo.reset()
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"copy_heads": 1, "convolutions": True, "value_embeddings": True, "pair_embeddings": 2},
    ],
    ids=str,
)
def test_compiled_equals_eager(knobs):
    plain = tiny.randomise(tiny.model(**knobs))
    compiled = tiny.randomise(tiny.model(**knobs)).compile()
    b = tiny.batch()
    losses = [m.loss(b.inputs, b.targets) for m in (plain, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-4)
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=name)
