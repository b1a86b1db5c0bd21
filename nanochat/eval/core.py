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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.base.common import UserError
from nanochat.base.runtime import Runtime, halve_until_it_fits
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.core_bundle import CoreTask
from nanochat.eval.core_items import CoreItem, prepare, unshared
from nanochat.eval.scores import accuracy, centred
from nanochat.model.attention import Bias
from nanochat.model.cache import KVCache
from nanochat.model.gpt import GPT
from nanochat.model.loss import capped, chunk_rows

PASS_BYTES = {"cpu": 2**25, "cuda": 2**31}  # on a CPU a pass should fit the caches
ROW_BYTES = 2**31  # of a question with its answers; those of a task with a larger one share nothing
TIE = 1e-5  # nats per token; float32 cannot tell answers apart that are closer


class Score(NamedTuple):
    nats: float  # mean negative log-likelihood of the scored tokens
    tokens: int  # how many tokens were scored
    greedy: bool  # whether each of them was the most likely one


def looks_back(model: GPT) -> bool:
    """Whether a token's vectors depend on the tokens before it other than by attention."""
    config = model.config
    return bool(config.copy_heads or config.convolutions or config.pair_rows)


class Scorer:
    """
    Scores items with a model, in passes of about `memory` bytes (0 = what suits the device); fewer
    when memory runs out. Where a model has an attention prior or parts that look back, or is no
    GPT, nothing is shared between sequences, which is several times slower.
    """

    def __init__(self, model: Any, memory: float = 0):
        self.model = model
        self.shares = isinstance(model, GPT) and model.prior is None and not looks_back(model)
        self.device = model.embed.weight.device
        self.memory = memory or PASS_BYTES.get(self.device.type, 2**28)

    @torch.inference_mode()
    def __call__(
        self,
        items: Sequence[CoreItem],
        prompts: Sequence[Sequence[int]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Score]]:
        """
        The scores of every item's sequences. Items of similar length share a pass, the longest
        first. `progress` receives the number of items that are done.
        """
        largest = max((self._bytes(item.slots, item.past) for item in items), default=0.0)
        if not self.shares or largest > ROW_BYTES:
            single = unshared(items, prompts)
            each = max(1, len(single) / max(1, len(items)))
            scores = iter(self._score(single, [[]], lambda done: progress(int(done / each))))
            return [[next(scores)[0] for _ in item.ids] for item in items]
        return self._score(items, prompts, progress)

    def _score(
        self,
        items: Sequence[CoreItem],
        prompts: Sequence[Sequence[int]],
        progress: Callable[[int], None],
    ) -> list[list[Score]]:
        scores: dict[int, list[Score]] = {}
        for number, prompt in enumerate(prompts):
            waiting = [i for i, item in enumerate(items) if item.prompt == number]
            waiting.sort(key=lambda i: items[i].slots, reverse=True)
            if not waiting:
                continue
            past = max(items[i].past for i in waiting)
            cached = self._cached(prompt[:past]) if self.shares else None

            def score_next(count: int, waiting=waiting, cached=cached) -> list[list[Score]]:
                return self._pass([items[i] for i in waiting[:count]], cached)

            while waiting:
                cost = self._bytes(items[waiting[0]].slots, past)
                wanted = min(len(waiting), max(1, int(self.memory / cost)))
                results, count = halve_until_it_fits(score_next, wanted, "CORE items")
                if count < wanted:
                    self.memory = cost * count
                scores.update(zip(waiting[:count], results, strict=True))
                del waiting[:count]
                progress(len(scores))
        return [scores[i] for i in range(len(items))]

    def _bytes(self, slots: int, past: int) -> float:
        """The memory of a row: its activations and the attention of one layer."""
        c = self.model.config
        return 4.0 * slots * (3 * c.n_head * (slots + past) + 12 * c.n_embd + 2 * c.hidden)

    def _cached(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The keys and values of a prompt, (layer, H_kv, tokens, D) each."""
        cache = self.model.new_cache(1, max(1, len(tokens)))
        if tokens:
            self.model(torch.tensor([tokens], device=self.device), cache)
        dtype = self.model.compute_dtype
        if dtype == torch.float16:
            dtype = torch.float32  # float16 is too narrow for exp
        return cache.k[:, 0].to(dtype), cache.v[:, 0].to(dtype)

    def _pass(
        self, items: list[CoreItem], cached: tuple[Tensor, Tensor] | None
    ) -> list[list[Score]]:
        """
        Score items in one pass; `cached` are keys and values of the prompt that they continue.
        """
        ids, positions, branch, targets = _layout(items, self.device)
        if cached:
            past = [item.past for item in items]
            hidden = self.model(ids, _Branches(*cached, past, positions, branch))
        else:  # the items are unshared, and have no branches
            hidden = self.model(ids)
        row, slot, target = torch.tensor(targets, device=self.device).T
        nats, greedy = self._losses(hidden[row, slot], target)
        scores, at = [], 0
        for item in items:
            scores.append([])
            for sequence, start in zip(item.ids, item.starts, strict=True):
                n = len(sequence) - start
                span = slice(at, at + n)
                scores[-1].append(Score(sum(nats[span]) / n, n, all(greedy[span])))
                at += n
        return scores

    def _losses(self, hidden: Tensor, target: Tensor) -> tuple[list[float], list[bool]]:
        """
        The negative log-likelihood of each target (R,) after its hidden state (R, D), and whether
        it is the most likely token.
        """
        nats, greedy = [], []
        head, softcap = self.model.head_weight, self.model.config.softcap
        rows = chunk_rows(hidden, head)
        for h, t in zip(hidden.split(rows), target.split(rows), strict=True):
            logits = self.model.logits(h)
            # The logits of two letters are often equal in bfloat16: repeat those of the targets in
            # float32.
            exact = capped((h.float() * head[t].float()).sum(-1), softcap)
            nats += (logits.logsumexp(-1) - exact).tolist()
            greedy += (logits.argmax(-1) == t).tolist()
        return nats, greedy


def _layout(
    items: list[CoreItem], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int, int]]]:
    """
    One row per item: first the trunk, which its sequences share, then a branch for the rest of each
    sequence. Returns the tokens, their positions and their branches (0 = trunk, -1 = padding), all
    (B, T), and (row, slot, target) of every scored token in order.
    """
    T = max(item.slots for item in items)
    rows, targets = [], []
    for number, item in enumerate(items):
        ids = item.ids[0][: item.shared]
        positions, branches = list(range(item.shared)), [0] * item.shared
        for j, sequence in enumerate(item.ids):
            offset = len(ids) - item.shared  # token t of this branch is in slot offset + t
            for t in range(item.starts[j], len(sequence)):
                slot = t - 1 if t <= item.shared else offset + t - 1
                targets.append((number, slot, sequence[t]))
            own = range(item.shared, len(sequence) - 1)
            ids = ids + [sequence[t] for t in own]
            positions += own
            branches += [j + 1] * len(own)
        padding = T - len(ids)
        shifted = [item.past + position for position in positions]
        rows.append([ids + [0] * padding, shifted + [0] * padding, branches + [-1] * padding])
    ids, positions, branches = torch.tensor(rows, device=device).unbind(1)
    return ids, positions, branches, targets


class _Branches(KVCache):
    """
    Attention for one pass over rows that all continue one cached sequence, each with a trunk and
    the branches that part from it. A branch sees itself, the trunk and its row's part of the cache;
    nothing is copied per row or per branch. It ignores attention priors: their rules look at the
    token before a key, which for the start of a branch is not the one in the slot before it.
    """

    def __init__(self, k: Tensor, v: Tensor, past: list[int], positions: Tensor, branch: Tensor):
        """
        k, v (layer, H_kv, cached, D); past (B,): how many of the cached keys each row sees;
        positions, branch (B, T) of every token.
        """
        self.k, self.v, self.past, self.positions = k, v, past, positions
        key, query = branch[:, None, :], branch[:, :, None]
        later = torch.ones_like(key == query).triu(1)
        self.hidden = later | ((key != query) & (key != 0))  # (B, T, T)

    def begin(self, T: int) -> None:
        """The positions are those of the rows' items."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int = 0,
        bias: Bias | None = None,
    ) -> Tensor:
        """q (B, H, T, D); k, v (B, H_kv, T, D) -> (B, H, T, D)."""
        (B, H, T, D), given = q.shape, q.dtype
        H_kv, cached, dtype = k.size(1), max(self.past), self.k.dtype
        # The query heads of a group become further queries of their key head.
        q = (q * D**-0.5).to(dtype).reshape(B, H_kv, -1, D)
        k, v = k.to(dtype), v.to(dtype)

        def weigh(scores: Tensor) -> Tensor:
            # Queries and keys are normalised, so no score exceeds sqrt(D): no maximum is needed.
            return scores.float().sub_(D**0.5).exp_()

        query, key = self.positions[:, :, None], self.positions[:, None, :]
        hidden = self.hidden | (query - key >= window) if window > 0 else self.hidden
        p = weigh(q @ k.mT)
        p.view(B, H_kv, -1, T, T).masked_fill_(hidden[:, None, None], 0)
        total, y = p.sum(-1, keepdim=True), (p.to(dtype) @ v).float()
        if cached:  # the queries of all rows meet the only copy of the cached keys
            p = weigh(q.transpose(0, 1).reshape(H_kv, -1, D) @ self.k[layer, :, :cached].mT)
            if window > 0 or min(self.past) < cached:
                slot = torch.arange(cached, device=q.device)
                unseen = slot >= torch.tensor(self.past, device=q.device)[:, None, None]
                if window > 0:
                    unseen = unseen | (query - slot >= window)
                p.view(H_kv, B, -1, T, cached).masked_fill_(unseen[:, None], 0)
            total += p.sum(-1).view(H_kv, B, -1, 1).transpose(0, 1)
            past = (p.to(dtype) @ self.v[layer, :, :cached]).float()
            y += past.view(H_kv, B, -1, D).transpose(0, 1)
        return (y / total).to(given).view(B, H, T, D)


# ---- from scores to the score


def choose(scores: Sequence[Score], rng: Random) -> int:
    """The sequence with the lowest mean loss; among equals, a random one."""
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
) -> dict[str, Any]:
    """
    The result of a task: kind, accuracy, n, chance, lo, hi (95 % interval) and centred; guess (the
    score of uniform guessing); shots and had (examples asked for, and their mean number); fewer,
    cropped, overlong (items with fewer examples, with lost tokens, with lost scored tokens).
    The ranks share the items; `progress` receives this rank's finished items and their total.
    """
    context = scorer.model.config.sequence_len
    items, prompts = prepare(task, tokenizer, context, runtime.seed, max_items)
    own = items[runtime.rank :: runtime.world_size]
    right = []
    all_scores = scorer(own, prompts, lambda done: progress(done, len(own)))
    for item, scores in zip(own, all_scores, strict=True):
        if task.kind == "language_modeling":
            right.append(scores[0].greedy)
        else:
            rng = Random(f"{runtime.seed}/{task.name}/{item.row}/lot")
            right.append(choose(scores, rng) == item.gold)
    if runtime.world_size > 1:
        parts: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(parts, right)
        right = [verdict for part in parts for verdict in part]
    result = accuracy(right, task.chance)
    generates = task.kind == "language_modeling"
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


def summarise(results: dict[str, dict[str, Any]], absent: Sequence[str] = ()) -> dict[str, Any]:
    """
    The mean centred accuracy with its 95 % margin, the score of guessing, and a name, which is CORE
    only if no task is absent. The margin covers the choice of items. Random models differ by more
    than that: one that always answers "no" or "C" is off in the same direction on every item.
    """
    n, total = len(results), len(results) + len(absent)
    margins = [(r["hi"] - r["lo"]) / 2 / (1 - r["chance"]) for r in results.values()]
    return {
        "name": f"mean centred accuracy of {n} of {total} tasks" if absent else "CORE",
        "score": sum(r["centred"] for r in results.values()) / n,
        "margin": math.hypot(*margins) / n,
        "guess": sum(centred(r["guess"], r["chance"]) for r in results.values()) / n,
        "tasks": results,
        "absent": list(absent),
    }
