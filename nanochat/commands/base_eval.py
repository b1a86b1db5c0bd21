"""Evaluate a base model: bits per byte, samples, and the CORE score if asked for."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.base import logbook
from nanochat.base.common import columns, duration, entry, opening, print0
from nanochat.base.knobs import knob, parse
from nanochat.base.progress import progress
from nanochat.commands.base_loss import BitsPerByteKnobs, measure, measure_splits
from nanochat.commands.base_train import PROMPTS
from nanochat.eval.core_bundle import CoreTask, load_bundle
from nanochat.train.knobs import ExportedModelKnobs


@dataclass(kw_only=True)
class EvaluateBaseKnobs(ExportedModelKnobs, BitsPerByteKnobs):
    """Evaluation"""

    splits: tuple[Literal["train", "val"], ...] = knob(("val",), "splits to read")
    prompts: tuple[str, ...] = knob(PROMPTS, "prompts to continue", alias="-p")
    max_tokens: int = knob(48, "maximum length of a continuation in tokens", alias="-m", low=1)
    temperature: float = knob(
        0.7, "temperature of the second continuation; the first is greedy", alias="-t", low=0
    )
    core: str = knob(
        "",
        "folder of a CORE bundle (core.yaml, eval_meta_data.csv, eval_data/) to score the model on",
    )
    max_per_task: int = knob(500, "items per CORE task, drawn by the seed; 0 = all", low=0)
    core_memory: float = knob(
        0,
        "megabytes per pass over CORE items (0 = chosen for the device); does not change "
        "the results",
        low=0,
    )


def continuations(
    knobs: EvaluateBaseKnobs, engine: Any, temperatures: Sequence[float]
) -> dict[str, list[str]]:
    """
    {prompt: its continuations, one for each temperature}; they are also printed. `engine` is an
    Engine or a ForeignEngine.
    """
    tokenizer = engine.tokenizer
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in knobs.prompts]
    texts: dict[str, list[str]] = {prompt: [] for prompt in knobs.prompts}
    for temperature in temperatures:
        samples = engine.generate_batch(
            prompts, max_tokens=knobs.max_tokens, temperature=temperature, seed=knobs.seed
        )
        for prompt, sample in zip(knobs.prompts, samples, strict=True):
            texts[prompt].append(tokenizer.decode(sample.tokens))
    for prompt in knobs.prompts:
        for text in texts[prompt]:
            print0(f"\n{prompt}|{text}")
    return texts


def core_score(
    knobs: EvaluateBaseKnobs, loaded: Any, tasks: list[CoreTask], absent: list[str]
) -> dict[str, Any]:
    """
    Evaluate a model, a Loaded or a ForeignEngine, on all tasks, with a progress bar for each;
    prints and returns the summary, with the result of every task. `absent`: names of the CORE tasks
    that the bundle lacks.
    """
    from nanochat.eval.core import Scorer, evaluate, summarise

    began, results = time.monotonic(), {}
    scorer = Scorer(loaded.model, knobs.core_memory * 2**20)
    for number, task in enumerate(tasks, 1):
        with progress(None, f"{number}/{len(tasks)} {task.name}") as bar:
            result = evaluate(
                scorer, task, loaded.tokenizer, loaded.runtime, knobs.max_per_task, bar.update
            )
            bar.update(bar.completed, note=f"{result['accuracy']:.1%} right")
        results[task.name] = result
    summary = {
        **summarise(results, absent),
        "max_per_task": knobs.max_per_task,
        "seed": knobs.seed,
        "seconds_taken": round(time.monotonic() - began, 2),
    }
    print0(
        f"\n{core_table(summary)}\n{summary['name']}: {summary['score']:+.4f} "
        f"± {summary['margin']:.4f} (95 %; guessing scores {summary['guess']:+.4f}), "
        f"{duration(summary['seconds_taken'])}"
    )
    return summary


def core_table(summary: dict[str, Any]) -> str:
    """
    One line per task: accuracy with its 95 % interval, chance, centred accuracy, examples, and how
    many items have fewer examples, a cropped question or a cropped answer.
    """
    counts = "fewer", "cropped", "overlong"
    head = "task", "kind", "n", "accuracy", "chance", "centred", "examples", *counts
    rows = [
        (
            name,
            result["kind"],
            f"{result['n']:,}",
            f"{result['accuracy']:.1%} ({result['lo']:.1%}-{result['hi']:.1%})",
            f"{result['chance']:.1%}",
            f"{result['centred']:+.3f}",
            f"{result['had']:.1f} of {result['shots']}" if result["fewer"] else result["shots"],
            *(result[count] or "" for count in counts),
        )
        for name, result in summary["tasks"].items()
    ]
    blank = [""] * (len(head) - 2)
    return columns(head, rows + [(name, "absent", *blank) for name in summary["absent"]])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    knobs, origins = parse(EvaluateBaseKnobs, argv, command="base_eval")
    opening("base_eval")
    knobs.check_hf(origins, ["source", "model_tag", "step", "temperature"])

    from nanochat.chat.generate import Engine
    from nanochat.train.stage import session

    # First, so that a mistake in the bundle is reported before anything that takes time
    tasks, absent = load_bundle(knobs.core) if knobs.core else ([], [])
    with session():
        loaded: Any
        if knobs.hf:
            from nanochat.export.foreign import load_exported

            machine = knobs.device_type, knobs.dtype, knobs.seed
            loaded = engine = load_exported(knobs.hf, *machine, knobs.with_code)
            bpb, temperatures = measure_splits(knobs, loaded, knobs.data), [0.0]
        else:
            loaded, bpb = measure(knobs)
            engine = Engine.of(loaded)
            temperatures = [0.0, knobs.temperature]

        def log(kind: str, **row: Any) -> None:
            """Log a row for a checkpoint; an exported folder has no logbook."""
            if not knobs.hf:
                checkpoint = loaded.checkpoint
                logbook.add(checkpoint.path.parent, checkpoint.step, kind, **row)

        results: dict[str, Any] = {"bpb": bpb}
        results["samples"] = continuations(knobs, engine, temperatures)
        log("base_eval", **results)
        if tasks:
            results["core"] = core_score(knobs, loaded, tasks, absent)
            log("core_eval", stage=knobs.source, **results["core"])
        return results


if __name__ == "__main__":
    entry(main)
