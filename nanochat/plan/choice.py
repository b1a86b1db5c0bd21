"""
Which architecture a budget of time should train: candidates of all sizes, what the budget makes of
each, and a choice among those that fit the memory. The others keep the reason why they lost.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from nanochat.base.common import UserError, duration, print0
from nanochat.base.knobs import knob
from nanochat.model.config import GPTConfig
from nanochat.plan import law, memory, speed
from nanochat.plan.machine import GIB, BudgetKnobs, Machine, budget_seconds
from nanochat.plan.probe import DEPTHS
from nanochat.plan.shapes import OpenSizeKnobs, counts, layer_parameters
from nanochat.train.knobs import MachineKnobs
from nanochat.train.scaling import batch_for, context_for, context_stages

ASPECTS = (48.0, 64.0, 96.0)  # widths per layer that are tried
FEWEST_STEPS = 100  # of the smallest batch: with fewer a schedule has no shape
MICRO_TOKENS = {"cpu": 1 << 13, "mps": 1 << 14, "cuda": 1 << 16}  # per micro-batch without a probe
USABLE = 0.95  # of a card's memory: the driver and the screen take some
SHORTEST = 512  # context that is tried where memory is short
MOST_TRACED = 4  # candidates that fit, the best predictions first, whose memory is traced
EVALUATIONS = 4  # in a run, besides the one before it
EVALUATION_SHARE = 0.006  # of the pretraining time for each of them
OPENING = 6.0  # seconds in which a run opens its data and model and draws its samples
TIE = 0.006  # the noise of seeds: of predictions this near, the usual shape, then the smaller wins


@dataclass(kw_only=True)
class ChoiceKnobs(MachineKnobs, BudgetKnobs, OpenSizeKnobs):
    """Run"""

    pretrain: float = knob(speed.PRETRAIN, "share of the budget for pretraining", low=0.1, high=1)
    total_batch_size: int = knob(0, "tokens per optimizer step; 0 = as for the horizon", low=0)
    device_batch_size: int = knob(0, "rows of a micro-batch; 0 = the fastest that fits", low=0)
    data: tuple[str, ...] = knob((), "text to train on, as for base_train; it goes into the recipe")


@dataclass
class Candidate:
    """An architecture and what the budget makes of it."""

    config: GPTConfig
    contexts: tuple[tuple[float, int], ...]  # (share of the run, context from there on)
    batch: int  # tokens per step
    rows: int  # of a micro-batch
    speed: speed.Speed
    tokens: float
    eval_tokens: int
    bpb: tuple[float, float, float]  # bits per byte with a 90 % interval
    why: str = ""  # it lost
    memory: float = 0.0  # bytes of the device; 0 = not traced
    peak: float | None = None  # bytes that the run will report

    @property
    def size(self) -> int:
        """Parameters of the layers."""
        return layer_parameters(self.config)

    @property
    def parameters(self) -> int:
        return counts(self.config)["total"]

    @property
    def steps(self) -> int:
        return int(self.tokens / self.batch)

    @property
    def accumulation(self) -> int:
        return max(1, self.batch // (self.rows * self.config.sequence_len))

    @property
    def shape(self) -> tuple[int, int]:
        """(depth, width)"""
        return self.config.n_layer, self.config.n_embd

    @property
    def simplicity(self) -> tuple[bool, int]:
        """Decides between equal predictions: the usual shape first, then the smaller model."""
        return abs(self.config.n_embd / self.config.n_layer - 64) > 8, self.size

    def summary(self) -> dict[str, Any]:
        """The candidate as the plan's JSON shows it."""
        bpb, bpb_lo, bpb_hi = self.bpb
        return {
            "depth": self.config.n_layer,
            "model_dim": self.config.n_embd,
            "head_dim": self.config.head_dim,
            "sequence_len": self.config.sequence_len,
            "contexts": self.contexts,
            "total_batch_size": self.batch,
            "device_batch_size": self.rows,
            "steps": self.steps,
            "eval_tokens": self.eval_tokens,
            "parameters": self.parameters,
            "layer_parameters": self.size,
            "tokens": self.tokens,
            "memory_bytes": self.memory or None,
            "peak_memory_bytes": self.peak,
            "tok_per_sec": self.speed.tok_per_sec,
            "tok_per_sec_lo": self.speed.lo,
            "tok_per_sec_hi": self.speed.hi,
            "bpb": bpb,
            "bpb_lo": bpb_lo,
            "bpb_hi": bpb_hi,
            "why": self.why,
        }


@dataclass(frozen=True)
class Choice:
    """The outcome of choose(): the best candidate, a smaller one in reserve, and all others."""

    primary: Candidate
    fallback: Candidate | None
    candidates: list[Candidate]
    seconds: float
    pretraining_seconds: float


class MemoryModel:
    """
    Peak memory as plan.memory predicts it, moved by what a pilot or a probe measured above that. On
    a GPU a run reports what is allocated, elsewhere the whole process.
    """

    def __init__(self, machine: Machine, compiled: bool):
        self.machine, self.compiled = machine, compiled
        self.predictions: dict[str, dict[str, int]] = {}
        self.reported = "allocated" if machine.device_type == "cuda" else "total"
        self.gap, self.margin = machine.memory_gap or 0.0, None
        points = [p for p in machine.points if p["compiled"] == compiled]
        if on_card := [p for p in points if "card_bytes" in p]:
            peaks = [p["peak_memory_bytes"] for p in on_card]
            self.margin = memory.measured_margin(on_card, peaks)
        if machine.memory_gap is None and points:
            small = sorted(points, key=lambda p: p["rows"])[:2]
            self.gap = fmean(p["peak_memory_bytes"] - self._reported_at(p) for p in small)

    def predict(self, config: GPTConfig, rows: int, accumulation: int) -> dict[str, int]:
        """plan.memory.predict for a training step, remembered."""
        micro_batches = min(2, accumulation)
        key = json.dumps([asdict(config), rows, micro_batches])
        if key not in self.predictions:
            self.predictions[key] = memory.predict(
                config,
                rows,
                config.sequence_len,
                dtype=self.machine.dtype,
                device_type=self.machine.device_type,
                compiled=self.compiled,
                margin=self.margin,
                micro_batches=micro_batches,
            )
        return self.predictions[key]

    def report(self, config: GPTConfig, rows: int, accumulation: int) -> float:
        """Bytes that a run would report as its peak, before any correction."""
        return self.predict(config, rows, accumulation)[self.reported]

    def _reported_at(self, point: dict[str, Any]) -> float:
        return self.report(GPTConfig(**point["config"]), point["rows"], point["accumulation"])

    def fill_in(self, candidate: Candidate) -> None:
        """Set what a candidate needs of the device, and what it will report."""
        parts = self.predict(candidate.config, candidate.rows, candidate.accumulation)
        candidate.memory = parts["total"] + self.gap
        candidate.peak = parts[self.reported] + self.gap


def assess(
    knobs: ChoiceKnobs,
    config: GPTConfig,
    machine: Machine,
    the_law: law.Law,
    seconds: float,
    most_rows: int = 1 << 30,
) -> Candidate:
    """What `seconds` of pretraining make of an architecture, including evaluations and opening."""
    T, sources = config.sequence_len, max(1, len(knobs.data))
    staged = machine.device_type != "cpu" and seconds >= 3600 and not knobs.sequence_len
    contexts = context_stages(T) if staged else ((0.0, T),)
    compiling = len(contexts) * speed.first_step(machine, machine.compiles(seconds))
    training = max(0.0, seconds - OPENING - compiling)
    longest, batch = contexts[-1][1], knobs.total_batch_size or 1 << 14
    tokens, rows, rate, eval_tokens = 0.0, 1, speed.Speed(1.0, 1.0, 1.0), 0
    for _ in range(3):  # the batch follows from the tokens, and they follow a little from the batch
        options = [1 << i for i in range(11) if (1 << i) * T <= max(batch, T)]
        rows = min(knobs.device_batch_size, most_rows)
        if not rows:
            options = [r for r in options if r <= most_rows]
            rows = _fastest_rows(config, options, batch, machine)
        rate = _mean_speed(config, contexts, rows * T, batch, machine)
        eval_speed = 2 * rate.tok_per_sec  # a forward pass takes half of a training step's time
        eval_tokens = int(EVALUATION_SHARE * seconds * eval_speed / sources)
        eval_tokens = 1 << min(20, max(13, eval_tokens.bit_length() - 1))
        evaluating = (EVALUATIONS + 1) * sources * eval_tokens / eval_speed
        tokens = max(0.0, training - evaluating) * rate.tok_per_sec
        if not knobs.total_batch_size:
            batch = max(longest, batch_for(tokens) // longest * longest)
    bpb = the_law.interval(layer_parameters(config), max(tokens, 1.0))
    candidate = Candidate(config, contexts, batch, rows, rate, tokens, eval_tokens, bpb)
    if candidate.steps < FEWEST_STEPS:
        candidate.why = f"{candidate.steps} steps are too few"
    return candidate


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
    tok_per_sec = lo = hi = 0.0
    ends = [begin for begin, _ in contexts[1:]] + [1.0]
    for end, (begin, T) in zip(ends, contexts, strict=True):
        rate = speed.tokens_per_second(config, max(1, micro_tokens // T), T, batch, machine)
        tok_per_sec += (end - begin) * rate.tok_per_sec
        lo += (end - begin) * rate.lo
        hi += (end - begin) * rate.hi
    return speed.Speed(tok_per_sec, lo, hi)


def candidates(
    knobs: ChoiceKnobs, machine: Machine, the_law: law.Law, seconds: float
) -> list[Candidate]:
    """
    All candidates worth a look, the best prediction first and those that cannot train in the budget
    last. UserError if none can.
    """
    T = knobs.sequence_len or context_for(speed.usual_flops(machine, seconds))
    depths = (knobs.depth,) if knobs.depth else DEPTHS
    aspects = (64.0,) if knobs.model_dim else ASPECTS
    if knobs.aspect_ratio:
        aspects = (knobs.aspect_ratio,)
    every = [knobs.of_size(depth, aspect, T) for depth in depths for aspect in aspects]
    configs = {(c.n_layer, c.n_embd): c for c in every}
    assessed = [assess(knobs, config, machine, the_law, seconds) for config in configs.values()]
    assessed.sort(key=lambda c: (bool(c.why), c.bpb[0], c.size))
    if assessed[0].why:
        _refuse_budget(knobs, machine, seconds, min(assessed, key=lambda c: c.size))
    return assessed


def _refuse_budget(knobs: ChoiceKnobs, machine: Machine, seconds: float, least: Candidate) -> None:
    c = least.config
    stepping = 1.3 * FEWEST_STEPS * (1 << 12) / least.speed.tok_per_sec
    needed = (OPENING + speed.first_step(machine, False) + stepping) / knobs.pretrain
    smaller = ", or a smaller vocabulary" if c.vocab_size > 4096 else ""
    raise UserError(
        f"{duration(seconds)} of pretraining are too few for any model here: even depth "
        f"{c.n_layer} at width {c.n_embd} with {c.vocab_size:,} tokens makes {least.steps} steps. "
        f"Give at least {max(1, round(needed / 60 + 0.5))} minutes{smaller}"
    )


class _Fitting:
    """Traces the memory of candidates, with fewer rows until they fit."""

    def __init__(self, knobs: ChoiceKnobs, machine: Machine, the_law: law.Law, seconds: float):
        self.arguments = machine, the_law, seconds
        self.knobs, self.machine = knobs, machine
        self.available = machine.memory_bytes * USABLE
        self.memory = MemoryModel(machine, machine.compiles(seconds))
        self.candidates = candidates(knobs, *self.arguments)

    def fits(self, i: int) -> bool:
        """Whether candidate i fits; if it never does, it gets the reason why it lost."""
        c = self.candidates[i]
        if any(o.why.startswith("needs") and o.parameters <= c.parameters for o in self.candidates):
            c.why = "needs more memory than a smaller one that does not fit"
            return False
        self.memory.fill_in(c)
        while c.memory > self.available and c.rows > 1 and not self.knobs.device_batch_size:
            c = assess(self.knobs, c.config, *self.arguments, most_rows=self._fewer_rows(c))
            self.candidates[i] = c
            self.memory.fill_in(c)
        if c.memory > self.available:
            total = self.machine.memory_bytes / GIB
            c.why = f"needs {c.memory / GIB:.1f} of {total:.1f} GiB"
        return not c.why

    def _fewer_rows(self, c: Candidate) -> int:
        """A power of two, at most half: weights and their state stay, the rest follows the rows."""
        state = 12 * c.parameters
        share = max(0.0, self.available - state) / max(1.0, c.memory - state)
        fitting = 1 << max(0, int(c.rows * share).bit_length() - 1)
        return max(1, min(c.rows // 2, fitting))

    def best(self) -> list[Candidate]:
        """Up to MOST_TRACED candidates that fit, best first. UserError if none fits."""
        edge = self.candidates[0].bpb[0] * (1 + TIE)

        def order(i: int) -> tuple:
            c = self.candidates[i]
            return (0, *c.simplicity) if c.bpb[0] <= edge else (1, c.bpb[0])

        fitting: list[Candidate] = []
        for i in sorted(range(len(self.candidates)), key=order):
            if len(fitting) < MOST_TRACED and not self.candidates[i].why and self.fits(i):
                fitting.append(self.candidates[i])
        if not fitting:
            least = min((c for c in self.candidates if c.memory), key=lambda c: c.memory)
            depth, width = least.shape
            raise UserError(
                f"{self.machine.name} has too little memory "
                f"({self.machine.memory_bytes / GIB:.2g} GiB): the smallest candidate, depth "
                f"{depth} at width {width}, needs {least.memory / GIB:.2g} GiB with {least.rows} "
                "rows at a time. Try --sequence_len=256, a smaller vocabulary, --tie_embeddings "
                "or a smaller --depth"
            )
        return sorted(fitting, key=lambda c: c.bpb[0])

    def fallback(self, primary: Candidate) -> Candidate | None:
        """The best candidate of at most two thirds of the primary's size that fits."""
        for i, c in enumerate(self.candidates):
            if not c.why and c.size <= 2 / 3 * primary.size and self.fits(i):
                return self.candidates[i]
        return None


def choose(
    knobs: ChoiceKnobs, machine: Machine, the_law: law.Law, kept: tuple[int, int] | None = None
) -> Choice:
    """
    The best candidate for a budget and the alternatives. `kept` (depth, width), which a pilot
    tried, stays the primary unless another is predicted to be 1 % better. Where memory shuts better
    ones out, a shorter context, which leaves room for them, is tried as well. UserError if the
    budget or the memory is too small.
    """
    seconds = budget_seconds(knobs)
    if not seconds:
        raise UserError("the plan needs a budget for the whole run: give --hours or --minutes")
    pretraining = knobs.pretrain * seconds
    compiled = machine.compiles(pretraining)
    # Eager and compiled steps differ like two machines.
    alike = tuple(p for p in machine.points if p["compiled"] == compiled)
    machine = replace(machine, points=alike or machine.points)
    print0("  tracing the memory of the best candidates")
    fitting = _Fitting(knobs, machine, the_law, pretraining)
    primary = _primary(fitting.best(), kept)
    fallback = fitting.fallback(primary)
    T = primary.config.sequence_len
    shut_out = any(
        c.why.startswith("needs") and c.bpb[0] < primary.bpb[0] for c in fitting.candidates
    )
    if shut_out and not knobs.sequence_len and T > SHORTEST:
        shorter = choose(replace(knobs, sequence_len=T // 2), machine, the_law, kept)
        if shorter.primary.bpb[0] < primary.bpb[0]:
            return shorter
    for c in fitting.candidates:
        c.why = c.why or _reason(c, primary, fallback)
    return Choice(primary, fallback, fitting.candidates, seconds, pretraining)


def _primary(fitting: Sequence[Candidate], kept: tuple[int, int] | None) -> Candidate:
    best = fitting[0].bpb[0]
    first = min((c for c in fitting if c.bpb[0] <= best * (1 + TIE)), key=lambda c: c.simplicity)
    tried = next((c for c in fitting if c.shape == kept), None)
    return tried if tried and tried.bpb[0] <= first.bpb[0] * 1.01 else first


def _reason(c: Candidate, primary: Candidate, fallback: Candidate | None) -> str:
    """Why a candidate that fits was not chosen."""
    if c is primary:
        return "chosen"
    larger, ratio = c.size > primary.size, c.tokens / c.parameters
    if c.bpb[0] <= primary.bpb[0] * (1 + TIE):
        verdict = "as good, " + ("and larger" if larger else "in another shape")
    else:
        verdict = f"too {'large' if larger else 'small'}, {ratio:.1f} tokens per parameter"
    prefix = "fallback: " if c is fallback else ""
    return f"{prefix}{c.bpb[0] - primary.bpb[0]:+.3f}: {verdict}"
