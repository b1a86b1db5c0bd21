"""
A model of a training step on a card: what it would take if kernels reached their usual shares of the
vendor's peaks. Nothing is measured; docs/gpu.md shows it.

    python -m bench.roofline

"before" is the code of version 0.1, "after" that of today. What a block moves, the bytes per logit
and the kernels are those of the code that torch's compiler writes (tests/cuda_code.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.base import knobs
from nanochat.base.common import entry, print0
from nanochat.base.knobs import knob
from nanochat.train.polynomials import chosen_polynomials

# TFLOP/s in bf16, GB/s, and what is usually reached: of the peak by products, of the bandwidth, of
# the peak by flash attention forward and backward (causal, heads of 128; those of 64 reach 0.85)
CARDS = {
    "RTX 4090": (165.2, 1008, 0.86, 0.90, 0.70, 0.52),
    "RTX 3090": (71, 936, 0.84, 0.88, 0.66, 0.50),
    "H100": (989, 3350, 0.64, 0.86, 0.50, 0.38),
}
MODELS = {  # layers, width, width of a head, context, vocabulary, rows of a micro-batch
    "d12, T 1024, vocabulary 50,304": (12, 768, 128, 1024, 50304, 32),
    "d12, T 2048, vocabulary 50,304": (12, 768, 128, 2048, 50304, 16),
    "d16, T 2048, vocabulary 32,768": (16, 1024, 128, 2048, 32768, 8),
    "37.75 M parameters, T 2048": (4, 512, 64, 2048, 24576, 32),
}
# Activations of the model's width that the kernels of a block move, bytes per logit, logits per
# chunk, bytes that a chunk moves per weight of the head, passes over its gradient per micro-batch,
# kernels of a block and of a chunk, and milliseconds that a step waits for the host
WORK = {
    "before": (66.6, 20, 1 << 27, 12, 9, 55, 6, 1.5),
    "after": (66.6, 6, 1 << 27, 8, 3, 39, 4, 0.2),
}


@dataclass(kw_only=True)
class RooflineKnobs:
    """Step"""

    tokens: int = knob(1 << 19, "tokens of a step", low=1 << 15)


def step_seconds(
    card: str, model: str, work: str, tokens: int = 1 << 19
) -> tuple[float, dict[str, float]]:
    """Seconds of a step of so many tokens, and those of its parts."""
    peak, bandwidth, product, reached, forward, backward = CARDS[card]
    L, C, D, T, V, rows = MODELS[model]
    units, per_logit, chunk, per_weight, passes, block_kernels, chunk_kernels, waits = WORK[work]
    P, B, micro, matrices = (
        peak * 1e12,
        bandwidth * 1e9 * reached,
        tokens / (rows * T),
        12 * L * C * C,
    )
    chunks = tokens / 2 ** int(math.log2(chunk // V))  # of an even number of rows
    heads = 1.0 if D >= 128 else 0.85
    step = L * (4 * 6 * C**3 + 2 * (16 + 2) * C**3)  # three products
    muon = step * len(chosen_polynomials("jordan" if work == "before" else "auto", C))
    parts = {
        "blocks' products": 6 * matrices * tokens / (P * product * (1 if C > 768 else 0.95)),
        "attention": 2 * T * C * L * tokens * (1 / forward + 2.5 / backward) / (P * heads),
        "head's products": 6 * V * C * tokens / (P * product),
        "loss": (per_logit * tokens + (chunks * per_weight + 4 * micro * passes) * C) * V / B,
        "rest of the blocks": ((2 * C * tokens * (units * L + 9)) + 18 * micro * matrices) / B,
        "update": muon / (P * product * 0.85) + (66 * matrices + 56 * V * C) / B,
        "waits": waits / 1e3,
    }
    kernels = micro * (L * block_kernels + 30) + chunks * chunk_kernels + 150
    return max(sum(parts.values()), 7e-6 * kernels), parts


def main(argv: Sequence[str] | None = None) -> None:
    k, _ = knobs.parse(RooflineKnobs, argv, command="bench.roofline")
    print0(f"| tok/s and share of the peak | {' | '.join(f'{c} before | after' for c in CARDS)} |")
    print0("|---" * (1 + 2 * len(CARDS)) + "|")
    for model, (L, C, _, T, V, _) in MODELS.items():
        flops = 6 * (12 * L * C * C + V * C) + 6 * C * (T + 1) * L
        cells = []
        for card, (peak, *_) in CARDS.items():
            for work in WORK:
                rate = k.tokens / step_seconds(card, model, work, k.tokens)[0]
                cells.append(f"{rate / 1e3:,.0f} k, {rate * flops / peak / 1e12:.0%}")
        print0(f"| {model} | {' | '.join(cells)} |")
    total, parts = step_seconds("RTX 4090", "d12, T 2048, vocabulary 50,304", "after", k.tokens)
    shares = [f"{name} {seconds / total:.0%}" for name, seconds in parts.items()]
    print0(f"\nd12 at T 2048 on an RTX 4090, after: {', '.join(shares)}")


if __name__ == "__main__":
    entry(main)
