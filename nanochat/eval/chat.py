"""
Questions to a chat model: multiple choice by the log-probability of its letters, free answers by generation with the tool loop.

Every accuracy comes with its number of items, its 95 % interval and what guessing scores. What a right answer is, a task says. No result
depends on how many questions are asked at a time. A prompt that leaves no room for the answer keeps its first token and its end, and is
counted: room is one letter, or what a free answer may take at most, but never more than a quarter of the context.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.base.common import notice
from nanochat.base.runtime import out_of_memory, release_memory
from nanochat.chat.generate import Engine, clip
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.tasks.common import Item, Task

Z95 = 1.959964
CHATCORE = "ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"


def wilson(right: float, n: int) -> tuple[float, float]:
    """
    The 95 % interval of a share (Wilson, 1927): honest near 0 and 1, where the normal approximation is not. For a mean of shares too, where
    it is on the wide side: they vary at most as much as verdicts with that mean.
    """
    if n == 0:
        return 0.0, 1.0
    p, z = right / n, Z95
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def accuracy(right: Sequence[float], chance: float) -> dict[str, float]:
    """{accuracy, n, chance, lo, hi} of a list of verdicts, or of shares of right ones."""
    lo, hi = wilson(sum(right), len(right))
    return {
        "accuracy": sum(right) / max(1, len(right)),
        "n": len(right),
        "chance": chance,
        "lo": lo,
        "hi": hi,
    }


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, when `right` of n >= k are: unbiased (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


@dataclass
class Verdicts:
    """What became of the items of a task, in their order."""

    right: list[int]  # how many of an item's samples are right
    samples: int
    clipped: int  # prompts that were cut
    unfinished: int = 0  # answers that ran into their limit

    def result(self, chance: float) -> dict[str, Any]:
        """accuracy() of single answers, and under "pass" that of the best of 2, 4, ... and of all samples."""
        ks = sorted(
            {1 << i for i in range(1, self.samples.bit_length()) if 1 << i <= self.samples}
            | {self.samples} - {1}
        )
        shares = {k: [pass_at_k(self.samples, right, k) for right in self.right] for k in (1, *ks)}
        best = {str(k): accuracy(shares[k], 1 - (1 - chance) ** k) for k in ks}
        more = {"samples": self.samples, "pass": best} if best else {}
        return {
            **accuracy(shares[1], chance),
            "clipped": self.clipped,
            "unfinished": self.unfinished,
            **more,
        }


def visible_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What a user reads of a generated reply: no special tokens, no tool calls, no tool output."""
    s = tokenizer.specials
    closing = {
        s["<|python_start|>"]: s["<|python_end|>"],
        s["<|output_start|>"]: s["<|output_end|>"],
    }
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
def choose_letters(
    engine: Engine, prompts: Sequence[list[int]], letters: Sequence[Sequence[str]]
) -> list[str]:
    """
    For every prompt the letter (of its own list) that is likeliest to come next, as the token that a gold reply begins with. An item with
    labels of more tokens than one has them scored whole, each behind the prompt.
    """
    model, tok = engine.model, engine.tokenizer
    labels = [[tok.encode(letter) for letter in row] for row in letters]
    short = [i for i, row in enumerate(labels) if all(len(ids) == 1 for ids in row)]
    chosen = [""] * len(prompts)
    if short:
        ends = _hidden(engine, [prompts[i] for i in short])
        for i, row in zip(short, ends, strict=True):
            # the likeliest has the highest logit: in float32, since in bfloat16 logits tie, and ties would go to the first letter
            scores = model.head_weight[[ids[0] for ids in labels[i]]].float() @ row[-1].float()
            chosen[i] = letters[i][int(scores.argmax())]
    for i in sorted(set(range(len(prompts))) - set(short)):
        ends = _hidden(engine, [prompts[i] + ids[:-1] for ids in labels[i]])
        sums = []
        for row, ids in zip(ends, labels[i], strict=True):
            logp = model.logits(row[-len(ids) :]).log_softmax(-1)
            sums.append(float(logp[range(len(ids)), ids].sum()))
        chosen[i] = letters[i][sums.index(max(sums))]
    return chosen


def _hidden(engine: Engine, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """The hidden states (T, D) of every row; the padding follows it, where causal attention never sees it."""
    longest = max(map(len, rows))
    idx = torch.tensor(
        [row + [engine.tokenizer.bos] * (longest - len(row)) for row in rows],
        device=engine.model.embed.weight.device,
    )
    return [h[: len(row)] for h, row in zip(engine.model(idx), rows, strict=True)]


def judge(
    engine: Engine,
    task: Task,
    items: Sequence[Item],
    *,
    rows: int = 64,
    max_tokens: int = 0,
    num_samples: int = 1,
    temperature: float = 0.0,
    seed: int = 42,
    progress: Callable[[int], None] = lambda done: None,
) -> Verdicts:
    """
    Ask every item and judge the answers: `num_samples` of each, `rows` at a time (questions of like length together, fewer when memory runs
    out), of at most max_tokens tokens (0: as the task has it). Letters are chosen once, whatever the number of samples.
    """
    tok, context = engine.tokenizer, engine.model.config.sequence_len
    free = task.kind == "generative"
    samples, limit = (num_samples, max_tokens or task.max_tokens) if free else (1, 1)
    room = context - min(limit, max(1, context // 4))
    prompts = [tok.render_prompt(task.prompt(item)) for item in items]
    out = Verdicts([0] * len(items), samples, sum(len(p) > room for p in prompts))
    if out.clipped:
        notice(
            f"{out.clipped} of {len(prompts)} prompts of {task.name} leave no room for the answer and keep their end"
        )
        prompts = [clip(p, room) for p in prompts]
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    at, together = 0, max(1, rows // samples)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # programs are judged by running them
        while at < len(order):
            chunk = order[at : at + together]
            try:
                if free:
                    seeds = [seed << 32 | i for i in chunk]
                    made = engine.generate_batch(
                        [prompts[i] for i in chunk], samples, limit, temperature, seed=seeds
                    )
                    out.unfinished += sum(row.finish != "stop" for row in made)
                    replies = [visible_text(tok, row.tokens) for row in made]
                else:
                    replies = choose_letters(
                        engine, [prompts[i] for i in chunk], [items[i]["letters"] for i in chunk]
                    )
            except RuntimeError as e:
                if not out_of_memory(e) or together == 1:
                    raise
                together //= 2
                release_memory()
                notice(f"out of memory: going on with {together} questions at a time")
                continue
            asked = [i for i in chunk for _ in range(samples)]
            for i, right in zip(
                asked,
                pool.map(lambda i, reply: task.evaluate(items[i], reply), asked, replies),
                strict=True,
            ):
                out.right[i] += right
            at += len(chunk)
            progress(at)
    return out


def summarise(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """
    Accuracy over all items, the tasks' mean accuracy above chance ("centred": scaled so that 1 is perfect), and the tasks. "chatcore" is
    that mean over the tasks of CHATCORE, where all of them are there: over fewer it would be another figure.
    """
    n = sum(int(t["n"]) for t in by_task.values())
    right = round(sum(t["accuracy"] * t["n"] for t in by_task.values()))
    chance = sum(t["chance"] * t["n"] for t in by_task.values()) / max(1, n)
    above = {name: (t["accuracy"] - t["chance"]) / (1 - t["chance"]) for name, t in by_task.items()}
    core = (
        {"chatcore": sum(above[name] for name in CHATCORE) / len(CHATCORE)}
        if set(CHATCORE) <= set(above)
        else {}
    )
    centred = {"centred": sum(above.values()) / max(1, len(above)), **core}
    lo, hi = wilson(right, n)
    return {
        "accuracy": right / max(1, n),
        "n": n,
        "chance": chance,
        "lo": lo,
        "hi": hi,
        **centred,
        "kinds": dict(by_task),
    }
