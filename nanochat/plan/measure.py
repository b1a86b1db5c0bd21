"""
One measurement on this machine: the speed and peak memory of training steps, or the peak of the
device. `machine.in_process` runs this module in a process of its own: it takes a specification in
JSON as its argument, and prints the result as JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from nanochat.base import hardware
from nanochat.base.common import entry
from nanochat.base.runtime import Runtime, compiler_missing, open_runtime, out_of_memory
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.knobs import TrainKnobs
from nanochat.train.run import make_optimizer

WARMUP_STEPS = 3  # compile and warm up; their times do not count
MOST_STEPS = 200


def measure_device(device_type: str, dtype: str) -> dict[str, Any]:
    """The fields of Machine for the device of this process."""
    runtime = open_runtime(device_type, dtype)
    device = runtime.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = hardware.available_memory()
    return {
        "name": hardware.device_name(device),
        "device_type": device.type,
        "dtype": runtime.dtype_name,
        "memory_bytes": memory,
        "peak_flops": hardware.measured_peak(device, runtime.dtype),
        "compiler": not compiler_missing(device),
    }


def measure_training(spec: Mapping[str, Any]) -> dict[str, Any]:
    """
    Speed and peak memory of training: spec has config, rows, accumulation, compiled, device_type,
    dtype, seconds. A step takes accumulation x micro_ms + update_ms, both medians. On a GPU also
    the bytes of the allocator's pool and of the whole card, with contexts and other processes.
    {"error"} if memory runs out.
    """
    runtime = open_runtime(spec["device_type"], spec["dtype"])
    config = GPTConfig(**spec["config"])
    tokens_per_step = spec["accumulation"] * spec["rows"] * config.sequence_len
    try:
        model = GPT.build(config, runtime.device, runtime.dtype)
        step = _training_step(model, spec, runtime)
        began = time.perf_counter()
        steps = [step()]
        first_step, began = time.perf_counter() - began, time.perf_counter()
        while len(steps) < 2 * WARMUP_STEPS or (
            time.perf_counter() - began < spec["seconds"] and len(steps) < MOST_STEPS
        ):
            steps.append(step())
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        return {"error": "out of memory"}
    micro, update, _ = np.median(steps[WARMUP_STEPS:], axis=0).tolist()
    seconds = spec["accumulation"] * micro + update
    return {
        **_card_memory(runtime.device),
        "micro_ms": 1e3 * micro,
        "update_ms": 1e3 * update,
        "step_ms": 1e3 * seconds,
        "tok_per_sec": tokens_per_step / seconds,
        "first_step_s": first_step,
        "peak_memory_bytes": runtime.peak_memory(),
        "finite": bool(np.isfinite(np.array(steps)[:, 2]).all()),
        "flops_per_token": model.flops_per_token(),
        "parameters": model.counts()["total"],
    }


def _training_step(
    model: GPT, spec: Mapping[str, Any], runtime: Runtime
) -> Callable[[], tuple[float, float, float]]:
    """A step on random tokens; it returns (seconds of a micro-batch, of the update, loss)."""
    model.init_weights(runtime.seed)
    if spec["compiled"]:
        model.compile()
    optimizer = make_optimizer(model, TrainKnobs(), runtime)
    size = spec["rows"], model.config.sequence_len + 1
    tokens = torch.randint(0, model.config.vocab_size, size, device=runtime.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> tuple[float, float, float]:
        optimizer.zero_grad()
        micro, loss = 0.0, torch.zeros(())
        for _ in range(min(2, spec["accumulation"])):  # the second adds to existing gradients
            runtime.synchronize()
            began = time.perf_counter()
            loss = model.loss(x, y) / y.numel()
            loss.backward()
            runtime.synchronize()
            micro = time.perf_counter() - began
        began = time.perf_counter()
        optimizer.step()
        runtime.synchronize()
        return micro, time.perf_counter() - began, float(loss.detach())

    return step


def _card_memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"pool_bytes": torch.cuda.max_memory_reserved(device), "card_bytes": total - free}


def main() -> None:
    spec = json.loads(sys.argv[1])
    if sys.platform == "linux" and spec["device_type"] == "cpu":
        # If memory ends, an error in this process is better than the end of another one.
        import resource

        most = int(0.95 * hardware.available_memory())
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    print(json.dumps(measure_training(spec) if "config" in spec else measure_device(**spec)))


if __name__ == "__main__":
    entry(main)
