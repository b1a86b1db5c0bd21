"""
The one training loop: batches of one step in, one update out, with progress driving schedules, evaluations, saves and the end.

It names no stage: stages differ in the feed that brings the batches. Every stage has one loss, sum(weights * nll) / N with N the
valid targets over all micro-batches and ranks of the step, so an update does not depend on how its batch was cut. Whatever ends a
run early (a signal, memory, a NaN) leaves a checkpoint behind that `--resume auto` goes on from.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nanochat.base.common import UserError, duration, human, notice, print0
from nanochat.base.logbook import Logbook
from nanochat.base.runtime import Runtime, out_of_memory, release_memory
from nanochat.data.feed import Batch
from nanochat.model import checkpoint
from nanochat.model.checkpoint import Checkpoint
from nanochat.model.gpt import GPT
from nanochat.train.optim import MuonAdamW
from nanochat.train.schedule import Schedule


class Feed(Protocol):
    """
    Where the batches of a stage come from. `device_rows` may be lowered at any time without changing what a step holds. `at` is told
    before every step what share of the run is over, and answers in words what changes with it, mostly nothing.
    """

    device_rows: int

    def set_progress(self, progress: float) -> str: ...
    def __next__(self) -> list[Batch]: ...
    @property
    def progress(self) -> float: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Evaluation:
    """
    Something to look at while training: fn() -> numbers for the logbook under `name`. every >= 1: steps; below 1: that share of
    the run; 0: at the end alone. `start` looks before the first step as well, which under a budget of time every probe does, so that its
    time is known. A number called val_bpb decides which checkpoint is best.
    """

    name: str
    every: float
    fn: Callable[[], dict[str, Any]]
    start: bool = False


@dataclass
class Run:
    """One run of one stage: where it lives, what its checkpoints carry, how far it has come."""

    runtime: Runtime
    directory: Path
    logbook: Logbook
    meta: dict[str, Any]  # architecture, tokenizer, knobs: into every checkpoint as it is
    budget_seconds: float = 0.0  # 0: the feed alone decides when the run ends
    save_every: float = 0.0  # as Evaluation.every, beside the saves before evaluations
    keep: int = 2
    peak_flops: float = 0.0  # measured matrix-product peak of all devices together, 0 = unknown
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None  # {"step", "val_bpb"}
    scale: float = 2.0**10  # the loss scale of float16 runs, on a token's loss
    costs: dict[str, float] = field(
        default_factory=dict
    )  # the longest seconds so far of every probe, and of "save"
    looked: tuple[int, float] = (
        0,
        0.0,
    )  # the step and the progress up to which all looks that were due have been made
    saved_step: int = -1
    done: bool = False  # trained to its end and looked at for the last time
    last: dict[str, Any] = field(default_factory=dict)  # the newest numbers of every probe

    @property
    def reserve(self) -> float:
        """Seconds of the budget that are kept for the last save and the last look of every probe."""
        return sum(self.costs.values())

    def progress(self, feed: Feed) -> float:
        """The share of the run that is over, in 0..1: of its feed or of its time, whichever is further."""
        if self.budget_seconds <= 0:
            return feed.progress
        # time kept for the last evaluation and save counts as spent, so that the rate reaches its floor when training ends
        return min(
            1.0, max(feed.progress, self.seconds / max(self.budget_seconds - self.reserve, 1e-9))
        )

    def spent(self, what: str, seconds: float) -> None:
        self.costs[what] = max(self.costs.get(what, 0.0), from_main(seconds, self.runtime))


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; the run was saved."""


class _Signals:
    """While active, SIGINT and SIGTERM set a flag that the loop reads between steps; a second one acts at once."""

    def __enter__(self):
        self.caught = 0
        self.before = {}
        for s in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[s] = signal.signal(s, self._catch)
            except ValueError:  # not in the main thread: the caller's business
                break
        return self

    def _catch(self, number, frame) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number
        print0("\nfinishing this step and saving; once more to stop at once", file=sys.stderr)

    def __exit__(self, *exc) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


def restore(run: Run, stored: Checkpoint, model: GPT, optimizer: MuonAdamW, feed: Feed) -> None:
    """Put a run back to where a checkpoint left it: weights, optimizer, feed, clock and counters."""
    meta = stored.meta
    stored.load_weights(model)
    optimizer.load_state_tensors(stored.optimizer_tensors, meta["updates"])
    feed.load_state_dict(meta["feed"])
    run.step, run.tokens, run.seconds, run.best = (
        meta["step"],
        meta["tokens"],
        meta["seconds"],
        meta["best"],
    )
    run.scale, run.saved_step, run.last = meta["scale"], meta["step"], meta["last"]
    run.costs, run.looked = meta.get("costs", {}), tuple(meta.get("looked", (run.step, 1.0)))


def _meta(run: Run, optimizer: MuonAdamW, feed: Feed) -> dict[str, Any]:
    """What a checkpoint of this step says beside its weights. A step that was left out makes no update: both are counted."""
    names = ("tokens", "seconds", "best", "scale", "costs", "looked", "last", "done")
    counted = {
        "updates": optimizer.steps,
        "progress": run.progress(feed),
        "feed": feed.state_dict(),
    }
    return {**run.meta, **{n: getattr(run, n) for n in names}, **counted}


def save(run: Run, model: GPT, optimizer: MuonAdamW, feed: Feed) -> None:
    """Write a checkpoint of this step unless there is one already. Every rank must call it."""
    if run.saved_step == run.step:
        return
    t0 = run.clock()
    tensors = optimizer.state_tensors()
    if run.runtime.is_main:
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise UserError(_diverged(run, "the weights are no longer finite"))
        checkpoint.save(
            run.directory, run.step, model.state_dict(), tensors, _meta(run, optimizer, feed)
        )
        checkpoint.prune(run.directory, run.step, run.keep, run.best["step"] if run.best else None)
    run.saved_step = run.step
    run.spent("save", run.clock() - t0)


def fit(
    run: Run,
    model: GPT,
    optimizer: MuonAdamW,
    feed: Feed,
    schedule: Schedule,
    probes: Sequence[Evaluation] = (),
) -> dict[str, Any]:
    """
    Train until the feed or the budget of time ends; returns the summary that is also logged. Raises Interrupted after a signal
    (saved), UserError when the loss stops being finite (the last good checkpoint stays) and when the budget holds no step.

    A budget holds everything: opening, compiling, evaluating, saving. It is overrun by the rest of the step that was begun in it, and by
    what the last look and save take longer than any before.
    """
    rt = run.runtime
    began, seconds_before = run.clock(), run.seconds
    tokens_before, training_seconds, flops = run.tokens, 1e-9, 0.0
    flops_per_token = cache(model.flops_per_token)
    shown = _Line()

    def elapsed() -> float:
        return seconds_before + run.clock() - began

    def due(before: float, after: float) -> list[Evaluation]:
        """What is to be looked at after this step; nothing when it would eat into the time of the last look, which is near then."""
        found = [p for p in probes if _due(p.every, run.step, before, after)]
        seconds = sum(run.costs.get(name, 0.0) for name in ("save", *(p.name for p in found)))
        return (
            found
            if run.budget_seconds <= 0 or run.seconds + seconds <= run.budget_seconds - run.reserve
            else []
        )

    def look(wanted: list[Evaluation]) -> None:
        """Save, run the probes, log what they saw and note it in the checkpoint."""
        here = run.progress(feed)
        if wanted:
            save(run, model, optimizer, feed)
        for probe in wanted:
            t0 = run.clock()
            numbers = _guarded(probe)
            run.spent(probe.name, run.clock() - t0)
            if not numbers:
                continue
            run.last[probe.name] = numbers
            bpb = numbers.get("val_bpb")
            if (
                isinstance(bpb, float)
                and math.isfinite(bpb)
                and (run.best is None or bpb < run.best["val_bpb"])
            ):
                run.best = {"step": run.step, "val_bpb": bpb}
            run.logbook.log(
                kind=probe.name,
                step=run.step,
                tokens=run.tokens,
                seconds=round(elapsed(), 3),
                **numbers,
            )
            if said := "  ".join(
                f"{k} {v:.4f}" for k, v in numbers.items() if isinstance(v, float)
            ):
                shown.say(f"step {run.step:,}  {probe.name}: {said}")
        run.looked = (run.step, here)
        if wanted:
            note()

    def note() -> None:
        run.seconds = from_main(elapsed(), rt)
        if rt.is_main:
            saved = checkpoint.at_step(run.directory, run.step)
            saved.amend(_meta(run, optimizer, feed))

    with _Signals() as signals:
        run.seconds = from_main(elapsed(), rt)
        if run.step == 0:
            look([p for p in probes if p.start or run.budget_seconds > 0])
            run.seconds = from_main(elapsed(), rt)
        started_at = run.progress(feed)
        seen = (
            started_at if run.step == 0 else min(run.looked[1], started_at)
        )  # a new horizon may have set progress back
        if run.looked[0] < run.step:  # a signal or a crash came before the look
            look(due(seen, started_at))
            seen = started_at
        while True:
            run.seconds = from_main(elapsed(), rt)
            now = run.progress(feed)
            if now >= 1.0 and run.step == 0 and run.budget_seconds > 0:
                raise UserError(_no_time(run))
            if now >= 1.0:
                break
            if changed := feed.set_progress(now):
                release_memory()
                if model.compiled:  # for shapes that do not come again; the compiler keeps eight of them and then gives up
                    torch.compiler.reset()
                shown.say(f"step {run.step + 1:,}  {changed}")
            try:
                batches = next(feed)
            except StopIteration:
                break
            t0 = run.clock()
            loss = _step(
                run,
                model,
                optimizer,
                feed,
                batches,
                schedule.lr_mult(now),
                schedule.momentum_at(run.step),
            )
            rt.synchronize()
            step_seconds = run.clock() - t0
            training_seconds += step_seconds
            run.step += 1
            mine = sum(b.inputs.numel() for b in batches)
            tokens = _over_ranks(mine, rt)
            run.tokens += tokens
            flops += tokens * sum(
                b.inputs.numel() / mine * flops_per_token(b.inputs.size(1)) for b in batches
            )
            run.seconds = from_main(elapsed(), rt)
            after = run.progress(feed)
            model.at(after)

            rate = (run.tokens - tokens_before) / training_seconds
            numbers: dict[str, Any] = {
                "progress": round(after, 6),
                "loss": loss,
                "lr_mult": schedule.lr_mult(now),
            }
            numbers["tok_per_sec"] = round(rate, 1)
            numbers |= getattr(feed, "numbers", {})  # what a feed that makes its own data saw of it
            if run.peak_flops:
                numbers["peak_share"] = round(flops / training_seconds / run.peak_flops, 4)
            run.logbook.log(
                kind="train",
                step=run.step,
                tokens=run.tokens,
                seconds=round(run.seconds, 3),
                **numbers,
            )
            left = (run.clock() - began) * (1 - after) / max(after - started_at, 1e-9)
            shown.train(
                run.step,
                after,
                numbers,
                min(left, run.budget_seconds - run.seconds) if run.budget_seconds > 0 else left,
            )

            stop = from_main(signals.caught, rt)
            done = after >= 1.0
            if stop and not done:
                save(run, model, optimizer, feed)
                shown.say(f"saved step {run.step:,} in {run.directory}; go on with --resume auto")
                raise Interrupted(signal.Signals(int(stop)).name)
            if not done:
                if _due(run.save_every, run.step, seen, after):
                    save(run, model, optimizer, feed)
                look(due(seen, after))
            seen = after

        save(run, model, optimizer, feed)
        look(list(probes))
        run.done = True
        note()
    summary = {
        "steps": run.step,
        "loss": shown.average,
        "training_seconds": round(training_seconds, 2),
        "tok_per_sec": round((run.tokens - tokens_before) / training_seconds, 1),
        "peak_memory_bytes": rt.peak_memory(),
    }
    run.logbook.log(
        kind="summary", step=run.step, tokens=run.tokens, seconds=round(run.seconds, 3), **summary
    )
    shown.say(
        f"done: {run.step:,} steps, {human(run.tokens)} tokens in {duration(run.seconds)}, {run.directory}"
    )
    return {"tokens": run.tokens, "seconds": run.seconds, **summary, **run.last}


def _step(
    run: Run,
    model: GPT,
    optimizer: MuonAdamW,
    feed: Feed,
    batches: list[Batch],
    lr_mult: float,
    momentum: float,
) -> float:
    """Forward, backward and update over a step's micro-batches; returns the step's loss. Halves the micro-batch when memory runs out."""
    rt = run.runtime
    valid = _over_ranks(sum(int((b.targets >= 0).sum()) for b in batches), rt)
    if valid == 0:  # nothing to learn from: no gradient, and no step of momentum either
        return 0.0
    half = rt.dtype is torch.float16
    scale = (
        run.scale if half else 1 / valid
    )  # float16 gradients keep the size of a token's; the division by N comes after
    while True:
        optimizer.zero_grad()
        total = torch.zeros((), device=rt.device)
        try:
            for b in batches:
                loss = model.loss(b.inputs, b.targets, b.weights)
                (loss * scale).backward()
                total += loss.detach()
            break
        except RuntimeError as e:
            if not out_of_memory(e) or max(b.inputs.size(0) for b in batches) == 1:
                raise
        feed.device_rows = max(1, max(b.inputs.size(0) for b in batches) // 2)
        batches = recut(batches, feed.device_rows)
        optimizer.zero_grad()
        release_memory()
        notice(
            f"out of memory: micro-batches of {feed.device_rows} rows from now on, {len(batches)} a step, the total batch unchanged"
        )
    if rt.world_size > 1:
        dist.all_reduce(total)
    value = float(total) / valid
    if not math.isfinite(value):
        raise UserError(_diverged(run, f"the loss is {value}"))
    if half and not _unscale(run, optimizer, valid):
        return value
    optimizer.step(lr_mult, momentum)
    return value


def _unscale(run: Run, optimizer: MuonAdamW, valid: int) -> bool:
    """
    Divide the gradients by the loss scale and by N; False (and half the scale) when one overflowed, so that all ranks leave the step out.
    The scale doubles over 1,000 good steps, up to what float16 itself can hold.
    """
    grads = [p.grad for p in optimizer.params if p.grad is not None]
    for g in grads:
        g.div_(run.scale * valid)
    overflow = _over_ranks(sum(int(not torch.isfinite(g).all()) for g in grads), run.runtime)
    run.scale = (
        max(2.0**-10, run.scale / 2) if overflow else min(2.0**15, run.scale * 2 ** (1 / 1000))
    )
    return not overflow


def recut(batches: list[Batch], rows: int) -> list[Batch]:
    """The same rows in micro-batches of at most `rows`."""
    out = []
    for b in batches:
        weights = (
            [None] * -(-b.inputs.size(0) // rows) if b.weights is None else b.weights.split(rows)
        )
        out += [
            Batch(i, t, w)
            for i, t, w in zip(b.inputs.split(rows), b.targets.split(rows), weights, strict=True)
        ]
    return out


def _due(every: float, step: int, before: float, after: float) -> bool:
    if every <= 0:
        return False
    if every >= 1:
        return step % int(every) == 0
    return int(after / every + 1e-9) > int(before / every + 1e-9)


def _guarded(probe: Evaluation) -> dict[str, Any]:
    """A probe that runs out of memory costs its numbers, never the run."""
    try:
        return probe.fn()
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        notice(
            f"out of memory in {probe.name}: its numbers are missing at this step, training goes on"
        )
        return {}


def _no_time(run: Run) -> str:
    over, kept = run.seconds, run.reserve
    return (
        f"a budget of {run.budget_seconds:.3g} s holds no step: {over:.3g} s had gone before the first and {kept:.3g} s are kept for the "
        f"last evaluation and save; give at least --max_minutes={2 * (over + kept) / 60:.2g}, or evaluate on less with --eval_tokens"
    )


def _diverged(run: Run, what: str) -> str:
    kept = (
        f"the checkpoint of step {run.saved_step} in {run.directory} is kept"
        if run.saved_step >= 0
        else "no checkpoint was due yet"
    )
    return f"{what} at step {run.step}: {kept}; lower the learning rates (--lr_scale=0.5) and start again, or resume from it"


def _over_ranks(n: int, rt: Runtime) -> int:
    """The sum of a count over the ranks."""
    if rt.world_size == 1:
        return n
    t = torch.tensor(n, dtype=torch.int64, device=rt.device)
    dist.all_reduce(t)
    return int(t)


def from_main(x: float, rt: Runtime) -> float:
    """Rank 0's value, so that all ranks see one clock and one signal."""
    if rt.world_size == 1:
        return x
    t = torch.tensor(x, dtype=torch.float64, device=rt.device)
    dist.broadcast(t, src=0)
    return float(t)


class _Line:
    """The live line of a terminal, or a plain line now and then when the output goes to a file."""

    def __init__(self) -> None:
        self.live, self.printed, self.average = sys.stdout.isatty(), -1e9, None

    def train(
        self, step: int, progress: float, numbers: dict[str, Any], seconds_left: float
    ) -> None:
        loss = numbers["loss"]
        self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
        now = time.monotonic()
        if now - self.printed < (0.2 if self.live else 10.0):
            return
        self.printed = now
        share = f"  {numbers['peak_share']:.0%} of peak" if "peak_share" in numbers else ""
        share += f"  reward {numbers['reward']:.2f}" if "reward" in numbers else ""
        text = (
            f"step {step:,}  {progress:6.1%}  loss {self.average:.4f}  {human(numbers['tok_per_sec'])} tok/s{share}  "
            f"lr x{numbers['lr_mult']:.2f}  {duration(max(0.0, seconds_left))} left"
        )
        print0(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n")

    def say(self, text: str) -> None:
        print0(f"\r\033[K{text}" if self.live else text)
