"""
Parameters before training: the table of a model, what each knob saves, and the depth, width and heads for a number of parameters.

    python -m scripts.plan arch --params 38M --vocab 24576 --split 1:1:1
    python -m scripts.plan arch --depth 20 --gpu "H100 SXM" --gpus 8

Every figure is counted on the real model, built without memory. It refuses a number of parameters that no model comes within a tenth of.
"""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from nanochat.base import hardware
from nanochat.base.commands import near
from nanochat.base.common import UserError, columns, duration, human, print0
from nanochat.base.files import atomic_write
from nanochat.base.hardware import GPU
from nanochat.base.knobs import knob
from nanochat.model.config import ArchitectureKnobs, GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.run import table_of_counts
from nanochat.train.scaling import Shape

MISS = 0.1  # how far from the wanted number of parameters a shape may be
FEWEST_HEADS = 6  # heads of 128 are taken while there are so many, heads of 64 below
REFERENCE = 4.33e19 / (
    2.76 * 3600 * 8 * 989.4e12
)  # share of the peak in the GPT-2-grade reference run: 4.33e19 FLOPs, 2.76 h, 8 H100


@dataclass(kw_only=True)
class SizeKnobs(ArchitectureKnobs, Shape):
    """Model"""

    vocab: int = knob(65_536, "tokens of the vocabulary", low=1)
    depth: int = knob(0, "layers; 0 = 4, or with --params what fits best", low=0)
    head_dim: int = knob(
        0,
        f"width of a head; 0 = 128, with --params 64 where that leaves fewer than {FEWEST_HEADS} heads",
        low=0,
    )

    def shape(self) -> Shape:
        given = {f.name: getattr(self, f.name) for f in fields(Shape)}
        return Shape(**{**given, "depth": self.depth or 4, "head_dim": self.head_dim or 128})

    def arch(self) -> ArchitectureKnobs:
        return ArchitectureKnobs(
            **{f.name: getattr(self, f.name) for f in fields(ArchitectureKnobs)}
        )


@dataclass(kw_only=True)
class Knobs(SizeKnobs):
    """Plan"""

    params: str = knob("", "find a shape with so many parameters, for example 38M or 1.2G")
    split: str = knob(
        "",
        "of these, to embedding:layers:head, for example 1:1:1 (1:1 when tied); else the width follows aspect_ratio",
    )
    tokens_per_param: float = knob(20.0, "tokens of training a parameter", low=0.01)
    gpu: str = knob("", "price the run on this card, for example rtx4090")
    gpus: int = knob(1, "cards of it", low=1)
    utilisation: float = knob(
        round(REFERENCE, 2), "share of the cards' peak that training reaches", low=0.01, high=1
    )
    device_batch_size: int = knob(32, "rows of a micro-batch on one card, for its memory", low=1)
    specifications: str = knob(
        "",
        "write the table of the standard models to this file, docs/model_specifications.md, and stop",
    )
    json: bool = knob(False, "print JSON alone")


def config_for(shape: Shape, arch: ArchitectureKnobs, vocab_size: int) -> GPTConfig:
    """The configuration that base_train would build from these flags; UserError when they make no model."""
    return GPTConfig(
        vocab_size=vocab_size,
        **shape.dimensions(),
        **{f.name: getattr(arch, f.name) for f in fields(ArchitectureKnobs)},
    )


def model_of(config: GPTConfig) -> GPT:
    """The real model, on the meta device: it takes no memory."""
    return GPT.build(config, "meta", torch.bfloat16)


def counts(config: GPTConfig) -> dict[str, int]:
    """Parameters by part, from the model's roster: embedding, transformer, head, total, matmul."""
    return model_of(config).counts()


def card(name: str) -> GPU:
    """The row of a card; UserError names the near ones."""
    if (gpu := hardware.lookup(name)) is None:
        known = [g.name for g in hardware.gpus()]
        raise UserError(
            f"no card is called {name!r}{near(name.upper(), known)}; known are {', '.join(known)}"
        )
    return gpu


def number(text: str) -> float:
    """'38M' -> 38e6; decimal units k, M, G (or B), T."""
    m = re.fullmatch(
        r"(\d*\.?\d+(?:e\d+)?)\s*([kmgbt]?)",
        text.strip().replace(",", "").replace("_", ""),
        re.IGNORECASE,
    )
    if not m or not float(m[1]):
        raise UserError(f"--params takes a number such as 38M or 1.2G, not {text!r}")
    return float(m[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}[m[2].lower()]


def shares_of(text: str, tied: bool) -> tuple[float, ...]:
    """'1:1:1' -> (1/3, 1/3, 1/3): of embedding, layers and head; a tied model has no head of its own."""
    parts = text.split(":")
    if len(parts) != 3 - tied or not all(
        re.fullmatch(r"\d*\.?\d+", p) and float(p) > 0 for p in parts
    ):
        what = (
            "embedding:layers of a tied model, for example 1:1"
            if tied
            else "embedding:layers:head, for example 1:1:1"
        )
        raise UserError(f"--split takes {what}, not {text!r}")
    return tuple(float(p) / sum(map(float, parts)) for p in parts)


@dataclass(frozen=True)
class Found:
    """A shape that the search met: its layers, its width, its counts, and how far it is from what was asked (0 = exactly that)."""

    shape: Shape
    config: GPTConfig
    counts: dict[str, int]
    cost: float


def search(
    params: float,
    shares: tuple[float, ...] | None,
    shape: Shape,
    arch: ArchitectureKnobs,
    vocab: int,
    free: bool = True,
) -> list[Found]:
    """
    Shapes with about `params` parameters, best first. `shape.depth` and `shape.model_dim` bind where they are not 0, and `free` lets heads
    be 64 wide as well. The cost is |ln(total / params)| plus the share of the parameters that lie in the wrong part, or without `shares` a
    tenth of the octaves between width / depth and aspect_ratio. UserError when none comes within a tenth.
    """
    found = [
        f
        for f in _candidates(params, shares, shape, arch, vocab, free)
        if abs(f.counts["total"] / params - 1) <= MISS
    ]
    if not found:
        raise UserError(
            f"no model of these flags has about {human(params)} parameters: {_smallest(shape, arch, vocab, free)}"
        )
    return sorted(found, key=lambda f: f.cost)


def _heads(width: int, head_dim: int, free: bool) -> int:
    return 64 if free and (width % head_dim or width // head_dim < FEWEST_HEADS) else head_dim


def _candidates(
    params: float,
    shares: tuple[float, ...] | None,
    shape: Shape,
    arch: ArchitectureKnobs,
    vocab: int,
    free: bool,
) -> Iterator[Found]:
    step = 64 if free else shape.head_dim
    for width in [shape.model_dim] if shape.model_dim else range(step, 1 << 20, step):
        one = replace(shape, depth=1, model_dim=width, head_dim=_heads(width, shape.head_dim, free))
        try:
            n = counts(config_for(one, arch, vocab))
        except UserError:  # no whole number of key-value heads, say: the next width may have one
            if shape.model_dim:
                raise
            n = None
        if n is None:
            continue
        if n["total"] > params * (1 + MISS):
            return
        exact = (params - n["total"]) / n["transformer"] + 1
        for depth in (
            [shape.depth] if shape.depth else {max(1, math.floor(exact)), max(1, math.ceil(exact))}
        ):
            here = replace(one, depth=depth)
            layers = (
                n["transformer"] * depth
            )  # as many as of one layer: a layer's parameters do not depend on its place
            total = n["total"] - n["transformer"] + layers
            parts = (n["embedding"], layers, n["head"])
            if shares:
                off = (
                    sum(
                        abs(part / total - share)
                        for part, share in zip(parts, shares, strict=False)
                    )
                    / 2
                )
            else:
                off = abs(math.log2(width / depth / shape.aspect_ratio)) / 10
            sizes = {"embedding": parts[0], "transformer": layers, "head": parts[2], "total": total}
            yield Found(
                here, config_for(here, arch, vocab), sizes, abs(math.log(total / params)) + off
            )


def _smallest(shape: Shape, arch: ArchitectureKnobs, vocab: int, free: bool) -> str:
    width = shape.model_dim or (64 if free else shape.head_dim)
    least = replace(
        shape, depth=shape.depth or 1, model_dim=width, head_dim=_heads(width, shape.head_dim, free)
    )
    n = counts(config_for(least, arch, vocab))
    tables = n["embedding"] + n["head"]
    tie = "" if arch.tie_embeddings else ", or --tie_embeddings"
    said = f"the smallest has {human(n['total'])}, {human(tables)} of them in tables for {vocab:,} tokens"
    return f"{said}; try other --params, a smaller --vocab{tie}"


def savings(config: GPTConfig) -> list[dict[str, Any]]:
    """What each knob saves against this model: parameters, share of the training FLOPs, share of the key-value cache."""
    quarter = max(d for d in range(1, max(1, config.n_head // 4) + 1) if config.n_head % d == 0)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--tie_embeddings", {"tie_embeddings": True}),
        ("--mlp_ratio=3", {"mlp_ratio": 3.0}),
        ("--mlp_ratio=2.5", {"mlp_ratio": 2.5}),
        (f"--kv_ratio={quarter / config.n_head:.4g}", {"n_kv_head": quarter}),
        ("--window_pattern=SSSL", {"window_pattern": "SSSL"}),
    ]
    before, out = model_of(config), []
    for flag, change in changes:
        after = model_of(replace(config, **change))
        row = {
            "flag": flag,
            "parameters": before.counts()["total"] - after.counts()["total"],
            "flops": 1 - after.flops_per_token() / before.flops_per_token(),
            "kv_cache": 1 - kv_bytes(after) / kv_bytes(before),
        }
        if row["parameters"] > 0 or row["flops"] > 1e-9:  # what is set already saves nothing more
            out.append(row)
    return out


def kv_bytes(model: GPT) -> int:
    """Bytes of keys and values that a token in the context takes, in bf16."""
    cache = model.new_cache(1, 1)
    return (cache.k.nbytes + cache.v.nbytes) // cache.k.size(3)


def hours(flops: float, peak: float, utilisation: float) -> float:
    """Hours of training: FLOPs / (FLOP/s of all cards' peak x the share of it that is reached)."""
    return flops / (peak * utilisation) / 3600


def figures(config: GPTConfig, tokens_per_param: float = 20.0) -> dict[str, Any]:
    """What a model is and what its training takes: counts, FLOPs a token, tokens, FLOPs, bytes of cache a token."""
    model = model_of(config)
    n, per_token = model.counts(), model.flops_per_token()
    tokens = round(tokens_per_param * n["total"])
    return {
        **n,
        "flops_per_token": per_token,
        "tokens": tokens,
        "flops": per_token * tokens,
        "kv_bytes_per_token": kv_bytes(model),
    }


def _price(k: Knobs, config: GPTConfig, flops: float) -> dict[str, Any]:
    """Hours and memory on the cards that were named; a device batch that does not fit is halved until it does."""
    from nanochat.plan import memory, speed  # which know this module

    gpu = card(k.gpu)
    machine = speed.Machine.of(gpu)
    time = hours(flops, k.gpus * gpu.flops, k.utilisation)
    print0(
        f"  on {k.gpus} x {gpu.name}: {duration(time * 3600)} of pretraining at {k.utilisation:.0%} of {gpu.flops / 1e12:.4g} TFLOP/s each"
    )
    how: dict[str, Any] = {
        "dtype": machine.torch_dtype,
        "device_type": machine.device_type,
        "world_size": k.gpus,
    }
    there = machine.memory_bytes

    def need(rows: int) -> int:
        return memory.predict(config, rows, config.sequence_len, **how)["total"]

    rows, bytes_needed = k.device_batch_size, need(k.device_batch_size)
    if bytes_needed > there:
        print0(
            f"  {rows} rows of {config.sequence_len} a card take {bytes_needed / memory.GIB:.1f} of {gpu.memory_gb:g} GB: too much"
        )
        least = need(1)
        if least > there:
            raise UserError(
                f"this model does not fit the {gpu.name}: a single row of {config.sequence_len} takes {least / memory.GIB:.1f} of "
                f"{gpu.memory_gb:g} GB; choose a smaller --depth, --vocab or --sequence_len"
            )
        each = (bytes_needed - least) / (
            rows - 1
        )  # memory is nearly a straight line in rows: the check below is rarely repeated
        rows = 1 << int(math.log2(1 + (there - least) / each))
        while (bytes_needed := need(rows)) > there:
            rows //= 2
    print0(
        f"  --device_batch_size={rows}, context {config.sequence_len}: {bytes_needed / memory.GIB:.1f} of {gpu.memory_gb:g} GB a card"
    )
    out = {"gpu": gpu.name, "gpus": k.gpus, "utilisation": k.utilisation, "hours": time}
    return out | {"device_batch_size": rows, "memory_bytes": bytes_needed}


SPECIFIED = {f"d{depth}": Shape(depth=depth) for depth in (12, 16, 20, 26, 32)}
SMALL = {
    "37.75 M": Shape(depth=4, model_dim=512, head_dim=64)
}  # of runs/ittybitty.sh, with its own vocabulary
SPECIFIED_ROWS = 8


def specifications(with_memory: bool = True) -> str:
    """docs/model_specifications.md: the standard models and what they take."""
    from nanochat.plan import memory

    rows = []
    for name, shape in {**SMALL, **SPECIFIED}.items():
        config = config_for(shape, ArchitectureKnobs(), 24_576 if name in SMALL else 65_536)
        f = figures(config)
        flags = f"--depth={shape.depth}" + (
            f" --model_dim={shape.model_dim} --head_dim={shape.head_dim}" if shape.model_dim else ""
        )
        need = ""
        if with_memory:
            how = {"dtype": torch.bfloat16, "device_type": "cuda"}
            need = f"{memory.predict(config, SPECIFIED_ROWS, config.sequence_len, **how)['total'] / memory.GIB:.1f}"
        heads = f"{config.n_layer} x {config.n_embd}, {config.n_head} heads"
        parts = (f"{f[part]:,}" for part in ("embedding", "transformer", "head", "total"))
        rows.append(
            (
                name,
                f"`{flags}`",
                heads,
                *parts,
                human(f["flops_per_token"]),
                human(f["tokens"]),
                f"{f['flops']:.3g}",
                need,
            )
        )
    head = (
        "model",
        "flags",
        "layers x width",
        "embedding",
        "transformer",
        "head",
        "total",
        "FLOPs/token",
        "tokens",
        "FLOPs",
        "GB",
    )
    return f"""# Specifications of the standard models

Written by `python -m scripts.plan arch --specifications docs/model_specifications.md`; a test holds it to the code.

{columns(head, rows)}

Vocabulary 65,536 (37.75 M: 24,576), context 2,048, no optional knob set. FLOPs are those of training, forward and backward, with causal
attention counted at its mean length; tokens are 20 a parameter. GB of 2^30 bytes are what one CUDA card needs for {SPECIFIED_ROWS} rows of
2,048 in bf16, compiled, as `plan memory` predicts it; on several cards the optimizer's state is shared and takes less.
"""


def run(k: Knobs) -> dict[str, Any]:
    """Print the table that the flags ask for, and return its figures."""
    if k.specifications:
        print0("predicting the memory of six models, some seconds each", file=sys.stderr)
        atomic_write(k.specifications, specifications())
        print0(f"wrote {k.specifications}")
        return {"file": k.specifications}
    if k.split and not k.params:
        raise UserError(
            f"--split={k.split} divides a number of parameters: give it as well, as in --params 38M"
        )
    arch, shape = k.arch(), k.shape()
    if k.params:
        open_shape = replace(shape, depth=k.depth)
        shares = shares_of(k.split, k.tie_embeddings) if k.split else None
        found = search(number(k.params), shares, open_shape, arch, k.vocab, free=not k.head_dim)
        best, others = found[0], found[1:6]
    else:
        config = config_for(shape, arch, k.vocab)
        best = Found(shape, config, counts(config), 0.0)
        like = replace(shape, depth=0, model_dim=0, aspect_ratio=config.n_embd / config.n_layer)
        near_by = search(best.counts["total"], None, like, arch, k.vocab, free=not k.head_dim)
        others = [
            f
            for f in near_by
            if (f.config.n_layer, f.config.n_embd) != (config.n_layer, config.n_embd)
        ][:5]
    config = best.config
    out = {
        "config": asdict(config),
        **figures(config, k.tokens_per_param),
        "saves": savings(config),
    }
    dims = ("n_layer", "n_embd", "head_dim")
    out["alternatives"] = [{n: getattr(f.config, n) for n in dims} | f.counts for f in others]
    print0(table_of_counts(model_of(config)))
    print0(
        f"  {human(out['tokens'])} tokens at {k.tokens_per_param:g} a parameter: {out['flops']:.3g} FLOPs; "
        f"{out['kv_bytes_per_token']:,} bytes of key-value cache a token\n"
        f"  --depth={config.n_layer} --model_dim={config.n_embd} --head_dim={config.head_dim}"
    )
    if k.gpu:
        out["run"] = _price(k, config, out["flops"])
    elif k.gpus > 1:
        raise UserError(f"--gpus={k.gpus} of what? Name the card with --gpu")
    if out["saves"]:
        rows = [
            (s["flag"], f"{s['parameters']:,}", f"{s['flops']:.1%}", f"{s['kv_cache']:.0%}")
            for s in out["saves"]
        ]
        print0("\n" + columns(("what a knob would save", "parameters", "FLOPs", "cache"), rows))
    if others:
        rows = [
            (
                f"--depth={f.config.n_layer} --model_dim={f.config.n_embd} --head_dim={f.config.head_dim}",
                *(f"{f.counts[p]:,}" for p in ("embedding", "transformer", "head", "total")),
            )
            for f in others
        ]
        print0("\n" + columns(("nearby", "embedding", "transformer", "head", "total"), rows))
    return out
