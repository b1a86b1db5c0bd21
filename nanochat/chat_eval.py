"""
Questions to a chat model: multiple choice by the log-probability of its letters, free answers by generation with the tool loop.

Every accuracy comes with its number of items, its 95 % interval and what guessing scores. What a right answer is, a task says.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nanochat.common import notice
from nanochat.engine import Engine, clip
from nanochat.runtime import out_of_memory, release_memory
from nanochat.tasks.common import Item, Task
from nanochat.tokenizer import Tokenizer

Z95 = 1.959964


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927): honest near 0 and 1, where the normal approximation is not."""
    if n == 0:
        return 0.0, 1.0
    p, z = right / n, Z95
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def accuracy(right: Sequence[bool], chance: float) -> dict[str, float]:
    """{accuracy, n, chance, lo, hi} of a list of verdicts."""
    lo, hi = wilson(sum(right), len(right))
    return {"accuracy": sum(right) / max(1, len(right)), "n": len(right), "chance": chance, "lo": lo, "hi": hi}


def visible_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What a user reads of a generated reply: no special tokens, no tool calls, no tool output."""
    s = tokenizer.specials
    closing = {s["<|python_start|>"]: s["<|python_end|>"], s["<|output_start|>"]: s["<|output_end|>"]}
    special, kept, until = set(s.values()), [], None
    for i in ids:
        if until is not None:
            until = None if i == until else until
        elif i in closing:
            until = closing[i]
        elif i not in special:
            kept.append(i)
    return tokenizer.decode(kept)


@torch.inference_mode()
def choose_letters(engine: Engine, prompts: Sequence[list[int]], letters: Sequence[Sequence[str]]) -> list[str]:
    """For every prompt the letter (of its own list) with the highest probability as the next token."""
    model, tok = engine.model, engine.tokenizer
    device = model.embed.weight.device
    longest = max(map(len, prompts))
    # padding follows the prompt, where causal attention never sees it
    idx = torch.tensor(
        [p + [tok.bos] * (longest - len(p)) for p in prompts], device=device
    )
    last = model(idx)[torch.arange(len(prompts), device=device), torch.tensor([len(p) - 1 for p in prompts], device=device)]
    logits = model.logits(last).cpu()
    ids = [[tok.encode(letter)[0] for letter in row] for row in letters]
    return [row[int(logits[i, options].argmax())] for i, (row, options) in enumerate(zip(letters, ids, strict=True))]


def judge(
    engine: Engine,
    task: Task,
    items: Sequence[Item],
    *,
    rows: int = 64,
    max_tokens: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """The verdict on the model's answer to every item, greedily sampled, in the items' order. Prompts of like length share a batch."""
    tok = engine.tokenizer
    room = engine.model.config.sequence_len - 1
    prompts = [tok.render_prompt(task.prompt(item)) for item in items]
    if (cut := sum(len(p) > room for p in prompts)) > 0:
        notice(f"{cut} of {len(prompts)} prompts of {task.name} are longer than the context and keep their end")
        prompts = [clip(p, room) for p in prompts]
    verdicts: list[bool] = [False] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    at = 0
    while at < len(order):
        chunk = order[at : at + rows]
        try:
            replies = list(_replies(engine, task, [prompts[i] for i in chunk], [items[i] for i in chunk], max_tokens))
        except RuntimeError as e:
            if not out_of_memory(e) or rows == 1:
                raise
            rows = max(1, rows // 2)
            release_memory(engine.model.embed.weight.device)
            notice(f"out of memory: going on with {rows} questions at a time")
            continue
        for i, reply in zip(chunk, replies, strict=True):
            verdicts[i] = task.evaluate(items[i], reply)
        at += len(chunk)
        progress(at)
    return verdicts


def _replies(engine: Engine, task: Task, prompts: list[list[int]], items: list[Item], max_tokens: int) -> Iterator[str]:
    if task.kind == "choice":
        yield from choose_letters(engine, prompts, [item["letters"] for item in items])
        return
    for row in engine.generate_batch(prompts, max_tokens=max_tokens, temperature=0.0):
        yield visible_text(engine.tokenizer, row.tokens)


def summarise(by_task: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Accuracy over all items, ChatCORE (the tasks' mean accuracy above chance, scaled so that 1 is perfect), and the tasks."""
    n = sum(int(t["n"]) for t in by_task.values())
    right = round(sum(t["accuracy"] * t["n"] for t in by_task.values()))
    chance = sum(t["chance"] * t["n"] for t in by_task.values()) / max(1, n)
    centred = [(t["accuracy"] - t["chance"]) / (1 - t["chance"]) for t in by_task.values()]
    lo, hi = wilson(right, n)
    return {
        "accuracy": right / max(1, n),
        "n": n,
        "chance": chance,
        "lo": lo,
        "hi": hi,
        "chatcore": sum(centred) / max(1, len(centred)),
        "kinds": by_task,
    }
