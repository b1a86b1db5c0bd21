"""The pilot: curves with a known truth are extrapolated within their interval, and a recipe is tried, corrected and judged."""

import json
import math

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.base import knobs, logbook
from nanochat.base.common import UserError
from nanochat.commands import base_train
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.plan import day, extrapolate, law, memory, pilot, recipe
from nanochat.plan.choice import Candidate
from nanochat.plan.machine import GIB, Machine
from nanochat.plan.shapes import layer_parameters
from nanochat.plan.speed import Speed

PRIOR = {"share": 0.5, "power": 0.29}


def ends(
    share: float, power: float, noise: float = 0.0, runs: int = 3, seed: int = 0
) -> tuple[list, list, np.random.Generator]:
    """Decayed ends of runs of 1, 2, 4 M tokens of a curve that is 2 at the longest."""
    rng = np.random.default_rng(seed)
    d = [1e6 * 2**i for i in range(runs)]
    return (
        d,
        [truth(share, power, t / d[-1]) * math.exp(noise * rng.standard_normal()) for t in d],
        rng,
    )


def truth(share: float, power: float, times: float) -> float:
    return 2 * (share + (1 - share) * times**-power)


@settings(max_examples=15, deadline=None)
@given(
    share=st.floats(0.3, 0.7),
    power=st.floats(0.18, 0.42),
    times=st.floats(4, 25),
    runs=st.integers(2, 4),
)
def test_the_interval_holds_the_truth(share, power, times, runs):
    d, y, _ = ends(share, power, runs=runs)
    fit = extrapolate.fit_curve(d, y, times * d[-1], **PRIOR)
    assert fit.lo < truth(share, power, times) < fit.hi and fit.lo < fit.bpb < fit.hi
    for at, value in ((d[-1], y[-1]), (times * d[-1], fit.bpb)):
        fitted = fit.level * (fit.share + (1 - fit.share) * (at / fit.tokens) ** -fit.power)
        assert fitted == pytest.approx(value, rel=0.01)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        share, power, times = (
            rng.uniform(0.3, 0.7),
            math.exp(rng.normal(math.log(0.29), 0.3)),
            rng.uniform(6, 20),
        )
        d, y, noise_rng = ends(share, power, noise=extrapolate.NOISE, seed=seed)
        fit = extrapolate.fit_curve(d, y, times * d[-1], **PRIOR)
        hits += (
            fit.lo
            < truth(share, power, times) * math.exp(extrapolate.NOISE * noise_rng.standard_normal())
            < fit.hi
        )
    assert hits >= 165, f"{hits} of 200 for an interval of 90 %"


def test_farther_is_less_certain():
    d, y, _ = ends(0.5, 0.29)
    widths = [
        fit.hi / fit.lo
        for fit in (extrapolate.fit_curve(d, y, t * d[-1], **PRIOR) for t in (2, 10, 100))
    ]
    assert widths == sorted(widths) and 1.01 < widths[0] < 1.05 < widths[2]


def test_ends_that_scatter_widen_it():
    d, y, _ = ends(0.5, 0.29, runs=4)
    odd = [y[0], y[1] * 1.06, y[2] * 0.95, y[3]]
    calm, wild = (extrapolate.fit_curve(d, v, 1e8, **PRIOR) for v in (y, odd))
    assert wild.hi - wild.lo > 2 * (calm.hi - calm.lo)


@pytest.mark.parametrize("y", [[2.0, 2.1], [2.0, 2.0], [2.0, float("nan")]])
def test_runs_that_do_not_learn(y):
    with pytest.raises(
        UserError,
        match=r"longer runs are not better .* give it more --minutes, or lower the learning rates",
    ):
        extrapolate.fit_curve([1e6, 2e6], y, 1e8, **PRIOR)


def planned(steps: int = 2000) -> Candidate:
    """A step takes half a second, and so does half an evaluation."""
    config, rate = GPTConfig(sequence_len=512), Speed(8192.0, 8000.0, 9000.0)
    return Candidate(config, ((0.0, 512),), 4096, 8, rate, 4096.0 * steps, 8192, (1.0, 0.9, 1.1))


def test_lengths_double_and_take_the_time():
    got = pilot.lengths(planned(), 7.0, 200.0, 3)
    assert got[1] == pytest.approx(2 * got[0], abs=1) and got[2] == pytest.approx(4 * got[0], abs=3)
    assert 0.5 * sum(got) + 3 * 7.0 == pytest.approx(200, abs=2)
    assert max(pilot.lengths(planned(steps=200), 7.0, 1e5, 3)) == 100, (
        "never more than half of the run itself"
    )


@pytest.mark.parametrize(
    ("result", "seconds", "says"),
    [
        (
            planned(),
            25.0,
            r"allows only runs of 7, 14 steps, too short to fit a curve: give at least --minutes=0.7$",
        ),
        (planned(steps=60), 60.0, "a run of 60 steps is too short for a pilot"),
    ],
)
def test_pilots_too_short(result, seconds, says):
    with pytest.raises(UserError, match=says):
        pilot.lengths(result, 7.0, seconds, 3)
    if "minutes" in says:
        short, long = (pilot.lengths(result, 7.0, s, 3) for s in (42.0, 79.0))
        assert (len(short), len(long)) == (2, 3) and min(short + long) >= pilot.FEWEST_STEPS


def test_the_target_is_judged():
    config = GPTConfig(n_layer=8, n_embd=512, n_head=8, n_kv_head=8)
    n = layer_parameters(config)
    d = 1e18 / 6 / n
    middle = law.Law().bpb(n, d)
    the_law = law.Law().moved(n, d, (middle, 0.98 * middle, 1.02 * middle))
    rate = Speed(1.0, 1.0, 1.0)
    c = Candidate(config, ((0.0, 512),), 4096, 8, rate, d, 8192, the_law.interval(n, d))
    assert "are within reach" in pilot.verdict(1.0, c, the_law)
    assert "are uncertain" in pilot.verdict(c.bpb[0], c, the_law)
    assert (
        "out of reach" in (output := pilot.verdict(0.8, c, the_law))
        and "times the budget would reach them" in output
    )
    assert "no budget within" in pilot.verdict(0.5, c, the_law)


@pytest.mark.parametrize("missing", ["recipe.toml", "recipe.json"])
def test_without_a_recipe(tmp_path, missing):
    (tmp_path / "recipe.toml").write_text("[base_train]\ndepth = 2\n")
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=r"make a recipe with nanochat plan recipe"):
        pilot.StoredPlan.read(str(tmp_path / "recipe.toml"))


def test_a_plan_of_another_version_is_refused(tmp_path):
    (tmp_path / "recipe.toml").write_text("[base_train]\ndepth = 2\n")
    (tmp_path / "recipe.json").write_text('{"primary": {}}')
    with pytest.raises(UserError, match=r"not written by plan recipe.*run plan recipe again"):
        pilot.StoredPlan.read(str(tmp_path / "recipe.toml"))


def test_a_recipe_is_tried_and_corrected(tmp_path, monkeypatch, capsys):
    """All of it, with base_train in this process, steps of milliseconds, and memory by formula."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(
        memory,
        "predict",
        lambda config, rows, T, **more: {
            **dict.fromkeys(("weights", "gradients", "optimizer", "allocated"), 0),
            "total": 10**8 + 4 * rows * T,
        },
    )
    flags = tiny.workplace(tmp_path)
    mine = Machine("Toy", "cpu", "float32", 4 * GIB, 2e9, source="the test")
    monkeypatch.setattr(day, "planned_machine", lambda knobs: mine)
    words = [
        f
        for f in flags
        if f.startswith(
            ("--data", "--depth", "--model_dim", "--head_dim", "--kv_ratio", "--sequence_len")
        )
    ]
    ask = [
        *words,
        "--minutes=5",
        "--total_batch_size=1024",
        "--device_batch_size=16",
        "--model_tag=t",
    ]
    recipe.run(knobs.parse(recipe.RecipeKnobs, ask, command="plan recipe")[0])
    file = tmp_path / "plan" / "recipe.toml"
    before = json.loads(file.with_suffix(".json").read_text())
    monkeypatch.setattr(pilot, "lengths", lambda *a: [16, 32, 64])
    calls = []

    def train(words, quiet):
        calls.append(words)
        base_train.main(
            [*words, "--device_type=cpu", "--dtype=float32", "--compile=off", "--eval_tokens=2000"]
        )

    monkeypatch.setattr(pilot, "train", train)
    result = pilot.run(
        knobs.parse(pilot.PilotKnobs, ["--target_bpb=0.01"], command="plan pilot")[0]
    )
    assert [r["steps"] for r in result["runs"]] == [16, 32, 64] and len(calls) == 3
    assert result["runs"][0]["final_bpb"] > result["runs"][2]["final_bpb"] > result["fit"]["bpb"]
    ratio = result["runs"][2]["tok_per_sec"] / before["primary"]["speed"][0]
    assert result["speed_ratio"] == pytest.approx(ratio)
    after = json.loads(file.with_suffix(".json").read_text())
    assert after["machine"]["factor"] == pytest.approx(ratio)
    assert after["primary"]["speed"][0] == pytest.approx(result["runs"][2]["tok_per_sec"], rel=0.01)
    curve = [result["fit"][name] for name in ("bpb", "lo", "hi")]
    assert after["primary"]["bpb"] == pytest.approx(curve, rel=0.01)
    assert after["primary"]["peak_memory_bytes"] == pytest.approx(result["memory_bytes"], rel=0.01)
    assert "out of reach" in result["target"] and not result["changed"]
    knobs.parse(base_train.PretrainKnobs, ["--recipe", str(file)], command="base_train")
    assert "the law said" in capsys.readouterr().out
    for directory in (tmp_path / "checkpoints" / "base").iterdir():
        assert checkpoint.list_checkpoints(directory) == [] and logbook.read(directory), (
            "the weights go, the figures stay"
        )

    mults = [
        [r["lr_mult"] for r in logbook.read(d) if r["kind"] == "train"]
        for d in sorted((tmp_path / "checkpoints" / "base").iterdir())
    ]
    assert all(m[0] == 1 and m[-1] < 0.2 for m in mults), "every run decays to its own end"
