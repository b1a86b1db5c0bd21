"""
The sizes that plans are about: from flags to a configuration, and from a configuration to counts of
parameters and FLOPs. Every figure is counted on the real model, built without memory.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from nanochat.base.common import base_dir
from nanochat.base.knobs import knob
from nanochat.model.config import ArchitectureKnobs, GPTConfig
from nanochat.plan.machine import BudgetKnobs
from nanochat.train.scaling import LookbackKnobs, Shape, vocabulary_for

if TYPE_CHECKING:
    from nanochat.model.gpt import GPT


def architecture(values: ArchitectureKnobs) -> dict[str, Any]:
    """The architecture knobs of a configuration, or of a command that has them."""
    return {f.name: getattr(values, f.name) for f in fields(ArchitectureKnobs)}


@dataclass(kw_only=True)
class SizeKnobs(ArchitectureKnobs, Shape):
    """Model"""

    vocab: int = knob(65_536, "tokens in the vocabulary", low=1)
    depth: int = knob(0, "layers; 0 = 4, or the best depth where the plan chooses one", low=0)
    head_dim: int = knob(
        0, "width of a head; 0 = 128, or 64 up to a width of 512 where the plan chooses it", low=0
    )

    def config(self, width: float = math.inf, **settled: Any) -> GPTConfig:
        """
        The configuration that base_train builds from these flags, with `settled` ones instead.
        Where they are open, it has 4 layers and heads of 128, or of 64 for a model of at most
        `width` 512, so that there are several. UserError if the flags make no model.
        """
        head = self.head_dim or (64 if width <= 512 else 128)
        knobs = replace(self, **{"depth": self.depth or 4, "head_dim": head, **settled})
        return GPTConfig(vocab_size=knobs.vocab, **knobs.dimensions(), **architecture(knobs))


@dataclass(kw_only=True)
class OpenSizeKnobs(BudgetKnobs, LookbackKnobs, SizeKnobs):
    """Size; 0 = left to the plan"""

    vocab: int = knob(
        0, "tokens in the vocabulary; 0 = the tokenizer's, or by the budget if there is none", low=0
    )
    aspect_ratio: float = knob(0.0, "model width per layer of depth", low=0)
    total_batch_size: int = knob(0, "tokens per optimizer step", low=0)
    sequence_len: int = knob(0, "context length in tokens", low=0)
    softcap: float = knob(
        0.0,
        "logits become softcap * tanh(logits / softcap); 0 = no cap, which GGUF needs; a "
        "model trained for the same time is as good without one",
        low=0,
    )

    def of_size(
        self, depth: int, aspect_ratio: float, sequence_len: int, seconds: float, device_type: str
    ) -> GPTConfig:
        """
        The configuration with this depth and context, and this aspect ratio unless the flags give
        the width, as base_train builds it for `seconds` of pretraining on such a device.
        """
        aspect_ratio = self.aspect_ratio or aspect_ratio
        config = self.config(
            self.model_dim or depth * aspect_ratio,
            depth=depth,
            aspect_ratio=aspect_ratio,
            sequence_len=sequence_len,
            vocab=self.vocabulary(),
        )
        parts = self.lookback_parts(
            seconds / 60, device_type == "cpu", config.n_kv_head, config.vocab_size
        )
        return replace(config, **{n: part for n, part in parts.items() if not getattr(self, n)})

    def vocabulary(
        self, flops: float = math.inf, size: float = 1e12, elsewhere: bool = False
    ) -> int:
        """
        Tokens in the vocabulary: as given, or the tokenizer's (unless the run is `elsewhere`), or
        what suits a budget of so many FLOPs and a text of `size` bytes.
        """
        from nanochat.data.sources import only_tinyworld
        from nanochat.data.tokenizer import Tokenizer

        if self.vocab:
            return self.vocab
        if not elsewhere and (base_dir() / "tokenizer" / "tokenizer.json").exists():
            return Tokenizer.load().vocab_size
        simple = only_tinyworld(getattr(self, "data", ()))
        return vocabulary_for(size, flops, simple)


def model_of(config: GPTConfig) -> "GPT":
    """The real model on the meta device, where it takes no memory. Remembered."""
    return _model(**vars(config))


@cache
def _model(**config: Any) -> "GPT":
    import torch

    from nanochat.model.gpt import GPT

    with torch.device("meta"):  # without GPT.build's rotary tables, for which torch imports much
        return GPT(GPTConfig(**config), torch.bfloat16)


def counts(config: GPTConfig) -> dict[str, int]:
    """
    Parameters by part: embedding, transformer, head, total, matmul; counted on models of up to
    three layers, because a layer is like the last but one (GPTConfig.has_value_table).
    """
    first = 2 - config.n_layer % 2
    one, start, three = (_counts(model_of(replace(config, n_layer=n))) for n in (1, first, 3))
    pairs = (config.n_layer - first) // 2
    return {part: n + pairs * (three[part] - one[part]) for part, n in start.items()}


@cache
def _counts(model: "GPT") -> dict[str, int]:
    return model.counts()


def flops_per_token(config: GPTConfig, T: int = 0) -> float:
    """Training FLOPs per token in rows of T tokens (0 = the whole context)."""
    return _flops(model_of(config), T)


@cache
def _flops(model: "GPT", T: int) -> float:
    return model.flops_per_token(T)
