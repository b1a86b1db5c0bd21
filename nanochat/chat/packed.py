"""
A copy of a model for decoding, where each pass has few rows: its matrix products are laid out for
that, and the rest takes fewer operations. The copy shares the other weights with the model, which
stays as it is.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.gpt import GPT, Attention, Block, Linear, norm


class PackedLinear(nn.Module):
    """
    x W^T with W cast once, where W may be several matrices, one below the other. On a CPU, W is
    also stored once in the layout of the matrix library, which makes products of few rows two to
    three times as fast.
    """

    def __init__(self, *weights: Tensor, dtype: torch.dtype):
        super().__init__()
        self.source = [weight.detach() for weight in weights]  # in a list: not a parameter
        self.weight, self.packed = self.current().to(dtype), None
        if self.weight.device.type == "cpu":
            try:  # private operators, which compiled models use too; without them, F.linear
                packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 64)
                torch.ops.mkldnn._linear_pointwise(self.weight[:1], packed, None, "none", [], "")
            except (AttributeError, RuntimeError):
                return
            self.packed, self.weight = packed, None

    def current(self) -> Tensor:
        """W as the model has it now; narrow matrices take the first channels alone."""
        if len(self.source) == 1:
            return self.source[0]
        width = max(weight.size(1) for weight in self.source)
        return torch.cat([F.pad(weight, (0, width - weight.size(1))) for weight in self.source])

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def quick_norm(x: Tensor) -> Tensor:
    """
    RMSNorm in three operations, where a CPU takes a dozen for F.rms_norm: the variance of a vector
    and its negative together is the mean square of the vector.
    """
    return F.layer_norm(torch.cat((x, -x), -1), (2 * x.size(-1),), eps=1e-6)[..., : x.size(-1)]


class PackedProjection(nn.Module):
    """Attention.project with one product, and Attention.placed for queries and keys together."""

    def __init__(self, attn: Attention, dtype: torch.dtype, norm: Callable[[Tensor], Tensor]):
        super().__init__()
        self.norm, self.head_dim = norm, attn.head_dim
        layers = [attn.q, attn.k, attn.v, *filter(None, [attn.value_gate])]
        self.widths = [layer.out_features for layer in layers]
        self.product = PackedLinear(*(layer.weight for layer in layers), dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.product.forward(x).split(self.widths, -1)

    def placed(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        """As Attention.placed, with cos and sin (1 or B, T, heads, head_dim) from tables()."""
        x = torch.cat((q, k), -1).unflatten(-1, (-1, self.head_dim))
        x = self.norm(x * cos + x.roll(self.head_dim // 2, -1) * sin)
        heads = q.size(-1) // self.head_dim
        return x[:, :, :heads], x[:, :, heads:]


def tables(model: GPT) -> tuple[Tensor, Tensor]:
    """
    The rotary tables that PackedProjection multiplies with heads and with heads whose halves are
    swapped: (positions, heads, head_dim) each. Copy heads are not rotated.
    """
    config, cos, sin = model.config, model.cos, model.sin
    heads, copying = config.n_head + config.n_kv_head, config.copy_heads
    cos = torch.cat((cos, cos), -1)[:, None].repeat(1, heads, 1)
    sin = torch.cat((sin, -sin), -1)[:, None].repeat(1, heads, 1)
    queries = copying * config.n_head // config.n_kv_head
    for still in (slice(queries), slice(config.n_head, config.n_head + copying)):
        cos[:, still], sin[:, still] = 1, 0
    return cos, sin


def packed_copy(model: GPT) -> tuple[GPT, nn.Module]:
    """The model's body with PackedLinear for every Linear, and its head as one."""
    shared = [*model.parameters(), *model.buffers(), model.cos, model.sin]
    body = copy.deepcopy(model, memo={id(x): x for x in shared})
    dtype = model.compute_dtype
    body.norm = quick_norm if model.cos.device.type == "cpu" else norm
    body.cos, body.sin = tables(model)
    for parent in list(body.blocks.modules()):
        if isinstance(parent, Block):
            parent.norm = body.norm
        if isinstance(parent, Attention):
            parent.joint = PackedProjection(parent, dtype, body.norm)
            del parent.q, parent.k, parent.v, parent.value_gate
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, PackedLinear(child.weight, dtype=dtype))
    return body, PackedLinear(model.head_weight, dtype=dtype)


@torch.no_grad()
def refresh(body: GPT, head: nn.Module, model: GPT) -> bool:
    """
    Update a packed copy from its model, in the same memory, which CUDA graphs need. Returns False
    if a new copy is needed instead.
    """
    if not any(p.requires_grad for p in model.parameters()):
        return True
    if body.cos.size(0) != model.cos.size(0):
        return False
    for layer in (*body.modules(), head):
        if isinstance(layer, PackedLinear):
            if layer.weight is None:  # laid out for a CPU
                return False
            layer.weight.copy_(layer.current())
    return True
