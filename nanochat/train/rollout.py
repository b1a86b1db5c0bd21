"""
The feed of reinforcement learning: sample replies, reward them, and return weighted batches.

Learning is on-policy and needs no reference model: every optimizer step draws questions and samples
several replies to each, its group, from the current model. Every sampled token is weighted by the
advantage of its reply: the reward minus the mean reward of the group (GRPO, Shao et al. 2024,
without dividing by the standard deviation, as Liu et al. 2025, "Understanding R1-Zero-like
training", recommend). The model learns only from tokens that it sampled, not from prompts, tool
output and padding. A reply that does not end with <|assistant_end|> is never correct.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.base.common import UserError, columns
from nanochat.base.runtime import Runtime, halve_until_it_fits
from nanochat.chat.generate import Engine, Sample
from nanochat.data.feed import IGNORED, Batch, row_width
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.chat import visible_text
from nanochat.eval.tasks.common import Item, Task
from nanochat.train.loop import sum_over_ranks

Question = tuple[Task, Item]


def survey(
    asked: Sequence[Question],
    kept: Sequence[Question],
    held_out: Mapping[Task, Sequence[Item]],
    per_step: int,
    samples: int,
    total: float | None,
) -> tuple[list[str], dict[str, Any]]:
    """
    The data of a run, as lines to print and as JSON. kept: those of the questions asked for that
    fit into the context. per_step: questions per step, with `samples` replies to each. total: of
    questions in the run, or None if time ends it. UserError for a task without a question to train
    on or to evaluate.
    """
    figures = []
    for task, items in held_out.items():
        available = sum(t is task for t, _ in asked)
        used = sum(t is task for t, _ in kept)
        if not used or not items:
            what = "training question that fits into the context" if items else "held-out question"
            raise UserError(f"{task.name} has no {what}: leave it out, or choose another task")
        figures.append(
            {
                "name": task.name,
                "questions": used,
                "too_long": available - used,
                "share": used / len(kept),
                "passes": total and total / len(kept),
                "held_out": len(items),
            }
        )
    passes = f"{total / len(kept):.2f}" if total else f"1 in {len(kept) / per_step:,.0f} steps"
    rows = [
        (f["name"], f["questions"], f["too_long"], f"{f['share']:.1%}", passes, f["held_out"])
        for f in figures
    ]
    head = "data", "questions", "too long", "drawn", "passes", "validation"
    step = f"{per_step:,} questions with {samples:,} replies each"
    length = f"{-(-total // per_step):,.0f} steps of {step}" if total else f"{step} per step"
    lines = [*columns(head, rows).splitlines(), f"this run: {length}"]
    return lines, {"tasks": figures, "step_questions": per_step, "questions": total}


@dataclass
class Sampler:
    """
    Samples replies, at most `rows` at a time; `rows` is halved when memory runs out. The replies do
    not depend on it.
    """

    engine: Engine
    rows: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0

    def replies(
        self, questions: Sequence[Question], samples: int, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """
        A group of `samples` replies to every question, from the seed of that question. They do not
        depend on the other questions.
        """
        prompts = [
            self.engine.tokenizer.render_prompt(task.prompt(item)) for task, item in questions
        ]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

        def generate(together: int) -> list[list[Sample]]:
            groups: list[list[Sample]] = [[] for _ in prompts]
            for start in range(0, len(prompts), together):
                chosen = by_length[start : start + together]
                rows = self.engine.generate_batch(
                    [prompts[i] for i in chosen],
                    samples,
                    self.max_tokens,
                    self.temperature,
                    self.top_k,
                    seed=[seeds[i] for i in chosen],
                )
                for n, i in enumerate(chosen):
                    groups[i] = rows[n * samples : (n + 1) * samples]
            return groups

        together = max(1, min(len(prompts), self.rows // samples))
        remedy = "choose a smaller --samples or --max_tokens"
        groups, fitting = halve_until_it_fits(generate, together, "a batch of questions", remedy)
        if fitting < together:
            self.rows = fitting * samples
        return groups


def reward(tokenizer: Tokenizer, question: Question, reply: Sample) -> float:
    """1.0 for a correct reply that the model ended itself, else 0.0."""
    task, item = question
    ended = reply.stop == tokenizer.specials["<|assistant_end|>"]
    return float(ended and task.evaluate(item, visible_text(tokenizer, reply.tokens)))


def sampled_tokens(reply: Sample) -> int:
    """The number of tokens that the model sampled in a reply, including its stop token."""
    return sum(reply.mask) + (reply.stop is not None)


def weighted_replies(
    replies: Sequence[Sample], rewards: Sequence[float]
) -> list[tuple[Sample, float]]:
    """
    (reply, weight) for the distinct replies of a group: the weight is the sum of the advantages of
    equal replies. An empty list if all rewards are the same, and so all advantages 0.
    """
    if len(set(rewards)) == 1:
        return []
    mean = sum(rewards) / len(rewards)
    distinct, weights = {}, defaultdict(float)
    for reply, its_reward in zip(replies, rewards, strict=True):
        key = (*reply.tokens, reply.stop)
        distinct.setdefault(key, reply)
        weights[key] += its_reward - mean
    return [(distinct[key], weight) for key, weight in weights.items()]


def weighted_batches(
    replies: Sequence[tuple[Sample, float]],
    device_rows: int,
    bos: int,
    longest: int,
    device: torch.device | str = "cpu",
    few_widths: bool = False,
) -> list[Batch]:
    """
    (reply, weight) pairs as micro-batches of at most device_rows rows, with targets only at sampled
    tokens. Rows are padded to the widths of data.feed.row_width, at most `longest`, and those of
    one width share batches. Without replies, one batch of a single token that is not a target.
    """
    by_width = defaultdict(list)
    for reply, weight in replies:
        tokens, mask = reply.tokens, reply.mask
        if reply.stop is not None:
            tokens, mask = [*tokens, reply.stop], [*mask, 1]
        inputs = [*reply.prompt, *tokens][:-1]
        targets = [t if sampled else IGNORED for t, sampled in zip(tokens, mask, strict=True)]
        targets = [IGNORED] * (len(reply.prompt) - 1) + targets
        width = row_width(len(inputs), longest, few_widths)
        padding = width - len(inputs)
        by_width[width].append((inputs + [bos] * padding, targets + [IGNORED] * padding, weight))
    if not replies:
        by_width[1].append(([bos], [IGNORED], 0.0))
    batches = []
    for _, rows in sorted(by_width.items()):
        for start in range(0, len(rows), device_rows):
            inputs, targets, weights = zip(*rows[start : start + device_rows], strict=True)
            inputs, targets = torch.tensor(inputs), torch.tensor(targets)
            learned = targets >= 0
            weights = torch.tensor(weights, dtype=torch.float32)[:, None] * learned
            parts = (t.to(device) for t in (inputs, targets, weights))
            batches.append(Batch(*parts, valid=int(learned.sum())))
    return batches


class RolloutFeed:
    """
    next(feed) -> this rank's micro-batches of one optimizer step: `samples` replies of the current
    model to each of `per_step` questions, rewarded and weighted. Questions are drawn in a random
    order, which is new in every epoch. The feed ends after `total` questions (the last step may be
    smaller), or never if that is None.

    The loss of a step is sum(advantage * nll) / N, with N the number of all tokens sampled in it.
    If all replies of a group are correct, or all are wrong, their advantage is 0: their rows are
    not computed, but their tokens count in N, so that the weight of a question does not depend on
    the others of its step. Equal replies of a group are one row with the sum of their advantages.
    As the loop divides by the number of targets, the weights are advantage * (targets / N).

    Nothing is prefetched, because the next replies depend on the next weights. The loop logs
    `numbers`, which describe the last step.
    """

    def __init__(
        self,
        sampler: Sampler,
        questions: Sequence[Question],
        runtime: Runtime,
        *,
        per_step: int,
        samples: int,
        device_rows: int,
        total: int | None = None,
        seed: int = 0,
    ):
        if not questions:
            raise UserError(
                "no question leaves room for a reply: choose another task, or a model with a "
                "longer context"
            )
        self.sampler, self.questions, self.runtime = sampler, questions, runtime
        self.per_step, self.samples, self.total = per_step, samples, total
        self.device_rows = device_rows
        self.numbers: dict[str, float] = {}
        text = json.dumps([(task.name, item["messages"]) for task, item in questions])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._state = {"seed": seed, "questions": digest, "drawn": 0}
        self._epoch, self._order = -1, np.zeros(0)

    @property
    def micro_batch(self) -> tuple[int, int]:
        """(rows, tokens per row) of a micro-batch that compiled code expects; 0: any width."""
        return self.device_rows, 0

    @property
    def progress(self) -> float:
        return min(1.0, self._state["drawn"] / self.total) if self.total else 0.0

    def set_progress(self, progress: float) -> str:
        """Nothing changes as the run progresses."""
        return ""

    def _question(self, number: int) -> Question:
        """The question that the run draws as number 0, 1, ..."""
        epoch, i = divmod(number, len(self.questions))
        if self._epoch != epoch:
            generator = np.random.default_rng([self._state["seed"], epoch])
            self._epoch, self._order = epoch, generator.permutation(len(self.questions))
        return self.questions[self._order[i]]

    def __next__(self) -> list[Batch]:
        first, seed = self._state["drawn"], self._state["seed"]
        count = self.per_step
        if self.total is not None:
            count = min(count, self.total - first)
        if count <= 0:
            raise StopIteration
        began, engine = time.monotonic(), self.sampler.engine
        rank, world_size = self.runtime.rank, self.runtime.world_size
        own = range(first + count * rank // world_size, first + count * (rank + 1) // world_size)
        questions = [self._question(number) for number in own]
        seeds = [(seed << 32) + number for number in own]
        groups = self.sampler.replies(questions, self.samples, seeds)
        replies = [reply for group in groups for reply in group]
        weighted, total_reward, zero_variance = [], 0.0, 0
        for question, group in zip(questions, groups, strict=True):
            rewards = [reward(engine.tokenizer, question, reply) for reply in group]
            total_reward += sum(rewards)
            zero_variance += len(set(rewards)) == 1
            weighted += weighted_replies(group, rewards)
        counts = [
            total_reward,
            zero_variance,
            sum(reply.finish != "stop" for reply in replies),
            sum(len(reply.tokens) for reply in replies),
            sum(map(sampled_tokens, replies)),
            sum(sampled_tokens(reply) for reply, _ in weighted),
        ]
        total_reward, zero_variance, truncated, length, sampled, targets = sum_over_ranks(
            counts, self.runtime
        )
        sampled_replies = count * self.samples  # on all ranks
        self.numbers = {
            "reward": total_reward / sampled_replies,
            "zero_variance": zero_variance / count,
            "truncated": truncated / sampled_replies,
            "length": length / sampled_replies,
            "rollout_seconds": round(time.monotonic() - began, 3),
        }
        self._state["drawn"] = first + count
        return weighted_batches(
            [(reply, weight * targets / sampled) for reply, weight in weighted],
            self.device_rows,
            engine.tokenizer.bos,
            engine.model.config.sequence_len,
            self.runtime.device,
            engine.model.compiled,
        )

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a stored position. UserError if the seed or the questions differ."""
        for name in ("seed", "questions"):
            if state[name] != self._state[name]:
                raise UserError(
                    f"cannot resume, because the {name} of this run changed from {state[name]} to "
                    f"{self._state[name]}: restore the flags, or start a new run without --resume"
                )
        self._state = dict(state)
