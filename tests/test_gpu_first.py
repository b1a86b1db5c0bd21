"""
bench/gpu_first.py on a CPU in the card's place: every part of it runs, what fails is told, and the
golden losses of a card are those of this code.
"""

import functools
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

from bench import decode, gpu_first
from nanochat.base.common import UserError
from nanochat.base.runtime import Runtime
from nanochat.train import compiler

PLACE = gpu_first.Place(Runtime(torch.device("cpu"), torch.float32, 0, 1, 42), True)


def first(folder, *words):
    return gpu_first.main(["--device=cpu", "--tiny", f"--out={folder}", *words])


# Parts that train whole runs, compile for long, or collect tests
SLOW = {"tests", "finetuning", "float16", "golden"}
OTHERS = set(gpu_first.PARTS) - SLOW - {"card"}


class Here:
    """In place of a process of its own: a part's work is done in this one, which has torch."""

    def __init__(self, target, args):
        self.target, self.args = target, args

    def start(self):
        kept, threads = {fd: os.dup(fd) for fd in (1, 2)}, torch.get_num_threads()
        try:
            self.target(*self.args)
        finally:
            torch.set_num_threads(threads)
            torch.compiler.set_stance("default")
            for fd, copy in kept.items():  # which the part sends to its log
                os.dup2(copy, fd)
                os.close(copy)

    def join(self, limit=None):
        pass

    def is_alive(self):
        return False

    def kill(self):
        pass


@pytest.mark.parametrize(
    ("parts", "here"),
    [
        pytest.param({"card"}, False, id="in a process"),
        pytest.param(OTHERS, True, id="here"),
        pytest.param(SLOW, False, id="slow", marks=pytest.mark.slow),
    ],
)
def test_every_part_runs_on_a_cpu(parts, here, tmp_path, monkeypatch, capsys):
    if here:
        monkeypatch.setattr(gpu_first, "_context", lambda: SimpleNamespace(Process=Here))
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))  # and back, after the parts
        monkeypatch.setenv("TORCH_WARM_POOL", "0")
        monkeypatch.setattr(compiler, "_try_vector_instructions", lambda: None)
        monkeypatch.setattr(decode, "read_bandwidth", functools.cache(decode.read_bandwidth))
    reports = first(tmp_path, "--parts", *sorted(parts))
    said = capsys.readouterr().out
    failed = [(p, c) for p, r in reports.items() for c, ok in r["checks"].items() if not ok]
    assert failed == [], said
    assert set(reports) == parts and "0 failed" in said
    for name, report in reports.items():
        assert json.loads((tmp_path / f"{name}.json").read_text()) == report
        assert report["card"] and report["seconds_in_all"] >= 0
    if "train" in parts:
        assert reports["train"]["d12"]["tok_per_sec"] > 0
        assert reports["train"]["d12"]["ms_by_kind"]["products"] > 0


def _late(place):
    time.sleep(60)


def _broken(place):
    raise RuntimeError("a part that breaks")


def _wrong(place):
    return {"checks": {"two is three": False}}


def test_a_part_that_is_late_or_breaks_fails_and_the_others_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_first, "_context", lambda: gpu_first.multiprocessing.get_context("fork")
    )
    parts = {"late": (_late, 0.1), "broken": (_broken, 20), "wrong": (_wrong, 20)}
    monkeypatch.setattr(gpu_first, "PARTS", parts)
    reports = first(tmp_path)
    assert [list(r["checks"].values()) for r in reports.values()] == [[False]] * 3
    assert "3 failed" in capsys.readouterr().out
    assert "a part that breaks" in (tmp_path / "broken.error").read_text()
    with pytest.raises(SystemExit) as e:
        monkeypatch.setattr("sys.argv", ["x", "--device=cpu", "--tiny", f"--out={tmp_path}"])
        gpu_first.command()
    assert e.value.code == 1
    reports = first(tmp_path, "--minutes=0")
    assert reports["late"]["checks"] == {"was started": False}
    for name, report in reports.items():  # not what an earlier run left
        assert json.loads((tmp_path / f"{name}.json").read_text()) == report


def test_an_interrupted_run_shows_what_it_has(tmp_path, monkeypatch, capsys):
    def interrupted(context, name, *rest):
        if name == "golden":
            raise KeyboardInterrupt
        return {"checks": {"it works": True}}

    monkeypatch.setattr(gpu_first, "_attempt", interrupted)
    (tmp_path / "train.json").write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        first(tmp_path)
    assert "2 checks passed, 0 failed" in capsys.readouterr().out
    assert not (tmp_path / "train.json").exists()


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="no part 'speed'"):
        first(tmp_path, "--parts", "speed")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            gpu_first.main([])


@pytest.mark.parametrize("kind", gpu_first.GOLDEN_KINDS)
def test_a_changed_loss_is_noticed(kind, monkeypatch):
    """The tolerance is far below what a mistake in the model does to the losses."""
    got = gpu_first.golden_losses(kind, PLACE.runtime, compiled=False)
    want = json.loads(gpu_first.GOLDEN.read_text())
    others = [x for name, x in want.items() if name != f"{kind}, float32" and "float32" in name]
    assert got == pytest.approx(want[f"{kind}, float32"], rel=gpu_first.TOLERANCE["float32"])
    for other in others:
        assert got != pytest.approx(other, rel=gpu_first.TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", gpu_first.GOLDEN_KINDS)
def test_compiled_training_has_the_golden_losses(kind):
    got = gpu_first.golden_losses(kind, PLACE.runtime, compiled=True)
    torch.compiler.reset()
    want = json.loads(gpu_first.GOLDEN.read_text())[f"{kind}, float32"]
    assert got == pytest.approx(want, rel=gpu_first.TOLERANCE["float32"])


def test_kernels_are_told_apart_by_their_names():
    names = {
        "flash_fwd_kernel<...>": "attention",
        "fmha_cutlassF_f32_aligned_64x64_rf_sm80": "attention",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": "products",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
        "triton_red_fused__log_softmax_0": "loss",
        "Memcpy DtoD (Device -> Device)": "copies",
        "triton_per_fused_mean_pow_rsqrt_1": "reductions",
        "triton_poi_fused_relu_square_2": "elementwise",
        "something_else": "other",
    }
    assert {name: gpu_first.kind_of_work(name) for name in names} == names


def test_the_chosen_kernels_are_those_of_the_call():
    cases = gpu_first.backend_cases(PLACE)
    assert set(cases) == {f"float{n}, {h}" for n in (16, 32) for h in ("own keys", "grouped")}
    assert all(len(used) == 1 for used in cases.values())
    assert os.access(gpu_first.ROOT / "bench" / "gpu_first.sh", os.X_OK)
