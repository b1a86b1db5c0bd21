"""
Which architecture a budget of time should train: candidates of all sizes, what the budget makes of
each, and a choice among those that fit the memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NoReturn

import numpy as np

from nanochat.base.common import UserError, duration
from nanochat.base.knobs import knob
from nanochat.model.config import GPTConfig
from nanochat.plan import memory, speed
from nanochat.plan.law import Law, Text, worth
from nanochat.plan.machine import GIB, Machine, budget_seconds
from nanochat.plan.probe import DEPTHS
from nanochat.plan.shapes import OpenSizeKnobs, counts, layer_parameters
from nanochat.train.knobs import MachineKnobs
from nanochat.train.scaling import (
    PRETRAIN,
    batch_for,
    context_for,
    context_stages,
    evaluation_tokens,
    evaluations_within,
    pilot_seconds,
    stage_seconds,
)

ASPECTS = (48.0, 64.0, 96.0)  # widths per layer that are tried
FEWEST_STEPS = 100  # of the smallest batch: with fewer a schedule has no shape
MICRO_TOKENS = {"cpu": 1 << 13, "mps": 1 << 14, "cuda": 1 << 16}  # per micro-batch without a probe
USABLE = 0.95  # of a card's memory: the driver and the screen take some
SHORTEST = 512  # context that is tried where memory is short
OPENING = 6.0  # seconds in which a run opens its data and model and draws its samples
TIE = 0.006  # the noise of seeds: of predictions this near, the usual shape, then the smaller wins


@dataclass(kw_only=True)
class ChoiceKnobs(MachineKnobs, OpenSizeKnobs):
    """Run"""

    pretrain: float = knob(PRETRAIN, "share of the budget that pretraining gets", low=0.1, high=1)
    used: float = knob(0.0, "seconds of the budget that are used up already", low=0)
    pilot: bool = knob(False, "leave a twelfth of the time for plan pilot, from 25 minutes on")
    total_batch_size: int = knob(0, "tokens per optimizer step; 0 = as for the horizon", low=0)
    device_batch_size: int = knob(0, "rows of a micro-batch; 0 = the fastest that fits", low=0)
    data: tuple[str, ...] = knob((), "text to train on, as for base_train; it goes into the recipe")

    def stages(self) -> dict[str, float]:
        """Seconds of every stage, a pilot first. UserError if no budget is given."""
        seconds = budget_seconds(self)
        if not seconds:
            raise UserError("the plan needs a budget for the whole run: give --hours or --minutes")
        left = max(1.0, seconds - self.used)
        pilot = pilot_seconds(left) if self.pilot else 0.0
        return {"pilot": pilot, **stage_seconds(left - pilot, self.pretrain)}

    def pretraining_seconds(self) -> float:
        """The seconds of pretraining. UserError if no budget is given."""
        return self.stages()["base_train"]


@dataclass
class Candidate:
    """An architecture and what the budget makes of it; the plan's JSON holds these fields."""

    config: GPTConfig
    contexts: tuple[tuple[float, int], ...]  # (share of the run, context from there on)
    total_batch_size: int
    device_batch_size: int
    speed: speed.Speed
    tokens: float
    eval_tokens: int
    bpb: tuple[float, float, float]  # bits per byte with a 90 % interval
    why: str = ""  # it cannot train
    memory_bytes: float = 0.0  # of the device
    peak_memory_bytes: float = 0.0  # that the run will report

    @property
    def size(self) -> int:
        """Parameters of the layers."""
        return layer_parameters(self.config)

    @property
    def parameters(self) -> int:
        return counts(self.config)["total"]

    @property
    def steps(self) -> int:
        return int(self.tokens / self.total_batch_size)

    @property
    def accumulation(self) -> int:
        return max(1, self.total_batch_size // (self.device_batch_size * self.config.sequence_len))

    @property
    def shape(self) -> tuple[int, int]:
        """(depth, width)"""
        return self.config.n_layer, self.config.n_embd

    @property
    def simplicity(self) -> tuple[bool, int]:
        """Decides between equal predictions: the usual shape first, then the smaller model."""
        return abs(self.config.n_embd / self.config.n_layer - 64) > 8, self.size


@dataclass(frozen=True)
class Choice:
    """What choose() found: the best candidate, a smaller and a larger one, and all of them."""

    primary: Candidate
    fallback: Candidate | None
    larger: Candidate | None
    candidates: list[Candidate]


class MemoryModel:
    """
    Peak memory as plan.memory predicts it, moved by what a pilot or a probe measured above that. On
    a GPU a run reports what is allocated, elsewhere the whole process.
    """

    def __init__(self, machine: Machine, compiled: bool):
        self.machine, self.compiled = machine, compiled
        self.gap, self.margin = machine.memory_gap or 0.0, None
        points = [p for p in machine.points if p["compiled"] == compiled]
        if on_card := [p for p in points if "card_bytes" in p]:
            peaks = [p["peak_memory_bytes"] for p in on_card]
            self.margin = memory.measured_margin(on_card, peaks)
        if machine.memory_gap is None and points:
            gaps = []
            for p in sorted(points, key=lambda p: p["rows"])[:2]:
                config = GPTConfig(**p["config"])
                _, reported = self.predict(config, p["rows"], p["accumulation"])
                gaps.append(p["peak_memory_bytes"] - reported)
            self.gap = fmean(gaps)

    def predict(self, config: GPTConfig, rows: int, accumulation: int) -> tuple[float, float]:
        """Bytes of the device that training needs, and the peak that a run will report."""
        parts = memory.predict(
            config,
            rows,
            config.sequence_len,
            dtype=self.machine.dtype,
            device_type=self.machine.device_type,
            compiled=self.compiled,
            margin=self.margin,
            micro_batches=min(2, accumulation),
            world_size=self.machine.gpus,
        )
        reported = parts["allocated" if self.machine.device_type == "cuda" else "total"]
        return parts["total"] + self.gap, reported + self.gap


def assess(
    knobs: ChoiceKnobs,
    config: GPTConfig,
    machine: Machine,
    law: Law,
    text: Text = (),
    most_rows: int = 1 << 30,
) -> Candidate:
    """What the budget makes of an architecture, including evaluations and opening."""
    seconds = knobs.pretraining_seconds()
    T, sources = config.sequence_len, max(1, len(knobs.data))
    staged = machine.device_type != "cpu" and seconds >= 3600 and not knobs.sequence_len
    contexts = context_stages(T) if staged else ((0.0, T),)
    compiling = len(contexts) * speed.first_step(machine, machine.compiles(seconds))
    training = max(0.0, seconds - OPENING - compiling)
    longest, batch = contexts[-1][1], knobs.total_batch_size or 1 << 14
    tokens, rows, rate, eval_tokens = 0.0, 1, speed.Speed(1.0, 1.0, 1.0), 0
    for _ in range(3):  # the batch follows from the tokens, and they follow a little from the batch
        rows = knobs.device_batch_size
        if not rows:
            options = [1 << i for i in range(11) if (1 << i) * T <= max(batch, T)]
            options = [r for r in options if r <= most_rows]
            rows = _fastest_rows(config, options, batch, machine)
        rate = _mean_speed(config, contexts, rows * T, batch, machine)
        eval_speed = 2 * rate.tok_per_sec  # a forward pass takes half of a training step's time
        evaluations = evaluations_within(seconds)
        eval_tokens = evaluation_tokens(seconds * rate.tok_per_sec, sources, evaluations)
        evaluating = (evaluations + 1) * sources * eval_tokens / eval_speed
        tokens = max(0.0, training - evaluating) * rate.tok_per_sec
        if not knobs.total_batch_size:
            batch = max(longest, batch_for(tokens) // longest * longest)
    bpb = _expected(law, layer_parameters(config), tokens, rate, text)
    candidate = Candidate(config, contexts, batch, rows, rate, tokens, eval_tokens, bpb)
    if candidate.steps < FEWEST_STEPS:
        candidate.why = f"{candidate.steps} steps are too few"
    return candidate


def _expected(
    law: Law, n: int, tokens: float, rate: speed.Speed, text: Text
) -> tuple[float, float, float]:
    """Bits per byte with the interval of the law, and of the speed that decides the tokens."""
    middle, lo, hi = law.interval(n, max(1.0, worth(tokens, text)))
    fast, slow = (
        abs(math.log(law.bpb(n, max(1.0, worth(tokens * r / rate.tok_per_sec, text))) / middle))
        for r in (rate.hi, rate.lo)
    )
    better = math.exp(math.hypot(math.log(middle / lo), fast))
    worse = math.exp(math.hypot(math.log(hi / middle), slow))
    return middle, middle / better, middle * worse


def _fastest_rows(config: GPTConfig, options: Sequence[int], batch: int, machine: Machine) -> int:
    """
    Rows of a micro-batch: the fastest of those within the range of a probe (fewer where that costs
    under 2 %), else as many as are usual.
    """
    T = config.sequence_len
    probed = [p["rows"] * p["config"]["sequence_len"] for p in machine.points]
    within = [r for r in options if probed and 0.7 * min(probed) <= r * T <= 1.5 * max(probed)]
    if not within:
        usual = MICRO_TOKENS[machine.device_type]
        return max([r for r in options if r * T <= usual], default=1)
    rates = {r: speed.tokens_per_second(config, r, T, batch, machine).tok_per_sec for r in within}
    return min(r for r in within if rates[r] >= 0.98 * max(rates.values()))


def _mean_speed(
    config: GPTConfig,
    contexts: Sequence[tuple[float, int]],
    micro_tokens: int,
    batch: int,
    machine: Machine,
) -> speed.Speed:
    """The mean over context stages, by their time; a micro-batch keeps its tokens."""
    begins, lengths = zip(*contexts, strict=True)
    rates = [
        speed.tokens_per_second(config, max(1, micro_tokens // T), T, batch, machine)
        for T in lengths
    ]
    return speed.Speed(*np.average(rates, axis=0, weights=np.diff([*begins, 1.0])).tolist())


def fitted(
    knobs: ChoiceKnobs,
    config: GPTConfig,
    machine: Machine,
    law: Law,
    text: Text,
    memory: MemoryModel,
) -> Candidate:
    """As assess(), with its memory: with fewer rows until it fits, or with the reason why not."""
    c = assess(knobs, config, machine, law, text)
    usable, state = USABLE * machine.memory_bytes, 12 * c.parameters
    while True:
        rows = c.device_batch_size
        needed, peak = memory.predict(config, rows, c.accumulation)
        if needed <= usable or rows == 1 or knobs.device_batch_size:
            break
        # Weights and their state stay, and the rest follows the rows.
        share = max(0.0, usable - state) / max(1.0, needed - state)
        most_rows = max(1, min(rows // 2, int(rows * share)))
        c = assess(knobs, config, machine, law, text, most_rows)
    c.memory_bytes, c.peak_memory_bytes = needed, peak
    if needed > usable:
        c.why = f"needs {needed / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB"
    return c


def candidates(knobs: ChoiceKnobs, machine: Machine, law: Law, text: Text = ()) -> list[Candidate]:
    """
    All candidates, the best prediction first and those that cannot train last. UserError if none
    can in the budget.
    """
    seconds = knobs.pretraining_seconds()
    T = knobs.sequence_len or context_for(speed.usual_flops(machine, seconds))
    depths = (knobs.depth,) if knobs.depth else DEPTHS
    aspects = (64.0,) if knobs.model_dim else ASPECTS
    if knobs.aspect_ratio:
        aspects = (knobs.aspect_ratio,)
    every = [knobs.of_size(depth, aspect, T) for depth in depths for aspect in aspects]
    configs = {(c.n_layer, c.n_embd): c for c in every}
    memory = MemoryModel(machine, machine.compiles(seconds))
    assessed = [fitted(knobs, c, machine, law, text, memory) for c in configs.values()]
    assessed.sort(key=lambda c: (bool(c.why), c.bpb[0], c.size))
    if any(c.steps >= FEWEST_STEPS for c in assessed):
        return assessed
    least = min(assessed, key=lambda c: c.size)
    depth, width = least.shape
    vocab = least.config.vocab_size
    stepping = 1.3 * FEWEST_STEPS * (1 << 12) / least.speed.tok_per_sec
    needed = (OPENING + speed.first_step(machine, False) + stepping) / knobs.pretrain
    smaller = ", or a smaller vocabulary" if vocab > 4096 else ""
    raise UserError(
        f"{duration(seconds)} of pretraining is too short for any model here: even depth "
        f"{depth} at width {width} with a vocabulary of {vocab:,} gets only "
        f"{least.steps} steps. Give at least {max(1, round(needed / 60 + 0.5))} minutes{smaller}"
    )


def choose(
    knobs: ChoiceKnobs,
    machine: Machine,
    law: Law,
    text: Text = (),
    kept: tuple[int, int] | None = None,
) -> Choice:
    """
    The best candidate for a budget and a text, and beside it the best of at most two thirds of its
    size and of at least one and a half times: of predictions as good as the best one that fits, the
    simplest. `kept` (depth, width), which a pilot tried, stays the primary unless another is
    predicted to be 1 % better. Where memory shuts better ones out, a shorter context, which leaves
    room for them, is tried as well. UserError if the budget or the memory is too small.
    """
    compiled = machine.compiles(knobs.pretraining_seconds())
    # Eager and compiled steps differ like two machines.
    alike = tuple(p for p in machine.points if p["compiled"] == compiled)
    machine = replace(machine, points=alike or machine.points)
    every = candidates(knobs, machine, law, text)
    fitting = [c for c in every if not c.why] or _refuse_memory(every, machine)
    primary = _primary(fitting, kept)
    T = primary.config.sequence_len
    shut_out = any(c.why.startswith("needs") and c.bpb[0] < primary.bpb[0] for c in every)
    if shut_out and not knobs.sequence_len and T > SHORTEST:
        shorter = choose(replace(knobs, sequence_len=T // 2), machine, law, text, kept)
        if shorter.primary.bpb[0] < primary.bpb[0]:
            return shorter
    smaller = next((c for c in fitting if c.size <= 2 / 3 * primary.size), None)
    larger = next((c for c in fitting if c.size >= 1.5 * primary.size), None)
    return Choice(primary, smaller, larger, every)


def _primary(fitting: Sequence[Candidate], kept: tuple[int, int] | None) -> Candidate:
    """The candidate to train, see choose()."""
    equal = [c for c in fitting if c.bpb[0] <= fitting[0].bpb[0] * (1 + TIE)]
    primary = min(equal, key=lambda c: c.simplicity)
    tried = next((c for c in fitting if c.shape == kept), None)
    return tried if tried and tried.bpb[0] <= primary.bpb[0] * 1.01 else primary


def _refuse_memory(every: Sequence[Candidate], machine: Machine) -> NoReturn:
    least = min(every, key=lambda c: c.memory_bytes)
    depth, width = least.shape
    raise UserError(
        f"{machine.name} has too little memory ({machine.memory_bytes / GIB:.2g} GiB): the "
        f"smallest candidate, depth {depth} at width {width}, needs "
        f"{least.memory_bytes / GIB:.2g} GiB with {least.device_batch_size} rows at a time. "
        "Try --sequence_len=256, a smaller vocabulary, --tie_embeddings or a smaller --depth"
    )
