"""
Rules of scale: how width follows from depth, and how batch, rates, context and compilation follow
from a budget.

Training and planning use the same rules, and each is written here only. Importing this needs no
torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from nanochat.base.common import UserError
from nanochat.base.knobs import knob


@dataclass(kw_only=True)
class Shape:
    """Size"""

    depth: int = knob(4, "layers; by default, all other sizes follow from it")
    aspect_ratio: float = knob(64.0, "model width per layer of depth")
    model_dim: int = knob(0, "model width; 0 = depth x aspect_ratio, rounded up to whole heads")
    head_dim: int = knob(128, "width of an attention head")
    kv_ratio: float = knob(
        1.0, "key-value heads as a share of query heads, rounded to whole groups", high=1
    )

    def dimensions(self) -> dict[str, int]:
        """{n_layer, n_embd, n_head, n_kv_head}. UserError if no model has such a size."""
        for f in fields(Shape):
            value = getattr(self, f.name)
            if not 0 <= value < math.inf or (f.name != "model_dim" and value == 0):
                raise UserError(f"{f.name} must be a number above 0 (got {value})")
        D = self.head_dim
        width = self.model_dim or math.ceil(self.depth * self.aspect_ratio / D) * D
        if width % D:
            nearest = max(1, round(width / D)) * D
            raise UserError(
                f"model_dim {width} is not a multiple of head_dim {D}: try --model_dim={nearest}"
            )
        heads = width // D
        wanted = heads * self.kv_ratio
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        kv_heads = min(divisors, key=lambda n: max(n / wanted, wanted / n))  # the nearest by ratio
        return {"n_layer": self.depth, "n_embd": width, "n_head": heads, "n_kv_head": kv_heads}


MIN_STEPS = 2000  # the fewest steps that a horizon of 27 M tokens or more should give


def batch_for(tokens: float) -> int:
    """
    Tokens per optimizer step for a run of `tokens`: a power of two between 2^12 and 2^19.

    It is near 74 x tokens^0.383, but small enough for 2,000 steps, or for sqrt(tokens) / 2.6 steps
    where 2,000 are too many. The exponent is the one reported for compute-optimal runs; the factor
    makes a run of 11.2 G tokens use 2^19. Below 240 M tokens, the number of steps limits learning:
    2^14 was reported best for minutes on a small GPU. On two cores, 2^12 was the best of 2^10 to
    2^13 with 1.6 M tokens, as good as 2^13 with 4 M, and 4 % worse with 10 M (dev/LOG.md: small
    budgets, a batch that was too small).
    """
    tokens = max(tokens, 1.0)
    enough_steps = max(tokens / MIN_STEPS, 2.6 * math.sqrt(tokens))
    return _power_of_two(min(74 * tokens**0.383, enough_steps), 12, 19)


def _power_of_two(x: float, low: int, high: int) -> int:
    """The power of two that is nearest to x in its exponent, from 2^low to 2^high."""
    return 1 << min(high, max(low, round(math.log2(x))))


def whole_rows(total_batch_size: int, *lengths: int) -> int:
    """
    The rows in a batch of so many tokens, at the last of these row lengths. UserError unless the
    batch is a whole number of rows at each length.
    """
    unit = math.lcm(*lengths)
    if total_batch_size % unit:
        nearest = max(1, round(total_batch_size / unit)) * unit
        rows = " and ".join(f"of {T}" for T in lengths)
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a whole number of rows {rows} "
            f"tokens: try --total_batch_size={nearest}"
        )
    return total_batch_size // lengths[-1]


def width_scale(n_embd: int) -> float:
    """Factor on AdamW's rates, which are tuned at width 768: (width / 768)^-0.5."""
    return (n_embd / 768) ** -0.5


def embedding_rate(batch: int) -> float:
    """
    AdamW's rate for the token embedding, at width 768, with `batch` tokens per optimizer step.

    It grows with the square root of the batch: 0.05 at 2^12 and 0.1 at 2^14, the rates of the runs
    on two cores that learned most (dev/LOG.md), and never above the 0.2 of eight-GPU batches.
    """
    return min(0.2, 0.1 * math.sqrt(batch / 2**14))


def context_for(flops: float) -> int:
    """
    Context length that a budget of FLOPs can use: 512 below 1e16, 1,024 below 3e18, then 2,048.

    The last two follow what owners of 24 GB cards report for runs of a day (depths 12 to 14 at
    1,024, later 16 to 18 at 2,048); small models learn little from beyond 512 tokens.
    """
    return 512 if flops < 1e16 else 1024 if flops < 3e18 else 2048


# Copy heads, convolutions, value and pair embeddings are the default where a CPU has a budget of
# time: after 0.5, 2 and 12 M tokens of prose, 3 x 192 had 0.117, 0.102 and 0.087 bits per byte less
# with the first three (three, one and two seeds; dev/LOG.md, parts of the architecture), and after
# 27 M tokens 2 x 128 had 0.131 less with all four (one seed). More tokens were not tried.
# Pair embeddings come with them up to this vocabulary: with 4,096 tokens in the vocabulary they
# gained 0.032 more after 0.5 M tokens and 0.028 after 12 M (three and two seeds), but with 16,384
# tokens 0.006 after 1.2 M (one seed), where their table is as large as the rest of the model
# (dev/LOG.md, pair embeddings).
PAIR_VOCABULARY = 8192
PAIR_EMBEDDINGS = 5


@dataclass(kw_only=True)
class LookbackKnobs:
    """Small models"""

    lookback: Literal["auto", "on", "off"] = knob(
        "auto",
        "on = --copy_heads=1 --convolutions --value_embeddings and, with at most "
        f"{PAIR_VOCABULARY:,} tokens in the vocabulary, --pair_embeddings={PAIR_EMBEDDINGS}: with "
        "these a small model learns faster, but only transformers can run it elsewhere; auto = on "
        "a CPU with a budget of time, without --rap",
    )

    def lookback_parts(
        self, minutes: float, on_cpu: bool, kv_heads: int, vocab_size: int
    ) -> dict[str, Any]:
        """
        The architecture knobs that --lookback sets, with their values, in a run of so many minutes
        (0 = no budget): an empty dict if it does not apply.
        """
        if self.lookback == "off" or (self.lookback == "auto" and not (on_cpu and minutes)):
            return {}
        return {
            "copy_heads": 1 if kv_heads > 1 else 0,  # one head must know positions
            "convolutions": True,
            "value_embeddings": True,
            "pair_embeddings": PAIR_EMBEDDINGS if vocab_size <= PAIR_VOCABULARY else 0,
        }


def with_lookback(
    knobs: Any, origins: dict[str, str], on_cpu: bool, vocab_size: int
) -> tuple[Any, dict[str, str]]:
    """(knobs of base_train, origins) after --lookback has set those left at their defaults."""
    minutes = 0.0  # with a prior, as without a budget
    if not knobs.rap:
        minutes = knobs.max_minutes or 60 * knobs.max_hours
    kv_heads = knobs.dimensions()["n_kv_head"]
    parts = knobs.lookback_parts(minutes, on_cpu, kv_heads, vocab_size)
    added = {name: value for name, value in parts.items() if origins[name] == "default"}
    return replace(knobs, **added), {**origins, **dict.fromkeys(added, "rule")}


def context_stages(final: int) -> tuple[tuple[float, int], ...]:
    """
    (share of the run, context from there on) for each context stage of a run of hours that ends at
    the context `final`. Short rows come first, because they cost less per token.
    """
    stages = {1024: ((0.0, 512), (0.6, 1024)), 2048: ((0.0, 512), (0.6, 1024), (0.9, 2048))}
    return stages.get(final, ((0.0, final),))


# Passes over a small text after which held-out loss no longer falls. With one author's prose and 3
# layers of width 128, each run with a schedule of its own, bits per byte after 2, 3, 4 and 8 passes
# were 2.162, 2.116, 2.154 and 2.68 for 0.3 MB, 1.809, 1.812, 1.882 and 2.37 for 1 MB, and 1.621,
# 1.614, 1.641 and 1.88 for 3 MB (two or three seeds; dev/LOG.md, own text, passes).
USEFUL_PASSES = 3
# The fewest tokens per parameter of the layers, in all stages together: with fewer, a smaller model
# learns more. In 20 minutes on one core, 4 x 256 (1.6 tokens per parameter) answered as many
# everyday questions as 3 x 192 (7) and fewer about passages, and its text had 0.03 to 0.07 bits per
# byte less after the later stages (one run each; dev/LOG.md, own text, passes).
TOKENS_PER_PARAMETER = 1.2
SHAPES = (  # (layers, width) of the models that the command mine chooses from, with heads of 64
    (2, 128),
    (3, 192),
    (4, 256),
    (5, 320),
    (6, 384),
    (8, 512),
    (10, 640),
    (12, 768),
    (16, 1024),
)
# How much of the embedded corpus `mine` reads in pretraining; own text has the rest of the time.
# After 0.6 M tokens of it, two seeds of 2 x 128 answered 98 % of small talk, 80 % of questions on
# stories and 90 % of sums; after 0.3 M, 69, 51 and 26 %, and their text had 0.10 bits per byte less
# (dev/LOG.md, own text, what the conversations are about).
EVERYDAY_TOKENS = 150 * 4096


def text_tokens(tokens: float, useful: float, everyday: float) -> tuple[float, float]:
    """
    (tokens of own text, tokens of the embedded corpus) for a pretraining that can read `tokens`.
    The embedded corpus has the share `everyday`, but no more than EVERYDAY_TOKENS; own text has the
    rest, but no more than `useful`. What that leaves goes to the embedded corpus as well, up to the
    same limit, unless `everyday` is 0.
    """
    embedded = min(everyday * tokens, EVERYDAY_TOKENS)
    own = min(useful, tokens - embedded)
    if everyday:
        embedded = max(embedded, min(tokens - own, EVERYDAY_TOKENS))
    return own, embedded


CPU_FLOPS = 1e16  # of training for a day on two cores


def vocabulary_for(size: float, flops: float = math.inf, simple: bool = False) -> int:
    """
    Tokens in the vocabulary of a text of `size` bytes: the power of two near three times its square
    root, from 512 to 65,536. With 0.3 MB, 512 to 4,096 ended within 0.034 bits per byte, where two
    seeds of 2,048 differ by 0.024 (dev/LOG.md, own text); that the best grows with the square root
    is an assumption. It is no larger than pays in a budget of so many FLOPs, which is known at two
    ends: with 3e13, 4,096 ended 1.4 % below 2,048 and 2.5 % below 8,192 (dev/LOG.md, the
    vocabulary), and nanochat chose 32,768 after runs of about 1e18 to 1e20. simple: the text is the
    embedded corpus.
    """
    if simple:
        return 2048
    affordable = 32_768 * (flops / 1e19) ** (1 / 6)
    return _power_of_two(min(3 * math.sqrt(max(size, 1)), affordable), 9, 16)


def digits_for(vocab_size: int) -> int:
    """
    The most digits that a token of such a vocabulary may hold: three, because llama.cpp does not
    know groups of two. Vocabularies of up to 2,048 tokens (the quickstart's) take two, because they
    have little room for numbers.
    """
    return 2 if vocab_size <= 2048 else 3


def shape_for(flops: float, tokens: float, vocab_size: int) -> tuple[int, int]:
    """
    (layers, width) of the largest model of SHAPES that reads at least TOKENS_PER_PARAMETER, in all
    stages together, in a training of so many FLOPs on at most `tokens`.
    """
    for depth, width in reversed(SHAPES[1:]):
        parameters = 12 * depth * width**2  # of the layers
        readable = min(tokens, flops / (6 * (parameters + vocab_size * width)))
        if readable >= TOKENS_PER_PARAMETER * parameters:
            return depth, width
    return SHAPES[0]


EVALUATING = 0.04  # share of a run's time for measuring its bits per byte
SAMPLING = 0.008  # share of a run's time for sample texts
MOST_EVAL_TOKENS = 1 << 20  # per source: more would only measure the same to another digit


def evaluations_within(seconds: float) -> int:
    """
    How many evaluations a run of so many seconds has, besides one before its first step: 2 in 4
    minutes, 3 in 12, and 10 in 100 minutes or more, or if the seconds are not known (0).
    """
    return max(2, min(10, round(math.sqrt(seconds / 60)))) if seconds else 10


def evaluation_seconds(seconds: float, share: float = EVALUATING) -> float:
    """Seconds that each evaluation may take so that all take `share` of a run of `seconds`."""
    return share * seconds / (1 + evaluations_within(seconds))


def evaluation_tokens(tokens: float, sources: int) -> int:
    """
    Validation tokens per source in each evaluation of a run that trains on `tokens`: a power of
    two, such that all evaluations take EVALUATING of the run. Reading a token takes half the time
    of training on it.
    """
    each = 2 * EVALUATING * tokens / (1 + evaluations_within(0)) / sources
    return 1 << max(12, min(MOST_EVAL_TOKENS.bit_length(), int(each).bit_length()) - 1)


# On two cores a compilation takes 30 s, and steps are then 1.3 to 1.5 times as fast
COMPILE_PAYS_SECONDS = 120


def compile_pays(device_type: str, seconds: float, shapes: int = 1) -> bool:
    """
    Whether to compile a model that trains for `seconds` on so many shapes of batches: on a GPU
    always, elsewhere if the run has COMPILE_PAYS_SECONDS for each shape.
    """
    return device_type == "cuda" or seconds >= COMPILE_PAYS_SECONDS * shapes


def split_budget(seconds: float, shares: Mapping[str, float]) -> dict[str, float]:
    """{stage: seconds} in proportion to the shares; UserError unless all numbers are positive."""
    if not seconds > 0 or not all(share > 0 for share in shares.values()):
        raise UserError(
            f"cannot split {seconds:g} s by {dict(shares)}: give positive seconds and positive "
            "shares"
        )
    return {stage: seconds * share / sum(shares.values()) for stage, share in shares.items()}


PRETRAIN = 0.85  # share of a chain's time for pretraining
# Shares of the remaining time; the last is for evaluations and for starting programs
LATER_STAGES = {"mid_train": 0.45, "chat_sft": 0.3, "evaluation": 0.25}
PILOT = 1 / 12  # of the time of pretraining, for a short trial run
LEAST_FOR_PILOT = 25 * 60.0  # seconds; with less, a pilot would be too short to be useful
LONGEST_PILOT = 3600.0  # seconds; a longer one would say little more


def stage_seconds(seconds: float, pretrain: float = PRETRAIN) -> dict[str, float]:
    """Seconds of base_train, mid_train, chat_sft and evaluation in a chain of `seconds`."""
    later = {stage: (1 - pretrain) * share for stage, share in LATER_STAGES.items()}
    if pretrain == 1:
        return {"base_train": seconds, **dict.fromkeys(LATER_STAGES, 0.0)}
    return split_budget(seconds, {"base_train": pretrain, **later})


def pilot_seconds(seconds: float, pretrain: float = PRETRAIN) -> float:
    """
    Seconds of a pilot in a budget of so many, of which pretraining gets the share `pretrain` of the
    rest; 0 if they are too few for one.
    """
    share = PILOT * pretrain
    return min(seconds * share / (1 + share), LONGEST_PILOT) if seconds >= LEAST_FOR_PILOT else 0.0


def text_for(seconds: float) -> str:
    """The text to train on if none is named: web text if there is at least an hour."""
    return "fineweb-edu" if seconds >= 3600 else "tinyworld"


def bytes_per_token(vocabulary: int, simple: bool = False) -> float:
    """
    The expected bytes of English text per token, or of the embedded corpus (simple). Measured: 4.8
    bytes of web text with a vocabulary of 65,536; on prose, vocabularies of 2,048 to 32,768, each
    twice the one before, had 0.66, 0.75, 0.83, 0.91 and 0.96 times the bytes per token of one of
    65,536 (dev/LOG.md, the vocabulary).
    """
    if simple:
        return 3.8
    halvings = max(-1.0, 16 - math.log2(vocabulary))
    return 4.8 * math.exp(-0.0257 * halvings - 0.0117 * halvings**2)
