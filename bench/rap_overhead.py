"""
What an attention prior costs: step time and peak memory without a prior and with each form of it,
at several lengths.

    python -m bench.rap_overhead      width 512, depth 4, vocabulary 8,192, T = 512, 1024, 2048
    python -m bench.rap_overhead --lengths 1024 --rounds=5 --head_dim=64

The prior is random, with the groups and ranks of real ones: lag and four spans, match and pair (32
codes each), key. Each measurement runs in its own process, which gives it its own peak memory, and
the conditions take turns. The last line is JSON.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from nanochat.base import knobs
from nanochat.base.common import UserError, entry, print0
from nanochat.base.knobs import knob
from nanochat.base.runtime import compiler_missing, open_runtime
from nanochat.model import prior_artifact
from nanochat.model.config import AttentionPriorKnobs, GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.knobs import TrainKnobs
from nanochat.train.run import make_optimizer
from nanochat.train.scaling import Shape

ABOUT = ("dtype", "about")


@dataclass(kw_only=True)
class OverheadKnobs(TrainKnobs, Shape):
    """Measurement"""

    model_dim: int = knob(512, "model width")
    lengths: tuple[int, ...] = knob((512, 1024, 2048), "context lengths", low=1)
    conditions: tuple[str, ...] = knob(
        (), "of none dense factored flex; default: all that run here"
    )
    vocab_size: int = knob(8192, "tokens of the vocabulary", low=1)
    batch_tokens: int = knob(8192, "tokens of a step", low=1)
    steps: int = knob(8, "steps timed in a process, after two that are not", low=1)
    rounds: int = knob(3, "processes of every condition, in turns; the median counts", low=1)
    codes: int = knob(32, "codes of match, and of pair", low=1)
    band: int = knob(32, "distance from which lag is 0, as generated; 0 = the context", low=0)
    one: str = knob("", "measure this condition alone, in this process, at the first length")


def artifact(k: OverheadKnobs, T: int, path: Path) -> str:
    """A random prior with the groups of a generated one."""
    g = torch.Generator().manual_seed(k.seed)
    codes, query, now = (
        (torch.randint(0, 2, (3, k.vocab_size, k.codes), generator=g) * 2 - 1)
        .to(torch.int8)
        .unbind()
    )
    match = torch.stack([torch.zeros(k.codes, k.codes), torch.eye(k.codes) / k.codes])
    lag, key = (1 + torch.arange(T)) ** -0.5, torch.rand(k.vocab_size, generator=g)
    lag[k.band or T :] = 0
    spans = torch.stack([torch.arange(T) // low == 1 for low in (1, 2, 4, 8)]).float()
    pair = {
        "pair_query": query.clone(),
        "pair_now": now.clone(),
        "pair": torch.full((k.codes,), 1 / k.codes),
    }
    terms = {"lag": lag, "spans": spans, "key": key, "codes": codes.clone(), "match": match, **pair}
    save_file(terms, path, {"format": prior_artifact.FORMAT, "tokenizer": "bench"})
    return str(path)


def measure(k: OverheadKnobs, condition: str, T: int) -> dict[str, Any]:
    """Median step time and peak memory of one condition in this process."""
    rt = open_runtime(k.device_type, k.dtype, k.seed)
    shape: dict[str, Any] = {"vocab_size": k.vocab_size, "sequence_len": T, **k.dimensions()}
    config, tables = GPTConfig(**shape), {}
    if condition != "none":
        with tempfile.TemporaryDirectory() as folder:
            asked: Any = {
                "rap": artifact(k, T, Path(folder) / "rap_prior.safetensors"),
                "attention": condition,
            }
            config.rap, tables = prior_artifact.prepare(
                AttentionPriorKnobs(**asked), config, "bench", rt.device
            )
    model = GPT.build(config, rt.device, rt.dtype)
    model.init_weights(k.seed)
    if model.prior is not None:
        model.prior.load_state_dict(tables)
    if k.compile == "on":
        model.compile()
    optimizer = make_optimizer(model, k, rt)
    tokens = torch.randint(0, k.vocab_size, (max(1, k.batch_tokens // T), T + 1), device=rt.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    times = []
    for _ in range(k.steps + 2):
        began = time.perf_counter()
        optimizer.zero_grad()
        (model.loss(x, y) / y.numel()).backward()
        optimizer.step()
        rt.synchronize()
        times.append(time.perf_counter() - began)
    times = sorted(times[2:])
    about = config.rap["about"] if config.rap else ""
    found = {"step_ms": times[len(times) // 2] * 1e3, "best_ms": times[0] * 1e3}
    return {**found, "peak_memory_bytes": rt.peak_memory(), "dtype": rt.dtype_name, "about": about}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    k, _ = knobs.parse(OverheadKnobs, argv, command="bench.rap_overhead")
    if k.one:
        found = measure(k, k.one, k.lengths[0])
        print(json.dumps(found))
        return found
    device = open_runtime(k.device_type, k.dtype, k.seed).device
    conditions = list(k.conditions or ("none", "dense", "factored", "flex"))
    if "flex" in conditions and (device.type != "cuda" or compiler_missing(device)):
        print0(f"flex: left out, {compiler_missing(device) or 'it cannot train on ' + device.type}")
        conditions.remove("flex")
    if "factored" in conditions and device.type != "cpu":
        print0(f"factored: left out, it cannot add the spans of a prior on {device.type}")
        conditions.remove("factored")
    given = list(sys.argv[1:] if argv is None else argv)
    over_base = f"over {conditions[0]}"
    title = f"depth {k.depth}, width {k.model_dim}, heads of {k.head_dim}"
    table = Table(
        "T",
        "prior",
        "step ms",
        over_base,
        "best ms",
        over_base,
        "peak memory MB",
        over_base,
        title=title,
    )
    rows: list[dict[str, Any]] = []
    for T in k.lengths:
        seen: dict[str, list[dict[str, Any]]] = {c: [] for c in conditions}
        for turn in range(k.rounds):
            for c in conditions if turn % 2 == 0 else reversed(conditions):
                command = [
                    sys.executable,
                    "-m",
                    "bench.rap_overhead",
                    *given,
                    f"--lengths={T}",
                    f"--one={c}",
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(
                        f"measuring {c} at T = {T} failed: {done.stderr.strip().splitlines()[-1:]}"
                    )
                seen[c].append(json.loads(done.stdout.splitlines()[-1]))
                print0(
                    f"T {T} {c}: {seen[c][-1]['step_ms']:.0f} ms, "
                    f"{seen[c][-1]['peak_memory_bytes'] / 1e6:.0f} MB"
                )
        base: dict[str, Any] = {}
        for c in conditions:
            r: dict[str, Any] = {
                n: sorted(x[n] for x in seen[c])[k.rounds // 2]
                for n in ("step_ms", "peak_memory_bytes")
            }
            r["best_ms"] = min(x["best_ms"] for x in seen[c])
            base = base or dict(r)
            over = {f"{n}_over_{conditions[0]}": round(r[n] / base[n] - 1, 4) for n in base}
            rows.append(
                {
                    "T": T,
                    "condition": c,
                    **{n: round(v, 2) for n, v in r.items()},
                    **over,
                    **{n: seen[c][0][n] for n in ABOUT},
                }
            )
            shown = [
                f"{r['step_ms']:,.1f}",
                f"{r['best_ms']:,.1f}",
                f"{r['peak_memory_bytes'] / 1e6:,.0f}",
            ]
            shares = [
                f"{over[f'{n}_over_{conditions[0]}']:+.1%}"
                for n in ("step_ms", "best_ms", "peak_memory_bytes")
            ]
            table.add_row(str(T), c, *(x for pair in zip(shown, shares, strict=True) for x in pair))
    Console(width=120).print(table)
    print(
        json.dumps(
            {"depth": k.depth, "model_dim": k.model_dim, "head_dim": k.head_dim, "rows": rows}
        )
    )
    return {"rows": rows}


if __name__ == "__main__":
    entry(main)
