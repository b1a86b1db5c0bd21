"""
Evaluation of a chat model on tasks. In multiple choice, the log-probabilities of the letters are
compared; other questions are answered by generation, with tool use.

Every accuracy comes with its number of items, its 95 % interval and the score of guessing. The task
decides whether an answer is right. Results do not depend on the batch size. A prompt that leaves
too little room for the answer keeps its first token and its end, and is counted as clipped. The
room is one token for a letter, and for a free answer its limit, but at most a quarter of the
context.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nanochat.base.common import notice
from nanochat.base.hardware import usable_cpus
from nanochat.base.runtime import halve_until_it_fits
from nanochat.chat.generate import Engine, clip
from nanochat.data.rendering import PART_TOKENS
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.scores import Result, accuracy, pass_at_k
from nanochat.eval.tasks.common import Item, Task


@dataclass
class Verdicts:
    """The outcome of asking the items of a task, in their order."""

    right: list[int]  # right samples per item
    samples: int  # per item
    clipped: int  # prompts that were shortened
    unfinished: int = 0  # answers that reached their token limit
    different: int = 0  # how many items ask something different; 0 = all of them

    def result(self, chance: float) -> Result:
        """
        accuracy() of single samples, with the counts. If there are several samples per item, also
        their number, and under "pass" the accuracy of the best of 2, 4, ... and of all samples.
        """

        def best_of(k: int, chance: float) -> Result:
            shares = [pass_at_k(self.samples, right, k) for right in self.right]
            return accuracy(shares, chance, self.different)

        result = best_of(1, chance) | {"clipped": self.clipped, "unfinished": self.unfinished}
        if self.samples > 1:
            counts = sorted({2**i for i in range(1, self.samples.bit_length())} | {self.samples})
            best = {str(k): best_of(k, 1 - (1 - chance) ** k) for k in counts}
            result |= {"samples": self.samples, "pass": best}
        return result


def visible_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a reply that a user sees: no special tokens, no tool calls, no tool output."""
    specials = tokenizer.specials
    closing = {specials[start]: specials[end] for start, end in PART_TOKENS.values()}
    hidden, visible = set(specials.values()), []
    end = None  # of the call or output that the token is in
    for token in ids:
        if end is not None:
            end = None if token == end else end
        elif token in closing:
            end = closing[token]
        elif token not in hidden:
            visible.append(token)
    return tokenizer.decode(visible)


@torch.inference_mode()
def choose_letters(
    engine: Engine, prompts: Sequence[list[int]], letters: Sequence[Sequence[str]]
) -> list[str]:
    """
    The most likely letter after each prompt among its own `letters`. Raises ValueError unless each
    is a single token, the one with which a reply of this letter begins.
    """
    model, tokenizer = engine.model, engine.tokenizer
    lengths = [len(prompt) for prompt in prompts]
    # Padding follows a prompt, where causal attention never sees it.
    padded = [[*ids, *[tokenizer.bos] * (max(lengths) - len(ids))] for ids in prompts]
    hidden = model(torch.tensor(padded, device=model.embed.weight.device))
    chosen = []
    for states, length, row in zip(hidden, lengths, letters, strict=True):
        # In float32: bfloat16 logits often tie, and a tie would go to the first letter.
        tokens = [token for (token,) in map(tokenizer.encode, row)]
        heads = model.head_weight[tokens].float()
        chosen.append(row[int((heads @ states[length - 1].float()).argmax())])
    return chosen


def _clipped_prompts(
    tokenizer: Tokenizer, task: Task, items: Sequence[Item], room: int
) -> tuple[list[list[int]], int]:
    """The prompts as tokens, at most `room` each, and how many of them had to be clipped."""
    prompts = [tokenizer.render_prompt(task.prompt(item)) for item in items]
    clipped = sum(len(prompt) > room for prompt in prompts)
    if clipped:
        notice(
            f"{clipped} of {len(prompts)} prompts of {task.name} are too long for the context: "
            "their beginnings are cut off to leave room for the answer"
        )
    return [clip(prompt, room) for prompt in prompts], clipped


def judge(
    engine: Engine,
    task: Task,
    items: Sequence[Item],
    *,
    rows: int = 64,
    max_tokens: int = 0,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    must_end: bool = False,
    seed: int = 42,
    progress: Callable[[int], None] = lambda done: None,
) -> Verdicts:
    """
    Ask every item and judge `num_samples` answers to each, of at most `max_tokens` tokens (0 = the
    task's own limit). They are generated `rows` at a time, or fewer after memory has run out, and
    prompts of similar length come together. A letter is chosen once, whatever the number of
    samples. With `must_end`, a reply that does not end by itself is wrong, as in reinforcement
    learning. `progress` receives the number of finished items.
    """
    free = task.kind == "generative"
    samples, limit = (num_samples, max_tokens or task.max_tokens) if free else (1, 1)
    context = engine.model.config.sequence_len
    room = context - min(limit, max(1, context // 4))
    prompts, clipped = _clipped_prompts(engine.tokenizer, task, items, room)
    different = len({task.about(item) for item in items})
    verdicts = Verdicts([0] * len(items), samples, clipped, different=different)
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    done = 0

    def replies(count: int) -> list[str]:
        """The replies to the next `count` items, the samples of an item one after another."""
        chunk = order[done : done + count]
        asked = [prompts[i] for i in chunk]
        if not free:
            return choose_letters(engine, asked, [items[i]["letters"] for i in chunk])
        seeds = [seed << 32 | i for i in chunk]
        generated = engine.generate_batch(asked, samples, limit, temperature, top_k, seed=seeds)
        verdicts.unfinished += sum(row.finish != "stop" for row in generated)
        end = engine.tokenizer.specials["<|assistant_end|>"]
        return [
            "" if must_end and row.stop != end else visible_text(engine.tokenizer, row.tokens)
            for row in generated
        ]

    count = max(1, rows // samples)
    with ThreadPoolExecutor(usable_cpus()) as pool:  # a task may judge a program by running it
        while done < len(order):
            texts, count = halve_until_it_fits(replies, count, f"{task.name} questions")
            chunk = order[done : done + count]
            asked = [i for i in chunk for _ in range(samples)]
            right = pool.map(lambda i, text: task.evaluate(items[i], text), asked, texts)
            for i, verdict in zip(asked, right, strict=True):
                verdicts.right[i] += verdict
            done += len(chunk)
            progress(done)
    return verdicts
