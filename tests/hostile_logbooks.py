"""Log books (metrics.jsonl) and comparisons (runs.jsonl) as a stranger might write them: each attack is lines to append or a whole file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from nanochat.base import logbook
from nanochat.commands import summary
from nanochat.eval.scores import stage_results, stage_table
from nanochat.study.records import read_records, record
from nanochat.study.report import write_report

ESCAPE = "\x1b[2J\x1b]0;owned\x07"
TRAIN = {
    "kind": "train",
    "step": 7,
    "tokens": 7000,
    "seconds": 7.0,
    "progress": 0.5,
    "loss": 3.0,
    "lr_mult": 1.0,
    "tok_per_sec": 100.0,
    "peak_share": 0.1,
}
EVAL = {"kind": "eval", "step": 7, "tokens": 7000, "seconds": 7.0, "val_bpb": 2.0}
CHAT = {
    "kind": "chat_eval",
    "step": 3,
    "stage": "base",
    "accuracy": 0.5,
    "n": 10,
    "lo": 0.3,
    "hi": 0.7,
    "chance": 0.25,
    "kinds": {"x": {"accuracy": 0.5, "n": 10, "lo": 0.3, "hi": 0.7, "chance": 0.2}},
}
VALUES = {
    "a text": "x",
    "a list": [1],
    "an object": {"a": 1},
    "true": True,
    "huge": 10**400,
    "negative": -5,
    "null": None,
    "NaN": float("nan"),
    "1e400": float("inf"),
    "escapes": ESCAPE,
    "2.5": 2.5,
    "1e308": 1e308,
    "2^53 + 1": 2**53 + 1,
    "false": False,
    "half a surrogate pair": "\ud800",
}


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def score(**fields: object) -> bytes:
    return line(**{**CHAT, "kinds": {ESCAPE + "<script>": {**CHAT["kinds"]["x"], **fields}}})


LOGBOOKS: dict[str, bytes | Callable[[Path], object]] = {
    **{f"{name} {kind} in a training row": line(**{**TRAIN, name: value}) for name in ("step", "tokens", "seconds", "loss", "tok_per_sec", "progress") for kind, value in VALUES.items()},
    **{f"{name} {kind} in an evaluation": line(**{**EVAL, name: value}) for name in ("step", "tokens", "val_bpb", "kind") for kind, value in VALUES.items()},
    **{f"{name} {kind} in an accuracy": line(**{**CHAT, name: value}) for name in ("accuracy", "n", "lo", "kinds", "tasks", "stage", "task") for kind, value in VALUES.items()},
    **{f"{name} {kind} in a kind's accuracy": score(**{name: value}) for name in ("accuracy", "n", "hi", "chance") for kind, value in VALUES.items()},
    **{f"a training row without {name}": line(**{k: v for k, v in TRAIN.items() if k != name}) for name in TRAIN},
    **{f"an evaluation without {name}": line(**{k: v for k, v in EVAL.items() if k != name}) for name in EVAL},
    "a summary of nothing": line(kind="summary"),
    "a summary of null": line(kind="summary", step=None, tokens=None, seconds=None),
    "a summary of NaN": line(kind="summary", step=9, tokens=None, seconds=None, nonfinite={"tokens": "nan", "seconds": "nan"}),
    "a start from a list of stages": line(kind="start", step=5, time=["x"], config={"knobs": {"source": ["sft", {}]}}),
    "an accuracy of nothing": line(kind="chat_eval", accuracy=0.5),
    "no speed at all": line(**{**TRAIN, "tok_per_sec": 0.0}),
    "an evaluation at a step that was never trained": line(**{**EVAL, "step": 10**6}),
    "nonfinite of a stranger": line(**{**TRAIN, "nonfinite": {"loss": "x", "kind": "nan", "tokens": "nan"}}),
    "nonfinite a list": line(**{**TRAIN, "nonfinite": [1]}),
    "nonfinite an object of objects": line(**{**TRAIN, "nonfinite": {"loss": {}}}),
    "a start without config": line(kind="start", step=0),
    "a start with an empty config": line(kind="start", step=0, config={}),
    "a start with a config of texts": line(kind="start", step=0, config={"config": "x", "knobs": "y", "horizon": "z"}),
    "a start with a billion layers": line(kind="start", step=0, config={"config": {"n_layer": 10**9, "n_head": 1, "n_embd": 2, "vocab_size": 9}, "knobs": {}, "horizon": {"rows": 1, "compiled": False}, "dtype": "float32"}),
    "a start with strange stages of context": line(kind="start", step=0, config={"config": {"n_layer": 1}, "knobs": {"context_stages": 5}, "horizon": {"rows": 1, "compiled": False}, "dtype": "float32"}),
    "a start deep": b'{"kind": "start", "step": 0, "config": ' + b'{"a":' * 900 + b"1" + b"}" * 901 + b"\n",
    "samples with escapes and markup": line(kind="sample", step=6, **{f"sample/{ESCAPE}<b>": f"{ESCAPE}<script>alert(1)</script>"}),
    "a sample that is no text": line(kind="sample", step=6, **{"sample/a": {"b": [1]}, "sample/": None}),
    "not UTF-8": b"\xff\xfe{}\n",
    "NULs": bytes(1000) + b"\n",
    "100,000 deep": b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "a number of 10,000 digits": b'{"kind": "train", "step": ' + b"9" * 10_000 + b"}\n",
    "lists, numbers and null": b"[]\n7\nnull\ntrue\n\"x\"\n",
    "a line without an end": b'{"kind": "tr',
    "a line of 3 MB": b'{"kind": "' + b"x" * 3_000_000 + b'"}\n',
    "100,000 fields": line(**{f"k{i}": i for i in range(100_000)}),
    "5,000 restarts": b"".join(line(**{**TRAIN, "step": i}) for i in range(5000)) + line(kind="start", step=4999) * 5000,
    "restarts that each lose a row": b"".join(line(**{**TRAIN, "step": i}) for i in range(2000)) + b"".join(line(kind="start", step=1999 - i) for i in range(1000)),
    "a restart from a step that never was": line(kind="start", step=10**15),
    "a restart without a step": line(kind="start", step=None),
    "a thousand sources": line(**{**EVAL, **{f"val_bpb/{i}": 1.0 for i in range(1000)}}),
    "a source of a megabyte": line(**{**EVAL, "val_bpb/" + "x" * 2**20: 1.0}),
    "a source of mathematics": line(**{**EVAL, "val_bpb/$\\frac{$": 1.0, "val_bpb/\\$x^": 1.0, "val_bpb/_": 1.0, "val_bpb/": 1.0}),
    "a source of surrogates and markup": line(**{**EVAL, "val_bpb/\ud800</svg><script>": 1.0}),
    "a band upside down": line(**{**EVAL, "val_bpb_lo": 9.0, "val_bpb_hi": -9.0}),
    "times that run backwards": b"".join(line(**{**TRAIN, "step": 10 + i, "seconds": 100.0 - i}) for i in range(50)),
    "times of 1e308": b"".join(line(**{**TRAIN, "step": 10 + i, "seconds": 1e308, "loss": 1e308}) for i in range(600)),
    "losses of 5e-324": line(**{**TRAIN, "loss": 5e-324, "tokens": 2**53}),
    "a thousand samples": line(kind="sample", step=6, **{f"sample/{i}": "x" for i in range(1000)}),
    "100,000 kinds": line(**{**CHAT, "kinds": {str(i): {} for i in range(20_000)}}),
    "a summary that spent nothing": line(kind="summary", step=9, seconds=0.0, spent={"steps": 1.0}),
    "a summary that spent more than all": line(kind="summary", step=9, seconds=1.0, spent={"steps": 1e308, "x": -1e308}),
    "a summary that spent texts": line(kind="summary", step=9, seconds=1.0, spent={"steps": "x"}),
    "a beginning that is no time": line(kind="start", step=5, time={"a": 1}, config={"machine": {"name": ESCAPE}, "origins": {"a": [1]}, "knobs": {"a": {"b": 1}}}),
    "settings of a megabyte": line(kind="start", step=5, time="x" * 2**20, config={"knobs": {"x" * 2**20: "y" * 2**20}, "machine": [1], "world_size": "\ud800"}),
    "empty": lambda path: path.write_bytes(b""),
    "a picture": lambda path: path.write_bytes(os.urandom(10_000)),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "/dev/zero": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "sparse, 1 TB": lambda path: (path.unlink(), path.touch(), os.truncate(path, 2**28)),
}  # fmt: skip

RUN = {
    "condition": "a",
    "seed": 1,
    "steps": 4,
    "tokens": 4000,
    "final_bpb": 1.5,
    "step_ms": 10.0,
    "seconds": 4.0,
    "wall_seconds": 5.0,
    "peak_memory_bytes": 10,
    "parameters": 100,
    "flops_per_token": 1e4,
    "curve": [[0, 0, 0.0, 8.0], [2, 2000, 2.0, 3.0], [4, 4000, 4.0, 1.5]],
    "pins": {},
}
RECORDS = {
    **{f"{name} {kind}": line(**{**RUN, name: value}) for name in ("condition", "seed", "curve", "step_ms", "pins", "final_bpb") for kind, value in VALUES.items()},
    **{f"without {name}": line(**{k: v for k, v in RUN.items() if k != name}) for name in RUN},
    "a curve of short points": line(**{**RUN, "curve": [[1, 2]]}),
    "a curve of nulls": line(**{**RUN, "curve": [[None] * 4]}),
    "half a line": b'{"condition": ',
    "a list": b"[]\n",
    "deep": b"[" * 100_000,
}  # fmt: skip


def spoil(attack: bytes | Callable[[Path], object], file: Path) -> None:
    if callable(attack):
        attack(file)
    else:
        file.write_bytes(file.read_bytes() + attack)


def read_everything(run: Path, out: Path) -> None:
    """What the commands report, summary, export and compare make of the log book of a run."""
    rows = logbook.read(run)
    figures = summary.stage_figures(run.name)
    if figures:
        summary.table(figures)
    stage_table(stage_results({"sft": rows}))
    if rows:
        write_report([run], out)
        page = out.read_text(encoding="utf-8")
        assert "<script>" not in page and "\x1b" not in page
    record(run)


def compare(file: Path) -> None:
    from nanochat.study.statistics import analyse

    runs = read_records(file)
    analyse([run for run in runs if not run.get("error")], {"a": ""}, None)
