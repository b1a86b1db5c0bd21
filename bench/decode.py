"""
How fast a random model generates: tokens per second at several batch sizes, and the share of the
memory-bandwidth bound.

The bound is the time to read, once per step, every weight that a token is multiplied with and the
keys and values of all rows, at the read bandwidth measured in the same minute. The last line is
JSON. It trains nothing and writes nothing.
"""

import json
import statistics
import time
from dataclasses import dataclass, fields
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from bench.bandwidth import read_bandwidth
from nanochat.base import hardware, knobs
from nanochat.base.common import entry, human, print0
from nanochat.base.knobs import knob
from nanochat.base.runtime import open_runtime
from nanochat.chat.generate import Engine
from nanochat.data.rendering import SPECIAL_TOKENS
from nanochat.model.config import ArchitectureKnobs, GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.scaling import Shape


@dataclass(kw_only=True)
class DecodeKnobs(ArchitectureKnobs, Shape):
    """Measurement"""

    depth: int = knob(12, "layers", low=1)
    vocab_size: int = knob(32768, "tokens in the vocabulary", low=1)
    batch: tuple[int, ...] = knob((1, 8, 32), "rows generated together", low=1)
    prompt: int = knob(64, "tokens in the prompt", low=1)
    tokens: int = knob(128, "tokens generated per row", low=2)
    graphs: bool = knob(True, "decode with CUDA graphs on a CUDA device")
    repeats: int = knob(5, "runs per size; the median counts", low=1)
    device_type: str = knob("auto", "auto, cpu, cuda or mps")
    dtype: str = knob("auto", "auto, float32, bfloat16 or float16")


def main(argv=None) -> dict[str, Any]:
    k, _ = knobs.parse(
        DecodeKnobs,
        argv,
        command="bench.decode",
        description="Measure how fast a random model generates.",
    )
    rt = open_runtime(k.device_type, k.dtype)
    arch: dict[str, Any] = {f.name: getattr(k, f.name) for f in fields(ArchitectureKnobs)}
    config = GPTConfig(**{**arch, **k.dimensions()}, vocab_size=k.vocab_size)
    model = GPT.build(config, rt.device, rt.dtype)
    model.init_weights()
    model.cast_for_inference()
    nothing: Any = SimpleNamespace(
        specials=dict.fromkeys(SPECIAL_TOKENS, -1), never_sampled=()
    )  # no token stops a row: all run their full length
    engine = Engine(model, nothing, k.graphs)

    weights = model.counts()["matmul"] * rt.dtype.itemsize
    cache = model.new_cache(1, 1)
    middle = k.prompt + k.tokens // 2
    seen = sum(
        min(config.window(layer) or middle, middle) for layer in range(config.n_layer)
    )  # keys a row reads in a step
    kept = 2 * seen * config.n_kv_head * config.head_dim * cache.k.dtype.itemsize
    size = human(model.counts()["total"])
    print0(
        f"depth {k.depth}, width {config.n_embd}, {size} parameters, "
        f"{rt.dtype_name} on {hardware.device_name(rt.device)}"
    )
    print0(
        f"a step reads {weights / 1e6:.1f} MB of weights, "
        f"and {kept / 1e6:.1f} MB of keys and values per row"
    )
    print0(
        f"{'batch':>6}  {'tok/s':>8}  {'ms / step':>9}  {'GB/s':>6}  "
        f"{'read GB/s here':>14}  {'share of the bound':>18}"
    )
    rows: list[dict[str, float]] = []
    readings = [
        read_bandwidth(rt.device)
    ]  # one between any two runs: a shared machine's memory is not equally fast all the time
    for batch in k.batch:
        typical = []
        for _ in range(k.repeats):
            steps = engine.generate([1] * k.prompt, batch, k.tokens, temperature=0.8, top_k=50)
            next(steps)  # the prompt, and the weights' preparation
            times = [time.perf_counter(), *(time.perf_counter() for _ in steps)]
            typical.append(statistics.median(b - a for a, b in pairwise(times)))
            readings.append(read_bandwidth(rt.device))
        seconds, bandwidth = (
            statistics.median(typical),
            statistics.median(readings[-k.repeats - 1 :]),
        )
        rate = (weights + batch * kept) / seconds
        figures = {
            "tok_per_sec": round(batch / seconds, 1),
            "bandwidth_share": round(rate / bandwidth, 4),
        }
        rows.append({"batch": batch, "read_bandwidth": round(bandwidth), **figures})
        print0(
            f"{batch:>6}  {batch / seconds:>8.1f}  {seconds * 1e3:>9.2f}  {rate / 1e9:>6.1f}  "
            f"{bandwidth / 1e9:>14.1f}  {rate / bandwidth:>18.1%}"
        )
    print0(
        f"read bandwidth in this run: {min(readings) / 1e9:.1f} to {max(readings) / 1e9:.1f} GB/s; "
        "the median of the readings around a batch counts"
    )
    out = {
        "depth": k.depth,
        "dtype": rt.dtype_name,
        "read_bandwidths": [round(r) for r in readings],
        **rows[0],
        "batches": rows,
    }
    print0(json.dumps(out))
    return out


if __name__ == "__main__":
    entry(main)
