"""
What a stage is made of: feed, data, evaluations and compilation; and `train`, which runs it to its
end.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat.base import knobs
from nanochat.base.common import UserError, human, notice, print0
from nanochat.base.files import release
from nanochat.base.logbook import Logbook
from nanochat.base.runtime import close_runtime, compiler_missing, out_of_memory
from nanochat.chat.generate import Engine
from nanochat.data.feed import RowFeed
from nanochat.data.shards import Shards
from nanochat.data.sources import default_sources
from nanochat.eval.bits_per_byte import shard_bits_per_byte
from nanochat.eval.tasks import mixture
from nanochat.model.checkpoint import new_run, newest, put_aside_after, require_space
from nanochat.model.stages import run_directory
from nanochat.train import resume
from nanochat.train.horizon import Horizon
from nanochat.train.loop import Evaluation, Feed, Run
from nanochat.train.run import OpenRun, make_optimizer
from nanochat.train.scaling import compile_pays, embedding_rate

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
        **options,
    )


def bits_per_byte_evaluation(run: OpenRun, validation: WeightedShards) -> Evaluation:
    """Bits per byte on the validation split of every source, and their mean by weight."""
    token_bytes = run.tokenizer.token_bytes()
    rows, tokens = run.knobs.device_batch_size, run.knobs.eval_tokens

    def measure() -> dict[str, float]:
        numbers = {
            f"val_bpb/{shards.name}": shard_bits_per_byte(
                run.model, shards, token_bytes, run.runtime, rows, tokens
            )
            for shards, _ in validation
        }
        weights = [weight or 1.0 for _, weight in validation]
        total = sum(w * bpb for w, bpb in zip(weights, numbers.values(), strict=True))
        return {"val_bpb": total / sum(weights), **(numbers if len(numbers) > 1 else {})}

    return Evaluation("eval", run.knobs.eval_every, measure, start=True)


def sample_evaluation(run: OpenRun, prompts: Sequence[str]) -> Evaluation:
    """Greedy continuations of a few prompts, printed and logged."""

    def measure() -> dict[str, str]:
        if not run.runtime.is_main:
            return {}
        encode, decode = run.tokenizer.encode, run.tokenizer.decode
        samples = Engine(run.model, run.tokenizer).generate_batch(
            [encode(prompt, bos=True) for prompt in prompts], max_tokens=24, temperature=0.0
        )
        texts = {p: decode(sample.tokens) for p, sample in zip(prompts, samples, strict=True)}
        for prompt, text in texts.items():
            print0(f"    {prompt}|{text}".replace("\n", " "))
        return {f"sample/{prompt}": text for prompt, text in texts.items()}

    return Evaluation("sample", run.knobs.sample_every, measure)


def choose_conversations(run: OpenRun) -> None:
    """Fill in --data by rule: the conversations of the stage that suit the pretraining text."""
    if not run.knobs.data:
        base = newest(run_directory("base", run.directory.name)) or run.parent
        texts = base.meta["knobs"]["data"] or default_sources()
        run.resolve(data=mixture.default(run.stage, texts))
    print0(f"  conversations: {' '.join(run.knobs.data)}")


def conversation_shards(run: OpenRun, split: str, seed: int = 0) -> WeightedShards:
    """A split ("train", "val") of every conversation source in --data, with its weight."""
    folder = Path(run.knobs.task_dir) if run.knobs.task_dir else None
    return mixture.shards(
        run.knobs.data, split, run.tokenizer, seed=seed, folder=folder, name=run.knobs.name
    )


def compile_if_it_pays(run: OpenRun, horizon: Horizon, one_shape: bool) -> bool:
    """
    Compile the model if that was asked for, or if it works and pays; a resumed run does as before.
    Returns whether the model is compiled.
    """
    wanted = run.knobs.compile == "on"
    if run.knobs.compile == "auto":
        wanted = run.stored("compiled")
        if wanted is None:
            tokens = (horizon.steps or 0) * horizon.rows * run.contexts.longest
            flops = tokens * run.contexts.mean(run.model.flops_per_token)
            seconds = run.budget_seconds or flops / (0.4 * run.peak_flops)
            shapes = len(run.contexts.stages)
            wanted = one_shape and compile_pays(run.runtime.device.type, seconds, shapes)
    if not wanted:
        return False
    if missing := compiler_missing(run.runtime.device):
        notice(f"running without torch.compile: {missing}")
        return False
    run.model.compile()
    print0("  compiling at the first step")
    return True


def train(
    run: OpenRun,
    feed: Feed,
    horizon: Horizon,
    evaluations: Sequence[Evaluation],
    rate_scale: float = 1.0,
    one_shape: bool = True,
) -> dict[str, Any]:
    """
    Train to the end, from the start or from a checkpoint, and return the summary. `one_shape`:
    whether (nearly) all batches have the same shape, which makes compiling worthwhile.
    """
    if not run.knobs.embedding_lr:
        tokens = horizon.rows * run.model.config.sequence_len
        run.resolve(embedding_lr=embedding_rate(tokens))
    k, runtime, checkpoint = run.knobs, run.runtime, run.resume_from
    print0(knobs.show(k, run.origins))
    meta = {
        "stage": run.stage,
        "config": run.model.config.to_dict(),
        "tokenizer": run.tokenizer.fingerprint,
        "knobs": asdict(k),
        "origins": run.origins,
        "horizon": {
            "rows": horizon.rows,
            "steps": horizon.steps,
            "compiled": compile_if_it_pays(run, horizon, one_shape),
            "since": run.stored("since"),
        },
        "dtype": runtime.dtype_name,
        "world_size": runtime.world_size,
        "run_id": checkpoint.meta.get("run_id") if checkpoint else uuid.uuid4().hex,
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
            config=meta,
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
        peak_flops=run.peak_flops,
    )
    try:
        if checkpoint:
            training.restore(checkpoint)
            if checkpoint.meta["done"] and (not k.new_horizon or training.progress >= 1):
                print0(f"  {checkpoint} is the end of this run: nothing to do")
                return {"tokens": training.tokens, "seconds": training.seconds, **training.last}
            print0(
                f"  resuming from {checkpoint} (step {training.step:,}, "
                f"{human(training.tokens)} tokens)"
            )
        training.seconds += time.monotonic() - run.began  # opening counts as training time
        training.schedule = resume.schedule_from(checkpoint, training)
        if checkpoint and runtime.is_main:
            put_aside_after(run.directory, checkpoint.step)
        return training.fit()
    finally:
        logbook.close()


@contextmanager
def session() -> Iterator[None]:
    """Wraps the work of a command: closes the runtime, and explains when memory runs out."""
    try:
        yield
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        raise UserError(
            "out of memory: choose a smaller --depth, --model_dim or --sequence_len, or a smaller "
            "--device_batch_size"
        ) from e
    finally:
        release()
        close_runtime()
