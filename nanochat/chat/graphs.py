"""
Decoding with CUDA graphs, which launch a whole step at once: launching the step of a small model
kernel by kernel takes longer than running it.

A graph always reads the same memory. So the rows of a batch move to a cache with room for 1, 2, 4,
8, 16 or 32 rows of the whole context; the tokens, lengths and settings of a step are written to the
device in one transfer, and its tokens come back in another. A step attends to as many slots as its
longest row needs, rounded up to a power of two. When rows read a tool's output, or draw in
different ways, the batch decodes without a graph (generate.py), which gives the same tokens.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.base.common import notice
from nanochat.base.runtime import capturing, out_of_memory, release_memory
from nanochat.chat.sampling import Sampling, checked, draw, settings, width
from nanochat.model.cache import KVCache, OneToken
from nanochat.model.gpt import GPT

MOST_ROWS = 32
LEAST_SLOTS = 128
PATIENCE = 32  # steps of a batch before the first graph is captured: short samples are not worth it


class Step:
    """One step of up to `rows` rows that fill at most `slots` slots of a cache."""

    def __init__(
        self, graphs: "Graphs", cache: KVCache, rows: int, slots: int, drawn: int, nucleus: bool
    ):
        self.body, self.head, self.softcap = graphs.body, graphs.head, graphs.body.config.softcap
        self.drawn, self.nucleus = drawn, nucleus
        self.view = OneToken(cache, rows, slots)
        # A row that is not in use writes to a slot that nothing reads
        self.idle = [0.0, float(cache.capacity), 0.0, 0.0, 1.0, 1.0]
        self.given = torch.zeros(6, rows, dtype=torch.float64, device=cache.k.device)
        self._give([])
        self.graph: Any = None
        if cache.k.device.type == "cuda":
            self._capture(graphs)

    def _give(self, columns: list[list[float]]) -> None:
        """Write what a step needs of every row in use: a column of `given` each."""
        columns = columns + [self.idle] * (self.given.size(1) - len(columns))
        self.given.copy_(torch.tensor(columns, dtype=torch.float64).mT)

    def _compute(self) -> None:
        token, length, count = self.given[:3].long()
        self.view.place(length, count)
        hidden = self.body(token[:, None], self.view)
        self.view.advance(1)
        self.logits = self.head(hidden[:, 0]).float()
        self.found = draw(self.logits, self.given[3:], self.drawn, self.nucleus, self.softcap)

    def _capture(self, graphs: "Graphs") -> None:
        stream = graphs.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what kernels allocate at their first call is not captured
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with capturing, torch.cuda.graph(self.graph, graphs.pool, stream, "thread_local"):
            self._compute()
        graphs.pool = self.graph.pool()

    def run(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        uniform: Sequence[float],
        samplings: Sequence[Sampling],
    ) -> tuple[Tensor, list[int]]:
        """
        Feed a token to every row of the cache: the logits (R, V) before their cap, valid until the
        next step, and a token for every row.
        """
        rows = zip(tokens, cache.lengths, uniform, samplings, strict=True)
        self._give([[token, n, 1.0, u, *settings(s)] for token, n, u, s in rows])
        if self.graph is not None:
            self.graph.replay()
        else:
            self._compute()
        cache.lengths = [n + 1 for n in cache.lengths]
        count = len(tokens)
        return self.logits[:count], checked(self.found[:, :count])


class Graphs:
    """The cache and the graphs of one packed model; one batch at a time uses them."""

    def __init__(self, body: GPT, head: nn.Module):
        self.body, self.head = body, head
        self.pool: Any = None  # memory that all graphs share, as long as there are any
        # Not torch's shared one, whose buffers can lie in the memory of another model's graphs
        self.stream: Any = torch.cuda.Stream() if body.cos.is_cuda else None
        self._cache: KVCache | None = None
        self._owner: Any = lambda: None  # a weak reference to the batch whose rows it holds
        self._steps: dict[tuple[int, int, int, bool], Step] = {}
        self._memory = 0  # where the cache of these steps lies
        self._patience = PATIENCE

    def step(
        self, batch: Any, cache: KVCache, samplings: Sequence[Sampling]
    ) -> tuple[KVCache, Step | None]:
        """
        The cache that holds the rows of the batch from now on, and the step for them; None if the
        batch must decode without a graph. Each row has one token to feed.
        """
        count, context = len(samplings), self.body.config.sequence_len
        draws = {width(sampling, self.body.config.vocab_size) for sampling in samplings}
        if self._patience > 0:
            self._patience -= 1
        if self._patience or count > MOST_ROWS or len(draws) > 1:
            return cache, None
        rows = 1 << (count - 1).bit_length()
        try:
            cache = self._moved(batch, cache, rows)
            slots = max(LEAST_SLOTS, 1 << max(cache.lengths).bit_length())
            nucleus = any(sampling.top_p for sampling in samplings)
            key = rows, min(slots, context), draws.pop(), nucleus
            if key not in self._steps:
                self._steps[key] = Step(self, cache, *key)
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
            notice("out of memory for CUDA graphs: decoding goes on, slower, without them")
            self._patience, self._cache = PATIENCE**4, None
            self._forget()
            release_memory()
            return cache, None
        return cache, self._steps[key]

    def _moved(self, batch: Any, cache: KVCache, rows: int) -> KVCache:
        """The rows of a cache in one that has room for `rows` rows of the whole context."""
        context = self.body.config.sequence_len
        owner = self._owner()
        if cache is not self._cache or cache.room[0] < rows or cache.room[1] < context:
            reusable = self._cache if not owner or not len(owner) else None
            if reusable is None or reusable is cache or reusable.room[0] < rows:
                cache = cache.moved(rows, context)
            else:
                reusable.clear()
                reusable.append(cache)
                cache = reusable
        if cache.address != self._memory:
            self._forget()
        self._cache, self._owner, self._memory = cache, weakref.ref(batch), cache.address
        return cache

    def _forget(self) -> None:
        """Drop all steps and, with their graphs, the memory that these shared."""
        self._steps.clear()
        self.pool = None
