"""
The arithmetic of dev/generate_rap_prior.py: statistics of tokens and distances, pairs of positions
and their features, the rules that make pairs useful, and the terms of B. rap_worth.py measures the
result.

All randomness comes from the generator that is passed in. Nothing here reads or writes a file.
TooLittle is raised for a text or options that leave no prior.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array

LEVELS = (
    0.25,
    0.5,
    0.75,
)  # besides its whole range, a feature has a critical range up to each of these quantiles
PENALTIES = [
    0.003,
    0.01,
    0.03,
    0.1,
]  # C of the LASSO; beyond, a fit takes minutes and finds no more
GROUPS = {
    "lag": ("lag",),
    "key": ("key",),
    "match": ("codes", "match"),
    "pair": ("pair_query", "pair_now", "pair"),
}
CODES = "codes", "pair_query", "pair_now"  # tensors of -1 and 1
FEATURES = {  # what each feature of a pair means, and the term of B that it becomes
    "copy": ("the token before the key is the query's token", "match 1"),
    "copy_pair": ("the two tokens before the key are the query's and the one before it", "pair"),
    "same": ("the key is the query's token", "match 0"),
    "skip": ("the token two before the key is the query's token", "match 2"),
    "similar": ("likeness of the token before the key to the query's token", "match 1"),
    "similar_key": ("likeness of the key to the query's token", "match 0"),
    "similar_skip": ("likeness of the token two before the key to the query's token", "match 2"),
    "distance": ("log2 of 1 + distance", "lag"),
    "key_frequency": ("log2 of the key's share of all tokens", "key"),
    "key_word": ("the key starts a word", "key"),
    "key_mark": ("the key is punctuation", "key"),
    "key_digit": ("the key is a number", "key"),
    "key_newline": ("the key breaks the line", "key"),
}

HAND = {  # the rules of the generator `hand`: the log odds that `rules` found for them in prose
    "copy": 1.54,
    "copy_pair": 0.47,
    "same": -0.80,
}


class TooLittle(Exception):
    """Too little text, or nothing left of the prior; the message says what to change."""


class Progress:
    """
    A bar on a terminal, otherwise a line every ten seconds; nothing for the first two seconds.
    """

    def __init__(self, label: str):
        self.label, self.began = label, time.monotonic()
        self.shown, self.is_terminal = 0.0, sys.stderr.isatty()

    def __call__(self, share: float) -> None:
        seconds = time.monotonic() - self.began
        if seconds > 2 and seconds - self.shown > (0.2 if self.is_terminal else 10):
            self.shown, end = seconds, "\r" if self.is_terminal and share < 1 else "\n"
            print(
                f"  {self.label} [{'#' * round(30 * share):<30}] {share:4.0%}",
                end=end,
                file=sys.stderr,
                flush=True,
            )


class Text(NamedTuple):
    """Documents in a row: ids (N,) int32; begin (N,) int64, where each token's document begins."""

    ids: Array
    begin: Array


def embed(ids: Array, vocab_size: int, dim: int, kind: str, contexts: int = 1024) -> Array:
    """
    Embeddings of tokens, (V, dim) float32 of length 1: the largest singular directions of the
    positive pointwise mutual information between a token and the `contexts` most common tokens,
    counted where they come `next` or lie `around` it, up to four away (Bullinaria and Levy 2007).
    """
    common = np.argsort(-np.bincount(ids, minlength=vocab_size), kind="stable")[:contexts]
    column = np.full(vocab_size, -1, np.int64)
    column[common] = np.arange(len(common))
    counts = np.zeros(vocab_size * len(common))
    for distance in (1,) if kind == "next" else (1, 2, 3, 4, -1, -2, -3, -4):
        token, c = (
            (ids[:-distance], column[ids[distance:]])
            if distance > 0
            else (ids[-distance:], column[ids[:distance]])
        )
        counts += np.bincount(
            token[c >= 0].astype(np.int64) * len(common) + c[c >= 0], minlength=len(counts)
        )
    n = counts.reshape(vocab_size, -1).astype(np.float32)
    expected = n.sum(1, keepdims=True) @ (n.sum(0, keepdims=True) / max(n.sum(), 1))
    ppmi = np.log(
        np.maximum(n, 1e-9) / np.maximum(expected, 1e-9), where=n > 0, out=np.zeros_like(n)
    ).clip(0)
    directions = np.linalg.eigh((ppmi.T @ ppmi).astype(np.float64))[1][:, ::-1][:, :dim]
    directions *= np.where(
        np.abs(directions).max(0) == directions.max(0), 1, -1
    )  # the sign is free: fix it
    e = ppmi @ directions.astype(np.float32)
    e = np.pad(e, ((0, 0), (0, dim - e.shape[1])))
    return e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-6)


def information(ids: Array, distances: Array | Sequence[int], buckets: int = 512) -> Array:
    """
    The mutual information, in nats, between the key at each distance and the next token, less what
    chance gives (Miller and Madow). The most common tokens count separately, the rest as one.
    """
    ids = np.argsort(np.argsort(-np.bincount(ids), kind="stable"), kind="stable").clip(
        max=buckets - 1
    )[ids]
    nats = []
    for d in distances:
        now, then = ids[: -d - 1], ids[d + 1 :]
        joint = np.bincount(now.astype(np.int64) * buckets + then, minlength=buckets**2).reshape(
            buckets, buckets
        ) / len(now)
        a, b, seen = joint.sum(1), joint.sum(0), joint > 0
        chance = (seen.sum() - (a > 0).sum() - (b > 0).sum() + 1) / (2 * len(now))
        nats.append((joint[seen] * np.log(joint[seen] / np.outer(a, b)[seen])).sum() - chance)
    return np.array(nats)


def lag_curve(ids: Array, max_lag: int, source: str) -> Array:
    """
    What a key is worth by its distance, (max_lag,), relative to one far away: the log odds that it
    is the next token (`event`), or the logarithm of its information about it (`information`).
    Computed on binned distances, smoothed beyond the eighth, and 0 at the far end.
    """
    max_lag = min(max_lag, len(ids) // 4)
    bins = np.unique(np.r_[: min(8, max_lag), np.geomspace(8, max(9, max_lag - 1), 40).astype(int)])
    bins = bins[bins < max_lag]
    if source == "information":
        values = np.log(information(ids, bins).clip(1e-4))
    else:
        rates = np.array(
            [((ids[: -d - 1] == ids[d + 1 :]).sum() + 0.5) / (len(ids) - d) for d in bins]
        )
        values = np.log(rates / (1 - rates))
    smooth = np.convolve(np.pad(values, 2, mode="edge"), [0.1, 0.2, 0.4, 0.2, 0.1], mode="valid")
    values = np.where(bins < 8, values, smooth) - values[-4:].mean()
    values[-1] = 0
    return np.interp(np.log2(1 + np.arange(max_lag)), np.log2(1 + bins), values)


def find_spans(
    ids: Array, max_lag: int, n: int, enough: int = 4_000_000
) -> list[tuple[int, int, float]]:
    """
    At most n spans of distances, (first, last, information of the first in nats above the level far
    away). They start at distance 1; each ends where a distance has half the information of the
    span's first, so that a head which attends evenly to a span loses little.
    """
    ids, max_lag = ids[:enough], min(max_lag, len(ids) // 4)
    at = np.unique(np.r_[1 : min(9, max_lag), np.geomspace(8, max(9, max_lag - 1), 24).astype(int)])
    at = at[at < max_lag]
    tells = information(ids, at)
    curve = np.interp(np.log2(1 + np.arange(max_lag)), np.log2(1 + at), tells - tells[-4:].mean())
    spans, first = [], 1
    while len(spans) < n and first < max_lag and curve[first] > 0:
        below = np.flatnonzero(curve[first:] < curve[first] / 2)
        after = first + int(below[0]) if len(below) else max_lag
        spans.append((first, after - 1, float(curve[first])))
        first = after
    return spans


def key_worth(text: Text, vocab_size: int, max_lag: int, strength: float = 20.0) -> Array:
    """
    The log odds that a key of each token is useful, (V,), against an average key: a key's rate
    follows how often its token has occurred within max_lag before it occurs again. `strength`
    pseudocounts of the average keep rare tokens near 0.
    """
    order, gap = np.argsort(text.ids, kind="stable"), np.full(len(text.ids), max_lag + 1)
    again = text.ids[order][1:] == text.ids[order][:-1]
    gap[order[1:][again]] = np.diff(order)[again]
    before = (gap <= max_lag) & (np.arange(len(gap)) - gap >= text.begin)
    n, hits = (np.bincount(text.ids, weights=w, minlength=vocab_size) for w in (None, before))
    average = max(before.mean(), 1e-6)
    return np.log((hits + strength * average) / (n + strength) / average)


class Pairs(NamedTuple):
    """
    Positions of queries i and keys j < i of one document, (n,); useful (n,): x[j] is x[i + 1].
    """

    i: Array
    j: Array
    useful: Array


def sample_pairs(text: Text, n: int, max_lag: int, rng: Any, matched: bool = False) -> Pairs:
    """
    n / 2 useful pairs, at most one per query and drawn evenly from its useful keys, and as many
    other pairs of the same queries; if `matched`, with the key's distance and frequency in the same
    octave.
    """
    ids, begin, distance = text.ids, text.begin, np.arange(1, max_lag)
    octave = np.log2(np.maximum(np.bincount(ids), 1)).astype(int)
    chosen: list[tuple] = []
    got, tries, size, progress = 0, 0, max(64, (1 << 21) // max_lag), Progress("sampling pairs")
    while got < n // 2:
        tries += size
        if tries > 200 * n + 100_000:
            raise TooLittle(
                f"found only {got:,} of {n // 2:,} useful pairs: give more text, or fewer --pairs"
            )
        i = rng.integers(3, len(ids) - 1, size)
        i = i[(i - begin[i] > 2) & (begin[i + 1] == begin[i])]
        j = i[:, None] - distance
        inside, keys, row = j > begin[i][:, None], ids[j.clip(0)], np.arange(len(i))
        useful = inside & (keys == ids[i + 1][:, None])
        dice = rng.random(j.shape, np.float32) + 0.001
        first, other = (dice * useful).argmax(1), inside & ~useful
        if matched:
            other &= np.log2(distance).astype(int) == np.log2(distance[first]).astype(int)[:, None]
            other &= octave[keys] == octave[keys[row, first]][:, None]
        second, both = (dice * other).argmax(1), useful.any(1) & other.any(1)
        chosen.append((i[both], i[both] - distance[first][both], i[both] - distance[second][both]))
        got += int(both.sum())
        progress(min(1.0, 2 * got / n))
    i, j, k = (np.concatenate(parts)[: n // 2] for parts in zip(*chosen, strict=True))
    return Pairs(np.r_[i, i], np.r_[j, k], np.repeat([True, False], len(i)))


def columns(
    text: Text, pairs: Pairs, wanted: Sequence[str], share: Array, kind: dict[str, Array], e: Array
) -> dict[str, Array]:
    """Features of the pairs by name, (n,) float64; likeness is the product of rows of e (V, D)."""
    ids, i, j = text.ids, pairs.i, pairs.j
    query, key, before, skipped = ids[i], ids[j], ids[j - 1], ids[(j - 2).clip(0)]

    def like(x: Array, y: Array) -> Array:
        return np.einsum("nd,nd->n", e[x], e[y])

    features = {
        "copy": before == query,
        "copy_pair": (before == query) & (skipped == ids[i - 1]),
        "same": key == query,
        "skip": skipped == query,
        "similar": like(query, before),
        "similar_key": like(query, key),
        "similar_skip": like(query, skipped),
        "distance": np.log2(1 + i - j),
    }
    features |= {"key_frequency": np.log2(share[key])} | {
        f"key_{name}": of[key] for name, of in kind.items()
    }
    return {name: features[name].astype(np.float64) for name in wanted}


class Rule(NamedTuple):
    """
    A feature that is 1 inside the critical range low..high (None = open) of pairs that are not
    useful, else -1. weight: for 'not useful'.
    """

    feature: str
    low: float | None
    high: float | None
    weight: float = 0.0

    def of(self, values: Array) -> Array:
        low, high = (
            -np.inf if self.low is None else self.low,
            np.inf if self.high is None else self.high,
        )
        return 2.0 * ((values >= low) & (values <= high)) - 1

    def words(self) -> str:
        text, outside = FEATURES[self.feature][0], self.weight > 0
        if self.high == 0 and self.low in (None, 0) and not text.startswith(("log2", "likeness")):
            return text if outside else f"not: {text}"
        if self.low is not None and self.high is not None:
            return f"{text} is {'outside' if outside else 'within'} {self.low:.3g}..{self.high:.3g}"
        side = (
            ("above", "at most", self.high) if self.low is None else ("below", "at least", self.low)
        )
        return f"{text} is {side[not outside]} {side[2]:.3g}"


def rectify(cutlass: Any, raw: dict[str, Array], useful: Array) -> list[Rule]:
    """
    Rules for the critical ranges of every feature: the whole range and those up to quantiles of
    pairs that are not useful; equal splits once.
    """
    rules, seen = [], set()
    for level in (None, *LEVELS):
        bounds = None if level is None else (0.0, level)
        for name, values in raw.items():
            r = cutlass.Rectifier(groups={name: [name]}, quantile_bounds=bounds)
            if np.ptp(values[~useful]) == 0:
                r.sdfilter = None  # else its filter of outliers would leave nothing
            r.fit(values[:, None], ~useful, feature_names=[name])
            low, high = (
                None if np.isnan(bound[0]) else float(bound[0]) for bound in (r.rmin_, r.rmax_)
            )
            rule = Rule(name, low, high)
            signs = rule.of(values)
            if (key := (name, signs.astype(np.int8).tobytes())) not in seen and abs(
                signs.mean()
            ) < 1:
                seen.add(key)
                rules.append(rule)
    return rules


def fit_rules(
    cutlass: Any, raw: dict[str, Array], useful: Array, seed: int
) -> tuple[list[Rule], dict[str, Any]]:
    """
    Rules with weights, the strongest first, and a summary of the fit: the polished rule in words,
    and (AUC, Youden's J) over three folds.
    """
    nothing = TooLittle(
        "no feature distinguishes useful pairs: fit on more --pairs, or allow more --features"
    )
    if not (rules := rectify(cutlass, raw, useful)):
        raise nothing
    x, y = np.stack([r.of(raw[r.feature]) for r in rules], 1), (~useful).astype(int)
    names = [f"{r.feature}.{n}." for n, r in enumerate(rules)]

    def fit(rows: Array, Cs: Sequence[float], polish: bool) -> Any:
        plain = {
            "rectify": False,
            "use_scaler": False,
            "duplicate_mode": "none",
            "verbose": False,
            "random_state": seed,
        }
        model = cutlass.CutlassClassifier(
            Cs=Cs, cv_rule="1se", tol=1e-3, logic_polish=polish, logic_intercept="maxj", **plain
        )
        return model.fit(x[rows], y[rows], feature_names=names)

    progress = Progress("fitting")
    whole = fit(np.arange(len(y)), PENALTIES, True)
    fold, score = np.random.default_rng(seed).permutation(len(y)) % 3, np.zeros(len(y))
    for k in range(3):
        progress((k + 2) / 5)
        model = fit(np.flatnonzero(fold != k), [whole.classifier_.C_], False)
        score[fold == k] = model.predict_proba(x[fold == k], feature_names=names)[:, 0]
    polish = whole.logic_diag_
    rules = [
        r._replace(weight=float(w)) for r, w in zip(rules, whole.coef_fit_.ravel(), strict=True)
    ]
    if not (k := int(polish.get("k_chosen", 0))):
        raise nothing
    need = int(np.floor((k + polish["b_k"][k - 1] / polish["K_used"]) / 2)) + 1
    words = f"useful when at least {need} of {k} hold: " + "; ".join(
        rules[n].words() for n in polish["order"][:k]
    )
    about = {
        "polished": words,
        "polished_youden": float(polish["J_chosen"]),
        "fit": discrimination(score, useful),
    }
    return sorted((r for r in rules if r.weight), key=lambda r: -abs(r.weight)), about


def effect(rules: Sequence[Rule], feature: str, values: Array) -> Array:
    """The log odds of 'useful' that the rules of a feature give its values."""
    return sum((-r.weight * r.of(values) for r in rules if r.feature == feature), values * 0.0)


def rules_terms(
    rules: Sequence[Rule],
    raw: dict[str, Array],
    curves: dict[str, Array],
    ids: Array,
    pairs: Pairs,
    P: int,
    P2: int,
) -> dict:
    """
    The terms that fitted rules become. A match is worth the gain of its feature from the median to
    1, spread over the P or P2 bits of the codes. A match below 0, or below a quarter of the best,
    is left out: chance similarity of codes would cost more than it adds. lag and key are the
    curves, each scaled by least squares to what the rules say about the distances and keys of the
    pairs.
    """
    gain = {term: 0.0 for _, term in FEATURES.values() if term not in ("lag", "key")}
    told = {term: np.zeros(len(pairs.i)) for term in ("lag", "key")}
    for feature, values in raw.items():
        term = FEATURES[feature][1]
        if term in gain:
            gain[term] += float(
                np.diff(effect(rules, feature, np.array([np.median(values), 1.0])))[0]
            )
        else:
            told[term] += effect(rules, feature, values)
    terms, shifts = {}, [gain[f"match {s}"] for s in range(3)]
    if max(shifts) > 0:
        terms["match"] = np.stack(
            [(w if w > max(shifts) / 4 else 0) / P * np.eye(P) for w in shifts]
        )
    if gain["pair"] > 0:
        terms["pair"] = np.full(P2, gain["pair"] / P2)
    for name, at in (
        ("lag", (pairs.i - pairs.j).clip(max=len(curves["lag"]) - 1)),
        ("key", ids[pairs.j]),
    ):
        x = curves[name][at]
        if (scale := np.cov(told[name], x)[0, 1] / max(x.var(), 1e-12)) > 0:
            terms[name] = scale * curves[name]
    return terms


def pair_codes(codes: Array, bits: int) -> tuple[Array, Array]:
    """
    From the codes of tokens (V, P), those of the earlier and of the later of two tokens, (V, bits)
    each: each bit of the one is multiplied by a different bit of the other.
    """
    P, n = codes.shape[1], np.arange(bits)
    return codes[:, (n + 1 + n // P % (P - 1)) % P], codes[:, n % P]


def terms_by_hand(
    odds: dict[str, float], vocab_size: int, P: int, P2: int, spans: int, rng: Any
) -> dict[str, Array]:
    """
    The terms of a prior that is not fitted: random codes, on which the log odds of copy, same and
    copy_pair become match and pair, each with a largest value of about 1; and the spans 1, 2, 3 to
    4, 5 to 8 and so on, by doubling. Raises TooLittle if nothing is left.
    """
    terms = {}
    codes = rng.choice(np.array([-1, 1], np.int8), (vocab_size, P))
    match = np.array([odds.get("same", 0.0), odds.get("copy", 0.0), 0.0])
    if match.any():
        weights = match / np.abs(match).max() / P
        terms |= {"codes": codes, "match": weights[:, None, None] * np.eye(P)}
    if "copy_pair" in odds:
        query, now = pair_codes(codes, P2)
        terms |= {"pair_query": query, "pair_now": now, "pair": np.full(P2, 1 / P2)}
    if spans:
        octave = np.ceil(np.log2(np.arange(1, 2 ** (spans - 1) + 1)))  # of the distances from 1 on
        terms["spans"] = np.stack([np.r_[False, octave == n] for n in range(spans)])
    if not terms:
        raise TooLittle("no rule is left: allow more --features or --spans")
    kinds = {n: np.int8 if n in CODES else np.float32 for n in terms}
    return {n: np.ascontiguousarray(x, kinds[n]) for n, x in terms.items()}


def difference_terms(
    ids: Array, pairs: Pairs, features: Array, pair_codes: Sequence[Array]
) -> dict[str, Array]:
    """
    match (3, P, P): the mean of features[x_i] x features[x_(j - s)] over useful pairs minus that
    over other pairs; pair: the same for the bits of two tokens. Scaled to log odds like Fisher's
    discriminant: by the difference of the mean values over the variance.
    """
    u = pairs.useful

    def scaled(whole: Array, score: Array) -> Array:
        return whole * ((score[u].mean() - score[~u].mean()) / max(score.var(), 1e-12))

    q, keys = features[ids[pairs.i]], [features[ids[(pairs.j - s).clip(0)]] for s in range(3)]
    w = np.stack([(q[u].T @ k[u] - q[~u].T @ k[~u]) / u.sum() for k in keys])
    terms = {
        "match": scaled(
            w, np.add.reduce([((q @ m) * k).sum(1) for m, k in zip(w, keys, strict=True)])
        )
    }
    product = two_tokens(pair_codes[0], pair_codes[1], ids, pairs).astype(np.float64)
    p = product[u].mean(0) - product[~u].mean(0)
    return terms | {"pair": scaled(p, product @ p)}


def two_tokens(a: Array, b: Array, ids: Array, pairs: Pairs) -> Array:
    """
    (n, P2) int8, per bit: whether the codes of the query's two tokens agree with those of the two
    before the key.
    """
    i, j = pairs.i, pairs.j
    return a[ids[i - 1]] * b[ids[i]] * a[ids[(j - 2).clip(0)]] * b[ids[j - 1]]


def rectified_codes(
    cutlass: Any, e: Array, text: Text, pairs: Pairs
) -> tuple[Array, dict[str, list]]:
    """
    Codes (V, P) int8: whether each number of a token's embedding lies in the lower half of those
    before keys that are not useful (a bit is most informative at one half); and these critical
    ranges.
    """
    names = [f"code {p}" for p in range(e.shape[1])]
    r = cutlass.Rectifier(
        groups={n: [n] for n in names}, sdfilter=None, snap=0.0, quantile_bounds=(0.0, 0.5)
    )
    r.fit(e[text.ids[pairs.j - 1]].astype(np.float64), ~pairs.useful, feature_names=names)
    return np.where(e > r.rmax_, -1, 1).astype(np.int8), {
        n: [None, float(x)] for n, x in zip(names, r.rmax_, strict=True)
    }


def spell(raw: Array, bits: int = 3) -> tuple[Array, Array]:
    """
    Numbers as codes of -1 and 1: from raw (V, D), within three deviations, codes (V, bits D) int8
    and A (D, bits D) with raw close to codes A^T. A match W of raw features is A^T W A on the
    codes, of rank D.
    """
    raw = (raw - raw.mean(0)) / np.maximum(raw.std(0), 1e-9) / 3
    level = np.rint((raw.clip(-1, 1) + 1) / 2 * (2**bits - 1)).astype(int)
    codes = np.concatenate([(level >> b & 1) * 2 - 1 for b in range(bits)], 1).astype(np.int8)
    return codes, np.kron(2.0 ** np.arange(bits) / (2**bits - 1), np.eye(raw.shape[1]))


def matrices(terms: dict[str, Array], rows: Array) -> dict[str, Array]:
    """
    What each group of a prior adds for rows (R, T) of tokens: (R, T, T) float32, also above the
    diagonal; tokens before the first count as 0.
    """
    R, T = rows.shape

    def before(codes: Array, s: int) -> Array:
        return np.pad(codes[rows][:, : T - s], ((0, 0), (s, 0), (0, 0))).astype(np.float32)

    out = {}
    if "lag" in terms:
        lag = np.pad(terms["lag"], (0, T))[np.abs(np.subtract.outer(np.arange(T), np.arange(T)))]
        out["lag"] = np.broadcast_to(lag, (R, T, T)).astype(np.float32)
    if "key" in terms:
        out["key"] = np.broadcast_to(terms["key"][rows][:, None], (R, T, T)).astype(np.float32)
    if "match" in terms:
        keys = sum(
            before(terms["codes"], s) @ w.T.astype(np.float32) for s, w in enumerate(terms["match"])
        )
        out["match"] = before(terms["codes"], 0) @ np.swapaxes(keys, 1, 2)
    if "pair" in terms:
        a, b = terms["pair_query"], terms["pair_now"]
        out["pair"] = (before(a, 1) * before(b, 0) * terms["pair"]) @ (
            before(a, 2) * before(b, 1)
        ).transpose(0, 2, 1)
    return out


def values_of(terms: dict[str, Array], ids: Array, pairs: Pairs) -> dict[str, Array]:
    """What each group of a prior adds for each of the pairs, (n,)."""
    i, j = pairs.i, pairs.j
    out = (
        {"lag": np.pad(terms["lag"], (0, 1))[(i - j).clip(max=len(terms["lag"]))]}
        if "lag" in terms
        else {}
    )
    if "key" in terms:
        out["key"] = terms["key"][ids[j]]
    if "match" in terms:
        q, k = (
            terms["codes"][ids[i]].astype(np.float32),
            [terms["codes"][ids[(j - s).clip(0)]] for s in range(len(terms["match"]))],
        )
        out["match"] = np.add.reduce(
            [
                ((q @ w.astype(np.float32)) * x).sum(1)
                for w, x in zip(terms["match"], k, strict=True)
            ]
        )
    if "pair" in terms:
        out["pair"] = two_tokens(terms["pair_query"], terms["pair_now"], ids, pairs) @ terms[
            "pair"
        ].astype(np.float32)
    return out


def finish(
    terms: dict[str, Array], options: Namespace, ids: Array, pairs: Pairs
) -> tuple[dict[str, Array], dict[str, float]]:
    """
    The wanted groups, sparse, banded and scaled to a largest value of 1; and the largest value of
    each before, its strength.
    """
    terms = {
        n: terms[n]
        for g in options.groups
        for n in (*GROUPS[g], *(["spans"] if g == "lag" else []))
        if n in terms
    }
    for name in set(terms) & set(GROUPS):
        size = np.abs(terms[name])
        terms[name] = np.where(size < np.quantile(size, options.sparsity), 0, terms[name])
    spans = terms.pop("spans", None)
    if "lag" in terms and options.band:
        reach = 0 if spans is None else int(np.flatnonzero(spans.any(0)).max()) + 1
        terms["lag"] = terms["lag"][: max(options.band, reach)]  # as long as the spans need
        terms["lag"][options.band :] = 0
    strength: dict[str, float] = {}
    for name, values in values_of(terms, ids, pairs).items():
        most = float(np.abs(terms[name] if name in ("lag", "key") else values).max())
        if most > 0 and np.isfinite(most):
            strength[name], terms[name] = most, (terms[name] / most).astype(np.float32)
    if not strength:
        raise TooLittle(
            "no term of the prior is left: fit on more --pairs, or allow more --features and "
            "--groups"
        )
    out = {n: np.ascontiguousarray(terms[n]) for g in strength for n in GROUPS[g]}
    if spans is not None and "lag" in strength:
        out["spans"] = np.ascontiguousarray(spans[:, : len(out["lag"])], np.float32)
    return out, strength


def discrimination(score: Array, useful: Array) -> tuple[float, float]:
    """
    AUC (Mann and Whitney; ties count half) and Youden's J (the largest sensitivity + specificity -
    1) of a score.
    """
    levels, place = np.unique(-score, return_inverse=True)
    counts = (
        np.bincount(place[w], minlength=len(levels)) / max(w.sum(), 1) for w in (useful, ~useful)
    )
    hits, misses = (np.r_[0, np.cumsum(c)] for c in counts)
    return float(((hits[1:] + hits[:-1]) / 2 * np.diff(misses)).sum()), float((hits - misses).max())
