"""
One measurement on this machine: the speed and peak memory of training steps, or the peak of the
device. `machine.in_process` runs this module in a process of its own: it takes a specification in
JSON as its argument, and prints the result as JSON.
"""

import json
import sys
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from nanochat.base import hardware
from nanochat.base.common import entry
from nanochat.base.runtime import compiler_missing, open_runtime, out_of_memory
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
    memory = hardware.available_memory()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return {
        "name": hardware.device_name(device),
        "device_type": device.type,
        "dtype": runtime.dtype_name,
        "memory_bytes": memory,
        "peak_flops": hardware.measured_peak(device, runtime.dtype),
        "compiler": not compiler_missing(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
    }


def measure_training(spec: Mapping[str, Any]) -> dict[str, Any]:
    """
    Speed and peak memory of training steps on random tokens: spec has config, rows, accumulation
    (of which up to four are made), compiled, device_type, dtype, seconds. The time of a step is the
    median. On a GPU also the bytes of the whole card, with contexts and other processes. {"error"}
    if memory runs out.
    """
    runtime = open_runtime(spec["device_type"], spec["dtype"])
    config, accumulation = GPTConfig(**spec["config"]), min(4, spec["accumulation"])
    size = accumulation, 2, spec["rows"], config.sequence_len
    times = []
    try:
        model = GPT.build(config, runtime.device, runtime.dtype)
        model.init_weights(runtime.seed)
        if spec["compiled"]:
            model.compile()
        optimizer = make_optimizer(model, TrainKnobs(), runtime)
        tokens = torch.randint(0, config.vocab_size, size, device=runtime.device)
        for _ in range(MOST_STEPS):
            runtime.synchronize()
            began = time.perf_counter()
            optimizer.zero_grad()
            for x, y in tokens:
                (model.loss(x, y) / y.numel()).backward()
            optimizer.step()
            runtime.synchronize()
            times.append(time.perf_counter() - began)
            if len(times) >= 2 * WARMUP_STEPS and sum(times[WARMUP_STEPS:]) >= spec["seconds"]:
                break
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        return {"error": "out of memory"}
    seconds = median(times[WARMUP_STEPS:])
    measured = {
        "step_ms": 1e3 * seconds,
        "tok_per_sec": accumulation * spec["rows"] * config.sequence_len / seconds,
        "first_step_s": times[0],
        "peak_memory_bytes": runtime.peak_memory(),
        "flops_per_token": model.flops_per_token(),
    }
    if runtime.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(runtime.device)
        measured["card_bytes"] = total - free
    return measured


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec["device_type"] == "cpu":
        hardware.limit_memory()
    print(json.dumps(measure_training(spec) if "config" in spec else measure_device(**spec)))


if __name__ == "__main__":
    entry(main)
