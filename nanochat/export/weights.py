"""
The weights of a model under the names of the foreign classes, in float32.

For Qwen3 and Apertus, what these classes lack is folded into the weights. The norm after the
embedding goes into the table, so that a tied table becomes two. Our rotation by -theta becomes
theirs by theta if the second half of every query and key head changes its sign. The weights of
norms, which we do not have, are 1. The activation of Apertus, xIELU, with alpha_n = -100, beta = 0
and eps = -1e-6 is softplus(alpha_p) times relu2, so W_down is divided by that factor.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.export.target import Target
from nanochat.model.gpt import GPT

XIELU = {"alpha_n": -100.0, "alpha_p": 0.5, "beta": 0.0, "eps": -1e-6}  # exact in every float type
XIELU_FACTOR = math.log1p(math.exp(XIELU["alpha_p"]))  # softplus(alpha_p)
NORM_EPS = 1e-6
# Parts of our names -> those of classes that have our numerics: transformers' own, and the one that
# is shipped for models that look back
TABLES = {"embed.": "model.embed_tokens.", "head.": "lm_head."}
NANOCHAT = TABLES | {
    "blocks.": "model.layers.",
    "attn.q.": "self_attn.q_proj.",
    "attn.k.": "self_attn.k_proj.",
    "attn.v.": "self_attn.v_proj.",
    "attn.out.": "self_attn.o_proj.",
    "mlp.up.": "mlp.fc1.",
    "mlp.down.": "mlp.fc2.",
}
LOOKBACK = TABLES | {
    "blocks.": "model.blocks.",
    "value_tables.": "model.value_tables.",
    "pair_table.": "model.pair_table.",
}


def reverse_rotation(weight: Tensor, head_dim: int) -> Tensor:
    """W_Q or W_K (heads * head_dim, C), with the sign of every head's second half changed."""
    heads = weight.clone().view(-1, head_dim, weight.size(1))
    heads[:, head_dim // 2 :] *= -1
    return heads.view_as(weight)


def _renamed(model: GPT, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The model's parameters with parts of their names replaced; tables lose padded rows."""
    tensors = {}
    for name, p in model.named_parameters():
        is_padded = not name.startswith(("blocks.", "pair_table.", "prior."))
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = p[: model.config.vocab_size] if is_padded else p
    return tensors


def _folded(model: GPT, name: str) -> dict[str, Tensor]:
    """The weights for Qwen3 or Apertus, whose blocks differ in names and in the MLP."""
    config = model.config
    width, head_dim = config.n_embd, config.head_dim
    table = model.embed.weight[: config.vocab_size].float()
    tensors = {
        "model.embed_tokens.weight": F.rms_norm(table, (width,), eps=NORM_EPS),
        "lm_head.weight": model.head_weight[: config.vocab_size],
        "model.norm.weight": torch.ones(width),
    }
    norms = {
        "qwen3": ("input_layernorm", "post_attention_layernorm"),
        "apertus": ("attention_layernorm", "feedforward_layernorm"),
    }[name]
    block: Any
    for i, block in enumerate(model.blocks):
        layer = f"model.layers.{i}."
        tensors |= {
            f"{layer}self_attn.q_proj.weight": reverse_rotation(block.attn.q.weight, head_dim),
            f"{layer}self_attn.k_proj.weight": reverse_rotation(block.attn.k.weight, head_dim),
            f"{layer}self_attn.v_proj.weight": block.attn.v.weight,
            f"{layer}self_attn.o_proj.weight": block.attn.out.weight,
            f"{layer}self_attn.q_norm.weight": torch.ones(head_dim),
            f"{layer}self_attn.k_norm.weight": torch.ones(head_dim),
            **{f"{layer}{norm}.weight": torch.ones(width) for norm in norms},
            f"{layer}mlp.up_proj.weight": block.mlp.up.weight,
        }
        if name == "qwen3":
            tensors[f"{layer}mlp.gate_proj.weight"] = block.mlp.gate.weight
            tensors[f"{layer}mlp.down_proj.weight"] = block.mlp.down.weight
        else:
            tensors[f"{layer}mlp.down_proj.weight"] = block.mlp.down.weight.float() / XIELU_FACTOR
            tensors |= {
                f"{layer}mlp.act_fn.{parameter}": torch.tensor(
                    [value] if parameter.startswith("alpha") else value
                )
                for parameter, value in XIELU.items()
            }
    return tensors


def foreign_tensors(model: GPT, target: Target) -> dict[str, Tensor]:
    """
    Name in the target class -> tensor on the CPU, which shares no storage. Weights are float32;
    tensors of whole numbers, which a prior has, keep their type.
    """
    if target.name != "nanochat":
        tensors = _folded(model, target.name)
    elif target.custom_code and model.prior is None:
        tensors = _renamed(model, LOOKBACK)
    else:
        tensors = _renamed(model, NANOCHAT)
    if target.custom_code and model.prior is not None:
        tensors |= {f"prior.{name}": t for name, t in model.prior.state_dict().items()}
    return {
        name: t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype).clone()
        for name, t in tensors.items()
    }
