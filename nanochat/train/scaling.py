"""
Rules of scale: from depth to width, batch, horizon and learning rates. Training and planning use the same ones.
"""

import math
from dataclasses import dataclass, fields

from nanochat.base.common import UserError
from nanochat.base.knobs import knob


@dataclass(kw_only=True)
class Shape:
    """Size"""

    depth: int = knob(4, "layers: the one dial; the rest follows from it")
    aspect_ratio: float = knob(64.0, "model width per layer of depth")
    model_dim: int = knob(0, "model width; 0 = depth x aspect_ratio, rounded up to whole heads")
    head_dim: int = knob(128, "width of an attention head")
    kv_ratio: float = knob(
        1.0, "key-value heads as a share of the query heads; as near as whole groups allow", high=1
    )

    def dimensions(self) -> dict[str, int]:
        """n_layer, n_embd, n_head, n_kv_head; UserError when the figures make no model."""
        for f in fields(Shape):
            value = getattr(self, f.name)
            if not 0 <= value < math.inf or (f.name != "model_dim" and value == 0):
                raise UserError(f"{f.name} is {value}: it must be a number above 0")
        width = (
            self.model_dim
            or math.ceil(self.depth * self.aspect_ratio / self.head_dim) * self.head_dim
        )
        if width % self.head_dim:
            near = max(1, round(width / self.head_dim)) * self.head_dim
            raise UserError(
                f"model_dim {width} is not a multiple of head_dim {self.head_dim}: try --model_dim={near}"
            )
        heads = width // self.head_dim
        wanted = heads * self.kv_ratio
        kv = min(
            (n for n in range(1, heads + 1) if heads % n == 0),
            key=lambda n: max(n / wanted, wanted / n),
        )
        return {"n_layer": self.depth, "n_embd": width, "n_head": heads, "n_kv_head": kv}


MIN_STEPS = 2000  # that a horizon should give at least, from 27 M tokens on


def batch_for(tokens: float) -> int:
    """
    Tokens of one optimizer step for a horizon of `tokens`: a power of two near 74 x tokens^0.383, between 2^12 and 2^19, and small enough
    for 2,000 steps, or where these are too many for sqrt(tokens) / 2.6 of them. The exponent is the reported one for compute-optimal runs;
    the factor makes a 11.2 G token run use 2^19. Below 240 M tokens steps are what is short: for minutes on a small GPU 2^14 was reported
    best. On two cores 2^12 was the best of 2^10 to 2^13 with 1.6 M tokens, as good as 2^13 with 4 M, and 4 % worse than it with 10 M
    (dev/LOG.md: small budgets, a batch that was too small).
    """
    tokens = max(tokens, 1.0)
    few = max(tokens / MIN_STEPS, 2.6 * math.sqrt(tokens))
    return 1 << min(19, max(12, round(math.log2(min(74 * tokens**0.383, few)))))


def width_scale(n_embd: int) -> float:
    """Factor on AdamW's rates: (width / 768)^-0.5, the rates being tuned at width 768."""
    return (n_embd / 768) ** -0.5


def embedding_rate(batch: int) -> float:
    """
    AdamW's rate for the token embedding (at width 768) at a batch of so many tokens: as the square root of the batch, 0.1 at 2^14 and 0.05
    at 2^12, the rates of the runs on two cores that learned most (dev/LOG.md); never above the 0.2 of eight-GPU batches.
    """
    return min(0.2, 0.1 * math.sqrt(batch / 2**14))


def context_for(flops: float) -> int:
    """
    Context length that a budget of FLOPs can use: 512 below 1e16, 1,024 below 3e18, then 2,048. The last two follow what users of 24 GB
    cards report for runs of a day (depths 12 to 14 at 1,024, 16 to 18 at 2,048 late); small models learn little from beyond 512 tokens.
    """
    return 512 if flops < 1e16 else 1024 if flops < 3e18 else 2048


def context_stages(final: int) -> tuple[tuple[float, int], ...]:
    """(share of the run, context from there on) for a run of hours that ends at `final`: short rows first, they cost less a token."""
    plans = {1024: ((0.0, 512), (0.6, 1024)), 2048: ((0.0, 512), (0.6, 1024), (0.9, 2048))}
    return plans.get(final, ((0.0, final),))
