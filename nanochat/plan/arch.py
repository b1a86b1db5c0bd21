"""
Count a model's parameters, estimate its training time, and find the depth, width and heads for a
number of parameters.

    nanochat plan arch --params 38M --vocab 24576 --split 1:1:1
    nanochat plan arch --depth 20 --gpu "H100 SXM" --gpus 8

With --gpu or --probe, the page of plan day for the run follows. Every figure is counted on the real
model, built without memory. A number of parameters that no model comes within a tenth of is
refused.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanochat.base.common import UserError, columns, human, print0
from nanochat.base.knobs import knob, stored_values
from nanochat.model.config import LARGEST, GPTConfig
from nanochat.plan import day
from nanochat.plan.machine import CardKnobs
from nanochat.plan.shapes import SizeKnobs, counts, flops_per_token, model_of

TOLERANCE = 0.1  # how far from the wanted number of parameters a shape may be
PARTS = ("embedding", "transformer", "head", "total")


@dataclass(kw_only=True)
class ArchKnobs(CardKnobs, SizeKnobs):
    """Plan"""

    params: str = knob("", "find a shape with this many parameters, for example 38M or 1.2G")
    split: str = knob(
        "",
        "how to split them into embedding:layers:head, for example 1:1:1 (1:1 if tied); "
        "default: the width follows aspect_ratio",
    )
    tokens_per_param: float = knob(20.0, "training tokens per parameter", low=0.01)


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
        misplaced = abs(math.log2(config.n_embd / config.n_layer / knobs.aspect_ratio)) / 10
        if shares:
            pairs = zip(PARTS, shares, strict=False)
            misplaced = sum(abs(n[part] / n["total"] - share) for part, share in pairs) / 2
        return abs(math.log(n["total"] / params)) + misplaced

    near = []
    for width in [knobs.model_dim] if knobs.model_dim else range(64, LARGEST["n_embd"], 64):
        try:
            n = counts(knobs.config(width, depth=1, model_dim=width))
            depth = knobs.depth or max(1, 1 + round((params - n["total"]) / n["transformer"]))
            config = knobs.config(width, depth=depth, model_dim=width)
        except UserError:  # width, heads and copy heads do not go together, or it is too deep
            continue
        if n["total"] > params * (1 + TOLERANCE):
            break
        if abs(counts(config)["total"] / params - 1) <= TOLERANCE:
            near.append(config)
    if near:
        return sorted(near, key=cost)
    width = knobs.model_dim or knobs.head_dim or 64
    n = counts(knobs.config(width, depth=knobs.depth or 1, model_dim=width))
    tie = "" if knobs.tie_embeddings else ", or --tie_embeddings"
    raise UserError(
        f"no model with these flags has about {human(params)} parameters: the smallest has "
        f"{human(n['total'])}, {human(n['embedding'] + n['head'])} of them in tables for "
        f"{knobs.vocab:,} tokens; try other --params, a smaller --vocab{tie}"
    )


def parse_number(text: str) -> float:
    """'38M' -> 38e6; decimal units k, M, G (or B), T."""
    match = re.fullmatch(r"(\d*\.?\d+(?:e\d+)?) ?([kmgbt]?)", re.sub("[,_]", "", text.lower()))
    if not match or not float(match[1]):
        raise UserError(f"--params takes a number such as 38M or 1.2G, not {text!r}")
    return float(match[1]) * 1000 ** " kmgt".index(match[2].replace("b", "g") or " ")


def parse_shares(text: str, tied: bool) -> list[float]:
    """'1:1:1' -> a third each, of embedding, layers and head; a tied model has no head."""
    form, example = (
        ("embedding:layers for a tied model", "1:1") if tied else ("embedding:layers:head", "1:1:1")
    )
    match = re.fullmatch(":".join([r"(\d*\.?\d+)"] * (3 - tied)), text)
    values = [float(value) for value in match.groups()] if match else [0.0]
    if 0 in values:
        raise UserError(f"--split takes {form}, for example {example}, not {text!r}")
    return [value / sum(values) for value in values]


# figures and prices


def figures(config: GPTConfig, tokens_per_param: float = 20.0) -> dict[str, Any]:
    """What a model is and what its training takes: parameters, FLOPs, tokens, bytes of cache."""
    n, per_token = counts(config), flops_per_token(config)
    tokens, cache = round(tokens_per_param * n["total"]), model_of(config).new_cache(1, 1)
    return {
        **n,
        "flops_per_token": per_token,
        "tokens": tokens,
        "flops": per_token * tokens,
        "kv_bytes_per_token": (cache.k.nbytes + cache.v.nbytes) // cache.k.size(3),  # in bf16
    }


def run(knobs: ArchKnobs) -> dict[str, Any]:
    """Print the table that the flags ask for, and return its figures."""
    from nanochat.train.run import table_of_counts

    if knobs.split and not knobs.params:
        raise UserError(
            f"--split={knobs.split} also needs the number of parameters: add it, as in --params 38M"
        )
    config, others = knobs.config(), []
    if knobs.params:
        shares = parse_shares(knobs.split, knobs.tie_embeddings) if knobs.split else ()
        config, *others = nearest(knobs, parse_number(knobs.params), shares)[:6]
    report = {
        "config": asdict(config),
        **figures(config, knobs.tokens_per_param),
        "alternatives": [asdict(other) | counts(other) for other in others],
    }
    print0(table_of_counts(model_of(config)))
    print0(
        f"  {human(report['tokens'])} tokens at {knobs.tokens_per_param:g} per parameter: "
        f"{report['flops']:.3g} FLOPs; {report['kv_bytes_per_token']:,} bytes of key-value cache "
        f"per token\n  {_flags(config)}"
    )
    if others:
        rows = [(_flags(c), *(f"{counts(c)[part]:,}" for part in PARTS)) for c in others]
        print0("\n" + columns(("nearby", *PARTS), rows))
    if knobs.gpu or knobs.gpus > 1 or knobs.probe:
        given = stored_values(day.DayKnobs, vars(knobs), "plan arch")
        given |= {"depth": config.n_layer, "model_dim": config.n_embd, "head_dim": config.head_dim}
        given["tokens"] = report["tokens"]
        report["run"] = day.run(day.DayKnobs(**given))
    return report


def _flags(config: GPTConfig) -> str:
    return f"--depth={config.n_layer} --model_dim={config.n_embd} --head_dim={config.head_dim}"
