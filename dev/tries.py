"""
Parts of karpathy/nanochat and of other recipes that were tried and are not in the package: each
function changes the training of this process. parts_experiments.py runs them; dev/LOG.md says what they gained.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from nanochat.data.feed import RowFeed, State
from nanochat.model import gpt
from nanochat.model.cache import KVCache
from nanochat.model.gpt import GPT, ParameterSpec
from nanochat.train import optim
from nanochat.train.schedule import Schedule

WARM_UP = 0.05  # share of the steps that read random tokens, repeated


def repeated(rows: int, width: int, vocab_size: int, seed: int) -> torch.Tensor:
    """(rows, width) random token ids; each row repeats its first 8 to width / 2 tokens."""
    generator = np.random.default_rng(seed)
    period = generator.integers(8, width // 2, size=(rows, 1))
    once = generator.integers(vocab_size, size=(rows, width))
    return torch.from_numpy(np.take_along_axis(once, np.arange(width) % period, axis=1))


def repeats_first() -> None:
    """
    Begin with `repeated` rows, from which a model of the usual architecture learns to copy:
    pre-pretraining on procedural data. Not from karpathy/nanochat.
    """
    original = RowFeed._steps

    def steps(self: RowFeed, state: State) -> Iterator[tuple[torch.Tensor, torch.Tensor, State]]:
        for inputs, targets, after in original(self, state):
            if self.total_steps and after["step"] <= WARM_UP * self.total_steps:
                rows, width = inputs.shape
                ids = repeated(rows, width + 1, int(inputs.max()) + 1, after["step"])
                inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            yield inputs, targets, after

    RowFeed._steps = steps


def momentum_97() -> None:
    """Muon's momentum rises to 0.97 over 400 steps."""

    def momentum_at(self: Schedule, step: int) -> float:
        return 0.85 + 0.12 * min(step / 400, 1.0)

    Schedule.momentum_at = momentum_at


def _after_init(change: Callable[[GPT], Any]) -> None:
    original = GPT.init_weights

    @torch.no_grad()
    def init_weights(self: GPT, seed: int = 42) -> None:
        original(self, seed)
        change(self)

    GPT.init_weights = init_weights


def small_mlp_input() -> None:
    """The first matrix of an MLP starts 0.4 times as large."""

    def shrink(model: GPT) -> None:
        blocks: Any = model.blocks
        for block in blocks:
            block.mlp.up.weight.mul_(0.4)

    _after_init(shrink)


def _added(name: str, make: Callable[[Any], nn.Module | nn.Parameter], rate: Any) -> None:
    """Give every model one more module or parameter, with a row of the roster."""
    original = GPT.__init__

    def init(self: GPT, config: Any, compute_dtype: torch.dtype = torch.float32) -> None:
        original(self, config, compute_dtype)
        setattr(self, name, make(config))

    GPT.__init__ = init
    row = ParameterSpec(rf"{name}(\.weight)?", "embedding", rate, "adamw", "zero", False)
    gpt.ROSTER = (*gpt.ROSTER, row)


def _with_backout() -> None:
    original = GPT.forward

    def forward(self: Any, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        if cache is not None:  # samples, which nobody reads here
            return original(self, idx, cache)
        T = idx.size(1)
        x = middle = self.norm(self.embedded(idx, None).to(self.compute_dtype))
        for i, block in enumerate(self.blocks):
            run = block if self.compiled and torch.is_grad_enabled() else block.forward
            values = None
            if self.config.has_value_table(i):
                values = self.value_tables[str(i)](idx).to(x.dtype)
            x = run(x, self.cos[:T], self.sin[:T], None, None, values, None)
            if i == len(self.blocks) // 2:
                middle = x
        return self.norm(x - self.backout.to(x.dtype) * middle)

    GPT.forward = forward


def backout() -> None:
    """Subtract a learned share, 0.2 at first, of the middle layer's output at the end."""
    _added("backout", lambda config: nn.Parameter(torch.empty(1)), "gate")
    _after_init(lambda model: nn.init.constant_(model.get_parameter("backout"), 0.2))
    _with_backout()


class _Cautious:
    """torch, but weights decay only where the update makes them smaller too."""

    factor = 1.0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def _foreach_mul_(self, params: list[torch.Tensor], factor: float) -> None:
        self.factor = factor

    def _foreach_add_(
        self, params: list[torch.Tensor], updates: list[torch.Tensor], alpha: float
    ) -> None:
        for p, update in zip(params, updates, strict=True):
            p.sub_(p * (update * p >= 0), alpha=1 - self.factor)
            p.add_(update, alpha=alpha)


def cautious_decay() -> None:
    """Decay of a weight only where it has the sign of its update; give --weight_decay too."""
    optim.listwise = _Cautious()


TRIES: dict[str, Callable[[], None]] = {
    "repeats first": repeats_first,
    "momentum 0.97": momentum_97,
    "MLP input 0.4": small_mlp_input,
    "backout": backout,
    "cautious": cautious_decay,
}
