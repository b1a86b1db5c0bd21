"""
compare: right statistics, honest verdicts, paired runs, and resuming after an interruption as if
there had been none.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from scipy import stats

from nanochat.base import files, hardware, logbook
from nanochat.base.common import UserError
from nanochat.base.logbook import Logbook
from nanochat.commands import base_train, compare
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import checkpoint
from nanochat.study import comparison
from nanochat.study.comparison import Comparison, Timing, train_rows
from nanochat.study.comparison_page import write_comparison
from nanochat.study.records import at_speed, training_clock
from nanochat.study.statistics import (
    MEASURES,
    analyse,
    crossing,
    holm,
    interval,
    ratio_interval,
)
from nanochat.train import stage
from nanochat.train.loop import Evaluation

# ---- statistics


def test_intervals_are_those_of_the_t_distribution():
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0 and found["lo"] == pytest.approx(
        2 - 4.302653 / math.sqrt(3), abs=1e-6
    )
    values = [0.3, -0.1, 0.4, 0.2, 0.05]
    ours, theirs = interval(values), stats.ttest_1samp(values, 0)
    assert (ours["lo"], ours["hi"]) == pytest.approx(
        tuple(theirs.confidence_interval(0.95))
    ) and ours["p"] == pytest.approx(theirs.pvalue)
    assert interval([0.7]) == {"n": 1, "mean": 0.7, "lo": None, "hi": None, "p": None}
    assert (
        interval([0.0, 0.0])["p"] == 1.0
        and interval([1.0, 1.0])["p"] == 0.0
        and interval([])["mean"] is None
    )


def test_intervals_cover_what_they_promise():
    draws = np.random.default_rng(0).normal(1.0, 2.0, (1500, 5))
    found = [interval(list(d)) for d in draws]
    assert 0.935 < np.mean([f["lo"] <= 1.0 <= f["hi"] for f in found]) < 0.965


def test_holm():
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_crossing_is_interpolated_on_the_logarithm_of_tokens():
    curve = [
        [0, 0, 0.0, 9.0],
        [1, 100, 5.0, 3.0],
        [10, 1000, 50.0, 2.0],
        [20, 2000, 100.0, 2.5],
        [40, 4000, 200.0, 1.0],
    ]
    steps, tokens, seconds, bound = crossing(curve, 2.5)
    assert tokens == pytest.approx(10**2.5) and bound == ""
    assert (steps, seconds) == pytest.approx((tokens / 100, tokens / 20))
    assert crossing(curve, 2.0) == (10, 1000, 50.0, "") and crossing(curve, 1.0).tokens == 4000
    assert crossing(curve, 0.5) == (40, 4000, 200.0, ">"), "never beyond the end of the curve"
    assert crossing(curve, 3.5) == (1, 100, 5.0, "<") and crossing(curve, 3.0).bound == ""


def test_savings_and_what_is_known_when_a_target_is_missed():
    saved = ratio_interval([(0.5, ""), (0.5, "")], -1)
    assert saved["mean"] == pytest.approx(50) and (saved["lo"], saved["hi"]) == pytest.approx(
        (50, 50)
    )
    assert ratio_interval([(2.0, ""), (0.5, "")], -1)["mean"] == pytest.approx(0), (
        "twice as slow and twice as fast cancel"
    )
    wide = ratio_interval([(0.8, ""), (0.9, ""), (0.7, "")], -1)
    assert wide["lo"] < wide["mean"] < wide["hi"] < 100
    missed = ratio_interval([(1.0, ">"), (0.8, "")], -1)
    assert (
        missed["mean"] is None
        and missed["censored"] == 1
        and missed["at_most"] == pytest.approx(100 * (1 - math.sqrt(0.8)))
    )
    assert ratio_interval([(0.6, "<")], -1)["at_least"] == pytest.approx(40)
    assert not {"at_most", "at_least"} & set(ratio_interval([(1.0, ">"), (1.0, "<")], -1))


def finished_run(condition, seed, bpb, step_ms=100.0, speed=1.0):
    """
    A finished run of 40 steps of 1,000 tokens whose curve falls as 3 - log10(tokens) x 0.2, shifted
    to end at bpb.
    """
    at = lambda n: bpb + 0.2 * math.log10(40 / n) / speed  # noqa: E731
    curve = [[0, 0, 0.0, 9.0]] + [[n, 1000 * n, n * step_ms / 1e3, at(n)] for n in range(2, 41, 2)]
    size = {
        "steps": 40,
        "tokens": 40_000,
        "parameters": 1000,
        "flops_per_token": 6000.0,
        "peak_memory_bytes": 10**9,
        "wall_seconds": 9.0,
    }
    return {
        "condition": condition,
        "seed": seed,
        "final_bpb": bpb,
        "step_ms": step_ms,
        "seconds": 40 * step_ms / 1e3,
        "curve": curve,
        **size,
    }


def test_verdicts_follow_the_noise_of_the_seeds(tmp_path):
    noise = [0.0, 0.02, -0.03, 0.01]
    runs = [finished_run("none", s, 2.0 + e) for s, e in enumerate(noise)]
    runs += [
        finished_run("good", s, 1.9 + e + 0.001 * s, step_ms=110.0) for s, e in enumerate(noise)
    ]
    runs += [finished_run("noisy", s, 2.0 + e - 0.02 * (-1) ** s) for s, e in enumerate(noise)]
    runs += [finished_run("bad", s, 2.1 + e + 0.002 * s) for s, e in enumerate(noise)]
    flags = dict.fromkeys(("none", "good", "noisy", "bad"), "--x")
    good, noisy, bad = analyse(runs, flags)["pairs"]
    assert (
        good["final_bpb_delta"]["mean"] == pytest.approx(-0.0985)
        and good["final_bpb_delta"]["verdict"] == "better"
    )
    # seed 0: down by 0.1, and a decade of tokens is worth 0.2
    assert (
        60 < good["saved_tokens_pct"]["lo"] < 100 * (1 - 10**-0.5) + 1 < 70
        and good["saved_tokens_pct"]["verdict"] == "better"
    )
    assert good["saved_seconds_pct"]["mean"] == pytest.approx(
        100 - (100 - good["saved_tokens_pct"]["mean"]) * 1.1
    )
    assert (
        good["step_time_pct"]["mean"] == pytest.approx(10)
        and good["step_time_pct"]["verdict"] == "worse"
    )
    assert (
        noisy["final_bpb_delta"]["verdict"]
        == noisy["saved_tokens_pct"]["verdict"]
        == "no difference seen"
    )
    assert (
        noisy["step_time_pct"]["verdict"] == "no difference seen"
        and noisy["step_time_pct"]["mean"] == 0
    )
    assert bad["final_bpb_delta"]["verdict"] == "worse" and bad["saved_tokens_pct"]["hi"] < 0, (
        "a loser has a loss, not a blank"
    )
    assert good["final_bpb_delta"]["p_holm"] >= good["final_bpb_delta"]["p"]
    (one,) = analyse([r for r in runs if r["seed"] == 0], {"none": "", "good": ""})["pairs"]
    assert {one[m]["verdict"] for m in MEASURES} == {"one seed is not evidence"}
    far = analyse(runs, flags, target=1.0)
    assert "not met" in far["pairs"][0]["saved_tokens_pct"]["verdict"] and far["conditions"][0][
        "to_target"
    ] == {
        "tokens": None,
        "steps": None,
        "seconds": None,
        "reached": 0,
        "of": 4,
    }
    lost = [*runs[:7], {"condition": "good", "seed": 3, "error": "the loss is nan"}]
    (pair,) = analyse(lost, {"none": "", "good": ""})["pairs"]
    assert pair["n_seeds"] == 3 and "1 of its pairs" in pair["final_bpb_delta"]["verdict"], (
        "a run that failed is never left out"
    )
    for records, svgs in ((lost, 4), ([], 0)):
        results = analyse(records, flags)
        page = write_comparison("x <b>", results, records, tmp_path / "page.html").read_text()
        assert (
            "x &lt;b&gt;" in page
            and page.count("<svg") == svgs
            and ("seed 3: the loss is nan" in page) == bool(svgs)
        )
        assert json.dumps(results, allow_nan=False)


def test_training_seconds_leave_out_first_steps_and_everything_between(tmp_path):
    with Logbook(tmp_path, config={}, step=0) as book:
        for step, spent in enumerate([7.0, 7.5, 8.0, 8.5], 1):
            book.log(
                step=step, tokens=100 * step, seconds=100.0 * step, tok_per_sec=100 * step / spent
            )
    with Logbook(tmp_path, config={}, step=3) as book:  # killed, then resumed from step 3
        for step, spent in enumerate([4.0, 4.6], 4):
            book.log(
                step=step, tokens=100 * step, seconds=999.0, tok_per_sec=100 * (step - 3) / spent
            )
    seconds, usual = training_clock(logbook.read(tmp_path))
    assert usual == pytest.approx(0.5) and seconds == pytest.approx(
        {0: 0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 2.6}
    )


# ---- running


@pytest.fixture
def here(tmp_path, monkeypatch):
    """
    The flags of a small base_train, with runs inside this process instead of in their own: torch
    takes seconds to import.
    """
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    flags = [
        f for f in tiny.workplace(tmp_path) if not f.startswith(("--model_tag", "--sample_every"))
    ]

    def inside(args, env, **_):
        with monkeypatch.context() as m:
            m.setenv("NANOCHAT_BASE_DIR", env["NANOCHAT_BASE_DIR"])
            base_train.main(args[args.index("nanochat.commands.base_train") + 1 :])
        return SimpleNamespace(returncode=0, poll=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", inside)
    monkeypatch.setattr(hardware, "measured_peak", lambda *_: 1e11)
    written = lambda name, *rest: rest[-1].write_text(name)  # noqa: E731
    monkeypatch.setattr(comparison, "write_comparison", written)
    monkeypatch.setattr(stage, "sample_evaluation", lambda *_: Evaluation("sample", 0, dict))
    return shlex.join([*flags, "--num_iterations=8", "--total_batch_size=256", "--compile=off"])


def words(common, *more):
    flags = [
        "--name=x",
        f"--common={common}",
        "--a",
        "",
        "--b",
        "--activation=silu",
        "--names",
        "relu2",
        "silu",
    ]
    return [*flags, "--seeds=2", "--points=4", *more]


def without_time(folder):
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    return {
        (r["condition"], r["seed"]): (
            [(step, tokens, bpb) for step, tokens, _, bpb in r["curve"]],
            r["final_bpb"],
        )
        for r in runs
    }


def test_an_interrupted_comparison_resumes_to_the_same_results(here, tmp_path, monkeypatch, capsys):
    compare.main(words(here))
    folder = tmp_path / "compare" / "x"
    whole = without_time(folder)
    assert list(whole) == [("relu2", 42), ("silu", 42), ("silu", 43), ("relu2", 43)], (
        "in turns first"
    )
    assert [step for step, *_ in whole["relu2", 42][0]] == [0, 2, 4, 6, 8]
    out = capsys.readouterr().out
    assert "silu against relu2, 2 paired seeds:" in out and str(folder / "report.html") in out
    results = json.loads((folder / "results.json").read_text())
    assert results["runs_finished"] == 4 and results["pairs"][0]["saved_tokens_pct"]["n"] == 2
    assert (folder / "report.html").read_text() == "x"
    assert not list(folder.rglob("*.safetensors")) and len(list(folder.rglob("metrics.jsonl"))) == 4
    assert not (tmp_path / "checkpoints").exists(), "the models of the user are left alone"
    folder.rename(tmp_path / "whole")

    save, saves = checkpoint.save, []

    def interrupting(directory, step, *rest):
        saves.append(step)
        if len(saves) == 8:
            signal.raise_signal(signal.SIGINT)
        return save(directory, step, *rest)

    monkeypatch.setattr(checkpoint, "save", interrupting)
    with pytest.raises(KeyboardInterrupt):
        compare.main(words(here))
    assert list(without_time(folder)) == [("relu2", 42)] and list(folder.rglob("*.safetensors"))
    compare.main(words(here, "--keep"))
    assert without_time(folder) == whole
    assert len(list(folder.rglob("model.safetensors"))) >= 3, "--keep keeps"
    compare.main(words(here))
    assert "4 runs, 4 finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"silu of .* was started with .* another --name"):
        compare.main([*words(here)[:4], "--b=--activation=gelu", *words(here)[6:]])


def test_equal_conditions_differ_by_exactly_nothing(here, tmp_path):
    same = ["--name=same", f"--common={here}", "--b=", "--names", "one", "two", "--points=4"]
    (pair,) = compare.main([*same, "--seeds=2"])["pairs"]
    for measure in ("final_bpb_delta", "saved_tokens_pct"):
        found = pair[measure]
        assert (found["mean"], found["lo"], found["hi"], found["p"]) == (0, 0, 0, 1) and found[
            "verdict"
        ] == "no difference seen"
    grown = compare.main([*same, "--seeds=3"])
    assert grown["pairs"][0]["n_seeds"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--b=--activation=sliu"], r"condition activation-sliu \(--b\): .*one of relu2"),
        (["--b", "--actvation=silu"], "did you mean --activation"),
        (["--b=--model_dim=33"], "not a multiple of head_dim"),
        (["--b=--seed=1"], "--seed is set by the comparison: use --first_seed"),
        (["--b=--target_flops=1e9"], "two lengths for one run"),
        (["--b=--data=own=/nowhere"], "/nowhere"),
        (["--b=--eval_every=0"], "no learning curve"),
        (["--b=--rap=/nowhere.safetensors"], "/nowhere.safetensors"),
        (["--b='"], "closing quotation"),
        (["--b=", "--names", "one"], "1 names .* for 2 conditions"),
        (["--b=", "--names", "one", "../two"], "cannot be a folder name"),
        (["--b=", "--target=soon"], "--target must be auto or a number"),
        ([], "at least two conditions"),
    ],
)
def test_misuse_is_reported_before_anything_runs(here, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        compare.main([f"--common={here}", *words])
    assert not (tmp_path / "compare").exists()


def test_a_run_that_fails_is_a_result_and_one_that_cannot_start_ends_it(
    here, tmp_path, monkeypatch
):
    inside = subprocess.Popen

    def failing(args, env, stdout, **_):
        if "--model_tag=silu-s43" not in args:
            return inside(args, env)
        stdout.write(b"error: the loss is nan at step 3\n")
        rows = Path(env["NANOCHAT_BASE_DIR"]) / "checkpoints" / "base" / "silu-s43"
        if starts:
            Logbook(rows).log(step=3, loss=1.0)
            (rows / "step_000002").mkdir()
        return SimpleNamespace(returncode=2, poll=lambda: 2)

    monkeypatch.setattr(subprocess, "Popen", failing)
    starts = False
    with pytest.raises(UserError, match="silu-s43 did not start: the loss is nan"):
        compare.main(words(here))
    starts = True
    results = compare.main(words(here))
    assert results["conditions"][1]["failed"] == {"43": "the loss is nan at step 3"}
    assert results["pairs"][0]["final_bpb_delta"]["verdict"] == "1 of its pairs of runs failed"
    assert not [*(tmp_path / "compare" / "x").rglob("step_*")], "nothing will continue it"


def test_a_resume_that_is_refused_is_no_result(here, tmp_path, monkeypatch):
    inside, refuses = subprocess.Popen, [True]
    run = tmp_path / "compare" / "x" / "checkpoints" / "base" / "silu-s42"
    with Logbook(run, step=0) as book:  # of a start that was interrupted
        book.log(step=3, loss=1.0)

    def refusing(args, env, stdout, **_):
        if not refuses or "--model_tag=silu-s42" not in args:
            return inside(args, env)
        stdout.write(b"error: cannot resume, because the data changed\n")
        return SimpleNamespace(returncode=2, poll=lambda: 2)

    monkeypatch.setattr(subprocess, "Popen", refusing)
    with pytest.raises(UserError, match="silu-s42 did not start: cannot resume"):
        compare.main(words(here, "--seeds=1"))
    refuses.clear()
    assert not compare.main(words(here, "--seeds=1"))["conditions"][1]["failed"]


def test_runs_with_another_tokenizer_or_text_are_not_mixed(here, tmp_path):
    compare.main(words(here, "--seeds=1"))
    text, file = tmp_path / "text.jsonl", tmp_path / "compare" / "x" / "runs.jsonl"
    before = text.read_text()
    text.write_text(f'{before}\n{{"text": "One line more."}}')
    with pytest.raises(UserError, match=r"the text of silu is not the one that .* have read"):
        compare.main(words(here))
    text.write_text(before)
    Tokenizer.train(["Other words, of quite another text."], 300).save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"the tokenizer \w{8}, but .* rename that folder to"):
        compare.main(words(here))
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(run.pop("tokenizer") and run.pop("data") for run in runs)
    file.write_text("".join(json.dumps(run) + "\n" for run in runs))  # as of an earlier version
    assert compare.main(words(here, "--seeds=1"))["runs_finished"] == 2


@pytest.mark.parametrize("fault", ["free some space; nothing is lost", "out of memory: choose"])
def test_what_the_machine_lacked_is_tried_again(here, tmp_path, monkeypatch, fault):
    inside, failing = subprocess.Popen, [True]

    def starting(args, env, stdout, **_):
        if not failing or "--model_tag=silu-s43" not in args:
            return inside(args, env)
        failing.clear()
        stdout.write(f"error: {fault}\n".encode())
        rows = Path(env["NANOCHAT_BASE_DIR"]) / "checkpoints" / "base" / "silu-s43"
        Logbook(rows).log(step=3, loss=1.0)
        return SimpleNamespace(returncode=2, poll=lambda: 2)

    monkeypatch.setattr(subprocess, "Popen", starting)
    first = compare.main(words(here))
    assert fault.split(":")[0] in first["conditions"][1]["failed"]["43"]
    again = compare.main(words(here))
    assert not again["conditions"][1].get("failed")


def test_a_failure_is_that_of_the_last_start(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: the disk is full\n")
    began = log.stat().st_size
    assert comparison._failure(log, 2) == "the disk is full"
    assert comparison._failure(log, -9, began) == "ended by signal 9 (out of memory?)"


def test_conditions_with_a_budget_of_time_differ_in_their_flags_alone(here, tmp_path, capsys):
    common = f"{here.replace('--num_iterations=8', '')} --max_minutes=5"
    told = ["--seeds=1", "--dry_run"]
    monkeyed = [f"--common={common}", "--a", "", "--b=--convolutions", *told]
    compare.main(monkeyed)
    shown = [line for line in capsys.readouterr().out.splitlines() if "--lookback=off" in line]
    assert len(shown) == 2 and "--convolutions" in shown[1] and "--data" in shown[0]


def test_a_name_that_no_folder_can_have_is_refused(here):
    flags = [
        f"--{c}=--mlp_ratio={i + 2} --softcap={i + 3} --rope_base={i + 500}"
        for i, c in enumerate("abcdefgh")
    ]
    with pytest.raises(UserError, match="too long for a folder together: give it one with --name"):
        compare.main([f"--common={here}", *flags])


def test_only_one_process_compares(here, tmp_path):
    with (
        files.locked(tmp_path / "compare" / "x" / "lock"),
        pytest.raises(UserError, match="being compared by another process"),
    ):
        compare.main(words(here))


def test_a_dry_run_leaves_nothing(here, tmp_path, monkeypatch, capsys):
    inside = subprocess.Popen
    ended = {"poll": lambda: 0, "kill": lambda: None, "wait": lambda: None, "returncode": 0}
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: inside(*a, **k) and SimpleNamespace(**ended)
    )
    monkeypatch.setattr(
        comparison,
        "first_rows",
        lambda *_: {"launch": 0.0, "start": 1.0, "eval": 3.0, "train": 4.0},
    )
    monkeypatch.setattr(comparison, "record", lambda _: {"step_ms": 250.0})
    estimate = compare.main(
        words(here, "--dry_run")
    )  # a run: 1 s to start, five evaluations of 2 s, a first step of 1 s, eight of 0.25 s
    assert estimate == {"runs": 4, "seconds": 4 * (1 + 5 * 2 + 1 + 8 * 0.25)}
    assert (
        "2 runs of about" in capsys.readouterr().out and not (tmp_path / "compare" / "x").exists()
    )


def test_each_seed_is_timed_again_in_its_own_rounds(here, tmp_path, monkeypatch):
    compare.main(words(here))
    before = without_time(tmp_path / "compare" / "x")
    calls = []

    def time_steps(self, condition, seed, steps):
        calls.append((condition.name, seed))
        return Timing(0.0, 100.0 + (condition.name == "silu") * 20 + (seed - 42) * 40 + len(calls))

    monkeypatch.setattr(Comparison, "time_steps", time_steps)
    results = compare.main(words(here, "--retime=2"))
    turns = ["relu2", "silu", "silu", "relu2", "silu", "relu2", "relu2", "silu"]
    assert [name for name, _ in calls] == turns, "turns alternate within a seed and between seeds"
    assert [seed for _, seed in calls] == [42] * 4 + [43] * 4
    runs = [
        json.loads(line)
        for line in (tmp_path / "compare" / "x" / "runs.jsonl").read_text().splitlines()
    ]
    assert {(r["condition"], r["seed"]): r["step_ms"] for r in runs} == {
        ("relu2", 42): 102.5,
        ("silu", 42): 122.5,
        ("silu", 43): 166.5,
        ("relu2", 43): 146.5,
    }, "the median of the seed's rounds"
    assert all(r["curve"][-1][2] == r["seconds"] for r in runs)
    slow = {"step_ms": 200.0, "seconds": 4.0, "curve": [[0, 0, 0.0, 8.0], [20, 100, 4.0, 2.0]]}
    quick = {"step_ms": 50.0, "seconds": 1.0, "curve": [[0, 0, 0.0, 8.0], [20, 100, 1.0, 2.0]]}
    assert at_speed(slow, 50.0) == {"retimed": True, **quick}
    assert results["pairs"][0]["step_time_pct"]["mean"] == pytest.approx(
        100 * (math.sqrt(122.5 / 102.5 * 166.5 / 146.5) - 1)
    )
    assert without_time(tmp_path / "compare" / "x") == before
    with pytest.raises(UserError, match="does not work with --max_minutes"):
        compare.main(
            words(here.replace("--num_iterations=8", "--max_minutes=1"), "--retime=2", "--name=y")
        )


def test_a_budget_of_time_does_not_pay_for_what_only_the_first_run_compiles(
    here, tmp_path, monkeypatch
):
    order, inside, time_steps = [], subprocess.Popen, Comparison.time_steps
    pins = {"dtype": "float32", "compile": "off"}
    ended = {"poll": lambda: 0, "kill": lambda: None, "wait": lambda: None, "returncode": 0}
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: inside(*a, **k) and SimpleNamespace(**ended)
    )

    def trial(self, condition, *rest):
        order.append((f"trial {condition.name}", time_steps(self, condition, *rest).run_seconds))

    def train(self, condition, seed, *_):
        order.append(condition.name)
        return {**finished_run(condition.name, seed, 2.0), "pins": pins}

    monkeypatch.setattr(Comparison, "time_steps", trial)
    monkeypatch.setattr(Comparison, "train", train)
    timed = here.replace("--num_iterations=8", "--max_minutes=0.02")
    compare.main(words(timed.replace("--compile=off", "--compile=auto")))
    seconds = pytest.approx(1.2)
    assert order == [
        ("trial relu2", seconds),
        "relu2",
        ("trial silu", seconds),
        "silu",
        "silu",
        "relu2",
    ]
    order.clear()
    compare.main(words(timed, "--name=y"))
    compare.main(words(here.replace("--compile=off", "--compile=on"), "--name=z"))
    assert order == ["relu2", "silu", "silu", "relu2"] * 2, (
        "no trial where nothing is compiled or the number of steps is given"
    )


@pytest.mark.slow
def test_the_command_is_killed_and_resumes(tmp_path):
    """The real thing: runs in their own processes, SIGTERM to the command in the middle of one."""
    flags = [
        f for f in tiny.workplace(tmp_path) if not f.startswith(("--model_tag", "--sample_every"))
    ]
    root = str(Path(compare.__file__).parents[2])
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PYTHONPATH": root}
    command = [
        sys.executable,
        "-m",
        "scripts.compare",
        *words(shlex.join([*flags, "--num_iterations=60"])),
    ]
    assert (
        "about"
        in subprocess.run(
            [*command, "--dry_run"], env=env, capture_output=True, text=True, check=True
        ).stdout
    )
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    folder = tmp_path / "compare" / "x"
    second = folder / "checkpoints" / "base" / "silu-s42"
    while len(train_rows(second)) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(300) == 130 and list(without_time(folder)) == [("relu2", 42)]
    subprocess.run(command, env=env, check=True)
    assert len(without_time(folder)) == 4
    assert (second / "metrics.jsonl").read_text().count('{"kind": "start"') == 2
