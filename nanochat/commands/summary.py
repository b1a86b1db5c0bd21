"""Put a finished chain of stages in one table and a summary.json, with a few sample exchanges."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nanochat.base import knobs, logbook
from nanochat.base.common import UserError, base_dir, entry, human
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.chat.generate import Engine
from nanochat.eval.chat import visible_text
from nanochat.eval.tasks import tinyworld
from nanochat.model.checkpoint import load_for_inference, locate
from nanochat.model.stages import STAGES, run_directory
from nanochat.train.knobs import MachineKnobs


@dataclass(kw_only=True)
class SummaryKnobs(MachineKnobs):
    """Summary"""

    model_tag: str = knob("", "tag of the model (default: the one saved last)")
    out: str = knob("", "folder for summary.json (default: quickstart under NANOCHAT_BASE_DIR)")
    seconds: float = knob(
        0.0, "what the whole chain took, installation included (0 = the sum of its stages)", low=0
    )
    samples: int = knob(7, "sample exchanges to show", low=0)


def figures(tag: str) -> dict[str, dict[str, Any]]:
    """{stage: {tokens, minutes, val_bpb, accuracy, n, lo, hi, kinds}} from the logbooks of every stage that was trained and evaluated."""
    out: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        directory = run_directory(stage, tag)
        rows = logbook.read(directory) if directory.is_dir() else []
        last = {
            kind: next((r for r in reversed(rows) if r["kind"] == kind), None)
            for kind in ("summary", "eval", "chat_eval")
        }
        if last["summary"] is None:
            continue
        talk = last["chat_eval"] or {}
        out[stage] = {
            "tokens": last["summary"]["tokens"],
            "minutes": round(last["summary"]["seconds"] / 60, 2),
            "val_bpb": (last["eval"] or {}).get("val_bpb"),
            **{name: talk.get(name) for name in ("accuracy", "n", "lo", "hi", "chance")},
            "kinds": talk.get("kinds", {}),
        }
    return out


def table_of(stages: dict[str, dict[str, Any]]) -> Table:
    kinds = list(dict.fromkeys(k for s in stages.values() for k in s["kinds"]))
    table = Table(
        "stage",
        "tokens",
        "minutes",
        "val bpb",
        "accuracy",
        *kinds,
        title="bits per byte: base on held-out text, later stages on held-out conversations",
    )
    for name, s in stages.items():
        overall = f"{s['accuracy']:.1%} of {s['n']}" if s["accuracy"] is not None else ""
        by_kind = (f"{s['kinds'][k]['accuracy']:.0%}" if k in s["kinds"] else "" for k in kinds)
        table.add_row(
            name,
            human(s["tokens"]),
            f"{s['minutes']:.1f}",
            f"{s['val_bpb']:.3f}" if s["val_bpb"] is not None else "",
            overall,
            *by_kind,
        )
    first = next(iter(stages.values()))
    if first["kinds"]:
        table.add_section()
        chances = (
            f"{first['kinds'][k]['chance']:.0%}" if k in first["kinds"] else "" for k in kinds
        )
        table.add_row("(chance)", "", "", "", f"{first['chance']:.1%}", *chances, style="dim")
    return table


def exchanges(k: SummaryKnobs, stage: str) -> list[tuple[str, str, str]]:
    """(question, the model's reply, what was expected) for held-out questions of all kinds in turn."""
    loaded = load_for_inference(
        stage, k.model_tag, device_type=k.device_type, dtype=k.dtype, seed=k.seed
    )
    tokenizer = loaded.tokenizer
    items = tinyworld.items("val", k.samples, seed=k.seed + 1)
    prompts = [tokenizer.render_prompt(tinyworld.prompt(item)) for item in items]
    rows = Engine(loaded.model.cast_for_inference(), tokenizer).generate_batch(
        prompts, max_tokens=64, temperature=0.0
    )
    return [
        (
            item["messages"][-2]["content"],
            visible_text(tokenizer, row.tokens).strip(),
            tinyworld.gold(item),
        )
        for item, row in zip(items, rows, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(SummaryKnobs, argv, command="summary")
    k.model_tag = k.model_tag or locate("base").tag
    stages = figures(k.model_tag)
    if not stages:
        raise UserError(
            f"no finished stage is tagged {k.model_tag!r} under {base_dir() / 'checkpoints'}: train one first, or name another --model_tag"
        )
    console = Console(width=None if Console().is_terminal else 140)
    last = list(stages)[-1]
    if k.samples and STAGES[last].chats:
        for question, reply, expected in exchanges(k, last):
            console.print(
                f"\n[dim]user:[/dim]      {escape(question)}\n[dim]assistant:[/dim] {escape(reply)}",
                highlight=False,
            )
            if reply != expected:
                console.print(f"[dim](expected: {escape(expected)})[/dim]", highlight=False)
        console.print()
    console.print(table_of(stages))
    minutes = round((k.seconds or 60 * sum(s["minutes"] for s in stages.values())) / 60, 2)
    summary = {"tag": k.model_tag, "minutes": minutes, "stages": stages}
    path = Path(k.out or base_dir() / "quickstart") / "summary.json"
    atomic_write(path, json.dumps(summary, indent=1))
    console.print(f"{minutes:.1f} minutes in all; the figures are in {path}", soft_wrap=True)
    return summary


if __name__ == "__main__":
    entry(main)
