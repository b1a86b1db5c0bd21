"""The probe and the model of speed: points are predicted, running out of memory is a result, stored points stay."""

import json
import re
import subprocess
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.base import knobs
from nanochat.base.common import UserError
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.plan import machine, measure, memory, probe, shapes, speed
from nanochat.plan.machine import Machine
from nanochat.plan.speed import tokens_per_second

HERE = {
    "name": "Some CPU",
    "device_type": "cpu",
    "dtype": "float32",
    "memory_bytes": 8 * 2**30,
    "peak_flops": 1e12,
}


def config(depth: int, T: int = 512) -> GPTConfig:
    return GPTConfig(
        n_layer=depth,
        n_embd=64 * depth,
        n_head=depth,
        n_kv_head=depth,
        vocab_size=4096,
        sequence_len=T,
    )


def point(
    depth: int,
    rows: int,
    T: int = 512,
    a: float = 1e-3,
    b: float = 2e-10,
    c: float = 5.0,
    d: float = 1e-6,
    n: int = 4,
) -> dict:
    """A point of a machine that takes a + b f ms a token and c + d P ms an update."""
    f, p = shapes.flops_per_token(config(depth, T)), shapes.counts(config(depth, T))["total"]
    micro, update = (a + b * f) * rows * T, c + d * p
    step = n * micro + update
    return {
        "name": "Some CPU",
        "dtype": "float32",
        "compiled": True,
        "config": asdict(config(depth, T)),
        "rows": rows,
        "accumulation": n,
        "step_ms": step,
        "tok_per_sec": 1e3 * n * rows * T / step,
        "first_step_s": 20.0,
        "peak_memory_bytes": 1e9,
        "flops_per_token": f,
        "parameters": p,
    }


@settings(max_examples=30, deadline=None)
@given(
    a=st.floats(0, 5e-3),
    b=st.floats(1e-11, 1e-9),
    c=st.floats(0.1, 5),
    d=st.floats(0, 1e-7),
    depth=st.integers(2, 8),
)
def test_a_machine_of_this_kind_is_found_again(a, b, c, d, depth):
    law = {"a": a, "b": b, "c": c, "d": d}
    target = Machine(
        **HERE, points=tuple(point(n, rows, **law) for n in (2, 4, 8) for rows in (8, 32))
    )
    true = point(depth, 16, **law)
    got = tokens_per_second(config(depth), 16, 512, 4 * 16 * 512, target)
    assert got.tok_per_sec == pytest.approx(true["tok_per_sec"], rel=0.15)
    assert got.lo < true["tok_per_sec"] < got.hi


def test_points_of_one_size_do_not_promise_that_a_smaller_one_is_faster_by_its_flops():
    target = Machine(**HERE, points=(point(4, 8), point(4, 32)))
    at, smaller = (
        tokens_per_second(config(depth), 8, 512, 4 * 8 * 512, target).tok_per_sec
        for depth in (4, 1)
    )
    by_flops = shapes.flops_per_token(config(4), 512) / shapes.flops_per_token(config(1), 512)
    assert 1.4 * at < smaller < 0.65 * by_flops * at


def test_an_odd_point_is_believed_where_it_is_and_doubted_elsewhere():
    points = [point(n, 8) for n in (2, 4, 8)]
    points[1] = {**points[1], "tok_per_sec": points[1]["tok_per_sec"] / 1.6}
    target = Machine(**HERE, points=tuple(points))
    at = tokens_per_second(config(4), 8, 512, 4 * 8 * 512, target)
    assert at.tok_per_sec == pytest.approx(points[1]["tok_per_sec"], rel=0.02)
    away = tokens_per_second(config(6), 8, 512, 4 * 8 * 512, target)
    assert away.hi / away.lo > 1.15 * at.hi / at.lo


def test_points_of_a_busy_machine_do_not_promise_that_large_models_are_fast():
    """Measured beside other programs: the largest of three sizes seemed the fastest per FLOP."""
    rates = {2: 900, 3: 1350, 4: 1340}
    points = tuple({**point(n, 8), "tok_per_sec": rate} for n, rate in rates.items())
    target = Machine(**HERE, points=points)
    c = shapes.SizeKnobs(depth=24, vocab=32_768, sequence_len=512).config()
    reached = max(p["tok_per_sec"] * p["flops_per_token"] for p in points)
    rate = tokens_per_second(c, 1, 512, 1 << 14, target)
    assert rate.tok_per_sec * shapes.flops_per_token(c, 512) < 2.01 * reached


def test_points_without_the_parts_that_look_back_count_for_models_with_them():
    parts = {"copy_heads": 1, "convolutions": True, "value_embeddings": True}
    plain, looking = config(4), replace(config(4), **parts)
    without = tuple(point(n, 8) for n in (2, 4, 8))
    target = Machine(**HERE, points=without)
    slower, usual = (tokens_per_second(c, 8, 512, 1 << 14, target) for c in (looking, plain))
    assert slower.tok_per_sec / usual.tok_per_sec == pytest.approx(speed.LOOKBACK, rel=0.02)
    with_them = tuple({**p, "config": {**p["config"], **parts}} for p in without)
    target = Machine(**HERE, points=with_them)
    faster = tokens_per_second(plain, 8, 512, 1 << 14, target)
    assert faster.tok_per_sec / usual.tok_per_sec == pytest.approx(1 / speed.LOOKBACK, rel=0.02)


def test_a_machine_that_drifts_is_trusted_less():
    points = tuple(point(n, 8) for n in (2, 4, 8))
    calm, warm = (
        Machine(**HERE, points=tuple({**p, "drift": drift} for p in points)) for drift in (0.0, 0.1)
    )
    a, b = (tokens_per_second(config(4), 8, 512, 4 * 8 * 512, m) for m in (calm, warm))
    assert (
        a.tok_per_sec == b.tok_per_sec
        and b.lo < 0.9 * b.tok_per_sec < a.lo < a.hi < 1.1 * b.tok_per_sec < b.hi
    )


def test_without_points_a_share_of_the_peak():
    target = Machine(**HERE)
    got = tokens_per_second(config(4), 8, 512, 1 << 14, target)
    share, lo, hi = speed.SHARES["cpu"]
    assert got.tok_per_sec * shapes.flops_per_token(config(4), 512) == pytest.approx(share * 1e12)
    assert got.lo / got.tok_per_sec == pytest.approx(
        lo / share
    ) and got.hi / got.tok_per_sec == pytest.approx(hi / share)


# What owners report (card, model, rows x context, tokens per second); the vocabularies are guesses.
PUBLIC = [
    ("rtx3090", {"depth": 12, "vocab": 32_768}, 16, 40_000),
    ("rtx4070", {"depth": 12, "vocab": 32_768}, 8, 55_700),
    ("rtx4070", {"depth": 16, "vocab": 32_768}, 8, 19_000),
    (
        "rtx4090",
        {"depth": 12, "vocab": 50_304, "tie_embeddings": True, "sequence_len": 1024},
        16,
        130_000,
    ),
    (
        "rtx4090",
        {"depth": 12, "vocab": 50_304, "tie_embeddings": True, "sequence_len": 1024},
        16,
        140_000,
    ),
]


@pytest.mark.parametrize(("card", "size", "rows", "reported"), PUBLIC)
def test_the_roofline_holds_what_owners_report(card, size, rows, reported):
    c, target = shapes.SizeKnobs(**size).config(), machine.of_card(card)
    T = c.sequence_len
    rate = tokens_per_second(c, rows, T, 1 << 17, target)
    assert rate.lo < reported < rate.hi, rate
    assert rate.hi < 2.4 * rate.lo, "and the interval says something"
    parts = speed.roofline(c, rows, T, 1 << 17, target)
    assert min(parts.values()) > 0
    assert max(parts, key=lambda name: parts[name]) == "products"


def test_the_memory_that_an_owner_reports_is_enough():
    """9.4 GB on an RTX 4070, with a block that keeps about twice as much as ours does."""
    c = shapes.SizeKnobs(depth=12, vocab=32_768).config()
    needed = memory.predict(c, 8, machine.of_card("rtx4070"), True)["total"]
    assert 0.6 * 9.4e9 < needed < 9.4e9


def test_launches_bound_a_narrow_model():
    target = machine.of_card("H100 SXM")
    narrow, wide = (shapes.SizeKnobs(depth=d, vocab=4096).config() for d in (2, 16))
    parts = [speed.roofline(c, 1, 512, 4096, target) for c in (narrow, wide)]
    assert speed.step_seconds(parts[0]) == parts[0]["launches"]
    parts = speed.roofline(wide, 16, 2048, 1 << 19, target)
    assert speed.step_seconds(parts) > 5 * parts["launches"]


def test_cards_that_train_together_share_a_step():
    c, card = shapes.SizeKnobs(depth=12).config(), machine.of_card("H100 SXM")
    one = tokens_per_second(c, 32, 2048, 1 << 16, card)
    eight = tokens_per_second(c, 32, 2048, 1 << 19, replace(card, gpus=8))
    assert eight.tok_per_sec == pytest.approx(8 * one.tok_per_sec)


def test_a_measured_point():
    spec = {
        "config": asdict(
            GPTConfig(n_layer=1, n_embd=32, n_head=2, n_kv_head=2, vocab_size=64, sequence_len=16)
        ),
        "rows": 2,
    }
    result = measure.measure_training(
        {
            **spec,
            "accumulation": 3,
            "compiled": False,
            "device_type": "cpu",
            "dtype": "float32",
            "seconds": 0,
        }
    )
    assert result["tok_per_sec"] == pytest.approx(3 * 2 * 16 / result["step_ms"] * 1e3)
    assert result["peak_memory_bytes"] > 1e6 and result["first_step_s"] > 0


def test_memory_that_runs_out_is_a_result(monkeypatch):
    def build(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "build", build)
    spec = {
        "config": asdict(config(2)),
        "rows": 2,
        "accumulation": 1,
        "compiled": False,
        "device_type": "cpu",
        "dtype": "float32",
    }
    assert measure.measure_training({**spec, "seconds": 0}) == {"error": "out of memory"}


@pytest.mark.parametrize(
    ("done", "error"),
    [
        (SimpleNamespace(returncode=-9, stdout="", stderr=""), "out of memory"),
        (
            SimpleNamespace(returncode=2, stdout="", stderr="notice: x\nerror: dtype is 'int3'\n"),
            "dtype is 'int3'",
        ),
        (SimpleNamespace(returncode=-11, stdout="", stderr=""), "ended with status -11"),
    ],
)
def test_how_a_process_ended(monkeypatch, done, error):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    assert machine.in_process({}) == {"error": error}


def test_a_process_that_takes_too_long(monkeypatch):
    def late(*args, **kwargs):
        raise subprocess.TimeoutExpired("x", 60)

    monkeypatch.setattr(subprocess, "run", late)
    assert machine.in_process({}) == {"error": "not finished after 15m00s"}


def test_a_process_of_its_own():
    result = machine.in_process({"device_type": "cpu", "dtype": "float32"})
    assert (
        result["device_type"] == "cpu"
        and result["peak_flops"] > 1e9
        and result["memory_bytes"] > 2**28
    )


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """
    A machine that measures by formula, a tenth slower the second time, and runs out of memory at 32 rows from depth 6 on; the list of what
    it was asked to measure.
    """
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    asked = []

    def measured(spec):
        if "config" not in spec:
            return dict(HERE)
        what = (spec["config"]["n_layer"], spec["config"]["sequence_len"], spec["rows"])
        warm = 1.1 if what in asked else 1.0
        asked.append(what)
        if spec["config"]["n_layer"] >= 6 and spec["rows"] >= 32:
            return {"error": "out of memory"}
        slow = {"a": warm * 1e-3, "b": warm * 2e-10, "c": warm * 5.0, "d": warm * 1e-6}
        made = point(
            spec["config"]["n_layer"],
            spec["rows"],
            spec["config"]["sequence_len"],
            n=spec["accumulation"],
            **slow,
        )
        same = ("name", "dtype", "compiled", "config", "rows", "accumulation")
        return {n: made[n] for n in made if n not in same}

    monkeypatch.setattr(machine, "in_process", measured)
    return asked


def probed(*words: str) -> dict:
    return probe.run(knobs.parse(probe.ProbeKnobs, words, command="plan probe")[0])


def test_an_error_may_hold_what_separates_columns(lab, monkeypatch, capsys):
    whole = machine.in_process

    def broken(spec):
        deep = spec.get("config", {"n_layer": 0})["n_layer"] == 6
        return {"error": "failed at [1|2|3]"} if deep else whole(spec)

    monkeypatch.setattr(machine, "in_process", broken)
    probed("--depths", "4", "6", "--device_batches", "8", "--vocab=4096", "--minutes=20")
    assert "failed at [1|2|3]" in capsys.readouterr().out


def test_a_grid(lab, tmp_path, capsys):
    words = [
        "--depths",
        "4",
        "6",
        "--device_batches",
        "8",
        "32",
        "64",
        "--vocab=4096",
        "--minutes=20",
        "--total_batch_size=65536",
    ]
    result = probed(*words)
    first = [(4, 512, 8), (6, 512, 8), (4, 512, 32), (6, 512, 32), (4, 512, 64)]
    assert lab[:5] == first, "64 rows need not be tried where 32 do not fit"
    assert sorted(lab[5:]) == sorted(set(first) - {(6, 512, 32)}), (
        "and once more what fitted, when the machine is warm"
    )
    assert [p.get("error") for p in result["points"]] == [
        None,
        None,
        None,
        "out of memory",
        None,
        "out of memory",
    ]
    assert [p["accumulation"] for p in result["points"][::2]] == [16, 4, 2]
    good = result["points"][0]
    assert good["drift"] == pytest.approx(0.1) and good["step_ms"] == pytest.approx(
        1.1 * point(4, 8, n=16)["step_ms"]
    )
    assert "out of memory" in capsys.readouterr().out
    stored = machine.load(tmp_path / "plan" / "probe.json")
    assert stored.peak_flops == 1e12 and len(stored.points) == 4

    lab.clear()  # the same again costs nothing, more costs what is new
    assert probed(*words)["points"] == result["points"] and lab == []
    probed(*words, "--depths", "4", "5", "--device_batches", "8")
    assert lab == [(5, 512, 8), (5, 512, 32), (5, 512, 64)] * 2
    assert len(machine.load(tmp_path / "plan" / "probe.json").points) == 7


@pytest.mark.parametrize(("threads", "valid"), [(2, True), (16, False), (None, True)])
def test_a_probe_counts_on_as_many_threads_and_hides_nothing(
    lab, tmp_path, monkeypatch, threads, valid
):
    """That of an earlier version does not say its threads, and counts."""
    words = ["--depths=4", "--device_batches=8", "--vocab=4096", "--minutes=20"]
    words += ["--total_batch_size=65536", "--compile=off"]
    monkeypatch.setitem(HERE, "threads", threads or 0)
    probed(*words)
    file = tmp_path / "plan" / "probe.json"
    if threads is None:
        file.write_text(re.sub(r',\s*"threads": 0', "", file.read_text()))
    now = {"threads": 2, "compiler": False}
    for name, value in now.items():
        monkeypatch.setitem(HERE, name, value)
    here = machine.here("auto", "auto")
    assert {name: getattr(here, name) for name in now} == now and bool(here.points) == valid
    lab.clear()
    probed(*words)
    assert bool(lab) != valid
    assert len(machine.load(file).points) == 1, "those of other threads do not count"


def test_the_points_of_a_mac_are_not_those_of_its_cpu(lab, monkeypatch):
    probed("--depths=4", "--device_batches=8", "--vocab=4096", "--minutes=20")
    monkeypatch.setitem(HERE, "device_type", "mps")
    assert not machine.here("auto", "auto").points


def test_the_grid_follows_the_budget(lab):
    small, large = (
        probed("--vocab=4096", "--device_batches=8", f"--hours={h}") for h in (0.05, 50)
    )
    depths = [[p["config"]["n_layer"] for p in result["points"]] for result in (small, large)]
    assert all(len(set(d)) >= 3 for d in depths) and max(depths[0]) < max(depths[1])
    assert small["points"][0]["accumulation"] <= large["points"][0]["accumulation"]


def test_time_for_the_grid_is_limited(lab, monkeypatch, capsys):
    clock = iter(np.arange(0, 1e4, 40.0))
    monkeypatch.setattr(probe.time, "monotonic", lambda: float(next(clock)))
    result = probed(
        "--depths", "2", "3", "4", "5", "--device_batches", "8", "--vocab=4096", "--limit_minutes=2"
    )
    assert (
        len(result["points"]) == 2
        and result["left_out"] == 2
        and "not measured for lack of time: 2" in capsys.readouterr().out
    )


def test_two_budgets_contradict(lab):
    with pytest.raises(UserError, match="--hours=2 and --minutes=5 set two budgets: give only one"):
        probed("--hours=2", "--minutes=5")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "make one with nanochat plan probe"),
        ("{}", "is no file of plan probe"),
        ("[1", "is no file of plan probe"),
        (
            json.dumps({"machine": {"name": "x", "dtype": "y"}, "points": []}),
            "is no file of plan probe",
        ),
    ],
)
def test_a_file_that_is_no_probe(tmp_path, text, says):
    if text is not None:
        (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=says):
        machine.load(tmp_path / "p.json")
