"""Ask a model the questions of one or more tasks and report accuracy with intervals, by kind of question and stage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nanochat import chat_eval, checkpoint, knobs, logbook
from nanochat.common import UserError, duration, entry, print0
from nanochat.engine import Engine
from nanochat.knobs import knob
from nanochat.runtime import open_runtime
from nanochat.stage import MachineKnobs
from nanochat.tasks import tinyworld
from nanochat.tasks.common import Task
from nanochat.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Knobs(MachineKnobs):
    """Evaluation"""

    source: Literal["base", "mid", "sft", "rl"] = knob("sft", "stage of the model to ask", alias="-i")
    tasks: tuple[str, ...] = knob(("tinyworld",), "what to ask: tinyworld, or one of its kinds as tinyworld/facts ...", alias="-a")
    num_items: int = knob(700, "questions of a task, over all its kinds", alias="-n", low=1)
    model_tag: str = knob("", "tag of the model (default: the one saved last)", alias="-g")
    step: int | None = knob(None, "step of the checkpoint (default: the newest)", alias="-s")
    batch_size: int = knob(64, "questions answered together", alias="-b", low=1)
    max_tokens: int = knob(64, "longest answer in tokens", alias="-m", low=1)


def named_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks that the names stand for; UserError for a name that is none."""
    known = {task.name: task for task in tinyworld.TASKS.values()}
    out: list[Task] = []
    for name in names:
        found = [task for full, task in known.items() if name in (full, full.split("/")[0])]
        if not found:
            raise UserError(f"there is no task {name!r}: choose from tinyworld, {', '.join(known)}")
        out += found
    return out


def stage_table(tag: str) -> Table | None:
    """Stage by kind, from the last chat_eval of every stage of this tag."""
    last = {}
    for stage in checkpoint.STAGES:
        directory = checkpoint.run_directory(stage, tag)
        rows = [r for r in logbook.read(directory) if r["kind"] == "chat_eval"] if directory.is_dir() else []
        if rows:
            last[stage] = rows[-1]
    kinds = list(dict.fromkeys(kind for row in last.values() for kind in row["kinds"]))
    if not kinds:
        return None
    table = Table("question", "chance", *last, title=f"accuracy of {tag} with 95 % intervals")

    def cell(x: dict[str, float] | None) -> str:
        return f"{x['accuracy']:.1%} ({x['lo']:.0%}-{x['hi']:.0%})" if x else ""

    for kind in kinds:
        shown = [row["kinds"].get(kind) for row in last.values()]
        table.add_row(kind, f"{next(x for x in shown if x)['chance']:.0%}", *map(cell, shown))
    table.add_section()
    table.add_row("all", f"{next(iter(last.values()))['chance']:.0%}", *(f"{cell(row)} of {row['n']}" for row in last.values()))
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(Knobs, argv, command="chat_eval")
    tasks = named_tasks(k.tasks)
    path = checkpoint.locate(k.source, k.model_tag, k.step)
    rt = open_runtime(k.device_type, k.dtype, k.seed)
    tokenizer = Tokenizer.load()
    model, meta = checkpoint.load_model(path, rt.device, rt.dtype, tokenizer.fingerprint)
    engine = Engine(model.cast_for_inference(), tokenizer)
    began, results = time.monotonic(), {}
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for task in tasks:
            items = task.items("val", -(-k.num_items // len(tasks)), k.seed)
            line = bar.add_task(task.name, total=len(items))
            right = chat_eval.judge(
                engine,
                task,
                items,
                rows=k.batch_size,
                max_tokens=k.max_tokens,
                progress=lambda done, line=line: bar.update(line, completed=done),
            )
            results[task.name.removeprefix("tinyworld/")] = chat_eval.accuracy(right, task.chance)
    summary = chat_eval.summarise(results)
    seconds = time.monotonic() - began
    with logbook.Logbook(path.parent) as log:
        log.log(kind="chat_eval", step=meta["step"], stage=k.source, seconds_taken=round(seconds, 2), **summary)
    if table := stage_table(path.parent.name):
        console.print(table)
    print0(f"{k.source} at step {meta['step']:,}: {summary['accuracy']:.1%} of {summary['n']} questions in {duration(seconds)}")
    return summary


if __name__ == "__main__":
    entry(main)
