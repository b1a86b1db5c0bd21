"""
Generation: a Batch decodes many rows together, each with its own prompt, sampling and seed; an
Engine drives a Batch until all its rows have finished.

A row's tokens depend on its own prompt, sampling and seed alone, not on the other rows. On a CPU
that holds to the bit (without a prior, for prompts that are read in one pass); on a GPU, products
of other shapes are rounded differently, which can decide a near tie. A row finishes with "stop" (it
sampled <|assistant_end|> or <|bos|>), "length" (max_tokens), "context" (sequence_len positions are
filled) or "cancelled". A prompt of sequence_len tokens or more keeps its first token (<|bos|>) and
its end; the sample says how many tokens were dropped. When a row closes a tool call, the tokens of
the calculator's output follow; no row can sample the tokens that frame such an output. Nothing here
trains or changes the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.chat.graphs import Graphs
from nanochat.chat.packed import packed_copy, refresh
from nanochat.chat.sampling import Sampling, choose, wide
from nanochat.chat.tools import ToolCalls
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.cache import KVCache
from nanochat.model.checkpoint import Loaded
from nanochat.model.gpt import GPT
from nanochat.model.loss import capped

PREFILL_TOKENS = 8192  # of all rows per pass over their prompts: bounds memory, changes no result
PREFILL_CHUNK = 64  # tokens per row and pass, at least


class Token(NamedTuple):
    """One new token of one row."""

    row: int
    id: int
    finish: str  # "" while the row continues, else why it ended; with "stop", id is the stop token
    logprob: float | None = None  # if the row's sampling asks for it; None for forced tokens
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens in its place: (id, logprob)


@dataclass
class Sample:
    """What a row has generated."""

    prompt: list[int]  # as it was fed
    dropped: int  # tokens cut from a prompt longer than the context
    tokens: list[int] = field(default_factory=list)  # the new ones, without the stop token
    mask: list[int] = field(default_factory=list)  # per token: 1 sampled, 0 forced
    finish: str = ""
    stop: int | None = None  # the stop token


@dataclass(frozen=True)
class Continuation:
    """
    A prompt to continue `samples` times; sample i draws its random numbers from the seed "SEED/i".
    With max_tokens None, a continuation goes on to the end of the context.
    """

    prompt: Sequence[int]
    seed: str
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = 256
    samples: int = 1


class Engine:
    """
    Generates with a model. The weights of a model in training are copied again for every Batch;
    those of a model without gradients are copied once.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, graphs: bool = True):
        """`graphs`: whether a CUDA device decodes with CUDA graphs; others never do."""
        self.model, self.tokenizer = model, tokenizer
        self._use_graphs = graphs and model.head_weight.device.type == "cuda"
        self._packed: tuple[GPT, nn.Module] | None = None
        self._graphs: Graphs | None = None

    @classmethod
    def of(cls, loaded: Loaded) -> "Engine":
        """The engine of a model that is ready for use, which it casts for inference."""
        return cls(loaded.model.cast_for_inference(), loaded.tokenizer)

    def row_bytes(self) -> int:
        """The memory of one row's keys and values over the whole context, in bytes."""
        config, on_cpu = self.model.config, self.model.embed.weight.device.type == "cpu"
        size = 4 if on_cpu else self.model.compute_dtype.itemsize
        return 2 * config.n_layer * config.n_kv_head * config.head_dim * config.sequence_len * size

    def packed(self) -> tuple[GPT, nn.Module]:
        """The model's body and head, laid out for decoding."""
        if self._packed is None or not refresh(*self._packed, self.model):
            self._packed, self._graphs = packed_copy(self.model), None
        return self._packed

    def graphs(self) -> Graphs | None:
        """The CUDA graphs for decoding; None if the engine does not use any."""
        if self._graphs is None and self._use_graphs:
            self._graphs = Graphs(*self.packed())
        return self._graphs

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> Iterator[list[Token]]:
        """
        Stream num_samples continuations of one prompt: each item holds the tokens of one step,
        those of a row in order. See Continuation for max_tokens and Sampling for the rest. Raises
        ValueError for an empty prompt and UserError for impossible settings.
        """
        batch = Batch(self)
        sampling = Sampling(temperature, top_k, top_p)
        batch.join([Continuation(tokens, f"{seed}/0", sampling, max_tokens, num_samples)])
        while len(batch):
            yield batch.step()

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        max_tokens: int | None = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 42,
    ) -> list[Sample]:
        """
        num_samples samples of each prompt, prompt by prompt. With one seed per prompt, a prompt
        gives the same samples at any position in the list; with one seed for all, prompt number i
        always draws the same random numbers. Arguments and errors as for generate().
        """
        if isinstance(seed, int):
            seeds = [f"{seed}/{i}" for i in range(len(prompts))]
        else:
            seeds = [f"{one}/0" for one in seed]
        batch = Batch(self)
        sampling = Sampling(temperature, top_k, top_p)
        samples = batch.join(
            [
                Continuation(prompt, own_seed, sampling, max_tokens, num_samples)
                for prompt, own_seed in zip(prompts, seeds, strict=True)
            ]
        )
        while len(batch):
            batch.step()
        return list(samples.values())


@dataclass(eq=False)
class _Row:
    """A sample that is being generated."""

    number: int
    sample: Sample
    sampling: Sampling
    limit: int  # new tokens, at most
    limit_reason: str  # the finish of a row that reaches its limit
    random: Random
    tool_calls: ToolCalls
    pending: list[int] = field(default_factory=list)  # tokens decided but not yet fed


class Batch:
    """
    Rows that are decoded together. Prompts join at any time, each step gives every row its next
    token, and rows leave when they finish or are cancelled. len() counts the rows in the batch.
    Do not train the model while a batch is in use. `most_rows` is the largest number of rows to
    expect at once, if prompts join all the time: the cache grows to it in few steps.
    """

    def __init__(self, engine: Engine, most_rows: int = 0):
        self._most = (most_rows, engine.model.config.sequence_len)  # rows, tokens per row
        self._tokenizer, self._config = engine.tokenizer, engine.model.config
        self._forced_only = engine.tokenizer.never_sampled
        specials = engine.tokenizer.specials
        self._stops = specials["<|assistant_end|>"], specials["<|bos|>"]
        self._body, self._head = engine.packed()
        self._graphs = engine.graphs()
        self._rows: list[_Row] = []  # in the order of the cache's rows
        self._cache: Any = None  # a KVCache once rows have joined
        self._numbers = count()  # of the rows that join

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, continuations: Sequence[Continuation]) -> dict[int, Sample]:
        """
        Add rows for all samples and read the prompts. Returns {row number: its sample}; the samples
        grow with every step. Raises ValueError for an empty prompt or less than one sample.
        """
        entry = self.open(continuations)
        while not entry.done:
            entry.read(max(PREFILL_CHUNK * len(continuations), PREFILL_TOKENS))
        return self.admit(entry)

    def open(self, continuations: Sequence[Continuation]) -> "Entry":
        """
        The first half of join(): rows whose prompts can be read in pieces between steps. Raises
        ValueError as join() does.
        """
        if not all(one.prompt and one.samples > 0 for one in continuations):
            raise ValueError(
                "generation needs at least one sample, and a prompt of at least one token: "
                "begin with <|bos|>"
            )
        context = self._config.sequence_len
        by_prompt: list[list[_Row]] = []
        for one in continuations:
            kept = clip(one.prompt, max(1, context - 1))
            limit, reason = context + 1 - len(kept), "context"  # the last token need not be fed
            if one.max_tokens is not None and one.max_tokens <= limit:
                limit, reason = one.max_tokens, "length"
            dropped = len(one.prompt) - len(kept)
            finish = "" if limit > 0 else reason
            rows = [
                _Row(
                    next(self._numbers),
                    Sample(kept, dropped, finish=finish),
                    one.sampling,
                    limit,
                    reason,
                    Random(f"{one.seed}/{i}"),
                    ToolCalls(self._tokenizer),
                )
                for i in range(one.samples)
            ]
            by_prompt.append(rows)
        return Entry(self._body, by_prompt)

    @torch.inference_mode()
    def admit(self, entry: "Entry") -> dict[int, Sample]:
        """
        The second half of join(): add the rows of an entry whose prompts have been read. Returns
        what join() does.
        """
        rows, cache = entry.rows_to_decode()
        if cache is not None:
            if self._cache is None:
                self._cache = cache
            else:
                self._cache.append(cache, self._most)
            self._rows += rows
        return {row.number: row.sample for row in entry.rows}

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """
        Sample one token for every row, except for rows that are still reading a tool's output.
        Returns the new tokens, forced ones included; rows that finish leave the batch.
        """
        rows, graphs = self._rows, self._graphs
        if graphs is not None and rows and all(len(row.pending) == 1 for row in rows):
            samplings = [row.sampling for row in rows]
            self._cache, step = graphs.step(self, self._cache, samplings)
            if step is not None:
                tokens = [row.pending.pop() for row in rows]
                uniform = [row.random.random() for row in rows]
                return self._finish_step(rows, *step.run(self._cache, tokens, uniform, samplings))
        if waiting := [len(row.pending) for row in rows if row.pending]:
            _feed(self._body, self._cache, rows, min(waiting))
        places = [i for i, row in enumerate(rows) if not row.pending]
        if not places:
            return []
        ready, hidden = [rows[i] for i in places], self._cache.hidden[0]
        if len(ready) < len(rows):
            hidden = hidden[places]
        logits = self._head(hidden).float()
        return self._finish_step(ready, logits, self._choose(logits, ready))

    def _choose(self, logits: Tensor, rows: list[_Row]) -> list[int]:
        """The next token of each row, drawn from its logits (R, V) with its random numbers."""
        uniform = [row.random.random() for row in rows]
        return choose(logits, uniform, [row.sampling for row in rows], self._config.softcap)

    def _finish_step(self, ready: list[_Row], logits: Tensor, chosen: list[int]) -> list[Token]:
        """Add the chosen tokens to the rows that are ready; logits (R, V) are not capped."""
        # Rare; drawing again for these rows leaves all others as they are. It may take several
        # draws, because a softcap gives back some probability.
        while forbidden := [i for i, id in enumerate(chosen) if id in self._forced_only]:
            allowed = logits[forbidden]
            allowed[:, list(self._forced_only)] = -torch.inf
            redrawn = self._choose(allowed, [ready[i] for i in forbidden])
            for i, id in zip(forbidden, redrawn, strict=True):
                chosen[i] = id
        reports = _log_probabilities(logits, self._config.softcap, ready, chosen)
        tokens = []
        for row, id in zip(ready, chosen, strict=True):
            new = self._take(row, id)
            if row.number in reports:
                new[0] = new[0]._replace(**reports[row.number])
            tokens += new
        for row in ready[::-1]:
            if row.sample.finish:
                self._remove(row)
        return tokens

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Stop the row of this number; does nothing when it has already finished."""
        for row in self._rows:
            if row.number == number:
                row.sample.finish = "cancelled"
                self._remove(row)
                return

    def _remove(self, row: _Row) -> None:
        """Drop a row; the last one moves to its place, as in the cache."""
        index = self._rows.index(row)
        self._cache.drop(index)
        self._rows[index] = self._rows[-1]
        self._rows.pop()

    def _take(self, row: _Row, id: int) -> list[Token]:
        """
        Add a sampled token to a row, and the calculator's output if the token ends a tool call.
        Returns the new tokens.
        """
        sample = row.sample
        if id in self._stops:
            sample.finish, sample.stop = "stop", id
            return [Token(row.number, id, "stop")]
        new = [id, *row.tool_calls.answer(id)][: row.limit - len(sample.tokens)]
        sample.tokens += new
        sample.mask += [1] + [0] * (len(new) - 1)
        row.pending = new
        if len(sample.tokens) == row.limit:
            sample.finish = row.limit_reason
        before = [Token(row.number, token, "") for token in new[:-1]]
        return [*before, Token(row.number, new[-1], sample.finish)]


class Entry:
    """Rows whose prompts are being read, each prompt once, before they join a batch."""

    def __init__(self, body: GPT, by_prompt: list[list[_Row]]):
        """`by_prompt`: the rows of each prompt, which have the same limit."""
        self.rows = [row for rows in by_prompt for row in rows]
        self._body = body
        # Without those that have nothing to generate
        self._by_prompt = [rows for rows in by_prompt if not rows[0].sample.finish]
        self._firsts = [rows[0] for rows in self._by_prompt]  # each reads its prompt for all
        self.cache: Any = None
        if self._firsts:
            capacity = max(len(row.sample.prompt) + row.limit - 1 for row in self._firsts)
            capacity = min(capacity, body.config.sequence_len)
            self.cache = body.new_cache(len(self._firsts), capacity)
            hidden = body.cos.new_zeros(1, len(self._firsts), body.config.n_embd)
            self.cache.keep("hidden", hidden)  # of the last token fed
            for row in self._firsts:
                row.pending = row.sample.prompt

    @property
    def done(self) -> bool:
        return not any(row.pending for row in self._firsts)

    @torch.inference_mode()
    def read(self, tokens: int) -> int:
        """
        Read up to `tokens` tokens of all prompts together, but at least one of each; returns how
        many were read.
        """
        limit = max(1, tokens // len(self._firsts))
        return _feed(self._body, self.cache, self._firsts, limit)

    def rows_to_decode(self) -> tuple[list[_Row], Any]:
        """The rows that have something to generate, and the cache with a row for each of them."""
        unfinished = [row for rows in self._by_prompt for row in rows]
        if len(unfinished) > len(self._firsts):
            places = [i for i, rows in enumerate(self._by_prompt) for _ in rows]
            self.cache = self.cache.expand(places)
        return unfinished, self.cache


# ---- the parts of a step


def clip(tokens: Sequence[int], limit: int) -> list[int]:
    """At most `limit` tokens: the first one and the last ones."""
    if len(tokens) <= limit:
        return list(tokens)
    return [tokens[0], *tokens[len(tokens) - limit + 1 :]][:limit]


def _log_probabilities(
    logits: Tensor, softcap: float, rows: list[_Row], chosen: list[int]
) -> dict[int, dict[str, Any]]:
    """
    {row number: {"logprob", "top"} of its Token} for rows whose sampling asks for them, at
    temperature 1.
    """
    asking = [i for i, row in enumerate(rows) if row.sampling.alternatives is not None]
    if not asking:
        return {}
    logits = capped(logits[asking], softcap).to(wide(logits.device))
    log_p = torch.log_softmax(logits, dim=-1).float()
    most = max(rows[i].sampling.alternatives or 0 for i in asking)
    values, ids = (x.tolist() for x in log_p.topk(most, dim=-1))
    reports = {}
    for n, i in enumerate(asking):
        top = tuple(zip(ids[n], values[n], strict=True))[: rows[i].sampling.alternatives]
        reports[rows[i].number] = {"logprob": float(log_p[n, chosen[i]]), "top": top}
    return reports


def _feed(body: GPT, cache: KVCache, rows: list[_Row], limit: int) -> int:
    """
    Feed at most `limit` pending tokens of each row in one pass, padded on the right to the longest;
    returns how many these were. The cache keeps the last hidden state of each row; a row without
    pending tokens does not change.
    """
    fed = [row.pending[:limit] for row in rows]
    longest = max(map(len, fed))
    padded = [tokens + [0] * (longest - len(tokens)) for tokens in fed]
    hidden = body(torch.tensor(padded, device=cache.k.device), cache)
    counts = [len(tokens) for tokens in fed]
    cache.advance(counts)
    if longest == min(counts):
        cache.hidden[0] = hidden[:, -1]
    else:
        read = [i for i, count in enumerate(counts) if count]
        cache.hidden[0, read] = hidden[read, [counts[i] - 1 for i in read]]
    for row in rows:
        row.pending = row.pending[limit:]
    return sum(counts)
