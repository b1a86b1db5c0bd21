"""
plan memory: the bytes that are counted are those that the allocator hands out in a real run, as the
profiler sees it; ranks, batches and parts behave; what does not fit is marked and refused.
"""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanochat.base.common import UserError
from nanochat.base.hardware import lookup
from nanochat.base.runtime import Runtime, compiler_missing
from nanochat.commands import plan
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.plan import machine, memory
from nanochat.train.knobs import TrainKnobs
from nanochat.train.run import make_optimizer

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
NAMES = {FP32: "float32", BF16: "bfloat16"}
TINY = [
    "--depth",
    "2",
    "--model_dim",
    "64",
    "--head_dim",
    "32",
    "--vocab",
    "512",
    "--sequence_len",
    "128",
]


def config(**knobs) -> GPTConfig:
    return GPTConfig(
        **{
            "sequence_len": 128,
            "vocab_size": 2048,
            "n_layer": 3,
            "n_head": 4,
            "n_kv_head": 4,
            "n_embd": 128,
            **knobs,
        }
    )


def counted(c: GPTConfig, rows: int, T: int, dtype: torch.dtype, **how) -> dict:
    how = {"compiled": False, "device_type": "cpu", **how}
    return memory.predict(c, rows, T, dtype=NAMES[dtype], **how)


def measured(
    c: GPTConfig, rows: int, dtype: torch.dtype, micro_batches: int = 2, compiled: bool = False
) -> int:
    """Peak bytes of a real step in the middle of a run, by the allocator's own events, with model and state."""
    rt = Runtime(CPU, dtype, 0, 1, 42)
    model = GPT.build(c, CPU, dtype)
    model.init_weights(1)
    if compiled:
        model.compile()
    optimizer = make_optimizer(model, TrainKnobs(), rt)
    ids = torch.randint(0, c.vocab_size, (2 * micro_batches * rows, c.sequence_len))

    def step() -> None:
        optimizer.zero_grad()
        parts = ids.split(rows)
        for idx, targets in zip(parts[::2], parts[1::2], strict=True):
            (model.loss(idx, targets) / targets.numel()).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    held = [
        *model.parameters(),
        model.cos,
        model.sin,
        ids,
        *(t for g in optimizer.groups for s in g.state.values() for t in s.values()),
    ]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak + sum(t.untyped_storage().nbytes() for t in held)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"n_kv_head": 1},
        {"tie_embeddings": True},
        {"activation": "swiglu", "mlp_ratio": 2.5},
        {"window_pattern": "SL", "softcap": 0.0},
        {"convolutions": True, "copy_heads": 1, "value_embeddings": True},
    ],
    ids=str,
)
def test_a_step_holds_what_was_predicted(knobs, dtype):
    c = config(n_layer=2, **knobs)
    peak = counted(c, 8, 128, dtype)["allocated"]
    assert peak == pytest.approx(measured(c, 8, dtype), rel=0.1)


def test_a_step_of_one_micro_batch_has_no_gradients_when_activations_peak():
    c = config(n_layer=2, vocab_size=16_384)
    one, two = (counted(c, 4, 128, FP32, micro_batches=n)["allocated"] for n in (1, 2))
    assert one == pytest.approx(measured(c, 4, FP32, micro_batches=1), rel=0.1)
    assert two == pytest.approx(measured(c, 4, FP32, micro_batches=2), rel=0.1) and two > one


@pytest.mark.slow
@pytest.mark.skipif(bool(compiler_missing(CPU)), reason="no C++ compiler to compile with")
@pytest.mark.parametrize("knobs", [{}, {"n_kv_head": 1, "activation": "swiglu"}], ids=str)
def test_a_compiled_step_holds_what_was_predicted(knobs):
    c = config(sequence_len=256, **knobs)
    peak = counted(c, 8, 256, BF16, compiled=True)["allocated"]
    assert peak == pytest.approx(measured(c, 8, BF16, compiled=True), rel=0.1)


def test_state_is_that_of_the_roster():
    c = config(n_kv_head=2)
    model = GPT.build(c, "meta")
    sizes = {row.optimizer: 0 for _, _, row in model.roster()}
    for _, p, row in model.roster():
        sizes[row.optimizer] += 4 * p.numel()
    parts = counted(c, 2, 64, BF16, device_type="cuda")
    assert parts["optimizer"] == sizes["muon"] + 2 * sizes["adamw"]  # one moment, and two
    assert parts["gradients"] == parts["weights"] == sum(sizes.values())


def test_ranks_share_the_optimizers_state_and_nothing_else():
    c = config()
    how = {"dtype": "bfloat16", "device_type": "cuda", "compiled": True}
    one, four = (memory.predict(c, 2, 128, world_size=n, **how) for n in (1, 4))
    assert four["optimizer"] == one["optimizer"] / 4
    assert all(one[n] == four[n] for n in ("weights", "gradients", "activations", "loss"))


def test_parts_and_total():
    c = config()
    p = memory.predict(c, 4, 128, dtype="bfloat16", device_type="cuda", compiled=True)
    assert p["total"] == p["allocated"] + p["context"] + p["compile"] + p["fragmentation"]
    assert p["context"] >= 1e9 and p["compile"] > 0  # a CUDA context is never free
    assert p["weights"] + p["optimizer"] + p["activations"] < p["allocated"]
    assert (
        memory.predict(c, 4, 128, dtype="bfloat16", device_type="cpu", compiled=False)["compile"]
        == 0
    )


def test_activations_grow_with_rows_and_the_logits_are_never_whole():
    c = config(vocab_size=24_576, sequence_len=2048, n_layer=4, n_head=8, n_kv_head=8, n_embd=512)
    few, many = (
        memory.predict(c, rows, 2048, dtype="bfloat16", device_type="cuda", compiled=True)
        for rows in (24, 48)
    )
    assert many["activations"] == pytest.approx(2 * few["activations"], rel=0.05)
    assert many["loss"] < 2e9 < 4 * 48 * 2048 * 24_576  # float32 logits would be 9.7 GB
    rtx3090 = lookup("rtx3090")
    assert (
        rtx3090 is not None and many["total"] < 0.6 * rtx3090.memory_gb * 2**30
    )  # a naive head takes 23.4 GB there


# ---- the command


def test_the_grid_says_what_fits(capsys):
    words = [
        "memory",
        *TINY,
        "--gpu",
        "rtx3060",
        "--device_batch_sizes",
        "4",
        "1",
        "--sequence_lens",
        "64",
        "128",
        "--memory_gb",
        "2.0",
    ]
    out = plan.main(words)
    output = capsys.readouterr().out
    assert [(r["sequence_len"], r["rows"]) for r in out["grid"]] == [
        (64, 1),
        (64, 4),
        (128, 1),
        (128, 4),
    ]
    assert (
        out["device"] == "RTX 3060"
        and out["dtype"] == "bfloat16"
        and out["compiled"]
        and all(r["fits"] for r in out["grid"])
    )
    assert output.count("| fits") == 4
    totals = [r["total"] for r in out["grid"]]
    limit = (totals[2] + totals[3]) / 2 / 2**30
    some = plan.main([*words[:-1], str(limit), "--json"])
    assert [r["fits"] for r in some["grid"]] == [t <= limit * 2**30 for t in totals] and not some[
        "grid"
    ][-1]["fits"]
    assert json.loads(capsys.readouterr().out)["grid"] == some["grid"]


def test_this_machine_is_the_default(monkeypatch):
    fields = {"name": "CPU", "device_type": "cpu", "memory_bytes": 2**32, "peak_flops": 1e12}
    monkeypatch.setattr(machine, "in_process", lambda spec: {**fields, "dtype": spec["dtype"]})
    out = plan.main(
        ["memory", *TINY, "--device_batch_sizes", "1", "--dtype", "float32", "--no_calibrate"]
    )
    assert (
        out["memory_bytes"] == 2**32 and out["grid"][0]["context"] > 0 and out["dtype"] == "float32"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--gpu", "rtx3060", "--memory_gb", "1"],
            r"nothing fits RTX 3060: 2 rows of 128 take 1.9 GB of 1.0; choose a smaller --depth",
        ),
        (["--gpu", "rtx30600"], "there is no GPU 'rtx30600'"),
        (
            ["--gpu", "rtx3060", "--sequence_lens", "256"],
            "rows of 256 tokens do not fit a context of 128",
        ),
        (["--gpu", "rtx3060", "--device_batch_sizes", "0"], r"must be at least 1 \(got 0\)"),
    ],
)
def test_bad_input(words, says):
    with pytest.raises(UserError, match=says):
        plan.main(["memory", *TINY, "--device_batch_sizes", "2", *words])


def test_an_older_card_computes_in_float16_and_apples_have_no_compiler(capsys):
    assert (
        plan.main(["memory", *TINY, "--gpu", "T4", "--device_batch_sizes", "1"])["dtype"]
        == "float16"
    )
    apple = plan.main(["memory", *TINY, "--gpu", "Apple M2", "--device_batch_sizes", "1"])
    assert apple["dtype"] == "float32" and not apple["compiled"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_holds_what_was_predicted(compiled):
    c = config(sequence_len=1024, vocab_size=16_384, n_layer=6, n_head=6, n_kv_head=6, n_embd=768)
    how = {"compiled": compiled, "device_type": "cuda", "dtype": "bfloat16"}
    if compiled and compiler_missing(torch.device("cuda")):
        pytest.skip("no Triton")
    margin = memory.calibrate(c, 4, 1024, "bfloat16", compiled)
    assert margin is not None and margin.context > 1e8 and 0 <= margin.fragmentation < 0.5
    spec = {
        "config": vars(c),
        "rows": 16,
        "accumulation": 2,
        "seconds": 0.0,
        **how,
    }
    point, counted = (
        machine.in_process(spec),
        memory.predict(c, 16, 1024, **how, margin=margin),
    )
    assert counted["allocated"] == pytest.approx(point["peak_memory_bytes"], rel=0.1)
    assert counted["total"] == pytest.approx(point["card_bytes"], rel=0.1)
