"""Ask a model the questions of tasks and report its accuracy with intervals, by task and stage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanochat.base import logbook
from nanochat.base.commands import near
from nanochat.base.common import UserError, columns, duration, entry, notice, opening, print0
from nanochat.base.knobs import knob, parse
from nanochat.base.progress import progress
from nanochat.eval.tasks import arc, gsm8k, humaneval, mmlu, spellingbee, tinyworld
from nanochat.eval.tasks.common import Item, Task
from nanochat.model.stages import STAGES, run_directory
from nanochat.train.knobs import ExportedModelKnobs, MachineKnobs

if TYPE_CHECKING:
    from nanochat.model.checkpoint import Loaded

CHATCORE = [arc.EASY, arc.CHALLENGE, mmlu.TASK, gsm8k.TASK, humaneval.TASK, spellingbee.TASK]
TASKS = [*CHATCORE, *tinyworld.TASKS.values()]


@dataclass(kw_only=True)
class EvaluateChatKnobs(ExportedModelKnobs, MachineKnobs):
    """Evaluation"""

    source: Literal["auto", "base", "mid", "sft", "rl"] = knob(
        "auto", "stage of the model to ask; auto = the furthest one of the tag", alias="-i"
    )
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
    model_tag: str = knob("", "tag of the model (default: the one saved last)", alias="-g")
    step: int | None = knob(None, "step of the checkpoint (default: the newest)", alias="-s")
    batch_size: int = knob(
        64, "answers generated together; does not change the results", alias="-b", low=1
    )


def named_tasks(names: Sequence[str], task_dir: str = "") -> list[Task]:
    """
    The tasks with these names, in any case, reading their data from `task_dir` if given. "all" is
    the six of ChatCORE that can be judged on this machine, "tinyworld" all kinds of that. Raises
    UserError for an unknown name, or when replies to the task cannot be judged here.
    """
    known = [task.name for task in TASKS]
    chosen: dict[str, Task] = {}
    for name in names:
        lower = name.lower()
        group = [t for t in TASKS if lower in (t.name.lower(), t.name.split("/")[0])]
        if lower == "all":
            group = CHATCORE
        if not group:
            raise UserError(
                f"there is no task {name!r}{near(lower, map(str.lower, known))}: choose from all, "
                f"tinyworld, {', '.join(known)}"
            )
        for task in group:
            obstacle = task.missing()
            if obstacle and lower == "all":
                notice(f"skipping {task.name}: {obstacle}")
            elif obstacle:
                raise UserError(f"{task.name}: {obstacle}")
            else:
                chosen[task.name] = task
    if not task_dir:
        return list(chosen.values())
    folder = Path(task_dir)
    return [replace(t, items=partial(t.items, folder=folder)) for t in chosen.values()]


def stage_results(tag: str) -> dict[str, dict[str, Any]]:
    """The summary of each stage, from the last result of every task at its last evaluated step."""
    from nanochat.eval.chat import summarise

    stages = {}
    for stage in STAGES:
        rows = logbook.read(run_directory(stage, tag))
        rows = [row for row in rows if row["kind"] == "chat_eval"]
        tasks: dict[str, Any] = {}
        for row in rows:
            if row["step"] == rows[-1]["step"]:
                tasks |= row["kinds"]
        if tasks:
            stages[stage] = summarise(tasks)
    return stages


def stage_table(stages: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """
    Head and rows of a table of task by stage, with pass@k where there are several samples. The row
    "all" is shown only if all stages were asked the same questions.
    """
    lines: dict[str, dict[str, dict[str, Any]]] = {}  # name -> stage -> result
    for stage, summary in stages.items():
        for name, result in summary["kinds"].items():
            lines.setdefault(name, {})[stage] = result
            for k, best in result.get("pass", {}).items():
                lines.setdefault(f"{name} pass@{k}", {})[stage] = best
    asked = [{name: task["n"] for name, task in s["kinds"].items()} for s in stages.values()]
    if all(questions == asked[0] for questions in asked):
        lines["all"] = stages
    rows = []
    for name, by_stage in lines.items():
        sizes = sorted({f"{result['n']:,}" for result in by_stage.values()})
        chances = sorted({f"{result['chance']:.0%}" for result in by_stage.values()})
        cells = [_accuracy(by_stage[stage]) if stage in by_stage else "" for stage in stages]
        rows.append([name, " / ".join(sizes), " / ".join(chances), *cells])
    chatcore = [f"{s['chatcore']:.4f}" if "chatcore" in s else "" for s in stages.values()]
    if any(chatcore):
        rows.append(["ChatCORE", "", "0", *chatcore])
    return ["task", "questions", "chance", *stages], rows


def _accuracy(result: dict[str, Any]) -> str:
    return f"{result['accuracy']:.1%} ({result['lo']:.0%}-{result['hi']:.0%})"


def questions_of(tasks: Sequence[Task], n: int, seed: int) -> list[tuple[Task, list[Item]]]:
    """Every task with its held-out questions: n per task; the kinds of tinyworld share n."""
    kinds = sum(task.name.startswith("tinyworld/") for task in tasks)
    each = {task.name: -(-n // kinds) if "/" in task.name else n for task in tasks}
    return [(task, task.items("val", each[task.name], seed)) for task in tasks]


def ask(
    knobs: EvaluateChatKnobs, engine: Any, questions: Sequence[tuple[Task, list[Item]]]
) -> dict[str, Any]:
    """Ask an Engine or a ForeignEngine all questions; returns the summary."""
    from nanochat.eval.chat import judge, summarise

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


def log_summary(
    knobs: EvaluateChatKnobs, loaded: "Loaded", summary: dict[str, Any], seconds: float
) -> None:
    """Add the summary to the run's log book."""
    checkpoint = loaded.checkpoint
    with logbook.Logbook(checkpoint.path.parent) as log:
        log.log(
            kind="chat_eval",
            step=checkpoint.step,
            stage=loaded.stage,
            seconds_taken=round(seconds, 2),
            task=" ".join(knobs.tasks),
            temperature=knobs.temperature,
            seed=knobs.seed,
            max_tokens=knobs.max_tokens,
            **summary,
        )


def evaluate(
    knobs: EvaluateChatKnobs, questions: Sequence[tuple[Task, list[Item]]]
) -> dict[str, Any]:
    """
    Load the model, ask it all questions, and print the results; those of a checkpoint are also
    logged. Returns the summary.
    """
    from nanochat.chat.generate import Engine
    from nanochat.model.checkpoint import Loaded, load_for_inference

    machine = knobs.device_type, knobs.dtype, knobs.seed
    if knobs.hf:
        from nanochat.export.foreign import load_exported

        loaded = engine = load_exported(knobs.hf, *machine, knobs.with_code)
    else:
        loaded = load_for_inference(knobs.source, knobs.model_tag, knobs.step, *machine)
        engine = Engine(loaded.model.cast_for_inference(), loaded.tokenizer)
    began = time.monotonic()
    summary, seconds = ask(knobs, engine, questions), time.monotonic() - began
    name, stages = knobs.hf, {"exported": summary}
    if isinstance(loaded, Loaded):
        log_summary(knobs, loaded, summary, seconds)
        name = loaded.checkpoint.tag
        stages = stage_results(name)
    print0(f"\naccuracy of {name} with 95 % intervals\n{columns(*stage_table(stages))}")
    for task, result in summary["kinds"].items():
        if result["clipped"]:
            print0(
                f"  {task}: {result['clipped']:,} of {result['n']:,} prompts were too long and "
                "lost their beginnings"
            )
        if result["unfinished"]:
            answers = result["n"] * knobs.num_samples
            print0(
                f"  {task}: {result['unfinished']:,} of {answers:,} answers were cut off at their "
                "token limit"
            )
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
