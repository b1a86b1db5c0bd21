"""
What a prior is worth before any training, on held-out text: how well it distinguishes useful pairs,
and by how much an attention head that follows it and copies reduces the loss of a bigram table.
It changes no prior and reads no file.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray as Array
from rap_terms import Pairs, Progress, Text, discrimination, matrices, values_of


def bigram(ids: Array, now: Array, then: Array, vocab_size: int) -> Array:
    """
    The probability of `then` after `now` by the counts in ids, smoothed with unigram shares after
    Witten and Bell (1991).
    """
    share = np.bincount(ids, minlength=vocab_size) + 0.5
    share = share / share.sum()
    table, n = np.unique(ids[:-1].astype(np.int64) * vocab_size + ids[1:], return_counts=True)
    at = np.searchsorted(table, wanted := now.astype(np.int64) * vocab_size + then).clip(
        max=len(table) - 1
    )
    followers = np.bincount(table // vocab_size, minlength=vocab_size)[now] + 1
    followed = np.bincount(ids[:-1], minlength=vocab_size)[now]
    return (np.where(table[at] == wanted, n[at], 0) + followers * share[then]) / (
        followed + followers
    )


class CopyingHead:
    """
    An attention head whose scores are the groups of a prior times gates. Its weights, summed by
    token, are mixed into a bigram table, with one share for each of seven levels of its confidence.
    The reduction of the loss says what a prior is worth before any training.
    """

    def __init__(
        self, fitted: Text, held: Text, vocab_size: int, T: int = 512, tokens: int = 12_288
    ):
        T = min(T, (len(held.ids) - 1) // 2)
        starts = np.linspace(0, len(held.ids) - 1 - T, min(tokens, len(held.ids) - 1) // T).astype(
            int
        )
        block = held.ids[starts[:, None] + np.arange(T + 1)]
        self.rows, self.T, self.progress = (
            block[:, :-1],
            T,
            Progress("trying gates of a copying head"),
        )
        self.base = bigram(fitted.ids, self.rows, block[:, 1:], vocab_size)
        self.causal = np.tril(np.ones((T, T), bool))
        self.hit = (self.rows[:, None] == block[:, 1:, None]) & self.causal

    def gain(self, scores: Array) -> float:
        """By how much the head with these scores (R, T, T) reduces the loss, in nats per token."""
        e = np.where(self.causal, scores, -np.inf)
        e = np.exp(e - e.max(-1, keepdims=True))
        total = e.sum(-1)
        copied, sure = (
            (e * self.hit).sum(-1) / total,
            np.digitize(1 / total, (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)),
        )
        taken = 0.0
        for degree in np.unique(sure):
            p, q, share = copied[sure == degree], self.base[sure == degree], 0.2
            for _ in range(30):  # expectation maximisation
                share = float((share * p / (share * p + (1 - share) * q)).mean())
            taken += np.log((share * p + (1 - share) * q) / q).sum()
        return float(taken / self.base.size)

    def tune(
        self, groups: dict[str, Array], grid: Sequence[float] = (0, 1, 2, 3, 4, 6, 8, 11, 15)
    ) -> tuple[float, dict[str, float]]:
        """
        The largest gain over gates of the grid, chosen group by group (twice if there are several);
        and those gates.
        """
        nothing = np.zeros(self.hit.shape, np.float32)
        gates, best = dict.fromkeys(groups, 0.0), self.gain(nothing)
        names = [n for n in ("match", "pair", "lag", "key") if n in groups] * min(2, len(groups))
        for n, name in enumerate(names):
            self.progress(n / len(names))
            rest = sum((np.float32(gates[k]) * groups[k] for k in groups if k != name), nothing)
            best, gates[name] = max(
                (self.gain(rest + np.float32(g) * groups[name]), float(g)) for g in grid
            )
        return best, gates


def measure(
    terms: dict[str, Array],
    strength: dict[str, float],
    fitted: Text,
    held: Text,
    unseen: Pairs,
    vocab_size: int,
    T: int,
) -> dict[str, Any]:
    """
    AUC and Youden's J of B (groups times their strengths) on unseen pairs, and the gain of a
    copying head with it, in nats per token.
    """
    score = sum(
        (strength[g] * v for g, v in values_of(terms, held.ids, unseen).items()),
        np.zeros(len(unseen.i)),
    )
    head = CopyingHead(fitted, held, vocab_size, T)
    groups = matrices(terms, head.rows)
    gain, gates = head.tune(groups)
    about = dict(zip(("auc", "youden"), discrimination(score, unseen.useful), strict=True)) | {
        "gain": gain,
        "gates": gates,
        "row": head.T,
    }
    about |= {
        "base": float(-np.log(head.base).mean()),
        "even": head.gain(np.zeros(head.hit.shape, np.float32)),
    }
    return about | {"alone": {g: head.tune({g: m})[0] for g, m in groups.items()}}
