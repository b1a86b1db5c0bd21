"""
The memory of a training step, an evaluation and a sample, byte for byte and without using it: the
real model, loss and optimizer run on tensors without contents, and a dispatch mode counts every
storage that is alive. Compiled blocks are replaced by stand-ins that allocate what is declared
here.

It sees tensors only. A CUDA context and fragmentation are the margin of plan.memory.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
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
from nanochat.model.attention import QUERY_BLOCK
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.knobs import TrainKnobs
from nanochat.train.optim import MuonAdamW
from nanochat.train.run import make_optimizer

SAMPLES = (5, 64)  # rows and positions of the samples that base_train prints


class _Live(TorchDispatchMode):
    """Counts the bytes of living storages by phase; `peak` by phase and of "all" together."""

    def __init__(self, block: int):
        super().__init__()
        self.block, self.phase = block, "weights"  # an allocator hands out whole blocks
        self.storages: dict[int, tuple[str, int, Any]] = {}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._see(t)
        if func is FLASH_BACKWARD:
            self.note(_flash_backward_scratch(*args[:3]))
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

    def note(self, scratch: int = 0) -> None:
        """Remember the peaks; an operator holds `scratch` bytes more for a moment."""
        self.peak["gradients"] = max(self.peak["gradients"], self.live["gradients"])
        self.peak[self.phase] = max(self.peak[self.phase], self.live[self.phase] + scratch)
        self.peak["all"] = max(self.peak["all"], self.live.total() + scratch)

    def adopt(self, t: Tensor, phase: str) -> None:
        """Count a tensor in another phase: a gradient is made in the backward pass and stays."""
        was, size, ref = self.storages[key := t.untyped_storage()._cdata]
        self.storages[key] = phase, size, ref
        self.live[was] -= size
        self.live[phase] += size
        self.note()


FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


def _flash_backward_scratch(grad: Tensor, q: Tensor, k: Tensor) -> int:
    """
    Bytes inside the flash kernel's backward pass: dq is summed in float32, and shared key-value
    heads get a gradient for every query head.
    """
    return 4 * q.numel() + 2 * (q.numel() - k.numel()) * q.element_size()


class _Flash(TorchFunctionMode):
    """
    Without contents torch would decompose attention into a T x T product; a GPU runs the flash
    kernel where there is no mask.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                *args, 0.0, True, False, scale=kwargs.get("scale")
            )[0]
        return func(*args, **kwargs)


@contextmanager
def _ranks(n: int) -> Iterator[None]:
    """A process group of `n` ranks without communication, which share the optimizer's state."""
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
    Run an optimizer step of `micro_batches` micro-batches (rows x sequence_len each) in the middle
    of a run, an evaluation of eval_rows rows and a few samples, without contents. Returns the peak
    bytes by phase and of all together ("all"), and the bytes by phase at the end.
    """
    cpu = device_type == "cpu"
    # The meta device takes the code paths of a GPU and needs none.
    device = torch.device("cpu" if cpu else "meta")
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
        optimizer = make_optimizer(model, TrainKnobs(), Runtime(device, dtype, 0, world_size, 42))
        size = 2 * micro_batches * rows, sequence_len  # inputs and targets of a step
        ids = torch.zeros(size, dtype=torch.int64, device=device)
        live.phase = "optimizer"
        optimizer.step()  # makes the state, which a step in the middle of a run finds
        live.peak.clear()
        stand_ins = _as_compiled(model, live, rows, sequence_len)
        with stand_ins if compiled else nullcontext():
            _step(live, model, optimizer, ids.split(rows), compiled)
        _evaluate_and_sample(live, model, eval_rows or rows)
        return live.peak, live.live.copy()


def _step(
    live: _Live, model: GPT, optimizer: MuonAdamW, batches: tuple[Tensor, ...], compiled: bool
) -> None:
    """A step as the training loop makes it, phase by phase."""
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


def _evaluate_and_sample(live: _Live, model: GPT, rows: int) -> None:
    """An evaluation over rows of the whole context, and samples, beside the gradients of a step."""
    live.phase = "evaluation"
    device = model.embed.weight.device
    ids = torch.zeros(2, rows, model.config.sequence_len, dtype=torch.int64, device=device)
    model.token_losses(ids[0], ids[1])
    del ids
    live.phase = "kv_cache"
    with torch.no_grad():
        n, positions = SAMPLES
        cache = model.new_cache(n, min(positions, model.config.sequence_len))
        ids = torch.zeros(n, cache.capacity, dtype=torch.int64, device=device)
        model.logits(model(ids, cache)[:, -1])


# what compiled code allocates


class _CompiledBlock(torch.autograd.Function):
    """
    Allocates what a compiled block would, and computes nothing: forward keeps `saved` bytes for the
    backward pass, which returns the gradients of x and of all weights. Each way `note` is told of
    `scratch` bytes that are held for a moment.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, saved: int, scratch: int, note: Callable[[int], None], *weights: Tensor
    ) -> Tensor:
        kept = torch.empty(saved, dtype=torch.int8, device=x.device)
        ctx.save_for_backward(x, kept, *weights)
        ctx.scratch, ctx.note = scratch, note
        note(scratch)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *weights = ctx.saved_tensors
        gradients = [torch.empty_like(w) for w in weights]
        # What was saved is freed as it is read, so only what exceeds it adds to the peak.
        ctx.note(max(0, ctx.scratch - kept.nbytes))
        return torch.empty_like(x), None, None, None, *gradients


def _bytes_of_block(model: GPT, rows: int, T: int) -> tuple[int, int]:
    """
    Bytes that a compiled block saves for its backward pass, besides its input, and the most that it
    holds for a moment; counted on the graphs that torch.compile cuts.

    Saved per token are seven vectors of the model's width (the normed inputs of both parts, q
    before and after its norm, the attention's output twice, the residual), three of the key-value
    width, the hidden vectors of the MLP before and after the activation, and in float32 the scales
    of four norms with the softmax's sum; also the weights in the compute dtype, and on a CPU the
    attention's probabilities, which fused kernels do not keep. Held for a moment are gradients of
    the hidden vectors, or on a CPU the scores of one block of queries.
    """
    config, size = model.config, model.compute_dtype.itemsize
    hidden = 3 if config.activation == "swiglu" else 2
    width = 7 * config.n_embd + 3 * config.n_kv_head * config.head_dim + hidden * config.hidden
    scales = 2 + 2 * config.n_head + config.n_kv_head
    saved = rows * T * (size * width + 4 * scales)
    if size < 4:
        saved += size * model.counts()["transformer"] // config.n_layer
    if model.embed.weight.device.type != "cpu":
        return saved, rows * T * size * hidden * config.hidden
    saved += size * rows * config.n_head * T * (T + QUERY_BLOCK) // 2
    hidden += 0 if config.activation == "relu2" else 2
    scores = rows * config.n_head * min(T, QUERY_BLOCK) * T * (4 + size)
    return saved, max(scores, rows * T * size * hidden * config.hidden)


@contextmanager
def _as_compiled(model: GPT, live: _Live, rows: int, T: int) -> Iterator[None]:
    """Make the blocks and the chunks of the loss allocate what they would if compiled."""
    saved, scratch = _bytes_of_block(model, rows, T)

    def forward(block: Any, x: Tensor, *_: Any) -> Any:
        return _CompiledBlock.apply(x, saved, scratch, live.note, *block.parameters())

    def chunk(x: Tensor, w: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
        d_logits = x.new_empty(x.size(0), w.size(0))
        copies = 3 if x.device.type == "cpu" else 2  # of the logits, in float32
        live.note(copies * 4 * d_logits.numel())
        return x.new_empty(x.size(0), dtype=torch.float32), d_logits

    loss._compiled["both"] = chunk
    for block in model.blocks:
        block.forward = partial(forward, block)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward
        loss._compiled.pop("both")
