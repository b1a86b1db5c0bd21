"""
Opens a stage: knobs with what they inherit, runtime, tokenizer, model, optimizer, horizon, run; and takes it to its end.

Everything that the training commands have in common stands here once; what tells them apart (the feed, the probes) stays in the scripts.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanochat.base import hardware, knobs
from nanochat.base.common import UserError, duration, human, notice, print0
from nanochat.base.logbook import Logbook
from nanochat.base.runtime import (
    Runtime,
    close_runtime,
    compiler_missing,
    open_runtime,
    out_of_memory,
)
from nanochat.data.contexts import Contexts
from nanochat.data.feed import RowFeed
from nanochat.data.shards import Shards
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.bits_per_byte import shard_bits_per_byte
from nanochat.model.checkpoint import Checkpoint, list_checkpoints, locate, newest
from nanochat.model.gpt import GPT
from nanochat.model.stages import run_directory
from nanochat.train import loop as trainer
from nanochat.train import resume
from nanochat.train.knobs import TrainKnobs
from nanochat.train.optim import Group, MuonAdamW
from nanochat.train.scaling import batch_for, compile_pays, width_scale

K = TypeVar("K", bound=TrainKnobs)
RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "gate_lr", "lr_scale")
INHERITED = (
    "dtype",
    "compile",
    "device_batch_size",
    *RATES,
    "run",
    "sinks",
    "seed",
    "name",
    "task_dir",
)
LENGTHS = ("num_iterations", "target_flops", "target_param_data_ratio")


@dataclass
class OpenRun:
    """A stage that is open: what a training script needs to make its feed and its probes."""

    name: str
    knobs: Any
    origins: dict[str, str]
    runtime: Runtime
    tokenizer: Tokenizer
    model: GPT
    directory: Path
    resume_from: Checkpoint | None
    peak_flops: float  # of all devices together
    began: float
    parent_meta: dict[str, Any] = field(
        default_factory=dict
    )  # of the checkpoint that the stage goes on from, if it has one

    @property
    def budget_seconds(self) -> float:
        return self.knobs.max_minutes * 60 or self.knobs.max_hours * 3600

    @property
    def contexts(self) -> Contexts:
        """The context stages of the run: one, but for a base_train that was given more."""
        return Contexts.parse(
            getattr(self.knobs, "context_stages", ()), self.model.config.sequence_len
        )

    def feed(
        self,
        shards: Sequence[tuple[Shards, float | None]],
        rows: int,
        steps: int | None,
        **more: Any,
    ) -> RowFeed:
        """The feed of this stage's rank, device and seed; `rows` are of the longest context, `more` goes to RowFeed."""
        k, rt = self.knobs, self.runtime
        ours = {
            "seed": k.seed,
            "rank": rt.rank,
            "world_size": rt.world_size,
            "device": rt.device,
            "device_rows": k.device_batch_size,
        }
        ours["contexts"] = self.contexts
        return RowFeed(
            shards,
            rows=rows,
            sequence_len=self.model.config.sequence_len,
            total_steps=steps,
            **ours,
            **more,
        )

    def stored(self, name: str) -> Any:
        """What the checkpoint to go on from says, None when starting or when the horizon is laid anew."""
        if self.resume_from is None or self.knobs.new_horizon:
            return None
        return self.resume_from.meta["horizon"].get(name)


def parse_knobs(
    cls: type[K],
    argv: Sequence[str] | None,
    command: str,
    stage: str,
    tag_of: Callable[[K], str],
    inherited: Mapping[str, Any] | None = None,
) -> tuple[K, dict[str, str], Checkpoint | None]:
    """
    The knobs of a training command: what the parent checkpoint hands down, or on resume what the run itself was started with, below recipe
    and command line. Returns (knobs, origins, the checkpoint to go on from or None).
    """
    k, origins = knobs.parse(cls, argv, command=command, inherited=inherited)
    if k.max_minutes and k.max_hours:
        raise UserError(
            f"--max_minutes={k.max_minutes:g} and --max_hours={k.max_hours:g} are two budgets: give one of them"
        )
    found = newest(run_directory(stage, tag_of(k)), optimizer=True) if k.resume == "auto" else None
    if found is None:
        return k, origins, None
    meta = found.meta
    before = {n: v for n, v in meta["knobs"].items() if n not in ("resume", "new_horizon")}
    replaced = (
        ("max_minutes", "max_hours") if k.max_minutes or k.max_hours else ()
    )  # a budget given now stands for one in the other unit
    k, origins = knobs.parse(
        cls, argv, command=command, inherited={n: v for n, v in before.items() if n not in replaced}
    )
    origins = {
        n: meta["origins"].get(n, o) if o == "inherited" else o for n, o in origins.items()
    }  # where the run itself had it from
    if not k.new_horizon:
        resume.same_horizons(before, asdict(k))
    return k, origins, found


def open_run(
    name: str,
    command: str,
    k: Any,
    origins: dict[str, str],
    tag: str,
    build: Callable[[Runtime, Tokenizer], GPT],
    resume_from: Checkpoint | None,
) -> OpenRun:
    """Runtime, tokenizer, model; prints what it opens. `build` makes the model with its weights of step 0."""
    began = time.monotonic()
    dtype = (
        resume_from.meta["dtype"] if resume_from else k.dtype
    )  # a measured choice is made once a run
    if k.dtype not in ("auto", dtype):
        notice(f"--dtype={k.dtype} is not followed: the run goes on in {dtype}, as it was started")
    rt = open_runtime(k.device_type, dtype, k.seed)
    tokenizer = Tokenizer.load()
    directory = run_directory(name, tag)
    if resume_from:
        resume_from.check_tokenizer(tokenizer.fingerprint)
    model = build(rt, tokenizer)
    if resume_from:
        resume.same_architecture(model.config, resume_from)
    measured = trainer.from_main(
        hardware.measured_peak(rt.device, rt.dtype), rt
    )  # the horizon hangs on it: one figure for all ranks
    peak = measured * (rt.world_size if rt.device.type == "cuda" else 1)
    print0(
        f"{command}: {tag} on {rt.device.type} x{rt.world_size}, {rt.dtype_name}, "
        f"measured peak {peak / 1e12:.3g} TFLOP/s"
    )
    print0(knobs.show(k, origins))
    print0(table_of_counts(model))
    return OpenRun(name, k, origins, rt, tokenizer, model, directory, resume_from, peak, began)


def set_aside(directory: Path) -> None:
    """A new run under a tag that is taken: the old one stays as <tag>.old, so that a slip of the hand costs nothing."""
    if not list_checkpoints(directory):
        return
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    directory.rename(old)
    notice(
        f"{directory.name} was trained before: that run is now {old} (--resume=auto would have gone on with it)"
    )


def table_of_counts(model: GPT) -> str:
    """Parameters by part with their shares, and what a token costs."""
    n = model.counts()
    rows = [(part, n[part]) for part in ("embedding", "transformer", "head") if n[part]]
    lines = [f"  {part:<12} {count:>13,}  {count / n['total']:6.1%}" for part, count in rows]
    tied = "  (embedding and head share one table)" if model.config.tie_embeddings else ""
    c = model.config
    heads = f"{c.n_head} heads of {c.head_dim} ({c.n_kv_head} key-value)"
    shape = f"{c.n_layer} layers, width {c.n_embd}, {heads}, MLP {c.hidden}, context {c.sequence_len}, vocabulary {c.vocab_size:,}"
    lines += [f"  prior        {model.prior.describe()}"] if model.prior else []
    return "\n".join(
        [
            f"  {shape}",
            *lines,
            f"  {'total':<12} {n['total']:>13,}  {human(model.flops_per_token())} FLOPs a token{tied}",
        ]
    )


def make_optimizer(model: GPT, k: Any, rt: Runtime, rate_scale: float = 1.0) -> MuonAdamW:
    """One group for every (optimizer, rate) of the roster. AdamW's rates follow the width, all rates follow lr_scale and rate_scale."""
    wide = width_scale(model.config.n_embd)
    rates = {
        "embedding": k.embedding_lr * wide,
        "head": k.unembedding_lr * wide,
        "matrix": k.matrix_lr,
        "gate": k.gate_lr,
    }
    groups: dict[tuple[str, str], Group] = {}
    for name, p, row in model.roster():
        decay = k.weight_decay if row.optimizer == "muon" else 0.0
        group = groups.setdefault(
            (row.optimizer, row.rate),
            Group(row.optimizer, [], [], rates[row.rate] * k.lr_scale * rate_scale, decay),
        )
        group.names.append(name)
        group.params.append(p)
    return MuonAdamW(
        groups.values(),
        torch.float32 if rt.dtype is torch.float32 and rt.device.type == "cpu" else torch.bfloat16,
    )


def whole_rows(total_batch_size: int, *lengths: int) -> int:
    """The rows of a batch of tokens, of the last of these lengths; UserError unless they are whole at each."""
    unit = math.lcm(*lengths)
    if total_batch_size % unit:
        near = max(1, round(total_batch_size / unit)) * unit
        rows = " and ".join(f"of {T}" for T in lengths)
        raise UserError(
            f"a batch of {total_batch_size:,} tokens is not a whole number of rows {rows}: try --total_batch_size={near}"
        )
    return total_batch_size // lengths[-1]


def choose_horizon(s: OpenRun) -> tuple[int, int | None]:
    """
    (rows of an optimizer step at the longest context, steps or None when a budget of time ends the run) from total_batch_size and one
    of num_iterations, target_flops, target_param_data_ratio, max_minutes, max_hours. UserError when two of them contradict each other,
    none is given, or what is given holds no step.
    """
    k, contexts = s.knobs, s.contexts
    if (rows := s.stored("rows")) is not None:
        return rows, s.stored("steps")
    for n in LENGTHS:
        if not 0 < (length := getattr(k, n)) < math.inf and length != -1:
            raise UserError(
                f"--{n}={length:g} is no length of a run: give a number above 0, or -1 for none"
            )
    named = [n for n in LENGTHS if getattr(k, n) > 0 and s.origins[n] != "default"]
    if len(named) > 1:
        raise UserError(
            f"{' and '.join(f'--{n}={getattr(k, n):g}' for n in named)} are two lengths for one run: give one (set the other to -1)"
        )
    fpt, total = contexts.mean(s.model.flops_per_token), s.model.counts()["total"]
    tokens = steps = None
    if named == ["num_iterations"]:
        steps = k.num_iterations
    elif named == ["target_flops"]:
        tokens = k.target_flops / fpt
    elif s.budget_seconds:
        tokens = (
            0.3 * s.peak_flops * s.budget_seconds / fpt
        )  # only to choose a batch: the clock ends the run
    elif k.target_param_data_ratio > 0:
        tokens = k.target_param_data_ratio * total
    if tokens is None and steps is None:
        raise UserError(
            "nothing says how long to train: give --num_iterations, --target_param_data_ratio, --target_flops or --max_minutes"
        )
    unit = math.lcm(*contexts.lengths)
    before = (
        s.resume_from.meta["horizon"]["rows"] * contexts.longest if s.resume_from else 0
    )  # a new length changes no batch
    batch = (
        k.total_batch_size
        or before
        or max(1, (1 << 19 if tokens is None else batch_for(tokens)) // unit) * unit
    )
    rows = whole_rows(batch, *contexts.lengths)
    if steps is None and not (s.budget_seconds and not named) and tokens is not None:
        steps = round(tokens / batch)
        if not steps:
            n = (named or ["target_param_data_ratio"])[0]
            need = getattr(k, n) * batch / tokens
            raise UserError(
                f"--{n}={getattr(k, n):g} is {tokens:,.0f} tokens, not one step of {batch:,}: give {need:.2g} or more, "
                "or a smaller --total_batch_size"
            )
    if s.budget_seconds and (least := batch * fpt / s.peak_flops) > s.budget_seconds:
        raise UserError(
            f"a budget of {s.budget_seconds:.3g} s holds no step: one of {batch:,} tokens takes {least:.3g} s or more here; "
            "give more time, a smaller --total_batch_size or a smaller --depth"
        )
    length = (
        f"{steps:,} steps, {human(steps * batch)} tokens"
        if steps
        else f"{duration(s.budget_seconds)}"
    )
    stages = ", ".join(
        f"{batch // T} rows of {T}" + (f" from {begin:.0%}" if begin else "")
        for begin, T in contexts.stages
    )
    print0(f"  {batch:,} tokens a step ({stages}); {length}")
    return rows, steps


def open_from_parent(
    cls: type[K], argv: Sequence[str] | None, command: str, name: str, parent: Callable[[K], str]
) -> OpenRun:
    """
    Open a stage that goes on from another's checkpoint: knobs named in INHERITED come down from it, the model and its tag too.
    """
    first, _ = knobs.parse(cls, argv, command=command)
    start = locate(parent(first), first.model_tag, getattr(first, "step", None))
    handed_down = {n: v for n, v in start.meta["knobs"].items() if n in INHERITED}
    tag = start.tag
    k, origins, resume_from = parse_knobs(cls, argv, command, name, lambda k: tag, handed_down)

    def build(rt: Runtime, tokenizer: Tokenizer) -> GPT:
        start.check_tokenizer(tokenizer.fingerprint)
        return start.model(rt.device, rt.dtype)

    s = open_run(name, command, k, origins, tag, build, resume_from)
    s.parent_meta = start.meta
    print0(f"  from {start}")
    return s


def conversation_horizon(s: OpenRun) -> tuple[int | None, int | None]:
    """(steps, epochs) of a stage on conversations: --num_iterations, else the budget of time, else --epochs."""
    k = s.knobs
    if k.num_iterations > 0 and s.budget_seconds:
        raise UserError(
            f"--num_iterations={k.num_iterations} and a budget of time are two lengths for one run: give one of them"
        )
    if k.epochs > 1 and (k.num_iterations > 0 or s.budget_seconds):
        other = "a budget of time" if s.budget_seconds else f"--num_iterations={k.num_iterations}"
        raise UserError(
            f"--epochs={k.epochs} and {other} are two lengths for one run: give one of them"
        )
    if k.num_iterations < 1 and k.num_iterations != -1:
        raise UserError(
            f"--num_iterations={k.num_iterations} is no length of a run: give a number above 0, or -1 for none"
        )
    if k.num_iterations > 0:
        return k.num_iterations, None
    return (None, None) if s.budget_seconds else (None, k.epochs)


def bits_per_byte_evaluation(
    s: OpenRun, val: Sequence[tuple[str, Shards, float | None]]
) -> trainer.Evaluation:
    """Bits per byte on the validation split of every named source, and their mean by weight."""
    token_bytes = s.tokenizer.token_bytes()

    def look() -> dict[str, float]:
        out, weights = {}, []
        for name, shards, weight in val:
            out[f"val_bpb/{name}"] = shard_bits_per_byte(
                s.model,
                shards,
                token_bytes,
                s.runtime,
                s.knobs.device_batch_size,
                s.knobs.eval_tokens,
            )
            weights.append(weight or 1.0)
        mean = sum(w * v for w, v in zip(weights, out.values(), strict=True)) / sum(weights)
        return {"val_bpb": mean, **(out if len(out) > 1 else {})}

    return trainer.Evaluation("eval", s.knobs.eval_every, look, start=True)


def compile_if_it_pays(s: OpenRun, rows: int, steps: int | None, one_shape: bool) -> bool:
    """Compile the model where that was asked for, or where it works and pays; on resume as the run did before. Returns whether."""
    k, device = s.knobs, s.runtime.device
    if k.compile == "auto" and s.stored("compiled") is not None:
        wanted = s.stored("compiled")
    elif k.compile == "auto":
        flops = (steps or 0) * rows * s.contexts.longest * s.contexts.mean(s.model.flops_per_token)
        seconds = s.budget_seconds or flops / (0.4 * s.peak_flops)
        wanted = one_shape and compile_pays(device.type, seconds, len(s.contexts.stages))
    else:
        wanted = k.compile == "on"
    missing = compiler_missing(device) if wanted else ""
    if missing:
        notice(f"running without torch.compile: {missing}")
    elif wanted:
        s.model.compile()
        print0("  compiling at the first step")
    return wanted and not missing


def train(
    s: OpenRun,
    feed: trainer.Feed,
    rows: int,
    steps: int | None,
    probes: Sequence[trainer.Evaluation],
    rate_scale: float = 1.0,
    one_shape: bool = True,
) -> dict[str, Any]:
    """Run the stage to its end (or go on with it) and return the summary. one_shape: whether (nearly) all batches have the same shape."""
    k, rt = s.knobs, s.runtime
    optimizer = make_optimizer(s.model, k, rt, rate_scale)
    meta = {
        "stage": s.name,
        "config": s.model.config.to_dict(),
        "tokenizer": s.tokenizer.fingerprint,
        "knobs": asdict(k),
        "origins": s.origins,
        "horizon": {
            "rows": rows,
            "steps": steps,
            "compiled": compile_if_it_pays(s, rows, steps, one_shape),
            "since": s.stored("since"),
        },
        "dtype": rt.dtype_name,
        "world_size": rt.world_size,
    }
    start = s.resume_from.step if s.resume_from else 0
    if not s.resume_from and rt.is_main:
        set_aside(s.directory)  # only now that nothing can be wrong any more with what was asked
    book = Logbook(
        s.directory,
        sinks=k.sinks if k.run != "dummy" else (),
        run_name=k.run,
        config=meta,
        step=start,
    )
    run = trainer.Run(
        rt,
        s.directory,
        book,
        meta,
        budget_seconds=s.budget_seconds,
        save_every=k.save_every,
        keep=k.keep,
        peak_flops=s.peak_flops,
    )
    if s.resume_from:
        trainer.restore(run, s.resume_from, s.model, optimizer, feed)
        done = s.resume_from.meta["done"] and (not k.new_horizon or run.progress(feed) >= 1)
        print0(
            f"  going on from {s.resume_from} (step {run.step:,}, {human(run.tokens)} tokens)"
            if not done
            else f"  {s.resume_from} is this run's end: nothing to do"
        )
        if done:
            return {"tokens": run.tokens, "seconds": run.seconds, **run.last}
    run.seconds += time.monotonic() - s.began  # opening the stage is part of its time
    schedule = (
        resume.going_on(asdict(k), s.resume_from, run, run.progress(feed))
        if s.resume_from
        else resume.schedule_of(asdict(k), {})
    )
    try:
        return trainer.fit(run, s.model, optimizer, feed, schedule, probes)
    finally:
        run.logbook.close()


@contextmanager
def session() -> Iterator[None]:
    """Around the work of a command: leaves the process group and puts out of memory in plain words."""
    try:
        yield
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        raise UserError(
            "out of memory, even with one row at a time: choose a smaller --depth, --model_dim or "
            "--sequence_len"
        ) from e
    finally:
        close_runtime()
