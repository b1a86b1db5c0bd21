"""What tests share: a model that trains in milliseconds, a feed of given batches, a run."""

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nanochat.base import logbook
from nanochat.base.logbook import Logbook
from nanochat.base.runtime import Runtime
from nanochat.data.feed import Batch
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import checkpoint
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.train.loop import Run, recut
from nanochat.train.optim import MuonAdamW
from nanochat.train.run import make_optimizer
from nanochat.train.schedule import Schedule

PLAIN = Schedule(momentum_warmup=4)
CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1, 42)
RATES = {
    "embedding_lr": 0.2,
    "unembedding_lr": 0.004,
    "matrix_lr": 0.02,
    "gate_lr": 0.05,
    "embedding_beta2": 0.995,
    "unembedding_beta2": 0.96,
    "polynomials": "auto",
    "lr_scale": 1.0,
    "weight_decay": 0.0,
}


def config(**knobs: Any) -> GPTConfig:
    """61 tokens, so the table has 3 padding rows; two query heads share a key-value head."""
    return GPTConfig(
        **{
            "sequence_len": 16,
            "vocab_size": 61,
            "n_layer": 2,
            "n_head": 4,
            "n_kv_head": 2,
            "n_embd": 32,
            **knobs,
        }
    )


def model(seed: int = 1, **knobs: Any) -> GPT:
    m = GPT.build(config(**knobs))
    m.init_weights(seed)
    return m


def randomise(m: GPT, seed: int = 2) -> GPT:
    """Give every weight a value: init_weights leaves the outputs of the blocks at zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.2, generator=g)
    return m


def optimizer(m: GPT, rt: Runtime = CPU, **rates: Any) -> MuonAdamW:
    return make_optimizer(m, SimpleNamespace(**{**RATES, **rates}), rt)


def batch(
    rows: int = 8,
    seed: int = 0,
    T: int = 16,
    vocab: int = 61,
    ignored: float = 0.0,
    weighted: bool = False,
) -> Batch:
    """Random tokens; `ignored` is the mean share of ignored targets, different in every row."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, T + 1), generator=g)
    targets = ids[:, 1:].clone()
    if ignored:
        targets[
            torch.rand(rows, T, generator=g) < ignored * torch.linspace(0, 2, rows)[:, None]
        ] = -1
    return Batch(
        ids[:, :-1].clone(), targets, torch.randn(rows, T, generator=g) if weighted else None
    )


class ListFeed:
    """Given steps, one Batch each, cut into micro-batches of device_rows."""

    def __init__(self, steps: list[Batch], device_rows: int = 64):
        self.steps, self.device_rows, self.step = steps, device_rows, 0

    @classmethod
    def random(cls, n: int, **kwargs: Any) -> "ListFeed":
        return cls([batch(seed=100 + i, **kwargs) for i in range(n)])

    def __next__(self) -> list[Batch]:
        if self.step == len(self.steps):
            raise StopIteration
        self.step += 1
        return recut([self.steps[self.step - 1]], self.device_rows)

    @property
    def progress(self) -> float:
        return self.step / len(self.steps)

    def set_progress(self, progress: float) -> str:
        return ""

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def meta(m: GPT) -> dict[str, Any]:
    return {
        "stage": "base",
        "config": vars(m.config),
        "tokenizer": "f" * 64,
        "knobs": {},
        "horizon": {},
        "dtype": "float32",
        "world_size": 1,
    }


def run(directory: Path, m: GPT, feed: Any = None, **fields: Any) -> Run:
    """A run in `directory` that is ready to fit; feed: by default eight random steps."""
    runtime = fields.pop("runtime", CPU)
    return Run(
        runtime,
        directory,
        Logbook(directory, step=fields.get("step", 0)),
        m,
        fields.pop("optimizer", None) or optimizer(m, runtime),
        feed or ListFeed.random(8),
        meta(m),
        **{"schedule": PLAIN, **fields},
    )


def resumed(directory: Path, m: GPT, feed: Any = None, **fields: Any) -> Run:
    """The run in `directory` at its newest checkpoint."""
    stored = checkpoint.newest(directory)
    again = run(directory, m, feed, step=stored.step, **fields)
    again.restore(stored)
    return again


def act_in_step(patch: Any, step: int, act: Callable[[], Any]) -> None:
    """Call `act` while a run computes its update number `step`; `patch`: pytest's MonkeyPatch."""
    update = MuonAdamW.step

    def acting(optimizer, *rest):
        if optimizer.steps == step - 1:
            act()
        return update(optimizer, *rest)

    patch.setattr(MuonAdamW, "step", acting)


def forkserver() -> BaseContext:
    """Starts processes from a clean one that has imported torch and the training code already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanochat.commands.base_train", "nanochat.train.stage"])
    return context


def start_program(code: str, out: Path, **variables: str) -> BaseProcess:
    """
    Run a program in a process of `forkserver`, with variables of the environment. What it prints
    is in the files stdout and stderr in `out`.
    """
    process = forkserver().Process(target=_program, args=(code, out, variables))
    process.start()
    return process


def _program(code: str, out: Path, variables: dict[str, str]) -> None:
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        with open(out / name, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.update(variables)
    exec(code, {"__name__": "__main__"})


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for what another thread or process is about to do; fails if it does not do it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.01)


def weights(m: GPT) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in m.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def workplace(directory: Path) -> list[str]:
    """Write a tokenizer and a small text; returns flags of a base_train of a second or two."""
    rng = random.Random(0)
    nouns = ["cat", "dog", "boat", "tree", "river", "song", "hat", "stone"]
    verbs = ["sees", "likes", "finds", "follows", "paints", "forgets"]
    sentences = [
        f"The {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)}." for _ in range(3000)
    ]
    lines = [" ".join(rng.choices(sentences, k=rng.randint(2, 9))) for _ in range(600)]
    text = directory / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    Tokenizer.train(lines, 300).save(directory / "tokenizer")
    sizes = ["--depth=2", "--model_dim=32", "--head_dim=8", "--kv_ratio=0.5", "--sequence_len=32"]
    machine = [
        "--total_batch_size=1024",
        "--device_batch_size=16",
        "--device_type=cpu",
        "--dtype=float32",
    ]
    return [
        f"--data=own={text}",
        *sizes,
        *machine,
        "--eval_tokens=2000",
        "--sample_every=0",
        "--model_tag=t",
    ]


def fit(folder, m=None, feed=None, schedule=PLAIN, evaluations=(), **fields):
    """Train a tiny model to the feed's end: (summary, run, model)."""
    m = m or model()
    r = run(folder, m, feed, schedule=schedule, evaluations=evaluations, **fields)
    try:
        return r.fit(), r, m
    finally:
        r.logbook.close()


def rows(folder, kind="train"):
    return [r for r in logbook.read(folder) if r["kind"] == kind]


def losses(folder):
    return [r["loss"] for r in rows(folder)]
