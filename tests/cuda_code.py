"""
What torch's compiler writes for a GPU, without one. A program of its own, because it makes torch
believe in a card:

    python tests/cuda_code.py FOLDER block|loss|evaluation [config fields as JSON]

Graphs are traced and cut on tensors without contents on the CPU, moved to "cuda" and lowered there;
nothing is built or run. FOLDER keeps a library that lets such tensors exist in a CPU build. Prints
one JSON object: the kernels of each part, and what a block saves for its backward pass.
"""

import ctypes
import json
import math
import re
import subprocess
import sys
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as interfaces
import torch._functorch.config
import torch._inductor.config
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from nanochat.model import gpt, loss  # noqa: E402

CUDA = torch.device("cuda", 0)
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
extern "C" void believe() {
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(
      new impl::NoOpDeviceGuardImpl<DeviceType::CUDA>());
}
"""
CARD = types.SimpleNamespace(
    name="NVIDIA GeForce RTX 4090",
    major=8,
    minor=9,
    multi_processor_count=128,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=1536,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=24 * 2**30,
    shared_memory_per_block_optin=101376,
    shared_memory_per_multiprocessor=102400,
    L2_cache_size=72 * 2**20,
    gcnArchName="",
)


def believe(folder: Path) -> None:
    """Let tensors on "cuda" exist, and let the compiler find an RTX 4090."""
    library, torch_folder = folder / "guard.so", Path(torch.__file__).parent
    if not library.exists():
        source, built = folder / "guard.cpp", folder / "guard.part"
        source.write_text(GUARD)
        include, lib = torch_folder / "include", torch_folder / "lib"
        words = ["g++", "-shared", "-fPIC", "-std=c++20", f"-I{include}", str(source)]
        subprocess.run([*words, "-o", str(built), f"-L{lib}", "-lc10"], check=True)
        built.replace(library)
    ctypes.CDLL(str(library)).believe()
    torch.cuda.get_device_properties = lambda *_, **__: CARD
    torch.cuda.get_device_capability = lambda *_, **__: (CARD.major, CARD.minor)
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.version.cuda = "13.0"
    for place in (interfaces.CudaInterface, interfaces.CudaInterface.Worker):
        place.get_device_properties = staticmethod(lambda *_, **__: CARD)
        place.current_device = staticmethod(lambda: 0)
    interfaces.CudaInterface.is_available = staticmethod(lambda: True)
    interfaces.CudaInterface.device_count = staticmethod(lambda: 1)
    interfaces.CudaInterface.is_bf16_supported = staticmethod(lambda *_, **__: True)
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 89, 32),
            get_current_device=lambda: 0,
            get_device_interface=lambda: torch.cuda,
            get_active_torch_device=lambda: CUDA,
            get_benchmarker=lambda: None,
        )
    )
    torch._functorch.config.activation_memory_budget = gpt.ACTIVATION_BUDGET
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True


class Lowered(Exception):
    """Carries the code of a graph, which nobody will build."""


def lowered(
    graph: torch.fx.GraphModule, inputs: list[Any], backward: bool, kept: Collection[str] = ()
) -> str:
    """
    The code that Inductor writes for a graph when its tensors are on the card. `kept`: inputs that
    nothing else holds, whose memory a backward pass may use again.
    """
    mode = torch._guards.detect_fake_mode(inputs)
    context = torch._guards.TracingContext(mode)
    given = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    if backward:
        idxs = [i for i, name in enumerate(given) if name in kept]
        metadata: Any = types.SimpleNamespace(bw_donated_idxs=idxs, static_input_indices=[])
        context.fw_metadata = metadata
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
        if node.op == "call_function":
            to_cuda = lambda a: CUDA if isinstance(a, torch.device) else a  # noqa: E731
            node.args = torch.utils._pytree.tree_map(to_cuda, node.args)
    graph.recompile()

    def stop(lowering: GraphLowering) -> Any:
        raise Lowered(lowering.codegen()[0].value)

    with mode:
        moved = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
            if isinstance(x, torch.Tensor)
            else x
            for x in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    with (
        torch._guards.tracing(context),
        mock.patch.object(GraphLowering, "_compile_to_module", stop),
        mock.patch.object(compile_fx, "_check_triton_bf16_support", lambda graph: None),
    ):
        try:
            compile_fx.compile_fx_inner(graph, moved, is_backward=backward, cudagraphs=None)
        except Exception as e:
            while e is not None and not isinstance(e, Lowered):
                e = e.__cause__ or e.__context__
            if e is None:
                raise
            return e.args[0]
    raise AssertionError("the code is written before anything is built")


def saved(graph: torch.fx.GraphModule) -> dict[str, int]:
    """Bytes of the storages that a forward graph hands to its backward pass, beside its inputs."""
    storages = lambda nodes: {  # noqa: E731
        value.untyped_storage()._cdata: (node.name, value.untyped_storage().nbytes())
        for node in nodes
        if isinstance(value := getattr(node, "meta", {}).get("val"), torch.Tensor)
    }
    given = storages(n for n in graph.graph.nodes if n.op == "placeholder")
    kept = storages(graph.graph.output_node().args[0][1:])
    return dict(named for key, named in kept.items() if key not in given)


def parts(f: Callable, arguments: Callable[[], list], backward: bool) -> dict[str, Any]:
    """{"forward": code, "backward": code, "saved": bytes by name} of f."""
    found: dict[str, Any] = {}

    def compile_as(name: str) -> Callable:
        def run(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
            if name == "forward":
                found["saved"] = saved(graph)
            outputs = [
                n.meta["val"] if n is not None else None for n in graph.graph.output_node().args[0]
            ]
            found[name] = lowered(graph, inputs, name == "backward", found["saved"])
            like = [None if t is None else (t.shape, t.stride(), t.dtype) for t in outputs]

            def pretend(*_: Any) -> list:
                return [t and torch.empty_strided(*t[:2], dtype=t[2]) for t in like]

            return make_boxed_func(pretend)

        return run

    def cut(graph: torch.fx.GraphModule, inputs: Any, **how: Any) -> Any:
        compile_fx._recursive_joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, **how, compiler="inductor")

    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(backward):
        compiled = aot_function(
            f, compile_as("forward"), compile_as("backward"), cut, select_decomp_table()
        )
        given = arguments()
        out = compiled(*given)
        if backward:
            torch.autograd.grad(out.sum(), [x for x in given if x.requires_grad])
    return found


def flash(q: Any, k: Any, v: Any, *_: Any) -> Any:
    """The operator that scaled_dot_product_attention calls on the card."""
    scale = q.size(-1) ** -0.5
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]


def block(fields: dict[str, Any], rows: int = 32) -> dict[str, Any]:
    """A block of `fields` in bfloat16, forward and backward."""
    config = gpt.GPTConfig(
        **{
            "sequence_len": 2048,
            "n_layer": 12,
            "n_head": 6,
            "n_kv_head": 6,
            "n_embd": 768,
            **fields,
        }
    )
    with torch.device("meta"):
        model = gpt.Block(config, 0)
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    T, C, D = config.sequence_len, config.n_embd, config.head_dim

    def run(x: Any, cos: Any, sin: Any, *weights: Any) -> Any:
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(model, named, (x, cos, sin, None, None, None))

    def arguments() -> list:
        half = [torch.empty(T, D // 2, dtype=torch.bfloat16) for _ in range(2)]
        x = torch.empty(rows, T, C, dtype=torch.bfloat16).requires_grad_()
        return [x, *half, *(torch.empty(s).requires_grad_() for s in shapes)]

    on_gpu = mock.patch.object(gpt, "half_on_gpu", lambda x: True)
    with mock.patch.object(gpt, "attend", flash), on_gpu:
        found = parts(run, arguments, True)
    unit = rows * T * C * 2
    return {
        **found,
        "units": sum(found["saved"].values()) / unit,
        "peak": Memory(found["backward"], found["saved"]).peak / unit,
        "moved": [Memory(found[name]).moved / unit for name in ("forward", "backward")],
    }


def chunk(R: int = 8192, D: int = 768, V: int = 32768) -> dict[str, Any]:
    """A chunk of the loss."""

    def arguments() -> list:
        return [
            torch.empty(R, D, dtype=torch.bfloat16),
            torch.empty(V, D, dtype=torch.bfloat16),
            torch.empty(R, dtype=torch.int64),
        ]

    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        found = parts(lambda x, w, y: loss._chunk_both(x, w, y, 15.0), arguments, False)
    return {**found, "peak": Memory(found["forward"]).peak / (R * V)}


def calls(code: str) -> str:
    """The part of the code that launches kernels."""
    return code[code.index("def call(") :]


TENSOR = r"\((\([\d, ]*\)), \([\d, ]*\), (?:device='cuda:0', dtype=)?torch\.(\w+)\)"


class Memory:
    """What the code does with memory: follows its allocations and launches line by line."""

    def __init__(self, code: str, kept: Collection[str] = ()):
        """`kept`: what the code is given and nothing else holds, so that it frees it."""
        given = re.findall(rf"(\w+) = rand_strided{TENSOR}", code)
        self.bytes_of = {name: self._size(*how) for name, *how in given}
        definitions = re.findall(r"def (triton_\w+)\((.*)\):", code)
        self.roles = {name: roles.split(", ") for name, roles in definitions}
        self.owned, self.now = set(kept), 0
        self.peak = 0  # bytes, beyond what the code is given
        self.moved = 0  # bytes that its own kernels read and write
        for line in calls(code).split("def get_args")[0].splitlines():
            self._follow(line)

    @staticmethod
    def _size(shape: str, dtype: str) -> int:
        return math.prod(map(int, re.findall(r"\d+", shape))) * getattr(torch, dtype).itemsize

    def _follow(self, line: str) -> None:
        sizes, returned = self.bytes_of, r"assert_size_stride\((buf\d+), (\([\d, ]*\)).*aten"
        if new := re.search(rf"(\w+) = empty_strided_cuda{TENSOR}", line):
            self._own(new[1], self._size(new[2], new[3]))
        elif new := re.search(returned, line):  # by attention
            self._own(new[1], self._size(new[2], "bfloat16"))
        elif new := re.search(r"(\w+) = (?:reinterpret_tensor\()?(\w+).*# reuse", line):
            sizes[new[1]] = sizes[new[2]]
            self.owned.add(new[1])
        elif new := re.search(r"(\w+) = reinterpret_tensor\((\w+), (\([\d, ]*\)).*# alias", line):
            sizes[new[1]] = sizes[new[2]] // 2  # halves of heads
        elif gone := re.match(r" *del (\w+)$", line):
            self.now -= sizes[gone[1]] if gone[1] in self.owned else 0
        elif launch := re.search(r"(triton_\w+)\.run\((.*), stream=", line):
            for name, role in zip(launch[2].split(", "), self.roles[launch[1]], strict=False):
                self.moved += sizes.get(name, 0) * (2 if role.startswith("in_out") else 1)

    def _own(self, name: str, size: int) -> None:
        self.bytes_of[name] = size
        self.owned.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)


def figures(code: str) -> dict[str, Any]:
    names = re.findall(r"(triton_\w+)\.run\(", calls(code))
    products = re.findall(r"extern_kernels\.(\w+)\(", calls(code))
    return {"triton": len(names), "names": names, "products": len(products)}


def main(folder: str, what: str, fields: str = "{}") -> None:
    believe(Path(folder))
    found = block(json.loads(fields)) if what == "block" else chunk()
    if len(sys.argv) > 4:
        for name in ("forward", "backward"):
            Path(folder, f"{what}_{name}.py").write_text(found.get(name, ""))
    codes = {n: figures(found[n]) for n in ("forward", "backward") if n in found}
    if what == "loss":  # 2 bytes for each time that all logits or their gradients are met
        met = re.findall(r"tl\.(?:load|store)\(\w+ \+ \(r0_1 \+ 32768\*x0\)", found["forward"])
        codes["forward"]["bytes_per_logit"] = 2 * len(met)
    shown = {name: found.get(name) for name in ("units", "peak", "moved", "saved")}
    print(json.dumps({**codes, **shown}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
