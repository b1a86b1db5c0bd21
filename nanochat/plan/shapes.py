"""
The shapes that plans are about: from flags to a configuration, and from a configuration to counts
of parameters and FLOPs. Every figure is counted on the real model, built without memory.
"""

from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING

from nanochat.base.common import base_dir
from nanochat.base.knobs import knob
from nanochat.model.config import ArchitectureKnobs, GPTConfig
from nanochat.train.scaling import Shape

if TYPE_CHECKING:
    from nanochat.model.gpt import GPT

FEWEST_HEADS = 6  # a search uses heads of 128 if there are at least so many, else heads of 64


@dataclass(kw_only=True)
class SizeKnobs(ArchitectureKnobs, Shape):
    """Model"""

    vocab: int = knob(65_536, "tokens in the vocabulary", low=1)
    depth: int = knob(0, "layers; 0 = 4, or with --params what fits best", low=0)
    head_dim: int = knob(
        0,
        "width of a head; 0 = 128, with --params 64 where that leaves fewer than "
        f"{FEWEST_HEADS} heads",
        low=0,
    )

    def shape(self) -> Shape:
        """The shape, with 4 layers and heads of 128 where the flags leave them open."""
        given = {f.name: getattr(self, f.name) for f in fields(Shape)}
        return Shape(**{**given, "depth": self.depth or 4, "head_dim": self.head_dim or 128})

    def architecture(self) -> ArchitectureKnobs:
        """The knobs that a GPTConfig takes over unchanged."""
        return ArchitectureKnobs(
            **{f.name: getattr(self, f.name) for f in fields(ArchitectureKnobs)}
        )


@dataclass(kw_only=True)
class OpenSizeKnobs(SizeKnobs):
    """Size; 0 = left to the plan"""

    vocab: int = knob(
        0, "tokens in the vocabulary; 0 = the tokenizer's, or 32,768 if there is none yet", low=0
    )
    depth: int = knob(0, "layers", low=0)
    aspect_ratio: float = knob(0.0, "model width per layer of depth", low=0)
    head_dim: int = knob(
        0, "width of an attention head; 0 = 64 up to a width of 512, then 128", low=0
    )
    sequence_len: int = knob(0, "context length in tokens", low=0)

    def config(self, depth: int, aspect_ratio: float, sequence_len: int) -> GPTConfig:
        """The configuration whose open sizes are these."""
        width = self.model_dim or depth * aspect_ratio
        settled = replace(
            self,
            depth=depth,
            aspect_ratio=aspect_ratio,
            sequence_len=sequence_len,
            head_dim=self.head_dim or (64 if width <= 512 else 128),
        )
        return config_for(settled.shape(), settled.architecture(), self.vocabulary())

    def vocabulary(self) -> int:
        """Tokens in the vocabulary: as given, or the tokenizer's, or 32,768."""
        from nanochat.data.tokenizer import Tokenizer

        if self.vocab:
            return self.vocab
        trained = (base_dir() / "tokenizer" / "tokenizer.json").exists()
        return Tokenizer.load().vocab_size if trained else 32_768


def config_for(shape: Shape, architecture: ArchitectureKnobs, vocab_size: int) -> GPTConfig:
    """The configuration that base_train builds from these flags; UserError if they make none."""
    return GPTConfig(vocab_size=vocab_size, **shape.dimensions(), **asdict(architecture))


def model_of(config: GPTConfig) -> "GPT":
    """The real model on the meta device, where it takes no memory. Remembered."""
    return _model(_key(config))


def counts(config: GPTConfig) -> dict[str, int]:
    """Parameters by part: embedding, transformer, head, total, matmul. Remembered."""
    return _counts(_key(config))


def layer_parameters(config: GPTConfig) -> int:
    """Parameters of the layers, without embedding and head: the N of the scaling law."""
    return counts(config)["transformer"]


def flops_per_token(config: GPTConfig, T: int = 0) -> float:
    """Training FLOPs per token in rows of T tokens (0 = the whole context). Remembered."""
    return _flops(_key(config), T or config.sequence_len)


def _key(config: GPTConfig) -> tuple:
    return tuple(vars(config).items())


@cache
def _model(key: tuple) -> "GPT":
    import torch

    from nanochat.model.gpt import GPT

    return GPT.build(GPTConfig(**dict(key)), "meta", torch.bfloat16)


@cache
def _counts(key: tuple) -> dict[str, int]:
    return _model(key).counts()


@cache
def _flops(key: tuple, T: int) -> float:
    return _model(key).flops_per_token(T)
