"""
Bits per byte: the loss of a text in bits, divided by the number of UTF-8 bytes of its tokens. It
allows models with different tokenizers to be compared.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.base.runtime import Runtime, halve_until_it_fits
from nanochat.data.feed import eval_batches
from nanochat.data.shards import Shards
from nanochat.model.gpt import GPT


@torch.no_grad()
def shard_bits_per_byte(
    model: GPT,
    shards: Shards,
    token_bytes: np.ndarray,
    runtime: Runtime,
    rows: int,
    max_tokens: int | None = None,
    compiled: bool = False,
    on_fewer: Callable[[int], Any] | None = None,
) -> float:
    """
    sum(nll in nats) / (ln 2 * sum(bytes)) of the first `max_tokens` tokens of a split (None = all),
    in its fixed order and packed to the model's context, over all ranks; nan when there is nothing
    to count.

    `token_bytes` (vocab_size,) holds the number of bytes of each token. Ignored targets and tokens
    without bytes (the special ones) count neither as loss nor as bytes. A batch has at most `rows`
    rows. If memory runs out, the evaluation starts again with half of them; `on_fewer` then gets
    the number of rows that fitted. UserError if not even one does. With `compiled` it runs the code
    that was compiled for training, on batches of exactly `rows` rows.
    """
    bytes_of = torch.from_numpy(np.asarray(token_bytes, dtype=np.int64)).to(runtime.device)
    options = {"compiled": True} if compiled else {}

    def total(rows: int) -> Tensor:
        device = "cpu" if runtime.device.type == "mps" else runtime.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        batches = eval_batches(
            shards,
            rows_per_batch=rows,
            sequence_len=model.config.sequence_len,
            max_tokens=max_tokens,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
            whole=compiled,
        )
        for batch in batches:
            nll = model.token_losses(batch.inputs, batch.targets, **options)
            n_bytes = bytes_of[batch.targets.clamp(min=0)] * (batch.targets >= 0)
            both = torch.stack([(nll * (n_bytes > 0)).sum(), n_bytes.sum()])
            sums += both.to(sums.device).to(sums.dtype)  # in two steps: MPS has no float64
        return sums

    training = model.training
    model.eval()
    try:
        sums, fitting = halve_until_it_fits(total, rows, "an evaluation batch")
    finally:
        model.train(training)
    if fitting < rows and on_fewer:
        on_fewer(fitting)
    if runtime.world_size > 1:
        dist.all_reduce(sums)
    nats, n_bytes = sums.tolist()
    return nats / math.log(2) / n_bytes if n_bytes else math.nan
