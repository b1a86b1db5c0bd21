"""
plan memory: the bytes that are counted are those that the allocator hands out in a real run, as the
profiler sees it; ranks, batches and parts behave; what does not fit is marked and refused.
"""

import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanochat.base.common import UserError
from nanochat.base.hardware import lookup
from nanochat.base.runtime import Runtime, compiler_missing
from nanochat.commands import plan
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.plan import machine, measure, memory, shapes
from nanochat.train.knobs import TrainKnobs
from nanochat.train.run import make_optimizer

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
CARD = {"device_type": "cuda", "compiled": True}
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
    how = {"compiled": False, "device_type": "cpu", "gpus": 1, **how}
    compiled = how.pop("compiled")
    target = machine.Machine("x", dtype=NAMES[dtype], memory_bytes=1e12, peak_flops=1e12, **how)
    return memory.predict(replace(c, sequence_len=T), rows, target, compiled)


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

    def step(ids: torch.Tensor, rows: int) -> None:
        optimizer.zero_grad()
        parts = ids.split(rows)
        for idx, targets in zip(parts[::2], parts[1::2], strict=True):
            (model.loss(idx, targets) / targets.numel()).backward()
        optimizer.step()

    if compiled:
        step(ids, rows)
    else:  # two short rows make the optimizer's state as well
        step(ids[:2, :16], 1)
    optimizer.zero_grad()
    held = [
        *model.parameters(),
        model.cos,
        model.sin,
        ids,
        *(t for g in optimizer.groups for s in g.state.values() for t in s.values()),
    ]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step(ids, rows)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak + sum(t.untyped_storage().nbytes() for t in held)


LOOKS_BACK = {"convolutions": True, "copy_heads": 1, "value_embeddings": True}


@pytest.mark.parametrize(
    ("knobs", "dtype"),
    [
        ({}, FP32),
        (LOOKS_BACK, FP32),
        ({}, BF16),
        ({"n_kv_head": 1}, BF16),
        ({"tie_embeddings": True}, BF16),
        ({"activation": "swiglu", "mlp_ratio": 2.5}, BF16),
        ({"window_pattern": "SL", "softcap": 0.0}, BF16),
        (LOOKS_BACK, BF16),
    ],
    ids=str,
)
def test_a_step_holds_what_was_predicted(knobs, dtype):
    c = config(n_layer=2, **knobs)
    peak = counted(c, 8, 128, dtype)["allocated"]
    assert peak == pytest.approx(measured(c, 8, dtype), rel=0.1)


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
    moments = sizes["muon"] + 2 * sizes["adamw"]  # one moment, and two
    assert parts["state"] == 2 * sum(sizes.values()) + moments, "weights and gradients"


def test_ranks_share_the_optimizers_state_and_nothing_else():
    c = config()
    one, four = (counted(c, 2, 128, BF16, **CARD, gpus=n) for n in (1, 4))
    moments = one["state"] - 8 * shapes.counts(c)["total"]
    assert four["state"] == one["state"] - 3 / 4 * moments and moments > 0
    assert all(one[n] == four[n] for n in ("activations", "loss", "update"))


def test_parts_and_total():
    c = config()
    p = counted(c, 4, 128, BF16, **CARD)
    assert p["total"] > p["allocated"] + 1.9e9, "a CUDA context and a compiler are never free"
    assert p["state"] + p["activations"] < p["allocated"] == p["total"] - p["beside"]


def test_what_a_probe_measured_above_the_count_is_added():
    c = config()
    target = machine.of_card("rtx3060")
    point = {"config": vars(c), "compiled": True, "peak_memory_bytes": 1e9}
    sizes = {16: 5e9, 4: 3e9}
    points = tuple({**point, "rows": rows, "card_bytes": size} for rows, size in sizes.items())
    measured = memory.calibrated(replace(target, points=points), True)
    totals = [memory.predict(c, rows, measured, True)["total"] for rows in (4, 8, 16)]
    assert totals[::2] == pytest.approx([3e9, 5e9], rel=1e-6)
    assert 3e9 < totals[1] < 5e9, "what lies between is interpolated"
    assert memory.calibrated(measured, True) == measured
    assert memory.calibrated(target, True).gaps == ()
    known = replace(measured, memory_gap=7e9)
    assert memory.predict(c, 4, known, True)["beside"] > 7e9, "a pilot knows better"
    eager = {**points[0], "compiled": False}
    both = replace(target, points=(*points, eager))
    assert memory.calibrated(both, False).points == (eager,)
    assert memory.calibrated(both, True) == measured
    assert memory.calibrated(measured, False).points == points, "better than none"


def test_a_run_on_a_cpu_takes_more_than_its_steps():
    c = config()
    cpu = machine.Machine("CPU", "cpu", "float32", 2**34, 1e12)
    point = {"config": vars(c), "rows": 4, "compiled": True, "peak_memory_bytes": 1e9}
    measured = memory.calibrated(replace(cpu, points=(point,)), True)
    total = memory.predict(c, 4, measured, True)["total"]
    assert total == pytest.approx(1e9 + memory.RUN, rel=1e-6)


def test_rows_are_halved_until_they_fit():
    c, target = config(n_layer=8, n_embd=512), replace(machine.of_card("rtx3060"), memory_bytes=3e9)
    rows = memory.fitting_rows(c, 512, target, True)
    few, more = (memory.predict(c, n, target, True)["total"] for n in (rows, 2 * rows))
    assert few <= memory.USABLE * 3e9 < more
    assert memory.fitting_rows(c, 512, replace(target, memory_bytes=1e9), True) == 1


def test_activations_grow_with_rows_and_the_logits_are_never_whole():
    c = config(vocab_size=24_576, sequence_len=2048, n_layer=4, n_head=8, n_kv_head=8, n_embd=512)
    few, many = (counted(c, rows, 2048, BF16, **CARD) for rows in (24, 48))
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
        "16",
        "4",
        "1",
        "--memory_gb",
        "2.0",
    ]
    out = plan.main(words)
    output = capsys.readouterr().out
    assert [r["rows"] for r in out["grid"]] == [1, 4, 16]
    assert (
        out["machine"]["name"] == "RTX 3060"
        and out["machine"]["dtype"] == "bfloat16"
        and out["compiled"]
        and all(r["fits"] for r in out["grid"])
    )
    assert output.count("| fits") == 3
    totals = [r["total"] for r in out["grid"]]
    limit = (totals[1] + totals[2]) / 2 / 2**30
    some = plan.main([*words[:-1], str(limit), "--json"])
    assert [r["fits"] for r in some["grid"]] == [t <= limit * 2**30 for t in totals] and not some[
        "grid"
    ][-1]["fits"]
    assert json.loads(capsys.readouterr().out)["grid"] == some["grid"]


def test_this_machine_is_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    fields = {"name": "CPU", "device_type": "cpu", "memory_bytes": 2**32, "peak_flops": 1e12}
    monkeypatch.setattr(machine, "in_process", lambda spec: {**fields, "dtype": spec["dtype"]})
    out = plan.main(["memory", *TINY, "--device_batch_sizes", "1", "--dtype", "float32"])
    assert out["machine"]["memory_bytes"] == 2**32 and out["machine"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--gpu", "rtx3060", "--memory_gb", "1"],
            r"nothing fits RTX 3060: 2 rows of 128 take 1.9 GB of 1.0; choose a smaller --depth",
        ),
        (["--gpu", "rtx30600"], "there is no GPU 'rtx30600'"),
        (["--gpu", "rtx3060", "--device_batch_sizes", "0"], r"must be at least 1 \(got 0\)"),
    ],
)
def test_bad_input(words, says):
    with pytest.raises(UserError, match=says):
        plan.main(["memory", *TINY, "--device_batch_sizes", "2", *words])


def test_an_older_card_computes_in_float16_and_apples_have_no_compiler(capsys):
    assert (
        plan.main(["memory", *TINY, "--gpu", "T4", "--device_batch_sizes", "1"])["machine"]["dtype"]
        == "float16"
    )
    apple = plan.main(["memory", *TINY, "--gpu", "Apple M2", "--device_batch_sizes", "1"])
    assert apple["machine"]["dtype"] == "float32" and not apple["compiled"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_holds_what_was_predicted(compiled):
    c = config(sequence_len=1024, vocab_size=16_384, n_layer=6, n_head=6, n_kv_head=6, n_embd=768)
    if compiled and compiler_missing(torch.device("cuda")):
        pytest.skip("no Triton")
    device = measure.measure_device("cuda", "bfloat16")
    spec = {"config": vars(c), "accumulation": 2, "seconds": 0.0, "compiled": compiled}
    spec |= {"device_type": "cuda", "dtype": "bfloat16"}
    small, large = (spec | {"rows": n} | machine.in_process(spec | {"rows": n}) for n in (4, 16))
    target = memory.calibrated(machine.Machine(**device, points=(small,)), compiled)
    predicted = memory.predict(c, 16, target, compiled)
    assert predicted["allocated"] == pytest.approx(large["peak_memory_bytes"], rel=0.1)
    assert predicted["total"] == pytest.approx(large["card_bytes"], rel=0.1)
