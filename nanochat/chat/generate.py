"""
Generation: one prefill for n samples, ragged batches of different prompts, sampling, the calculator's tool loop, replies in a chat.

A row's tokens depend on its prompt, its seed and its number, and on nothing else in the batch (but for the last bits of products that
kernels round differently for other shapes). A row ends with "stop" (it said <|assistant_end|> or <|bos|>), "length" (max_tokens) or
"context" (sequence_len positions are filled). A prompt of sequence_len tokens or more keeps its first token (<|bos|>) and its end, and
the row says how many it lost. Nothing here trains, or changes the model.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.base.common import UserError
from nanochat.chat.tools import calculate
from nanochat.data.tokenizer import PART_TOKENS, StreamDecoder, Tokenizer
from nanochat.model.cache import KVCache
from nanochat.model.gpt import GPT, Linear
from nanochat.model.loss import capped

PREFILL_TOKENS = (
    8192  # of all rows in one pass over the prompts: bounds its memory, changes no result
)
PREFILL_CHUNK = 64  # tokens a row at least in such a pass
FEED_TOKENS = 64  # what the calculator said is fed at once while rows x tokens stay below this, else a token a step


class Token(NamedTuple):
    """One new token of one row."""

    row: int
    id: int
    sampled: bool  # False: forced, the calculator's output
    finish: str  # "" while the row goes on; else "stop" (then id is the stop token), "length" or "context"


@dataclass
class Sample:
    """What became of one sample. `tokens` are the new ones without the stop token, which is in `stop`; `mask` is 1 where sampled."""

    prompt: list[int]  # as it was fed
    dropped: int  # tokens that the prompt lost because it was longer than the context
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish: str = ""
    stop: int | None = None


@dataclass
class _Live:
    """A row that is being generated."""

    number: int
    row: Sample
    limit: int  # new tokens at most
    reason: str  # why they are no more
    random: Random
    pending: list[int] = field(default_factory=list)  # decided, not yet fed
    call: list[int] | None = None  # what an open tool call holds so far


class Engine:
    """Generates with a model. One that may still be trained is read anew at every call; one without gradients is prepared once."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        s = tokenizer.specials
        self._stops = {s["<|assistant_end|>"], s["<|bos|>"]}
        self._call = s["<|python_start|>"], s["<|python_end|>"]
        self._output = s["<|output_start|>"], s["<|output_end|>"]
        self._fast: tuple[GPT, nn.Module] | None = None

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
        Stream num_samples continuations of one prompt: every item is the tokens that a step brought, those of a row in order.
        Temperature 0 takes the likeliest token, top_k 0 or None leaves all of them in play, top_p the fewest that hold that share;
        max_tokens None goes on to the context's end.
        """
        for _, step in self._run(
            [tokens], num_samples, max_tokens, temperature, top_k, top_p, seed
        ):
            if step:
                yield step

    def generate_batch(
        self,
        prompts: Sequence[int] | Sequence[Sequence[int]],
        num_samples: int = 1,
        max_tokens: int | None = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 42,
    ) -> list[Sample]:
        """
        num_samples rows for one prompt or for each of several, prompt by prompt. `seed` may be one for each prompt: a prompt with its own
        seed gives the same rows wherever it stands; with one seed for all, prompt number i always draws the same numbers.
        """
        several = [prompts] if prompts and isinstance(prompts[0], int) else prompts
        rows: list[Sample] = []
        for rows, _ in self._run(  # noqa: B007
            cast(Sequence[Sequence[int]], several),
            num_samples,
            max_tokens,
            temperature,
            top_k,
            top_p,
            seed,
        ):
            pass
        return rows

    @torch.inference_mode()
    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        max_tokens: int | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int | Sequence[int],
    ) -> Iterator[tuple[list[Sample], list[Token]]]:
        """Generate n rows of each prompt; yields all rows and what the last step brought, at least once."""
        if (
            not temperature >= 0
            or (top_k or 0) < 0
            or not 0 < (1.0 if top_p is None else top_p) <= 1
        ):  # `not >=` also catches NaN
            given = f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
            raise UserError(
                f"{given}: temperature and top_k must be 0 or above, top_p above 0 and at most 1"
            )
        rows, live = self._open(prompts, n, max_tokens, seed)
        yield rows, []
        if not live:
            return
        body, head = self._prepared()
        cap = self.model.config.softcap
        capacity = max(
            min(len(r.row.prompt) + r.limit - 1, self.model.config.sequence_len) for r in live
        )
        cache, hidden = _prefill(body, [rows[i].prompt for i in range(0, len(rows), n)], capacity)
        if n > 1:
            copies = [p for p in range(len(prompts)) for _ in range(n)]
            cache, hidden = cache.expand(copies), hidden[copies]
        while True:
            ready = [r for r in live if not r.pending]
            logits = capped(head(hidden), cap)
            chosen = choose(logits, [r.random.random() for r in ready], temperature, top_k, top_p)
            step = [t for r, token in zip(ready, chosen, strict=True) for t in self._take(r, token)]
            for at in reversed(range(len(live))):
                if live[at].row.finish:
                    cache.drop(at)
                    live[at] = live[-1]
                    live.pop()
            yield rows, step
            if not live:
                return
            hidden = _feed(body, cache, live)

    def _open(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        max_tokens: int | None,
        seed: int | Sequence[int],
    ):
        """All rows, and those of them that are to be generated."""
        context = self.model.config.sequence_len
        if not all(prompts) or n < 1:
            raise ValueError(
                "generation needs at least one sample, and a prompt of at least one token: begin with <|bos|>"
            )
        rows, live = [], []
        for p, prompt in enumerate(prompts):
            key = f"{seed}/{p}" if isinstance(seed, int) else f"{seed[p]}/0"
            kept = clip(prompt, max(1, context - 1))
            room = context + 1 - len(kept)  # the last new token need not be fed
            limit = room if max_tokens is None else min(max_tokens, room)
            for sample in range(n):
                row = Sample(kept, len(prompt) - len(kept), finish="" if limit > 0 else "length")
                reason = "length" if limit == max_tokens else "context"
                live += (
                    [_Live(len(rows), row, limit, reason, Random(f"{key}/{sample}"))]
                    if limit > 0
                    else []
                )
                rows.append(row)
        return rows, live

    def _take(self, r: _Live, token: int) -> list[Token]:
        """Add a sampled token to a row, and what the calculator answers if it ends a call."""
        if token in self._stops:
            r.row.finish, r.row.stop = "stop", token
            return [Token(r.number, token, True, "stop")]
        new = [token]
        if token == self._call[0]:
            r.call = []
        elif token == self._call[1] and r.call is not None:
            result, r.call = calculate(self.tokenizer.decode(r.call)), None
            if result is not None:
                new += [self._output[0], *self.tokenizer.encode(result), self._output[1]]
        elif r.call is not None:
            r.call.append(token)
        new = new[: r.limit - len(r.row.tokens)]
        r.row.tokens += new
        r.row.mask += [1] + [0] * (len(new) - 1)
        r.pending += new
        if len(r.row.tokens) == r.limit:
            r.row.finish = r.reason
        return [
            Token(r.number, t, i == 0, r.row.finish if i == len(new) - 1 else "")
            for i, t in enumerate(new)
        ]

    def _prepared(self) -> tuple[GPT, nn.Module]:
        """The model's body and head with weights as fast products want them."""
        if any(p.requires_grad for p in self.model.parameters()):
            return _fast_copy(self.model)
        self._fast = self._fast or _fast_copy(self.model)
        return self._fast


# ----------------------------------------------------------------------------------------------------
# The parts of a step


def clip(tokens: Sequence[int], most: int) -> list[int]:
    """At most `most` tokens: the first and the last ones."""
    if len(tokens) <= most:
        return list(tokens)
    return [tokens[0], *tokens[len(tokens) - most + 1 :]][:most]


def _prefill(body: GPT, prompts: list[list[int]], capacity: int) -> tuple[KVCache, Tensor]:
    """A cache that holds the prompts, and the last hidden state of each (P, D)."""
    cache = body.new_cache(len(prompts), capacity)
    longest = max(len(p) for p in prompts)
    chunk = max(PREFILL_CHUNK, PREFILL_TOKENS // len(prompts))
    last: list[Any] = [None] * len(prompts)
    for at in range(0, longest, chunk):
        hidden, counts = _forward(body, cache, [p[at : at + chunk] for p in prompts])
        for b, p in enumerate(prompts):
            if at < len(p) <= at + chunk:
                last[b] = hidden[b, counts[b] - 1]
    return cache, torch.stack(last)


def _feed(body: GPT, cache: KVCache, live: list[_Live]) -> Tensor:
    """Feed what is pending, until rows are ready to be sampled from: their last hidden states (R, D), in the order of `live`."""
    while True:
        T = max(len(r.pending) for r in live)
        if T * len(live) > FEED_TOKENS:
            T = min(len(r.pending) for r in live)
        hidden, counts = _forward(body, cache, [r.pending[:T] for r in live])
        for r in live:
            r.pending = r.pending[T:]
        ready = [b for b, r in enumerate(live) if not r.pending]
        if ready:
            return (
                hidden[ready, [counts[b] - 1 for b in ready]]
                if T > 1 or len(ready) < len(live)
                else hidden[:, 0]
            )


def _forward(body: GPT, cache: KVCache, tokens: list[list[int]]) -> tuple[Tensor, list[int]]:
    """One pass over what each row has next, padded on the right to the longest: hidden states (B, T, D) and the counts of real tokens."""
    counts = [len(t) for t in tokens]
    T = max(counts)
    idx = torch.tensor([t + [0] * (T - len(t)) for t in tokens], device=cache.k.device)
    hidden = body(idx, cache)
    cache.advance(counts)
    return hidden, counts


def choose(
    logits: Tensor,
    u: list[float],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[int]:
    """
    One token a row of logits (R, V), by inverting the cumulative distribution at the row's own number u in [0, 1).
    Ties at temperature 0 go to the lower id.
    """
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    index = None
    if 0 < (top_k or 0) < logits.size(-1) or (top_p is not None and top_p < 1):
        logits, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)), dim=-1)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    p = torch.softmax(logits.to(wide) / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        p = p.masked_fill(
            p.cumsum(dim=-1) - p >= top_p, 0
        )  # the token that crosses the threshold stays
    cdf = p.cumsum(dim=-1)
    total = cdf[:, -1:]
    at = torch.tensor(u, dtype=wide, device=p.device)[:, None] * total
    picked = torch.searchsorted(
        cdf, torch.minimum(at, torch.nextafter(total, -total)), right=True
    )  # never beyond the last possible token
    return (picked if index is None else index.gather(1, picked)).squeeze(1).tolist()


class _Product(nn.Module):
    """x W^T with W cast once; on a CPU laid out once as its library wants it, which is two to three times faster for few rows."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        self.weight, self.packed = weight.detach().to(dtype), None
        if weight.device.type == "cpu":
            try:  # private operators, those that compiled models use: without them the plain product serves
                packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 64)
                torch.ops.mkldnn._linear_pointwise(self.weight[:1], packed, None, "none", [], "")
            except (AttributeError, RuntimeError):
                return
            self.packed, self.weight = packed, None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def _fast_copy(model: GPT) -> tuple[GPT, nn.Module]:
    """The model with _Product for every Linear, and its head as one; everything else is shared with the model, which stays as it is."""
    kept = [*model.parameters(), *model.buffers(), model.cos, model.sin]
    body = copy.deepcopy(model, memo={id(x): x for x in kept})
    for module in list(body.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(
                    module,
                    name,
                    nn.Identity()
                    if module is body
                    else _Product(child.weight, model.compute_dtype),
                )
    return body, _Product(model.head_weight, model.compute_dtype)


# ----------------------------------------------------------------------------------------------------
# Replies in a chat


class Reply:
    """
    The assistant's answer to a conversation whose last message is the user's; `sampling` are generate()'s max_tokens, temperature and
    so on. Iterating it generates: (kind, text) pieces with the kinds of a message's parts, "text" as it comes and never with half a
    character, "python" and "python_output" whole. Afterwards `content` is the message's content, `finish` why it ended, `tokens` how
    many it took; `prompt` is what was asked, in tokens.
    """

    def __init__(self, engine: Engine, conversation: dict, **sampling: Any):
        self._engine, self._sampling = engine, sampling
        self.prompt = engine.tokenizer.render_prompt(conversation)
        self.parts: list[dict[str, str]] = []
        self.finish, self.tokens = "", 0

    @property
    def content(self) -> str | list[dict[str, str]]:
        if all(part["type"] == "text" for part in self.parts):
            return "".join(part["text"] for part in self.parts)
        return self.parts

    def __iter__(self) -> Iterator[tuple[str, str]]:
        tokenizer = self._engine.tokenizer
        decoder = StreamDecoder(tokenizer)
        names = {i: name for name, i in tokenizer.specials.items()}
        opens = {pair[0]: kind for kind, pair in PART_TOKENS.items() if pair}
        closes = {pair[1] for pair in PART_TOKENS.values() if pair}
        kind, held = "text", ""  # held: the tool's text until it is whole
        for token in (
            t for step in self._engine.generate(self.prompt, **self._sampling) for t in step
        ):
            self.tokens += 1
            self.finish = token.finish
            name = names.get(token.id)
            if name is None:
                held += decoder.push(token.id)
            if name in opens or name in closes or token.finish:
                held += decoder.flush()
            if held and (kind == "text" or name in opens or name in closes or token.finish):
                yield self._piece(kind, held)
                held = ""
            if name is not None:
                kind = opens.get(name, "text" if name in closes else kind)

    def _piece(self, kind: str, text: str) -> tuple[str, str]:
        if self.parts and self.parts[-1]["type"] == kind == "text":
            self.parts[-1]["text"] += text
        else:
            self.parts.append({"type": kind, "text": text})
        return kind, text


def fit_conversation(tokenizer: Tokenizer, conversation: dict, most: int) -> tuple[dict, int]:
    """The conversation with as few as possible of its oldest exchanges dropped so that its prompt has `most` tokens, and how many were."""
    messages = list(conversation["messages"])
    first = 1 if messages and messages[0]["role"] == "system" else 0
    dropped = 0
    while len(messages) - first > 2 and len(tokenizer.render_prompt({"messages": messages})) > most:
        del messages[first : first + 2]
        dropped += 1
    return {**conversation, "messages": messages}, dropped
