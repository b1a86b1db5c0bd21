"""Train a chat model by reinforcement: sample replies to questions and reward the correct ones."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nanochat.base.common import entry, opening
from nanochat.base.knobs import knob, parse
from nanochat.eval.tasks.common import Item, Task
from nanochat.train.evaluation import Evaluation, Size
from nanochat.train.knobs import LaterStageKnobs
from nanochat.train.scaling import evaluation_seconds

if TYPE_CHECKING:
    from nanochat.train.rollout import Sampler
    from nanochat.train.run import OpenRun


@dataclass(kw_only=True)
class ReinforceKnobs(LaterStageKnobs):
    """Questions and replies"""

    source: Literal["sft", "mid"] = knob("sft", "stage to start from", alias="-i")
    tasks: tuple[str, ...] = knob(
        ("tinyworld/arithmetic",),
        "tasks whose training questions are asked, named as in chat_eval",
        alias="-a",
    )
    num_items: int = knob(8000, "maximum training questions per task", alias="-n", low=1)
    questions_per_step: int = knob(16, "questions per optimizer step", low=1)
    samples: int = knob(8, "replies sampled per question", low=2)
    max_tokens: int = knob(
        0,
        "reply limit in tokens; truncated replies score 0 (0 = task default)",
        alias="-m",
        low=0,
    )
    temperature: float = knob(
        1.0, "sampling temperature; 1 with top_k 0 samples from the policy", alias="-t", low=1e-6
    )
    top_k: int = knob(
        0, "sample from only this many of the likeliest tokens (0 = all)", alias="-k", low=0
    )
    rollout_batch_size: int = knob(
        256, "maximum replies generated together; halved when memory runs out", low=1
    )
    init_lr_frac: float = knob(
        0.05, "initial learning rates, as a share of those in the earlier stages", low=0, high=1
    )
    eval_items: int = knob(
        0,
        "held-out questions per task in an evaluation, each asked `samples` times (0 = 400, or "
        "as many as the time of the run allows)",
        low=0,
    )


def pass_at_k(
    run: "OpenRun", sampler: "Sampler", held_out: Mapping[Task, Sequence[Item]]
) -> Evaluation:
    """
    An evaluation of pass@1 and pass@k, where k is --samples, on held-out questions, the same ones
    each time.
    """
    from nanochat.eval.chat import judge
    from nanochat.train import stage

    knobs, size = run.knobs, None
    if run.budget_seconds and not knobs.eval_items:
        most = max(map(len, held_out.values()))
        size = Size(evaluation_seconds(run.budget_seconds), min(8, most), most)

    def measure() -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for task, items in held_out.items():
            verdicts = judge(
                sampler.engine,
                task,
                items[: size.now] if size else items,
                rows=sampler.rows,
                max_tokens=sampler.max_tokens,
                num_samples=knobs.samples,
                temperature=knobs.temperature,
                top_k=knobs.top_k,
                must_end=True,
                seed=knobs.seed,
            )
            result = verdicts.result(task.chance)
            prefix = f"{task.name}/" if len(held_out) > 1 else ""
            numbers[f"{prefix}n"] = result["n"]
            by_count = {1: result, knobs.samples: result["pass"][str(knobs.samples)]}
            for count, figures in by_count.items():
                numbers[f"{prefix}pass@{count}"] = figures["accuracy"]
                numbers[f"{prefix}pass@{count}_lo"] = figures["lo"]
                numbers[f"{prefix}pass@{count}_hi"] = figures["hi"]
        return numbers

    return Evaluation("eval", stage.evaluation_interval(run), measure, start=True, size=size)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    began = time.monotonic()
    knobs, origins = parse(ReinforceKnobs, argv, command="chat_rl")
    opening("chat_rl", log=True)

    from nanochat.chat.generate import Engine
    from nanochat.commands.chat_eval import named_tasks
    from nanochat.study import report
    from nanochat.train import stage
    from nanochat.train.horizon import conversation_horizon
    from nanochat.train.rollout import RolloutFeed, Sampler, survey
    from nanochat.train.run import open_from_parent

    with stage.session():
        run = open_from_parent("rl", knobs.source, knobs, origins, began)
        knobs = run.knobs
        horizon = conversation_horizon(run, knobs.questions_per_step * knobs.samples)
        # Replies are sampled to multiple-choice questions, too
        tasks = [
            replace(task, kind="generative") for task in named_tasks(knobs.tasks, knobs.task_dir)
        ]
        asked = [
            (task, q) for task in tasks for q in task.items("train", knobs.num_items, knobs.seed)
        ]
        held_out = {task: task.items("val", knobs.eval_items or 400, knobs.seed) for task in tasks}
        questions = [
            (task, item)
            for task, item in asked
            if len(run.tokenizer.render_prompt(task.prompt(item))) < run.model.config.sequence_len
        ]
        limit = knobs.max_tokens or max(task.max_tokens for task in tasks)
        engine = Engine(run.model, run.tokenizer)
        sampler = Sampler(engine, knobs.rollout_batch_size, limit, knobs.temperature, knobs.top_k)
        total = None  # with a time budget
        if horizon.steps:
            total = horizon.steps * knobs.questions_per_step
        elif horizon.epochs:
            total = horizon.epochs * len(questions)
        run.data_lines, run.data_summary = survey(
            asked, questions, held_out, knobs.questions_per_step, knobs.samples, total
        )
        feed = RolloutFeed(
            sampler,
            questions,
            run.runtime,
            per_step=knobs.questions_per_step,
            samples=knobs.samples,
            total=total,
            device_rows=knobs.device_batch_size,
            seed=knobs.seed,
        )
        prompts = [
            task.prompt(item)["messages"][-1]["content"]
            for task, items in held_out.items()
            for item in items[:2]
        ]
        evaluations = [
            pass_at_k(run, sampler, held_out),
            stage.sample_evaluation(run, prompts),
        ]
        stage.compile_if_it_pays(run, horizon, one_shape=False)
        return report.train_and_report(run, feed, horizon, evaluations, knobs.init_lr_frac)


if __name__ == "__main__":
    entry(main)
