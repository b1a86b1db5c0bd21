"""
What planning knows of a machine and its speed: from points that `plan probe` measured, or from a peak and a stated share of it.

Between points it interpolates; the interval says how well. It refuses a card that the table does not name: another card's figures would
be a guess.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from nanochat.base.common import UserError, base_dir
from nanochat.base.hardware import GPU
from nanochat.base.knobs import knob
from nanochat.base.runtime import compiler_missing
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.plan import arch, law
from nanochat.train.scaling import compile_pays

PRETRAIN = 0.85  # of a budget goes to pretraining
# Share of the peak that a step of training reaches, with a 90 % interval. GPU: tokens a second that users report for an RTX 3090 (depth
# 12), 4070 (depths 12 and 16) and 4090 (124 M parameters) over the table's peaks, 43 to 75 %. CPU: a compiled step on two cores took 41 to
# 50 % of an AVX-512 peak (dev/LOG.md), and 11 % where matrix units lift the peak tenfold and little else: hence a recipe for this machine
# always measures.
SHARES = {"cuda": (0.5, 0.3, 0.75), "mps": (0.3, 0.1, 0.5), "cpu": (0.2, 0.08, 0.5)}
GIB = 1 << 30


@dataclass(kw_only=True)
class BudgetKnobs:
    """Budget"""

    hours: float = knob(0.0, "time for the whole of it, from pretraining to evaluation", low=0)
    minutes: float = knob(0.0, "the same in minutes", low=0)


@dataclass(kw_only=True)
class OpenKnobs(arch.SizeKnobs):
    """Size; 0 = left to the plan"""

    vocab: int = knob(
        0, "tokens of the vocabulary; 0 = those of the tokenizer, 32,768 before there is one", low=0
    )
    depth: int = knob(0, "layers", low=0)
    aspect_ratio: float = knob(0.0, "model width per layer of depth", low=0)
    head_dim: int = knob(
        0, "width of an attention head; 0 = 64 up to a width of 512, then 128", low=0
    )
    sequence_len: int = knob(0, "context length in tokens", low=0)

    def config(self, depth: int, aspect_ratio: float, sequence_len: int) -> GPTConfig:
        """The architecture, what was left to the plan being this."""
        width = self.model_dim or depth * aspect_ratio
        whole = replace(
            self,
            depth=depth,
            aspect_ratio=aspect_ratio,
            sequence_len=sequence_len,
            head_dim=self.head_dim or (64 if width <= 512 else 128),
        )
        return arch.config_for(whole.shape(), whole.arch(), self.vocabulary())

    def vocabulary(self) -> int:
        return self.vocab or (
            Tokenizer.load().vocab_size
            if (base_dir() / "tokenizer" / "tokenizer.json").exists()
            else 32_768
        )


@dataclass(frozen=True)
class Machine:
    """What is known of a machine; points as `measure` gives them, of this machine alone."""

    name: str
    device_type: str
    dtype: str
    memory_bytes: float
    peak_flops: float
    points: tuple[dict[str, Any], ...] = ()
    source: str = ""  # where the figures come from, in words
    factor: float = 1.0  # measured over predicted speed, from a pilot
    memory_gap: float | None = None  # bytes measured above a trace's, from a pilot

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @classmethod
    def of(cls, gpu: GPU) -> "Machine":
        """A card as the table has it."""
        source = f"a share of its peak ({gpu.source})"
        return cls(
            gpu.name, gpu.device_type, gpu.dtype, gpu.memory_gb * GIB, gpu.flops, source=source
        )


@dataclass(frozen=True)
class Speed:
    """Tokens a second with a 90 % interval."""

    tok_per_sec: float
    lo: float
    hi: float


def folder() -> Path:
    """Where plans live."""
    return base_dir() / "plan"


def budget_seconds(k: BudgetKnobs) -> float:
    """The budget in seconds, 0 = none given. UserError for two."""
    if k.hours and k.minutes:
        raise UserError(
            f"--hours={k.hours:g} and --minutes={k.minutes:g} are two budgets: give one of them"
        )
    return k.hours * 3600 or k.minutes * 60


def load(path: Path | str) -> Machine:
    """The machine of a probe's file. UserError when there is none or it is not one."""
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        points = tuple(
            p
            for p in found["points"]
            if (p["name"], p["dtype"]) == (found["machine"]["name"], found["machine"]["dtype"])
        )
        return Machine(**found["machine"], points=points, source=f"measured, {path}")
    except OSError as e:
        raise UserError(
            f"cannot read the probe {path} ({e.strerror}): make one with python -m scripts.plan probe --out {path}"
        ) from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is not what plan probe writes ({type(e).__name__}: {e}): make it anew, or name another file"
        ) from None


def compiles(device_type: str, seconds: float, asked: str = "auto") -> bool:
    """Whether base_train compiles in a budget of so many seconds (train.scaling.compile_pays has the rule)."""
    pays = compile_pays(device_type, seconds)
    return (asked == "on" or (asked == "auto" and pays)) and not compiler_missing(
        torch.device(device_type)
    )


# the model of speed -------------------------------------------------------------------------------------------------------


@dataclass
class _Fit:
    """
    Milliseconds of a micro-batch a token as a + b f and of an update as c + d P (f FLOPs a token, P parameters; none negative), times
    what the nearest points deviate from that, by inverse squared distance in the logarithms of FLOPs, context and tokens of a micro-batch.
    """

    points: Sequence[Mapping[str, Any]]
    micro: np.ndarray = field(init=False)
    update: np.ndarray = field(init=False)
    at: np.ndarray = field(init=False)
    off: np.ndarray = field(init=False)

    def __post_init__(self):
        f, p, tokens, T = (
            np.array(x, dtype=float) for x in zip(*map(_measures, self.points), strict=True)
        )
        micro = np.array([q["micro_ms"] for q in self.points]) / tokens
        update = np.array([q["update_ms"] for q in self.points])
        parts = np.stack([np.ones_like(f), f / f.mean()], 1) / micro[:, None]
        alike = (
            0.03 / micro.mean() * np.array([[1.0, -1.0]])
        )  # points of a single f do not tell a from b: half each, then
        self.micro = nnls(np.concatenate([parts, alike]), np.append(np.ones_like(f), 0.0))[0] / (
            1.0,
            f.mean(),
        )
        self.update = nnls(np.stack([np.ones_like(p), p], 1) / update[:, None], np.ones_like(p))[0]
        self.at = _place(f, T, tokens)
        self.off = np.log(micro / (self.micro[0] + self.micro[1] * f))

    def step_ms(self, f: float, p: float, T: int, rows: int, total: int) -> tuple[float, float]:
        """(milliseconds of a step, distance to the nearest point)."""
        d2 = ((self.at - _place(np.array(f), np.array(T), np.array(rows * T))) ** 2).sum(-1)
        off = float(np.average(self.off, weights=1 / (d2 + 0.003)))
        micro = (self.micro[0] + self.micro[1] * f) * np.exp(off)
        return float(total * micro + self.update[0] + self.update[1] * p), float(np.sqrt(d2.min()))


def _measures(p: Mapping[str, Any]) -> tuple[float, float, float, float]:
    return (
        p["flops_per_token"],
        p["parameters"],
        p["rows"] * p["config"]["sequence_len"],
        p["config"]["sequence_len"],
    )


def _place(f: np.ndarray, T: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.stack([np.log(f), 0.5 * np.log(T), 0.5 * np.log(tokens)], axis=-1)


@cache
def _model(text: str) -> tuple[GPT, dict[str, int]]:
    model = arch.model_of(GPTConfig(**json.loads(text)))
    return model, model.counts()


@cache
def _flops(text: str, T: int) -> float:
    return _model(text)[0].flops_per_token(T)


def counts(config: GPTConfig) -> dict[str, int]:
    """arch.counts, remembered: a plan asks for the same hundred architectures again and again."""
    return _model(json.dumps(asdict(config), sort_keys=True))[1]


def size(config: GPTConfig) -> int:
    """Parameters of the layers: the N of the law."""
    return counts(config)["transformer"]


def flops_per_token(config: GPTConfig, T: int) -> float:
    """Training FLOPs of a token in rows of T, remembered."""
    return _flops(json.dumps(asdict(config), sort_keys=True), T)


def tokens_per_second(config: GPTConfig, rows: int, T: int, total: int, machine: Machine) -> Speed:
    """
    Tokens a second of steps of `total` tokens in micro-batches of `rows` rows of T tokens. With points the interval comes from leaving
    each one out in turn, narrower at a point (3 %) and wider away from all of them, and from how far they drifted. Without, it is that of
    SHARES, and three times as deep on a GPU below a width of 512, where starting kernels takes longer than running them.
    """
    f, p = flops_per_token(config, T), counts(config)["total"]
    good = [q for q in machine.points if "error" not in q]
    if not good:
        middle, lo, hi = (
            machine.factor * s * machine.peak_flops / f for s in SHARES[machine.device_type]
        )
        narrow = machine.device_type != "cpu" and config.n_embd < 512
        return Speed(middle, lo / 3 if narrow else lo, hi)
    ms, distance = _Fit(good).step_ms(f, p, T, rows, total)
    misses = []
    for i, q in enumerate(good if len(good) > 2 else ()):
        n = q["accumulation"] * q["rows"] * q["config"]["sequence_len"]
        guess, _ = _Fit(good[:i] + good[i + 1 :]).step_ms(
            *_measures(q)[:2], q["config"]["sequence_len"], q["rows"], n
        )
        misses.append(np.log(guess / q["step_ms"]))
    typical = float(np.sqrt(np.mean(np.square(misses)))) if misses else 0.15
    drift = float(np.sqrt(np.mean([q.get("drift", 0.0) ** 2 for q in good])))
    error = math.hypot(0.03, drift, typical * min(1.0, distance / 0.5)) + 0.1 * max(
        0.0, distance - 0.7
    )
    rate = machine.factor * total / ms * 1e3
    return Speed(
        rate, rate * float(np.exp(-law.Z90 * error)), rate * float(np.exp(law.Z90 * error))
    )


def usual_share(machine: Machine) -> float:
    """Share of the peak that training reaches here, as its points have it in the middle, or by SHARES."""
    seen = [
        p["tok_per_sec"] * p["flops_per_token"] / machine.peak_flops
        for p in machine.points
        if "error" not in p
    ]
    return machine.factor * (median(seen) if seen else SHARES[machine.device_type][0])


def promise(config: GPTConfig, machine: Machine, seconds: float, the_law: law.Law) -> float:
    """Bits per byte after `seconds` at the usual share of the peak: which sizes are worth a look, before any closer prediction."""
    flops = usual_share(machine) * machine.peak_flops * seconds
    return the_law.bpb(size(config), max(1.0, flops / flops_per_token(config, config.sequence_len)))


def first_step(machine: Machine, compiled: bool) -> float:
    """Seconds that the first step takes longer than others: half a minute to compile on two cores (dev/LOG.md), or what the points say."""
    seen = [
        p["first_step_s"] for p in machine.points if "error" not in p and p["compiled"] == compiled
    ]
    return median(seen) if seen else 30.0 if compiled else 0.0
