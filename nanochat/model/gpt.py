"""
The model: a GPT with rotary embeddings, QK-norm, grouped-query attention, RMSNorm without weights and no biases.

Its defaults follow the numerical conventions of transformers' NanoChat class, so a trained model loads there by renaming tensors.
Architecture knobs live in `config.py` alone; what is to be known of a parameter stands in one row of `ROSTER`.
The model is built on the meta device and filled by `init_weights`. It knows no optimizer, no data and no sampling.
"""

import re
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.attention import Bias, attend
from nanochat.model.cache import KVCache
from nanochat.model.config import GPTConfig
from nanochat.model.loss import capped, linear_cross_entropy, token_losses
from nanochat.model.prior import Prior


class Row(NamedTuple):
    """What is to be known of the parameters whose names match `pattern` in full."""

    pattern: str
    part: Literal["embedding", "head", "transformer"]  # its line in the table of counts
    rate: Literal["embedding", "head", "matrix", "gate"]  # its learning rate
    optimizer: Literal["adamw", "muon"]
    init: Literal["normal", "small", "fan_in", "zero"]
    matmul: bool  # whether a token costs 2 FLOPs a weight in the forward pass


ROSTER = (
    Row(r"embed\.weight", "embedding", "embedding", "adamw", "normal", False),
    Row(r"head\.weight", "head", "head", "adamw", "small", True),
    Row(r"blocks\.\d+\.attn\.(q|k|v)\.weight", "transformer", "matrix", "muon", "fan_in", True),
    Row(r"blocks\.\d+\.mlp\.(up|gate)\.weight", "transformer", "matrix", "muon", "fan_in", True),
    Row(
        r"blocks\.\d+\.(attn\.out|mlp\.down)\.weight", "transformer", "matrix", "muon", "zero", True
    ),
    Row(
        r"prior\.gates", "transformer", "gate", "adamw", "zero", False
    ),  # Prior's tensors are filled from an artifact or a checkpoint
)
TIED = Row(
    r"embed\.weight", "embedding", "head", "adamw", "small", True
)  # the table is the head as well


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on split halves, by -theta as NanoChat does. x (B, H, T, D); cos, sin (T, D/2) or (B, 1, T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Linear(nn.Linear):
    """A bias-free product in the input's dtype; the master weight stays in its own (float32)."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, cfg.window(layer), cfg.head_dim
        self.q = Linear(cfg.n_embd, cfg.n_head * cfg.head_dim)
        self.k = Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim)
        self.v = Linear(cfg.n_embd, cfg.n_kv_head * cfg.head_dim)
        self.out = Linear(cfg.n_embd, cfg.n_embd)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        positions: Tensor | None,
        bias: Bias | None,
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            f(x).view(B, T, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v)
        )  # (B, H or H_kv, T, D)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if cache is None or positions is None:
            y = attend(q, k, v, self.window, bias)
        else:
            y = cache.attend(self.layer, q, k, v, positions, self.window, bias)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig):
        super().__init__()
        self.activation = cfg.activation
        self.up = Linear(cfg.n_embd, cfg.hidden)
        if cfg.activation == "swiglu":
            self.gate = Linear(cfg.n_embd, cfg.hidden)
        self.down = Linear(cfg.hidden, cfg.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.activation == "relu2":
            h = F.relu(h).square()
        elif self.activation == "gelu":
            h = F.gelu(h, approximate="tanh")
        elif self.activation == "silu":
            h = F.silu(h)
        else:
            h = F.silu(self.gate(x)) * h
        return self.down(h)


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(cfg, layer), MLP(cfg)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        positions: Tensor | None,
        bias: Bias | None,
    ) -> Tensor:
        x = x + self.attn(norm(x), cos, sin, cache, positions, bias)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The model of `config`. `compute_dtype` is what activations are in; parameters are float32 until `cast_for_inference`."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed = nn.Embedding(config.padded_vocab, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        if not config.tie_embeddings:
            self.head = Linear(config.n_embd, config.padded_vocab)
        windows = [config.window(i) for i in range(config.n_layer)]
        self.prior = Prior(config.rap, windows, config.head_dim) if config.rap else None
        self.compiled = False

    # construction ---------------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        config: GPTConfig,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
    ) -> "GPT":
        """The model on `device` with memory but without values: call init_weights, or load a checkpoint."""
        with torch.device("meta"):
            model = cls(config, compute_dtype)
        model.to_empty(device=device)
        model.set_context(config.sequence_len)
        return model

    def set_context(self, positions: int) -> None:
        """(Re)compute the rotary tables for positions 0..positions-1: (positions, head_dim / 2) each, in the compute dtype."""
        device = self.embed.weight.device
        channel = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device)
        angle = torch.outer(
            torch.arange(positions, dtype=torch.float32, device=device),
            self.config.rope_base ** (-channel / self.config.head_dim),
        )
        self.cos, self.sin = angle.cos().to(self.compute_dtype), angle.sin().to(self.compute_dtype)

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> None:
        """Fill every parameter as its roster row says, from one generator: the same seed gives the same weights on the same device."""
        g = torch.Generator(device=self.embed.weight.device).manual_seed(seed)
        for _, p, row in self.roster():
            if row.init == "normal":
                p.normal_(0, 1, generator=g)
            elif row.init == "small":
                p.normal_(0, 0.02 if self.config.tie_embeddings else 0.001, generator=g)
            elif row.init == "fan_in":  # uniform with a standard deviation of 1 / sqrt(fan_in)
                bound = (3 / p.size(1)) ** 0.5
                p.uniform_(-bound, bound, generator=g)
            else:
                p.zero_()

    def cast_for_inference(self) -> "GPT":
        """Keep the weights in the compute dtype (in bf16, half the memory to read a token). Ends training: the master weights are gone."""
        return self.to(self.compute_dtype).requires_grad_(False)

    def compile(self) -> "GPT":  # type: ignore[override]
        """Compile the block, once for all layers, and the loss; the keys stay as they are. Only training runs what was compiled."""
        self.compiled = True
        for block in self.blocks:
            block.compile(dynamic=False)
        return self

    # what is known of the parameters --------------------------------------------------------------------------------------

    def roster(self) -> list[tuple[str, nn.Parameter, Row]]:
        """Every parameter once with its row; a parameter that no row or two rows cover is an error."""
        rows = (TIED, *ROSTER[2:]) if self.config.tie_embeddings else ROSTER
        out = []
        for name, p in self.named_parameters():
            found = [row for row in rows if re.fullmatch(row.pattern, name)]
            if len(found) != 1:
                raise RuntimeError(
                    f"the parameter {name} is covered by {len(found)} rows of the roster: it must be exactly 1"
                )
            out.append((name, p, found[0]))
        return out

    def counts(self) -> dict[str, int]:
        """Parameters: embedding, transformer, head (0 when tied), total, and matmul: those that a token is multiplied with."""
        n = {"embedding": 0, "transformer": 0, "head": 0, "total": 0, "matmul": 0}
        for _, p, row in self.roster():
            n[row.part] += p.numel()
            n["total"] += p.numel()
            n["matmul"] += p.numel() if row.matmul else 0
        return n

    def flops_per_token(self, sequence_len: int | None = None) -> float:
        """Training FLOPs a token, forward and backward: 6 x matmul parameters + 12 x heads x head_dim x mean attended length a layer."""
        T = sequence_len or self.config.sequence_len
        attended = prior = 0.0
        for layer in range(self.config.n_layer):
            w = self.config.window(layer) or T
            w = min(w, T)
            attended += (
                seen := (w * (w + 1) / 2 + (T - w) * w) / T
            )  # query i sees min(i + 1, w) keys
            if self.prior is not None and layer < self.prior.layers:
                prior += (
                    4 * self.prior.heads * self.prior.rank * seen
                )  # wider scores, forward and for the gates
        return 6 * self.counts()["matmul"] + 12 * self.config.n_embd * attended + prior

    # computation ----------------------------------------------------------------------------------------------------------

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, n_embd): the head without its padding rows."""
        table = self.embed.weight if self.config.tie_embeddings else self.head.weight
        return table[: self.config.vocab_size]

    def body(
        self,
        idx: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        added = (
            [None] * len(self.blocks)
            if self.prior is None
            else self.prior(idx, self.compute_dtype, cache, positions)
        )
        x = norm(self.embed(idx).to(self.compute_dtype))
        training = (
            self.compiled and torch.is_grad_enabled()
        )  # evaluation and decoding have other shapes, not worth compiling for
        for block, bias in zip(self.blocks, added, strict=True):
            x = (block if training else block.forward)(x, cos, sin, cache, positions, bias)
        return norm(x)

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """
        idx (B, T) -> the last hidden states (B, T, n_embd) in the compute dtype.
        With a cache, idx continues what the cache holds; call cache.advance after.
        """
        T = idx.size(1)
        if cache is None:
            return self.body(idx, self.cos[:T], self.sin[:T])
        positions = cache.positions(T)  # (1 or B, T)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (1 or B, 1, T, D/2)
        return self.body(idx, cos, sin, cache, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., n_embd) -> capped logits (..., vocab_size) in float32."""
        return capped(F.linear(hidden, self.head_weight.to(hidden.dtype)), self.config.softcap)

    def loss(self, idx: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum(weights * nll) over the positions whose target is not -1: a scalar; all (B, T)."""
        return linear_cross_entropy(
            self(idx), self.head_weight, targets, weights, self.config.softcap, self.compiled
        )

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of every target (B, T), 0 where it is -1."""
        return token_losses(self(idx), self.head_weight, targets, self.config.softcap)

    def set_progress(self, progress: float) -> None:
        """To be told after every step what share of the run is over: an annealed prior follows it."""
        if self.prior is not None:
            self.prior.set_progress(progress)

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        c = self.config
        return KVCache(
            c.n_layer,
            batch,
            c.n_kv_head,
            capacity or c.sequence_len,
            c.head_dim,
            self.embed.weight.device,
            self.compute_dtype,
        )
