"""Summarise a model's finished stages in a table and summary.json, with some sample exchanges."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.base import logbook
from nanochat.base.common import UserError, base_dir, columns, entry, human, print0, user_path
from nanochat.base.files import write_json
from nanochat.base.knobs import knob, parse
from nanochat.base.strangers import is_number
from nanochat.eval.scores import stage_results, stage_table
from nanochat.eval.tasks import tinyworld
from nanochat.eval.tasks.common import Item, Task
from nanochat.model.stages import STAGES, one_chain, run_directory
from nanochat.train.knobs import MachineKnobs


@dataclass(kw_only=True)
class SummaryKnobs(MachineKnobs):
    """Summary"""

    model_tag: str = knob("", "tag of the model (default: the one saved last)")
    out: str = knob("", "folder for summary.json (default: summary/TAG in the base folder)")
    seconds: float = knob(
        0.0, "duration of the whole chain, installation included (0 = the sum of its stages)", low=0
    )
    samples: int = knob(7, "sample exchanges to show", low=0)


def stage_figures(tag: str) -> dict[str, dict[str, Any]]:
    """
    {stage: {tokens, minutes, val_bpb, accuracy, n, lo, hi, chance, step, kinds}} of every finished
    stage, from its logbook; step is that of the accuracy if it is not the last. Values that were
    not measured are None.
    """
    logs = {stage: logbook.read(run_directory(stage, tag)) for stage in STAGES}
    finished = {s: rows for s, rows in logs.items() if "summary" in {r["kind"] for r in rows}}
    logs = one_chain(finished, tag)
    results = stage_results(logs)
    figures: dict[str, dict[str, Any]] = {}
    for stage, rows in logs.items():
        last = {row["kind"]: row for row in rows}
        if not {"tokens", "seconds"} <= last["summary"].keys():
            continue
        answers = results.get(stage, {})
        tokens, seconds, bpb = (
            value if is_number(value := last.get(kind, {}).get(name)) else None
            for kind, name in (("summary", "tokens"), ("summary", "seconds"), ("eval", "val_bpb"))
        )
        figures[stage] = {
            "tokens": tokens or 0,
            "minutes": round((seconds or 0) / 60, 2),
            "val_bpb": bpb,
            **{name: answers.get(name) for name in ("accuracy", "n", "lo", "hi", "chance", "step")},
            "kinds": answers.get("kinds", {}),
        }
    return figures


def table(stages: dict[str, dict[str, Any]]) -> str:
    """The tokens, minutes and bits per byte of each stage, for a terminal."""
    rows = []
    for stage, figures in stages.items():
        bpb = figures["val_bpb"]
        row = stage, human(figures["tokens"]), f"{figures['minutes']:.1f}"
        rows.append([*row, "" if bpb is None else f"{bpb:.3f}"])
    return columns(["stage", "tokens", "minutes", "val bpb"], rows)


def exchanges(
    knobs: MachineKnobs, stage: str, tag: str, items: Sequence[Item]
) -> list[tuple[str, str, str]]:
    """(question, the reply of a stage's newest model, the expected reply) for every item."""
    from nanochat.chat.generate import Engine
    from nanochat.eval.chat import visible_text
    from nanochat.model.checkpoint import load_for_inference

    loaded = load_for_inference(stage, tag, None, knobs.device_type, knobs.dtype, knobs.seed)
    tokenizer = loaded.tokenizer
    engine = Engine.of(loaded)
    prompts = [tokenizer.render_prompt(Task.prompt(item)) for item in items]
    samples = engine.generate_batch(prompts, max_tokens=64, temperature=0.0)
    return [
        (
            item["messages"][-2]["content"],
            visible_text(tokenizer, sample.tokens).strip(),
            Task.gold(item),
        )
        for item, sample in zip(items, samples, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    knobs, _ = parse(SummaryKnobs, argv, command="summary")

    from nanochat.model.checkpoint import choose

    tag = knobs.model_tag or choose()[1].tag
    stages = stage_figures(tag)
    if not stages:
        raise UserError(
            f"no finished stage is tagged {tag!r} under {base_dir() / 'checkpoints'}: train one "
            "first, or choose another --model_tag"
        )
    last = list(stages)[-1]
    if knobs.samples and STAGES[last].chats:
        items = tinyworld.items("val", knobs.samples, seed=knobs.seed + 1)
        for question, reply, expected in exchanges(knobs, last, tag, items):
            print0(f"\nuser:      {question}\nassistant: {reply}")
            if reply != expected:
                print0(f"(expected: {expected})")
    print0(f"\n{table(stages)}")
    print0("val bpb: base on held-out text, later stages on held-out conversations\n")
    if answers := {stage: figures for stage, figures in stages.items() if figures["kinds"]}:
        print0(columns(*stage_table(answers)))
    seconds = knobs.seconds or 60 * sum(figures["minutes"] for figures in stages.values())
    summary = {"tag": tag, "minutes": round(seconds / 60, 2), "stages": stages}
    path = user_path(knobs.out or base_dir() / "summary" / tag) / "summary.json"
    write_json(path, summary)
    print0(f"{summary['minutes']:.1f} minutes in all; the figures are in {path}")
    return summary


if __name__ == "__main__":
    entry(main)
