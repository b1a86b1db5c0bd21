"""
The CORE score: the mean centred accuracy of a base model over the tasks of an evaluation bundle
(DCLM, arXiv 2406.11794). There are three kinds of task:

multiple_choice     continuations of one question, compared by their mean loss per token after their
                    common beginning
schema              beginnings of one continuation, compared by the mean loss of their common end
language_modeling   whether greedy decoding produces the continuation

Ties are broken at random, so that no position of the right answer has an advantage. A score that
lacks tasks is never called CORE.
"""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch.distributed as dist

from nanochat.base.common import UserError
from nanochat.base.runtime import Runtime
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.core_bundle import CoreTask
from nanochat.eval.core_items import prepare
from nanochat.eval.core_scorer import Score, Scorer
from nanochat.eval.scores import Result, Results, accuracy, centred

TASKS = 22  # of CORE
TIE = 1e-5  # nats per token; float32 cannot tell answers apart that are closer


def choose(scores: Sequence[Score], rng: Random) -> int:
    """
    The index of the sequence with the lowest mean loss; among equals (within TIE), a random one.
    UserError unless that loss is finite.
    """
    best = min(score.nats for score in scores)
    if not math.isfinite(best):
        raise UserError(
            "the model's losses are not finite, so it cannot be evaluated: choose an earlier "
            "checkpoint with --step"
        )
    return rng.choice([j for j, score in enumerate(scores) if score.nats - best <= TIE])


def evaluate(
    scorer: Scorer,
    task: CoreTask,
    tokenizer: Tokenizer,
    runtime: Runtime,
    max_items: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """
    The result of a task on all its rows, or on `max_items` drawn by the seed, which are divided
    among the ranks. `progress` receives this rank's finished items and their total. The result has

    kind, accuracy, n, chance, lo, hi, centred   as scores.accuracy() and centred() return them
    guess                     the accuracy of choosing uniformly at random
    shots, had                few-shot examples of the task, and the mean number in its items
    fewer, cropped, overlong  items with fewer examples, with a cropped question, and with a cropped
                              answer (see core_items.py)
    """
    context = scorer.model.config.sequence_len
    items, prompts = prepare(task, tokenizer, context, runtime.seed, max_items)
    own_items = items[runtime.rank :: runtime.world_size]
    generates = task.kind == "language_modeling"
    right = []
    all_scores = scorer(own_items, prompts, lambda done: progress(done, len(own_items)))
    for item, scores in zip(own_items, all_scores, strict=True):
        if generates:
            right.append(scores[0].greedy)
        else:
            rng = Random(f"{runtime.seed}/{task.name}/{item.row}/lot")
            right.append(choose(scores, rng) == item.gold)
    if runtime.world_size > 1:
        parts: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(parts, right)
        right = [verdict for part in parts for verdict in part]
    result = accuracy(right, task.chance)
    return {
        "kind": task.kind,
        **result,
        "centred": centred(result["accuracy"], task.chance),
        "guess": 0.0 if generates else sum(1 / len(item.ids) for item in items) / len(items),
        "shots": task.shots,
        "had": sum(item.shots for item in items) / len(items),
        "fewer": sum(item.shots < task.shots for item in items),
        "cropped": sum(item.cropped for item in items),
        "overlong": sum(item.overlong for item in items),
    }


def summarise(results: Results, absent: Sequence[str] = ()) -> Result:
    """
    {name, score, margin, guess, tasks, absent}: the mean centred accuracy of the tasks, its 95 %
    margin, and the score of guessing. The name is CORE only if all its tasks are there. The margin
    covers the choice of items only; different random models vary more, because one that always
    answers "no" or "C" is off in the same direction on every item.
    """
    n, total = len(results), len(results) + len(absent)
    margins = [(r["hi"] - r["lo"]) / 2 / (1 - r["chance"]) for r in results.values()]
    complete = n == total == TASKS
    return {
        "name": "CORE" if complete else f"mean centred accuracy of {n} of {total} tasks",
        "score": sum(r["centred"] for r in results.values()) / n,
        "margin": math.hypot(*margins) / n,
        "guess": sum(centred(r["guess"], r["chance"]) for r in results.values()) / n,
        "tasks": results,
        "absent": list(absent),
    }
