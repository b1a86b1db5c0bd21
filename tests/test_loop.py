"""
The loop: one update however a batch is cut, schedules, evaluations, memory, signals, NaN and
float16.
"""

import errno
import gc
import math
import os
import shutil
import signal
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import priors
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_budget import Clock
from tiny import PLAIN, fit, losses, rows
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.base import runtime
from nanochat.base.common import UserError
from nanochat.base.runtime import halve_until_it_fits
from nanochat.data.feed import Batch
from nanochat.model import checkpoint, loss
from nanochat.model.gpt import GPT
from nanochat.study import report
from nanochat.train.loop import Evaluation, Interrupted, recut
from nanochat.train.schedule import Schedule

# ---- one update however a batch is cut


@pytest.mark.parametrize("weighted", [False, True], ids=["masked", "weighted as in RL"])
def test_the_cut_of_a_batch_changes_nothing(tmp_path, weighted):
    """Micro-batches of 8, 4, 3 and 1 rows with uneven masks, in float32."""
    seen = {}
    for cut in (8, 4, 3, 1):
        feed = tiny.ListFeed.random(3, ignored=0.5, weighted=weighted)
        feed.device_rows = cut
        _, _, m = fit(tmp_path / str(cut), tiny.randomise(tiny.model()), feed, Schedule(decay=0.0))
        seen[cut] = losses(tmp_path / str(cut)), tiny.weights(m)
    start = tiny.weights(tiny.randomise(tiny.model()))
    for cut in (4, 3, 1):
        assert seen[cut][0] == pytest.approx(seen[8][0], rel=1e-5, abs=1e-6)
        for name, w in seen[cut][1].items():
            moved = (seen[8][1][name] - start[name]).norm()
            assert moved > 0 and (w - seen[8][1][name]).norm() < 2e-3 * moved, name


def gradients_of_a_step(folder, m: GPT, b: Batch, **fields) -> dict[str, torch.Tensor]:
    """The gradients with which the loop makes an update on a batch, row by row."""
    seen = {}
    o = tiny.optimizer(m)
    o.step = lambda *_: seen.update({n: p.grad.clone() for n, p in m.named_parameters()})
    fit(folder, m, tiny.ListFeed([b], device_rows=1), optimizer=o, **fields)
    return seen


def test_gradients_are_those_of_the_mean_over_valid_targets(tmp_path):
    m, b = tiny.randomise(tiny.model()), tiny.batch(ignored=0.6)
    m.loss(b.inputs, b.targets).backward()
    seen = gradients_of_a_step(tmp_path, tiny.randomise(tiny.model()), b)
    for name, p in m.named_parameters():
        expected = p.grad / (b.targets >= 0).sum()
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-7)


def test_a_step_without_targets_changes_nothing(tmp_path):
    steps = [tiny.batch(seed=1), tiny.batch(seed=2), tiny.batch(seed=3)]
    steps.insert(1, Batch(steps[0].inputs, torch.full_like(steps[0].targets, -1)))
    before = []
    m = tiny.model()
    fit(
        tmp_path,
        m,
        tiny.ListFeed(steps),
        Schedule(decay=0),
        [Evaluation("watch", 1, lambda: before.append(tiny.weights(m)) or {"x": 1.0})],
    )
    assert losses(tmp_path)[1] == 0.0
    assert tiny.same(before[0], before[1])
    assert not tiny.same(before[1], before[2])
    _, _, without = fit(
        tmp_path / "b",
        None,
        tiny.ListFeed([steps[0], *steps[2:]]),
        Schedule(decay=0, momentum_warmup=0),
    )
    _, _, with_it = fit(
        tmp_path / "c", None, tiny.ListFeed(steps), Schedule(decay=0, momentum_warmup=0)
    )
    assert tiny.same(tiny.weights(without), tiny.weights(with_it)), (
        "momentum, bias correction and all"
    )


def stopping_after(step: int) -> type[tiny.ListFeed]:
    """Feeds whose batch after so many steps comes with a SIGTERM."""

    class Stopping(tiny.ListFeed):
        def __next__(self):
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    return Stopping


def test_a_step_left_out_before_a_resume_is_not_counted_as_an_update(tmp_path):
    steps = [tiny.batch(seed=i) for i in range(6)]
    steps[1] = Batch(steps[1].inputs, torch.full_like(steps[1].targets, -1))
    _, _, whole = fit(tmp_path / "whole", None, tiny.ListFeed(steps))

    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", None, stopping_after(2)(steps))
    m = tiny.model()
    run = tiny.resumed(tmp_path / "parts", m, tiny.ListFeed(steps))
    assert (run.step, run.optimizer.steps) == (3, 2)
    run.fit()
    assert tiny.same(tiny.weights(m), tiny.weights(whole)) and losses(tmp_path / "parts") == losses(
        tmp_path / "whole"
    )


def test_one_ignored_micro_batch_among_others(tmp_path):
    b = tiny.batch()
    targets = b.targets.clone()
    targets[:4] = -1
    _, _, m = fit(tmp_path, None, tiny.ListFeed([Batch(b.inputs, targets)] * 3, device_rows=4))
    assert all(p.isfinite().all() for p in m.parameters())
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


# ---- schedules of steps


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 7), cut=st.integers(1, 9), warmup=st.floats(0, 1), decay=st.floats(0, 1))
def test_exactly_n_updates_with_rates_within_bounds(tmp_path_factory, n, cut, warmup, decay):
    path = tmp_path_factory.mktemp("run")
    m = tiny.model(n_layer=1)
    feed = tiny.ListFeed.random(n, rows=4)
    feed.device_rows = cut
    _, run, _ = fit(path, m, feed, Schedule(warmup, decay))
    assert run.step == run.optimizer.steps == n == len(rows(path))
    assert all(0 <= r["lr_mult"] <= 1 for r in rows(path))
    assert [r["progress"] for r in rows(path)] == [
        pytest.approx((i + 1) / n, abs=1e-6) for i in range(n)
    ]
    assert checkpoint.newest(path).meta["updates"] == n


# ---- probes and checkpoints


def test_a_checkpoint_precedes_every_look_and_takes_up_its_numbers(tmp_path):
    seen = []

    def look():
        path = checkpoint.newest(tmp_path)
        seen.append(path.meta["step"])
        return {"val_bpb": 5.0 - len(seen)}

    summary, run, _ = fit(tmp_path, None, None, PLAIN, [Evaluation("eval", 0.25, look, start=True)])
    assert seen == [0, 2, 4, 6, 8]
    assert summary["eval"] == {"val_bpb": 0.0} and run.best == {"step": 8, "val_bpb": 0.0}
    meta = checkpoint.newest(tmp_path).meta
    assert meta["done"] and meta["best"] == run.best and meta["last"] == {"eval": {"val_bpb": 0.0}}
    earlier = checkpoint.newest(tmp_path, 6).meta
    assert not earlier["done"] and earlier["best"] == {"step": 6, "val_bpb": 1.0}
    assert [r["step"] for r in rows(tmp_path, "eval")] == seen


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    values = iter([3.0, 1.0, 2.0, float("nan"), 2.0, 2.0, 2.0, 2.0, 2.0])
    _, run, _ = fit(
        tmp_path,
        None,
        None,
        PLAIN,
        [Evaluation("eval", 1, lambda: {"val_bpb": next(values)}, start=True)],
        keep=2,
    )
    assert run.best == {"step": 1, "val_bpb": 1.0}
    assert [p.path.name for p in checkpoint.list_checkpoints(tmp_path)] == [
        "step_000001",
        "step_000007",
        "step_000008",
    ]


CURVE = {0: 9.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4, 10: 1.0}  # val_bpb by step


def losing_patience(folder, m, steps=12, **fields):
    """A run of two evaluations' patience that measures CURVE every second step."""
    r = tiny.run(folder, m, tiny.ListFeed.random(steps), patience=2, keep=1, **fields)
    measure = lambda: {"val_bpb": CURVE[r.step]}  # noqa: E731
    r.evaluations = [Evaluation("eval", 2, measure, start=True)]
    return r


def test_a_run_that_loses_patience_ends_with_its_best_checkpoint(tmp_path):
    m, spent = tiny.model(), []
    r = losing_patience(tmp_path / "a", m)
    (evaluation,) = r.evaluations
    noting = lambda: spent.append(r.spent.get("steps", 0.0)) or evaluation.measure()  # noqa: E731
    r.evaluations = [replace(evaluation, measure=noting)]
    r.fit()
    assert r.step == 4 and r.done and r.best == {"step": 4, "val_bpb": 2.0}
    (kept,) = checkpoint.list_checkpoints(tmp_path / "a")
    assert kept.step == 4 and kept.meta["done"]
    r.logbook.close()
    (log,) = report.load([tmp_path / "a"])  # it tells of what is kept
    assert log.state() == "finished" and log.last("val_bpb", "eval") == 2.0
    assert log.last("step", "train") == 4
    assert kept.meta["spent"]["steps"] >= spent[-1] > spent[2]  # also of the steps that are dropped
    expected = tiny.model()
    tiny.fit(
        tmp_path / "b", expected, tiny.ListFeed.random(12), evaluations=[], save_every=4, keep=9
    )
    checkpoint.at_step(tmp_path / "b", 4).load_weights(expected)
    assert tiny.same(tiny.weights(m), tiny.weights(expected))


@pytest.mark.parametrize("step", [5, 7, 8])
def test_losing_patience_survives_an_interruption(tmp_path, monkeypatch, step):
    whole, parts = tiny.model(), tiny.model()
    losing_patience(tmp_path / "a", whole).fit()
    r = losing_patience(tmp_path / "b", parts)
    with monkeypatch.context() as m:
        tiny.act_in_step(m, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            r.fit()
    r.logbook.close()
    stored = checkpoint.newest(tmp_path / "b")
    again = losing_patience(tmp_path / "b", parts, step=stored.step)
    again.restore(stored)
    again.fit()
    assert (again.step, again.stale) == (4, 0)
    assert tiny.same(tiny.weights(whole), tiny.weights(parts))


def test_speed_counts_every_token_of_this_session(tmp_path):
    """Those too of steps that are dropped at the end, and none of an earlier session."""
    r = losing_patience(tmp_path, tiny.model())
    summary = r.fit()
    r.logbook.close()
    assert r.tokens == 4 * 128 and r.step == 4  # of eight steps
    seconds = r._training_seconds
    assert summary["tok_per_sec"] == pytest.approx(8 * 128 / seconds, abs=0.1)
    r = losing_patience(tmp_path / "b", tiny.model(), steps=6)
    r.patience, r.tokens = 0, 10**6
    summary = r.fit()
    assert summary["tok_per_sec"] == pytest.approx(6 * 128 / r._training_seconds, abs=0.1)


def test_speed_is_tokens_by_the_seconds_of_steps(tmp_path):
    clock, m = Clock(), tiny.model()

    def passing(seconds, result):
        clock.now += seconds
        return result

    loss = m.loss
    m.loss = lambda *args, **options: passing(2, loss(*args, **options))
    slow = Evaluation("eval", 2, lambda: passing(50, {"val_bpb": 1.0}), start=True)
    summary, _, _ = fit(tmp_path, m, evaluations=[slow], clock=clock, peak_flops=1e9)
    assert summary["tok_per_sec"] == pytest.approx(128 / 2)
    share = 64 * m.flops_per_token(16) / 1e9
    assert [r["peak_share"] for r in rows(tmp_path)] == pytest.approx([share] * 8, abs=1e-4)


def test_without_patience_the_last_checkpoint_counts(tmp_path):
    r = losing_patience(tmp_path, tiny.model(), steps=8)
    r.patience = 0
    r.fit()
    assert r.step == 8 and r.best["step"] == 4


def test_a_run_with_patience_ends_with_the_best_even_at_its_end(tmp_path):
    r = losing_patience(tmp_path, tiny.model(), steps=6)
    r.fit()
    assert r.step == 4 and checkpoint.newest(tmp_path).step == 4


def test_a_nan_is_never_the_best(tmp_path):
    values = iter([float("nan"), 2.0, float("nan")] + [3.0] * 9)
    _, run, _ = fit(
        tmp_path,
        None,
        None,
        PLAIN,
        [Evaluation("eval", 1, lambda: {"val_bpb": next(values)}, start=True)],
    )
    assert run.best == {"step": 1, "val_bpb": 2.0}


@pytest.mark.parametrize(
    ("every", "expected"),
    [(3, [3, 6, 8]), (0, [8]), (0.5, [4, 8]), (1, list(range(1, 9))), (100, [8])],
)
def test_when_a_probe_looks(tmp_path, every, expected):
    fit(tmp_path, None, None, PLAIN, [Evaluation("x", every, lambda: {"n": 1})])
    assert [r["step"] for r in rows(tmp_path, "x")] == expected


@pytest.mark.parametrize("every", [4, 0.5])
@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_look_that_a_signal_came_before_is_made_up_for(tmp_path, every, at):
    probes = [Evaluation("x", every, lambda: {"n": 1})]
    with pytest.raises(Interrupted):
        fit(tmp_path, None, stopping_after(at - 1).random(8), PLAIN, probes)
    assert [r["step"] for r in rows(tmp_path, "x")] == [4] * (at > 4)
    tiny.resumed(tmp_path, tiny.model(), evaluations=probes).fit()
    assert [r["step"] for r in rows(tmp_path, "x")] == [4, 8]


def compiled(m: GPT, monkeypatch) -> tuple[CompileCounter, CompileCounter]:
    """Compile a model's blocks and its loss; what is returned counts the compilations of each."""
    layers, head = CompileCounter(), CompileCounter()
    for block in m.blocks:
        block.compile(dynamic=False, backend=layers)
    m.compiled = True
    both = torch.compile(loss._chunk_both, dynamic=False, backend=head)
    monkeypatch.setattr(loss, "_compiled", lambda: both)
    return layers, head


def test_every_context_stage_is_compiled_once(tmp_path, monkeypatch):
    """Three stages within a limit of one compilation: earlier stages do not count against it."""
    m = tiny.model(n_layer=2)
    counters = compiled(m, monkeypatch)

    class Staged(tiny.ListFeed):
        T = 4

        def set_progress(self, progress):
            before, self.T = self.T, 4 if progress < 0.3 else 8 if progress < 0.6 else 16
            return "longer" if before != self.T else ""

        def __next__(self):
            return [tiny.batch(rows=32 // self.T, T=self.T) for _ in super().__next__()]

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        fit(tmp_path, m, Staged.random(10))
    torch.compiler.reset()
    assert [c.frame_count for c in counters] == [3, 3]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("short", [1, 5, 7])
def test_a_short_batch_is_filled_up_and_not_compiled_again(tmp_path, monkeypatch, short, weighted):
    """The last step of an epoch: one compilation, and the losses of code that is not compiled."""
    steps = [tiny.batch(seed=i, weighted=weighted) for i in range(3)]
    steps.append(tiny.batch(seed=9, rows=short, weighted=weighted))

    class Feed(tiny.ListFeed):
        micro_batch = 4, 16

    fit(tmp_path / "plain", None, Feed(steps, device_rows=4))
    m = tiny.model()
    counters = compiled(m, monkeypatch)
    torch.compiler.reset()
    fit(tmp_path / "compiled", m, Feed(steps, device_rows=4))
    torch.compiler.reset()
    assert [c.frame_count for c in counters] == [1, 1]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


def test_rows_of_various_widths_are_filled_up_where_shapes_are_compiled(tmp_path, monkeypatch):
    """As in finetuning and reinforcement: one compilation per width, whatever number of rows."""
    steps = [tiny.batch(rows=n, seed=n, T=T) for n, T in ((4, 16), (3, 8), (1, 16), (4, 8))]

    class Feed(tiny.ListFeed):
        micro_batch = 4, 0

    fit(tmp_path / "plain", None, Feed(steps))
    m = tiny.model()
    layers, _ = compiled(m, monkeypatch)
    torch.compiler.reset()
    fit(tmp_path / "compiled", m, Feed(steps))
    torch.compiler.reset()
    assert layers.frame_count == 2
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)


def test_the_garbage_collector_rests_during_a_run_and_not_after(tmp_path):
    frozen = []
    look = Evaluation("x", 1, lambda: frozen.append(gc.get_freeze_count()) or {}, start=True)
    gc.freeze()  # as a program that does so itself
    before = gc.get_freeze_count()
    fit(tmp_path / "frozen", None, tiny.ListFeed.random(3), PLAIN, [look])
    assert max(frozen) <= before and gc.get_freeze_count() > 10_000
    gc.unfreeze()
    frozen.clear()
    fit(tmp_path, None, tiny.ListFeed.random(3), PLAIN, [look])
    assert frozen[0] == 0 and min(frozen[1:]) > 10_000
    assert gc.get_freeze_count() == 0
    gc.freeze()  # for the tests after this one


def test_saves_between_looks(tmp_path):
    fit(tmp_path, save_every=3, keep=9)
    assert [c.step for c in checkpoint.list_checkpoints(tmp_path)] == [3, 6, 8]


# ---- memory


@pytest.mark.parametrize("halves", [False, True])
def test_out_of_memory_in_a_look_costs_its_numbers_only(tmp_path, capsys, halves):
    """Also if it has tried fewer rows, down to one."""

    def fail(rows: int = 1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def look():
        assert checkpoint.newest(tmp_path) is not None
        if len(checkpoint.list_checkpoints(tmp_path)) == 2:
            halve_until_it_fits(fail, 2) if halves else fail()
        return {"val_bpb": 1.0}

    _, run, m = fit(
        tmp_path, None, None, PLAIN, [Evaluation("eval", 0.25, look, start=True)], keep=2
    )
    assert run.step == 8 and run.done
    assert (
        "out of memory in eval: no result at this step; training continues"
        in capsys.readouterr().err
    )
    assert tiny.same(tiny.weights(m), tiny.weights(fit(tmp_path / "b")[2]))


def test_other_errors_in_a_look_are_not_swallowed(tmp_path):
    def look():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        fit(tmp_path, None, None, PLAIN, [Evaluation("eval", 4, look)])
    assert checkpoint.newest(tmp_path).meta["step"] == 4


def limited(m: GPT, most: int) -> GPT:
    """A model that has memory for so many rows at a time."""
    real = m.loss

    def loss(idx, targets, weights=None):
        if idx.size(0) > most:
            real(idx[:1], targets[:1], None).backward()  # what was begun must not count
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(idx, targets, weights)

    m.loss = loss
    return m


def test_out_of_memory_in_a_step_halves_the_micro_batch(tmp_path, capsys):
    feed = tiny.ListFeed.random(8, ignored=0.3)
    _, _, m = fit(tmp_path / "a", limited(tiny.model(), 2), feed)
    assert feed.device_rows == 2
    notices = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(notices) == 2, "once for 8 rows, once for 4, and then never again"
    assert notices[1].endswith("of 4 rows: continuing with 2")
    same = tiny.ListFeed.random(8, ignored=0.3)
    same.device_rows = 2
    _, _, expected = fit(tmp_path / "b", None, same)
    assert tiny.same(tiny.weights(m), tiny.weights(expected))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_the_failed_attempt_is_freed_before_the_next(tmp_path):
    """Nothing keeps the graph of a micro-batch that did not fit."""
    m, alive = tiny.model(), []
    real = m.loss

    def loss(idx, targets, weights=None):
        if idx.size(0) > 4:
            value = real(idx, targets, weights)
            alive.append(weakref.ref(value))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert alive and alive[0]() is None
        return real(idx, targets, weights)

    m.loss = loss
    fit(tmp_path, m, tiny.ListFeed.random(1))
    assert len(alive) == 1


def test_memory_that_runs_out_in_a_backward_pass_frees_its_graph(tmp_path, monkeypatch):
    """What the failed attempt saved is gone when memory is released, and so in the next attempt."""
    kept, alive = [], []

    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.clone()
            ctx.save_for_backward(y)
            kept.append(weakref.ref(y.untyped_storage()))
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            if len(kept) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return grads

    m = tiny.model()
    real = m.forward
    m.forward = lambda idx: Saving.apply(real(idx))
    monkeypatch.setattr(
        runtime, "release_memory", lambda: alive.extend(ref() is not None for ref in kept)
    )
    feed = tiny.ListFeed.random(1)
    fit(tmp_path, m, feed)
    assert alive == [False] and len(kept) == 3 and feed.device_rows == 4


def test_after_a_halving_the_shapes_of_before_do_not_count(tmp_path, monkeypatch):
    """Two halvings, within a limit of one compilation: of one row, which the attempts begin with."""
    m = limited(tiny.model(), 2)
    counters = compiled(m, monkeypatch)
    torch.compiler.reset()
    m.loss(*(t[:1] for t in (tiny.batch().inputs, tiny.batch().targets))).backward()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        fit(tmp_path, m, tiny.ListFeed.random(3))
    torch.compiler.reset()
    assert [c.frame_count for c in counters] == [3, 3]


def test_a_row_that_does_not_fit_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="out of memory with a micro-batch of 1 row"):
        fit(tmp_path, limited(tiny.model(), 0))


def test_recutting_keeps_every_row():
    b = tiny.batch(rows=7, weighted=True)
    for n in (1, 2, 3, 5, 7, 9):
        parts = recut([b], n)
        sizes = [p.inputs.size(0) for p in parts]
        assert max(sizes) <= n and max(sizes) - min(sizes) <= 1, "nearly equal, so few shapes"
        for field in ("inputs", "targets", "weights"):
            assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(b, field))


# ---- the host waits for the device once in a step


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, or sends it something from the host."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).removeprefix("aten.")
        self.seen[name] += name in ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cut", [8, 2], ids=["one micro-batch", "four"])
@pytest.mark.parametrize("kind", ["float32", "float16", "prior"])
def test_the_host_waits_once_in_a_step(tmp_path, monkeypatch, cut, kind):
    """And not before the device has the update to do, unless float16 may have overflowed."""

    class Feed(tiny.ListFeed):
        def __next__(self):
            parts = recut(super().__next__(), cut)
            return [replace(b, valid=b.targets.numel()) for b in parts]

    waits, events, reading = Waits(), [], runtime.Runtime.reading

    def watched_reading(rt, t):
        values = reading(rt, t)
        return lambda: events.append(f"reads {t.numel()}") or values()

    monkeypatch.setattr(runtime.Runtime, "reading", watched_reading)
    m, rt = (half_model(), HALF) if kind == "float16" else (tiny.model(), tiny.CPU)
    if kind == "prior":
        path = priors.write(tmp_path / "p.safetensors", priors.with_spans())
        m = priors.model_with(path, rap_gate="learned")
    run = tiny.run(tmp_path, m, Feed.random(4), runtime=rt)
    update, step = run._update, run.optimizer.step
    run.optimizer.step = lambda *given: events.append("updates") or step(*given)

    def watched(*given):
        with waits if run.step >= 2 else nullcontext():  # the state is there then
            return update(*given)

    run._update = watched
    run.fit()
    run.logbook.close()
    once = ["reads 2", "updates"] if kind == "float16" else ["updates", "reads 1"]
    assert +waits.seen == Counter() and events == once * 4


# ---- what stops a run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path, value):
    m = tiny.model()
    real, calls = m.loss, []

    def loss(*args):
        calls.append(1)
        return real(*args) * (value if len(calls) == 6 else 1.0)

    m.loss = loss
    with pytest.raises(
        UserError,
        match=r"the loss is (nan|inf) at step 5: the checkpoint of step 4 in .* is kept; lower",
    ):
        fit(tmp_path, m, None, PLAIN, [Evaluation("eval", 2, lambda: {"val_bpb": 1.0})])
    meta = checkpoint.newest(tmp_path).meta
    again = checkpoint.newest(tmp_path).model("cpu", torch.float32)
    assert meta["step"] == 4 and all(p.isfinite().all() for p in again.parameters())
    assert len(rows(tmp_path)) == 5


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    m = tiny.model()

    def spoil():
        with torch.no_grad():
            m.embed.weight[-1, 0] = torch.nan  # padding, which no loss shows
        return {}

    with pytest.raises(UserError, match="the weights are no longer finite at step 5"):
        fit(tmp_path, m, None, PLAIN, [Evaluation("spoil", 4, spoil)], save_every=1)
    assert checkpoint.newest(tmp_path).step == 4
    for path in checkpoint.list_checkpoints(tmp_path):
        again, meta = path.model("cpu", torch.float32), path.meta
        assert meta["step"] <= 4 and all(p.isfinite().all() for p in again.parameters())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    class Stopping(tiny.ListFeed):
        def __next__(self):
            if self.step == 3:
                os.kill(os.getpid(), number)
            return super().__next__()

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        fit(tmp_path, None, Stopping(tiny.ListFeed.random(8).steps))
    assert checkpoint.newest(tmp_path).meta["step"] == 4
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.mark.parametrize("when", ["last step", "last evaluation"])
def test_a_signal_at_the_end_is_told(tmp_path, when):
    """The run is complete; whoever would start another one learns of it."""

    class Stopping(tiny.ListFeed):
        def __next__(self):
            if when == "last step" and self.step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    def measure():
        if when == "last evaluation":
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val_bpb": 1.0}

    feed = Stopping(tiny.ListFeed.random(8).steps)
    summary, run, _ = fit(tmp_path, None, feed, PLAIN, [Evaluation("eval", 0, measure)])
    assert summary["signal"] == signal.SIGTERM and run.done
    assert checkpoint.newest(tmp_path).meta["done"]
    assert "signal" not in fit(tmp_path / "b")[0]


def test_a_full_disk_in_mid_run(tmp_path, monkeypatch):
    real, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        fit(tmp_path, None, None, PLAIN, [Evaluation("eval", 2, lambda: {"val_bpb": 1.0})])
    assert checkpoint.newest(tmp_path).meta["step"] == 2
    assert not list(tmp_path.glob(".*"))


# ---- float16


HALF = replace(tiny.CPU, dtype=torch.float16)


def half_model() -> GPT:
    m = GPT.build(tiny.config(), "cpu", torch.float16)
    m.init_weights(1)
    return m


def test_float16_learns_as_float32_does(tmp_path):
    _, run, _ = fit(tmp_path / "half", half_model(), None, PLAIN, runtime=HALF)
    fit(tmp_path / "full")
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), rel=0.01)
    assert run.scale == pytest.approx(2.0**10 * 2 ** (8 / 1000))


def test_an_overflow_skips_the_update_and_lowers_the_scale(tmp_path):
    m = tiny.randomise(half_model())
    with torch.no_grad():
        m.head.weight.mul_(30)
    before, optimizer = tiny.weights(m), tiny.optimizer(m, HALF)
    _, run, _ = fit(
        tmp_path, m, tiny.ListFeed.random(1), optimizer=optimizer, runtime=HALF, scale=2.0**15
    )
    assert math.isfinite(losses(tmp_path)[0])
    assert run.scale == 2.0**14 and optimizer.steps == 0 and tiny.same(before, tiny.weights(m))
    assert checkpoint.newest(tmp_path).meta["updates"] == 0


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_the_scale_is_undone(tmp_path, scale):
    b = tiny.batch(ignored=0.3)
    full = gradients_of_a_step(tmp_path / "full", tiny.model(), b)
    half = gradients_of_a_step(tmp_path / "half", half_model(), b, runtime=HALF, scale=scale)
    for name, g in full.items():
        assert (half[name] - g).norm() <= 0.02 * g.norm() + 1e-6, name


# ---- signals and saves by the clock


class Signalled(tiny.ListFeed):
    """In step 4 the process gets these signals, one after the other."""

    signals: tuple[int, ...] = ()

    def __next__(self):
        for number in self.signals if self.step == 3 else ():
            os.kill(os.getpid(), number)
        return super().__next__()


@pytest.mark.parametrize(
    "names",
    ["SIGINT", "SIGTERM", "SIGHUP", "SIGHUP SIGHUP", "SIGINT SIGINT", "SIGHUP SIGTERM SIGTERM"],
)
def test_a_signal_saves_even_where_it_is_passed_on_twice(tmp_path, names):
    feed = Signalled.random(8)
    feed.signals = tuple(getattr(signal, name) for name in names.split())
    before = {n: signal.getsignal(n) for n in feed.signals}
    with pytest.raises(Interrupted):
        fit(tmp_path, None, feed, PLAIN)
    assert checkpoint.newest(tmp_path).step == 4
    assert {n: signal.getsignal(n) for n in feed.signals} == before


def test_a_second_ctrl_c_acts_at_once(tmp_path, monkeypatch):
    feed = Signalled.random(8)
    feed.signals = signal.SIGINT, signal.SIGINT
    times = iter(range(0, 10_000, 2))
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    with pytest.raises(KeyboardInterrupt) as e:
        fit(tmp_path, None, feed, PLAIN)
    assert not isinstance(e.value, Interrupted) and checkpoint.newest(tmp_path) is None


def test_a_run_under_nohup_outlives_the_terminal(tmp_path):
    feed = Signalled.random(8)
    feed.signals = (signal.SIGHUP,)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _, run, _ = fit(tmp_path, None, feed, PLAIN)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.done and run.step == 8


@pytest.mark.parametrize(
    ("minutes", "cost", "expected"),
    [
        (15, 0.0, [15, 30, 45, 50]),  # every step takes a minute
        (1, 0.0, [*range(1, 51)]),
        (15, 1.0, [20, 39, 50]),  # saving takes a minute: at most a twentieth of the time
        (0, 0.0, [50]),
    ],
)
def test_saves_by_the_clock(tmp_path, monkeypatch, minutes, cost, expected):
    now, saved = [0.0], []

    class Minute(tiny.ListFeed):
        def __next__(self):
            now[0] += 60
            return super().__next__()

    def save(directory, step, *_):
        now[0] += 60 * cost
        saved.append(step)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr("nanochat.train.loop.Run._amend", lambda _: None)
    run = tiny.run(
        tmp_path,
        tiny.model(),
        Minute([tiny.batch()] * 50),
        clock=lambda: now[0],
        costs={"save": 60 * cost},
    )
    run.save_seconds = 60 * minutes
    run.fit()
    assert saved == expected


@pytest.mark.parametrize("deleted", ["the checkpoint", "the run", "everything"])
@pytest.mark.parametrize("when", ["in a step", "in an evaluation"])
def test_what_is_deleted_under_a_run_is_said_and_written_again(tmp_path, capsys, deleted, when):
    folder = tmp_path / "base" / "t"

    def delete():
        shutil.rmtree(
            {"the run": folder, "everything": folder.parent}.get(deleted)
            or checkpoint.newest(folder).path
        )

    class Deleting(tiny.ListFeed):
        def __next__(self):
            if self.step == 5 and when == "in a step":
                delete()
            return super().__next__()

    def measure():
        if run.step == 4 and when == "in an evaluation":
            delete()
        return {"val_bpb": 1.0}

    run = tiny.run(
        folder,
        tiny.model(),
        Deleting.random(8),
        evaluations=[Evaluation("eval", 2, measure)],
    )
    run.fit()
    run.logbook.close()
    stored = checkpoint.newest(folder, optimizer=True)
    assert stored.step == 8 and stored.meta["done"]
    assert rows(folder)[-1]["step"] == 8
    assert "was deleted by another program; the run continues" in capsys.readouterr().err
