"""
The model: a GPT with rotary embeddings, QK-norm, grouped-query attention, RMSNorm without weights
and no biases.

Its defaults follow the numerical conventions of transformers' NanoChat class, so a trained model
loads there by renaming tensors. Everything known about a parameter is one row of `ROSTER`; the
architecture knobs live in config.py. The model is built on the meta device and filled by
`init_weights`. It does not know the optimizer, the data or the sampling.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.attention import Bias, attend, document_starts
from nanochat.model.cache import KVCache
from nanochat.model.config import GPTConfig
from nanochat.model.int8 import int8_linear
from nanochat.model.loss import capped, linear_cross_entropy, token_losses
from nanochat.model.prior import Prior


class ParameterSpec(NamedTuple):
    """Everything known about the parameters whose full names match `pattern`."""

    pattern: str
    part: Literal["embedding", "head", "transformer"]  # its line in the table of counts
    rate: Literal["embedding", "value", "head", "matrix", "gate"]  # its learning rate
    optimizer: Literal["adamw", "muon"]
    init: Literal["normal", "small", "fan_in", "zero"]
    matmul: bool  # whether a token costs 2 FLOPs per weight in the forward pass


ROSTER = (
    ParameterSpec(r"embed\.weight", "embedding", "embedding", "adamw", "normal", False),
    ParameterSpec(r"head\.weight", "head", "head", "adamw", "small", True),
    ParameterSpec(r".+\.attn\.(q|k|v)\.weight", "transformer", "matrix", "muon", "fan_in", True),
    ParameterSpec(r".+\.mlp\.(up|gate)\.weight", "transformer", "matrix", "muon", "fan_in", True),
    ParameterSpec(r".+\.(out|down)\.weight", "transformer", "matrix", "muon", "zero", True),
    ParameterSpec(r".+_conv\.weight", "transformer", "gate", "adamw", "zero", True),
    ParameterSpec(r"value_tables\.\d+\.weight", "embedding", "value", "adamw", "fan_in", False),
    ParameterSpec(r"pair_table\.weight", "embedding", "value", "adamw", "zero", False),
    ParameterSpec(r".+\.value_gate\.weight", "transformer", "matrix", "muon", "zero", True),
    # A prior's tensors are filled later, from an artifact or a checkpoint.
    ParameterSpec(r"prior\.gates", "transformer", "gate", "adamw", "zero", False),
)
# With tied embeddings, the table is the head as well.
TIED = ParameterSpec(r"embed\.weight", "embedding", "head", "adamw", "small", True)


# The share of a block's activations that compiled code keeps for the backward pass on a GPU. It
# computes the others again; none of those needs a matrix product (tests/test_cuda_code.py).
ACTIVATION_BUDGET = 0.8
GATE_CHANNELS = 12  # the first channels of a token, from which its value gate is computed
PAIR_FACTOR = 2654435761  # of the hash of a pair: a prime larger than any table of pair embeddings


def norm(x: Tensor) -> Tensor:
    """RMSNorm without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, first: int = 0) -> Tensor:
    """
    Apply the rotary embedding to all heads from `first` on: x (B, T, H, D) -> the same shape.

    Channel n forms a pair with channel n + D / 2, which is rotated by -theta, as NanoChat does.
    cos, sin (T, D / 2) or (B, T, D / 2).
    """
    a, b = x[:, :, first:].chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
    return torch.cat((x[:, :, :first], rotated), dim=2) if first else rotated


def with_earlier(x: Tensor, n: int, cache: KVCache | None, name: str) -> Tensor:
    """
    x (B, T, width) with the n positions before it prepended: (B, n + T, width). They come from the
    cache, which keeps them under `name`; positions before the first token are zeros.
    """
    return F.pad(x, (0, 0, n, 0)) if cache is None else cache.with_earlier(x, name)


class _HalfProduct(torch.autograd.Function):
    """x W^T in half precision, for GPUs. The gradient of W is summed and returned in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (x, weight), (dy,) = ctx.saved_tensors, grads
        dy_rows, x_rows = dy.flatten(0, -2), x.flatten(0, -2)
        return dy @ weight, torch.mm(dy_rows.t(), x_rows, out_dtype=torch.float32)


class _SquaredReLU(torch.autograd.Function):
    """
    y = relu(x)^2 in half precision, for GPUs. The gradient, 2 relu(x) = 2 sqrt(y), is computed from
    y instead of x: compiled code can then reuse memory, and its backward pass holds one tensor of
    this size less.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grads[0] * (2 * y.sqrt())


def half_on_gpu(x: Tensor) -> bool:
    """Whether x is in half precision on a GPU: _HalfProduct and _SquaredReLU are used there."""
    return x.device.type == "cuda" and x.dtype != torch.float32


class Linear(nn.Linear):
    """
    A linear layer without bias that computes in the dtype of its input, or with 8-bit integers. The
    weight itself stays in its own dtype (float32 while training).
    """

    int8 = False

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.int8:
            return int8_linear(input, self.weight)
        if half_on_gpu(input) and self.weight.dtype == torch.float32:
            return _HalfProduct.apply(input, self.weight)  # pyright: ignore[reportReturnType]
        return F.linear(input, self.weight.to(input.dtype))


def empty_embedding(rows: int, width: int) -> nn.Embedding:
    """
    An embedding without values. nn.Embedding(...) would draw random ones, and to do that on the
    meta device, torch imports its compiler first.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Convolution(nn.Module):
    """
    Adds to each token a weighted sum of itself and the three tokens before it, with separate
    weights for every channel: the "Canon layers" of Allen-Zhu, "Physics of Language Models:
    Part 4.1" (2025). The cache keeps the three tokens under `name`.
    """

    def __init__(self, config: GPTConfig, name: str):
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(4, config.n_embd))  # by distance, 0 to 3

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """x (B, T, n_embd) -> the same shape."""
        T, reach = x.size(1), self.weight.size(0) - 1
        weight = self.weight.to(x.dtype)
        extended = with_earlier(x, reach, cache, self.name)
        if cache is not None and T == 1:  # decoding: the same in fewer operations
            return x + (extended * weight.flip(0)).sum(1, keepdim=True)
        y = x * (1 + weight[0])
        for distance in range(1, reach + 1):
            start = reach - distance
            y = y + extended[:, start : start + T] * weight[distance]
        return y


class Attention(nn.Module):
    """
    Grouped-query causal attention with rotary embeddings and QK-norm.

    The first `copy_heads` key-value heads are not rotated. There, the key of a token is computed
    from the token before it, and its value from the token itself. W_Q starts equal to W_K in these
    heads, so that a query first attends to what followed earlier occurrences of its token.

    With value embeddings, every other layer has a table with a vector per token of the vocabulary.
    It adds this vector to the token's values, multiplied by a gate between 0 and 3 per head.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, config.window(layer), config.head_dim
        # The name of the copy heads' keys in a cache. Formatting it in forward() would make torch
        # compile every layer on its own.
        self.k_name = f"{layer}.k"
        kv_width = config.n_kv_head * config.head_dim
        self.q = Linear(config.n_embd, config.n_embd)
        self.k = Linear(config.n_embd, kv_width)
        self.v = Linear(config.n_embd, kv_width)
        self.out = Linear(config.n_embd, config.n_embd)
        self.copy_heads, self.group = config.copy_heads, config.n_head // config.n_kv_head
        self.value_gate = None
        if config.has_value_table(layer):
            self.value_gate = Linear(min(GATE_CHANNELS, config.n_embd), config.n_kv_head)
        # Generation sets a chat.packed.PackedProjection, which does the same as `project` and
        # `placed` in fewer operations
        self.joint: Any = None

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """
        x (B, T, n_embd) -> q (B, T, n_embd), k and v (B, T, kv width) and, in a layer with a value
        table, the gate before its sigmoid (B, T, n_kv_head).
        """
        if self.joint is not None:
            return self.joint(x)
        gate = [] if self.value_gate is None else [self.value_gate(x[..., :GATE_CHANNELS])]
        return self.q(x), self.k(x), self.v(x), *gate

    def placed(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        """
        q and k with their positions: (B, T, width) -> (B, T, heads, head_dim), rotated (but for
        copy heads) and then normalised in each head.
        """
        if self.joint is not None:
            return self.joint.placed(q, k, cos, sin)
        q, k = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k))
        q = norm(rotate(q, cos, sin, self.copy_heads * self.group))
        return q, norm(rotate(k, cos, sin, self.copy_heads))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        bias: Bias | None,
        values: Tensor | None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """
        x (B, T, n_embd) -> the same shape. cos, sin as for rotate; values (B, T, kv width) are the
        value embeddings of the tokens, if the layer has a table; starts (B, T) as for attend.
        """
        B, T, C = x.shape
        q, k, v, *gates = self.project(x)
        if values is not None:
            gate = 3 * torch.sigmoid(gates[0])
            v = v + (gate[..., None] * values.view(B, T, -1, self.head_dim)).flatten(2)
        if self.copy_heads:
            copied, others = k.tensor_split([self.copy_heads * self.head_dim], dim=-1)
            k = torch.cat((with_earlier(copied, 1, cache, self.k_name)[:, :-1], others), dim=-1)
        q, k = self.placed(q, k, cos, sin)
        v = v.view(B, T, -1, self.head_dim)
        # Transposed last: before this, compiled code would keep q and k twice for the backward pass
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is None:
            y = attend(q, k, v, self.window, bias, starts)
        else:
            y = cache.attend(self.layer, q, k, v, self.window, bias)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices around an activation; swiglu adds a third, the gate."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.n_embd, config.hidden)
        if config.activation == "swiglu":
            self.gate = Linear(config.n_embd, config.hidden)
        self.down = Linear(config.hidden, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.activation == "relu2":
            h: Any = _SquaredReLU.apply(h) if half_on_gpu(h) else F.relu(h).square()
        elif self.activation == "gelu":
            h = F.gelu(h, approximate="tanh")
        elif self.activation == "silu":
            h = F.silu(h)
        else:
            h = F.silu(self.gate(x)) * h
        return self.down(h)


class Block(nn.Module):
    """
    One layer: attention and MLP, each with its norm, its convolution if there is one, and its
    residual connection.
    """

    norm: Callable[[Tensor], Tensor] = staticmethod(norm)

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)
        self.attn_conv = self.mlp_conv = None
        if config.convolutions:
            self.attn_conv = Convolution(config, f"{layer}.attn")
            self.mlp_conv = Convolution(config, f"{layer}.mlp")

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        bias: Bias | None,
        values: Tensor | None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, n_embd) -> the same shape; the other arguments as for Attention.forward."""
        h = self.norm(x)
        if self.attn_conv is not None:
            h = self.attn_conv(h, cache)
        x = x + self.attn(h, cos, sin, cache, bias, values, starts)
        h = self.norm(x)
        if self.mlp_conv is not None:
            h = self.mlp_conv(h, cache)
        return x + self.mlp(h)


class GPT(nn.Module):
    """
    The model of `config`. Activations are in `compute_dtype`; parameters are float32 until
    `cast_for_inference`.
    """

    norm: Callable[[Tensor], Tensor] = staticmethod(norm)

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed = empty_embedding(config.padded_vocab, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        if not config.tie_embeddings:
            self.head = Linear(config.n_embd, config.padded_vocab)
        self.value_tables = nn.ModuleDict()  # by layer
        kv_width = config.n_kv_head * config.head_dim
        for layer in range(config.n_layer):
            if config.has_value_table(layer):
                self.value_tables[str(layer)] = empty_embedding(config.padded_vocab, kv_width)
        self.pair_table = None
        if config.pair_rows:
            self.pair_table = empty_embedding(config.pair_rows, config.n_embd)
        windows = [config.window(i) for i in range(config.n_layer)]
        self.prior = Prior(config.rap, windows, config.head_dim) if config.rap else None
        self.compiled = False

    # ---- construction

    @classmethod
    def build(
        cls,
        config: GPTConfig,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
    ) -> "GPT":
        """
        The model on `device` with uninitialised parameters: call init_weights or load a checkpoint
        before you use it.
        """
        with torch.device("meta"):
            model = cls(config, compute_dtype)
        # as to_empty() does, but without its detour through torch's symbolic shapes
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        model.set_context(config.sequence_len)
        return model

    def set_context(self, positions: int) -> None:
        """
        Compute the rotary tables of positions 0..positions-1, (positions, head_dim / 2) each, in
        the compute dtype.
        """
        device, D = self.embed.weight.device, self.config.head_dim
        if device.type == "meta":  # where arange would load torch's compiler, which takes a second
            table = torch.empty(positions, D // 2, dtype=self.compute_dtype, device=device)
            self.cos, self.sin = table, table.clone()
            return
        channel = torch.arange(0, D, 2, dtype=torch.float32, device=device)
        position = torch.arange(positions, dtype=torch.float32, device=device)
        angle = torch.outer(position, self.config.rope_base ** (-channel / D))
        self.cos, self.sin = angle.cos().to(self.compute_dtype), angle.sin().to(self.compute_dtype)

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> None:
        """
        Fill every parameter as its roster row says, from one generator: the same seed gives the
        same weights on the same device.
        """
        g = torch.Generator(device=self.embed.weight.device).manual_seed(seed)
        for _, p, spec in self.roster():
            if spec.init == "normal":
                p.normal_(0, 1, generator=g)
            elif spec.init == "small":
                p.normal_(0, 0.02 if self.config.tie_embeddings else 0.001, generator=g)
            elif spec.init == "fan_in":  # uniform, standard deviation 1 / sqrt(fan_in)
                bound = (3 / p.size(1)) ** 0.5
                p.uniform_(-bound, bound, generator=g)
            else:
                p.zero_()
        D = self.config.head_dim
        attentions: Any = [block.attn for block in self.blocks]
        for attn in attentions:
            for head in range(attn.copy_heads):
                first_query = attn.q.weight[head * attn.group * D :][:D]  # of the head's group
                first_query.copy_(attn.k.weight[head * D :][:D])

    def cast_for_inference(self) -> "GPT":
        """
        Convert the weights to the compute dtype, in place: generation in bfloat16 then reads half
        as much memory per token. The model cannot be trained afterwards.
        """
        return self.to(self.compute_dtype).requires_grad_(False)

    def compile(self) -> "GPT":  # type: ignore[override]
        """
        Compile the block, once for all layers, and the loss. Parameter names stay the same.
        Decoding never runs compiled code, because it has too many shapes.
        """
        import torch._dynamo.config
        import torch._functorch.config

        self.compiled = True
        # The most shapes that torch compiles, in all layers together: one per width of
        # conversations, and two where some layers have a window
        torch._dynamo.config.recompile_limit = 32
        if self.embed.weight.device.type == "cuda":
            torch._functorch.config.activation_memory_budget = ACTIVATION_BUDGET
        for block in self.blocks:
            block.compile(dynamic=False)
        return self

    def set_matmul(self, kind: str) -> None:
        """From now on, multiply the blocks' matrices in 8-bit integers if `kind` is "int8"."""
        for layer in self.blocks.modules():
            if isinstance(layer, Linear):
                layer.int8 = kind == "int8"

    # ---- parameters

    def roster(self) -> list[tuple[str, nn.Parameter, ParameterSpec]]:
        """
        (name, parameter, spec) of every parameter. RuntimeError if no row of ROSTER, or more than
        one, matches a name.
        """
        # TIED takes the place of the first two rows, embedding and head
        specs = (TIED, *ROSTER[2:]) if self.config.tie_embeddings else ROSTER
        rows = []
        for name, p in self.named_parameters():
            matching = [spec for spec in specs if re.fullmatch(spec.pattern, name)]
            if len(matching) != 1:
                raise RuntimeError(
                    f"the parameter {name} is covered by {len(matching)} rows of ROSTER: change "
                    "ROSTER such that exactly one row matches it"
                )
            rows.append((name, p, matching[0]))
        return rows

    def counts(self) -> dict[str, int]:
        """
        Numbers of parameters: "embedding", "transformer", "head" (with tied embeddings, the shared
        table counts as embedding), "total", and "matmul", those in matrices that every token is
        multiplied by.
        """
        n = {"embedding": 0, "transformer": 0, "head": 0, "total": 0, "matmul": 0}
        for _, p, spec in self.roster():
            n[spec.part] += p.numel()
            n["total"] += p.numel()
            n["matmul"] += p.numel() if spec.matmul else 0
        return n

    def flops_per_token(self, sequence_len: int | None = None) -> float:
        """
        Training FLOPs per token, forward and backward, in rows of `sequence_len` tokens (default:
        the context): 6 x matmul parameters, and for each layer 12 x heads x head_dim x the mean
        number of keys that a query sees.
        """
        T = sequence_len or self.config.sequence_len
        attended = prior = 0.0
        for layer in range(self.config.n_layer):
            window = min(self.config.window(layer) or T, T)
            # query i sees min(i + 1, window) keys
            mean = (window * (window + 1) / 2 + (T - window) * window) / T
            attended += mean
            if self.prior is not None and layer < self.prior.layers:
                # wider products q k^T in the forward pass, and the gradients of the gates
                prior += 4 * self.prior.heads * self.prior.rank * mean
        return 6 * self.counts()["matmul"] + 12 * self.config.n_embd * attended + prior

    # ---- computation

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, n_embd): the head without its padding rows."""
        table = self.embed.weight if self.config.tie_embeddings else self.head.weight
        # Slice only if there is padding: even a slice of everything copies the gradient
        return table[: self.config.vocab_size] if self.config.vocab_size % 64 else table

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """
        Token ids idx (B, T) -> the last hidden states (B, T, n_embd) in the compute dtype; `logits`
        maps these to logits. With a cache, idx continues the sequences that it holds; call
        cache.advance afterwards.
        """
        T = idx.size(1)
        if cache is None:
            cos, sin = self.cos[:T], self.sin[:T]
        else:
            cache.begin(T)
            cos, sin = self.cos[cache.positions], self.sin[cache.positions]
        biases: list[Bias | None] = [None] * len(self.blocks)
        if self.prior is not None:
            biases = self.prior(idx, self.compute_dtype, cache)
        starts = None
        if cache is None and self.config.document_start >= 0:
            starts = document_starts(idx, self.config.document_start)
        x = self.norm(self.embedded(idx, cache).to(self.compute_dtype))
        compiled = self.compiled and torch.is_grad_enabled()
        for i, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            values = None
            if self.config.has_value_table(i):
                values = self.value_tables[str(i)](idx).to(x.dtype)
            run = block if compiled else block.forward  # block(x) runs compiled code
            x = run(x, cos, sin, cache, bias, values, starts)
        return self.norm(x)

    def embedded(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        """
        The embeddings (B, T, n_embd) of the tokens idx (B, T), plus their pair embeddings: token b
        after token a looks up row (PAIR_FACTOR a + b) mod rows of the pair table, so that two pairs
        share a row only if they differ in both tokens. The token before the first one counts as 0.
        """
        x = self.embed(idx)
        if self.pair_table is None:
            return x
        previous = with_earlier(idx[..., None], 1, cache, "token")[:, :-1, 0]
        return x + self.pair_table((PAIR_FACTOR * previous + idx) % self.pair_table.num_embeddings)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., n_embd) -> logits (..., vocab_size) after softcap, in float32."""
        return capped(F.linear(hidden, self.head_weight.to(hidden.dtype)), self.config.softcap)

    def loss(self, idx: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """
        sum(weights * nll) over the positions whose target is not -1, a float32 scalar. idx, targets
        and weights (None = ones) are (B, T); nll is in nats.
        """
        return linear_cross_entropy(
            self(idx), self.head_weight, targets, weights, self.config.softcap, self.compiled
        )

    def token_losses(self, idx: Tensor, targets: Tensor, compiled: bool = False) -> Tensor:
        """
        The negative log-likelihood (B, T) in nats of every target (B, T), 0 where a target is -1.
        `compiled` runs the code that was compiled for training, which keeps activations as training
        does.
        """
        compiled = compiled and self.compiled
        with torch.set_grad_enabled(compiled):
            hidden = self(idx).detach()
        return token_losses(hidden, self.head_weight, targets, self.config.softcap, compiled)

    def set_progress(self, progress: float) -> None:
        """Set the share of the run that is over, 0..1; call it after every training step."""
        if self.prior is not None:
            self.prior.set_progress(progress)

    def new_cache(self, batch: int, capacity: int = 0) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens (0 = the context)."""
        c, device, dtype = self.config, self.embed.weight.device, self.compute_dtype
        # What with_earlier looks up: name -> (positions to keep, their width, their dtype)
        earlier: dict[str, tuple[int, int, torch.dtype]] = {}
        if c.pair_rows:
            earlier["token"] = 1, 1, torch.int64
        for layer in range(c.n_layer):
            if c.copy_heads:
                earlier[f"{layer}.k"] = 1, c.copy_heads * c.head_dim, dtype
            if c.convolutions:
                earlier |= dict.fromkeys((f"{layer}.attn", f"{layer}.mlp"), (3, c.n_embd, dtype))
        capacity = capacity or c.sequence_len
        return KVCache(c.n_layer, batch, c.n_kv_head, capacity, c.head_dim, device, dtype, earlier)
