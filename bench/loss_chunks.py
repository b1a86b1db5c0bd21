"""
The time of the loss and its gradients on a CPU, by the logits of a chunk and the chunks of a block
(model/loss.py).

    python -m bench.loss_chunks        width 256, vocabulary 8,192, in the dtype of training
    python -m bench.loss_chunks --vocab_size=2048 --chunks 19 22 --blocks 1 8 --no_compiled

All conditions take turns in one process; the best of the rounds counts. The last line is JSON.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from nanochat.base import knobs
from nanochat.base.common import UserError, columns, entry, print0
from nanochat.base.knobs import knob
from nanochat.base.runtime import open_runtime
from nanochat.model import loss
from nanochat.train.knobs import MachineKnobs


@dataclass(kw_only=True)
class LossChunksKnobs(MachineKnobs):
    """Measurement"""

    model_dim: int = knob(256, "model width", low=1)
    vocab_size: int = knob(8192, "tokens of the vocabulary", low=1)
    rows: int = knob(4096, "tokens whose loss is computed", low=1)
    chunks: tuple[int, ...] = knob(
        (19, 20, 21, 22, 23), "logits per chunk, as powers of two", low=0
    )
    blocks: tuple[int, ...] = knob((2, 8), "chunks per block", low=1)
    compiled: bool = knob(True, "compile the code of a chunk, at most eight shapes of it")
    rounds: int = knob(4, "rounds, after one that is not timed", low=1)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    k, _ = knobs.parse(LossChunksKnobs, argv, command="bench.loss_chunks")
    runtime = open_runtime(k.device_type, k.dtype, k.seed)
    if runtime.device.type != "cpu":
        raise UserError(
            "the chunks of a GPU's loss are limited by its memory: add --device_type=cpu"
        )
    x = torch.randn(k.rows, k.model_dim, dtype=runtime.dtype, requires_grad=True)
    head = torch.randn(k.vocab_size, k.model_dim, requires_grad=True)
    targets = torch.randint(0, k.vocab_size, (k.rows,))

    def seconds(power: int, block: int) -> float:
        with patch.object(loss, "limits", lambda *_: (1 << power, block)):
            began = time.perf_counter()
            loss.linear_cross_entropy(x, head, targets, compiled=k.compiled)
            return time.perf_counter() - began

    best = dict.fromkeys(product(k.chunks, k.blocks), math.inf)
    for condition in best:
        seconds(*condition)
    for _ in range(k.rounds):
        for condition, fastest in best.items():
            best[condition] = min(fastest, seconds(*condition))
    flops = 6 * k.rows * k.model_dim * k.vocab_size
    figures = [
        {
            "logits": 1 << power,
            "rows": max(1, (1 << power) // k.vocab_size),
            "block": block,
            "ms": round(1e3 * fastest, 1),
            "gflops": round(flops / fastest / 1e9, 1),
        }
        for (power, block), fastest in best.items()
    ]
    print0(f"width {k.model_dim}, vocabulary {k.vocab_size:,}, {runtime.dtype_name}")
    print0(columns([*figures[0]], [[*row.values()] for row in figures]))
    print0(json.dumps(figures))
    return figures


if __name__ == "__main__":
    entry(main)
