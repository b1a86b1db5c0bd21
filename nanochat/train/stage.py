"""
What a stage is made of: feed, data, evaluations and compilation; and `train`, which runs it to its
end.
"""

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from nanochat.base import knobs
from nanochat.base.common import UserError, human, notice, print0, user_path
from nanochat.base.files import release
from nanochat.base.hardware import describe_machine
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
from nanochat.data.shards import Shards
from nanochat.data.sources import default_sources
from nanochat.data.summary import survey
from nanochat.eval.bits_per_byte import shard_bits_per_byte
from nanochat.eval.chat import visible_text
from nanochat.eval.tasks import mixture
from nanochat.model.checkpoint import new_run, newest, put_aside_after, require_space
from nanochat.model.stages import STAGES, run_directory
from nanochat.train import compiler, resume
from nanochat.train.evaluation import Evaluation, Size
from nanochat.train.horizon import Horizon, within_passes
from nanochat.train.loop import Feed, Run
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

QUESTIONS = (  # that stages which chat answer as they train
    "Hello!",
    "What is your name?",
    "What is the capital of France?",
    "How much is 7 plus 5?",
)
WeightedShards = list[tuple[Shards, float | None]]


def row_feed(run: OpenRun, shards: WeightedShards, horizon: Horizon, **options: Any) -> RowFeed:
    """A feed for this rank, device and seed; `options` go to RowFeed."""
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
    The feed, and its horizon: shorter if it would read the text too often, where that is known
    from `characters` (see inventory.show) or a number of passes is given.
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
    Find out what the run will train on: `train` prints it and keeps it in the run. Raises
    UserError for what cannot be meant, except when a run resumes.
    """
    shards = [shards for shards, _ in validation]
    summary = survey(feed.order, shards, feed.rows, horizon.steps)
    run.data_lines, run.data_summary = summary.lines(), summary.record()
    if not run.resume_from:
        try:
            flops = horizon.rows * run.model.config.sequence_len * run.model.flops_per_token()
            in_budget = 0.3 * run.peak_flops * run.budget_seconds / flops
            summary.check(USEFUL_PASSES, in_budget or None)
        except UserError:
            print_data(run)
            raise


def print_data(run: OpenRun) -> None:
    """Print the summary of the data."""
    for line in run.data_lines:
        print0(f"  {line}")


def bits_per_byte_evaluation(
    run: OpenRun, validation: WeightedShards, feed: RowFeed, horizon: Horizon
) -> Evaluation:
    """Bits per byte on the validation split of every source, and their mean by weight."""
    token_bytes, runtime = run.tokenizer.token_bytes(), run.runtime
    size = evaluation_size(run, validation, feed, horizon)
    fitting: list[int] = []  # rows, in evaluations for which memory ran out

    def measured() -> dict[str, float]:
        rows, compiled = evaluation_rows(run, feed)
        tokens = size.now if size else run.knobs.eval_tokens
        numbers = {
            f"val_bpb/{shards.name}": shard_bits_per_byte(
                run.model,
                shards,
                token_bytes,
                runtime,
                min([rows, *fitting]),
                tokens,
                compiled,
                fitting.append,
            )
            for shards, _ in validation
        }
        weights = [weight or 1.0 for _, weight in validation]
        total = sum(w * bpb for w, bpb in zip(weights, numbers.values(), strict=True))
        read = {"eval_tokens": tokens} if size else {}
        return {"val_bpb": total / sum(weights), **(numbers if len(numbers) > 1 else {}), **read}

    def measure() -> dict[str, float]:
        return compiler.guarded(run.model, measured)

    return Evaluation("eval", evaluation_interval(run), measure, start=True, size=size)


def evaluation_interval(run: OpenRun) -> float:
    """--eval_every, which the length of the run sets unless it is given."""
    if run.knobs.eval_every < 0:
        run.resolve(eval_every=1 / evaluations_within(run.budget_seconds))
    return run.knobs.eval_every


def evaluation_size(
    run: OpenRun, validation: WeightedShards, feed: RowFeed, horizon: Horizon
) -> Size | None:
    """
    How many tokens of each source an evaluation reads: None if --eval_tokens says it, or where the
    length of the run, known in tokens, sets it once and for all.
    """
    if run.knobs.eval_tokens:
        return None
    if not run.budget_seconds:
        tokens = (horizon.steps or 0) * horizon.rows * run.contexts.longest
        tokens = tokens or (horizon.epochs or 1) * feed.total_tokens
        count = evaluations_within(0)
        run.resolve(eval_tokens=evaluation_tokens(tokens, len(validation), count))
        return None
    least = evaluation_rows(run, feed)[0] * run.model.config.sequence_len * run.runtime.world_size
    longest = max(shards.total for shards, _ in validation)
    most = min(MOST_EVAL_TOKENS, max(longest, least))
    return Size(evaluation_seconds(run.budget_seconds), least, most)


def evaluation_rows(run: OpenRun, feed: RowFeed) -> tuple[int, bool]:
    """
    The rows of an evaluation's batches, and whether they run compiled code: on a GPU always, else
    at the context of the evaluations, in micro-batches as training has them.
    """
    T, shape = run.model.config.sequence_len, feed.micro_batch
    if shape[1] == T:
        return shape[0], run.model.compiled
    rows = run.knobs.device_batch_size
    if run.runtime.device.type == "cpu":  # few, so that a part of an evaluation is soon measured
        return min(rows, max(1, 4096 // T)), False
    return rows, run.model.compiled


def sample_evaluation(run: OpenRun, prompts: Sequence[str] = QUESTIONS) -> Evaluation:
    """Greedy continuations of a few prompts or, in a stage that chats, replies; they are logged."""
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

    rows = {prompt: ids for prompt in prompts if len(ids := tokens(prompt)) < context}

    def measure() -> dict[str, str]:
        if not rows or not run.runtime.is_main:
            return {}
        samples = Engine(run.model, tokenizer).generate_batch(
            list(rows.values()),
            max_tokens=size.now if size else length,
            temperature=0.0,
        )
        texts = {}
        for prompt, sample in zip(rows, samples, strict=True):
            visible = visible_text(tokenizer, sample.tokens) if chats else ""
            text = visible.strip() or tokenizer.decode(sample.tokens)
            texts[f"sample/{prompt}"] = text + " ..." * (sample.finish == "length")
        return texts

    return Evaluation("sample", run.knobs.sample_every, measure, size=size)


def choose_conversations(run: OpenRun) -> None:
    """Fill in --data by rule: the conversations of the stage that suit the pretraining text."""
    if not run.knobs.data:
        base = newest(run_directory("base", run.directory.name)) or run.parent
        texts = base.meta["knobs"]["data"] or default_sources()
        run.resolve(data=mixture.default(run.stage, texts))
    print0(f"  conversations: {' '.join(run.knobs.data)}")


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


def compile_if_it_pays(run: OpenRun, horizon: Horizon, one_shape: bool = True) -> None:
    """
    Compile the model if that was asked for, or if it works and pays; a resumed run does as before.
    `one_shape`: whether (nearly) all batches have the same shape, which makes compiling worthwhile
    on a CPU; that shape is then compiled in the background while the run is being opened.
    """
    wanted = run.knobs.compile == "on"
    if run.knobs.compile == "auto":
        wanted = run.stored("compiled")
        if wanted is None:
            tokens = (horizon.steps or 0) * horizon.rows * run.contexts.longest
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
    runtime, contexts = run.runtime, run.contexts
    device_rows = run.knobs.device_batch_size
    rows, first = horizon.rows, contexts.at(run.stored_progress)
    scale = contexts.longest // first
    rows = micro_batch_rows(rows * scale, device_rows * scale, runtime.rank, runtime.world_size)
    compiler.Ahead.current = compiler.Ahead(run.model, rows, first)


def train(
    run: OpenRun,
    feed: Feed,
    horizon: Horizon,
    evaluations: Sequence[Evaluation],
    rate_scale: float = 1.0,
) -> dict[str, Any]:
    """Train to the end, from the start or from a checkpoint, and return the summary."""
    if not run.knobs.embedding_lr:
        tokens = horizon.rows * run.model.config.sequence_len
        run.resolve(embedding_lr=embedding_rate(tokens))
    k, runtime, checkpoint = run.knobs, run.runtime, run.resume_from
    print0(knobs.show(k, run.origins))
    print_data(run)
    meta = {
        "stage": run.stage,
        "config": run.model.config.to_dict(),
        "tokenizer": run.tokenizer.fingerprint,
        "knobs": asdict(k),
        "origins": run.origins,
        "horizon": {
            "rows": horizon.rows,
            "steps": horizon.steps,
            "compiled": run.model.compiled,
            "since": run.stored("since"),
        },
        "dtype": runtime.dtype_name,
        "world_size": runtime.world_size,
        "run_id": checkpoint.meta.get("run_id") if checkpoint else uuid.uuid4().hex,
        "data_summary": run.data_summary,
    }
    optimizer = make_optimizer(run.model, k, runtime, rate_scale)
    if runtime.is_main:
        weights = sum(t.nbytes for t in run.model.state_dict().values())
        require_space(run.directory, weights + optimizer.state_bytes())
    # only now, when everything has been checked that can refuse, an earlier run is set aside
    fresh = runtime.is_main and not checkpoint
    with new_run(run.directory) if fresh else nullcontext():
        logbook = Logbook(
            run.directory,
            sinks=k.sinks,
            run_name=k.run,
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
        save_every=k.save_every,
        save_seconds=60 * k.save_minutes,
        keep=k.keep,
        patience=getattr(k, "patience", 0),
        peak_flops=run.peak_flops,
    )
    try:
        ahead, waited = compiler.Ahead.current, 0.0
        if ahead and not (checkpoint and checkpoint.meta["done"] and not k.new_horizon):
            waited = ahead.wait()  # before weights change, which its backward pass may still need
        if checkpoint:
            training.restore(checkpoint)
            if checkpoint.meta["done"] and (not k.new_horizon or training.progress >= 1):
                print0(f"  {checkpoint} is the end of this run: nothing to do")
                done = {"tokens": training.tokens, "seconds": training.seconds, **training.last}
                return done | {"tag": run.directory.name}
            print0(
                f"  resuming from {checkpoint} (step {training.step:,}, "
                f"{human(training.tokens)} tokens)"
            )
        opening = time.monotonic() - run.began  # counts as training time
        training.seconds += opening
        for name, seconds in (("opening", opening - waited), ("compiling", waited)):
            training.spent[name] = training.spent.get(name, 0.0) + seconds
        training.schedule = resume.schedule_from(checkpoint, training)
        if checkpoint and runtime.is_main:
            put_aside_after(run.directory, checkpoint.step)
        return training.fit() | {"tag": run.directory.name}
    finally:
        logbook.close()


@contextmanager
def session() -> Iterator[None]:
    """
    Wraps the work of a command: closes the runtime, ends a compilation that nothing waits for, and
    explains when memory runs out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, UserError) as e:
        if isinstance(e, RuntimeError) and not out_of_memory(e) and (lost := rank_lost(e)):
            raise lost from e
        tell_of_error()
        if out_of_memory(e):
            raise UserError(
                "out of memory: choose a smaller --depth, --model_dim or --sequence_len, or a "
                "smaller --device_batch_size"
            ) from e
        raise
    finally:
        if compiler.Ahead.current:
            compiler.Ahead.current.abandon()
        release()
        close_runtime()
