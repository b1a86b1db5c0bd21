"""
NanoChat with an attention prior, for transformers. This file is shipped with an exported model and
loaded with trust_remote_code=True.

The prior adds gate * B to the attention scores of its heads, where B[i, j] depends on the tokens
around positions i and j and on their distance. It is added densely, as a mask. This needs all token
ids of the sequence, which `generate` therefore passes in `seen`.
"""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
# pyright: reportArgumentType=false

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, NanoChatConfig
from transformers import NanoChatForCausalLM as NanoChat
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "nanochat_prior"


class NanoChatPriorConfig(NanoChatConfig):
    model_type = "nanochat_prior"
    rap: dict | None = None  # the shapes of the prior: columns, shifts, rows, tensors


def attention_with_prior(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, prior=None, **_
) -> tuple[Tensor, None]:
    """
    Attention of query (B, H, T, D) to key and value (B, H_kv, S, D); `prior` has a tensor
    (B, H, T, S) for each layer.
    """
    T, S = query.size(2), key.size(2)
    bias = prior[module.layer_idx].to(query.dtype)
    if attention_mask is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
    else:
        visible = attention_mask[..., :S]
    if visible.dtype == torch.bool:
        bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)
    else:
        bias = bias + visible
    grouped = key.size(1) != query.size(1)
    y = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scaling, enable_gqa=grouped
    )
    return y.transpose(1, 2).contiguous(), None


class NanoChatPriorForCausalLM(NanoChat):
    config_class = NanoChatPriorConfig

    def __init__(self, config: NanoChatPriorConfig):
        AttentionInterface.register(IMPLEMENTATION, attention_with_prior)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        config._attn_implementation = IMPLEMENTATION
        super().__init__(config)
        self.prior = torch.nn.Module()
        for name, (dtype, *shape) in config.rap["tensors"].items():
            self.prior.register_buffer(name, torch.zeros(shape, dtype=getattr(torch, dtype)))

    def _check_and_adjust_attn_implementation(self, *args, **kwargs) -> str:
        return IMPLEMENTATION

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs) -> dict:
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )
        return {**inputs, "seen": input_ids, "seen_mask": attention_mask}

    def _terms(self, ids: Tensor, real: Tensor | None, T: int) -> list[Tensor | None]:
        """
        The scores (B, T, S) of each column of the spec, for queries at the last T of the tokens ids
        (B, S); None for a column that depends on distance only.
        """
        spec, table = self.config.rap, dict(self.prior.named_buffers())
        (B, S), codes = ids.shape, table.get("codes", table.get("pair_now"))
        blank = 0 if codes is None else codes.size(0) - 1
        if codes is not None and real is not None:
            ids = ids.masked_fill(real == 0, blank)

        def before(shift: int) -> Tensor:
            return torch.cat((ids.new_full((B, shift), blank), ids), 1)[:, :S]

        terms: list[Tensor | None] = []
        for name, _ in spec["columns"]:
            if name == "key":
                padded = torch.cat((table["key"], table["key"].new_zeros(1)))
                scores = padded[ids.clamp(max=padded.numel() - 1)]
                terms.append(scores[:, None].expand(B, T, S))
            elif name == "match":
                queries = table["codes"][ids[:, S - T :]].float() @ table["query"]
                keys = sum(
                    table["codes"][before(shift)].float() @ key
                    for shift, key in zip(spec["shifts"], table["keys"], strict=True)
                )
                terms.append(queries @ keys.mT)
            elif name == "pair":
                queries = table["pair_query"][before(1)] * table["pair_now"][ids] * table["pair"]
                keys = table["pair_query"][before(2)] * table["pair_now"][before(1)]
                terms.append(queries[:, S - T :].float() @ keys.float().mT)
            else:
                terms.append(None)
        return terms

    def _biases(self, ids: Tensor, real: Tensor | None, T: int) -> list[Tensor]:
        """What is added to the scores of each layer, (B, H, T, S)."""
        spec, table = self.config.rap, dict(self.prior.named_buffers())
        B, S = ids.shape
        terms = self._terms(ids, real, T)
        layers, heads, _ = table["gates"].shape
        distance = None
        if "place" in table:
            at = torch.arange(S, device=ids.device)
            distance = (at[S - T :, None] - at).clamp(0, table["place"].size(-1) - 1)
        biases = []
        for layer in range(self.config.num_hidden_layers):
            total = torch.zeros(B, self.config.num_attention_heads, T, S, device=ids.device)
            for group, term in enumerate(terms if layer < layers else []):
                gate = table["gates"][layer, :, group].float()[:, None, None]
                if term is not None:
                    total[:, :heads] += gate * term.float()[:, None]
                else:
                    place = table["place"]
                    curve = place[spec["rows"][layer]] if spec["rows"] else place.expand(heads, -1)
                    total[:, :heads] += gate * curve[:, distance]
            biases.append(total)
        return biases

    def forward(self, input_ids=None, attention_mask=None, seen=None, seen_mask=None, **kwargs):
        seen = input_ids if seen is None else seen
        mask = attention_mask if seen_mask is None else seen_mask
        real = mask if mask is not None and mask.dim() == 2 else None
        prior = self._biases(seen, real, input_ids.size(1))
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, prior=prior, **kwargs
        )
