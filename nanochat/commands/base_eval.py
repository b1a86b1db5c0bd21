"""Look at a base model: bits per byte on the validation splits, what it writes after a few beginnings, and the CORE score if asked for."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from nanochat.base import knobs, logbook
from nanochat.base.common import duration, entry, print0
from nanochat.base.knobs import knob
from nanochat.chat.generate import Engine
from nanochat.commands import base_loss
from nanochat.commands.base_train import PROMPTS
from nanochat.eval import core as core_eval
from nanochat.eval.core_bundle import CoreTask, load_bundle
from nanochat.model.checkpoint import Loaded
from nanochat.train.stage import session


@dataclass(kw_only=True)
class EvaluateBaseKnobs(base_loss.BitsPerByteKnobs):
    """Evaluation"""

    splits: tuple[str, ...] = knob(("val",), "splits to read")
    prompts: tuple[str, ...] = knob(PROMPTS, "beginnings to go on from", alias="-p")
    max_tokens: int = knob(48, "longest continuation in tokens", alias="-m", low=1)
    temperature: float = knob(
        0.7, "of the second continuation; the first is greedy", alias="-t", low=0
    )
    core: str = knob(
        "",
        "folder of a CORE bundle (core.yaml, eval_meta_data.csv, eval_data/) to score the model on",
    )
    max_per_task: int = knob(500, "items of a CORE task, drawn by the seed; 0 = all", low=0)
    core_memory: float = knob(
        0,
        "megabytes that a pass over CORE items may take; 0 = what suits the device; changes no result",
        low=0,
    )


def core(
    k: EvaluateBaseKnobs, loaded: Loaded, tasks: list[CoreTask], absent: list[str]
) -> dict[str, Any]:
    """Every task's row, as it comes a line each where there is no terminal to show a bar on, and then the summary."""
    scorer, console, results = core_eval.Scorer(loaded.model, k.core_memory * 2**20), Console(), {}
    began = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal or not loaded.runtime.is_main,
    ) as bar:
        for number, task in enumerate(tasks, 1):
            line, start = (
                bar.add_task(f"{number}/{len(tasks)} {task.name}", total=None),
                time.monotonic(),
            )

            def show(done: int, n: int, line: Any = line) -> None:
                bar.update(line, completed=done, total=n)

            results[task.name] = r = core_eval.evaluate(
                scorer, task, loaded.tokenizer, loaded.runtime, k.max_per_task, show
            )
            bar.remove_task(line)
            if not console.is_terminal:
                print0(
                    f"  {number}/{len(tasks)} {task.name:<34}{r['accuracy']:>7.1%} of {r['n']}  {duration(time.monotonic() - start)}"
                )
    seconds = round(time.monotonic() - began, 2)
    return {
        **core_eval.summarise(results, absent),
        "max_per_task": k.max_per_task,
        "seed": k.seed,
        "seconds_taken": seconds,
    }


def table(found: dict[str, Any]) -> Table:
    """Task by accuracy with its 95 % interval, chance and centred accuracy; items with fewer examples, cropped, with a cropped answer."""
    heads = "kind", "n", "accuracy", "chance", "centred", "examples", "fewer", "cropped", "overlong"
    out = Table(Column("task", no_wrap=True), *heads, title=found["name"])
    for name, r in found["tasks"].items():
        examples = f"{r['had']:.1f} of {r['shots']}" if r["fewer"] else str(r["shots"])
        figures = (
            f"{r['n']:,}",
            f"{r['accuracy']:.1%} ({r['lo']:.1%}-{r['hi']:.1%})",
            f"{r['chance']:.1%}",
            f"{r['centred']:+.3f}",
        )
        out.add_row(
            name,
            r["kind"],
            *figures,
            examples,
            *(f"{r[what]:,}" if r[what] else "" for what in ("fewer", "cropped", "overlong")),
        )
    for name in found["absent"]:
        out.add_row(name, "absent")
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(EvaluateBaseKnobs, argv, command="base_eval")

    def work() -> dict[str, Any]:
        bundle = load_bundle(k.core) if k.core else None  # before anything that takes time
        loaded, bpb = base_loss.measure(k)
        engine = Engine(loaded.model.cast_for_inference(), loaded.tokenizer)
        samples: dict[str, list[str]] = {p: [] for p in k.prompts}
        for temperature in (0.0, k.temperature):
            rows = engine.generate_batch(
                [loaded.tokenizer.encode(p, bos=True) for p in k.prompts],
                max_tokens=k.max_tokens,
                temperature=temperature,
                seed=k.seed,
            )
            for prompt, row in zip(k.prompts, rows, strict=True):
                samples[prompt].append(loaded.tokenizer.decode(row.tokens))
        for prompt, texts in samples.items():
            print0(*(f"\n{prompt}|{text}" for text in texts), sep="")
        out: dict[str, Any] = {"bpb": bpb, "samples": samples}
        with logbook.Logbook(loaded.checkpoint.path.parent) as log:
            log.log(kind="base_eval", step=loaded.checkpoint.step, val_bpb=bpb, samples=samples)
            if bundle:
                print0(
                    f"\n{k.core}: {len(bundle[0])} tasks"
                    + (f"; no data for {', '.join(bundle[1])}" if bundle[1] else "")
                )
                out["core"] = found = core(k, loaded, *bundle)
                log.log(kind="core_eval", step=loaded.checkpoint.step, stage=k.source, **found)
                if loaded.runtime.is_main:
                    Console(width=None if sys.stdout.isatty() else 160).print(table(found))
                shown = f"{found['name']}: {found['score']:+.4f} ± {found['margin']:.4f} (95 %; guessing gives {found['guess']:+.4f})"
                print0(f"{shown}, {duration(found['seconds_taken'])}")
        return out

    with session():
        return work()


if __name__ == "__main__":
    entry(main)
