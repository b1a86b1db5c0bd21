"""
When runs end, and where learning rate and context are then: time budgets on a clock that the test
moves, and the other horizons.
"""

import math
import os
import signal
import time
from functools import partial

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import PLAIN, fit, rows

from nanochat.base import hardware
from nanochat.base.common import UserError
from nanochat.commands import base_train
from nanochat.data.contexts import Contexts
from nanochat.data.feed import Batch, RowFeed
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.study import report
from nanochat.train import loop, stage
from nanochat.train.loop import Evaluation, Interrupted
from nanochat.train.optim import MuonAdamW
from nanochat.train.schedule import Schedule


class Clock:
    """Time that passes only where a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class TimedFeed(tiny.ListFeed):
    """An endless feed whose steps take the time given, and compute nothing if they are empty."""

    def __init__(self, clock: Clock, seconds, empty: bool = False):
        batch = tiny.batch(rows=2)
        if empty:
            batch = Batch(batch.inputs, torch.full_like(batch.targets, -1))
        super().__init__([batch] * 10_000)
        self.clock, self.seconds = clock, seconds

    progress = 0.0

    def __next__(self):
        self.clock.now += self.seconds(self.step)
        return super().__next__()


@pytest.mark.parametrize(
    ("pace", "look", "slack"),
    [
        (lambda i: 1.0, 0.0, 1.0),
        (lambda i: 7.0, 0.0, 7.0),  # slow: a dozen steps in all
        (lambda i: 30.0 if i == 0 else 1.0, 0.0, 1.0),  # the first step compiles
        (lambda i: 0.5 + i % 3, 4.0, 2.5),  # uneven, with evaluations for which time is kept
        (lambda i: 500.0, 0.0, 500.0),  # one step overruns everything
    ],
)
def test_a_budget_of_time(tmp_path, pace, look, slack):
    clock = Clock()

    def probe():
        clock.now += look
        return {"val_bpb": 1.0}

    feed = TimedFeed(clock, pace)
    probes = [Evaluation("eval", 0.25, probe, start=True)] if look else []
    _, run, _ = fit(
        tmp_path, None, feed, Schedule(decay=0.4), probes, clock=clock, budget_seconds=100.0
    )
    mults = [r["lr_mult"] for r in rows(tmp_path)]
    assert mults[0] == 1.0 and mults == sorted(mults, reverse=True)
    assert clock.now - 1000 <= 100 + slack + 1e-6, "at most one step over the deadline"
    assert clock.now - 1000 >= 100 - slack - 1e-6 or look
    assert run.seconds == pytest.approx(clock.now - 1000)
    if slack < 10:
        assert 40 <= len([m for m in mults if m == 1.0]) / len(mults) * 100 <= 80, "a plateau"
        assert mults[-1] <= (slack / 100) / 0.4 + 0.05, "the floor is reached at the deadline"
    assert rows(tmp_path)[-1]["progress"] == 1.0


def test_time_spent_is_kept_over_a_resume_and_the_rate_does_not_jump(tmp_path):
    clock = Clock()

    def probe():
        clock.now += 10
        return {"val_bpb": 1.0}

    class Stopping(TimedFeed):
        def __next__(self):
            if self.step == 45:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    probes = [Evaluation("eval", 0.3, probe, start=True)]
    with pytest.raises(Interrupted):
        fit(
            tmp_path,
            None,
            Stopping(clock, lambda i: 1.0),
            Schedule(decay=0.5),
            probes,
            clock=clock,
            budget_seconds=100.0,
        )
    before = rows(tmp_path)[-1]
    run = tiny.resumed(
        tmp_path,
        tiny.model(),
        TimedFeed(clock, lambda i: 1.0),
        schedule=Schedule(decay=0.5),
        evaluations=probes,
        clock=clock,
        budget_seconds=100.0,
    )
    assert run.seconds == pytest.approx(before["seconds"])
    clock.now += 1e6  # the machine was off
    run.fit()
    after = [r for r in rows(tmp_path) if r["step"] > before["step"]]
    step = 1 / (100 - run.reserve)
    assert after[0]["progress"] == pytest.approx(before["progress"] + step, abs=1e-3)
    assert before["lr_mult"] - after[0]["lr_mult"] <= 2 * step / 0.5
    assert run.seconds <= 101


def test_a_slow_evaluation_hides_no_other(tmp_path):
    """Shares of a budget of time: time that one evaluation takes still counts for the others."""
    clock = Clock()

    def slow():
        clock.now += 9
        return {"n": 1}

    feed = TimedFeed(clock, lambda i: 1.0)
    quick = Evaluation("quick", 0.48, lambda: {"n": 1})
    fit(
        tmp_path,
        None,
        feed,
        PLAIN,
        [Evaluation("slow", 0.45, slow), quick],
        clock=clock,
        budget_seconds=109.0,
    )
    progress = {r["step"]: r["progress"] for r in rows(tmp_path)}
    looks = [r["step"] for r in rows(tmp_path, "quick")]
    assert looks[0] == 0, (
        "under a budget everything is looked at once first, so that its time is known"
    )
    assert progress[looks[1]] == pytest.approx(0.55, abs=0.011)


speeds = st.floats(0.5, 12.0)
costs = st.floats(0, 12.0)


PLAINLY = {
    "slow": 1.0,
    "quick": 1.0,
    "at": 0,
    "evaluation": 0.0,
    "sample": 0.0,
    "saving": 0.0,
    "every": 0.5,
    "seldom": 0,
}


@settings(max_examples=15, deadline=None)
@example(
    **{**PLAINLY, "evaluation": 10.0, "every": 7}
)  # one is due when there is only time for the last
@example(**{**PLAINLY, "sample": 9.0, "seldom": 1000})  # not seen before the end
@example(
    **{**PLAINLY, "evaluation": 4.0, "sample": 9.0, "seldom": 0.48}
)  # never due together before the end
@given(
    slow=speeds,
    quick=speeds,
    at=st.integers(0, 40),
    evaluation=costs,
    sample=costs,
    saving=costs,
    every=st.sampled_from([0.1, 0.33, 0.5, 7]),
    seldom=st.sampled_from([0, 0.48, 0.99, 1000]),
)
def test_the_deadline_holds(
    tmp_path_factory, slow, quick, at, evaluation, sample, saving, every, seldom
):
    """
    Whatever the speed, even if it changes, and whatever is due when: at most a step and a save too
    late, and never early. The rate plateaus, falls, and is at its floor when the run ends.
    """
    path, clock, budget = tmp_path_factory.mktemp("run"), Clock(), 100.0
    save = checkpoint.save

    def takes(seconds, then):
        def act(*args):
            clock.now += seconds
            return then(*args)

        return act

    probes = [
        Evaluation("eval", every, takes(evaluation, lambda: {"val_bpb": 1.0}), start=True),
        Evaluation("sample", seldom, takes(sample, dict)),
    ]
    feed = TimedFeed(clock, lambda i: slow if i < at else quick, empty=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", takes(saving, save))
        try:
            _, run, _ = fit(
                path,
                None,
                feed,
                Schedule(decay=0.4),
                probes,
                clock=clock,
                budget_seconds=budget,
                save_every=0.3,
            )
        except UserError as e:
            assert 2 * (
                evaluation + sample + saving
            ) >= budget - 1e-6 and "too short for one step" in str(e)
            return
    longest = max(slow, quick) if 0 < at < run.step else quick if at == 0 else slow
    over = clock.now - 1000 - budget
    assert -saving - 1e-6 <= over <= longest + saving + 1e-6
    assert run.seconds == pytest.approx(clock.now - 1000)
    mults, left = [r["lr_mult"] for r in rows(path)], budget - run.reserve
    assert mults == sorted(mults, reverse=True) and all(0 <= m <= 1 for m in mults)
    assert mults[-1] <= (longest + evaluation + sample + 2 * saving) / left / 0.4 + 1e-6
    if longest < 0.2 * left and evaluation + sample + saving < 0.2 * left:
        assert mults[0] == 1.0 and mults[-1] < 1.0


def test_a_budget_that_holds_no_step(tmp_path):
    clock = Clock()

    def probe():
        clock.now += 60
        return {"val_bpb": 1.0}

    feed = TimedFeed(clock, lambda i: 1.0)
    with pytest.raises(
        UserError,
        match=r"a budget of 100 s is too short for one step: 60 s passed before .*, and 60 s are reserved .*minutes=4",
    ):
        fit(
            tmp_path,
            None,
            feed,
            PLAIN,
            [Evaluation("eval", 0.1, probe, start=True)],
            clock=clock,
            budget_seconds=100.0,
        )
    assert feed.step == 0


# ---- the whole command, under every horizon


STAGES = Contexts(((0.0, 8), (0.5, 16), (0.8, 32)))
TOKENS = 1024


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    stages = ["--context_stages", "8@0", "16@0.5", "32@0.8"]
    with pytest.MonkeyPatch.context() as patch:
        # By the clocks of these tests, runs are long enough for a page of curves
        patch.setattr(report, "LEAST_SECONDS", math.inf)
        yield base, [*tiny.workplace(base), *stages, "--compile=off"]


def horizons() -> dict[str, tuple[list[str], int | None]]:
    """Flags of four runs -> the steps that they should take, None where the clock decides."""
    m = GPT.build(
        GPTConfig(
            sequence_len=32,
            vocab_size=Tokenizer.load().vocab_size,
            n_layer=2,
            n_embd=32,
            n_head=4,
            n_kv_head=2,
        ),
        "meta",
    )
    flops = 0.5 * m.flops_per_token(8) + 0.3 * m.flops_per_token(16) + 0.2 * m.flops_per_token(32)
    return {
        "steps": (["--num_iterations=20"], 20),
        "flops": ([f"--target_flops={30 * TOKENS * flops}"], 30),
        "ratio": ([f"--target_param_data_ratio={25 * TOKENS / m.counts()['total']}"], 25),
        "slow": (["--max_minutes=2"], None),
        "fast": (["--max_hours=0.05"], None),
    }


@pytest.mark.parametrize(("minutes", "expected"), [(5, [5, 10, 12]), (0, [12])])
def test_save_minutes_are_minutes(place, monkeypatch, minutes, expected):
    """The command's steps take a minute each; the last one is saved in any case."""
    base, flags = place
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 1e12)
    clock, update = Clock(), MuonAdamW.step
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(stage, "Run", partial(loop.Run, clock=clock))

    def minute(optimizer, *rest):
        clock.now += 60
        return update(optimizer, *rest)

    monkeypatch.setattr(MuonAdamW, "step", minute)
    words = ["--num_iterations=12", "--eval_every=0", "--keep=20", f"--save_minutes={minutes}"]
    base_train.main([*flags, *words, f"--model_tag=every{minutes}"])
    stored = checkpoint.list_checkpoints(base / "checkpoints" / "base" / f"every{minutes}")
    assert sorted(c.step for c in stored if c.step) == expected
    assert not any(c.damage() for c in stored)


@pytest.mark.parametrize("name", ["steps", "flops", "ratio", "slow", "fast"])
def test_every_horizon_ends_where_it_should(place, monkeypatch, name):
    """Steps, rate and context stages under each horizon, interrupted late and resumed."""
    base, flags = place
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 1e12)
    horizon, steps = horizons()[name]
    clock, pace, looked = Clock(), {"slow": 6.0, "fast": 3.0}.get(name, 0.1), []
    monkeypatch.setattr(time, "monotonic", clock)  # so that opening takes no time
    monkeypatch.setattr(stage, "Run", partial(loop.Run, clock=clock))
    update, set_progress, evaluate = MuonAdamW.step, RowFeed.set_progress, stage.shard_bits_per_byte

    def slow_update(optimizer, *rest):
        # in the middle of the run the machine gets another job
        clock.now += pace * (1 + (optimizer.steps > 12))
        return update(optimizer, *rest)

    def interrupted_late(feed, progress):
        if interrupt and progress > 0.75:
            interrupt.pop()
            os.kill(os.getpid(), signal.SIGTERM)
        return set_progress(feed, progress)

    def slow_evaluation(model, *rest):
        clock.now += 2.0
        looked.append(model.config.sequence_len)
        return evaluate(model, *rest)

    monkeypatch.setattr(MuonAdamW, "step", slow_update)
    monkeypatch.setattr(RowFeed, "set_progress", interrupted_late)
    monkeypatch.setattr(stage, "shard_bits_per_byte", slow_evaluation)
    flags, interrupt = [*flags, *horizon, f"--model_tag={name}", "--eval_every=0.3"], [True]
    with pytest.raises(KeyboardInterrupt):
        base_train.main(flags)
    clock.now += 1e6  # the machine was off
    base_train.main([*flags, "--resume=auto"])

    run = base / "checkpoints" / "base" / name
    train, meta = rows(run), checkpoint.newest(run).meta
    assert (
        meta["done"]
        and set(looked) == {32}
        and [r["step"] for r in train] == list(range(1, len(train) + 1))
    )
    assert all(r["tokens"] == TOKENS * r["step"] for r in train), "the batch in tokens is kept"
    before = [0.0, *(r["progress"] for r in train[:-1])]
    assert all(
        STAGES.at(b) <= r["context"] <= STAGES.at(r["progress"])
        for b, r in zip(before, train, strict=True)
    )
    assert {r["context"] for r in train} == {8, 16, 32}
    mults = [r["lr_mult"] for r in train]
    assert (
        mults[0] == 1.0
        and mults == sorted(mults, reverse=True)
        and 0.3 <= mults.count(1.0) / len(mults) <= 0.5
    )
    if steps:
        assert len(train) == steps and [r["context"] for r in train] == [
            STAGES.at(i / steps) for i in range(steps)
        ]
        assert mults[-1] == pytest.approx(0.05 + 0.95 / steps / 0.65)
    else:
        budget = {"slow": 120, "fast": 180}[name]
        assert budget - 1e-6 <= meta["seconds"] <= budget + 2 * pace
        assert mults[-1] <= 0.05 + 0.95 * 2 * pace / (budget - 2) / 0.65 + 1e-6


def test_a_later_stage_resumes_to_the_bit(place, monkeypatch):
    """Stopped in its second stage and in its third, a run ends with the weights of a whole one."""
    base, flags = place
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 1e12)
    lengths = ["--num_iterations=16", "--eval_every=5", "--resume=auto"]

    def run(tag, *stops):
        for stop in stops:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                tiny.act_in_step(patch, stop, lambda: os.kill(os.getpid(), signal.SIGINT))
                base_train.main([*flags, f"--model_tag={tag}", *lengths])
        base_train.main([*flags, f"--model_tag={tag}", *lengths])
        folder = base / "checkpoints" / "base" / tag
        m = checkpoint.newest(folder).weights
        return tiny.losses(folder), dict(m), [r["step"] for r in rows(folder, "eval")]

    (losses, weights, looks), (again, others, seen) = run("whole"), run("parts", 10, 14)
    assert losses == again and len(losses) == 16 and tiny.same(weights, others)
    assert looks == seen == [0, 5, 10, 15, 16], (
        "an evaluation that a signal came before is made up for"
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            ["--context_stages", "8@0", "16@0.5", "--num_iterations=2"],
            "the last context stage has 16 tokens, but --sequence_len is 32",
        ),
        (
            ["--context_stages", "12@0", "32@0.5", "--num_iterations=2"],
            "whole number of rows of 12 and of 32 tokens: try --total_batch_size=1056",
        ),
        (["--context_stages", "32@0", "8@0.5", "--num_iterations=2"], "32@0 8@0.5 are invalid"),
        (["--sequence_len=0"], "--sequence_len must be at least 1 (got 0)"),
        (["--num_iterations=0"], "--num_iterations must be positive, or -1 for none (got 0)"),
        (["--target_flops=nan"], "--target_flops must be positive, or -1 for none (got nan)"),
        (["--target_flops=1e6"], "less than one step of 1,024 tokens: give"),
        (["--target_param_data_ratio=0.001"], "less than one step of 1,024 tokens: give"),
        (["--max_minutes=1e-9"], "too short for one step: 1,024 tokens take"),
        (["--max_minutes=inf"], "must be at most"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_lengths_that_cannot_be(place, monkeypatch, wrong, says):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place[0]))
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 1e12)
    plain = place[1][: place[1].index("--context_stages")]
    with pytest.raises(UserError) as e:
        base_train.main([*plain, "--model_tag=wrong", *wrong])
    assert says in str(e.value) and "\n" not in str(e.value)
