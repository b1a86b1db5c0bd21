"""
How likely a model finds the token sequences of CORE items. Tokens that sequences share (the
few-shot examples of a task, the beginnings of the answers to a question) are computed once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.base.runtime import halve_until_it_fits
from nanochat.eval.core_items import CoreItem, separate_sequences
from nanochat.model.attention import Bias
from nanochat.model.cache import KVCache
from nanochat.model.gpt import GPT
from nanochat.model.loss import capped, chunk_rows

PASS_BYTES = {"cpu": 2**25, "cuda": 2**31}  # on a CPU a pass should fit the caches
MOST_ROW_BYTES = 2**31  # of an item; if one of a task needs more, its sequences share nothing


class Score(NamedTuple):
    nats: float  # mean negative log-likelihood of the scored tokens
    tokens: int  # how many tokens were scored
    greedy: bool  # whether each of them was the most likely one


Scores = list[list[Score]]  # of each sequence of each item
Progress = Callable[[int], None]  # receives the number of finished items


class Scorer:
    """
    Scores items with a model, in passes of about `memory` bytes (0 = what suits the device), or
    less after memory has run out. Sequences share nothing, which is several times slower, if the
    model has an attention prior or parts that look back, or is no GPT.
    """

    def __init__(self, model: Any, memory: float = 0):
        self.model, config = model, model.config
        self.shares = isinstance(model, GPT) and not (
            config.rap or config.copy_heads or config.convolutions or config.pair_rows
        )
        self.device = model.embed.weight.device
        self.memory = memory or PASS_BYTES.get(self.device.type, 2**28)

    @torch.inference_mode()
    def __call__(
        self,
        items: Sequence[CoreItem],
        prompts: Sequence[Sequence[int]],
        progress: Progress = lambda done: None,
    ) -> Scores:
        """
        The score of each sequence of each item. UserError if a single one does not fit into memory.
        """
        largest = max((self._row_bytes(item.slots, item.past) for item in items), default=0.0)
        if self.shares and largest <= MOST_ROW_BYTES:
            return self._score(items, prompts, progress)
        separate = separate_sequences(items, prompts)
        per_item = max(1, len(separate) / max(1, len(items)))
        scores = iter(self._score(separate, [[]], lambda done: progress(int(done / per_item))))
        return [[next(scores)[0] for _ in item.ids] for item in items]

    def _score(
        self,
        items: Sequence[CoreItem],
        prompts: Sequence[Sequence[int]],
        progress: Progress,
    ) -> Scores:
        """Score the items that continue one prompt together, in passes, the longest first."""
        scores: dict[int, list[Score]] = {}
        for number, prompt in enumerate(prompts):
            # Similar lengths share a pass, which then has little padding
            waiting = [i for i, item in enumerate(items) if item.prompt == number]
            waiting.sort(key=lambda i: items[i].slots, reverse=True)
            past = max((items[i].past for i in waiting), default=0)
            cached = self._keys_and_values(prompt[:past]) if waiting and self.shares else None
            while waiting:
                row_bytes = self._row_bytes(items[waiting[0]].slots, past)
                wanted = min(len(waiting), max(1, int(self.memory / row_bytes)))
                score_first = partial(self._pass, [items[i] for i in waiting[:wanted]], cached)
                results, count = halve_until_it_fits(score_first, wanted, "CORE items")
                if count < wanted:
                    self.memory = row_bytes * count
                scores.update(zip(waiting, results, strict=False))
                del waiting[:count]
                progress(len(scores))
        return [scores[i] for i in range(len(items))]

    def _row_bytes(self, slots: int, past: int) -> float:
        """The memory of an item in a pass: its activations and the attention of one layer."""
        c = self.model.config
        return 4.0 * slots * (3 * c.n_head * (slots + past) + 12 * c.n_embd + 2 * c.hidden)

    def _keys_and_values(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The keys and the values of a prompt's tokens, (layer, H_kv, tokens, D) each."""
        cache = self.model.new_cache(1, max(1, len(tokens)))
        if tokens:
            self.model(torch.tensor([tokens], device=self.device), cache)
        dtype = self.model.compute_dtype
        if dtype == torch.float16:
            dtype = torch.float32  # float16 is too narrow for exp
        return cache.k[:, 0].to(dtype), cache.v[:, 0].to(dtype)

    def _pass(
        self, items: Sequence[CoreItem], cached: tuple[Tensor, Tensor] | None, count: int
    ) -> Scores:
        """
        Score the first `count` items in one pass. `cached` are the keys and values of the prompt
        that they continue, or None for items of a single sequence without a prompt, which need no
        branches.
        """
        items = items[:count]
        ids, positions, branch, targets = _layout(items, self.device)
        if cached:
            past = [item.past for item in items]
            hidden = self.model(ids, _Branches(*cached, past, positions, branch))
        else:
            hidden = self.model(ids)
        row, slot, target = torch.tensor(targets, device=self.device).T
        nats, greedy = self._losses(hidden[row, slot], target)
        scores, first = [], 0
        for item in items:
            scores.append([])
            for sequence, start in zip(item.ids, item.starts, strict=True):
                n = len(sequence) - start
                span = slice(first, first + n)
                scores[-1].append(Score(sum(nats[span]) / n, n, all(greedy[span])))
                first += n
        return scores

    def _losses(self, hidden: Tensor, target: Tensor) -> tuple[list[float], list[bool]]:
        """
        The negative log-likelihood in nats of each target (R,) after its hidden state (R, D), and
        whether it is the most likely token.
        """
        nats, greedy = [], []
        head, softcap = self.model.head_weight, self.model.config.softcap
        rows = chunk_rows(hidden, head)
        for h, t in zip(hidden.split(rows), target.split(rows), strict=True):
            logits = self.model.logits(h)
            # The logits of two letters are often equal in bfloat16, so those of the targets are
            # computed again in float32.
            exact = capped((h.float() * head[t].float()).sum(-1), softcap)
            nats += (logits.logsumexp(-1) - exact).tolist()
            greedy += (logits.argmax(-1) == t).tolist()
        return nats, greedy


def _layout(
    items: Sequence[CoreItem], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int, int]]]:
    """
    A row of slots for each item: first its trunk, the tokens with which all its sequences begin,
    then a branch for the rest of each sequence. Returns the tokens, their positions and their
    branches (0 = trunk, -1 = padding), all (B, T); and for every scored token, sequence by
    sequence, (row, slot of the token before it, its id).
    """
    T = max(item.slots for item in items)
    rows, targets = [], []
    for number, item in enumerate(items):
        shared = item.shared
        ids, positions, branches = item.ids[0][:shared], [*range(shared)], [0] * shared
        for branch, (sequence, start) in enumerate(zip(item.ids, item.starts, strict=True), 1):
            offset = len(ids) - shared  # token t of this branch is in slot offset + t
            for t in range(start, len(sequence)):
                slot = t - 1 if t <= shared else offset + t - 1
                targets.append((number, slot, sequence[t]))
            ids += sequence[shared:-1]  # the last token predicts nothing
            positions += range(shared, len(sequence) - 1)
            branches += [branch] * (len(ids) - len(branches))
        padding = T - len(ids)
        shifted = [item.past + position for position in positions]
        rows.append([ids + [0] * padding, shifted + [0] * padding, branches + [-1] * padding])
    ids, positions, branches = torch.tensor(rows, device=device).unbind(1)
    return ids, positions, branches, targets


class _Branches(KVCache):
    """
    Attention for one pass over rows that all continue one cached sequence, each with a trunk and
    branches. A branch sees itself, the trunk, and as much of the cache as its row continues;
    nothing is copied per row or per branch. Attention priors are not supported: their rules look at
    the token before a key, which at the start of a branch is not the one in the slot before it.
    """

    def __init__(self, k: Tensor, v: Tensor, past: list[int], positions: Tensor, branch: Tensor):
        """
        k, v (layer, H_kv, cached, D); past (B,), how many of the cached keys each row sees;
        positions and branch of every token (B, T), as _layout returns them.
        """
        self.k, self.v, self.past, self.positions = k, v, past, positions
        key, query = branch[:, None, :], branch[:, :, None]
        later = torch.ones_like(key == query).triu(1)
        self.hidden = later | ((key != query) & (key != 0))  # (B, T, T)

    def begin(self, T: int) -> None:
        """Does nothing, because every token's position is known from the beginning."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int = 0,
        bias: Bias | None = None,
    ) -> Tensor:
        """q (B, H, T, D); k, v (B, H_kv, T, D) -> (B, H, T, D) in q's dtype."""
        (B, H, T, D), q_dtype = q.shape, q.dtype
        H_kv, cached, dtype = k.size(1), max(self.past), self.k.dtype
        # The query heads that share a key head become further queries of it.
        q = (q * D**-0.5).to(dtype).reshape(B, H_kv, -1, D)
        k, v = k.to(dtype), v.to(dtype)

        def weigh(scores: Tensor) -> Tensor:
            # Queries and keys are normalised, so no score exceeds sqrt(D). Subtracting that, not
            # the maximum, lets the two parts of the softmax simply be added.
            return scores.float().sub_(D**0.5).exp_()

        query, key = self.positions[:, :, None], self.positions[:, None, :]
        hidden = self.hidden | (query - key >= window) if window > 0 else self.hidden
        p = weigh(q @ k.mT)
        p.view(B, H_kv, -1, T, T).masked_fill_(hidden[:, None, None], 0)
        total, y = p.sum(-1, keepdim=True), (p.to(dtype) @ v).float()
        if cached:  # one product of the queries of all rows with the only copy of the cached keys
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
        return (y / total).to(q_dtype).view(B, H, T, D)
