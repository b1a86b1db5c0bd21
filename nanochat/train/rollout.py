"""
The feed of reinforcement learning: sample replies to questions, judge them, and hand out what they teach as weighted batches.

On-policy and without a reference model: each optimizer step draws questions, samples k replies to each from the model as it stands, and
weights every sampled token by its reply's advantage, the reward less the mean of its group (GRPO, Shao et al. 2024, without the division by
the standard deviation, as Liu et al. 2025, "Understanding R1-Zero-like training", argue). It learns from nothing that the model did not
say itself: prompts, tool output and padding are no targets. A reply that did not end with <|assistant_end|> is never right.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat.base.common import UserError, notice
from nanochat.base.runtime import out_of_memory, release_memory
from nanochat.chat.generate import Engine, Sample
from nanochat.data.feed import IGNORED, Batch
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.chat import visible_text
from nanochat.eval.tasks.common import Item, Task

Question = tuple[Task, Item]


@dataclass
class Sampler:
    """How replies are sampled: `rows` at a time, at most, and halved when memory runs out; what is sampled does not depend on it."""

    engine: Engine
    rows: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0

    def replies(
        self, questions: Sequence[Question], samples: int, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """`samples` replies to every question. What a question's own seed draws is the same beside whatever other questions."""
        tok = self.engine.tokenizer
        prompts = [tok.render_prompt(task.prompt(item)) for task, item in questions]
        order = sorted(
            range(len(prompts)), key=lambda i: len(prompts[i])
        )  # prompts of like length share a pass
        out: list[list[Sample]] = [[] for _ in prompts]
        at = 0
        while at < len(order):
            now = order[at : at + max(1, self.rows // samples)]
            try:
                rows = self.engine.generate_batch(
                    [prompts[i] for i in now],
                    samples,
                    self.max_tokens,
                    self.temperature,
                    self.top_k,
                    seed=[seeds[i] for i in now],
                )
            except RuntimeError as e:
                if not out_of_memory(e) or len(now) == 1:
                    raise
                self.rows = len(now) * samples // 2
                release_memory()
                notice(f"out of memory: {max(samples, self.rows)} replies at a time from now on")
                continue
            for j, i in enumerate(now):
                out[i] = rows[j * samples : (j + 1) * samples]
            at += len(now)
        return out


def reward(tok: Tokenizer, question: Question, row: Sample) -> float:
    """1 for a right reply that the model ended itself, else 0."""
    task, item = question
    return float(
        row.stop == tok.specials["<|assistant_end|>"]
        and task.evaluate(item, visible_text(tok, row.tokens))
    )


def said(row: Sample) -> int:
    """The sampled tokens of a reply, its stop token among them."""
    return sum(row.mask) + (row.stop is not None)


def lessons(rows: Sequence[Sample], rewards: Sequence[float]) -> list[tuple[Sample, float]]:
    """The different replies of a group, each with its advantages added up; none where all rewards are the same."""
    mean, replies, weights = sum(rewards) / len(rewards), {}, defaultdict(float)
    for row, r in zip(rows, rewards, strict=True):
        replies.setdefault(key := (*row.tokens, row.stop), row)
        weights[key] += r - mean
    return (
        [(replies[key], weight) for key, weight in weights.items()] if len(set(rewards)) > 1 else []
    )


def weighted_batches(
    replies: Sequence[tuple[Sample, float]],
    device_rows: int,
    bos: int,
    longest: int,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """
    (reply, weight) pairs as micro-batches of at most device_rows rows: targets at sampled tokens alone, the stop token among them. Rows of
    like width share a batch; widths are multiples of 64, `longest` at most: few shapes. Without replies: one ignored token.
    """
    rows = []
    for row, weight in replies:
        new, mask = row.tokens, row.mask
        if row.stop is not None:
            new, mask = [*new, row.stop], [*mask, 1]
        targets = [IGNORED] * (len(row.prompt) - 1) + [
            t if sampled else IGNORED for t, sampled in zip(new, mask, strict=True)
        ]
        rows.append(([*row.prompt, *new][:-1], targets, weight))
    out = []
    widths = [min(longest, 64 * max(1, -(-len(ids) // 64))) for ids, _, _ in rows]
    for T in sorted(set(widths)) or [1]:
        alike = [row for row, width in zip(rows, widths, strict=True) if width == T] or [
            ([], [], 0.0)
        ]
        for at in range(0, len(alike), device_rows):
            part = alike[at : at + device_rows]
            inputs = torch.tensor(
                [ids + [bos] * (T - len(ids)) for ids, _, _ in part], device=device
            )
            targets = torch.tensor(
                [t + [IGNORED] * (T - len(t)) for _, t, _ in part], device=device
            )
            weights = torch.tensor([w for _, _, w in part], dtype=torch.float32, device=device)[
                :, None
            ]
            out.append(Batch(inputs, targets, weights * (targets >= 0)))
    return out


def summed(counts: list[float], engine: Engine, world_size: int) -> list[float]:
    """Numbers added up over the ranks."""
    if world_size == 1:
        return counts
    t = torch.tensor(counts, dtype=torch.float64, device=engine.model.embed.weight.device)
    dist.all_reduce(t)
    return t.tolist()


class RolloutFeed:
    """
    next(feed) -> this rank's micro-batches of one optimizer step: `per_step` questions, `samples` replies to each by the model as it is,
    judged and weighted. Questions come shuffled anew in every epoch. Ends after `total` questions (whose last step may be short), or never.

    The loss of a step is sum(advantage * nll) / N with N all tokens sampled in it. A group whose replies are all right or all wrong has
    advantage 0: its tokens count in N, so that every question weighs the same whichever step it falls in, but its rows are not computed.
    Replies of a group that are the same are one row with their advantages added up. The loop divides by the targets that it sees; the
    weights therefore carry advantage * (targets seen / N).

    Nothing is made ahead, since the next step's replies are those of the next weights. `numbers`: what the log is told of the last step.
    """

    def __init__(
        self,
        sampler: Sampler,
        questions: Sequence[Question],
        *,
        per_step: int,
        samples: int,
        device_rows: int,
        total: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not questions:
            raise UserError(
                "no question leaves room for a reply: choose another task, or a model with a longer context"
            )
        self.sampler, self.questions, self.device_rows = sampler, questions, device_rows
        self.per_step, self.samples, self.total = per_step, samples, total
        self.rank, self.world_size = rank, world_size
        self.numbers: dict[str, float] = {}
        digest = hashlib.sha256(
            json.dumps([(task.name, item["messages"]) for task, item in questions]).encode()
        )
        self._state = {"seed": seed, "questions": digest.hexdigest()[:16], "drawn": 0}
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0)

    @property
    def progress(self) -> float:
        return min(1.0, self._state["drawn"] / self.total) if self.total else 0.0

    def set_progress(self, progress: float) -> str:
        """Nothing changes with the share of the run that is over."""
        return ""

    def _question(self, number: int) -> Question:
        """The question drawn as number 0, 1, ... of the run."""
        epoch, at = divmod(number, len(self.questions))
        if self._order[0] != epoch:
            self._order = (
                epoch,
                np.random.default_rng([self._state["seed"], epoch]).permutation(
                    len(self.questions)
                ),
            )
        return self.questions[self._order[1][at]]

    def __next__(self) -> list[Batch]:
        first = self._state["drawn"]
        stop = (
            first + self.per_step if self.total is None else min(first + self.per_step, self.total)
        )
        if first >= stop:
            raise StopIteration
        began, engine = time.monotonic(), self.sampler.engine
        mine = range(first, stop)[
            (stop - first) * self.rank // self.world_size : (stop - first)
            * (self.rank + 1)
            // self.world_size
        ]
        questions = [self._question(n) for n in mine]
        groups = self.sampler.replies(
            questions, self.samples, [(self._state["seed"] << 32) + n for n in mine]
        )
        rewards = [
            [reward(engine.tokenizer, q, row) for row in rows]
            for q, rows in zip(questions, groups, strict=True)
        ]

        taught = [
            lesson for rows, rs in zip(groups, rewards, strict=True) for lesson in lessons(rows, rs)
        ]
        everything = [row for rows in groups for row in rows]
        counts = [
            sum(map(sum, rewards)),
            sum(len(set(rs)) == 1 for rs in rewards),
            sum(row.finish != "stop" for row in everything),
            sum(len(row.tokens) for row in everything),
            sum(map(said, everything)),
            sum(said(row) for row, _ in taught),
        ]
        right, same, cut, length, n, seen = summed(counts, engine, self.world_size)
        replies = (stop - first) * self.samples
        self.numbers = {
            "reward": right / replies,
            "zero_variance": same / (stop - first),
            "truncated": cut / replies,
            "length": length / replies,
            "rollout_seconds": round(time.monotonic() - began, 3),
        }
        self._state["drawn"] = stop
        weighted = [(row, weight * seen / n) for row, weight in taught]
        model = engine.model
        return weighted_batches(
            weighted,
            self.device_rows,
            engine.tokenizer.bos,
            model.config.sequence_len,
            model.embed.weight.device,
        )

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position among the same questions with the same seed."""
        for what in ("seed", "questions"):
            if state[what] != self._state[what]:
                raise UserError(
                    f"cannot go on from this place: the {what} of this run changed; restore the flags or start afresh"
                )
        self._state = dict(state)
