"""
What the files of a checkpoint may hold. A checkpoint can come from a stranger, so everything is
checked before a model is built or memory is allocated: the types and ranges of the metadata, and
the header of the tensors against the model that the metadata describe.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.base.common import UserError
from nanochat.base.runtime import DTYPES
from nanochat.base.strangers import mismatch, missing, read_json, shown
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.header import Header, read_header
from nanochat.model.prior_artifact import CODES
from nanochat.model.stages import STAGES

MOST_META = 2**22  # bytes

_SETTING = (bool, int, float, str, None, [(bool, int, float, str)])
_BEST = {"step": int, "val_bpb": float}
_META = {  # the forms of those fields that some code reads; see strangers.mismatch
    "format": int,
    "step": int,
    "stage": str,
    "config": {str: object},  # checked by GPTConfig.from_dict
    "tokenizer": str,
    "knobs": {str: _SETTING},
    "origins": {str: str},
    "horizon": {
        "rows": int,
        "steps": (int, None),
        "compiled": bool,
        "since": ([float], None),
    },
    "dtype": str,
    "world_size": int,
    "tokens": int,
    "seconds": float,
    "best": (_BEST, None),
    "scale": float,
    "stale": int,
    "costs": {str: float},
    "sizes": {str: int},
    "spent": {str: float},
    "evaluated_to": [float],
    "last": {str: {str: object}},
    "done": bool,
    "updates": int,
    "progress": float,
    "feed": {
        "seed": int,
        "sequence_len": int,
        "epochs": (int, None),
        "documents": [int],
        "tokens": [int],
        "quota": [int],
        "step": int,
        "progress": float,
        "epoch": int,
        "block": int,
        "row": int,
        "cuts": [[int]],
        "sources": [{"epoch": int, "document": int, "drawn": int}],
        "sha256": [str],
        "questions": str,
        "drawn": int,
    },
}
_SPEC = {
    "attention": str,
    "columns": [[(int, str)]],
    "shifts": [int],
    "learned": bool,
    "rows": [[int]],
    "tensors": {str: [(int, str)]},
    "about": str,
    "reach": (int, None),  # which older checkpoints lack
}
# The tables of a prior, with a letter for each of their sizes. V = vocabulary, U = V + 1,
# T = context, D = T + 1, L = layers, H = heads, G = groups, S = shifts, N = curves; for any other
# letter, the first table that has it decides the size. The table "place" is TT, ND or D.
_TABLES = {
    "gates": "LHG",
    "start": "LHG",
    "key": "V",
    "codes": "UP",
    "query": "PR",
    "keys": "SPR",
    "pair": "Q",
    "pair_query": "UQ",
    "pair_now": "UQ",
    "place_u": "TW",
    "place_w": "TW",
}
_GROUPS = {  # the tables that a group of a prior needs
    "key": {"key"},
    "match": {"codes", "query", "keys"},
    "pair": {"pair", "pair_query", "pair_now"},
    "lag": {"place"},
    "bias": {"place"},
}


class Meta(dict[str, Any]):
    """The checked metadata. A field that is needed and absent is a UserError, not a KeyError."""

    def __missing__(self, name: str) -> Any:
        raise UserError(
            f"the metadata of the checkpoint lack {name!r}: choose another one with --step, or "
            "get it again from where it came from"
        )


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata in a file, unchecked. OSError or ValueError if it holds no JSON object."""
    meta = read_json(path, MOST_META)
    if not isinstance(meta, dict):
        raise ValueError(f"it holds {shown(meta)}, not an object")
    return meta


def check_sizes(meta: Path, weights: Path) -> None:
    """ValueError or OSError for files that are too large, before anything hashes them."""
    if meta.stat().st_size > MOST_META:
        raise ValueError(f"{meta.name} has more than {MOST_META:,} bytes")
    read_header(weights)  # covers its file exactly


def checked_meta(meta: Mapping[str, Any]) -> Meta:
    """
    The metadata, in the present format, as Meta. Fields may be missing; ValueError or UserError if
    one has a wrong type or is out of range.
    """
    if not (fault := mismatch(meta, _META, "meta")):
        config = GPTConfig.from_dict(meta["config"]) if "config" in meta else None
        if meta.get("stage", "base") not in STAGES:
            fault = f"there is no stage {shown(meta['stage'])}"
        elif meta.get("dtype", "float32") not in DTYPES:
            fault = f"its dtype is {shown(meta['dtype'])}, not one of {', '.join(DTYPES)}"
        elif meta.get("best") is not None and (lacking := missing(meta["best"], list(_BEST))):
            fault = f"its best evaluation is {shown(meta['best'])}: {lacking}"
        elif len(meta.get("evaluated_to", "00")) != 2 or 0 in meta.get("sizes", {}).values():
            fault = "its evaluations are not those of a run"
        elif config and config.rap is not None:
            fault = spec_fault(config.rap, config)
    if fault:
        raise ValueError(fault)
    inner = {name: Meta(meta[name]) for name in ("horizon", "feed", "knobs") if name in meta}
    return Meta({**meta, **inner})


def spec_fault(spec: Any, config: GPTConfig) -> str:
    """What is wrong with the spec of a prior (GPTConfig.rap) for this model; '' if nothing is."""
    fault = mismatch(spec, _SPEC, "rap") or missing(spec, sorted(set(_SPEC) - {"reach"}))
    if fault:
        return fault
    names = [column[0] for column in spec["columns"] if [*map(type, column)] == [str, int]]
    if len(set(names)) < len(spec["columns"]) or set(names) - set(_GROUPS):
        return f"rap.columns is {shown(spec['columns'])}, not the groups of a prior"
    place = [name for name in names if name in ("lag", "bias")]
    if place not in ([], names[-1:]):
        return "rap.columns must end with lag or bias, and have only one of them"
    needed = {"gates"}.union(*(_GROUPS[name] for name in names))
    if fault := missing(spec["tensors"], sorted(needed)):
        return f"rap.tensors: {fault}"
    if spec["attention"] not in ("dense", "factored", "flex"):
        return f"rap.attention is {shown(spec['attention'])}"
    if max(spec["shifts"], default=0) > config.sequence_len:
        return f"rap.shifts go beyond the context of {config.sequence_len} tokens"
    if "match" in names and not spec["shifts"]:
        return "rap.shifts is empty, but match needs at least one"
    return _tables_fault(spec, names, config)


def _tables_fault(spec: dict[str, Any], names: list[str], config: GPTConfig) -> str:
    """What is wrong with the shapes of a prior's tables, or with its rows and columns; or ''."""
    rows, T, V = spec["rows"], config.sequence_len, config.vocab_size
    sizes = {"V": V, "U": V + 1, "T": T, "D": T + 1, "G": len(names), "S": len(spec["shifts"])}
    place = "TT" if "bias" in names else "ND" if rows else "D"
    for name, table in spec["tensors"].items():
        letters = place if name == "place" else _TABLES.get(name, "")
        if not _table_fits(name, table or [""], letters, sizes):
            return f"rap.tensors.{name[:40]} is {shown(table)}, which does not fit"
    layers, heads = sizes["L"], sizes["H"]
    if not (0 < layers <= config.n_layer and 0 < heads <= config.n_head):
        return f"rap has gates for {heads} heads of {layers} layers, which the model does not have"
    lengths, curves = {len(layer) for layer in rows}, [curve for layer in rows for curve in layer]
    if rows and (len(rows) != layers or lengths != {heads} or max(curves) >= sizes.get("N", 0)):
        return "rap.rows does not name one curve for each head"
    widths = {"key": 1, "match": sizes.get("R"), "pair": sizes.get("Q")}
    widths |= dict.fromkeys(("lag", "bias"), sizes.get("W", 0))
    wrong = [name for name, n in spec["columns"] if n != widths[name]]
    return f"rap.columns gives a wrong width for {', '.join(wrong)}" if wrong else ""


def _table_fits(name: str, table: list[Any], letters: str, sizes: dict[str, int]) -> bool:
    """Whether a table [dtype, *sizes] has the sizes of these letters; adds new ones to `sizes`."""
    dtype, *shape = table
    return (
        dtype in (("int8",) if name in CODES else ("float32", "bfloat16"))
        and len(shape) == len(letters) > 0
        and all(
            type(n) is int and n == sizes.setdefault(letter, n)
            for letter, n in zip(letters, shape, strict=True)
        )
    )


def header_fault(header: Header, config: GPTConfig) -> str:
    """Why these tensors are not those of a model of `config`; '' if they are."""
    layers = sum(name.startswith("blocks.") for name in header)
    if config.n_layer > layers:  # before a model of a million layers is laid out
        return f"its metadata describe {config.n_layer:,} layers, but it holds tensors for fewer"
    for name, table in GPT.build(config, "meta").state_dict().items():
        dtype, shape = header.get(name, ("nothing", ()))
        # As safetensors spells it: BF16 for torch.bfloat16, I8 for torch.int8
        kind = str(table.dtype).removeprefix("torch.")
        expected = kind.replace("float", "f").replace("int", "i").upper()
        floats = ("F64", "F32", "BF16", "F16") if table.is_floating_point() else (expected,)
        if dtype not in floats or shape != tuple(table.shape):
            return (
                f"its metadata describe {name} as {expected} {tuple(table.shape)}, but it holds "
                f"{dtype} {shape or ''}".rstrip()
            )
    return ""


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a value that is NaN or infinite; '' if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return ""
