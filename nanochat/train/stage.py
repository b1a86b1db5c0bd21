"""
What the training commands put together for a stage: its data and feed, its evaluations and its
compilation. `train` then runs the stage to its end.
"""

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from nanochat.base.common import UserError, explained, human, notice, print0, user_path
from nanochat.base.files import release
from nanochat.base.hardware import describe_machine
from nanochat.base.knobs import show as show_knobs
from nanochat.base.logbook import Logbook
from nanochat.base.runtime import (
    close_runtime,
    compiler_missing,
    out_of_memory,
    rank_lost,
    tell_of_error,
)
from nanochat.chat.generate import Engine
from nanochat.data.feed import RowFeed, micro_batch_rows
from nanochat.data.shards import Shards, prepare
from nanochat.data.sources import Source, default_sources
from nanochat.data.summary import survey
from nanochat.eval.bits_per_byte import shard_bits_per_byte
from nanochat.eval.chat import visible_text
from nanochat.eval.tasks import mixture
from nanochat.model.checkpoint import new_run, newest, put_aside_after, require_space
from nanochat.model.stages import STAGES, run_directory
from nanochat.train import compiler, resume
from nanochat.train.evaluation import Evaluation, Size
from nanochat.train.horizon import Horizon, within_passes
from nanochat.train.loop import Feed, Run, from_main
from nanochat.train.run import OpenRun, make_optimizer
from nanochat.train.scaling import (
    MOST_EVAL_TOKENS,
    SAMPLING,
    USEFUL_PASSES,
    compile_pays,
    embedding_rate,
    evaluation_seconds,
    evaluation_tokens,
    evaluations_within,
)

QUESTIONS = (  # to sample replies to, while a stage that chats is trained
    "Hello!",
    "What is your name?",
    "What is the capital of France?",
    "How much is 7 plus 5?",
)
# Below this share of its usual bytes per token, a tokenizer was made for other text
OTHER_TEXT = 0.75
WeightedShards = list[tuple[Shards, float | None]]  # weight None: in proportion to its tokens


def row_feed(run: OpenRun, shards: WeightedShards, horizon: Horizon, **options: Any) -> RowFeed:
    """A RowFeed for the run, on this rank and device; `options` are more arguments of RowFeed."""
    return RowFeed(
        shards,
        rows=horizon.rows,
        device_rows=run.knobs.device_batch_size,
        sequence_len=run.model.config.sequence_len,
        total_steps=horizon.steps,
        epochs=horizon.epochs,
        seed=run.knobs.seed,
        rank=run.runtime.rank,
        world_size=run.runtime.world_size,
        device=run.runtime.device,
        contexts=run.contexts,
        few_widths=run.model.compiled,
        **options,
    )


def limited_feed(
    run: OpenRun, shards: WeightedShards, horizon: Horizon, characters: float
) -> tuple[Horizon, RowFeed]:
    """
    The feed of a pretraining run, and its horizon, which becomes shorter if the run would read its
    text too often. `characters`: how much text there is, as inventory.show returns it; if that is
    not known (infinity), only --max_passes limits the run.
    """
    feed = row_feed(run, shards, horizon)
    if characters == math.inf and not run.knobs.max_passes:
        return horizon, feed
    sources = survey(feed.order, [], feed.rows, horizon.steps).sources
    limited = within_passes(run, horizon, max(s.steps_per_pass for s in sources))
    return limited, feed if limited == horizon else row_feed(run, shards, limited)


def summarise_data(
    run: OpenRun, feed: RowFeed, validation: WeightedShards, horizon: Horizon
) -> None:
    """
    Summarise what the run will train on; `train` prints the summary and stores it in checkpoints.
    UserError for data that cannot be meant, unless the run resumes.
    """
    shards = [shards for shards, _ in validation]
    step_flops = horizon.rows * run.model.config.sequence_len * run.model.flops_per_token()
    in_budget = 0.3 * run.peak_flops * run.budget_seconds / step_flops  # steps, about
    # A limit that the time will not allow, such as that of within_passes, is not the length
    steps = None if 0 < 2 * in_budget < (horizon.steps or 0) else horizon.steps
    summary = survey(feed.order, shards, feed.rows, steps)
    run.data_lines, run.data_summary = summary.lines(), summary.record()
    if not run.resume_from:
        try:
            summary.check(USEFUL_PASSES, in_budget or None)
        except UserError:
            print_data(run)
            raise


def check_tokenizer(run: OpenRun, validation: WeightedShards) -> None:
    """Print a notice if the tokenizer seems to have been trained on text unlike that of the run."""
    documents = [shards.tokens(i) for shards, _ in validation for i in range(min(100, len(shards)))]
    if run.resume_from or not documents:
        return
    sizes = run.tokenizer.token_bytes()[np.concatenate(documents)]
    ordinary = sizes[sizes > 0]  # special tokens spell nothing
    bytes_per_token, usual = ordinary.sum() / max(1, len(ordinary)), run.tokenizer.bytes_per_token
    if bytes_per_token < OTHER_TEXT * usual:
        notice(
            f"a token spells {bytes_per_token:.1f} bytes of this text, and {usual:.1f} of the text "
            "that the tokenizer was trained on; if you train one on this text first (nanochat "
            "tok_train --data ...), the model reads more of it in the same time"
        )


def print_data(run: OpenRun) -> None:
    """Print the summary of the data."""
    for line in run.data_lines:
        print0(f"  {line}")


def bits_per_byte_evaluation(
    run: OpenRun, validation: WeightedShards, feed: RowFeed, horizon: Horizon
) -> Evaluation:
    """
    An evaluation of the bits per byte on the validation split of every source, and of their
    weighted mean, val_bpb.
    """
    token_bytes = run.tokenizer.token_bytes()
    size = evaluation_size(run, validation, feed, horizon)
    fitting: list[int] = []  # numbers of rows that fitted, when memory had run out

    def measure() -> dict[str, float]:
        rows, compiled = evaluation_rows(run, feed)
        tokens = size.now if size else run.knobs.eval_tokens
        by_source: dict[str, float] = {}
        total = total_weight = 0.0
        for shards, weight in validation:
            bpb = shard_bits_per_byte(
                run.model,
                shards,
                token_bytes,
                run.runtime,
                min([rows, *fitting]),
                tokens,
                compiled,
                fitting.append,
            )
            by_source[f"val_bpb/{shards.name}"] = bpb
            total += (weight or 1.0) * bpb
            total_weight += weight or 1.0
        numbers = {"val_bpb": total / total_weight}
        if len(by_source) > 1:
            numbers |= by_source
        if size:
            numbers["eval_tokens"] = tokens
        return numbers

    guarded = partial(compiler.guarded, run.model, measure)
    return Evaluation("eval", evaluation_interval(run), guarded, start=True, size=size)


def evaluation_interval(run: OpenRun) -> float:
    """--eval_every; if it is not given, it is set by the length of the run."""
    if run.knobs.eval_every < 0:
        run.resolve(eval_every=1 / evaluations_within(run.budget_seconds))
    return run.knobs.eval_every


def evaluation_size(
    run: OpenRun, validation: WeightedShards, feed: RowFeed, horizon: Horizon
) -> Size | None:
    """
    How many tokens of each source an evaluation reads, to be measured in a run with a time budget.
    None if --eval_tokens says it; without a budget, the length of the run sets --eval_tokens.
    """
    if run.knobs.eval_tokens:
        return None
    if not run.budget_seconds:
        tokens = horizon.tokens(run.contexts.longest, feed.order.total)
        run.resolve(eval_tokens=evaluation_tokens(tokens, len(validation)))
        return None
    rows = int(from_main(evaluation_rows(run, feed)[0], run.runtime))  # all ranks read the same
    one_batch = rows * run.model.config.sequence_len * run.runtime.world_size
    longest = max(shards.total for shards, _ in validation)
    most = min(MOST_EVAL_TOKENS, max(longest, one_batch))
    return Size(evaluation_seconds(run.budget_seconds), one_batch, most)


def evaluation_rows(run: OpenRun, feed: RowFeed) -> tuple[int, bool]:
    """
    (rows of an evaluation's batches, whether they run compiled code). While training has rows of
    the full context, evaluations have the same shape, and so the same compiled code.
    """
    T = run.model.config.sequence_len
    rows, width = feed.micro_batch
    if width == T:
        return rows, run.model.compiled
    rows = run.knobs.device_batch_size
    if run.runtime.device.type == "cpu":  # small batches: the least evaluation is one of them
        return min(rows, max(1, 4096 // T)), False
    return rows, run.model.compiled


def sample_evaluation(run: OpenRun, prompts: Sequence[str] = QUESTIONS) -> Evaluation:
    """
    An evaluation that logs the greedy continuations of a few prompts, or replies to them in a stage
    that chats. Prompts that do not fit into the context are left out.
    """
    budget, chats = run.budget_seconds, STAGES[run.stage].chats
    length = 48 if chats else 24
    if run.knobs.sample_every < 0:
        every = 1 / evaluations_within(budget) if budget else 0.25
        run.resolve(sample_every=evaluation_interval(run) if chats else every)
    seconds = evaluation_seconds(budget, SAMPLING)
    size = Size(seconds, least=3, most=length) if budget else None
    tokenizer, context = run.tokenizer, run.model.config.sequence_len

    def tokens(prompt: str) -> list[int]:
        if not chats:
            return tokenizer.encode(prompt, bos=True)
        return tokenizer.render_prompt({"messages": [{"role": "user", "content": prompt}]})

    encoded = {prompt: tokens(prompt) for prompt in prompts}
    fitting = {prompt: ids for prompt, ids in encoded.items() if len(ids) < context}

    def measure() -> dict[str, str]:
        if not fitting or not run.runtime.is_main:
            return {}
        samples = Engine(run.model, tokenizer).generate_batch(
            list(fitting.values()),
            max_tokens=size.now if size else length,
            temperature=0.0,
        )
        texts = {}
        for prompt, sample in zip(fitting, samples, strict=True):
            visible = visible_text(tokenizer, sample.tokens) if chats else ""
            text = visible.strip() or tokenizer.decode(sample.tokens)
            texts[f"sample/{prompt}"] = f"{text} ..." if sample.finish == "length" else text
        return texts

    return Evaluation("sample", run.knobs.sample_every, measure, size=size)


def choose_conversations(run: OpenRun) -> None:
    """Unless --data is given, choose the conversations that suit the pretraining text."""
    if not run.knobs.data:
        base = newest(run_directory("base", run.directory.name)) or run.parent
        texts = base.meta["knobs"]["data"] or default_sources()
        run.resolve(data=mixture.default(run.stage, texts))
    print0(f"  conversations: {' '.join(run.knobs.data)}")


def text_shards(run: OpenRun, sources: Sequence[Source], split: str) -> WeightedShards:
    """A split ("train", "val") of every text source, with its weight."""
    return [(prepare(source, split, run.tokenizer), source.weight) for source in sources]


def conversation_shards(run: OpenRun, split: str, seed: int = 0) -> WeightedShards:
    """A split ("train", "val") of every conversation source in --data, with its weight."""
    folder = user_path(run.knobs.task_dir) if run.knobs.task_dir else None
    return mixture.shards(
        run.knobs.data,
        split,
        run.tokenizer,
        seed=seed,
        folder=folder,
        name=run.knobs.name,
        skip_bad_rows=run.knobs.skip_bad_rows,
        me=run.knobs.me,
    )


def compile_if_it_pays(
    run: OpenRun, horizon: Horizon, one_shape: bool = True, epoch_tokens: int = 0
) -> None:
    """
    Compile the model if --compile asks for it, or if it works and saves time; a resumed run does
    as before. epoch_tokens: of each epoch, for a run of epochs. one_shape: nearly all batches have
    the same shape, which makes compiling worthwhile on a CPU. That shape is then compiled in the
    background while the run is being opened.
    """
    wanted = run.knobs.compile == "on"
    if run.knobs.compile == "auto":
        wanted = run.stored("compiled")
        if wanted is None:
            tokens = horizon.tokens(run.contexts.longest, epoch_tokens)
            flops = tokens * run.contexts.mean(run.model.flops_per_token)
            seconds = run.budget_seconds or flops / (0.4 * run.peak_flops)
            shapes = len(run.contexts.stages)
            kind = run.runtime.device.type
            wanted = (one_shape or kind == "cuda") and compile_pays(kind, seconds, shapes)
    if not wanted:
        return
    if missing := compiler_missing(run.runtime.device):
        notice(f"running without torch.compile: {missing}")
        return
    compiler.prepare(run.model)
    if not one_shape:
        print0("  compiling each shape of batches when it first appears")
        return
    print0("  compiling while the data is opened")
    context = run.contexts.at(run.stored_progress)
    scale = run.contexts.longest // context  # shorter rows are more
    rows = micro_batch_rows(
        horizon.rows * scale,
        run.knobs.device_batch_size * scale,
        run.runtime.rank,
        run.runtime.world_size,
    )
    compiler.Ahead.current = compiler.Ahead(run.model, rows, context)


def train(
    run: OpenRun,
    feed: Feed,
    horizon: Horizon,
    evaluations: Sequence[Evaluation],
    rate_scale: float = 1.0,
) -> dict[str, Any]:
    """
    Train to the end, from the start or from a checkpoint; returns the summary of Run.fit, with the
    tag of the run. The learning rates are multiplied by `rate_scale`.
    """
    if not run.knobs.embedding_lr:
        tokens = horizon.rows * run.model.config.sequence_len
        run.resolve(embedding_lr=embedding_rate(tokens))
    knobs, runtime, checkpoint = run.knobs, run.runtime, run.resume_from
    print0(show_knobs(knobs, run.origins))
    print_data(run)
    meta = _checkpoint_meta(run, horizon)
    optimizer = make_optimizer(run.model, knobs, runtime, rate_scale)
    if runtime.is_main:
        weights = sum(t.nbytes for t in run.model.state_dict().values())
        require_space(run.directory, weights + optimizer.state_bytes())
    # An earlier run is set aside only now that every check has passed
    fresh = runtime.is_main and not checkpoint
    with new_run(run.directory) if fresh else nullcontext():
        logbook = Logbook(
            run.directory,
            sinks=knobs.sinks,
            run_name=knobs.run,
            config={**meta, "machine": describe_machine(runtime.device)},
            step=checkpoint.step if checkpoint else 0,
        )
    training = Run(
        runtime,
        run.directory,
        logbook,
        run.model,
        optimizer,
        feed,
        meta,
        evaluations=evaluations,
        budget_seconds=run.budget_seconds,
        save_every=knobs.save_every,
        save_seconds=60 * knobs.save_minutes,
        keep=knobs.keep,
        patience=getattr(knobs, "patience", 0),
        peak_flops=run.peak_flops,
    )
    try:
        return _start_or_resume(run, training) | {"tag": run.directory.name}
    finally:
        logbook.close()


def _checkpoint_meta(run: OpenRun, horizon: Horizon) -> dict[str, Any]:
    """What every checkpoint of the run stores, besides tensors and the state of Run."""
    return {
        "stage": run.stage,
        "config": run.model.config.to_dict(),
        "tokenizer": run.tokenizer.fingerprint,
        "knobs": asdict(run.knobs),
        "origins": run.origins,
        "horizon": {
            "rows": horizon.rows,
            "steps": horizon.steps,
            "compiled": run.model.compiled,
            "since": run.stored("since"),
        },
        "dtype": run.runtime.dtype_name,
        "world_size": run.runtime.world_size,
        "run_id": run.resume_from.meta.get("run_id") if run.resume_from else uuid.uuid4().hex,
        "data_summary": run.data_summary,
    }


def _start_or_resume(run: OpenRun, training: Run) -> dict[str, Any]:
    """Train to the end, after restoring the checkpoint to resume from; returns the summary."""
    checkpoint, new_horizon = run.resume_from, run.knobs.new_horizon
    is_complete = checkpoint is not None and checkpoint.meta["done"]
    ahead, waited = compiler.Ahead.current, 0.0
    if ahead and (new_horizon or not is_complete):
        waited = ahead.wait()  # the thread computes with the weights, which are about to change
    if checkpoint:
        training.restore(checkpoint)
        if new_horizon:
            # The new length decides how much an evaluation reads: earlier ones are no measure
            training.sizes, training.best, training.stale = {}, None, 0
        if is_complete and (not new_horizon or training.progress >= 1):
            print0(f"  {checkpoint} is the end of this run: nothing to do")
            return {"tokens": training.tokens, "seconds": training.seconds, **training.last}
        print0(
            f"  resuming from {checkpoint} (step {training.step:,}, "
            f"{human(training.tokens)} tokens)"
        )
    opening = time.monotonic() - run.began  # counts as training time
    training.seconds += opening
    for name, seconds in (("opening", opening - waited), ("compiling", waited)):
        training.spent[name] = training.spent.get(name, 0.0) + seconds
    training.schedule = resume.schedule_from(checkpoint, training)
    if checkpoint and run.runtime.is_main:
        put_aside_after(run.directory, checkpoint.step)
    return training.fit()


@contextmanager
def session() -> Iterator[None]:
    """
    For the work of a command: at its end, closes the runtime, ends a compilation that nothing waits
    for and releases locks. Errors for lack of memory or a lost rank become UserErrors.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, UserError) as e:
        if isinstance(e, RuntimeError) and not out_of_memory(e) and (lost := rank_lost(e)):
            raise lost from e
        tell_of_error()
        if fault := explained(e):
            raise fault from e
        raise
    finally:
        if compiler.Ahead.current:
            compiler.Ahead.current.abandon()
        release()
        close_runtime()
