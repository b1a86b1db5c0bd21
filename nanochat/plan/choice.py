"""
Which architecture a budget of time should train: candidates of all sizes, what the budget makes of
each, and a choice among those that fit the memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from nanochat.base.common import UserError, duration, human
from nanochat.base.knobs import knob
from nanochat.data.inventory import LIMIT
from nanochat.data.sources import only_tinyworld, parse_sources
from nanochat.model.config import GPTConfig
from nanochat.plan import memory, speed
from nanochat.plan.law import Z90, Law, Text, law_of, worth
from nanochat.plan.machine import GIB, Machine
from nanochat.plan.probe import DEPTHS
from nanochat.plan.shapes import OpenSizeKnobs, counts
from nanochat.train.scaling import (
    EVALUATING,
    MOST_EVAL_TOKENS,
    PRETRAIN,
    SAMPLING,
    TOKENS_PER_PARAMETER,
    USEFUL_PASSES,
    batch_for,
    bytes_per_token,
    context_for,
    context_stages,
    evaluations_within,
    pilot_seconds,
    stage_seconds,
    whole_rows,
)

ASPECTS = (48.0, 64.0, 96.0)  # widths per layer that are tried
FEWEST_STEPS = 100  # of the smallest batch: with fewer a schedule has no shape
MICRO_TOKENS = {"cpu": 1 << 13, "mps": 1 << 14, "cuda": 1 << 16}  # per micro-batch without a probe
SHORTEST = 512  # context that is tried where memory is short
OPENING = 6.0  # seconds in which a run opens its data and model
TIE = 0.01  # nearer predictions are equal for a law that does not know depth, and after a pilot


@dataclass(kw_only=True)
class ChoiceKnobs(OpenSizeKnobs):
    """Run"""

    pretrain: float = knob(PRETRAIN, "share of the budget that pretraining gets", low=0.1, high=1)
    used: float = knob(0.0, "seconds of the budget that are used up already", low=0)
    pilot: bool = knob(
        False,
        "leave time for plan pilot, a twelfth of pretraining and at most an hour, in budgets of 25 "
        "minutes or more",
    )
    device_batch_size: int = knob(0, "rows of a micro-batch; 0 = the fastest that fits", low=0)
    data: tuple[str, ...] = knob((), "text to train on, as for base_train; it goes into the recipe")

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of every stage, a pilot first. UserError if no budget is given."""
        if not self.budget:
            raise UserError("the plan needs a budget for the whole run: give --hours or --minutes")
        left = max(1.0, self.budget - self.used)
        pilot = pilot_seconds(left, self.pretrain) if self.pilot else 0.0
        return {"pilot": pilot, **stage_seconds(left - pilot, self.pretrain)}

    @property
    def pretraining_seconds(self) -> float:
        """The seconds of pretraining. UserError if no budget is given."""
        return self.stages["base_train"]


@dataclass
class Candidate:
    """An architecture and what the budget makes of it; the plan's JSON holds these fields."""

    config: GPTConfig
    contexts: tuple[tuple[float, int], ...]  # (share of the run, context from there on)
    total_batch_size: int
    device_batch_size: int
    speed: speed.Speed
    tokens: float
    bpb: tuple[float, float, float]  # bits per byte with a 90 % interval
    memory: dict[str, int]  # bytes of the device by part, see memory.predict
    seconds: float  # of pretraining: all that it gets, or less where text is short
    why: str = ""  # it cannot train

    @property
    def size(self) -> int:
        """Parameters of the layers."""
        return counts(self.config)["transformer"]

    @property
    def steps(self) -> int:
        return int(self.tokens / self.total_batch_size)

    def flags(self, kv_ratio: float) -> dict[str, Any]:
        """The flags of base_train for its size and batch."""
        return {
            "depth": self.config.n_layer,
            "model_dim": self.config.n_embd,
            "head_dim": self.config.head_dim,
            "kv_ratio": kv_ratio,
            "total_batch_size": self.total_batch_size,
            "device_batch_size": self.device_batch_size,
        }

    @property
    def shape(self) -> tuple[int, int]:
        """(depth, width)"""
        return self.config.n_layer, self.config.n_embd


@dataclass(frozen=True)
class Choice:
    """What choose() found: the best candidate, a smaller and a larger one, and all of them."""

    primary: Candidate
    smaller: Candidate | None
    larger: Candidate | None
    candidates: list[Candidate]


@dataclass(frozen=True)
class Plan:
    """A budget with all that a choice depends on: knobs without gaps, machine and text."""

    knobs: Any  # ChoiceKnobs, or of a class that extends them
    machine: Machine
    text: Text = ()
    moved: Law | None = None  # the law after a pilot
    kept: tuple[int, int] | None = None  # depth and width that the pilot tried

    @cached_property
    def choice(self) -> Choice:
        return choose(self)

    @property
    def primary(self) -> Candidate:
        return self.choice.primary

    @property
    def simple(self) -> bool:
        return only_tinyworld(self.knobs.data)

    @property
    def spelled(self) -> float:
        """Bytes of the text per token."""
        return bytes_per_token(self.knobs.vocab, self.simple)

    @cached_property
    def most_tokens(self) -> float:
        """
        Tokens that base_train reads of the text at most: USEFUL_PASSES, if all of it is in files
        that are small enough to be counted (train/stage.py: limited_feed).
        """
        counted = LIMIT / self.spelled
        if (
            not self.text
            or any(source.kind != "files" for source in parse_sources(self.knobs.data))
            or max(fresh for _, fresh in self.text) > counted
        ):
            return math.inf
        return USEFUL_PASSES * max(fresh / share for share, fresh in self.text)

    def law(self, config: GPTConfig) -> Law:
        """The law for a model of this configuration."""
        return self.moved or law_of(config.convolutions, self.simple, config.vocab_size)


def assess(plan: Plan, config: GPTConfig) -> Candidate:
    """What the budget makes of an architecture, including evaluations and opening."""
    knobs, machine = plan.knobs, plan.machine
    seconds, T = knobs.pretraining_seconds, config.sequence_len
    compiled = machine.compiles(seconds)
    staged = machine.device_type != "cpu" and seconds >= 3600 and not knobs.sequence_len
    contexts = context_stages(T) if staged else ((0.0, T),)
    begins, lengths = zip(*contexts, strict=True)
    opening = OPENING + len(contexts) * speed.first_step(machine, compiled)
    # Evaluations take a share of the time, or read so many tokens, at twice the speed of training.
    evaluations = (1 + evaluations_within(seconds)) * len(knobs.data)
    if knobs.total_batch_size:
        whole_rows(knobs.total_batch_size, *lengths)

    def after(batch: int) -> Candidate:
        """What steps of `batch` tokens make of it, with the batch that suits its tokens."""
        rows = knobs.device_batch_size or memory.fitting_rows(
            config, _fastest_rows(config, batch, machine), machine, compiled
        )
        rates = [
            speed.tokens_per_second(config, rows * T // length, length, batch, machine)
            for length in lengths
        ]
        mean = np.average(rates, axis=0, weights=np.diff([*begins, 1.0]))  # by time
        rate = speed.Speed(*mean.tolist())
        reading = evaluations * MOST_EVAL_TOKENS / 2 / rate.tok_per_sec
        training = (1 - SAMPLING) * seconds - opening - min(EVALUATING * seconds, reading)
        wanted = max(1.0, training * rate.tok_per_sec)
        tokens = min(wanted, plan.most_tokens)
        batch = knobs.total_batch_size or max(T, batch_for(tokens) // T * T)
        bpb = _expected(plan, config, tokens, rate)
        parts = memory.predict(config, rows, machine, compiled)
        took = seconds * (tokens / wanted)
        return Candidate(config, contexts, batch, rows, rate, tokens, bpb, parts, took)

    made = after(knobs.total_batch_size or 1 << 14)
    for _ in range(2):  # the batch follows from the tokens, and they follow a little from the batch
        made = after(made.total_batch_size)
    needed, available = made.memory["total"] / GIB, machine.memory_bytes / GIB
    if needed > memory.USABLE * available:
        made.why = f"needs {needed:.1f} of {available:.1f} GiB"
    elif made.steps < FEWEST_STEPS:
        made.why = f"{made.steps} steps are too few"
    elif (
        not knobs.depth
        and made.seconds < seconds
        and made.tokens < TOKENS_PER_PARAMETER * made.size
    ):
        # The text is short, and the law was fitted to no such models
        made.why = f"{human(made.tokens)} tokens are too few"
    return made


def _expected(
    plan: Plan, config: GPTConfig, tokens: float, rate: speed.Speed
) -> tuple[float, float, float]:
    """Bits per byte with the interval of the law, and of the speed that decides the tokens."""
    law, n = plan.law(config), counts(config)["transformer"]
    middle, slow = (
        law.bpb(n, worth(t, plan.text), config.n_layer)
        for t in (tokens, tokens * rate.lo / rate.tok_per_sec)
    )
    width = math.exp(math.hypot(Z90 * law.error(n, tokens), math.log(slow / middle)))
    return middle, middle / width, middle * width


def _fastest_rows(config: GPTConfig, batch: int, machine: Machine) -> int:
    """
    Rows of a micro-batch: with as many tokens as the fastest that was probed (fewer where that
    costs under 2 %), else as are usual.
    """
    T, own = config.sequence_len, batch // machine.gpus  # tokens of a step on each GPU
    if not machine.points:
        return 1 << max(1, min(own, MICRO_TOKENS[machine.device_type]) // T).bit_length() - 1
    probed = {p["rows"] * p["config"]["sequence_len"] // T for p in machine.points}
    options = sorted(rows for rows in probed if 0 < rows * T <= own) or [1]
    rates = {r: speed.tokens_per_second(config, r, T, batch, machine)[0] for r in options}
    return next(rows for rows, rate in rates.items() if rate >= 0.98 * max(rates.values()))


def candidates(plan: Plan) -> list[Candidate]:
    """
    All candidates, the best prediction first and those that cannot train last. UserError if no
    size makes a model.
    """
    knobs, machine, seconds = plan.knobs, plan.machine, plan.knobs.pretraining_seconds
    machine = memory.calibrated(machine, machine.compiles(seconds))
    T = knobs.sequence_len or context_for(speed.usual_flops(machine, seconds))
    depths = (knobs.depth,) if knobs.depth else DEPTHS
    configs, refused = {}, UserError()
    for depth, aspect in product(depths, ASPECTS):  # a width that is given makes one of the three
        try:
            config = knobs.of_size(depth, aspect, T, seconds, machine.device_type)
            configs[config.n_layer, config.n_embd] = config
        except UserError as e:
            refused = e
    if not configs:
        raise refused
    every = [assess(replace(plan, machine=machine), config) for config in configs.values()]
    return sorted(every, key=lambda c: (bool(c.why), c.bpb[0], c.size))


def choose(plan: Plan) -> Choice:
    """
    The best candidate for a budget and a text, and beside it the best of at most two thirds of its
    size and of at least one and a half times. A law that does not know depth (Law.deep) takes
    predictions within TIE as equal, and of these the usual shape, then the smaller model. What a
    pilot tried (Plan.kept) stays the primary unless another is predicted to be better by TIE. Where
    memory shuts better ones out, a shorter context, which leaves room for them, is tried as well.
    UserError if the budget or the memory is too small.
    """
    knobs, every = plan.knobs, candidates(plan)
    fitting = [c for c in every if not c.why]
    if not fitting:
        raise UserError(_nothing_fits(plan, every))
    equal = [c for c in fitting if c.bpb[0] <= fitting[0].bpb[0] * (1 + TIE)]
    knows_depth = plan.law(fitting[0].config).deep != 0

    def preference(c: Candidate) -> tuple[bool, float, int]:
        unusual = abs(c.shape[1] / c.shape[0] - 64) > 8
        return c.shape != plan.kept, c.bpb[0] if knows_depth else unusual, c.size

    primary = min(equal, key=preference)
    T = primary.config.sequence_len
    shut_out = any(c.why.startswith("needs") and c.bpb[0] < primary.bpb[0] for c in every)
    if shut_out and not knobs.sequence_len and T > SHORTEST:
        shorter = choose(replace(plan, knobs=replace(knobs, sequence_len=T // 2)))
        if shorter.primary.bpb[0] < primary.bpb[0]:
            return shorter
    smaller = next((c for c in fitting if c.size <= 2 / 3 * primary.size), None)
    larger = next((c for c in fitting if c.size >= 1.5 * primary.size), None)
    return Choice(primary, smaller, larger, every)


def _nothing_fits(plan: Plan, every: Sequence[Candidate]) -> str:
    """Why no candidate can train, and what to change."""
    least = min(every, key=lambda c: (not c.why.endswith("few"), c.memory["total"]))
    model = "depth {} at width {}".format(*least.shape)
    if least.why.startswith("needs"):
        return (
            f"{plan.machine.name} has too little memory: the smallest candidate, {model}, "
            f"{least.why} with {least.device_batch_size} rows at a time. Try --sequence_len=256, a "
            "smaller vocabulary, --tie_embeddings or a smaller --depth"
        )
    seconds = plan.knobs.pretraining_seconds
    if least.seconds < seconds:
        return (
            f"the text is too short for a plan: read {USEFUL_PASSES} times, it makes only "
            f"{least.steps} steps. Add text to --data, or use nanochat mine, which is for small "
            "collections"
        )
    stepping = FEWEST_STEPS * (1 << 12) / least.speed.tok_per_sec
    needed = (OPENING + 1.3 * stepping) / plan.knobs.pretrain / 60
    return (
        f"{duration(seconds)} of pretraining is too short for any model here: even {model} gets "
        f"only {least.steps} steps. Give at least {needed + 1:.0f} minutes, or a smaller vocabulary"
    )
