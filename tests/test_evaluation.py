"""How much an evaluation reads: sizes that follow a budget, in time and in tokens."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_budget import Clock, TimedFeed
from tiny import PLAIN, fit, rows

from nanochat.commands import base_train
from nanochat.data.feed import RowFeed, eval_batches, micro_batch_rows
from nanochat.train import loop, spent, stage
from nanochat.train.evaluation import Evaluation, Size
from nanochat.train.scaling import (
    EVALUATING,
    evaluation_seconds,
    evaluation_tokens,
    evaluations_within,
)

ROOT = Path(__file__).resolve().parent.parent


def test_the_number_of_evaluations_follows_the_budget():
    assert [evaluations_within(60 * m) for m in (0.5, 4, 12, 30, 100, 1440)] == [2, 2, 3, 5, 10, 10]
    assert evaluations_within(0) == 10
    for seconds in (60, 240, 720, 86400):
        each = evaluation_seconds(seconds)
        assert each * (1 + evaluations_within(seconds)) == pytest.approx(EVALUATING * seconds)


@pytest.mark.parametrize("tokens", [1e5, 1e6, 1e7, 1e8, 1e11])
@pytest.mark.parametrize("sources", [1, 3])
def test_evaluation_tokens_take_a_small_share_of_a_run(tokens, sources):
    each = evaluation_tokens(tokens, sources)
    assert 4096 <= each <= 1 << 20 and each & (each - 1) == 0
    if each > 4096:
        assert 11 * sources * each / 2 <= EVALUATING * tokens


def measured(tmp_path, unit, budget=100.0, every=0.25, pace=lambda i: 1.0, seconds=2.0, save=0.0):
    """A run with an evaluation whose units take unit(clock) seconds: (its sizes, clock, run)."""
    clock, seen = Clock(), []
    size = Size(seconds, least=10, most=1000)

    def measure():
        seen.append(size.now)
        clock.now += size.now * unit(clock)
        return {"val_bpb": 1.0}

    feed = TimedFeed(clock, pace, empty=True)
    with pytest.MonkeyPatch.context() as patch:
        real = loop.checkpoint.save

        def saving(*args):
            clock.now += save
            return real(*args)

        patch.setattr(loop.checkpoint, "save", saving)
        _, run, _ = fit(
            tmp_path,
            None,
            feed,
            PLAIN,
            [Evaluation("eval", every, measure, start=True, size=size)],
            clock=clock,
            budget_seconds=budget,
        )
    return seen, clock, run


@pytest.mark.parametrize("unit", [0.001, 0.004, 0.05, 0.15])
def test_the_first_part_of_an_evaluation_sizes_it(tmp_path, unit):
    seen, clock, run = measured(tmp_path, lambda clock: unit)
    whole = min(1000, max(10, int(2 / unit) // 10 * 10))
    assert seen == [10, *[whole] * 5][whole == 10 :], "a part, then the start and every quarter"
    assert run.sizes == {"eval": whole} and run.spent["eval"] == pytest.approx(sum(seen) * unit)
    assert run.spent["eval"] <= max(0.11 * 100, 50 * unit + 1e-6)
    assert clock.now - 1000 <= 101


def test_a_machine_that_becomes_slower_reads_less(tmp_path):
    seen, clock, _ = measured(tmp_path, lambda clock: 0.004 if clock.now < 1040 else 0.02)
    assert seen[:3] == [10, 500, 500] and seen[-1] == 100, "one late one shows it, the next shrink"
    assert clock.now - 1000 <= 100 + 10.0
    assert rows(tmp_path)[-1]["progress"] == 1.0


@pytest.mark.parametrize(("save", "looks"), [(0.1, 5), (1.4, 3), (6.0, 2)])
def test_slow_saves_leave_fewer_evaluations(tmp_path, save, looks):
    measured(tmp_path, lambda clock: 0.001, save=save)
    assert len(rows(tmp_path, "eval")) == looks


@pytest.mark.parametrize(
    "pace",
    [
        lambda i: 1.0,
        lambda i: 0.5 if i < 60 else 1.5,  # a neighbour comes
        lambda i: 2.0 if i % 20 > 10 else 0.4,  # a neighbour comes and goes
    ],
)
@pytest.mark.parametrize("minutes", [2, 10])
def test_a_deadline_is_met_beside_a_busy_neighbour(tmp_path, pace, minutes):
    """Within 3 % or 5 seconds, whatever steps and evaluations take from then on."""
    budget, busy = 60.0 * minutes, 1000 + 20 * minutes

    def unit(clock):
        return 0.002 if clock.now < busy or pace(0) == pace(70) else 0.005

    _, clock, run = measured(
        tmp_path, unit, budget, 0.3, pace, evaluation_seconds(budget), save=0.2
    )
    assert abs(clock.now - 1000 - budget) <= max(5.0, 0.03 * budget)
    assert run.spent["steps"] + run.spent["batches"] >= 0.85 * budget


def test_sizes_and_seconds_spent_survive_a_resume(tmp_path):
    _, clock, run = measured(tmp_path, lambda clock: 0.004)
    again = tiny.resumed(tmp_path, tiny.model(), TimedFeed(clock, lambda i: 1.0))
    assert again.sizes == run.sizes == {"eval": 500}
    assert again.spent == pytest.approx(run.spent)
    (row,) = rows(tmp_path, "summary")
    assert sum(row["spent"].values()) == pytest.approx(run.seconds, abs=1.0)


def test_the_summary_says_where_the_time_went(tmp_path, capsys):
    measured(tmp_path, lambda clock: 0.004, save=0.5)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("  time: ") and "evaluation 10s (10%)" in line and "saving" in line
    parts = {"steps": 204.0, "eval": 9.0, "compiling": 12.0, "opening": 10.0, "sample": 0.05}
    assert spent.describe(parts, 240.0) == (
        "training steps 3m24s (85%), evaluation 9s (4%), compiling 12s (5%), opening 10s (4%), "
        "other 5s (2%)"
    )
    assert sum(spent.shares(parts, 240.0).values()) == pytest.approx(1.0)


# ---- whole commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    flags = [f for f in tiny.workplace(base) if not f.startswith(("--eval_tok", "--sample"))]
    return base, [*flags, "--compile=off"]


@pytest.mark.parametrize(
    ("given", "every", "tokens"),
    [
        (["--num_iterations=20"], 0.1, 4096),
        (["--num_iterations=400", "--total_batch_size=2048", "--max_minutes=0.02"], 0.5, 0),
        (["--max_minutes=0.02", "--eval_every=0.2"], 0.2, 0),
        (["--max_minutes=0.02", "--eval_tokens=3000"], 0.5, 3000),
        (["--num_iterations=4", "--eval_every=2", "--eval_tokens=512"], 2, 512),
    ],
)
def test_what_is_given_is_obeyed_and_the_rest_follows(place, monkeypatch, given, every, tokens):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place[0]))
    seen = []
    monkeypatch.setattr(
        loop.Run,
        "fit",
        lambda run: seen.append((run.meta["knobs"], run.evaluations)) or {"seconds": 0},
    )
    base_train.main([*place[1], *given])
    ((knobs, (evaluation, sample)),) = seen
    assert evaluation.every == knobs["eval_every"] == every and knobs["eval_tokens"] == tokens
    assert (evaluation.size is None) == bool(tokens)
    assert 0 < sample.every < 1


# ---- the shapes of training


@pytest.mark.parametrize(
    ("rows_of_step", "device_rows", "world_size", "expected"),
    [(8, 32, 1, 8), (48, 32, 1, 24), (50, 32, 2, 25), (3, 32, 4, 1), (70, 32, 1, 24)],
)
def test_the_rows_of_a_micro_batch(place, rows_of_step, device_rows, world_size, expected):
    each = [micro_batch_rows(rows_of_step, device_rows, r, world_size) for r in range(world_size)]
    assert max(each) == expected


def test_evaluation_runs_the_compiled_code_of_training(monkeypatch):
    """One compilation of a block and of the head serves training and evaluation."""
    from torch._dynamo.testing import CompileCounter

    from nanochat.model import loss

    counters = layers, head = CompileCounter(), CompileCounter()
    torch.compiler.reset()
    m = tiny.randomise(tiny.model(n_layer=2))
    for block in m.blocks:
        block.compile(dynamic=False, backend=layers)
    m.compiled = True
    both = torch.compile(loss._chunk_both, dynamic=False, backend=head)
    monkeypatch.setattr(loss, "_compiled", lambda: both)
    b = tiny.batch(ignored=0.3)
    m.loss(b.inputs, b.targets).backward()
    m.eval()
    compiled = m.token_losses(b.inputs, b.targets, compiled=True)
    m.train()
    m.loss(b.inputs, b.targets).backward()
    assert [c.frame_count for c in counters] == [1, 1]
    assert not compiled.requires_grad
    torch.testing.assert_close(compiled, m.token_losses(b.inputs, b.targets))
    torch.compiler.reset()


def test_an_evaluation_remembers_the_rows_that_fitted(monkeypatch):
    """Memory ran out for the first source; neither the second nor later evaluations try again."""
    asked = []

    def measure(model, shards, token_bytes, runtime, rows, tokens, compiled, on_fewer):
        asked.append(rows)
        if rows > 2:
            on_fewer(2)
        return 1.0

    monkeypatch.setattr(stage, "shard_bits_per_byte", measure)
    knobs = SimpleNamespace(eval_tokens=64, eval_every=1, device_batch_size=8)
    run = SimpleNamespace(
        tokenizer=SimpleNamespace(token_bytes=lambda: None),
        runtime=tiny.CPU,
        knobs=knobs,
        model=tiny.model(),
    )
    feed = SimpleNamespace(micro_batch=(8, 16))
    sources = [(SimpleNamespace(name=name), None) for name in "ab"]
    evaluation = stage.bits_per_byte_evaluation(run, sources, feed, None)
    assert [evaluation.measure()["val_bpb"] for _ in range(2)] == [1.0, 1.0]
    assert asked == [8, 2, 2, 2]


@pytest.mark.parametrize(
    ("device", "micro_batch", "expected"),
    [
        ("cuda", (4, 16), (4, True)),  # micro-batches as training has them
        ("cuda", (16, 4), (8, True)),  # training is at a shorter context
        ("cuda", (8, 0), (8, True)),  # conversations of various widths
        ("cpu", (4, 16), (4, True)),
        ("cpu", (16, 4), (8, False)),
    ],
)
def test_a_gpu_evaluates_with_compiled_code(device, micro_batch, expected):
    m = tiny.model()
    m.compiled = True
    knobs = SimpleNamespace(device_batch_size=8)
    run = SimpleNamespace(
        model=m, knobs=knobs, runtime=SimpleNamespace(device=torch.device(device))
    )
    assert stage.evaluation_rows(run, SimpleNamespace(micro_batch=micro_batch)) == expected


def test_the_only_batch_of_an_evaluation_is_whole_where_that_is_asked(place):
    from nanochat.data.shards import prepare
    from nanochat.data.sources import parse_sources
    from nanochat.data.tokenizer import Tokenizer

    (source,) = parse_sources([place[1][0].removeprefix("--data=")])
    tokenizer = Tokenizer.load(place[0] / "tokenizer")
    shards = prepare(source, "val", tokenizer, place[0] / "tokens")
    sizes = {
        whole: [
            b.inputs.size(0)
            for b in eval_batches(
                shards, rows_per_batch=64, sequence_len=32, max_tokens=100, whole=whole
            )
        ]
        for whole in (False, True)
    }
    assert sizes[True] == [64] and len(sizes[False]) == 1 and sizes[False][0] < 64
    assert RowFeed([(shards, None)], rows=8, device_rows=4, sequence_len=32).micro_batch == (4, 32)


# ---- opening

UNCOMPILED = """
import sys
sys.path.insert(0, "tests")
import tiny

def unneeded(after):
    heavy = "torch._dynamo", "torch._inductor", "sympy", "pandas", "scipy", "matplotlib"
    loaded = [name for name in heavy if name in sys.modules]
    assert not loaded, f"{after} imported {loaded}"

m = tiny.model()
unneeded("building a model")
o, b = tiny.optimizer(m), tiny.batch()
m.loss(b.inputs, b.targets).backward()
o.step()
unneeded("a training step")
m.token_losses(b.inputs, b.targets)
unneeded("an evaluation")
from nanochat.commands import base_train, chat_eval, chat_sft
from nanochat.export import target
from nanochat.train import stage
unneeded("opening a stage")
"""


def test_a_run_that_is_not_compiled_does_not_import_the_compiler():
    """It takes seconds to import, which every process of a chain would lose."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", UNCOMPILED]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
