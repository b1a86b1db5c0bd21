"""
Evaluation bundles, attention priors, tokenizers and recipes as a stranger might write them. Each
attack spoils a good one, or writes a file of its own; it must be refused in one sentence, or work.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import priors
import torch
from safetensors.torch import save_file

Attack = Callable[[Path], object]
ESCAPE = "\x1b[2J\x1b]0;owned\x07"
LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)


def raw(name: str, data: bytes | str) -> Attack:
    content = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes(content)


def changed(name: str, old: str, new: str) -> Attack:
    def act(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return act


def instead(name: str, make: Callable[[Path], object]) -> Attack:
    """Put something that is no regular file in a file's place."""

    def act(folder: Path) -> None:
        path = folder / name if name else folder
        path.unlink(missing_ok=True)
        make(path)

    return act


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
}
NO_TEXTS: dict[str, bytes | str] = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\xfa\x00\x81",
    "NULs": b"\0" * 4096,
    "escapes": ESCAPE,
    "a pickle": pickle.dumps({"icl_tasks": []}),
    "deep": "[" * 100_000,
}

# ---- evaluation bundles


def row(**fields: object) -> Attack:
    """Change fields of the first row of data."""

    def act(folder: Path) -> None:
        path = folder / "eval_data/some/schema.jsonl"
        first, *others = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps({**json.loads(first), **fields}), *others]))

    return act


YAML, CSV = "core.yaml", "eval_meta_data.csv"
URI = "dataset_uri: some/schema.jsonl"
BUNDLES: dict[str, Attack] = {
    **{f"{name} {kind}": instead(name, make) for name in (YAML, CSV) for kind, make in NO_FILES.items()},
    **{f"{name} {kind}": raw(name, data) for name in (YAML, CSV) for kind, data in NO_TEXTS.items()},
    "billion laughs": changed(YAML, "icl_tasks:", f"{LAUGHS}\nicl_tasks:"),
    "laughs as a kind": changed(YAML, "icl_task_type: schema", "icl_task_type: *a11"),
    "laughs as a label": lambda folder: (folder / YAML).write_text(f"{LAUGHS}\nicl_tasks: [{{label: *a11, dataset_uri: x, num_fewshot: 0, icl_task_type: schema}}]"),
    "an alias of itself": raw(YAML, "icl_tasks: &a [*a]"),
    "a Python object": raw(YAML, "icl_tasks: !!python/object/apply:os.system ['touch owned']"),
    "a tag": raw(YAML, "icl_tasks: !!binary aGVsbG8="),
    "a date": changed(YAML, "label: schema", "label: 2026-01-01"),
    "a label that is a list": changed(YAML, "label: schema", "label: [a, b]"),
    "a label that is null": changed(YAML, "label: schema", "label: null"),
    "a label of a megabyte": changed(YAML, "label: schema", f"label: {'x' * 2**20}"),
    "a label with escapes": changed(YAML, "label: schema", 'label: "\\e[2J"'),
    "shots empty": changed(YAML, "[3]", "[]"),
    "shots a text": changed(YAML, "[3]", "'3'"),
    "shots true": changed(YAML, "[3]", "true"),
    "shots of 5,000 digits": changed(YAML, "[3]", "9" * 5000),
    "shots infinite": changed(YAML, "[3]", ".inf"),
    "a delimiter that is a number": changed(YAML, "label: schema", "label: schema\n  continuation_delimiter: 3"),
    "two documents": raw(YAML, "icl_tasks: []\n---\nicl_tasks: []\n"),
    "flow 5,000 deep": raw(YAML, "icl_tasks: " + "[" * 5000 + "]" * 5000),
    "a file above the folder": changed(YAML, URI, "dataset_uri: ../../secret.jsonl"),
    "an absolute file": changed(YAML, URI, "dataset_uri: /etc/passwd"),
    "a uri with a NUL": changed(YAML, URI, 'dataset_uri: "a\\0b"'),
    "a uri of 100,000 characters": changed(YAML, URI, f"dataset_uri: {'x/' * 50_000}"),
    "a link out of the folder": lambda folder: ((folder / "eval_data/some/schema.jsonl").unlink(), (folder / "eval_data/some/schema.jsonl").symlink_to(folder.parent / "secret.jsonl")),
    "data that are a pipe": instead("eval_data/some/schema.jsonl", os.mkfifo),
    "data that are not UTF-8": raw("eval_data/some/schema.jsonl", b"\xff\xfe\x81"),
    "data that are deep": raw("eval_data/some/schema.jsonl", "[" * 100_000),
    "chance NaN": changed(CSV, "schema,25", "schema,nan"),
    "chance 1e999": changed(CSV, "schema,25", "schema,1e999"),
    "chance of 100,000 digits": changed(CSV, "schema,25", "schema," + "9" * 100_000),
    "a field of a megabyte": changed(CSV, "schema,25", f"schema,25,{'x' * 2**20}"),
    "an open quotation": changed(CSV, "schema,25", 'schema,"25'),
    "shots of 2^50": changed(YAML, "[3]", str(2**50)),
    "shots of 101": changed(YAML, "[3]", "101"),
    "shots in a list of lists": changed(YAML, "[3]", "[[3]]"),
    "shots in base 60": changed(YAML, "[3]", "190:20:30"),
    "shots negative": changed(YAML, "[3]", "-1"),
    "a date that does not exist": changed(YAML, "label: schema", "label: 2026-13-45"),
    "a label that says yes": changed(YAML, "label: schema", "label: yes"),
    "a set": changed(YAML, "label: schema", "label: !!set {a, b}"),
    "a key that is a list": raw(YAML, "? [a, b]\n: 1\nicl_tasks: []\n"),
    "a merge": raw(YAML, "icl_tasks:\n- {<<: {label: x}, <<: {label: y}}\n"),
    "a label twice": lambda folder: (folder / YAML).write_text((folder / YAML).read_text() + "\n" + (folder / YAML).read_text().removeprefix("icl_tasks:")),
    "4,000 tasks": lambda folder: (folder / YAML).write_text("icl_tasks:\n" + "- {label: a, dataset_uri: b}\n" * 4_000),
    "gold of a megabyte": row(gold="x" * 2**20),
    "gold NaN": row(gold=float("nan")),
    "gold true": row(gold=True),
    "gold -1": row(gold=-1),
    "gold of 5,000 digits": raw("eval_data/some/schema.jsonl", '{"context_options": ["a", "b"], "continuation": "x", "gold": ' + "9" * 5000 + "}"),
    "100,000 answers": row(context_options=["a"] * 100_000),
    "answers that are blank": row(context_options=["\u2003", "\n"], continuation=" "),
    "answers that are lists": row(context_options=[["a"], ["b"]]),
    "halves of surrogates": row(continuation="\ud800"),
    "a field twice": raw("eval_data/some/schema.jsonl", '{"gold": 0, "gold": 1, "context_options": ["a", "b"], "continuation": "x"}'),
    "a byte-order mark in the middle": raw("eval_data/some/schema.jsonl", b'{"gold": 0}\n\xef\xbb\xbf{"gold": 0}\n'),
    "a chance of nothing": changed(CSV, "schema,25", "schema,"),
    "a chance in Arabic digits": changed(CSV, "schema,25", "schema,\u0662\u0665"),
    "a chance of -0.0": changed(CSV, "schema,25", "schema,-0.0"),
    "NULs in the table": changed(CSV, "schema,25", "schema,25\0"),
    "a column twice": changed(CSV, "Eval Task,Random baseline", "Eval Task,Random baseline,Eval Task"),
    "a row of 10,000 fields": changed(CSV, "schema,25", "schema," + "25," * 10_000),
}  # fmt: skip

# ---- attention priors


def saved(make: Callable[[], object]) -> Callable[[Path], Path]:
    def act(folder: Path) -> Path:
        torch.save(make(), folder / "prior.pt")
        return folder / "prior.pt"

    return act


def written(**changes: torch.Tensor) -> Callable[[Path], Path]:
    def act(folder: Path) -> Path:
        return Path(priors.write(folder / "prior.safetensors", {**priors.terms(), **changes}))

    return act


def placed(suffix: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def act(folder: Path) -> Path:
        path = folder / f"prior{suffix}"
        make(path)
        return path

    return act


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)


PRIORS: dict[str, Callable[[Path], Path]] = {
    **{f"{suffix} {kind}": placed(suffix, make) for suffix in (".pt", ".safetensors") for kind, make in NO_FILES.items()},
    **{f"{suffix} {kind}": placed(suffix, lambda path, data=data: path.write_bytes(data if isinstance(data, bytes) else data.encode())) for suffix in (".pt", ".safetensors") for kind, data in NO_TEXTS.items()},
    "sparse": saved(lambda: torch.eye(4).to_sparse()),
    "sparse rows": saved(lambda: torch.eye(4).to_sparse_csr()),
    "quantised": saved(quantised),
    "expanded to 2^40 values": saved(lambda: torch.ones(1).expand(2**20, 2**20)),
    "expanded rows": saved(lambda: torch.ones(1, 4).expand(4, 4)),
    "meta": saved(lambda: torch.ones(4, 4, device="meta")),
    "complex": saved(lambda: torch.ones(4, 4, dtype=torch.complex64)),
    "bool": saved(lambda: torch.ones(4, 4) > 0),
    "a number": saved(lambda: 3),
    "a list": saved(lambda: [torch.ones(4, 4)]),
    "a scalar": saved(lambda: torch.tensor(3.0)),
    "no values": saved(lambda: torch.ones(0, 0)),
    "a model": saved(lambda: torch.nn.Linear(2, 2).state_dict()),
    "escapes in a name": lambda folder: (save_file({ESCAPE: torch.ones(2, 2), "key": torch.ones(priors.V)}, folder / "p.safetensors", metadata={"format": "rap-1", "tokenizer": priors.PRINT}), folder / "p.safetensors")[1],
    "a format with escapes": lambda folder: Path(priors.write(folder / "p.safetensors", priors.terms(), format=ESCAPE)),
    "a tokenizer with escapes": lambda folder: Path(priors.write(folder / "p.safetensors", priors.terms(), tokenizer=ESCAPE)),
    "values of float8": written(lag=torch.full((priors.C,), float("nan")).to(torch.float8_e4m3fn)),
    "no columns": written(codes=torch.ones(priors.V, 0, dtype=torch.int8)),
}  # fmt: skip

# ---- tokenizers


def vocabulary(change: Callable[[dict], object]) -> Attack:
    def act(folder: Path) -> None:
        data = json.loads((folder / "tokenizer.json").read_text())
        change(data)
        (folder / "tokenizer.json").write_text(json.dumps(data))

    return act


def ranks(value: object) -> Attack:
    return vocabulary(lambda data: data["model"]["vocab"].update({"a": value}))


def meta(**values: object) -> Attack:
    def act(folder: Path) -> None:
        stored = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**stored, **values}))

    return act


JSON, META = "tokenizer.json", "meta.json"
TOKENIZERS: dict[str, Attack] = {
    **{f"{name} {kind}": instead(name, make) for name in (JSON, META) for kind, make in NO_FILES.items()},
    **{f"{name} {kind}": raw(name, data) for name in (JSON, META) for kind, data in NO_TEXTS.items()},
    **{f"a rank {kind}": ranks(value) for kind, value in (("huge", 10**30), ("negative", -1), ("a float", 0.5), ("a text", "x"), ("null", None), ("a list", [1]), ("NaN", float("nan")))},
    **{f"{name} {kind}": meta(**{name: value}) for name in ("pattern", "fingerprint") for kind, value in (("null", None), ("a list", []), ("an object", {}), ("with escapes", ESCAPE))},
    "a pattern that takes for ever": meta(pattern="(a+)+$"),
    "no model": vocabulary(lambda data: data.pop("model")),
    "a vocabulary that is a list": vocabulary(lambda data: data["model"].update(vocab=[])),
    "a letter outside the alphabet": vocabulary(lambda data: data["model"]["vocab"].update({"\x00": 9})),
    "a million tokens": vocabulary(lambda data: data["model"]["vocab"].update({f"t{i}": i for i in range(100_000)})),
    "other special tokens": vocabulary(lambda data: data["added_tokens"].pop()),
}  # fmt: skip

# ---- recipes


def recipe(text: bytes | str) -> Attack:
    data = text.encode() if isinstance(text, str) else text
    return lambda path: path.write_bytes(data)


VALUES = {
    "a text": '"x"', "a list": "[[1]]", "an object": "{a = 1}", "a date": "2026-01-01", "infinite": "inf", "NaN": "nan",
    "negative": "-7", "huge": "9" * 400, "true": "true", "escapes": '"\\u001b[2J"',
}  # fmt: skip
NAMES = (
    "depth",
    "max_minutes",
    "data",
    "model_tag",
    "compile",
    "seed",
    "softcap",
    "context_stages",
)
RECIPES: dict[str, Attack] = {
    **{kind: instead("", make) for kind, make in NO_FILES.items()},
    **{f"bytes {kind}": recipe(data) for kind, data in NO_TEXTS.items()},
    **{f"{name} {kind}": recipe(f"[base_train]\n{name} = {value}\n") for name in NAMES for kind, value in VALUES.items()},
    "a table of nobody": recipe("[evil]\na = 1\n"),
    "a table with escapes": recipe('["\\u001b[2J"]\na = 1\n'),
    "a knob of nobody": recipe("[all]\n__class__ = 1\n[base_train]\n__class__ = 1\n"),
    "a recipe in a recipe": recipe('[base_train]\nrecipe = "x.toml"\n'),
    "tables 10,000 deep": recipe("[" + ".".join(["a"] * 10_000) + "]\nb = 1\n"),
    "keys 10,000 deep": recipe("[base_train]\n" + ".".join(["a"] * 10_000) + " = 1\n"),
    "two megabytes": recipe("#" * 2**21),
    "the same table twice": recipe("[base_train]\na = 1\n[base_train]\na = 1\n"),
    "tables in a list": recipe("[[base_train]]\ndepth = 1\n"),
}  # fmt: skip
