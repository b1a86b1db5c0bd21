"""
A copy of a model whose matrix products are laid out for decoding, where each pass has few rows.
The copy shares everything else with the model, which stays as it is.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.gpt import GPT, Attention, Linear


class PackedLinear(nn.Module):
    """
    x W^T with W cast once, where W may be several matrices, one below the other. On a CPU, W is
    also laid out once as the matrix library prefers it, which makes products of few rows two to
    three times faster.
    """

    def __init__(self, *weights: Tensor, dtype: torch.dtype):
        super().__init__()
        self.source = [weight.detach() for weight in weights]  # in a list: it is no parameter
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


class PackedProjection(nn.Module):
    """Attention.project with one product."""

    def __init__(self, attn: Attention, dtype: torch.dtype):
        super().__init__()
        layers = [attn.q, attn.k, attn.v, *filter(None, [attn.value_gate])]
        self.widths = [layer.out_features for layer in layers]
        self.product = PackedLinear(*(layer.weight for layer in layers), dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.product.forward(x).split(self.widths, -1)


def packed_copy(model: GPT) -> tuple[GPT, nn.Module]:
    """The model's body with PackedLinear for every Linear, and its head as one."""
    shared = [*model.parameters(), *model.buffers(), model.cos, model.sin]
    body = copy.deepcopy(model, memo={id(x): x for x in shared})
    dtype = model.compute_dtype
    for parent in list(body.blocks.modules()):
        if isinstance(parent, Attention):
            parent.joint = PackedProjection(parent, dtype)
            del parent.q, parent.k, parent.v, parent.value_gate
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, PackedLinear(child.weight, dtype=dtype))
    return body, PackedLinear(model.head_weight, dtype=dtype)


@torch.no_grad()
def refresh(body: GPT, head: nn.Module, model: GPT) -> bool:
    """
    Bring a packed copy up to date with its model, in the same memory, which CUDA graphs need. False
    if it must be made anew.
    """
    if not any(p.requires_grad for p in model.parameters()):
        return True
    if body.cos is not model.cos:
        return False
    for layer in (*body.modules(), head):
        if isinstance(layer, PackedLinear):
            if layer.weight is None:  # laid out for a CPU
                return False
            layer.weight.copy_(layer.current())
    return True
