"""
A copy of a model whose matrix products are laid out for decoding, where each pass has few rows.
The copy shares everything else with the model, which stays as it is.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.gpt import GPT, Linear


class PackedLinear(nn.Module):
    """
    x W^T with W cast once. On a CPU, W is also laid out once as the matrix library prefers it,
    which makes products of few rows two to three times faster.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        self.weight, self.packed = weight.detach().to(dtype), None
        self.source = [weight.detach()]  # in a list, or it would be one more parameter
        if weight.device.type == "cpu":
            try:  # private operators, which compiled models use too; without them, F.linear
                packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 64)
                torch.ops.mkldnn._linear_pointwise(self.weight[:1], packed, None, "none", [], "")
            except (AttributeError, RuntimeError):
                return
            self.packed, self.weight = packed, None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def packed_copy(model: GPT) -> tuple[GPT, nn.Module]:
    """The model's body with PackedLinear for every Linear, and its head as one."""
    shared = [*model.parameters(), *model.buffers(), model.cos, model.sin]
    body = copy.deepcopy(model, memo={id(x): x for x in shared})
    for parent in list(body.blocks.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, PackedLinear(child.weight, model.compute_dtype))
    return body, PackedLinear(model.head_weight, model.compute_dtype)


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
            layer.weight.copy_(layer.source[0])
    return True
