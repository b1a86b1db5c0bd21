"""
What only a GPU shows: its kernels against the float64 oracles of the CPU's tests, compiled
training, and runs that reach its limits. Without a GPU, everything here is skipped:

    python -m pytest -m gpu

What bench/gpu_first.py does as well is shared with it, so that tests/test_gpu_first.py runs the same
lines on a CPU.
"""

import json
import socket
from types import SimpleNamespace

import pytest
import test_attention
import test_generate
import test_loss
import test_prior
import tiny
import torch
import torch.distributed as dist
from priors import GPU, made, terms, tokens, whole, with_spans, write

from bench import gpu_first
from nanochat.base.runtime import Runtime, compiler_missing
from nanochat.chat import graphs
from nanochat.commands import base_train
from nanochat.model import attention, loss
from nanochat.model.gpt import GPT
from nanochat.model.prior import Prior

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FP32, BF16 = torch.float32, torch.bfloat16
CLOSE = {
    FP32: {"atol": 5e-3, "rtol": 5e-3},
    BF16: {"atol": 0.06, "rtol": 0.06},
}  # float32 products are TF32's


@pytest.fixture(autouse=True)
def compiler():
    if missing := compiler_missing(GPU):
        pytest.skip(missing)
    torch.compiler.reset()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float64."""
    return float((got.double().cpu() - want).norm() / want.norm().clamp(min=1e-30))


# ---- kernels against float64


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    ("heads", "T", "window"),
    [((4, 4), 256, 0), ((4, 2), 200, 0), ((4, 1), 256, 64), ((4, 2), 300, 130)],
)
def test_attention_and_its_gradients(heads, T, window, dtype):
    exact = [x.to(dtype).double().requires_grad_() for x in test_attention.draw(2, *heads, T, 64)]
    given = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    weights = torch.randn(
        2, heads[0], T, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    want, got = test_attention.oracle(*exact, window), attention.attend(*given, window)
    (want * weights).sum().backward()
    (got * weights.to("cuda", dtype)).sum().backward()
    most = 2e-3 if dtype is FP32 else 1e-2
    assert relative(got, want.detach()) < most
    assert all(relative(a.grad, b.grad) < most for a, b in zip(given, exact, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("window", [0, 12])
def test_documents_and_their_gradients(window, dtype):
    shape = 2, 4, 2, test_attention.T_DOCUMENTS, 64
    exact = [x.to(dtype).double().requires_grad_() for x in test_attention.draw(*shape)]
    given = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    starts = test_attention.starts_of_documents()
    want = test_attention.by_document(*exact, window)
    got = attention.attend(*given, window, starts=starts.cuda())
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (want * weights).sum().backward()
    (got * weights.to("cuda", dtype)).sum().backward()
    most = 2e-3 if dtype is FP32 else 1e-2
    assert relative(got, want.detach()) < most
    assert all(relative(a.grad, b.grad) < most for a, b in zip(given, exact, strict=True))


@pytest.mark.parametrize("backend", ["dense", "factored", "flex"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("kind", "window"), [("terms", 0), ("terms", 100), ("spans", 0)])
def test_a_prior_and_the_gradients_of_its_gates(tmp_path, kind, window, dtype, backend):
    if (kind, backend) == ("spans", "factored"):
        pytest.skip("a span is too sharp for a few columns: prior_artifact.prepare refuses")
    T, D, heads = 256, 64, (4, 2)
    given = terms(reach=T) if kind == "terms" else with_spans(T)
    shape = tiny.config(n_head=heads[0], n_kv_head=heads[1], n_embd=heads[0] * D, sequence_len=T)
    path = write(tmp_path / "p.safetensors", given)
    config, tensors = made(path, torch.device("cuda", 0), shape, attention=backend, rap_error=1e-4)
    assert config.rap["attention"] == backend
    p = Prior(config.rap, [window, window], D)
    p.load_state_dict(tensors)
    p.to("cuda")
    with torch.no_grad():
        p.gates.copy_(torch.rand(p.gates.shape, generator=torch.Generator().manual_seed(2)))
    idx = tokens(T=T)
    bias = p(idx.cuda(), dtype)[0]
    B = whole(given, idx)
    if backend == "factored":  # its positions are columns: the fit, whose error is stated
        B["lag"] = (
            (tensors["place_u"].double() @ tensors["place_w"].double().T).tril().expand(2, T, T)
        )
    gates = p.gates[0].detach().cpu().double().requires_grad_()
    rows = config.rap["rows"][0] if kind == "spans" else [0] * heads[0]
    curves = [given["lag"], *given.get("spans", [])]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    added = []
    for h in range(heads[0]):
        lag = (
            B["lag"]
            if kind == "terms"
            else curves[rows[h]].double()[(i - j).clamp(min=0)].tril().expand(2, T, T)
        )
        parts = {**B, "lag": lag}
        added.append(
            sum(gates[h, g] * parts[name] for g, (name, _) in enumerate(config.rap["columns"]))
        )
    exact = [x.to(dtype).double().requires_grad_() for x in test_attention.draw(2, *heads, T, D)]
    sent = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    weights = torch.randn(
        2, heads[0], T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    want, got = (
        test_prior.oracle(*exact, window, torch.stack(added, 1)),
        attention.attend(*sent, window, bias),
    )
    (want * weights).sum().backward()
    (got * weights.to("cuda", dtype)).sum().backward()
    most = 5e-3 if dtype is FP32 else 2e-2
    assert relative(got, want.detach()) < most
    assert all(relative(a.grad, b.grad) < most for a, b in zip(sent, exact, strict=True))
    assert relative(p.gates.grad[0], gates.grad) < 3 * most


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_loss_and_its_gradients(compiled, dtype, monkeypatch):
    for elements in (loss.CHUNK_ELEMENTS, loss.COMPILED_ELEMENTS):
        monkeypatch.setitem(elements, "cuda", 5 * test_loss.V)  # several chunks
    x, w, targets, weights = test_loss.problem(dtype)
    want, dx, dw, _ = test_loss.reference(x, w, targets, weights, 15.0)
    a, b = (t.detach().cuda().requires_grad_() for t in (x, w))
    got = loss.linear_cross_entropy(a, b, targets.cuda(), weights.cuda(), 15.0, compiled)
    got.backward()
    most = 2e-3 if dtype is FP32 else 1e-2
    assert (
        relative(got.detach(), want) < most
        and relative(a.grad, dx) < most
        and relative(b.grad, dw) < most
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, torch.float16, BF16], ids=str)
def test_no_kernel_holds_all_scores(heads, dtype):
    """Torch falls back silently on products of whole score matrices; flash where it exists."""
    shapes = heads[0], heads[1], heads[1]
    q, k, v = (
        torch.randn(2, h, 512, 64, device="cuda", dtype=dtype, requires_grad=True) for h in shapes
    )
    (used,) = gpu_first.chosen_backends(q, k, v)
    if attention.has_flash(GPU, dtype, 64):
        assert used in ("FLASH_ATTENTION", "CUDNN_ATTENTION")
    else:
        assert used == "EFFICIENT_ATTENTION"
    expected = [] if attention.has_flash(GPU, dtype, 64) else ["EFFICIENT_ATTENTION"]
    assert gpu_first.chosen_backends(q, k, v, window=100) == expected  # else not torch's choice


# ---- the model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"window_pattern": "SL"},
        {"activation": "swiglu", "tie_embeddings": True, "softcap": 0.0},
    ],
    ids=str,
)
def test_steps_are_those_of_the_cpu(compiled, knobs, monkeypatch):
    rt = Runtime(torch.device("cuda", 0), FP32, 0, 1, 42)
    models = [tiny.randomise(tiny.model(n_embd=64, **knobs)) for _ in range(2)]
    models[1].to("cuda")
    models[1].set_context(16)
    if compiled:
        models[1].compile()
    optimizers = [tiny.optimizer(models[0]), tiny.optimizer(models[1], rt)]
    for o in optimizers:
        o.ns_dtype = FP32  # the iteration amplifies what bfloat16 rounds away
    seen = []
    for step in range(4):
        b = tiny.batch(seed=step % 2)
        for m, o, device in zip(models, optimizers, ("cpu", "cuda"), strict=True):
            o.zero_grad()
            total = m.loss(b.inputs.to(device), b.targets.to(device)) / b.targets.numel()
            total.backward()
            o.step()
            seen.append(float(total.detach()))
    for cpu, gpu in zip(seen[::2], seen[1::2], strict=True):
        assert gpu == pytest.approx(cpu, rel=2e-2)
    assert seen[-2] < seen[0]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("window_pattern", ["L", "SL"])
def test_cached_decoding_is_the_whole_sequence(dtype, window_pattern):
    m = GPT.build(tiny.config(window_pattern=window_pattern, n_embd=64), "cuda", dtype)
    m.load_state_dict(
        tiny.randomise(tiny.model(window_pattern=window_pattern, n_embd=64)).state_dict()
    )
    idx = tiny.batch(rows=3).inputs.cuda()
    with torch.no_grad():
        want = m.logits(m(idx))
        cache, parts = m.new_cache(3, 16), []
        for size in (7, 1, 1, 5, 1, 1):
            at = sum(p.size(1) for p in parts)
            parts.append(m.logits(m(idx[:, at : at + size], cache)))
            cache.advance(size)
    torch.testing.assert_close(torch.cat(parts, 1), want, **CLOSE[dtype])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["grouped", "prior"])
def test_golden_losses(kind, dtype, compiled):
    name = str(dtype).removeprefix("torch.")
    want = json.loads(gpu_first.GOLDEN.read_text())[f"{kind}, {name}"]
    torch.set_float32_matmul_precision("highest")
    got = gpu_first.golden_losses(kind, place(dtype).runtime, compiled)
    torch.set_float32_matmul_precision("high")
    assert got == pytest.approx(want, rel=gpu_first.TOLERANCE[name])


def place(dtype: torch.dtype = BF16) -> gpu_first.Place:
    return gpu_first.Place(Runtime(torch.device("cuda", 0), dtype, 0, 1, 42), tiny=False)


@pytest.mark.parametrize("shape", test_generate.SHAPES.values(), ids=test_generate.SHAPES)
@pytest.mark.parametrize("patience", [0, 1000])
def test_the_engine_writes_what_it_writes_on_a_cpu(shape, patience, monkeypatch):
    """With graphs and without: greedy in float32, and sampled rows that do not depend on others."""
    monkeypatch.setattr(graphs, "PATIENCE", patience)
    engines = []
    for device in ("cpu", "cuda"):
        m = test_generate.model(61, **shape).to(device)
        m.set_context(m.config.sequence_len)
        engines.append(test_generate.quiet(SimpleNamespace(encode=None, decode=None), m))
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2]]
    torch.set_float32_matmul_precision("highest")
    cpu, gpu = (e.generate_batch(prompts, 2, 12, temperature=0) for e in engines)
    assert [s.tokens for s in gpu] == [s.tokens for s in cpu]
    together = engines[1].generate_batch(prompts, 2, 12, seed=[5, 5, 5])
    alone = [engines[1].generate_batch([p], 2, 12, seed=5)[0] for p in prompts]
    other = test_generate.quiet(SimpleNamespace(encode=None, decode=None), m)
    grown = [other.generate_batch(prompts[:1], rows, 12, seed=[5])[0] for rows in (1, 16)]
    del other  # and its graphs, which share nothing with those of the first engine
    again = engines[1].generate_batch(prompts, 2, 12, seed=[5, 5, 5])
    torch.set_float32_matmul_precision("high")
    assert [s.tokens for s in together[::2]] == [s.tokens for s in alone]
    assert [s.tokens for s in grown] == [alone[0].tokens] * 2 and again == together


def test_nccl_with_one_rank_gives_back_what_it_gets():
    """Every collective that training uses, on tensors of the GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", address, world_size=1, rank=0, device_id=device)
    try:
        x = torch.randn(4, 8, device=device)
        for collective in (dist.reduce_scatter_single, dist.all_gather_single):
            y = torch.empty_like(x)
            collective(y, x)
            assert torch.equal(y, x)
        for collective in (dist.all_reduce, lambda t: dist.broadcast(t, src=0)):
            y = x.clone()
            collective(y)
            assert torch.equal(y, x)
        objects = [None]
        dist.all_gather_object(objects, ("host", 1))
        assert objects == [("host", 1)]
    finally:
        dist.destroy_process_group()


# ---- speed


def test_a_step_is_not_slower_than_a_floor():
    """A fifth of the measured peak for 37.75 M parameters: below it, something is wrong."""
    config, rows = gpu_first.shape(place(), "d4")
    figures = gpu_first.speed_of_training(place(), config, rows, seconds=3.0)
    assert figures["finite"] and figures["share_of_measured_peak"] >= 0.2, figures


# ---- runs


def on_gpu(directory) -> list[str]:
    """The flags of tiny.workplace on the GPU, in its precision and at a width that kernels take."""
    words = [
        w
        for w in tiny.workplace(directory)
        if not w.startswith(("--device_type", "--dtype", "--model_dim", "--head_dim"))
    ]
    return [*words, "--device_type=cuda", "--model_dim=128", "--head_dim=32"]


def test_a_run_learns_is_resumed_and_switches_its_context(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    words = [
        *on_gpu(tmp_path),
        "--num_iterations=60",
        "--eval_every=0.5",
        "--context_stages",
        "16@0",
        "32@0.5",
    ]
    whole = base_train.main(words)
    assert whole["eval"]["val_bpb"] < 2.0 and whole["steps"] == 60
    said = capsys.readouterr().out
    assert (
        "cuda x1, bfloat16" in said
        and "compiling while the data is opened" in said
        and "32 rows of 32 from 50%" in said
    )
    half = base_train.main([*words, "--model_tag=half", "--num_iterations=30"])
    assert half["steps"] == 30
    again = base_train.main(
        [
            *words,
            "--model_tag=half",
            "--num_iterations=60",
            "--resume=auto",
            "--new_horizon=stretch",
        ]
    )
    assert again["tokens"] == whole["tokens"] and again["eval"]["val_bpb"] == pytest.approx(
        whole["eval"]["val_bpb"], rel=0.1
    )


def test_memory_that_runs_out_halves_the_micro_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    words = [
        *on_gpu(tmp_path),
        "--num_iterations=4",
        "--compile=off",
        "--total_batch_size=131072",
        "--device_batch_size=4096",
    ]
    torch.cuda.empty_cache()
    there = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600e6) / there)
        out = base_train.main(words)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert out["tokens"] == 4 * 131072
    assert "out of memory with a micro-batch" in capsys.readouterr().err


def test_memory_that_runs_out_in_the_backward_pass_halves_the_micro_batch(tmp_path):
    rows, same = gpu_first.backward_out_of_memory(tmp_path, place(FP32).runtime)
    assert rows[:3] == [8, 4, 2] and same


@pytest.mark.parametrize("part", [gpu_first.finetuning, gpu_first.half_precision])
def test_runs_of_other_kinds(part, tmp_path, monkeypatch):
    """Finetuning, whose batches have many widths, and float16 with its loss scaler."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    report = part(place())
    assert gpu_first.passed(report), report
