"""
Checkpoints as a stranger might write them. Each attack spoils a good checkpoint and renews its manifest, so that no hash gives it away.
`load` reads it as every command does; what must follow is a UserError, or a model that works.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanochat.chat.generate import Engine
from nanochat.model.checkpoint import load_for_inference

Attack = Callable[[Path], object]
MODEL, META = "model.safetensors", "meta.json"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def seal(step: Path) -> None:
    """Write the manifest of the files as they are now; a file that cannot be hashed keeps its entry."""
    if not (step / "manifest.json").is_file():
        return
    try:
        manifest = json.loads((step / "manifest.json").read_text())
    except (ValueError, RecursionError):
        return
    if not isinstance(manifest, dict):
        return
    for name in manifest:
        if (step / name).is_file() and (step / name).stat().st_size < 2**30:
            manifest[name] = [hashlib.sha256((step / name).read_bytes()).hexdigest()]
    (step / "manifest.json").write_text(json.dumps(manifest))


def field(*path: str, value: object) -> Attack:
    """Set a field of the metadata."""

    def act(step: Path) -> None:
        meta = json.loads((step / META).read_text())
        inner = meta
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
        (step / META).write_text(json.dumps(meta))

    return act


def without(*path: str) -> Attack:
    def act(step: Path) -> None:
        meta = json.loads((step / META).read_text())
        inner = meta
        for name in path[:-1]:
            inner = inner[name]
        inner.pop(path[-1], None)
        (step / META).write_text(json.dumps(meta))

    return act


def raw(text: bytes | str, name: str = META) -> Attack:
    data = text.encode() if isinstance(text, str) else text
    return lambda step: (step / name).write_bytes(data)


def replaced(old: str, new: str) -> Attack:
    """Change the text of the metadata."""
    return lambda step: (step / META).write_text((step / META).read_text().replace(old, new, 1))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Attack:
    def act(step: Path) -> None:
        stored = {name: t.clone() for name, t in load_file(step / MODEL).items()}
        change(stored)
        save_file(stored, step / MODEL)

    return act


def both(*attacks: Attack) -> Attack:
    return lambda step: [attack(step) for attack in attacks]


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Attack:
    return tensors(lambda stored: stored.update({name: change(t) for name, t in stored.items()}))


def header(change: Callable[[dict], object], keep_data: bool = True) -> Attack:
    """Change the header of the weights and leave the data as they are."""

    def act(step: Path) -> None:
        data = (step / MODEL).read_bytes()
        n = struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8 : 8 + n])
        changed = change(entries)
        text = changed if isinstance(changed, bytes) else json.dumps(entries).encode()
        body = data[8 + n :] if keep_data else b""
        (step / MODEL).write_bytes(struct.pack("<Q", len(text)) + text + body)

    return act


def many_tensors(n: int) -> Attack:
    """A header with this many empty tensors."""

    def act(step: Path) -> None:
        empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        text = "{" + ",".join([f'"t{i}":{empty}' for i in range(n)]) + "}"
        (step / MODEL).write_bytes(struct.pack("<Q", len(text)) + text.encode())

    return act


def entry(name: str, **changes: object) -> Attack:
    return header(lambda entries: entries[name].update(changes))


def instead(name: str, make: Callable[[Path], object]) -> Attack:
    """Put something that is no regular file in a file's place."""

    def act(step: Path) -> None:
        (step / name).unlink()
        make(step / name)

    return act


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def linked_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**42)


SIZES = ["n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "sequence_len"]
HUGE = {
    "n_layer": 10**9,
    "n_embd": 2**40,
    "vocab_size": 2**60,
    "sequence_len": 10**8,
    "n_head": 10**400,
    "n_kv_head": 2**31,
}
ODD = {
    "negative": -1,
    "zero": 0,
    "a float": 2.5,
    "true": True,
    "a text": "2",
    "null": None,
    "a list": [2],
    "an object": {"a": 2},
    "NaN": float("nan"),
    "infinite": float("inf"),
}
PRIOR = {
    "attention": "dense",
    "columns": [["key", 1]],
    "shifts": [],
    "learned": True,
    "rows": [],
    "tensors": {"gates": ["float32", 2, 2, 1], "key": ["float32", 384]},
    "about": "x",
}
MATCH = PRIOR | {
    "columns": [["match", 1]],
    "tensors": {
        "gates": ["float32", 2, 2, 1],
        "codes": ["int8", 385, 4],
        "query": ["float32", 4, 1],
        "keys": ["float32", 0, 4, 1],
    },
}

CHECKPOINTS: dict[str, Attack] = {
    # --- the architecture
    **{f"{name} huge": field("config", name, value=HUGE[name]) for name in SIZES},
    **{f"{name} {kind}": field("config", name, value=value) for name in SIZES for kind, value in ODD.items()},
    "one layer more": field("config", "n_layer", value=3),
    "a thousand layers": field("config", "n_layer", value=1000),
    "one layer less": field("config", "n_layer", value=1),
    "context of a million": field("config", "sequence_len", value=2**20),
    "context beyond a million": field("config", "sequence_len", value=2**20 + 1),
    "mlp_ratio 1e300": field("config", "mlp_ratio", value=1e300),
    "mlp_ratio 1e-300": field("config", "mlp_ratio", value=1e-300),
    "rope_base 1e-300": field("config", "rope_base", value=1e-300),
    "rope_base 1e300": field("config", "rope_base", value=1e300),
    "softcap 1e-300": field("config", "softcap", value=1e-300),
    "softcap negative": field("config", "softcap", value=-1),
    "softcap a text": field("config", "softcap", value="15"),
    "activation unknown": field("config", "activation", value="exec"),
    "activation a list": field("config", "activation", value=["relu2"]),
    "another activation with a gate": field("config", "activation", value="swiglu"),
    "window_pattern of 2 MB": field("config", "window_pattern", value="LS" * 1_000_000),
    "window_pattern empty": field("config", "window_pattern", value=""),
    "window_pattern with escapes": field("config", "window_pattern", value=ESCAPE),
    "tie_embeddings 1": field("config", "tie_embeddings", value=1),
    "tied after all": field("config", "tie_embeddings", value=True),
    "unknown knob": field("config", "__class__", value="os.system"),
    "unknown knob with escapes": field("config", ESCAPE, value=1),
    "config a list": field("config", value=[]),
    "config a text": field("config", value="x"),
    "config null": field("config", value=None),
    "config absent": without("config"),
    # --- an attention prior
    "prior a text": field("config", "rap", value="x"),
    "prior empty": field("config", "rap", value={}),
    "prior without tables": field("config", "rap", value={**PRIOR, "tensors": {}}),
    "prior whose weights are absent": field("config", "rap", value=PRIOR),
    "prior with a table of 2^40": field("config", "rap", value={**PRIOR, "tensors": {**PRIOR["tensors"], "key": ["float32", 2**40]}}),
    "prior of a thousand layers": field("config", "rap", value={**PRIOR, "tensors": {**PRIOR["tensors"], "gates": ["float32", 1000, 2, 1]}}),
    "prior with a negative size": field("config", "rap", value={**PRIOR, "tensors": {**PRIOR["tensors"], "key": ["float32", -1]}}),
    "prior of a strange dtype": field("config", "rap", value={**PRIOR, "tensors": {**PRIOR["tensors"], "key": ["load", 384]}}),
    "prior with shifts of 1e15": field("config", "rap", value={**PRIOR, "shifts": [10**15]}),
    "prior with a strange group": field("config", "rap", value={**PRIOR, "columns": [["evil", 1]]}),
    "prior with 2^50 columns": field("config", "rap", value={**PRIOR, "columns": [["key", 2**50]]}),
    "prior with rows for nobody": field("config", "rap", value={**PRIOR, "rows": [[9**9]]}),
    "prior with rows but no curves": field("config", "rap", value={**PRIOR, "rows": [[0, 0], [0, 0]]}),
    "prior with a match of no shifts": both(field("config", "rap", value=MATCH), tensors(lambda stored: stored.update({f"prior.{name}": torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, *shape) in MATCH["tensors"].items()}))),
    # --- the other metadata
    **{f"{name} {kind}": field(name, value=value) for name in ("tokenizer", "knobs", "dtype", "stage") for kind, value in (("null", None), ("a number", 7), ("a list", []), ("with escapes", ESCAPE))},
    "format 99": field("format", value=99),
    "format NaN": field("format", value=float("nan")),
    "format true": field("format", value=True),
    "format a list": field("format", value=[2]),
    "format with escapes": field("format", value=ESCAPE),
    "step negative": field("step", value=-3),
    "tokens 1e400": replaced('"tokens": 768', '"tokens": 1e400'),
    "horizon a text": field("horizon", value="x"),
    "vocabulary of another size": field("config", "vocab_size", value=383),
    # --- the file of the metadata
    "empty": raw(""),
    "not JSON": raw("{"),
    "a list": raw("[]"),
    "a number": raw("7"),
    "null": raw("null"),
    "NaN": raw("NaN"),
    "not UTF-8": raw(b"\xff\xfe{}"),
    "100,000 lists deep": raw("[" * 100_000 + "]" * 100_000),
    "900 objects deep": raw('{"a":' * 900 + "1" + "}" * 900),
    "config 900 deep": replaced('"config": {', '"config": {"rap": ' + '{"a":' * 900 + "1" + "}" * 900 + ", "),
    "a field twice": replaced('"step": 3,', '"step": 3, "step": 4,'),
    "a number of 10,000 digits": replaced('"step": 3,', '"step": ' + "9" * 10_000 + ","),
    "8 MB of white space": lambda step: (step / META).write_text((step / META).read_text() + " " * 8_000_000),
    "500,000 fields": lambda step: (step / META).write_text("{" + ",".join([f'"k{i}":0' for i in range(500_000)]) + "}"),
    "HTML": raw("<html></html>"),
    # --- what is no file
    **{f"{name} {kind}": instead(name, make) for name in (META, MODEL, "manifest.json") for kind, make in (("a pipe", os.mkfifo), ("a link to a pipe", linked_fifo), ("/dev/zero", link("/dev/zero")), ("a folder", Path.mkdir), ("a link to itself", link(META)), ("a dead link", link("/nonexistent")))},
    f"{META} sparse": instead(META, sparse),
    # --- the header of the weights
    "weights empty": raw("", MODEL),
    "weights of 7 bytes": raw(b"\0" * 7, MODEL),
    "header of 2^63 bytes": raw(struct.pack("<Q", 2**63) + b"{}", MODEL),
    "header of 2^64-1 bytes": raw(b"\xff" * 8 + b"{}", MODEL),
    "header longer than the file": raw(struct.pack("<Q", 10**6) + b"{}", MODEL),
    "header not JSON": header(lambda entries: b"{"),
    "header a list": header(lambda entries: b"[]"),
    "header deep": header(lambda entries: b"[" * 100_000 + b"]" * 100_000),
    "a million tensors": many_tensors(1_000_000),
    "20,000 tensors": many_tensors(20_000),
    "no tensors": header(lambda entries: b"{}", keep_data=False),
    "offsets of 2^60": entry("embed.weight", data_offsets=[0, 2**60]),
    "offsets negative": entry("embed.weight", data_offsets=[-4, 4]),
    "offsets backwards": entry("embed.weight", data_offsets=[400, 4]),
    "offsets a text": entry("embed.weight", data_offsets="0"),
    "offsets of three": entry("embed.weight", data_offsets=[0, 4, 8]),
    "offsets that overlap": header(lambda entries: [e.update(data_offsets=[0, e["data_offsets"][1] - e["data_offsets"][0]]) for n, e in entries.items() if n != "__metadata__"] and None),
    "shape of 2^62": entry("embed.weight", shape=[2**62, 2**62]),
    "shape negative": entry("embed.weight", shape=[-384, -16]),
    "shape turned": entry("embed.weight", shape=[16, 384]),
    "shape of 10,000 ones": entry("embed.weight", shape=[1] * 10_000),
    "shape a text": entry("embed.weight", shape="384"),
    "dtype unknown": entry("embed.weight", dtype="PICKLE"),
    "dtype a list": entry("embed.weight", dtype=["F32"]),
    "entry null": header(lambda entries: entries.update({"embed.weight": None})),
    "metadata a list": header(lambda entries: entries.update({"__metadata__": []})),
    "name with escapes": header(lambda entries: entries.update({ESCAPE: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
    "a pickle": raw(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.", MODEL),
    "header in which a name comes twice": header(lambda entries: json.dumps(entries)[:-1].encode() + b', "head.weight": ' + json.dumps(entries["head.weight"]).encode() + b"}"),
    "header with a byte-order mark": header(lambda entries: b"\xef\xbb\xbf" + json.dumps(entries).encode()),
    "shape of floats": entry("embed.weight", shape=[384.0, 16.0]),
    "shape of true": entry("embed.weight", shape=[True, 6144]),
    "shape of 2^31 by 0": entry("embed.weight", shape=[2**31, 0]),
    "dtype in small letters": entry("embed.weight", dtype="f32"),
    "dtype of four bits": entry("embed.weight", dtype="F4"),
    "dtype I32 of the same size": entry("embed.weight", dtype="I32"),
    "offsets of floats": entry("embed.weight", data_offsets=[0.0, 24576.0]),
    "an entry of 1,000 fields": entry("embed.weight", **{f"k{i}": i for i in range(1000)}),
    "a name that is a path": header(lambda entries: entries.update({"../../evil": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
    "bytes behind the tensors": lambda step: (step / MODEL).write_bytes((step / MODEL).read_bytes() + b"x"),
    # --- the manifest and the folder
    **{f"manifest {kind}": raw(text, "manifest.json") for kind, text in (("empty", ""), ("null", "null"), ("of nulls", '{"model.safetensors": null, "meta.json": null}'), ("of texts", '{"model.safetensors": "x", "meta.json": "y"}'), ("of numbers", '{"model.safetensors": [1], "meta.json": [2]}'), ("deep", "[" * 100_000), ("of 2 MB", '{"a": "' + "x" * 2_000_000 + '"}'))},
    "metadata in UTF-16": lambda step: (step / META).write_bytes((step / META).read_text().encode("utf-16")),
    "metadata with a byte-order mark": lambda step: (step / META).write_bytes(b"\xef\xbb\xbf" + (step / META).read_bytes()),
    "a newer step that links to itself": lambda step: (step.parent / "step_000009").symlink_to("step_000009"),
    "a newer step that links to the run": lambda step: (step.parent / "step_000009").symlink_to(step.parent),
    "a newer step that is a file": lambda step: (step.parent / "step_000009").write_text("x"),
    "a step of 5,000 digits": lambda step: (step.parent / ("step_" + "9" * 200)).mkdir(),
    "a step in Arabic digits": lambda step: (step.parent / "step_\u0660\u0660\u0660\u0660\u0660\u0669").mkdir(),
    "a step that is a power": lambda step: (step.parent / "step_\u00b2").mkdir(),
    "a step below zero": lambda step: (step.parent / "step_-00001").mkdir(),
    # --- the weights
    "one NaN": tensors(lambda stored: stored["blocks.0.mlp.up.weight"].view(-1).__setitem__(0, float("nan"))),
    "one infinity": tensors(lambda stored: stored["head.weight"].view(-1).__setitem__(5, float("inf"))),
    "all NaN": every(lambda t: t * float("nan")),
    "values of 1e38": every(lambda t: torch.full_like(t, 1e38)),
    "values of 1e-40": every(lambda t: torch.full_like(t, 1e-40)),
    "all zero": every(torch.zeros_like),
    "int8": every(lambda t: t.to(torch.int8)),
    "int64": every(lambda t: t.to(torch.int64)),
    "bool": every(lambda t: t > 0),
    "complex": every(lambda t: t.to(torch.complex64)),
    "float64": every(lambda t: t.double()),
    "float64 beyond float32": every(lambda t: t.double() + 1e300),
    "bfloat16": every(lambda t: t.bfloat16()),
    "scalars": every(lambda t: torch.zeros(())),
    "one tensor absent": tensors(lambda stored: stored.pop("head.weight")),
    "one tensor more": tensors(lambda stored: stored.update(extra=torch.zeros(3))),
}  # fmt: skip


def load() -> None:
    """What every command does with a model: find it, load it, generate with it."""
    loaded = load_for_inference("sft", device_type="cpu", dtype="float32")
    engine = Engine.of(loaded)
    for temperature in (0.0, 1.0):
        engine.generate_batch([[loaded.tokenizer.bos, 65]], max_tokens=4, temperature=temperature)
