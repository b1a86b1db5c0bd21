"""
Bits per byte from the size of a model and the tokens that it reads: L(N, D) = E + A / N^a + B / D^b
(the form of Hoffmann et al. 2022, equation 10), with N the parameters of its layers and D the
tokens of a run whose learning rate has decayed. Embedding and head do not count, as in Kaplan et
al. 2020: in a model of minutes the head is most of what a token is multiplied with, and counting it
makes one narrow layer look best.

`dev/scaling_law.py` fits the law to a published ladder of compute-optimal runs on web text and to
runs of minutes on a CPU that were made here. Models that look back (LOOKS_BACK) and the embedded
corpus (TINYWORLD) have laws of their own, fitted to runs of minutes alone. A law is a first guess:
text and tokenizer move the whole curve, which a pilot measures (`Law.moved`). A plan never shows
its figure without the interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanochat.train.scaling import bytes_per_token

Z90 = 1.645  # intervals here are 90 %
# Logarithms of 6 N D: the ends of the ladder, the middle of the runs made here, where their text
# ceases to count in full, and the end of those that look back.
LOW, HIGH, HERE, NEAR, END = 17.80354, 18.89285, 14.0, 15.0, 14.5

# Muennighoff et al. 2023, "Scaling data-constrained language models": how many repetitions of a
# text it takes until 63 % of what they can ever be worth is used up.
REPEATS = 15.39

Text = Sequence[tuple[float, float]]  # of each source: its share of the tokens, and its own tokens


def worth(tokens: float, text: Text) -> float:
    """
    Tokens of fresh text that teach as much as `tokens` of a text that is read more than once
    (Muennighoff et al. 2023, equation 5, the term of the data). Without a text all are fresh.
    """
    whole = 0.0
    for share, fresh in text:
        read = share * tokens
        repeated = max(0.0, read / fresh - 1)
        whole += min(read, fresh) - fresh * REPEATS * math.expm1(-repeated / REPEATS)
    return whole if text else tokens


@dataclass(frozen=True)
class Law:
    """
    E, A and B in bits per byte, N and D in units of `size` and `tokens`. `prose` is the distance,
    in logarithms, of the text of the runs made here above that of the ladder; it counts the less
    the nearer FLOPs come to the ladder's. It is 0 for laws without a ladder; with `far`, such a law
    approaches that of the ladder times `far`, from the end of its runs on over two factors of ten
    in FLOPs. The number of layers to the power `deep` divides the part of the size; 0 means that
    the law does not know what depth is worth. `spread` is the error in the middle of its runs (see
    error). A pilot of so many tokens sets `factor`, which moves the whole curve.
    """

    floor: float = 0.3448295
    A: float = 0.3185799
    B: float = 0.1823364
    a: float = 0.1214271
    b: float = 0.2155147
    size: float = 171_919_716
    tokens: float = 2_173_706_503
    prose: float = 0.1387976
    deep: float = 0.0
    far: float = 0.0
    spread: float = 0.015
    factor: float = 1.0
    pilot: float = 0.0

    def bpb(self, n: float, d: float, layers: int = 1) -> float:
        """Bits per byte of n parameters in so many layers after d tokens."""
        at = math.log10(6 * n * d)
        prose = self.prose * min(1.0, max(0.0, (LOW - at) / (LOW - NEAR)))
        size = (n / self.size) ** -self.a * layers**-self.deep
        tokens = (d / self.tokens) ** -self.b
        bpb = math.exp(prose) * (self.floor + self.A * size + self.B * tokens)
        if self.far and at > END:
            share = min(1.0, (at - END) / 2)
            bpb = bpb ** (1 - share) * (self.far * Law().bpb(n, d)) ** share
        return self.factor * bpb

    def error(self, n: float, d: float) -> float:
        """
        Standard deviation of the logarithm of bpb(n, d): 1.2 % on the ladder, 3 % where runs were
        made here, and 1.5 % more for every factor of ten in FLOPs from the nearer of the two; for a
        law without a ladder `spread` in the middle of its runs, and 1.5 % more for every factor of
        ten. dev/law_coverage.py leaves out one run at a time and says how many lie within their
        90 % intervals. After a pilot it is 1.5 %, and as much more for every factor of ten in
        tokens from it: of 24 pairs of the runs made here, whose models differ by less than two
        thirds, 21 lie within 90 %.
        """
        if self.pilot:
            return math.hypot(0.015, 0.015 * math.log10(d / self.pilot))
        at = math.log10(6 * n * d)
        if not self.prose:
            middle = math.log10(6 * self.size * self.tokens)
            return math.hypot(self.spread, 0.015 * (at - middle))
        ladder = math.hypot(0.012, 0.015 * max(0.0, LOW - at, at - HIGH))
        return min(ladder, math.hypot(0.03, 0.015 * (at - HERE)))

    def moved(self, n: float, d: float, bpb: float, layers: int = 1) -> "Law":
        """The curve through what a pilot of n parameters in `layers` reached with d tokens."""
        return replace(self, factor=self.factor * bpb / self.bpb(n, d, layers), pilot=d)


# Models with the parts of --lookback. Far from these runs, the parts multiply bits per byte by
# `far`: 0.933 after 0.5 M and after 12 M tokens (dev/LOG.md).
LOOKS_BACK = Law(
    1.23996,
    0.112823,
    0.283977,
    0.40994,
    0.37504,
    453651,
    7774692,
    prose=0.0,
    deep=-0.13708,
    far=0.935,
    spread=0.005,
)
# The vocabulary of those runs, and what half of it costs (dev/vocabulary_experiments.py)
FITTED, SMALLER = 8192, 0.011
TINYWORLD = Law(
    0.177443,
    0.0168586,
    0.0189974,
    0.37049,
    0.71229,
    636858,
    9391120,
    prose=0.0,
    deep=0.46151,
    spread=0.01,
)


def law_of(looks_back: bool, simple: bool, vocabulary: int) -> Law:
    """
    The law for models with or without the parts of --lookback; `simple`: on tinyworld alone. Runs
    that look back had FITTED tokens in their vocabulary. A smaller one spells the same text with
    more tokens (bytes_per_token), and a run that has read as many bytes ends worse by SMALLER for
    every halving; a larger one did not end better.
    """
    if simple or not looks_back:
        return TINYWORLD if simple else Law()
    ratio = FITTED / vocabulary
    tokens = LOOKS_BACK.tokens * bytes_per_token(FITTED) / bytes_per_token(vocabulary)
    return replace(LOOKS_BACK, tokens=tokens, factor=max(1.0, ratio) ** math.log2(1 + SMALLER))
