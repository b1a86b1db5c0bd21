"""
The training loop of all stages: each step takes a list of micro-batches and makes one update.

The learning rate, evaluations, saves and the end of a run follow its progress, from 0 to 1. Stages
differ in the feed that provides batches; the loop does not know which stage it trains. The loss is
always sum(weights * nll) / N, with N the number of valid targets in all micro-batches of the step
on all ranks, so an update does not depend on how its batch is divided. A run that ends early (a
signal, a NaN, no memory) leaves a checkpoint from which `--resume auto` continues.
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
from nanochat.base.hardware import OtherPrograms
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
    Provides a stage's batches: next(feed) returns the micro-batches of one step, of at most
    `device_rows` rows each. The loop lowers device_rows when memory runs out, which does not change
    the rows of a step. Before every step it calls set_progress with the share of the run that is
    over; if the batches change there, the feed returns a sentence about it to print, else "".
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
    SIGINT, SIGTERM and SIGHUP (a closed terminal) set a flag that the loop reads. A second Ctrl+C
    raises KeyboardInterrupt at once, unless it follows within a second: torchrun and shells forward
    a signal to processes that have already received it.
    """

    def __enter__(self):
        self.caught, self.caught_at = 0, 0.0
        self.previous = {}
        for number in compiler.STOPPING:
            if number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup, which lets a program outlive its terminal
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
            # Another rank has failed: the launcher's SIGTERM must not end this process before it
            # has printed its error
            return
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def _old_objects_uncollected() -> Iterator[Callable[[], None]]:
    """
    Yields a function to call repeatedly. Objects that exist at its first call are left out of
    garbage collection until the block ends: torch and its compiler have half a million, and to
    visit them stops the host, and with it a GPU. In a program that has frozen objects of its own,
    nothing is changed, because only all of them together can be released.
    """
    if gc.get_freeze_count():
        yield lambda: None
        return

    @cache
    def freeze() -> None:
        gc.collect(1)
        gc.freeze()

    try:
        yield freeze
    finally:
        gc.unfreeze()


# The largest share of a time budget for the saves before evaluations: if they would take more,
# evaluations whose interval is a share of the run become fewer
SAVING = 0.03


@dataclass
class Stopwatch:
    """The seconds that a block of work took, without those of the compiler."""

    seconds: float = 0.0


@dataclass(kw_only=True)
class RunState:
    """How far a run has come, in fields that a checkpoint stores as they are."""

    tokens: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None  # {"step", "val_bpb"}
    stale: int = 0  # evaluations since the best one
    scale: float = 2.0**10  # loss scale of float16 runs, applied to a token's loss
    costs: dict[str, float] = field(default_factory=dict)  # seconds of each evaluation and a save
    sizes: dict[str, int] = field(default_factory=dict)  # Size.now of each evaluation that has one
    spent: dict[str, float] = field(default_factory=dict)  # seconds by activity, as in spent.WORDS
    evaluated_to: Sequence[float] = (0, 0.0)  # (step, progress) up to which evaluations have run
    last: dict[str, Any] = field(default_factory=dict)  # latest numbers of every evaluation


STORED = [*vars(RunState())]  # the names of these fields


@dataclass
class Run(RunState):
    """One run of one stage: what it trains, where it lives, how it proceeds."""

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
    save_seconds: float = 0.0  # besides these, save when so many seconds have passed; 0: never
    keep: int = 2  # checkpoints, besides the best
    patience: int = 0  # end after so many evaluations without a better val_bpb; 0: never
    peak_flops: float = 0.0  # measured matrix-product peak of all devices together, 0 = unknown
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    saved_step: int = -1  # of the newest checkpoint; -1: none
    done: bool = False  # trained to the end and evaluated for the last time

    @property
    def reserve(self) -> float:
        """Seconds of the budget that are kept for the last save and the last evaluations."""
        return sum(self.costs.values())

    @property
    def progress(self) -> float:
        """The share of the run that is over, 0..1: that of its feed or its time, if larger."""
        if self.budget_seconds <= 0:
            return self.feed.progress
        # Without the reserve, so that the learning rate reaches its floor when training ends
        spent = self.seconds / max(self.budget_seconds - self.reserve, 1e-9)
        return min(1.0, max(self.feed.progress, spent))

    def fit(self) -> dict[str, Any]:
        """
        Train until the feed or the time budget ends; returns the summary that is also logged.

        Raises Interrupted after a signal (the run is saved), and UserError when the loss is no
        longer finite (the last good checkpoint is kept) or the budget is too short for one step. A
        budget includes opening, compiling, evaluating and saving. A run overshoots it by at most
        one step, and by as much as the last evaluations and save take longer than earlier ones.
        """
        self._line, self._average = StatusLine(), None
        alone = self.runtime.device.type == "cpu" and self.runtime.world_size == 1
        self._others = OtherPrograms() if alone else None  # until the user was warned of them
        self._began, self._seconds_before = self.clock(), self.seconds
        self._trained, self._flops, self._training_seconds = 0, 0.0, 1e-9  # in this session
        self._flops_per_token = cache(self.model.flops_per_token)
        with _Signals() as signals, _old_objects_uncollected() as freeze:
            self._evaluate_at_start()
            self._start = self.progress
            while (progress := self._tick()) < 1.0 and not self._out_of_patience:
                batches = self._next_batches(progress)
                if batches is None:
                    break
                progress = self._train_step(batches, progress)
                if progress >= 1.0:
                    break
                freeze()
                if any(sum_over_ranks([signals.caught], self.runtime)):
                    self.save()
                    self._line.print(
                        f"saved step {self.step:,} in {self.directory}; continue with --resume auto"
                    )
                    raise Interrupted
                if self._save_is_due(progress):
                    self.save()
                self._evaluate(self._scheduled(progress), progress)
            if self.step == 0 and self.budget_seconds > 0:
                raise UserError(self._too_short())
            if not self._out_of_patience:
                self.save()
                self._evaluate(self.evaluations, self.progress)
            if self.patience and self.stale:
                self._return_to_best()
            self.done = True
            self._amend()
        # A signal after the last step: this run is complete, but the caller should start no other
        return self._summarize() | ({"signal": signals.caught} if signals.caught else {})

    # time -----------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        """Seconds of this run so far, including those of earlier sessions."""
        return self._seconds_before + self.clock() - self._began

    def _tick(self) -> float:
        """Update `seconds`, to rank 0's clock; returns the progress."""
        self.seconds = from_main(self._elapsed(), self.runtime)
        return self.progress

    def _can_afford(self, seconds: float) -> bool:
        """Whether the budget, if there is one, has so many seconds besides the reserve."""
        needed = self.seconds + seconds + self.reserve
        return self.budget_seconds <= 0 or needed <= self.budget_seconds

    @contextmanager
    def _timed(self, activity: str) -> Iterator[Stopwatch]:
        """Time a block and add its seconds to spent[activity], or to spent["compiling"]."""
        watch, began, compiled_before = Stopwatch(), self.clock(), compiler.seconds()
        try:
            yield watch
        finally:
            compiling = compiler.seconds() - compiled_before
            watch.seconds = max(0.0, self.clock() - began - compiling)
            for name, seconds in ((activity, watch.seconds), ("compiling", compiling)):
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
        """Make one update, count and log it; returns the progress after it."""
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
        progress = self._tick()
        self.model.set_progress(progress)

        numbers = {
            "progress": round(progress, 6),
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
        return progress

    def _update(self, batches: list[Batch], lr_mult: float, momentum: float) -> float:
        """
        Forward, backward and update over a step's micro-batches; returns the step's loss. The host
        waits for the device once, for the loss, while the device already runs the update.
        """
        runtime = self.runtime
        (valid,) = sum_over_ranks([sum(b.count() for b in batches)], runtime)
        if valid == 0:  # nothing to learn from: no gradient, and no step of momentum either
            return 0.0
        half = runtime.dtype is torch.float16
        # float16 would lose small gradients: there, they are divided by N afterwards
        total = self._backward(batches, self.scale if half else 1 / valid)
        sums = torch.stack([total, self._unscale(valid)] if half else [total])
        if runtime.world_size > 1:
            dist.all_reduce(sums)
        wait_for_sums = runtime.reading(sums)
        if not half:
            self.optimizer.step(lr_mult, momentum)
        loss, *largest_gradient = wait_for_sums()
        value = loss / valid
        if not math.isfinite(value):
            raise UserError(self._diverged(f"the loss is {value}"))
        if half and self._adjust_scale(*largest_gradient):
            self.optimizer.step(lr_mult, momentum)
        return value

    def _backward(self, batches: list[Batch], scale: float) -> torch.Tensor:
        """
        Compute the gradients of `scale` times the loss summed over micro-batches; returns that sum,
        unscaled. Halves the micro-batches, from now on, when memory runs out.
        """
        most_rows = max(b.inputs.size(0) for b in batches)
        # Compiled code is for one shape: short batches, as at the end of an epoch, are filled up
        shape = getattr(self.feed, "micro_batch", None) if self.model.compiled else None

        def backward(rows: int) -> torch.Tensor:
            if rows < most_rows and self.model.compiled:
                compiler.forget_shapes()  # of more rows, which never return
            self.optimizer.zero_grad()
            total = torch.zeros((), device=self.runtime.device)
            for b in recut(batches, rows):
                if shape and shape[1] in (0, b.inputs.size(1)):
                    b = filled_up(b, shape[0] if rows == most_rows else min(rows, shape[0]))
                loss = self.model.loss(b.inputs, b.targets, b.weights)
                (loss * scale).backward()
                total += loss.detach()
            return total

        total, fitting_rows = compiler.guarded(
            self.model, lambda: halve_until_it_fits(backward, most_rows, "a micro-batch")
        )
        if self.runtime.device.type == "cpu":
            keep_freed_memory()
        if fitting_rows < most_rows:
            self.feed.device_rows = fitting_rows
        return total

    def _unscale(self, valid: int) -> torch.Tensor:
        """Divide the gradients by the loss scale and by N; returns the largest absolute value."""
        grads = [p.grad for p in self.optimizer.params if p.grad is not None]
        for g in grads:
            g.div_(self.scale * valid)
        return torch.nn.utils.get_total_norm(grads, math.inf)

    def _adjust_scale(self, largest_gradient: float) -> bool:
        """
        Adapt the loss scale; returns whether the gradients of all ranks are finite. If they are
        not, all ranks skip the update, and the scale halves; it doubles over 1,000 good steps, up
        to the largest power of two that float16 can hold.
        """
        if math.isfinite(largest_gradient):
            self.scale = min(2.0**15, self.scale * 2 ** (1 / 1000))
            return True
        self.scale = max(2.0**-10, self.scale / 2)
        return False

    # evaluations ----------------------------------------------------------------------------------

    def _evaluate_at_start(self) -> None:
        """Evaluate before the first step; on resume, what was due when the run was stopped."""
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
        The evaluations that are due at this progress; none if the budget has no time for them
        before the evaluations at its end.
        """
        before = self.evaluated_to[1]
        now = [e for e in self.evaluations if due(self._every(e), self.step, before, progress)]
        seconds = sum(self.costs.get(name, 0.0) for name in ("save", *(e.name for e in now)))
        return now if self._can_afford(seconds) else []

    def _every(self, evaluation: Evaluation) -> float:
        """
        evaluation.every, or a larger share of the run where the saves before the evaluations would
        take more than SAVING of the budget; 0, only at the end, if even two would.
        """
        every, save = evaluation.every, self.costs.get("save", 0.0)
        if evaluation.size is None or not 0 < every < 1 or self.budget_seconds <= 0 or save <= 0:
            return every
        affordable_saves = int(SAVING * self.budget_seconds / save)
        return max(every, 1 / affordable_saves) if affordable_saves > 1 else 0.0

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
            if bpb < (self.best["val_bpb"] if self.best else math.inf):  # false for a NaN
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
        The numbers of an evaluation, whose seconds are noted in `costs`. One with a Size measures
        its least size first, and then again as much as the speed allows. It keeps that size for the
        whole run, unless it becomes too slow.
        """
        name, size = evaluation.name, evaluation.size
        if size is None:
            numbers, seconds = self._timed_measure(evaluation)
            self.costs[name] = max(self.costs.get(name, 0.0), seconds)
            return numbers
        size.now = self.sizes.get(name, size.least)
        numbers, seconds = self._timed_measure(evaluation)
        affordable = size.affordable(seconds / size.now)
        if name not in self.sizes and affordable > size.now:
            size.now = affordable
            numbers, seconds = self._timed_measure(evaluation)
        seconds_per_unit = seconds / size.now
        size.adapt(seconds_per_unit)
        self.sizes[name] = size.now
        self.costs[name] = seconds_per_unit * size.now
        return numbers

    def _timed_measure(self, evaluation: Evaluation) -> tuple[dict[str, Any], float]:
        """The numbers of an evaluation, and its seconds on rank 0."""
        with self._timed(evaluation.name) as watch:
            numbers = _guarded(evaluation)
        return numbers, from_main(watch.seconds, self.runtime)

    # checkpoints ----------------------------------------------------------------------------------

    def save(self, again: bool = False) -> None:
        """
        Write a checkpoint of this step, unless there is one (with `again`, even then). Every rank
        must call it. UserError if the weights are not finite or the disk refuses.
        """
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
        Whether save_every or save_seconds asks for a checkpoint now. Saves by the clock take at
        most a twentieth of the time, and none of what is reserved for the end.
        """
        if due(self.save_every, self.step, self.evaluated_to[1], progress):
            return True
        cost = self.costs.get("save", 0.0)
        wait = max(self.save_seconds, 20 * cost)
        if self.save_seconds <= 0 or self.seconds < self._saved_at + wait:
            return False
        return self._can_afford(cost)

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
        for name in STORED:
            setattr(self, name, meta.get(name, getattr(self, name)))

    @property
    def _out_of_patience(self) -> bool:
        """Whether val_bpb has not improved for `patience` evaluations."""
        return 0 < self.patience <= self.stale

    def _return_to_best(self) -> None:
        """
        Return to the checkpoint with the lowest val_bpb and delete later ones. Every rank must call
        it.
        """
        assert self.best
        self._line.print(
            f"val_bpb has not improved for {self.stale} evaluations: ending with the best "
            f"checkpoint, that of step {self.best['step']:,}"
        )
        spent = self.spent  # includes the time after that checkpoint
        self.restore(checkpoint.at_step(self.directory, self.best["step"]))
        self.spent = spent
        self.logbook.back_to(self.step)
        self._tick()
        if self.runtime.is_main:
            checkpoint.drop_after(self.directory, self.step, self.meta.get("run_id"))

    def _amend(self) -> None:
        """Update the metadata of this step's checkpoint; save it again if it is gone."""
        self._tick()
        if not from_main(self._saved_exists(), self.runtime):
            self.save(again=True)
        elif self.runtime.is_main:
            checkpoint.at_step(self.directory, self.step).amend(self._meta())

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint stores besides tensors. "updates" does not count skipped steps."""
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
        """Show the status line, with a moving average of the loss."""
        loss, progress = numbers["loss"], self.progress
        self._average = loss if self._average is None else 0.9 * self._average + 0.1 * loss
        if not self._line.due:
            return
        progress_per_second = (progress - self._start) / max(self.clock() - self._began, 1e-9)
        seconds_left = (1 - progress) / max(progress_per_second, 1e-9)
        if self.budget_seconds > 0:
            seconds_left = min(seconds_left, self.budget_seconds - self.seconds)
        share = f"  {numbers['peak_share']:.0%} of peak" if self.peak_flops else ""
        reward = f"  reward {numbers['reward']:.2f}" if "reward" in numbers else ""
        self._line.show(
            f"step {self.step:,}  {progress:6.1%}  loss {self._average:.4f}  "
            f"{human(numbers['tok_per_sec'])} tok/s{share}{reward}  lr x{numbers['lr_mult']:.2f}  "
            f"{duration(max(0.0, seconds_left))} left"
        )
        if self._others and (warning := self._others.warning()):
            self._line.print(f"notice: {warning}")
            self._others = None

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

    def _too_short(self) -> str:
        """The error message of a budget that ended before the first step."""
        passed, reserve = self.seconds, self.reserve
        return (
            f"a budget of {self.budget_seconds:.3g} s is too short for one step: {passed:.3g} s "
            f"passed before the first one, and {reserve:.3g} s are reserved for the last "
            f"evaluation and save; give at least --max_minutes={2 * (passed + reserve) / 60:.2g}, "
            "or evaluate less with --eval_tokens"
        )

    def _diverged(self, what: str) -> str:
        """The error message of a run whose loss or weights are no longer finite."""
        kept, resume = "there is no checkpoint yet", ""
        if self.saved_step >= 0:
            kept = f"the checkpoint of step {self.saved_step} in {self.directory} is kept"
            resume = ", or resume from it"
        return (
            f"{what} at step {self.step}: {kept}; lower the learning rates (--lr_scale=0.5) and "
            f"start again{resume}"
        )


def recut(batches: list[Batch], rows: int) -> list[Batch]:
    """The same rows, in micro-batches of at most `rows` rows and of nearly equal size."""
    out = []
    for b in batches:
        cuts = -(-b.inputs.size(0) // rows)
        inputs, targets = b.inputs.tensor_split(cuts), b.targets.tensor_split(cuts)
        weights = [None] * cuts if b.weights is None else b.weights.tensor_split(cuts)
        out += map(Batch, inputs, targets, weights)
    return out


def filled_up(batch: Batch, rows: int) -> Batch:
    """A batch of at least `rows` rows: rows without targets are added to a smaller one."""
    missing = rows - batch.inputs.size(0)
    if missing <= 0:
        return batch
    below = 0, 0, 0, missing  # for pad: nothing left, right and above
    weights = None if batch.weights is None else pad(batch.weights, below)
    return Batch(pad(batch.inputs, below), pad(batch.targets, below, value=-1), weights)


def _guarded(evaluation: Evaluation) -> dict[str, Any]:
    """The numbers of an evaluation; none, and a notice, if it runs out of memory."""
    try:
        return evaluation.measure()
    except (RuntimeError, UserError) as e:
        # A UserError has a cause if not even one row fitted; other ranks would not know of it
        cause = e.__cause__ if isinstance(e, UserError) and world_size() == 1 else e
        if not cause or not out_of_memory(cause):
            raise
        notice(f"out of memory in {evaluation.name}: no result at this step; training continues")
        return {}


def sum_over_ranks(numbers: Sequence[float], runtime: Runtime) -> list[Any]:
    """Every number, summed over the ranks. Every rank must call it."""
    if runtime.world_size == 1:
        return list(numbers)
    t = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(t)
    return t.tolist()


def from_main(x: float, runtime: Runtime) -> float:
    """Rank 0's x, on every rank, so that all decide alike. Every rank must call it."""
    if runtime.world_size == 1:
        return x
    t = torch.tensor(x, dtype=torch.float64)
    dist.broadcast(t, src=0)
    return float(t)
