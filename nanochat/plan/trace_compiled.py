"""
What a compiled function keeps in memory, without compiling it: the graphs of its forward and backward pass are cut as the compiler cuts
them (which intermediates to save, which to compute again), and chains of elementwise operators are taken to be one kernel each.

`stand_in` gives a function on tensors without contents that allocates what the compiled one would. It computes nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

KERNELS = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
}  # with the fused attentions: called as they are, so what they read and write must exist
COSTLY_ON_CPU = {"exp", "log", "sigmoid", "tanh"}  # not computed twice there
MOST_READS = (
    4  # a chain that reads more buffers than this is not computed twice (realize_reads_threshold)
)


def stand_in(
    f: Callable[..., Any], note: Callable[[int], None], unseen: Callable[[], AbstractContextManager]
) -> Callable[..., Any]:
    """
    f with its outputs and what it saves for the backward pass allocated, no more; note(bytes) is told what it holds in between. Its graphs
    are drawn once for every shape, `unseen` by whoever counts.
    """
    drawn: dict[tuple[torch.Size, ...], Callable[..., Any]] = {}

    def cut(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        scratch, given = _scratch(gm), _placeholders(gm)
        (outputs,) = next(n for n in gm.graph.nodes if n.op == "output").args

        def run(args: list[Any]) -> list[Any]:
            made: dict[int | None, Tensor] = {}
            out = [_allocate(n, given, args, made) for n in outputs]
            args.clear()  # as compiled code does: what is read for the last time goes
            note(scratch)
            return out

        run._boxed_call = True  # type: ignore[attr-defined]  # says that the arguments come in one list
        return run

    def call(*args: Any) -> Any:
        shapes = tuple(a.shape for a in args if isinstance(a, Tensor))
        if shapes not in drawn:
            with unseen():
                from functorch.compile import (  # slow to import, and not without traces
                    aot_function,
                    min_cut_rematerialization_partition,
                )
                from torch._inductor.decomposition import select_decomp_table

                g = drawn[shapes] = aot_function(
                    f, cut, cut, min_cut_rematerialization_partition, select_decomp_table()
                )
                own = [
                    torch.empty_like(a).requires_grad_(a.requires_grad)
                    if isinstance(a, Tensor)
                    else a
                    for a in args
                ]
                out = g(*own)
                if torch.is_grad_enabled():
                    torch.autograd.grad(
                        out.sum(), [a for a in own if isinstance(a, Tensor) and a.requires_grad]
                    )
        return drawn[shapes](*args)

    return call


def _value(n: Any) -> Tensor | None:
    value = n.meta.get("val") if isinstance(n, Node) else None
    return value if isinstance(value, Tensor) else None


def _key(n: Any) -> int | None:
    """Which storage a node's tensor lies in: a view has its base's."""
    return None if (value := _value(n)) is None else value.untyped_storage()._cdata


def _placeholders(graph: GraphModule) -> dict[int | None, int]:
    return {_key(n): i for i, n in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}


def _allocate(
    n: Any, given: dict[int | None, int], args: list[Any], made: dict[int | None, Tensor]
) -> Tensor | None:
    if (value := _value(n)) is None:
        return None
    key = value.untyped_storage()._cdata
    if key in given and n.op == "placeholder":
        return args[given[key]]
    if key not in made:
        made[key] = args[given[key]] if key in given else _like(value)
    return made[key].as_strided(value.shape, value.stride(), value.storage_offset())


def _like(value: Tensor) -> Tensor:
    return torch.empty(
        value.untyped_storage().nbytes() // value.element_size(),
        dtype=value.dtype,
        device=value.device,
    )


def _name(n: Node) -> str:
    return n.target._opname if isinstance(n.target, torch._ops.OpOverload) else ""


def _kernel(n: Node) -> bool:
    return _name(n) in KERNELS or _name(n).startswith("_scaled_dot_product")


def _scratch(graph: GraphModule) -> int:
    """The most bytes alive at once in buffers that are neither inputs nor outputs."""
    nodes = list(graph.graph.nodes)
    outside = {_key(n) for n in nodes if n.op == "placeholder"} | {
        _key(n) for n in tree_leaves(nodes[-1].args)
    }
    real = _real(nodes, outside)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, n in reversed(list(enumerate(nodes))):
        if (key := _key(n)) is not None:
            first[key] = i
        read_at = (
            i if key is None or key in real else last.get(key, i)
        )  # a fused chain reads where its end is written
        for a in n.all_input_nodes:
            if (used := _key(a)) is not None and used != key:
                last[used] = max(last.get(used, 0), read_at)
    changes = [0] * (len(nodes) + 1)
    for key in first.keys() & (real - outside):
        value = _value(nodes[first[key]])
        size = 0 if value is None else value.untyped_storage().nbytes()
        changes[first[key]] += size
        changes[last.get(key, first[key]) + 1] -= size
    peak = now = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _real(nodes: list[Node], outside: set[int | None]) -> set[int | None]:
    """
    The storages that are written to memory; the others are steps of fused kernels. As torch._inductor.ir has it (mark_reuse): what a kernel
    reads or writes, what is reduced or scattered to, and what is used again and would be costly to compute twice.
    """
    real = set(outside)
    for n in nodes:
        if _kernel(n):
            real |= {
                _key(n),
                *map(_key, n.all_input_nodes),
                *(_key(user) for user in n.users),
            }  # users: the parts of several outputs
    uses: Counter[int | None] = Counter(
        _key(a) for n in nodes for a in n.all_input_nodes if _key(a) != _key(n)
    )
    reads: Counter[int | None] = Counter()
    costly: set[int | None] = set()
    for n in nodes:
        key, inputs, value = _key(n), {_key(a) for a in n.all_input_nodes} - {None}, _value(n)
        if value is None or key in inputs or key in real:  # a view is its base
            continue
        reads[key] = sum(1 if a in real else reads[a] for a in inputs)
        if (_name(n) in COSTLY_ON_CPU and value.device.type == "cpu") or inputs & (costly - real):
            costly.add(key)
        reduced = any(
            value.numel() < v.numel() for v in map(_value, n.all_input_nodes) if v is not None
        )
        if (
            reduced
            or "scatter_add" in _name(n)
            or (uses[key] > 1 and (key in costly or reads[key] > MOST_READS))
        ):
            real.add(key)
    return real
