"""
The record of a pretraining run: a dict with its final figures and its learning curve, made from its
logbook. Comparisons are computed from records alone: runs.jsonl is enough to compute one again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nanochat.base import logbook
from nanochat.base.common import UserError
from nanochat.base.strangers import is_number, mismatch, missing, parse_json, read_bytes, shown
from nanochat.data.contexts import Contexts
from nanochat.model.checkpoint import upgraded
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.stored import checked_meta

_NUMBER = (float, None)
_FINISHED = {  # the forms of what the record of a finished run has; see strangers.mismatch
    "steps": int,
    "tokens": int,
    "final_bpb": _NUMBER,
    "step_ms": float,
    "seconds": float,
    "wall_seconds": _NUMBER,
    "peak_memory_bytes": _NUMBER,
    "parameters": int,
    "flops_per_token": float,
    "curve": [[float]],
}
_RECORD = {
    **_FINISHED,
    "condition": str,
    "seed": int,
    "pins": {str: (str, int)},
    "error": (str, None),
    "tokenizer": str,  # this and the next are absent in older records
    "data": [str],
}


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records in a runs.jsonl. UserError if the file or one of its lines is no record."""
    records = []
    try:
        for number, line in enumerate(read_bytes(file).splitlines(), 1):
            run = parse_json(line)
            fault = mismatch(run, _RECORD, "run") or missing(run, ("condition", "seed"))
            if not fault and not run.get("error"):
                fault = missing(run, _FINISHED)
                if not fault and None in (run["final_bpb"], run["wall_seconds"]):
                    fault = "final_bpb or wall_seconds is null"
                elif not fault and any(len(point) != 4 for point in run["curve"]):
                    fault = "its curve has points of other than 4 numbers"
            if fault:
                raise ValueError(f"line {number}: {fault}")
            records.append(run)
    except (OSError, ValueError) as e:
        raise UserError(
            f"cannot read {file} ({e}): correct it, or choose another --name for the comparison"
        ) from e
    return records


def record(directory: Path, **labels: Any) -> dict[str, Any]:
    """
    The record of the run in `directory`, finished or not, after the `labels` (condition, seed,
    ...). curve: [step, tokens, training seconds, bits per byte] of every evaluation. pins: the
    values that this run chose automatically, as flags for other runs. UserError if the logbook is
    not that of a pretraining run.
    """
    try:
        return {**labels, **_record(logbook.read(directory))}
    except (
        StopIteration,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
    ) as e:
        raise UserError(
            f"the logbook in {directory} is not that of a pretraining run ({type(e).__name__}: "
            f"{shown(str(e))}): name the folder of one, <base>/checkpoints/base/<tag>"
        ) from e


def _record(rows: Sequence[logbook.Row]) -> dict[str, Any]:
    """The record of a run from its rows. Raises many exceptions for rows of something else."""
    start = next(row["config"] for row in rows if row["kind"] == "start")
    meta = checked_meta(upgraded(start))
    seconds, step_seconds = training_clock(rows)
    evals = [
        row
        for row in rows
        if row["kind"] == "eval" and is_number(row.get("val_bpb")) and row["step"] in seconds
    ]
    summary = next((row for row in reversed(rows) if row["kind"] == "summary"), {})
    model = GPT.build(GPTConfig.from_dict(meta["config"]), "meta")
    sequence_len = model.config.sequence_len
    contexts = Contexts.parse(meta["knobs"].get("context_stages", ()), sequence_len)
    last_step, horizon = max(seconds), meta["horizon"]
    return {
        "steps": last_step,
        "tokens": max((row["tokens"] for row in rows if row["kind"] == "train"), default=0),
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


def training_clock(rows: Sequence[logbook.Row]) -> tuple[dict[int, float], float]:
    """
    ({step: training seconds up to its end}, seconds of the median step) from the rows of a logbook.
    Only optimizer steps count. The first step of a process includes compiling and warming up, and
    counts as a median step.
    """
    spans: dict[int, float] = {}
    first_steps = set()
    tokens = tokens_before = 0
    elapsed, is_first = 0.0, False
    for row in rows:
        if row["kind"] == "start":
            tokens_before, elapsed, is_first = tokens, 0.0, True
        elif row["kind"] == "train":
            tokens = row["tokens"]
            if not is_number(row["tok_per_sec"]) or row["tok_per_sec"] <= 0:
                continue
            # tok_per_sec is the mean since the process began, from which the time follows
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
    factor = step_ms / run["step_ms"] if run["step_ms"] else 1.0
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
