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
    the bytes of the whole card, with contexts and other processes. {"error"} if memory runs out.
    """
    runtime = open_runtime(spec["device_type"], spec["dtype"])
    config = GPTConfig(**spec["config"])
    try:
        model = GPT.build(config, runtime.device, runtime.dtype)
        model.init_weights(runtime.seed)
        if spec["compiled"]:
            model.compile()
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
    micro, update = np.median(steps[WARMUP_STEPS:], axis=0).tolist()
    seconds = spec["accumulation"] * micro + update
    tokens_per_step = spec["accumulation"] * spec["rows"] * config.sequence_len
    measured = {
        "micro_ms": 1e3 * micro,
        "update_ms": 1e3 * update,
        "step_ms": 1e3 * seconds,
        "tok_per_sec": tokens_per_step / seconds,
        "first_step_s": first_step,
        "peak_memory_bytes": runtime.peak_memory(),
        "flops_per_token": model.flops_per_token(),
        "parameters": model.counts()["total"],
    }
    if runtime.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(runtime.device)
        measured["card_bytes"] = total - free
    return measured


def _training_step(
    model: GPT, spec: Mapping[str, Any], runtime: Runtime
) -> Callable[[], tuple[float, float]]:
    """A step on random tokens; it returns (seconds of a micro-batch, of the update)."""
    optimizer = make_optimizer(model, TrainKnobs(), runtime)
    size = spec["rows"], model.config.sequence_len + 1
    tokens = torch.randint(0, model.config.vocab_size, size, device=runtime.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        times = [0.0]
        for _ in range(min(2, spec["accumulation"])):  # the second adds to existing gradients
            runtime.synchronize()
            times.append(time.perf_counter())
            (model.loss(x, y) / y.numel()).backward()
            runtime.synchronize()
        times.append(time.perf_counter())
        optimizer.step()
        runtime.synchronize()
        return times[-1] - times[-2], time.perf_counter() - times[-1]

    return step


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
