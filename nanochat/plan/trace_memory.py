"""
What a training step, an evaluation and a sample keep in memory, byte for byte and without the memory: the real model, loss and optimizer
run on tensors without contents, and a dispatch mode counts every storage that is alive.

It sees what tensors show. What they do not (a CUDA context, fragmentation) is plan.memory's business.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.base.runtime import Runtime
from nanochat.model import loss
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT, Block
from nanochat.plan.trace_compiled import stand_in
from nanochat.train.knobs import TrainKnobs
from nanochat.train.optim import MuonAdamW
from nanochat.train.run import make_optimizer

SAMPLES = (5, 64)  # rows and positions of the samples that a base_train prints


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages alive, by the phase that made them; `peak` by phase, and of their sum ("all")."""

    def __init__(self, block: int):
        super().__init__()
        self.block, self.phase, self.counting = (
            block,
            "weights",
            True,
        )  # an allocator hands out whole blocks
        self.storages: dict[int, tuple[str, int, Any]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out) if self.counting else ():
            if isinstance(t, Tensor):
                self._see(t)
        if func in SCRATCH and self.counting:
            self.note(SCRATCH[func](*args))
        return out

    def _see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if (key := storage._cdata) not in self.storages:
            size = -(-storage.nbytes() // self.block) * self.block
            self.storages[key] = self.phase, size, weakref.ref(storage, lambda _: self._forget(key))
            self.live[self.phase] += size
            self.note()

    def _forget(self, key: int) -> None:
        phase, size, _ = self.storages.pop(key)
        self.live[phase] -= size

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.counting = False
        try:
            yield
        finally:
            self.counting = True

    def note(self, scratch: int = 0) -> None:
        """Remember the peaks; `scratch` bytes are held for a moment inside an operator."""
        if not self.counting:
            return
        for phase in (self.phase, "gradients"):
            self.peak[phase] = max(
                self.peak[phase], self.live[phase] + (scratch if phase == self.phase else 0)
            )
        self.peak["all"] = max(self.peak["all"], self.live.total() + scratch)

    def adopt(self, t: Tensor, phase: str) -> None:
        """Count a tensor as another phase's: a gradient is made in the backward pass and stays."""
        was, size, ref = self.storages[key := t.untyped_storage()._cdata]
        self.storages[key] = phase, size, ref
        self.live[was] -= size
        self.live[phase] += size
        self.note()


def _flash_backward_scratch(grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> int:
    """Bytes inside the flash kernel's backward pass: dq is summed in float32, and shared key-value heads get a gradient a query head."""
    return 4 * q.numel() + 2 * (q.numel() - k.numel()) * q.element_size()


SCRATCH: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_scratch
}


class _Flash(TorchFunctionMode):
    """Without contents torch would decompose attention into a T x T product; a GPU runs the flash kernel where there is no mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                *args, 0.0, True, False, scale=kwargs.get("scale")
            )[0]
        return func(*args, **kwargs)


@contextmanager
def _ranks(n: int) -> Iterator[None]:
    """A process group of `n` ranks that talk to nobody, so that the optimizer deals out its state as it would among them."""
    if n == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def trace(
    config: GPTConfig,
    rows: int,
    sequence_len: int,
    *,
    dtype: torch.dtype,
    device_type: str,
    world_size: int = 1,
    eval_rows: int | None = None,
    micro_batches: int = 2,
    compiled: bool = False,
) -> tuple[Counter[str], Counter[str]]:
    """
    An optimizer step of `micro_batches` micro-batches (rows x sequence_len each) in the midst of a run, an evaluation of eval_rows rows
    and a few samples, without contents: the bytes alive at their peaks, by phase and of all together ("all"), and those at the end.
    """
    cpu = device_type == "cpu"
    device = torch.device("cpu" if cpu else "meta")  # meta takes the roads of a GPU, and needs none
    rt = Runtime(device, dtype, 0, world_size, 42)
    with ExitStack() as stack:
        stack.enter_context(_ranks(world_size))
        if cpu:
            stack.enter_context(FakeTensorMode())
        live = stack.enter_context(_Live(64 if cpu else 512))
        stack.enter_context(_Flash())
        with device:
            model = GPT(config, dtype)
            model.set_context(config.sequence_len)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: live.adopt(p.grad, "gradients"))
        optimizer = make_optimizer(model, TrainKnobs(), rt)
        ids = torch.zeros(
            2 * micro_batches * rows, sequence_len, dtype=torch.int64, device=device
        )  # inputs and targets of a step
        with _as_compiled(model, live) if compiled else nullcontext():
            live.phase = "optimizer"
            optimizer.step()  # makes its state, which a step in the midst of a run finds there
            live.peak.clear()
            _step(live, model, optimizer, ids.split(rows), compiled)
        _look(live, model, eval_rows or rows)
        return live.peak, live.live.copy()


@contextmanager
def _as_compiled(model: GPT, live: _Live) -> Iterator[None]:
    """The model's blocks and the loss allocate what they would compiled: one graph for all blocks of a kind, as in GPT.compile."""
    stand_ins: dict[int, Callable[..., Tensor]] = {}
    for i, block in enumerate(model.blocks):
        if (window := model.config.window(i)) not in stand_ins:
            with live.paused(), model.embed.weight.device:
                kind = Block(model.config, i)
            names = [n for n, _ in kind.named_parameters()]

            def plain(
                x: Tensor,
                cos: Tensor,
                sin: Tensor,
                *weights: Tensor,
                kind: Block = kind,
                names: list[str] = names,
            ) -> Tensor:
                return torch.func.functional_call(
                    kind, dict(zip(names, weights, strict=True)), (x, cos, sin, None, None, None)
                )

            stand_ins[window] = stand_in(plain, live.note, live.paused)
        block.forward = lambda x, cos, sin, *_, f=stand_ins[window], block=block: f(
            x, cos, sin, *block.parameters()
        )
    both = loss._compiled.get("both")
    loss._compiled["both"] = stand_in(loss._chunk_both, live.note, live.paused)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward
        loss._compiled.pop("both")
        if both is not None:
            loss._compiled["both"] = both


def _step(
    live: _Live, model: GPT, optimizer: MuonAdamW, batches: tuple[Tensor, ...], compiled: bool
) -> None:
    """What trainer.fit does in a step, phase by phase."""
    optimizer.zero_grad()
    for idx, targets in zip(batches[::2], batches[1::2], strict=True):
        live.phase = "activations"
        hidden = model(idx)
        live.phase = "loss"
        total = loss.linear_cross_entropy(
            hidden, model.head_weight, targets, None, model.config.softcap, compiled
        )
        del hidden
        live.phase = "activations"
        (total / targets.numel()).backward()
        del total
    live.phase = "optimizer"
    optimizer.step()


def _look(live: _Live, model: GPT, rows: int) -> None:
    """An evaluation over rows of the whole context, and the samples; the gradients of the last step are still there."""
    live.phase = "evaluation"
    device = model.embed.weight.device
    ids = torch.zeros(2, rows, model.config.sequence_len, dtype=torch.int64, device=device)
    model.token_losses(*ids)
    del ids
    live.phase = "kv_cache"
    with torch.no_grad():
        n, positions = SAMPLES
        cache = model.new_cache(n, min(positions, model.config.sequence_len))
        model.logits(
            model(torch.zeros(n, cache.capacity, dtype=torch.int64, device=device), cache)[:, -1]
        )
