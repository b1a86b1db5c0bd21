"""
The architecture knobs, the configuration of a model, and the knobs of the attention prior.

Importing this module does not import torch, so every command can show its help at once.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from nanochat.base.common import UserError
from nanochat.base.knobs import knob, stored_values

LARGEST = {  # limits, so that a stranger's file cannot make the program allocate all memory
    "sequence_len": 2**20,
    "vocab_size": 2**24,
    "n_layer": 2**10,
    "n_head": 2**16,
    "n_embd": 2**20,
    "mlp_ratio": 2**10,
    "softcap": 1e6,
    "rope_base": 1e12,
    "pair_embeddings": 64,
}
MOST_ANGLES = 2**27  # of the rotary tables: positions times the width of a head


@dataclass(kw_only=True)
class ArchitectureKnobs:
    """Architecture"""

    sequence_len: int = knob(2048, "context length in tokens", low=1)
    mlp_ratio: float = knob(
        4.0, "MLP hidden width, as a multiple of the model width; may be a fraction"
    )
    activation: Literal["relu2", "gelu", "silu", "swiglu"] = knob(
        "relu2", "activation of the MLP (swiglu adds a third matrix)"
    )
    tie_embeddings: bool = knob(False, "share one table between the token embedding and the head")
    softcap: float = knob(15.0, "logits become softcap * tanh(logits / softcap); 0 = no cap")
    rope_base: float = knob(10000.0, "base of the rotary embedding's wavelengths")
    window_pattern: str = knob(
        "L",
        "attention window per layer, repeated: L = whole context, S = half of it; "
        "the last layer is always L",
    )
    copy_heads: int = knob(
        0,
        "key-value heads per layer that find what followed an earlier occurrence of a token",
        low=0,
    )
    convolutions: bool = knob(
        False, "mix each token with the three before it, before attention and before the MLP"
    )
    value_embeddings: bool = knob(
        False, "tables that add a vector of the token itself to the values of every other layer"
    )
    pair_embeddings: int = knob(
        0,
        "add to each token's embedding a vector of the token with the one before it, from a hashed "
        "table with this many rows per token of the vocabulary; 0 = none",
        low=0,
    )


@dataclass(kw_only=True)
class GPTConfig(ArchitectureKnobs):
    """Everything that determines the shape of a model. Raises UserError for an impossible one."""

    vocab_size: int = knob(32768, "tokens in the vocabulary")
    n_layer: int = knob(4, "layers")
    n_head: int = knob(2, "query heads")
    n_kv_head: int = knob(2, "key and value heads")
    n_embd: int = knob(256, "width of the model")
    document_start: int = knob(
        -1, "token that begins a document; attention does not look beyond it (-1 = it does)"
    )
    rap: dict[str, Any] | None = None  # the attention prior's spec, from prior_artifact.prepare

    def __post_init__(self):
        positive = "sequence_len vocab_size n_layer n_head n_kv_head n_embd mlp_ratio rope_base"
        for name in positive.split():
            if not 0 < getattr(self, name) < math.inf:  # rejects NaN, too
                raise UserError(f"{name} must be a number above 0 (got {getattr(self, name)})")
        for name, most in LARGEST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name} must be at most {most:,} (got {getattr(self, name):,})")
        if self.rope_base < 1 or 0 < self.softcap < 1e-3:  # float32 would not hold the results
            raise UserError(
                f"rope_base must be at least 1, and softcap 0 or at least 0.001 (got "
                f"{self.rope_base:g} and {self.softcap:g})"
            )
        if self.n_embd % (2 * self.n_head):
            raise UserError(
                f"the model width {self.n_embd} cannot be divided into {self.n_head} heads of "
                "an even width, which rotary embeddings need: choose an even head_dim, and a "
                "multiple of it as model_dim"
            )
        if self.sequence_len * self.head_dim > MOST_ANGLES:
            raise UserError(
                f"heads of width {self.head_dim} cannot have {self.sequence_len:,} positions: "
                "lower sequence_len"
            )
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"{self.n_head} query heads cannot share {self.n_kv_head} key-value heads: "
                "make n_head a multiple of n_kv_head"
            )
        if not 0 <= self.copy_heads < self.n_kv_head:
            raise UserError(
                f"copy_heads {self.copy_heads} must be below the {self.n_kv_head} key-value heads, "
                "because one head at least must know positions: lower it, or choose a smaller "
                "head_dim or a larger kv_ratio"
            )
        if self.pair_embeddings < 0:
            raise UserError(
                f"pair_embeddings must be 0 (none) or above (got {self.pair_embeddings})"
            )
        if not 0 <= self.softcap < math.inf:
            raise UserError(f"softcap must be 0 (no cap) or above (got {self.softcap})")
        if not self.window_pattern or set(self.window_pattern) - {"L", "S"}:
            raise UserError(
                f"window_pattern may contain only the letters L and S, for example SSSL "
                f"(got {self.window_pattern!r})"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer, rounded to a multiple of 8 as kernels prefer."""
        return max(8, round(self.mlp_ratio * self.n_embd / 8) * 8)

    @property
    def padded_vocab(self) -> int:
        """
        Rows of the embedding table: the vocabulary size rounded up to a multiple of 64. Padding ids
        are never targets and never sampled.
        """
        return -(-self.vocab_size // 64) * 64

    @property
    def pair_rows(self) -> int:
        """Rows of the table of pair embeddings; 0 = there is none."""
        return self.pair_embeddings * self.vocab_size

    def has_value_table(self, layer: int) -> bool:
        """Whether the layer has a value embedding: every other one, counted from the last."""
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0

    def window(self, layer: int) -> int:
        """The number of keys that a query of this layer sees, including its own; 0 = all."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        if letter == "L" or layer == self.n_layer - 1:
            return 0
        return max(1, self.sequence_len // 2)

    def to_dict(self) -> dict[str, Any]:
        """
        The form stored in checkpoints and logbooks. Parts that the model does not have are left
        out, so that older versions can load it.
        """
        optional = "rap", "copy_heads", "convolutions", "value_embeddings", "pair_embeddings"
        absent = dict.fromkeys(optional, False) | {"rap": None, "document_start": -1}
        return {n: value for n, value in asdict(self).items() if value != absent.get(n)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "GPTConfig":
        """
        The configuration that to_dict stored; `rap` is not checked. Raises UserError for knobs of
        another version and for values of another type.
        """
        unknown = set(stored) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(
                "the checkpoint uses architecture knobs that this version does not have "
                f"({', '.join(sorted(unknown))[:200]}): use the version that wrote it"
            )
        values = stored_values(cls, stored, "in the checkpoint")
        return cls(**values, rap=stored.get("rap"))


@dataclass(kw_only=True)
class AttentionPriorKnobs:
    """Attention prior"""

    rap: str = knob(
        "",
        "rap_prior.safetensors, or a .pt or .safetensors file with one T x T matrix; "
        "empty = no prior",
    )
    rap_alpha: float = knob(0.1, "initial value of the gates on the prior", low=0)
    rap_lead: float = knob(
        4.0,
        "initial gate of a term in the head assigned to it (0 = the same as in all other heads)",
        low=0,
    )
    rap_gate: Literal["learned", "fixed", "annealed"] = knob(
        "learned", "annealed: the gates fall to 0 over the run"
    )
    rap_heads: float = knob(
        1.0,
        "heads that use the prior, counted from the first of each layer: "
        "a share (up to 1) or a number",
        low=0,
    )
    rap_layers: int = knob(0, "layers that use the prior, counted from the first; 0 = all", low=0)
    rap_mode: Literal["bias", "warmstart"] = knob(
        "bias", "warmstart: no bias; W_Q and W_K are initialised from the prior's match term"
    )
    rap_error: float = knob(
        0.02, "largest error of a factorisation, relative to the group's largest value", low=0
    )
    attention: Literal["auto", "dense", "factored", "flex"] = knob(
        "auto", "how the prior is added; auto = factored where possible"
    )
