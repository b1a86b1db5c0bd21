"""
Bits per byte: the loss of a text in bits over the UTF-8 bytes that its tokens spell, so that tokenizers can be compared.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist

from nanochat.base.common import notice
from nanochat.base.runtime import Runtime, out_of_memory, release_memory
from nanochat.data.feed import Batch, eval_batches
from nanochat.data.shards import Shards
from nanochat.model.gpt import GPT


def shard_bits_per_byte(
    model: GPT,
    shards: Shards,
    token_bytes: np.ndarray,
    rt: Runtime,
    rows: int,
    max_tokens: int | None = None,
) -> float:
    """Bits per byte of the first `max_tokens` tokens of a split, in its fixed order, packed to the model's context."""

    def batches(rows: int) -> Iterable[Batch]:
        length = model.config.sequence_len
        ours = {"rank": rt.rank, "world_size": rt.world_size, "device": rt.device}
        return eval_batches(
            shards, rows_per_batch=rows, sequence_len=length, max_tokens=max_tokens, **ours
        )

    return bits_per_byte(model, batches, token_bytes, rt, rows)


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    batches: Callable[[int], Iterable[Batch]],
    token_bytes: np.ndarray,
    rt: Runtime,
    rows: int,
) -> float:
    """
    sum of nll / (ln 2 x sum of bytes) over all ranks. `batches(rows)` gives this rank's batches of at most `rows` rows, the same rows
    whatever `rows` is; token_bytes (vocab_size,) are the bytes each token spells. Tokens that spell none (the special ones) and ignored
    targets count on neither side. When memory runs out the evaluation starts again with half the rows. nan when nothing counts.
    """
    bytes_of = torch.from_numpy(np.asarray(token_bytes, dtype=np.int64)).to(rt.device)
    training = model.training
    model.eval()
    while True:
        try:
            sums = torch.zeros(
                2, dtype=torch.float64, device=rt.device if rt.device.type != "mps" else "cpu"
            )
            for b in batches(rows):
                nll = model.token_losses(b.inputs, b.targets)
                n_bytes = bytes_of[b.targets.clamp(min=0)] * (b.targets >= 0)
                sums += torch.stack([(nll * (n_bytes > 0)).sum(), n_bytes.sum()]).to(sums)
            break
        except RuntimeError as e:
            if not out_of_memory(e) or rows == 1:
                raise
        rows = max(1, rows // 2)
        release_memory()
        notice(f"out of memory while evaluating: going on with {rows} rows at a time")
    if rt.world_size > 1:
        dist.all_reduce(sums)
    model.train(training)
    nats, n = sums.tolist()
    return nats / math.log(2) / n if n else math.nan
