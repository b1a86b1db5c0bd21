"""
How fast CORE items are scored: each full sequence alone, full sequences in batches, and as base_eval
does it, computing shared tokens once.

    python -m bench.core                       made-up items of the three kinds
    python -m bench.core --core=FOLDER         the tasks of an evaluation bundle

The model is random. All three ways compute logits only where something is scored. An overall rate
is over the same number of items per task. `agree` is the share of items answered as when scored
alone: all in float32, while bfloat16 may decide near ties differently. A longer context has more to
share. The last line of output is JSON; nothing is written.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from nanochat.base import knobs
from nanochat.base.common import entry, print0
from nanochat.base.knobs import knob
from nanochat.base.runtime import open_runtime
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.core_bundle import CoreTask, load_bundle
from nanochat.eval.core_items import CoreItem, prepare, separate_sequences
from nanochat.eval.core_scorer import Score, Scorer
from nanochat.model.config import ArchitectureKnobs, GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.knobs import MachineKnobs
from nanochat.train.scaling import Shape


@dataclass(kw_only=True)
class CoreSpeedKnobs(MachineKnobs, ArchitectureKnobs, Shape):
    """Measurement"""

    depth: int = knob(4, "layers", low=1)
    sequence_len: int = knob(512, "context length in tokens", low=16)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "float32", "precision of the computation"
    )
    vocab_size: int = knob(
        8192, "tokens of the vocabulary, which is learned from the items", low=265
    )
    core: str = knob("", "folder of an evaluation bundle (default: made-up items)")
    items: int = knob(200, "items per task", low=1)
    alone: int = knob(10, "of these, items that are also scored the slow ways", low=1)
    repeats: int = knob(3, "runs of each; their median counts", low=1)
    memory: float = knob(0, "megabytes per pass; 0 = what suits the device", low=0)


def made_up(seed: int) -> list[CoreTask]:
    """Tasks in the manner of ARC-Easy, HellaSwag, Winograd and Jeopardy, of random words."""
    rng = Random(seed)
    syllables = [a + b + c for a in "bdfklmprst" for b in "aeiou" for c in ("", "n", "r", "s")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(9000)]

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    def several(n: int, low: int, high: int) -> list[str]:
        return [say(low, high) + "." for _ in range(n)]

    easy = [
        {
            "query": f"Question: {say(12, 28)}?",
            "choices": several(4, 2, 6),
            "gold": rng.randrange(4),
        }
        for _ in range(800)
    ]
    swag = [
        {"query": say(25, 50), "choices": several(4, 15, 30), "gold": rng.randrange(4)}
        for _ in range(800)
    ]
    wino = [
        {
            "context_options": several(2, 10, 16),
            "continuation": say(3, 8) + ".",
            "gold": rng.randrange(2),
        }
        for _ in range(800)
    ]
    quiz = [{"context": say(15, 25), "continuation": say(1, 3)} for _ in range(800)]
    return [
        CoreTask("like arc_easy", "multiple_choice", 10, "\nAnswer: ", 0.25, easy),
        CoreTask("like hellaswag", "multiple_choice", 10, " ", 0.25, swag),
        CoreTask("like winograd", "schema", 0, " ", 0.5, wino),
        CoreTask("like jeopardy", "language_modeling", 10, "\nAnswer: ", 0.0, quiz),
    ]


@torch.inference_mode()
def one_by_one(model: GPT, items: Sequence[CoreItem]) -> list[Score]:
    """The plain way: a forward pass for each full sequence."""
    out = []
    for item in items:
        tokens = torch.tensor(item.ids, device=model.embed.weight.device)
        logits, targets = (
            model.logits(model(tokens[:, :-1])[0, item.starts[0] - 1 :]),
            tokens[0, item.starts[0] :],
        )
        nats = F.cross_entropy(logits, targets).item()
        out.append(Score(nats, len(targets), bool((logits.argmax(-1) == targets).all())))
    return out


def answers(items: Sequence[CoreItem], scores: Sequence[Score]) -> list[Any]:
    """
    The answer to each item, given the scores of all sequences in order: the number of the best
    sequence, or whether greedy decoding produces the only one.
    """
    out, rest = [], iter(scores)
    for item in items:
        mine = [next(rest) for _ in item.ids]
        out.append(
            min(range(len(mine)), key=lambda j: mine[j].nats) if len(mine) > 1 else mine[0].greedy
        )
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(CoreSpeedKnobs, argv, command="bench.core")
    rt = open_runtime(k.device_type, k.dtype, k.seed)
    tasks = load_bundle(k.core)[0] if k.core else made_up(k.seed)
    tok = Tokenizer.train(
        (text for task in tasks for row in task.rows[:400] for text in task.texts(row)),
        k.vocab_size,
    )
    arch: dict[str, Any] = {f.name: getattr(k, f.name) for f in fields(ArchitectureKnobs)}
    model = GPT.build(
        GPTConfig(**{**arch, **k.dimensions()}, vocab_size=tok.vocab_size), rt.device, rt.dtype
    )
    model.init_weights(k.seed)
    with torch.no_grad():
        for _, p, row in model.roster():
            if row.init in (
                "zero",
                "small",
            ):  # else its answers would hardly depend on what it reads
                p.normal_(0, 0.05)
    model.cast_for_inference()
    scorer = Scorer(model, k.memory * 2**20)

    def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
        rt.synchronize()
        began = time.perf_counter()
        found = work()
        rt.synchronize()
        return time.perf_counter() - began, found

    rows: list[dict[str, Any]] = []
    for task in tasks:
        items, prompts = prepare(task, tok, model.config.sequence_len, k.seed, k.items)
        some = sorted(Random(k.seed).sample(range(len(items)), min(k.alone, len(items))))
        few = [items[i] for i in some]
        single = separate_sequences(few, prompts)
        times: dict[str, list[float]] = {"alone": [], "batched": [], "shared": []}
        said: dict[str, list[Any]] = {}
        for _ in range(k.repeats):  # in turn, so that a busy moment meets all three
            s, found = seconds(lambda single=single: one_by_one(model, single))
            times["alone"].append(s / len(few))
            said["alone"] = answers(few, found)
            s, found = seconds(lambda single=single: scorer(single, [[tok.bos]]))
            times["batched"].append(s / len(few))
            said["batched"] = answers(few, [score for scores in found for score in scores])
            s, found = seconds(lambda items=items, prompts=prompts: scorer(items, prompts))
            times["shared"].append(s / len(items))
            said["shared"] = answers(few, [score for i in some for score in found[i]])
        per_item = {way: statistics.median(t) for way, t in times.items()}
        agree = {
            way: sum(a == b for a, b in zip(said["alone"], said[way], strict=True)) / len(few)
            for way in ("batched", "shared")
        }
        rows.append(
            {
                "task": task.name,
                "kind": task.kind,
                "items": len(items),
                "compared": len(few),
                "seconds": per_item,
                "agree": agree,
            }
        )
        print0(f"{task.name}: {per_item['alone'] / per_item['shared']:.1f} times as fast as alone")

    def cells(name: str, t: dict[str, float], agree: float) -> list[str]:
        rates = [1 / t[way] for way in ("alone", "batched", "shared")]
        return [
            name,
            *(f"{x:,.1f}" for x in rates),
            f"{rates[2] / rates[0]:.1f}",
            f"{rates[2] / rates[1]:.1f}",
            f"{agree:.0%}",
        ]

    mean = {
        way: statistics.fmean(row["seconds"][way] for row in rows)
        for way in ("alone", "batched", "shared")
    }
    compared = sum(row["compared"] for row in rows)
    agree = {
        way: sum(row["agree"][way] * row["compared"] for row in rows) / compared
        for way in ("batched", "shared")
    }
    title = (
        f"items per second: depth {k.depth}, width {model.config.n_embd}, "
        f"context {k.sequence_len}, {rt.dtype_name} on {rt.device.type}"
    )
    table = Table(
        "task",
        "alone",
        "batched",
        "shared",
        "shared / alone",
        "shared / batched",
        "agree",
        title=title,
    )
    for row in rows:
        table.add_row(*cells(row["task"], row["seconds"], row["agree"]["shared"]))
    table.add_section()
    table.add_row(*cells("all", mean, agree["shared"]))
    Console(width=120).print(table)
    out = {
        "depth": k.depth,
        "sequence_len": k.sequence_len,
        "dtype": rt.dtype_name,
        "tasks": len(rows),
        "compared": compared,
        **{f"{way}_items_per_sec": round(1 / t, 2) for way, t in mean.items()},
        "ratio": round(mean["alone"] / mean["shared"], 2),
        "ratio_to_batched": round(mean["batched"] / mean["shared"], 2),
        "agree": round(agree["shared"], 4),
        "agree_batched": round(agree["batched"], 4),
    }
    print0(json.dumps(out))
    return {**out, "rows": rows}


if __name__ == "__main__":
    entry(main)
