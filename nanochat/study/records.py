"""
The record of a pretraining run: one dict with its final figures and its learning curve, read from
its logbook alone. Comparisons are computed from records, so runs.jsonl is enough to repeat one.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nanochat.base import logbook
from nanochat.data.contexts import Contexts
from nanochat.model.checkpoint import upgraded
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT


def record(directory: Path, **labels: Any) -> dict[str, Any]:
    """
    The record of the run in `directory`, finished or not; `labels` (condition, seed, ...) come
    first. `curve` holds [step, tokens, training seconds, bits per byte] of every evaluation;
    `pins` holds the flags that make other runs choose what this one chose automatically.
    """
    rows = logbook.read(directory)
    meta = upgraded(next(row["config"] for row in rows if row.get("kind") == "start"))
    seconds, step_seconds = training_clock(rows)
    evals = [
        row
        for row in rows
        if row.get("kind") == "eval" and math.isfinite(row.get("val_bpb", math.nan))
    ]
    summary = next((row for row in reversed(rows) if row.get("kind") == "summary"), {})
    model = GPT.build(GPTConfig.from_dict(meta["config"]), "meta")
    sequence_len = model.config.sequence_len
    contexts = Contexts.parse(meta["knobs"].get("context_stages", ()), sequence_len)
    last_step, horizon = max(seconds), meta["horizon"]
    return {
        **labels,
        "steps": last_step,
        "tokens": max((row["tokens"] for row in rows if row.get("kind") == "train"), default=0),
        "final_bpb": evals[-1]["val_bpb"] if evals and evals[-1]["step"] == last_step else None,
        "step_ms": round(step_seconds * 1e3, 3),
        "seconds": round(max(seconds.values()), 3),
        "wall_seconds": summary.get("seconds"),
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "parameters": model.counts()["total"],
        "flops_per_token": contexts.mean(model.flops_per_token),
        "curve": [
            [row["step"], row["tokens"], round(seconds[row["step"]], 3), row["val_bpb"]]
            for row in evals
        ],
        "pins": {
            "dtype": meta["dtype"],
            "compile": "on" if horizon["compiled"] else "off",
            "total_batch_size": horizon["rows"] * sequence_len,
        },
    }


def training_clock(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[int, float], float]:
    """
    (training seconds up to the end of each step, seconds of the median step) from the rows of a
    logbook. Only optimizer steps count. The first step of a process, which compiles and warms up,
    counts as a median one.
    """
    spans: dict[int, float] = {}
    first_steps = set()
    tokens = tokens_before = 0
    elapsed, is_first = 0.0, False
    for row in rows:
        if row.get("kind") == "start":
            tokens_before, elapsed, is_first = tokens, 0.0, True
        elif row.get("kind") == "train":
            tokens = row["tokens"]
            # tok_per_sec is the mean since the process began, which gives back the time since then
            now = (tokens - tokens_before) / row["tok_per_sec"]
            spans[row["step"]], elapsed = max(0.0, now - elapsed), now
            if is_first:
                first_steps.add(row["step"])
            is_first = False
    regular = [span for step, span in spans.items() if step not in first_steps]
    usual = median(regular or list(spans.values()) or [0.0])
    clock, total = {0: 0.0}, 0.0
    for step, span in spans.items():
        total += usual if step in first_steps else span
        clock[step] = total
    return clock, usual


def at_speed(run: Mapping[str, Any], step_ms: float) -> dict[str, Any]:
    """The record of a run as if each of its steps had taken `step_ms` milliseconds."""
    factor = step_ms / run["step_ms"]
    return {
        **run,
        "retimed": True,
        "step_ms": step_ms,
        "seconds": round(run["seconds"] * factor, 3),
        "curve": [
            [step, tokens, round(seconds * factor, 3), bpb]
            for step, tokens, seconds, bpb in run["curve"]
        ],
    }
