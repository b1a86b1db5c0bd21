"""
The one training loop: the batches of a step in, one update out.

Progress through the run drives the schedule, evaluations, saves and the end. The loop names no
stage: stages differ in the feed that provides batches. All have one loss, sum(weights * nll) / N
with N the valid targets over all micro-batches and ranks of the step, so an update does not depend
on how its batch is cut. A run that ends early (a signal, a NaN, no memory) leaves a checkpoint
from which `--resume auto` continues.
"""

import gc
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from nanochat.base.common import UserError, duration, human, notice, print0, world_size
from nanochat.base.logbook import Logbook
from nanochat.base.progress import StatusLine
from nanochat.base.runtime import (
    Runtime,
    halve_until_it_fits,
    keep_freed_memory,
    out_of_memory,
    release_memory,
)
from nanochat.data.feed import Batch
from nanochat.model import checkpoint
from nanochat.model.checkpoint import Checkpoint
from nanochat.model.gpt import GPT
from nanochat.train import compiler
from nanochat.train.evaluation import Evaluation, due
from nanochat.train.optim import MuonAdamW
from nanochat.train.schedule import Schedule
from nanochat.train.spent import describe


class Feed(Protocol):
    """
    Provides a stage's batches. `device_rows` may be lowered at any time; it does not change what a
    step contains. The loop calls `set_progress` with the share of the run that is over before every
    step; the feed returns what changes at this point, in words, or "".
    """

    device_rows: int

    def set_progress(self, progress: float) -> str: ...
    def __next__(self) -> list[Batch]: ...
    @property
    def progress(self) -> float: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived; the run was saved."""


class _Signals:
    """
    SIGINT, SIGTERM and SIGHUP (a terminal that is closed) set a flag that the loop reads. A second
    Ctrl+C acts at once; not so within a second of the first signal, because torchrun and shells
    pass a signal on to processes that have it already.
    """

    def __enter__(self):
        self.caught, self.caught_at = 0, 0.0
        self.previous = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None:
                continue
            if name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started with nohup: it outlives the terminal
            try:
                self.previous[number] = signal.signal(number, self._catch)
            except ValueError:  # not in the main thread: the caller handles signals
                break
        return self

    def _catch(self, number, frame) -> None:
        now = time.monotonic()
        if not self.caught:
            self.caught, self.caught_at = number, now
            text = "\nfinishing this step and saving; press Ctrl+C again to stop at once"
            print0(text, file=sys.stderr)
        elif number == signal.SIGINT and now > self.caught_at + 1:
            raise KeyboardInterrupt

    def __exit__(self, kind: type | None, *_) -> None:
        if world_size() > 1 and kind and issubclass(kind, RuntimeError):
            return  # a rank is gone: the launcher's signal must not come before our last words
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def _collector_at_rest() -> Iterator[Callable[[], None]]:
    """
    Yields what spares the garbage collector the objects that exist when it is first called: to walk
    over the half million of torch and its compiler stops the host, and with it a GPU.
    """

    @cache
    def rest() -> None:
        gc.collect(1)
        gc.freeze()

    try:
        yield rest
    finally:
        gc.unfreeze()


STORED = (
    "tokens",
    "seconds",
    "best",
    "stale",
    "scale",
    "costs",
    "sizes",
    "spent",
    "evaluated_to",
    "last",
)
SAVING = 0.03  # of a budget: evaluations by shares become fewer if their saves take more


@dataclass
class Stopwatch:
    """The seconds of a block of work, without those of the compiler."""

    seconds: float = 0.0


@dataclass
class Run:
    """One run of one stage: what it trains, where it lives, how far it has come."""

    runtime: Runtime
    directory: Path
    logbook: Logbook
    model: GPT
    optimizer: MuonAdamW
    feed: Feed
    meta: dict[str, Any]  # architecture, tokenizer, knobs: stored in every checkpoint
    schedule: Schedule = field(default_factory=Schedule)
    evaluations: Sequence[Evaluation] = ()
    budget_seconds: float = 0.0  # 0: the feed alone decides when the run ends
    save_every: float = 0.0  # as Evaluation.every, besides the saves before evaluations
    save_seconds: float = 0.0  # saves by the clock, besides these; 0: none
    keep: int = 2
    patience: int = 0  # end after so many evaluations without a better val_bpb; 0: never
    peak_flops: float = 0.0  # measured matrix-product peak of all devices together, 0 = unknown
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None  # {"step", "val_bpb"}
    stale: int = 0  # evaluations since the best one
    scale: float = 2.0**10  # loss scale of float16 runs, applied to a token's loss
    costs: dict[str, float] = field(default_factory=dict)  # seconds of each evaluation and a save
    sizes: dict[str, int] = field(default_factory=dict)  # units that each sized evaluation reads
    spent: dict[str, float] = field(default_factory=dict)  # seconds by what they went to
    evaluated_to: Sequence[float] = (0, 0.0)  # (step, progress) to which every due evaluation ran
    saved_step: int = -1
    done: bool = False  # trained to the end and evaluated for the last time
    last: dict[str, Any] = field(default_factory=dict)  # latest numbers of every evaluation

    @property
    def reserve(self) -> float:
        """Seconds of the budget that are reserved for the last save and the last evaluations."""
        return sum(self.costs.values())

    @property
    def progress(self) -> float:
        """The share of the run that is over, 0..1: of its feed or its time, the larger one."""
        if self.budget_seconds <= 0:
            return self.feed.progress
        # the reserve counts as spent, so that the rate reaches its floor when training ends
        spent = self.seconds / max(self.budget_seconds - self.reserve, 1e-9)
        return min(1.0, max(self.feed.progress, spent))

    def fit(self) -> dict[str, Any]:
        """
        Train until the feed or the time budget ends; returns the summary that is also logged.

        Raises Interrupted after a signal (the run is saved), UserError when the loss is no longer
        finite (the last good checkpoint is kept) and when the budget holds no step. A budget
        includes opening, compiling, evaluating and saving. A run overshoots it by at most the step
        under way and what the last evaluations and save take longer than any before.
        """
        self._line, self._average = StatusLine(), None
        self._began, self._seconds_before = self.clock(), self.seconds
        self._trained, self._flops, self._training_seconds = 0, 0.0, 1e-9  # in this session
        self._flops_per_token = cache(self.model.flops_per_token)
        with _Signals() as signals, _collector_at_rest() as rest:
            self._evaluate_at_start()
            self._start = self.progress
            while (progress := self._tick()) < 1.0 and not self._turned:
                batches = self._next_batches(progress)
                if batches is None:
                    break
                after = self._train_step(batches, progress)
                if after >= 1.0:
                    break
                rest()
                if any(sum_over_ranks([signals.caught], self.runtime)):
                    self.save()
                    self._line.print(
                        f"saved step {self.step:,} in {self.directory}; continue with --resume auto"
                    )
                    raise Interrupted
                if self._save_is_due(after):
                    self.save()
                self._evaluate(self._scheduled(after), after)
            if self.step == 0 and self.budget_seconds > 0:
                raise UserError(self._no_time())
            if not self._turned:
                self.save()
                self._evaluate(self.evaluations, self.progress)
            if self.patience and self.stale:
                self._return_to_best()
            self.done = True
            self._amend()
        # a signal of the last moments stops what would follow, not the run
        return self._summarize() | ({"signal": signals.caught} if signals.caught else {})

    # time -----------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        """Seconds of this run so far, including those of earlier sessions."""
        return self._seconds_before + self.clock() - self._began

    def _tick(self) -> float:
        """Read the clock; returns progress."""
        self.seconds = from_main(self._elapsed(), self.runtime)
        return self.progress

    @contextmanager
    def _timed(self, what: str) -> Iterator[Stopwatch]:
        """Time a block and add its seconds to `spent`; those of the compiler count on their own."""
        watch, began, compiling = Stopwatch(), self.clock(), compiler.seconds()
        try:
            yield watch
        finally:
            compiled = compiler.seconds() - compiling
            watch.seconds = max(0.0, self.clock() - began - compiled)
            for name, seconds in ((what, watch.seconds), ("compiling", compiled)):
                self.spent[name] = self.spent.get(name, 0.0) + seconds

    # steps ----------------------------------------------------------------------------------------

    def _next_batches(self, progress: float) -> list[Batch] | None:
        """The micro-batches of the next step; None when the feed has ended."""
        if change := self.feed.set_progress(progress):
            release_memory()
            if self.model.compiled:
                compiler.forget_shapes()
            self._line.print(f"step {self.step + 1:,}  {change}")
        with self._timed("batches"):
            return next(self.feed, None)

    def _train_step(self, batches: list[Batch], progress: float) -> float:
        """One update with its counters and its row in the logbook; returns progress after it."""
        lr_mult = self.schedule.lr_mult(progress)
        with self._timed("steps") as watch:
            loss = self._update(batches, lr_mult, self.schedule.momentum_at(self.step))
        self._training_seconds += watch.seconds

        sizes = [(b.inputs.numel(), self._flops_per_token(b.inputs.size(1))) for b in batches]
        tokens, flops = sum_over_ranks(
            [sum(n for n, _ in sizes), sum(n * flops for n, flops in sizes)], self.runtime
        )
        self.step += 1
        self.tokens += int(tokens)
        self._trained += int(tokens)
        self._flops += flops
        after = self._tick()
        self.model.set_progress(after)

        numbers = {
            "progress": round(after, 6),
            "loss": loss,
            "lr_mult": lr_mult,
            "tok_per_sec": self._tokens_per_second(),
            **getattr(self.feed, "numbers", {}),  # from a feed that makes its own data
        }
        if self.peak_flops:
            share = self._flops / self._training_seconds / self.peak_flops
            numbers["peak_share"] = round(share, 4)
        self._log("train", numbers)
        self._show(numbers)
        return after

    def _update(self, batches: list[Batch], lr_mult: float, momentum: float) -> float:
        """
        Forward, backward and update over a step's micro-batches; returns the step's loss. Halves
        the micro-batches when memory runs out. The host waits for the device once, for the loss,
        while the device already runs the update.
        """
        runtime = self.runtime
        (valid,) = sum_over_ranks([sum(b.count() for b in batches)], runtime)
        if valid == 0:  # nothing to learn from: no gradient, and no step of momentum either
            return 0.0
        half = runtime.dtype is torch.float16
        # a short batch, as at the end of an epoch, would be compiled on its own
        shape = getattr(self.feed, "micro_batch", None) if self.model.compiled else None
        # float16 gradients keep the size of one token's; the division by N comes after
        scale = self.scale if half else 1 / valid

        def backward(rows: int) -> torch.Tensor:
            if rows < most and self.model.compiled:
                compiler.forget_shapes()  # of more rows, which never return
            self.optimizer.zero_grad()
            total = torch.zeros((), device=runtime.device)
            for b in recut(batches, rows):
                if shape and shape[1] in (0, b.inputs.size(1)):
                    b = filled_up(b, shape[0] if rows == most else min(rows, shape[0]))
                loss = self.model.loss(b.inputs, b.targets, b.weights)
                (loss * scale).backward()
                total += loss.detach()
            return total

        most = max(b.inputs.size(0) for b in batches)
        total, fitting_rows = compiler.guarded(
            self.model, lambda: halve_until_it_fits(backward, most, "a micro-batch")
        )
        if runtime.device.type == "cpu":
            keep_freed_memory()
        if fitting_rows < most:
            self.feed.device_rows = fitting_rows
        sums = torch.stack([total, self._unscale(valid)] if half else [total])
        if runtime.world_size > 1:
            dist.all_reduce(sums)
        read = runtime.reading(sums)
        if not half:
            self.optimizer.step(lr_mult, momentum)
        loss, *largest = read()
        value = loss / valid
        if not math.isfinite(value):
            raise UserError(self._diverged(f"the loss is {value}"))
        if half and self._has_no_overflow(*largest):
            self.optimizer.step(lr_mult, momentum)
        return value

    def _unscale(self, valid: int) -> torch.Tensor:
        """Divide the gradients by the loss scale and by N; returns the largest absolute value."""
        grads = [p.grad for p in self.optimizer.params if p.grad is not None]
        for g in grads:
            g.div_(self.scale * valid)
        return torch.nn.utils.get_total_norm(grads, math.inf)

    def _has_no_overflow(self, largest: float) -> bool:
        """
        Whether the largest gradients of all ranks are finite; if not, all ranks skip the update.
        The loss scale halves on an overflow and doubles over 1,000 good steps, up to what float16
        itself can hold.
        """
        if math.isfinite(largest):
            self.scale = min(2.0**15, self.scale * 2 ** (1 / 1000))
            return True
        self.scale = max(2.0**-10, self.scale / 2)
        return False

    # evaluations ----------------------------------------------------------------------------------

    def _evaluate_at_start(self) -> None:
        """Evaluate before the first step, or what was due when the run was stopped."""
        progress = self._tick()
        self._saved_at = self.seconds
        step, evaluated = self.evaluated_to
        if self.step == 0:
            first = [e for e in self.evaluations if e.start or self.budget_seconds > 0]
            self._evaluate(first, progress)
            progress = evaluated = self._tick()
        self.evaluated_to = step, min(evaluated, progress)  # a new horizon may set progress back
        if step < self.step:
            self._evaluate(self._scheduled(progress), progress)

    def _scheduled(self, progress: float) -> list[Evaluation]:
        """
        The evaluations due at this progress; none if they would take time from the last ones, which
        are then about to run.
        """
        before = self.evaluated_to[1]
        now = [e for e in self.evaluations if due(self._every(e), self.step, before, progress)]
        seconds = sum(self.costs.get(name, 0.0) for name in ("save", *(e.name for e in now)))
        if 0 < self.budget_seconds < self.seconds + seconds + self.reserve:
            return []
        return now

    def _every(self, evaluation: Evaluation) -> float:
        """
        How often an evaluation runs: a share of a time budget grows where the saves before the
        evaluations would take more than SAVING of it.
        """
        every, save = evaluation.every, self.costs.get("save", 0.0)
        if evaluation.size is None or every >= 1 or self.budget_seconds <= 0 or save <= 0:
            return every
        most = int(SAVING * self.budget_seconds / save)
        return max(every, 1 / most) if most > 1 else 0.0

    def _evaluate(self, evaluations: Sequence[Evaluation], progress: float) -> None:
        """Save, run the evaluations, log their numbers and note them in the checkpoint."""
        if evaluations:
            self.save()
        for evaluation in evaluations:
            about = self.costs.get(evaluation.name, 0.0)
            self._line.show(
                f"step {self.step:,}  measuring: {evaluation.name}"
                + (f", about {duration(about)}" if about >= 1 else "")
            )
            numbers = self._measure(evaluation)
            if not numbers:
                continue
            self.last[evaluation.name] = numbers
            bpb = numbers.get("val_bpb", math.nan)
            if bpb < (self.best["val_bpb"] if self.best else math.inf):  # never true of a NaN
                self.best, self.stale = {"step": self.step, "val_bpb": bpb}, 0
            elif "val_bpb" in numbers:
                self.stale += 1
            self._log(evaluation.name, numbers)
            shown = [f"{k} {v:.4f}" for k, v in numbers.items() if isinstance(v, float)]
            if shown:
                self._line.print(f"step {self.step:,}  {evaluation.name}: {'  '.join(shown)}")
        self.evaluated_to = self.step, progress
        if evaluations:
            self._amend()

    def _measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """
        The numbers of an evaluation; notes its cost. One that has a size measures the least part
        of it first, whose speed decides the rest; it keeps its size unless it becomes too slow.
        """
        name, size = evaluation.name, evaluation.size
        if size is None:
            numbers, seconds = self._timed_measure(evaluation)
            self.costs[name] = max(self.costs.get(name, 0.0), seconds)
            return numbers
        first, size.now = name not in self.sizes, self.sizes.get(name, size.least)
        numbers, seconds = self._timed_measure(evaluation)
        if first and (units := size.affordable(seconds / size.now)) > size.now:
            size.now = units
            numbers, seconds = self._timed_measure(evaluation)
        pace = seconds / size.now
        size.adapt(pace)
        self.sizes[name], self.costs[name] = size.now, pace * size.now
        return numbers

    def _timed_measure(self, evaluation: Evaluation) -> tuple[dict[str, Any], float]:
        """The numbers of an evaluation, and its seconds: the same on all ranks."""
        with self._timed(evaluation.name) as watch:
            numbers = _guarded(evaluation)
        return numbers, from_main(watch.seconds, self.runtime)

    # checkpoints ----------------------------------------------------------------------------------

    def save(self, again: bool = False) -> None:
        """Write a checkpoint of this step unless it was written. Every rank must call it."""
        if self.saved_step == self.step and not again:
            return
        with self._timed("save") as watch:
            tensors = self.optimizer.state_tensors()
            if self.runtime.is_main:
                if self.saved_step >= 0 and not self._saved_exists():
                    notice(
                        f"the checkpoint of step {self.saved_step} in {self.directory} was deleted "
                        "by another program; the run continues and saves again"
                    )
                if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
                    raise UserError(self._diverged("the weights are no longer finite"))
                weights = self.model.state_dict()
                checkpoint.save(self.directory, self.step, weights, tensors, self._meta())
                best = self.best["step"] if self.best else None
                checkpoint.prune(
                    self.directory, self.step, self.keep, best, self.meta.get("run_id")
                )
        self.saved_step, self._saved_at = self.step, self.seconds
        seconds = from_main(watch.seconds, self.runtime)
        self.costs["save"] = max(self.costs.get("save", 0.0), seconds)

    def _saved_exists(self) -> bool:
        """Whether the newest checkpoint that this run wrote is still there."""
        return checkpoint.at_step(self.directory, self.saved_step).path.exists()

    def _save_is_due(self, progress: float) -> bool:
        """
        Whether the steps or the clock ask for a checkpoint now. Saves by the clock take at most a
        twentieth of the time, and none from the last evaluations.
        """
        if due(self.save_every, self.step, self.evaluated_to[1], progress):
            return True
        cost = self.costs.get("save", 0.0)
        wait = max(self.save_seconds, 20 * cost)
        if self.save_seconds <= 0 or self.seconds < self._saved_at + wait:
            return False
        return not 0 < self.budget_seconds < self.seconds + cost + self.reserve

    def restore(self, stored: Checkpoint) -> None:
        """Return to the state of a checkpoint: weights, optimizer, feed, clock and counters."""
        meta = stored.meta
        stored.load_weights(self.model)
        try:
            self.optimizer.load_state_tensors(stored.moments(self.model), meta["updates"])
        except KeyError as e:
            raise UserError(
                f"cannot resume from {stored}, whose optimizer's state lacks {e}: choose an "
                "earlier checkpoint, or start a new run"
            ) from e
        self.feed.load_state_dict(meta["feed"])
        self.step = self.saved_step = meta["step"]
        self.evaluated_to = self.step, 1.0  # unless it is stored
        for name in STORED:
            setattr(self, name, meta.get(name, getattr(self, name)))

    @property
    def _turned(self) -> bool:
        """Whether the evaluations have become no better for as long as the run has patience."""
        return 0 < self.patience <= self.stale

    def _return_to_best(self) -> None:
        """End where val_bpb was lowest: later checkpoints are dropped. Every rank must call it."""
        assert self.best
        self._line.print(
            f"val_bpb has not improved for {self.stale} evaluations: ending with the best "
            f"checkpoint, that of step {self.best['step']:,}"
        )
        spent = self.spent  # the time has passed all the same
        self.restore(checkpoint.at_step(self.directory, self.best["step"]))
        self.spent = spent
        self.logbook.back_to(self.step)
        self._tick()
        if self.runtime.is_main:
            checkpoint.drop_after(self.directory, self.step, self.meta.get("run_id"))

    def _amend(self) -> None:
        """Note the clock and the latest numbers in this step's checkpoint."""
        self._tick()
        if not from_main(self._saved_exists(), self.runtime):
            self.save(again=True)
        elif self.runtime.is_main:
            checkpoint.at_step(self.directory, self.step).amend(self._meta())

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint stores besides tensors; a skipped step counts, but is no update."""
        return {
            **self.meta,
            **{name: getattr(self, name) for name in STORED},
            "done": self.done,
            "updates": self.optimizer.steps,
            "progress": self.progress,
            "feed": self.feed.state_dict(),
        }

    # reports --------------------------------------------------------------------------------------

    def _tokens_per_second(self) -> float:
        return round(self._trained / self._training_seconds, 1)

    def _log(self, kind: str, numbers: dict[str, Any]) -> None:
        seconds = round(self._elapsed(), 3)
        self.logbook.log(kind=kind, step=self.step, tokens=self.tokens, seconds=seconds, **numbers)

    def _show(self, numbers: dict[str, Any]) -> None:
        """The status line: the mean loss of late, speed and the time left."""
        loss, progress = numbers["loss"], self.progress
        self._average = loss if self._average is None else 0.9 * self._average + 0.1 * loss
        if not self._line.due:
            return
        pace = (progress - self._start) / max(self.clock() - self._began, 1e-9)
        seconds_left = (1 - progress) / max(pace, 1e-9)
        if self.budget_seconds > 0:
            seconds_left = min(seconds_left, self.budget_seconds - self.seconds)
        share = f"  {numbers['peak_share']:.0%} of peak" if self.peak_flops else ""
        reward = f"  reward {numbers['reward']:.2f}" if "reward" in numbers else ""
        self._line.show(
            f"step {self.step:,}  {progress:6.1%}  loss {self._average:.4f}  "
            f"{human(numbers['tok_per_sec'])} tok/s{share}{reward}  lr x{numbers['lr_mult']:.2f}  "
            f"{duration(max(0.0, seconds_left))} left"
        )

    def _summarize(self) -> dict[str, Any]:
        spent = {name: round(seconds, 2) for name, seconds in self.spent.items() if seconds}
        summary = {
            "steps": self.step,
            "loss": self._average,
            "spent": spent,
            "training_seconds": round(self._training_seconds, 2),
            "tok_per_sec": self._tokens_per_second(),
            "peak_memory_bytes": self.runtime.peak_memory(),
        }
        self._log("summary", summary)
        self._line.print(
            f"done: {self.step:,} steps, {human(self.tokens)} tokens in {duration(self.seconds)}, "
            f"{self.directory}"
        )
        self._line.print(f"  time: {describe(spent, self.seconds)}")
        return {"tokens": self.tokens, "seconds": self.seconds, **summary, **self.last}

    def _no_time(self) -> str:
        over, reserve = self.seconds, self.reserve
        return (
            f"a budget of {self.budget_seconds:.3g} s is too short for one step: {over:.3g} s "
            f"passed before the first one, and {reserve:.3g} s are reserved for the last "
            f"evaluation and save; give at least --max_minutes={2 * (over + reserve) / 60:.2g}, "
            "or evaluate less with --eval_tokens"
        )

    def _diverged(self, what: str) -> str:
        kept = "there is no checkpoint yet"
        if self.saved_step >= 0:
            kept = f"the checkpoint of step {self.saved_step} in {self.directory} is kept"
        return (
            f"{what} at step {self.step}: {kept}; lower the learning rates (--lr_scale=0.5) and "
            "start again, or resume from it"
        )


def recut(batches: list[Batch], rows: int) -> list[Batch]:
    """The same rows in micro-batches of at most `rows` and of nearly equal size."""
    out = []
    for b in batches:
        cuts = -(-b.inputs.size(0) // rows)
        inputs, targets = b.inputs.tensor_split(cuts), b.targets.tensor_split(cuts)
        weights = [None] * cuts if b.weights is None else b.weights.tensor_split(cuts)
        out += map(Batch, inputs, targets, weights)
    return out


def filled_up(batch: Batch, rows: int) -> Batch:
    """A batch with ignored rows added, if it has fewer than `rows`."""
    missing = rows - batch.inputs.size(0)
    if missing <= 0:
        return batch
    below = 0, 0, 0, missing  # nothing left, right and above
    weights = None if batch.weights is None else pad(batch.weights, below)
    return Batch(pad(batch.inputs, below), pad(batch.targets, below, value=-1), weights)


def _guarded(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation that runs out of memory costs its numbers, never the run."""
    try:
        return evaluation.measure()
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        notice(f"out of memory in {evaluation.name}: no result at this step; training continues")
        return {}


def sum_over_ranks(numbers: Sequence[float], runtime: Runtime) -> list[Any]:
    """Every number summed over the ranks."""
    if runtime.world_size == 1:
        return list(numbers)
    t = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(t)
    return t.tolist()


def from_main(x: float, runtime: Runtime) -> float:
    """Rank 0's value, so that all ranks see one clock and one signal."""
    if runtime.world_size == 1:
        return x
    t = torch.tensor(x, dtype=torch.float64)
    dist.broadcast(t, src=0)
    return float(t)
