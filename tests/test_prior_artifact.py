"""The attention prior from artifact to checkpoint: reading, factors, training, warm start."""

import json
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from priors import GPU, PRINT, C, V, made, model_with, terms, tokens, with_spans, write
from safetensors.torch import save_file

from nanochat.base.common import UserError
from nanochat.commands import base_train
from nanochat.model import attention, checkpoint, gpt, prior, prior_artifact
from nanochat.model.gpt import GPT
from nanochat.model.prior import Prior
from nanochat.model.stages import run_directory


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rap_prior.safetensors", terms())


# ---- training, checkpoints


def test_gates_learn_and_resume_is_bit_equal(tmp_path, path):
    whole, halved = model_with(path), model_with(path)
    assert tiny.same(dict(whole.state_dict()), dict(halved.state_dict()))
    start = whole.prior.gates.detach().clone()
    tiny.fit(tmp_path / "a", whole, tiny.ListFeed.random(8), save_every=4, keep=9)
    moved = (whole.prior.gates - start).abs()
    assert moved.min() > 0 and moved.max() < 1  # every gate, at a rate of its own
    again, feed = GPT.build(whole.config), tiny.ListFeed.random(8)
    run = tiny.run(tmp_path / "b", again, feed)
    run.restore(checkpoint.at_step(tmp_path / "a", 4))
    run.fit()
    run.logbook.close()
    assert tiny.same(dict(again.state_dict()), dict(whole.state_dict()))
    groups = tiny.optimizer(whole, gate_lr=0.3).groups
    held = next(g for g in groups if [*g.params] == ["prior.gates"])
    assert (held.optimizer, held.lr, held.weight_decay) == ("adamw", 0.3, 0.0)


@pytest.mark.parametrize("gate", ["learned", "fixed", "annealed"])
def test_a_checkpoint_carries_the_prior(tmp_path, path, gate):
    m = model_with(path, rap_gate=gate)
    b = tiny.batch()
    meta = {**tiny.meta(m), "config": m.config.to_dict()}
    Path(path).unlink()
    again = checkpoint.save(tmp_path, 1, m.state_dict(), {}, meta).model("cpu", torch.float32)
    with torch.no_grad():
        assert torch.equal(again.logits(again(b.inputs)), m.logits(m(b.inputs)))
    assert again.config == m.config and again.counts() == m.counts()
    bare = checkpoint.save(tmp_path, 2, tiny.model().state_dict(), {}, meta)
    with pytest.raises(UserError, match=r"describe prior\..* but it holds nothing"):
        bare.model("cpu", torch.float32)
    if gate != "annealed":
        return
    m.prior.annealed = True
    tiny.fit(tmp_path / "run", m)
    assert not m.prior.gates.any()  # and what goes on from it is a model without
    after = checkpoint.newest(tmp_path / "run").model("cpu", torch.float32)
    assert (
        after.prior is None
        and after.config == tiny.config()
        and "prior.gates" not in after.state_dict()
    )
    with torch.no_grad():
        torch.testing.assert_close(after.logits(after(b.inputs)), m.logits(m(b.inputs)))


def test_base_train_takes_a_prior_and_needs_it_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    flags = [*tiny.workplace(tmp_path), "--eval_every=0", "--keep=9"]
    about = json.loads((tmp_path / "tokenizer" / "meta.json").read_text())
    artifact = write(
        tmp_path / "p.safetensors",
        terms(vocab=about["vocab_size"], reach=64),
        tokenizer=about["fingerprint"],
    )
    rap = [f"--rap={artifact}", "--rap_alpha=1", "--rap_gate=annealed", "--rap_heads=0.5"]
    base_train.main([*flags, *rap, "--num_iterations=6", "--save_every=3"])
    assert "prior        rules" in capsys.readouterr().out
    run = run_directory("base", "t")
    whole = checkpoint.at_step(run, 6).weights
    want = {n: whole[n] for n in whole}
    halfway = checkpoint.at_step(run, 3).weights["prior.gates"]
    assert float(halfway.max()) == pytest.approx(2) and float(halfway.min()) == pytest.approx(
        0.5
    )  # of --rap_lead and --rap_alpha
    assert not want["prior.gates"].any()
    checkpoint.at_step(run, 6).path.rename(run / "gone")
    Path(artifact).unlink()
    base_train.main([*flags, "--resume=auto"])
    again = checkpoint.at_step(run, 6).weights
    assert tiny.same({n: again[n] for n in again}, want)
    with pytest.raises(UserError, match="rap_alpha=1"):
        base_train.main([*flags, "--resume=auto", "--rap_alpha=2"])
    with pytest.raises(UserError, match="has no effect without --rap FILE"):
        base_train.main([*flags, "--attention=dense", "--num_iterations=1"])


def test_warm_start(tmp_path, path, monkeypatch):
    shape = {"n_embd": 128, "n_head": 4, "n_kv_head": 2, "sequence_len": 64}
    config, tensors = made(path, config=tiny.config(**shape), rap_heads=0.5, rap_layers=1)
    m = tiny.model(**shape)
    prior.warm_start(m, config.rap, tensors, 3.0)
    seen = {}

    def watch(q, k, v, window, bias, starts):
        assert bias is None and starts is None
        seen.setdefault("scores", []).append(q @ k.repeat_interleave(2, 1).mT / q.size(3) ** 0.5)
        return attention.attend(q, k, v, window)

    idx = tokens(4, 64, few=V)
    monkeypatch.setattr(gpt, "attend", watch)
    with torch.no_grad():
        m(idx)
    same = (idx[:, :, None] == idx[:, None, :]) & torch.ones(64, 64).tril(-1).bool()
    other = (idx[:, :, None] != idx[:, None, :]) & torch.ones(64, 64).tril(-1).bool()
    gap = [
        [float(s[:, h][same].mean() - s[:, h][other].mean()) for h in range(4)]
        for s in seen["scores"]
    ]
    assert min(gap[0][:2]) > 1.5 and max(map(abs, gap[0][2:] + gap[1])) < 1.0
    plain = write(tmp_path / "lag.safetensors", {"lag": terms()["lag"]})
    config, tensors = made(plain)
    with pytest.raises(UserError, match="needs a prior with a match term"):
        prior.warm_start(m, config.rap, tensors, 1.0)


# ---- factors


def test_the_rank_is_the_smallest_that_meets_the_error():
    smooth = torch.exp(-torch.arange(200) / 40)
    ranks = []
    for error in (0.1, 0.02, 0.005):
        u, w, worst = prior_artifact.factor_lag(smooth, error)
        i, j = torch.arange(200)[:, None], torch.arange(200)
        off = (u @ w.T - smooth[(i - j).clamp(min=0)]).tril().abs().max()
        assert (
            worst <= error and float(off) == pytest.approx(worst, abs=2e-5) and u.abs().max() <= 1
        )
        assert u.size(1) == 1 or prior_artifact.factor_lag(smooth, error, u.size(1) - 1)[2] > error
        ranks.append(u.size(1))
    assert ranks == sorted(ranks) and ranks[-1] < 40
    u, w, worst = prior_artifact.factor_lag(
        torch.eye(200)[3], 0.02, 17
    )  # too sharp: the columns end, the error is said
    assert u.size(1) == 17 and worst > 0.5
    codes = terms(P=8)["codes"]
    thin = torch.zeros(3, 8, 8)
    thin[1], thin[2] = (
        torch.outer(torch.rand(8), torch.rand(8)),
        torch.outer(torch.ones(8), torch.ones(8)) * 1e-5,
    )
    shifts, query, keys, worst = prior_artifact.factor_match(codes, thin, 0.02)
    assert shifts == [1, 2] and query.shape == (8, 1) and keys.shape == (2, 8, 1) and worst <= 0.02


def test_what_an_accelerator_gets(tmp_path):
    """
    On other devices than a CPU, lag becomes its fit for good, a matrix stays exact, and ranks wider
    than the kernels are refused.
    """
    sharp = 1 / (1 + torch.arange(300.0))
    config, tensors = made(
        write(tmp_path / "p.safetensors", {"lag": sharp}), GPU, tiny.config(sequence_len=300)
    )
    u, w = tensors["place_u"], tensors["place_w"]
    assert u.size(1) <= 64 and f"rank {u.size(1)}" in config.rap["about"]
    torch.testing.assert_close(
        (u @ w.T)[200, :201].flip(0), tensors["place"][:201], atol=1e-5, rtol=0
    )
    assert tensors["place"].numel() == 301 and tensors["place"][-1] == 0
    torch.save(torch.randn(300, 300), tmp_path / "m.pt")
    config, tensors = made(str(tmp_path / "m.pt"), GPU, tiny.config(sequence_len=300))
    assert config.rap["attention"] == "dense" and tensors["place"].tril().abs().max() == 1
    wide = write(tmp_path / "w.safetensors", terms(P=200, P2=60))
    with pytest.raises(UserError, match="exceeds the 256 columns"):
        made(wide, GPU)
    assert made(wide)[0].rap["attention"] == "factored"
    sharper = write(tmp_path / "s.safetensors", with_spans())
    assert (
        made(sharper, GPU)[0].rap["attention"] == "dense"
        and made(sharper)[0].rap["attention"] == "factored"
    )
    with pytest.raises(UserError, match="factored cannot add the spans"):
        made(sharper, GPU, attention="factored")


def test_flex_says_why_it_cannot(path, capsys):
    m = model_with(path, attention="flex")
    assert (
        m.config.rap["attention"] == "factored"
        and "FlexAttention cannot train on cpu" in capsys.readouterr().err
    )
    m.config.rap["attention"] = "flex"  # as a checkpoint from elsewhere says
    with torch.no_grad():
        want, got = model_with(path)(tokens()), [m(tokens()), m(tokens())]
    assert torch.equal(got[0], want) and torch.equal(got[1], want)
    assert capsys.readouterr().err.count("added in the factored form") == 1
    apple = torch.device("mps"), torch.float32
    assert m.prior.form(*apple) == "dense", "positions are looked up, as where it was trained"
    columns = Prior(made(path, GPU)[0].rap, [0, 0], 8)
    assert columns.form(*apple) == "factored", "positions are columns"


@pytest.mark.slow
def test_compiled_equals_eager_with_a_prior(path):
    b, models = (
        tiny.batch(),
        [model_with(path, rap_layers=1, shape={"n_layer": 3}) for _ in range(2)],
    )
    models[1].compile()
    for m in models:
        m.loss(b.inputs, b.targets).backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["terms", "spans", "bias"])
def test_flex_forward_agrees(tmp_path, kind):
    shape = {"n_embd": 256, "n_head": 4, "sequence_len": 256}
    given = {
        "terms": terms(reach=256),
        "spans": with_spans(256),
        "bias": {"bias": torch.rand(256, 256)},
    }[kind]
    m = model_with(write(tmp_path / "p.safetensors", given), shape=shape, rap_heads=0.75)
    q, k, v = (
        torch.randn(2, h, 256, 64, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2)
    )
    with torch.no_grad():
        bias = m.prior(tokens(T=256), torch.float32)[0]
        for window in (0, 100):
            got = attention.attend_flex(q, k, v, window, bias)
            torch.testing.assert_close(
                got, attention.attend(q, k, v, window, bias), atol=1e-4, rtol=1e-3
            )


# ---- artifacts that are refused


class Bad:
    def __reduce__(self):
        return (print, ("this must not run",))


def refused(path, says):
    with pytest.raises(UserError, match=says) as e:
        prior_artifact.load(str(path), V, PRINT)
    assert "\n" not in str(e.value)


def test_what_is_no_prior(tmp_path, capsys):
    refused(tmp_path / "none.safetensors", "cannot read the prior")
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    refused(tmp_path / "short.safetensors", "cannot read the prior")
    torch.save(Bad(), tmp_path / "bad.pt")
    refused(tmp_path / "bad.pt", "cannot read the prior")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bad()))
    refused(tmp_path / "plain.pt", "cannot read the prior")
    assert "must not run" not in capsys.readouterr().out
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "dict.pt")
    refused(tmp_path / "dict.pt", "no tensor where one should be")
    refused(
        write(tmp_path / "a.safetensors", terms(), format="rap-9"),
        "format 'rap-9', but this version reads 'rap-1'",
    )
    refused(write(tmp_path / "a.safetensors", terms(), format=None), "format None")
    refused(
        write(tmp_path / "a.safetensors", terms(), tokenizer="abc" * 9),
        "for tokenizer abcabcabcabc, but this run's is ffffffffffff: generate",
    )
    refused(write(tmp_path / "a.safetensors", terms(), tokenizer=None), "tokenizer unknown")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spans": torch.ones(3)}, r"spans of shape \(3,\), not N, T = 16:"),
        ({"spans": torch.ones(2, 15)}, r"spans of shape \(2, 15\), not N = 2, T = 16:"),
        ({"lag": torch.ones(3, 3)}, r"lag of shape \(3, 3\), not T:"),
        ({"key": torch.ones(7)}, r"key of shape \(7,\), not V = 61:"),
        ({"match": torch.ones(2, 8, 7)}, r"match of shape \(2, 8, 7\), not S = 2, P = 8, P = 8"),
        (
            {"codes": torch.ones(60, 8, dtype=torch.int8)},
            r"codes of shape \(60, 8\), not V = 61, P",
        ),
        ({"codes": torch.zeros(61, 8, dtype=torch.int8)}, "codes as torch.int8, not -1 and 1"),
        ({"codes": torch.ones(61, 8)}, "codes as torch.float32, not -1 and 1 as int8"),
        ({"lag": torch.tensor([1.0, float("nan")])}, "lag as torch.float32, not finite"),
        ({"pair": torch.tensor([float("inf")] * 6)}, "pair as torch.float32, not finite"),
        ({"key": torch.ones(61, dtype=torch.int64)}, "key as torch.int64, not finite float32"),
        ({"match": None}, "codes without match"),
        ({"surprise": torch.ones(3)}, "surprise, which is no term"),
        ({"bias": torch.ones(4, 4)}, "bias together with other terms"),
    ],
)
def test_terms_that_do_not_fit(tmp_path, change, says):
    given = {n: t for n, t in (terms() | change).items() if t is not None}
    refused(write(tmp_path / "a.safetensors", given), says)


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        (torch.ones(3, 4), r"bias of shape \(3, 4\)"),
        (torch.ones(5), r"bias of shape \(5,\)"),
        (torch.full((2, 2), torch.nan), "not finite"),
    ],
)
def test_matrices_that_do_not_fit(tmp_path, matrix, says):
    torch.save(matrix, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", says)
    save_file({"anything": matrix}, tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", says)


def test_a_matrix_of_ones_own(tmp_path, monkeypatch):
    m = torch.randn(5, 5) * 7
    torch.save(m, tmp_path / "m.pt")
    got, about = prior_artifact.load(str(tmp_path / "m.pt"), V, PRINT)
    torch.testing.assert_close(got["bias"], m / m.tril().abs().max())
    monkeypatch.setenv("HOME", str(tmp_path))
    for metadata in (None, {"format": "pt"}):
        save_file({"anything": m}, tmp_path / "m.safetensors", metadata)
        same, _ = prior_artifact.load("~/m.safetensors", V, PRINT)
        assert torch.equal(same["bias"], got["bias"])
    assert about.startswith("matrix ")
    _, tensors = made(str(tmp_path / "m.pt"))
    assert (
        tensors["place"].shape == (C, C)
        and not tensors["place"][5:].any()
        and not tensors["place"][:, 5:].any()
    )
    torch.testing.assert_close(
        made(str(tmp_path / "m.pt"), config=tiny.config(sequence_len=4))[1]["place"],
        got["bias"][:4, :4],
    )
