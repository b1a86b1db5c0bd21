"""
Rules of scale: from depth to width, batch, horizon and learning rates. Training and planning use the same ones.
"""

import math
from dataclasses import dataclass, fields

from nanochat.common import UserError
from nanochat.knobs import knob


@dataclass(kw_only=True)
class Shape:
    """Size"""

    depth: int = knob(4, "layers: the one dial; the rest follows from it")
    aspect_ratio: float = knob(64.0, "model width per layer of depth")
    model_dim: int = knob(0, "model width; 0 = depth x aspect_ratio, rounded up to whole heads")
    head_dim: int = knob(128, "width of an attention head")
    kv_ratio: float = knob(1.0, "key-value heads as a share of the query heads, for example 0.25")

    def dimensions(self) -> dict[str, int]:
        """n_layer, n_embd, n_head, n_kv_head; UserError when the figures make no model."""
        for f in fields(Shape):
            value = getattr(self, f.name)
            if not 0 <= value < math.inf or (f.name != "model_dim" and value == 0):
                raise UserError(f"{f.name} is {value}: it must be a number above 0")
        width = self.model_dim or math.ceil(self.depth * self.aspect_ratio / self.head_dim) * self.head_dim
        if width % self.head_dim:
            near = max(1, round(width / self.head_dim)) * self.head_dim
            raise UserError(
                f"model_dim {width} is not a multiple of head_dim {self.head_dim}: try --model_dim={near}"
            )
        heads = width // self.head_dim
        kv = max(1, round(heads * self.kv_ratio))
        if heads % kv:
            raise UserError(
                f"kv_ratio {self.kv_ratio} of {heads} heads gives {kv} key-value heads, which does not divide {heads}: "
                f"try --kv_ratio={1 / heads:.3g}"
            )
        return {"n_layer": self.depth, "n_embd": width, "n_head": heads, "n_kv_head": kv}


def batch_for(tokens: float) -> int:
    """
    Tokens of one optimizer step for a horizon of `tokens`: a power of two near 74 x tokens^0.383, at least 2^12 and at most 2^19.
    The exponent is the reported one for compute-optimal runs; the factor makes a 11.2 G token run use 2^19.
    """
    return 1 << min(19, max(12, round(math.log2(74 * max(tokens, 1.0) ** 0.383))))


def width_scale(n_embd: int) -> float:
    """Factor on AdamW's rates: (width / 768)^-0.5, the rates being tuned at width 768."""
    return (n_embd / 768) ** -0.5
