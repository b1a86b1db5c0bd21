"""Reinforce what a chat model gets right: sample replies to a task's questions, reward the right ones."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nanochat.base.common import entry, notice, print0
from nanochat.base.knobs import knob
from nanochat.chat.generate import Engine
from nanochat.commands.chat_eval import named_tasks
from nanochat.eval import chat as chat_eval
from nanochat.train import rollout
from nanochat.train import run as stage
from nanochat.train.knobs import TrainKnobs
from nanochat.train.loop import Evaluation


@dataclass(kw_only=True)
class ReinforceKnobs(TrainKnobs):
    """Horizon and questions"""

    source: Literal["sft", "mid"] = knob("sft", "the stage to start from", alias="-i")
    step: int | None = knob(None, "step of the checkpoint to start from (default: the newest)")
    tasks: tuple[str, ...] = knob(
        ("tinyworld/arithmetic",),
        "whose training questions to ask: names as in chat_eval",
        alias="-a",
    )
    task_dir: str = knob(
        "", "folder with the tasks' data (default: fetched from the hub into the base folder)"
    )
    num_items: int = knob(8000, "training questions of a task, at most", alias="-n", low=1)
    num_iterations: int = knob(-1, "optimizer steps (-1 = by epochs)")
    epochs: int = knob(1, "passes over the questions", low=1)
    questions_per_step: int = knob(16, "questions of an optimizer step", low=1)
    samples: int = knob(8, "replies sampled to each of them", low=2)
    max_tokens: int = knob(
        0,
        "longest reply in tokens, one that is cut there is wrong; 0 = as the task has it",
        alias="-m",
        low=0,
    )
    temperature: float = knob(
        1.0,
        "of the sampling; at 1, with top_k 0, the replies are the policy's own",
        alias="-t",
        low=1e-6,
    )
    top_k: int = knob(0, "sample among so many likeliest tokens (0 = all)", alias="-k", low=0)
    rollout_batch_size: int = knob(
        256, "replies generated together, at most; halved when memory runs out", low=1
    )
    init_lr_frac: float = knob(
        0.05, "where the rates start, as a share of those of the earlier stages", low=0, high=1
    )
    eval_items: int = knob(
        400, "held-out questions of a task in an evaluation, each asked `samples` times", low=1
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        s = stage.open_from_parent(ReinforceKnobs, argv, "chat_rl", "rl", lambda k: k.source)
        k, rt = s.knobs, s.runtime
        steps, epochs = stage.conversation_horizon(s)
        tasks = [
            replace(task, kind="generative") for task in named_tasks(k.tasks, k.task_dir)
        ]  # letters are said, too
        asked = [
            (task, item) for task in tasks for item in task.items("train", k.num_items, k.seed)
        ]
        held = [(task, task.items("val", k.eval_items, k.seed)) for task in tasks]
        fits = [
            len(s.tokenizer.render_prompt(task.prompt(item))) < s.model.config.sequence_len
            for task, item in asked
        ]
        questions = [question for question, ok in zip(asked, fits, strict=True) if ok]
        if left_out := fits.count(False):
            notice(
                f"{left_out:,} of {len(asked):,} questions are longer than the context and left out"
            )

        limit = k.max_tokens or max(task.max_tokens for task in tasks)
        engine = Engine(s.model, s.tokenizer)
        sampler = rollout.Sampler(engine, k.rollout_batch_size, limit, k.temperature, k.top_k)
        total = steps * k.questions_per_step if steps else epochs and epochs * len(questions)
        feed = rollout.RolloutFeed(
            sampler,
            questions,
            per_step=k.questions_per_step,
            samples=k.samples,
            total=total,
            device_rows=k.device_batch_size,
            seed=k.seed,
            rank=rt.rank,
            world_size=rt.world_size,
        )

        def look() -> dict[str, Any]:
            """pass@1 to pass@k on held-out questions, asked alike at every look."""
            how = {
                "rows": sampler.rows,
                "max_tokens": limit,
                "num_samples": k.samples,
                "temperature": k.temperature,
                "seed": k.seed,
            }
            seen = [
                (task, chat_eval.judge(engine, task, items, **how).result(task.chance))
                for task, items in held
            ]
            out: dict[str, Any] = {}
            for task, r in seen:
                place = "" if len(seen) == 1 else f"{task.name}/"
                for name, x in (("pass@1", r), (f"pass@{k.samples}", r["pass"][str(k.samples)])):
                    out |= {
                        f"{place}{name}": x["accuracy"],
                        f"{place}{name}_lo": x["lo"],
                        f"{place}{name}_hi": x["hi"],
                    }
                out[f"{place}n"] = r["n"]
            return out

        print0(
            f"  {k.samples} replies to {k.questions_per_step} questions a step, of {len(questions):,}"
        )
        rows = k.questions_per_step * k.samples
        probe = Evaluation("eval", k.eval_every, look, start=True)
        return stage.train(
            s, feed, rows, steps, [probe], rate_scale=k.init_lr_frac, one_shape=False
        )

    with stage.session():
        return work()


if __name__ == "__main__":
    entry(main)
