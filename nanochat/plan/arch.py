"""
Parameters before training: the table of a model, its price, and the depth, width and heads for a
number of parameters.

    nanochat plan arch --params 38M --vocab 24576 --split 1:1:1
    nanochat plan arch --depth 20 --gpu "H100 SXM" --gpus 8

Every figure is counted on the real model, built without memory. A number of parameters that no
model comes within a tenth of is refused.
"""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat.base.common import UserError, columns, duration, human, notice, print0
from nanochat.base.files import atomic_write
from nanochat.base.knobs import knob
from nanochat.model.config import ArchitectureKnobs, GPTConfig
from nanochat.plan import memory
from nanochat.plan.machine import GIB, of_card
from nanochat.plan.shapes import (
    FEWEST_HEADS,
    SizeKnobs,
    config_for,
    counts,
    flops_per_token,
    model_of,
)
from nanochat.train.scaling import Shape

TOLERANCE = 0.1  # how far from the wanted number of parameters a shape may be
# Share of the peak in the GPT-2-grade reference run: 4.33e19 FLOPs in 2.76 h on 8 H100.
REFERENCE = 4.33e19 / (2.76 * 3600 * 8 * 989.4e12)
PARTS = ("embedding", "transformer", "head", "total")


@dataclass(kw_only=True)
class ArchKnobs(SizeKnobs):
    """Plan"""

    params: str = knob("", "find a shape with so many parameters, for example 38M or 1.2G")
    split: str = knob(
        "",
        "share of embedding:layers:head in these, for example 1:1:1 (1:1 if tied); "
        "default: the width follows aspect_ratio",
    )
    tokens_per_param: float = knob(20.0, "training tokens per parameter", low=0.01)
    gpu: str = knob("", "price the run on this card, for example rtx4090")
    gpus: int = knob(1, "number of cards", low=1)
    utilisation: float = knob(
        round(REFERENCE, 2), "share of the cards' peak that training reaches", low=0.01, high=1
    )
    device_batch_size: int = knob(32, "rows of a micro-batch on one card, for its memory", low=1)
    specifications: str = knob(
        "",
        "write the table of the standard models to this file, docs/model_specifications.md, and "
        "stop",
    )
    json: bool = knob(False, "print only JSON")


# finding a shape


@dataclass(frozen=True)
class FoundShape:
    """A shape that the search met, its parameters by part, and its distance from what is wanted."""

    shape: Shape
    config: GPTConfig
    counts: dict[str, int]
    cost: float = 0.0

    @property
    def flags(self) -> str:
        c = self.config
        return f"--depth={c.n_layer} --model_dim={c.n_embd} --head_dim={c.head_dim}"


@dataclass(frozen=True)
class Search:
    """
    What shapes are searched: `shape.depth` and `shape.model_dim` bind unless they are 0, and heads
    may be 64 wide as well if `free_heads`. `shares` are of embedding, layers and head.
    """

    shape: Shape
    architecture: ArchitectureKnobs
    vocab: int
    shares: tuple[float, ...] = ()
    free_heads: bool = True

    def nearest(self, params: float) -> list[FoundShape]:
        """
        Shapes within a tenth of `params` parameters, best first. The cost is |ln(total / params)|
        plus the share of the parameters that lie in the wrong part, or without `shares` a tenth of
        the octaves between width / depth and aspect_ratio. UserError if there is none.
        """
        near = [
            found
            for found in self._candidates(params)
            if abs(found.counts["total"] / params - 1) <= TOLERANCE
        ]
        if not near:
            raise UserError(
                f"no model of these flags has about {human(params)} parameters: {self._smallest()}"
            )
        return sorted(near, key=lambda found: found.cost)

    def _of_width(self, width: int, depth: int) -> Shape:
        head = self.shape.head_dim
        if self.free_heads and (width % head or width // head < FEWEST_HEADS):
            head = 64
        return replace(self.shape, depth=depth, model_dim=width, head_dim=head)

    def _candidates(self, params: float) -> Iterator[FoundShape]:
        """The depths around `params` for every width whose single layer is not too large."""
        unit = 64 if self.free_heads else self.shape.head_dim
        binding = self.shape.model_dim
        for width in [binding] if binding else range(unit, 1 << 20, unit):
            try:
                config = config_for(self._of_width(width, 1), self.architecture, self.vocab)
            except UserError:  # such as heads that do not divide; the next width may do
                if binding:
                    raise
                continue
            one_layer = counts(config)
            if one_layer["total"] > params * (1 + TOLERANCE):
                return
            exact = (params - one_layer["total"]) / one_layer["transformer"] + 1
            depths = {max(1, math.floor(exact)), max(1, math.ceil(exact))}
            for depth in [self.shape.depth] if self.shape.depth else depths:
                yield self._assessed(self._of_width(width, depth), one_layer, params)

    def _assessed(self, shape: Shape, one_layer: dict[str, int], params: float) -> FoundShape:
        layers = one_layer["transformer"] * shape.depth  # all layers have equal sizes
        total = one_layer["total"] - one_layer["transformer"] + layers
        sizes = {**one_layer, "transformer": layers, "total": total}
        sizes.pop("matmul")
        if self.shares:
            pairs = zip(PARTS, self.shares, strict=False)
            misplaced = sum(abs(sizes[part] / total - share) for part, share in pairs) / 2
        else:
            aspect = shape.model_dim / shape.depth
            misplaced = abs(math.log2(aspect / shape.aspect_ratio)) / 10
        config = config_for(shape, self.architecture, self.vocab)
        return FoundShape(shape, config, sizes, abs(math.log(total / params)) + misplaced)

    def _smallest(self) -> str:
        unit = 64 if self.free_heads else self.shape.head_dim
        least = self._of_width(self.shape.model_dim or unit, self.shape.depth or 1)
        n = counts(config_for(least, self.architecture, self.vocab))
        tables = human(n["embedding"] + n["head"])
        tie = "" if self.architecture.tie_embeddings else ", or --tie_embeddings"
        return (
            f"the smallest has {human(n['total'])}, {tables} of them in tables for "
            f"{self.vocab:,} tokens; try other --params, a smaller --vocab{tie}"
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


def training_hours(flops: float, peak: float, utilisation: float) -> float:
    """Hours of training at this share of the peak of all cards (FLOP/s)."""
    return flops / (peak * utilisation) / 3600


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


def price(knobs: ArchKnobs, config: GPTConfig, flops: float) -> dict[str, Any]:
    """Hours and memory on the named cards; a device batch that does not fit is halved."""
    card = of_card(knobs.gpu)
    hours = training_hours(flops, knobs.gpus * card.peak_flops, knobs.utilisation)
    print0(
        f"  on {knobs.gpus} x {card.name}: {duration(hours * 3600)} of pretraining at "
        f"{knobs.utilisation:.0%} of {card.peak_flops / 1e12:.4g} TFLOP/s each"
    )

    def required(rows: int) -> int:
        return memory.predict(
            config,
            rows,
            config.sequence_len,
            dtype=card.dtype,
            device_type=card.device_type,
            compiled=card.compiler,
            world_size=knobs.gpus,
        )["total"]

    rows, available = knobs.device_batch_size, f"{card.memory_bytes / GIB:g} GB"
    while (needed := required(rows)) > card.memory_bytes:
        size = f"{rows} rows of {config.sequence_len} need {needed / GIB:.1f} of {available}"
        if rows == 1:
            raise UserError(
                f"this model does not fit the {card.name}: {size}; choose a smaller --depth, "
                "--vocab or --sequence_len"
            )
        notice(f"{size}: trying {rows // 2}")
        rows //= 2
    print0(
        f"  --device_batch_size={rows}, context {config.sequence_len}: "
        f"{needed / GIB:.1f} of {available} per card"
    )
    priced = {"gpu": card.name, "gpus": knobs.gpus, "utilisation": knobs.utilisation}
    return {**priced, "hours": hours, "device_batch_size": rows, "memory_bytes": needed}


# the document of the standard models

STANDARD = {  # name -> (shape, vocabulary)
    "37.75 M": (Shape(depth=4, model_dim=512, head_dim=64), 24_576),  # runs/ittybitty.sh
    **{f"d{depth}": (Shape(depth=depth), 65_536) for depth in (12, 16, 20, 26, 32)},
}
STANDARD_ROWS = 8


def specifications() -> str:
    """The text of docs/model_specifications.md: the standard models and what they take."""
    rows = []
    for name, (shape, vocab) in STANDARD.items():
        config = config_for(shape, ArchitectureKnobs(), vocab)
        f = figures(config)
        flags = f"--depth={shape.depth}"
        if shape.model_dim:
            flags += f" --model_dim={shape.model_dim} --head_dim={shape.head_dim}"
        how = {"dtype": "bfloat16", "device_type": "cuda", "compiled": True}
        needed = memory.predict(config, STANDARD_ROWS, config.sequence_len, **how)["total"]
        size = f"{config.n_layer} x {config.n_embd}, {config.n_head} heads"
        training = human(f["flops_per_token"]), human(f["tokens"]), f"{f['flops']:.3g}"
        rows.append((name, f"`{flags}`", size, *_counted(f), *training, f"{needed / GIB:.1f}"))
    head = ("model", "flags", "layers x width", *PARTS, "FLOPs/token", "tokens", "FLOPs", "GB")
    return f"""# Specifications of the standard models

Written by `nanochat plan arch --specifications docs/model_specifications.md`; a test compares it
with the code.

{columns(head, rows)}

Vocabulary 65,536 (37.75 M: 24,576), context 2,048, all optional knobs at their defaults. FLOPs are
those of training, forward and backward, with causal attention counted at its mean length; tokens
are 20 per parameter. GB of 2^30 bytes are what one CUDA card needs for {STANDARD_ROWS} rows of
2,048 in bf16, compiled, as `plan memory` predicts; several cards share the optimizer's state and
need less.
"""


def _counted(n: dict[str, int]) -> Iterator[str]:
    return (f"{n[part]:,}" for part in PARTS)


# the command


def run(knobs: ArchKnobs) -> dict[str, Any]:
    """Print the table that the flags ask for, and return its figures."""
    if knobs.specifications:
        print0("predicting the memory of six models", file=sys.stderr)
        atomic_write(knobs.specifications, specifications())
        print0(f"wrote {knobs.specifications}")
        return {"file": knobs.specifications}
    if knobs.split and not knobs.params:
        raise UserError(
            f"--split={knobs.split} divides a number of parameters: give it as well, as in "
            "--params 38M"
        )
    if knobs.gpus > 1 and not knobs.gpu:
        raise UserError(f"--gpus={knobs.gpus} also needs the name of the card: add --gpu NAME")
    best, *others = _chosen(knobs)
    config = best.config
    report = {"config": asdict(config), **figures(config, knobs.tokens_per_param)}
    report["alternatives"] = [
        {name: getattr(other.config, name) for name in ("n_layer", "n_embd", "head_dim")}
        | other.counts
        for other in others
    ]
    _show(best, others, report, knobs.tokens_per_param)
    if knobs.gpu:
        report["run"] = price(knobs, config, report["flops"])
    return report


def _chosen(knobs: ArchKnobs) -> list[FoundShape]:
    """The shape that the flags ask for, and up to five others of its size."""
    shape, architecture = knobs.shape(), knobs.architecture()
    how = {"architecture": architecture, "vocab": knobs.vocab, "free_heads": not knobs.head_dim}
    if knobs.params:
        shares = parse_shares(knobs.split, knobs.tie_embeddings) if knobs.split else ()
        search = Search(replace(shape, depth=knobs.depth), shares=shares, **how)
        return search.nearest(parse_number(knobs.params))[:6]
    config = config_for(shape, architecture, knobs.vocab)
    given = FoundShape(shape, config, counts(config))
    like = replace(shape, depth=0, model_dim=0, aspect_ratio=config.n_embd / config.n_layer)
    size = config.n_layer, config.n_embd
    near = Search(like, **how).nearest(given.counts["total"])
    return [given, *(n for n in near if (n.config.n_layer, n.config.n_embd) != size)][:6]


def _show(
    best: FoundShape, others: Sequence[FoundShape], report: dict[str, Any], tokens_per_param: float
) -> None:
    from nanochat.train.run import table_of_counts

    print0(table_of_counts(model_of(best.config)))
    print0(
        f"  {human(report['tokens'])} tokens at {tokens_per_param:g} per parameter: "
        f"{report['flops']:.3g} FLOPs; {report['kv_bytes_per_token']:,} bytes of key-value cache "
        f"per token\n  {best.flags}"
    )
    if others:
        rows = [(other.flags, *_counted(other.counts)) for other in others]
        print0("\n" + columns(("nearby", *PARTS), rows))
