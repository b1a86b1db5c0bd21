"""Ask a model the questions of tasks and report its accuracy with intervals, by task and stage."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nanochat.base import logbook
from nanochat.base.commands import near
from nanochat.base.common import (
    UserError,
    columns,
    duration,
    entry,
    notice,
    opening,
    print0,
    user_path,
)
from nanochat.base.knobs import knob, parse
from nanochat.base.progress import progress
from nanochat.eval.tasks import arc, gsm8k, humaneval, mmlu, spellingbee, tinyworld
from nanochat.eval.tasks.common import Item, Task
from nanochat.model.stages import STAGES, one_chain, run_directory
from nanochat.train.knobs import AnyModelKnobs, ExportedModelKnobs, MachineKnobs

CHATCORE = [arc.EASY, arc.CHALLENGE, mmlu.TASK, gsm8k.TASK, humaneval.TASK, spellingbee.TASK]
TASKS = [*CHATCORE, *tinyworld.TASKS.values()]


@dataclass(kw_only=True)
class EvaluateChatKnobs(AnyModelKnobs, ExportedModelKnobs, MachineKnobs):
    """Evaluation"""

    tasks: tuple[str, ...] = knob(
        ("tinyworld",),
        "tasks to ask: ARC-Easy ARC-Challenge MMLU GSM8K HumanEval SpellingBee (all = these "
        "six), tinyworld, tinyworld/facts ...",
        alias="-a",
    )
    num_items: int = knob(
        800,
        "questions per task, or for all kinds of tinyworld together (0 = all)",
        alias="-n",
        low=0,
    )
    num_samples: int = knob(
        1, "answers per open question; with 2 or more, pass@k is reported", low=1
    )
    temperature: float = knob(
        0.0, "sampling temperature (0 = always the likeliest token)", alias="-t", low=0
    )
    max_tokens: int = knob(0, "answer limit in tokens; 0 = task default", alias="-m", low=0)
    task_dir: str = knob(
        "", "folder with the tasks' data (default: fetched from the hub into the base folder)"
    )
    batch_size: int = knob(
        64, "answers generated together; does not change the results", alias="-b", low=1
    )


def named_tasks(names: Sequence[str], task_dir: str = "") -> list[Task]:
    """
    The tasks with these names, in upper or lower case, which read their data from `task_dir` if
    that is given. "all" means those of the six ChatCORE tasks that can be judged on this machine,
    "tinyworld" all tasks of tinyworld. UserError without names, for an unknown name, or for a named
    task whose replies cannot be judged here.
    """
    known = [task.name for task in TASKS]
    choices = f"choose from all, tinyworld, {', '.join(known)}"
    if not names:
        raise UserError(f"--tasks names no task: {choices}")
    chosen: dict[str, Task] = {}
    for name in names:
        lower = name.lower()
        group = [t for t in TASKS if lower in (t.name.lower(), t.name.split("/")[0])]
        if lower == "all":
            group = CHATCORE
        if not group:
            raise UserError(
                f"there is no task {name!r}{near(lower, map(str.lower, known))}: {choices}"
            )
        for task in group:
            obstacle = task.missing()
            if obstacle and lower == "all":
                notice(f"skipping {task.name}: {obstacle}")
            elif obstacle:
                raise UserError(f"{task.name}: {obstacle}")
            else:
                chosen[task.name] = task
    folder = user_path(task_dir) if task_dir else None
    return [replace(t, items=partial(t.items, folder=folder)) for t in chosen.values()]


def questions_of(tasks: Sequence[Task], n: int, seed: int) -> list[tuple[Task, list[Item]]]:
    """Every task with n held-out questions; the tasks of tinyworld have n together."""
    kinds = sum(task.name.startswith("tinyworld/") for task in tasks)
    questions = []
    for task in tasks:
        count = math.ceil(n / kinds) if "/" in task.name else n
        questions.append((task, task.items("val", count, seed)))
    return questions


def ask(
    knobs: EvaluateChatKnobs, engine: Any, questions: Sequence[tuple[Task, list[Item]]]
) -> dict[str, Any]:
    """Ask an Engine or a ForeignEngine all questions; returns the summary."""
    from nanochat.eval.chat import judge
    from nanochat.eval.scores import summarise

    results = {}
    for task, items in questions:
        with progress(len(items), task.name, "questions") as bar:
            verdicts = judge(
                engine,
                task,
                items,
                rows=knobs.batch_size,
                max_tokens=knobs.max_tokens,
                num_samples=knobs.num_samples,
                temperature=knobs.temperature,
                seed=knobs.seed,
                progress=bar.update,
            )
        results[task.name.removeprefix("tinyworld/")] = verdicts.result(task.chance)
    return summarise(results)


def evaluate(
    knobs: EvaluateChatKnobs, questions: Sequence[tuple[Task, list[Item]]]
) -> dict[str, Any]:
    """
    Load the model, ask it all questions, and print the results; those of a checkpoint are also
    logged. Returns the summary.
    """
    from nanochat.chat.generate import Engine
    from nanochat.eval.scores import stage_results, stage_table
    from nanochat.model.checkpoint import Loaded, load_for_inference

    machine = knobs.device_type, knobs.dtype, knobs.seed
    if knobs.hf:
        from nanochat.export.foreign import load_exported

        loaded = engine = load_exported(knobs.hf, *machine, knobs.with_code)
    else:
        loaded = load_for_inference(knobs.source, knobs.model_tag, knobs.step, *machine)
        engine = Engine.of(loaded)
    began = time.monotonic()
    summary = ask(knobs, engine, questions)
    seconds = time.monotonic() - began
    name, stages = knobs.hf, {"exported": summary}
    if isinstance(loaded, Loaded):
        stage, name = loaded.stage, loaded.checkpoint.tag
        row: dict[str, Any] = {
            "kind": "chat_eval",
            "step": loaded.checkpoint.step,
            "stage": stage,
            "seconds_taken": round(seconds, 2),
            "task": " ".join(knobs.tasks),
            "temperature": knobs.temperature,
            "seed": knobs.seed,
            "max_tokens": knobs.max_tokens,
            **summary,
        }
        logbook.add(loaded.checkpoint.path.parent, **row)
        until = [*STAGES][: [*STAGES].index(stage) + 1]
        logs = {s: logbook.read(run_directory(s, name)) for s in until}
        logs[stage].append(row)  # even if it could not be stored
        stages = stage_results(one_chain(logs, name))
        if stage not in stages:
            stages = {stage: summary}
    print0(f"\naccuracy of {name} with 95 % intervals\n{columns(*stage_table(stages))}")
    for task, result in summary["kinds"].items():
        if clipped := result["clipped"]:
            print0(f"  {task}: {clipped:,} prompts were too long and lost their beginnings")
        if unfinished := result["unfinished"]:
            print0(f"  {task}: {unfinished:,} answers were cut off at their token limit")
    print0(
        f"{loaded.describe()}: {summary['accuracy']:.1%} of {summary['n']:,} questions "
        f"in {duration(seconds)}"
    )
    return summary


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    knobs, origins = parse(EvaluateChatKnobs, argv, command="chat_eval")
    opening("chat_eval")
    knobs.check_hf(origins, ["source", "model_tag", "step"])
    if knobs.num_samples > 1 and knobs.temperature == 0:
        raise UserError(
            f"--num_samples={knobs.num_samples} at temperature 0 samples the same answer every "
            "time: add --temperature=1, for example"
        )
    tasks = named_tasks(knobs.tasks, knobs.task_dir)
    return evaluate(knobs, questions_of(tasks, knobs.num_items, knobs.seed))


if __name__ == "__main__":
    entry(main)
