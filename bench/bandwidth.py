"""The bandwidth of memory, which bounds decoding; decode.py and gpu_first.py measure it."""

import re
from pathlib import Path

import torch

from nanochat.base.hardware import available_memory, best_seconds


def read_bandwidth(device: torch.device) -> float:
    """
    Bytes per second at which all cores read main memory, or an accelerator its own: measured by
    summing a buffer far larger than the caches.
    """
    size = 2**31
    if device.type == "cpu":
        caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        kibibytes = [re.match(r"(\d+)K", path.read_text()) for path in caches]
        last_level = max((int(m[1]) * 2**10 for m in kibibytes if m), default=2**25)
        size = min(max(2**28, 6 * last_level), available_memory() // 4)
    x = torch.ones(size // 4, device=device)
    with torch.no_grad():
        return x.numel() * 4 / best_seconds(x.sum, device, 0.12, 5)
