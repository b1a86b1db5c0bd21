"""
NanoChat with copy heads, convolutions, value embeddings and pair embeddings, for transformers. This
file is shipped with an exported model and loaded with trust_remote_code=True.

There is no cache: for each new token, the whole text before it is computed again.
"""

# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, NanoChatConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

TAPS = 4  # tokens that a convolution mixes
GATE_CHANNELS = 12  # first ones of a token, which decide how much of its value embedding is added
PAIR_FACTOR = 2654435761  # spreads pairs of tokens over the rows of their table


class NanoChatLookbackConfig(NanoChatConfig):
    model_type = "nanochat_lookback"
    copy_heads: int = 0
    convolutions: bool = False
    value_layers: list | None = None  # layers that have a table of value embeddings
    pair_rows: int = 0  # of the table of pair embeddings; 0 = there is none
    windows: list | None = None  # keys that a query of each layer sees; 0 = all
    activation: str = "relu2"


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False)


class Convolution(nn.Module):
    """Adds to each token a sum of itself and the three before it, with weights per channel."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(TAPS, width))

    def forward(self, x: Tensor) -> Tensor:
        T, before = x.size(1), F.pad(x, (0, 0, TAPS - 1, 0))
        y = x * (1 + self.weight[0])
        for distance in range(1, TAPS):
            y = y + before[:, TAPS - 1 - distance :][:, :T] * self.weight[distance]
        return y


class Attention(nn.Module):
    """
    Attention in which the first `copy_heads` key-value heads are not rotated, and use as the key of
    a token that of the token before it.
    """

    def __init__(self, config: NanoChatLookbackConfig, has_values: bool):
        super().__init__()
        width, heads, kv = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_dim, self.copy_heads, self.group = width // heads, config.copy_heads, heads // kv
        self.q, self.k = linear(width, width), linear(width, kv * self.head_dim)
        self.v, self.out = linear(width, kv * self.head_dim), linear(width, width)
        self.value_gate = linear(min(GATE_CHANNELS, width), kv) if has_values else None

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def rotated(self, x: Tensor, first: int, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, T, D) after rotating the heads from `first` on, and normalising all."""
        a, b = x[:, first:].chunk(2, dim=-1)
        turned = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
        return norm(torch.cat((x[:, :first], turned), dim=1))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, values: Tensor | None
    ) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        if self.value_gate is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.transpose(1, 2)[..., None] * self.heads(values)
        n = self.copy_heads
        k = torch.cat((F.pad(k[:, :n], (0, 0, 1, 0))[:, :, :-1], k[:, n:]), dim=1)
        y = F.scaled_dot_product_attention(
            self.rotated(q, n * self.group, cos, sin),
            self.rotated(k, n, cos, sin),
            v,
            attn_mask=visible,
            enable_gqa=self.group > 1,
        )
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: NanoChatLookbackConfig):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.activation = ACT2FN[config.hidden_act]  # of the gate, if there is one
        self.up, self.down = linear(width, hidden), linear(hidden, width)
        self.gate = linear(width, hidden) if config.activation == "swiglu" else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = self.activation(h) if self.gate is None else self.activation(self.gate(x)) * h
        return self.down(h)


class Block(nn.Module):
    def __init__(self, config: NanoChatLookbackConfig, has_values: bool):
        super().__init__()
        self.attn, self.mlp = Attention(config, has_values), MLP(config)
        self.attn_conv = self.mlp_conv = nn.Identity()
        if config.convolutions:
            self.attn_conv = Convolution(config.hidden_size)
            self.mlp_conv = Convolution(config.hidden_size)

    def forward(self, x: Tensor, real: Tensor, *args: Tensor | None) -> Tensor:
        """x (B, T, width); real (B, T, 1) is 0 for padding, so that no text is mixed with it."""
        x = x + self.attn(self.attn_conv(norm(x) * real), *args)
        return x + self.mlp(self.mlp_conv(norm(x) * real))


class NanoChatLookbackPreTrainedModel(PreTrainedModel):
    config_class = NanoChatLookbackConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """The weights come from a file."""


class NanoChatLookbackModel(NanoChatLookbackPreTrainedModel):
    def __init__(self, config: NanoChatLookbackConfig):
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        width = config.hidden_size * config.num_key_value_heads // config.num_attention_heads
        with_values = config.value_layers or []
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i in with_values) for i in layers)
        self.value_tables = nn.ModuleDict(
            {str(i): nn.Embedding(config.vocab_size, width) for i in with_values}
        )
        if config.pair_rows:
            self.pair_table = nn.Embedding(config.pair_rows, config.hidden_size)
        self.post_init()

    def embedded(self, input_ids: Tensor, real: Tensor) -> Tensor:
        """The vectors of the tokens plus those of their pairs with the one before (B, T, width)."""
        x, rows = self.embed_tokens(input_ids), self.config.pair_rows
        if rows:
            before = F.pad((input_ids * real)[:, :-1], (1, 0))
            x = x + self.pair_table((PAIR_FACTOR * before + input_ids) % rows)
        return x

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_
    ) -> BaseModelOutput:
        config, T = self.config, input_ids.size(1)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = norm(self.embedded(input_ids, real))
        at = torch.arange(T, device=x.device)
        half = config.hidden_size // config.num_attention_heads // 2
        base = config.rope_parameters["rope_theta"]
        angle = at.float()[:, None] * base ** (-torch.arange(half, device=x.device).float() / half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        distance = at[:, None] - at
        for i, block in enumerate(self.blocks):
            window = config.windows[i] if config.windows else 0
            seen = (distance >= 0) & (distance < (window or T))
            # A query of padding sees itself, because it must see something
            visible = seen & real[:, None, None].bool() | (distance == 0)
            values = self.value_tables[str(i)](input_ids) if str(i) in self.value_tables else None
            x = block(x, real[..., None].to(x.dtype), cos, sin, visible, values)
        return BaseModelOutput(last_hidden_state=norm(x))


class NanoChatLookbackForCausalLM(NanoChatLookbackPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NanoChatLookbackConfig):
        super().__init__(config)
        self.model = NanoChatLookbackModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask=None, **_) -> dict:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_,
    ) -> CausalLMOutput:
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        logits, cap = self.lm_head(hidden[:, -logits_to_keep:]), self.config.final_logit_softcapping
        if cap:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
