"""Ask a model the questions of one or more tasks and report accuracy with intervals, by task and stage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nanochat.base import knobs, logbook
from nanochat.base.commands import near
from nanochat.base.common import UserError, duration, entry, notice, print0
from nanochat.base.knobs import knob
from nanochat.chat.generate import Engine
from nanochat.eval import chat as chat_eval
from nanochat.eval.tasks import arc, gsm8k, humaneval, mmlu, spellingbee, tinyworld
from nanochat.eval.tasks.common import Task
from nanochat.model.checkpoint import load_for_inference
from nanochat.model.stages import STAGES, run_directory
from nanochat.train.knobs import MachineKnobs

TASKS = [
    arc.EASY,
    arc.CHALLENGE,
    mmlu.TASK,
    gsm8k.TASK,
    humaneval.TASK,
    spellingbee.TASK,
    *tinyworld.TASKS.values(),
]


@dataclass(kw_only=True)
class EvaluateChatKnobs(MachineKnobs):
    """Evaluation"""

    source: Literal["base", "mid", "sft", "rl"] = knob(
        "sft", "stage of the model to ask", alias="-i"
    )
    tasks: tuple[str, ...] = knob(
        ("tinyworld",),
        "what to ask: ARC-Easy ARC-Challenge MMLU GSM8K HumanEval SpellingBee, all for these six; tinyworld, tinyworld/facts ...",
        alias="-a",
    )
    num_items: int = knob(
        800,
        "questions of a task (tinyworld: of all its kinds together); 0 = all there are",
        alias="-n",
        low=0,
    )
    num_samples: int = knob(
        1, "answers to every question that is answered freely; from 2 on pass@k is reported", low=1
    )
    temperature: float = knob(
        0.0, "of the answers' sampling; 0 = the likeliest token", alias="-t", low=0
    )
    max_tokens: int = knob(0, "longest answer in tokens; 0 = as the task has it", alias="-m", low=0)
    task_dir: str = knob(
        "", "folder with the tasks' data (default: fetched from the hub into the base folder)"
    )
    model_tag: str = knob("", "tag of the model (default: the one saved last)", alias="-g")
    step: int | None = knob(None, "step of the checkpoint (default: the newest)", alias="-s")
    batch_size: int = knob(64, "answers made together; changes no result", alias="-b", low=1)


def named_tasks(names: Sequence[str], task_dir: str = "") -> list[Task]:
    """The tasks that the names stand for, in whatever case, with their data from `task_dir`. UserError for a name that is none."""
    found: dict[str, Task] = {}
    for name in names:
        low = name.lower()
        group = [
            t
            for t in TASKS
            if low in (t.name.lower(), t.name.split("/")[0])
            or (low == "all" and t.name in chat_eval.CHATCORE)
        ]
        if not group:
            known = [t.name for t in TASKS]
            similar = near(low, map(str.lower, known))
            raise UserError(
                f"there is no task {name!r}{similar}: choose from all, tinyworld, {', '.join(known)}"
            )
        for task in group:
            if not (why := task.missing()):
                found[task.name] = (
                    replace(task, items=partial(task.items, folder=Path(task_dir)))
                    if task_dir
                    else task
                )
            elif low == "all":
                notice(f"{task.name} is left out: {why}")
            else:
                raise UserError(f"{task.name}: {why}")
    return list(found.values())


def stage_table(tag: str) -> Table | None:
    """Stage by task, from the last result of every task at each stage's last evaluated step."""
    stages: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        directory = run_directory(stage, tag)
        rows = (
            [r for r in logbook.read(directory) if r["kind"] == "chat_eval"]
            if directory.is_dir()
            else []
        )
        if found := {
            name: x
            for row in rows
            if row["step"] == rows[-1]["step"]
            for name, x in row["kinds"].items()
        }:
            stages[stage] = chat_eval.summarise(found)
    if not stages:
        return None
    lines: dict[str, dict[str, dict[str, Any]]] = {}  # name -> stage -> result
    for stage, summary in stages.items():
        for name, x in summary["kinds"].items():
            lines.setdefault(name, {})[stage] = x
            for k, best in x.get("pass", {}).items():
                lines.setdefault(f"{name} pass@{k}", {})[stage] = best
    table = Table(
        "task", "questions", "chance", *stages, title=f"accuracy of {tag} with 95 % intervals"
    )

    def row(name: str, by_stage: dict[str, dict[str, Any]]) -> None:
        sizes, chances = (
            {f"{x[key]:{form}}" for x in by_stage.values()}
            for key, form in (("n", ","), ("chance", ".0%"))
        )
        cells = (
            f"{x['accuracy']:.1%} ({x['lo']:.0%}-{x['hi']:.0%})"
            if (x := by_stage.get(stage))
            else ""
            for stage in stages
        )
        table.add_row(name, " / ".join(sorted(sizes)), " / ".join(sorted(chances)), *cells)

    for name, by_stage in lines.items():
        row(name, by_stage)
    table.add_section()
    if (
        len({frozenset((name, x["n"]) for name, x in s["kinds"].items()) for s in stages.values()})
        == 1
    ):  # of the same questions
        row("all", stages)
    if any("chatcore" in s for s in stages.values()):
        table.add_row(
            "ChatCORE",
            "",
            "0",
            *(f"{s['chatcore']:.4f}" if "chatcore" in s else "" for s in stages.values()),
        )
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(EvaluateChatKnobs, argv, command="chat_eval")
    if k.num_samples > 1 and k.temperature == 0:
        raise UserError(
            f"--num_samples={k.num_samples} at temperature 0 would be the same answer every time: give --temperature=1, say"
        )
    tasks = named_tasks(k.tasks, k.task_dir)
    loaded = load_for_inference(k.source, k.model_tag, k.step, k.device_type, k.dtype, k.seed)
    stored = loaded.checkpoint
    kinds = sum(task.name.startswith("tinyworld/") for task in tasks)
    items = {
        t.name: t.items("val", -(-k.num_items // (kinds if "/" in t.name else 1)), k.seed)
        for t in tasks
    }
    engine = Engine(loaded.model.cast_for_inference(), loaded.tokenizer)
    began, results = time.monotonic(), {}
    console = Console(width=None if Console().is_terminal else 140)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        for task in tasks:
            line = bar.add_task(task.name, total=len(items[task.name]))
            verdicts = chat_eval.judge(
                engine,
                task,
                items[task.name],
                rows=k.batch_size,
                max_tokens=k.max_tokens,
                num_samples=k.num_samples,
                temperature=k.temperature,
                seed=k.seed,
                progress=lambda done, line=line: bar.update(line, completed=done),
            )
            results[task.name.removeprefix("tinyworld/")] = verdicts.result(task.chance)
    summary = chat_eval.summarise(results)
    seconds = time.monotonic() - began
    asked = {
        "task": " ".join(k.tasks),
        "temperature": k.temperature,
        "seed": k.seed,
        "max_tokens": k.max_tokens,
    }
    with logbook.Logbook(stored.path.parent) as log:
        log.log(
            kind="chat_eval",
            step=stored.step,
            stage=k.source,
            seconds_taken=round(seconds, 2),
            **asked,
            **summary,
        )
    if table := stage_table(stored.tag):
        console.print(table)
    for name, x in results.items():
        counts = (
            (x["clipped"], x["n"], "prompts cut"),
            (x["unfinished"], x["n"] * x.get("samples", 1), "answers without an end"),
        )
        if said := ", ".join(f"{some:,} of {n:,} {what}" for some, n, what in counts if some):
            print0(f"  {name}: {said}")
    print0(
        f"{k.source} at step {stored.step:,}: {summary['accuracy']:.1%} of {summary['n']:,} questions in {duration(seconds)}"
    )
    return summary


if __name__ == "__main__":
    entry(main)
