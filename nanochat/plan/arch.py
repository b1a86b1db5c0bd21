"""
Count a model's parameters, estimate its training time, and find the depth, width and heads for a
number of parameters.

    nanochat plan arch --params 38M --vocab 24576 --split 1:1:1
    nanochat plan arch --depth 20 --gpu "H100 SXM" --gpus 8

Every figure is counted on the real model, built without memory. A number of parameters that no
model comes within a tenth of is refused.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat.base.common import UserError, columns, duration, human, notice, print0
from nanochat.base.knobs import knob
from nanochat.model.config import LARGEST, GPTConfig
from nanochat.plan import memory
from nanochat.plan.machine import GIB, of_card
from nanochat.plan.shapes import (
    FEWEST_HEADS,
    SizeKnobs,
    counts,
    flops_per_token,
    model_of,
)
from nanochat.plan.speed import tokens_per_second
from nanochat.train.scaling import batch_for

TOLERANCE = 0.1  # how far from the wanted number of parameters a shape may be
PARTS = ("embedding", "transformer", "head", "total")


@dataclass(kw_only=True)
class ArchKnobs(SizeKnobs):
    """Plan"""

    params: str = knob("", "find a shape with this many parameters, for example 38M or 1.2G")
    split: str = knob(
        "",
        "how to split them into embedding:layers:head, for example 1:1:1 (1:1 if tied); "
        "default: the width follows aspect_ratio",
    )
    tokens_per_param: float = knob(20.0, "training tokens per parameter", low=0.01)
    gpu: str = knob("", "estimate the time on this GPU, for example rtx4090")
    gpus: int = knob(1, "number of GPUs", low=1)
    device_batch_size: int = knob(
        32, "rows of a micro-batch on one GPU, to predict its memory", low=1
    )
    json: bool = knob(False, "print only JSON")


# finding a shape


def nearest(knobs: SizeKnobs, params: float, shares: Sequence[float] = ()) -> list[GPTConfig]:
    """
    Configurations within a tenth of `params` parameters, best first. A depth, width or head size
    that the flags give binds. The cost is |ln(total / params)| plus the share of the parameters
    that lie in the wrong part (`shares` are of embedding, layers and head), or without `shares` a
    tenth of the octaves between width / depth and aspect_ratio. UserError if there is none.
    """

    def cost(config: GPTConfig) -> float:
        n = counts(config)
        if shares:
            pairs = zip(PARTS, shares, strict=False)
            misplaced = sum(abs(n[part] / n["total"] - share) for part, share in pairs) / 2
        else:
            aspect = config.n_embd / config.n_layer
            misplaced = abs(math.log2(aspect / knobs.aspect_ratio)) / 10
        return abs(math.log(n["total"] / params)) + misplaced

    near = [
        config
        for config in _around(knobs, params)
        if abs(counts(config)["total"] / params - 1) <= TOLERANCE
    ]
    if not near:
        raise UserError(
            f"no model with these flags has about {human(params)} parameters: {_smallest(knobs)}"
        )
    return sorted(near, key=cost)


def _around(knobs: SizeKnobs, params: float) -> Iterator[GPTConfig]:
    """The depths around `params` for every width whose single layer is not too large."""
    unit = knobs.head_dim or 64
    widths = [knobs.model_dim] if knobs.model_dim else range(unit, 1 << 20, unit)
    for width in widths:
        one_layer = _of_width(knobs, width, 1)
        n = counts(one_layer)
        if n["total"] > params * (1 + TOLERANCE):
            return
        exact = (params - n["total"]) / n["transformer"] + 1
        depths = {max(1, math.floor(exact)), max(1, math.ceil(exact))}
        for depth in [knobs.depth] if knobs.depth else depths:
            if depth <= LARGEST["n_layer"]:
                yield replace(one_layer, n_layer=depth)


def _of_width(knobs: SizeKnobs, width: int, depth: int) -> GPTConfig:
    wide = width % 128 == 0 and width // 128 >= FEWEST_HEADS
    head_dim = knobs.head_dim or (128 if wide else 64)
    return knobs.config(depth=depth, model_dim=width, head_dim=head_dim)


def _smallest(knobs: SizeKnobs) -> str:
    width = knobs.model_dim or knobs.head_dim or 64
    n = counts(_of_width(knobs, width, knobs.depth or 1))
    tables = human(n["embedding"] + n["head"])
    tie = "" if knobs.tie_embeddings else ", or --tie_embeddings"
    return (
        f"the smallest has {human(n['total'])}, {tables} of them in tables for "
        f"{knobs.vocab:,} tokens; try other --params, a smaller --vocab{tie}"
    )


def parse_number(text: str) -> float:
    """'38M' -> 38e6; decimal units k, M, G (or B), T."""
    digits = text.strip().replace(",", "").replace("_", "")
    match = re.fullmatch(r"(\d*\.?\d+(?:e\d+)?)\s*([kmgbt]?)", digits, re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"--params takes a number such as 38M or 1.2G, not {text!r}")
    units = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
    return float(match[1]) * units[match[2].lower()]


def parse_shares(text: str, tied: bool) -> tuple[float, ...]:
    """'1:1:1' -> (1/3, 1/3, 1/3), of embedding, layers and head; a tied model has no head."""
    parts = text.split(":")
    valid = all(re.fullmatch(r"\d*\.?\d+", p) and float(p) > 0 for p in parts)
    if len(parts) != (2 if tied else 3) or not valid:
        tied_form = "embedding:layers of a tied model, for example 1:1"
        form = tied_form if tied else "embedding:layers:head, for example 1:1:1"
        raise UserError(f"--split takes {form}, not {text!r}")
    values = [float(p) for p in parts]
    return tuple(value / sum(values) for value in values)


# figures and prices


def kv_bytes(config: GPTConfig) -> int:
    """Bytes of keys and values per token in the context, in bf16."""
    cache = model_of(config).new_cache(1, 1)
    return (cache.k.nbytes + cache.v.nbytes) // cache.k.size(3)


def figures(config: GPTConfig, tokens_per_param: float = 20.0) -> dict[str, Any]:
    """What a model is and what its training takes: parameters, FLOPs, tokens, bytes of cache."""
    n, per_token = counts(config), flops_per_token(config)
    tokens = round(tokens_per_param * n["total"])
    return {
        **n,
        "flops_per_token": per_token,
        "tokens": tokens,
        "flops": per_token * tokens,
        "kv_bytes_per_token": kv_bytes(config),
    }


def price(knobs: ArchKnobs, config: GPTConfig, tokens: int) -> dict[str, Any]:
    """Hours and memory on the named cards; a device batch that does not fit is halved."""
    card = replace(of_card(knobs.gpu), gpus=knobs.gpus)
    how = {"dtype": card.dtype, "device_type": card.device_type, "compiled": card.compiler}
    rows, available, T = knobs.device_batch_size, f"{card.memory_bytes / GIB:g} GB", 0
    while True:
        T = config.sequence_len
        needed = memory.predict(config, rows, T, world_size=knobs.gpus, **how)["total"]
        if needed <= card.memory_bytes:
            break
        size = f"{rows} rows of {T} need {needed / GIB:.1f} of {available}"
        if rows == 1:
            raise UserError(
                f"this model does not fit the {card.name}: {size}; choose a smaller --depth, "
                "--vocab or --sequence_len"
            )
        notice(f"{size}: trying {rows // 2}")
        rows //= 2
    batch = max(batch_for(tokens), knobs.gpus * rows * T)
    rates = tokens_per_second(config, rows, T, batch, card)
    hours, most, least = (tokens / rate / 3600 for rate in rates)
    print0(
        f"  on {knobs.gpus} x {card.name}: {duration(hours * 3600)} of pretraining "
        f"({duration(least * 3600)} to {duration(most * 3600)}) at {rates.tok_per_sec:,.0f} tok/s\n"
        f"  --device_batch_size={rows}, context {T}: {needed / GIB:.1f} of {available} per card"
    )
    priced = {"gpu": card.name, "gpus": knobs.gpus, "hours": hours, "hours_interval": (least, most)}
    return {**priced, "device_batch_size": rows, "memory_bytes": needed}


def _counted(n: dict[str, int]) -> Iterator[str]:
    return (f"{n[part]:,}" for part in PARTS)


# the command


def run(knobs: ArchKnobs) -> dict[str, Any]:
    """Print the table that the flags ask for, and return its figures."""
    from nanochat.train.run import table_of_counts

    if knobs.split and not knobs.params:
        raise UserError(
            f"--split={knobs.split} also needs the number of parameters: add it, as in --params 38M"
        )
    if knobs.gpus > 1 and not knobs.gpu:
        raise UserError(f"--gpus={knobs.gpus} also needs the name of the GPU: add --gpu NAME")
    config, *others = _chosen(knobs)
    report = {"config": asdict(config), **figures(config, knobs.tokens_per_param)}
    report["alternatives"] = [
        {name: getattr(other, name) for name in ("n_layer", "n_embd", "head_dim")} | counts(other)
        for other in others
    ]
    print0(table_of_counts(model_of(config)))
    print0(
        f"  {human(report['tokens'])} tokens at {knobs.tokens_per_param:g} per parameter: "
        f"{report['flops']:.3g} FLOPs; {report['kv_bytes_per_token']:,} bytes of key-value cache "
        f"per token\n  {_flags(config)}"
    )
    if others:
        rows = [(_flags(other), *_counted(counts(other))) for other in others]
        print0("\n" + columns(("nearby", *PARTS), rows))
    if knobs.gpu:
        report["run"] = price(knobs, config, report["tokens"])
    return report


def _chosen(knobs: ArchKnobs) -> list[GPTConfig]:
    """The model that the flags ask for, and up to five others of its size."""
    if knobs.params:
        shares = parse_shares(knobs.split, knobs.tie_embeddings) if knobs.split else ()
        return nearest(knobs, parse_number(knobs.params), shares)[:6]
    config = knobs.config()
    like = replace(knobs, depth=0, model_dim=0, aspect_ratio=config.n_embd / config.n_layer)
    near = nearest(like, counts(config)["total"])
    others = [c for c in near if (c.n_layer, c.n_embd) != (config.n_layer, config.n_embd)]
    return [config, *others[:5]]


def _flags(config: GPTConfig) -> str:
    return f"--depth={config.n_layer} --model_dim={config.n_embd} --head_dim={config.head_dim}"
