"""
The generator of attention priors: reading, pairs, terms, measures, and the artifact it writes.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanochat.data.shards import prepare
from nanochat.data.sources import parse_sources
from nanochat.data.tokenizer import Tokenizer

DEV = Path(__file__).resolve().parent.parent / "dev"


def load(name: str) -> Any:
    sys.path.insert(0, str(DEV))
    try:
        spec: Any = importlib.util.spec_from_file_location(name, DEV / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(DEV))


rap_terms, worth, _, generator = map(
    load, ("rap_terms", "rap_worth", "rap_report", "generate_rap_prior")
)


def texts(seed, n=220):
    """Documents with names of their own that come again and again, so that copying pays."""
    rng = random.Random(seed)
    common = ["the", "of", "and", "a", "to", "in", "was", "he", "it", "that"]
    documents = []
    for _ in range(n):
        names = [
            " ".join(
                "".join(rng.choices("bdgklmnprst", k=2)) + rng.choice("aeiou") for _ in range(2)
            ).title()
            for _ in range(4)
        ]
        documents.append(
            " ".join(rng.choice(names if rng.random() < 0.5 else common) for _ in range(60))
            + f".\nIn {rng.randint(1, 99)}!"
        )
    return documents


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """
    A base folder as base_train leaves it: a tokenizer, and shards of two sources and both splits.
    """
    folder = tmp_path_factory.mktemp("rap")
    a, b = texts(1), texts(2, 40)
    tokenizer = Tokenizer.train(a + b, 320)
    tokenizer.save(folder / "tokenizer")
    for name, lines in (("one", a), ("two-train-2", b)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines))
        for split in ("train", "val"):
            prepare(
                parse_sources([f"{name}={folder / name}.jsonl"])[0],
                split,
                tokenizer,
                folder / "tokens",
            )
    return folder


def run(base, *argv):
    folders = [
        f"--tokenizer={base / 'tokenizer'}",
        f"--tokens={base / 'tokens'}",
        f"--out={base / 'p.safetensors'}",
    ]
    return generator.main([*folders, *argv])


SMALL = "--pairs", "600", "--max_lag", "64", "--code_bits", "8", "--pair_bits", "8"


def read(path):
    from safetensors import safe_open

    with safe_open(path, framework="np") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def text():
    """2,000 tokens of 12 kinds in documents of 40 to 80; token 0 begins each."""
    rng = np.random.default_rng(5)
    documents = [np.r_[0, rng.integers(1, 12, rng.integers(40, 80))] for _ in range(33)]
    lengths = np.array([len(d) for d in documents])
    return rap_terms.Text(
        np.concatenate(documents).astype(np.int32), np.repeat(np.cumsum(lengths) - lengths, lengths)
    )


# ---- reading


def test_it_reads_the_training_split_alone_and_splits_off_whole_documents(base):
    tokenizer = Tokenizer.load(base / "tokenizer")
    vocabulary = generator.read_tokenizer(base / "tokenizer")
    assert (
        vocabulary.fingerprint == tokenizer.fingerprint
        and len(vocabulary.tokens) == tokenizer.vocab_size
    )
    assert vocabulary.tokens[: len(tokenizer.ranks)] == list(tokenizer.ranks)
    shards = generator.find_shards(base / "tokens", vocabulary.fingerprint)
    assert list(shards) == ["one", "two-train-2"] and all(
        "-val-" not in str(f) for found in shards.values() for f, _ in found
    )
    fit, held = generator.read_text(shards, {}, 10**9, np.random.default_rng(0))
    train = [
        prepare(parse_sources([f"{n}={base / n}.jsonl"])[0], "train", tokenizer, base / "tokens")
        for n in shards
    ]
    want = sorted(tuple(s.tokens(i)) for s in train for i in range(len(s)))

    def documents(t):
        return [
            tuple(t.ids[b : b + n])
            for b, n in zip(*np.unique(t.begin, return_counts=True), strict=True)
        ]

    assert sorted(documents(fit) + documents(held)) == want
    assert 0.03 < len(held.ids) / sum(map(len, want)) < 0.08


def test_a_mixture_has_its_shares_and_repeats_a_short_source_but_not_into_what_is_held_out(base):
    shards = generator.find_shards(
        base / "tokens", generator.read_tokenizer(base / "tokenizer").fingerprint
    )
    sizes = {n: sum(m["tokens"] for _, m in found) for n, found in shards.items()}
    limit = 2 * sizes["one"]
    fit, held = generator.read_text(
        shards,
        generator.parse_mix(["one:1", "two-train-2:3"], list(shards)),
        limit,
        np.random.default_rng(0),
    )
    assert len(fit.ids) + len(held.ids) == pytest.approx(limit, rel=0.02)
    documents = {tuple(t.ids[b : b + 20]) for t in (held,) for b in np.unique(t.begin)}
    assert documents and not documents & {tuple(fit.ids[b : b + 20]) for b in np.unique(fit.begin)}


def test_shards_of_an_older_text_are_left_out(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.data.sources.PART_BYTES", 1)  # a shard for each file
    tokenizer, folder, tokens = Tokenizer.load(base / "tokenizer"), tmp_path / "own", tmp_path / "t"
    folder.mkdir()
    for seed in (3, 4, 3):  # the third time, the first shards are used again
        for name, kind in (("a", 1), ("b", seed)):
            lines = [json.dumps({"text": text}) for text in texts(kind, 40)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        shards = prepare(parse_sources([f"own={folder}"])[0], "train", tokenizer, tokens)
        found = generator.find_shards(tokens, tokenizer.fingerprint)["own"]
        assert len(found) == 2 and sum(meta["tokens"] for _, meta in found) == shards.total
    assert "shards of own, which tok_data or training did not use last" in capsys.readouterr().out


def test_the_generator_reads_the_shards_that_training_writes():
    from nanochat.data import shards

    assert generator.SHARD_FORMAT == shards.FORMAT


# ---- tokens and distances


def test_tokens_are_recognised_by_their_kind():
    kinds = generator.kinds(
        [b" the", b"ing", b" 12", b"7", b".", b" (", b".\n", b"", "é".encode(), b" \xc3\xa9t"]
    )
    assert kinds["word"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert kinds["digit"].tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert kinds["mark"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert kinds["newline"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]


def test_tokens_that_are_followed_alike_get_like_embeddings():
    rng = np.random.default_rng(0)
    kind = rng.integers(
        0, 3, 6000
    )  # three classes of five words, each class followed by a different one
    for n in range(1, len(kind)):
        kind[n] = (kind[n - 1] + 1) % 3
    ids = kind * 5 + rng.integers(0, 5, len(kind))
    e = rap_terms.embed(ids, 20, 8, "next")
    assert e.shape == (20, 8) and np.isfinite(e).all()
    like = e @ e.T
    assert like[0, 1] > 0.9 and like[0, 7] < 0.5 and (e[15:] == 0).all()


@pytest.mark.parametrize("source", ["event", "information"])
def test_the_lag_curve_finds_the_distance_that_tells(source):
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 30, 40_000)
    for n in range(
        5, len(ids)
    ):  # half of the tokens are those of five places before: the key at distance 4 is the next token
        if rng.random() < 0.5:
            ids[n] = ids[n - 5]
    lag = rap_terms.lag_curve(ids, 128, source)
    assert (
        lag.shape == (128,)
        and lag.argmax() == 4
        and lag[-1] == 0
        and abs(lag[60:]).max() < 0.5 * lag[4]
    )


def test_spans_end_where_distances_tell_half(text):
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 12, 60_000)
    for n in range(
        4, len(ids)
    ):  # the token before tells most, the three before that less, all others nothing
        dice = rng.random()
        if dice < 0.7:
            ids[n] = ids[n - 2] if dice < 0.4 else ids[n - 3 - rng.integers(3)]
    spans = rap_terms.find_spans(ids, 64, 2)
    assert (
        spans[0][:2] == (1, 1)
        and spans[1][0] == 2 < spans[1][1] < 12
        and spans[0][2] > 2 * spans[1][2] > 0
    )
    assert len(rap_terms.find_spans(ids, 64, 1)) == 1 and rap_terms.find_spans(ids, 64, 0) == []
    assert rap_terms.information(rng.integers(0, 12, 60_000), [1, 5]) == pytest.approx(0, abs=1e-3)


def test_the_worth_of_a_key_is_how_often_its_token_has_come_before(text):
    key = rap_terms.key_worth(text, 15, 16, strength=2.0)
    hits, n = np.zeros(15), np.zeros(15)
    for i, t in enumerate(text.ids):
        n[t] += 1
        hits[t] += t in text.ids[max(text.begin[i], i - 16) : i]
    average = hits.sum() / n.sum()
    assert key == pytest.approx(np.log((hits + 2 * average) / (n + 2) / average)) and key[14] == 0


# ---- pairs


@pytest.mark.parametrize("matched", [False, True])
def test_pairs_are_labelled_as_brute_force_labels_them(text, matched):
    p = rap_terms.sample_pairs(text, 1000, 20, np.random.default_rng(0), matched)
    assert len(p.i) == len(p.j) == 1000 and p.useful.sum() == 500
    for i, j, useful in zip(*p, strict=True):
        assert text.begin[i + 1] == text.begin[i] < j < i and i - j < 20
        assert useful == (text.ids[j] == text.ids[i + 1])
    if matched:
        n = np.bincount(text.ids)
        first, second = (
            np.stack([np.log2(p.i - p.j), np.log2(n[text.ids[p.j]])], 1)[p.useful == u].astype(int)
            for u in (True, False)
        )
        assert (first == second).all()


def test_the_same_seed_gives_the_same_pairs(text):
    a, b, c = (
        rap_terms.sample_pairs(text, 100, 20, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert all((x == y).all() for x, y in zip(a, b, strict=True)) and not (a.j == c.j).all()


def test_too_little_to_sample_is_reported(text):
    lonely = rap_terms.Text(np.arange(400, dtype=np.int32), np.zeros(400, np.int64))
    with pytest.raises(rap_terms.TooLittle, match="found only 0 of 100 useful pairs"):
        rap_terms.sample_pairs(lonely, 200, 20, np.random.default_rng(0))


def test_the_features_of_a_pair(text):
    p = rap_terms.sample_pairs(text, 300, 20, np.random.default_rng(0))
    share, e = (
        np.bincount(text.ids, minlength=15) / len(text.ids) + 1e-9,
        np.random.default_rng(0).normal(size=(15, 4)),
    )
    kind = {name: np.arange(15) % 3 == n for n, name in enumerate(("word", "mark", "digit"))} | {
        "newline": np.arange(15) > 9
    }
    f = rap_terms.columns(text, p, list(rap_terms.FEATURES), share, kind, e)
    x = text.ids
    assert list(f) == list(rap_terms.FEATURES)
    for n, (i, j) in enumerate(zip(p.i, p.j, strict=True)):
        assert (
            f["copy"][n] == (x[j - 1] == x[i])
            and f["same"][n] == (x[j] == x[i])
            and f["skip"][n] == (x[j - 2] == x[i])
        )
        assert f["copy_pair"][n] == (x[j - 1] == x[i] and x[j - 2] == x[i - 1])
        assert f["similar"][n] == pytest.approx(e[x[i]] @ e[x[j - 1]]) and f["distance"][
            n
        ] == np.log2(1 + i - j)
        assert f["key_frequency"][n] == np.log2(share[x[j]]) and f["key_word"][n] == (x[j] % 3 == 0)


# ---- terms


def random_terms(V=15, P=6, T=10, seed=0):
    rng = np.random.default_rng(seed)
    codes, a, b = (rng.choice(np.array([-1, 1], np.int8), (V, P)) for _ in range(3))
    return {
        "lag": rng.normal(size=T),
        "key": rng.normal(size=V),
        "codes": codes,
        "match": rng.normal(size=(3, P, P)),
        "pair_query": a,
        "pair_now": b,
        "pair": rng.normal(size=P),
    }


def test_the_values_of_a_prior_follow_the_definition(text):
    t, ids, T = random_terms(), text.ids[:30], 10
    i, j = map(np.ravel, np.meshgrid(np.arange(30), np.arange(30), indexing="ij"))
    i, j = i[j <= i], j[j <= i]
    values, whole = (
        rap_terms.values_of(t, ids, rap_terms.Pairs(i, j, None)),
        rap_terms.matrices(t, ids[None]),
    )
    for n, (q, k) in enumerate(zip(i, j, strict=True)):
        want = {"lag": t["lag"][q - k] if q - k < T else 0.0, "key": t["key"][ids[k]]}
        want["match"] = sum(
            t["codes"][ids[q]] @ t["match"][s] @ t["codes"][ids[k - s]] for s in range(3) if k >= s
        )
        want["pair"] = 0.0
        if k >= 2:
            a, b = t["pair_query"], t["pair_now"]
            want["pair"] = (
                t["pair"] * a[ids[q - 1]] * b[ids[q]] * a[ids[k - 2]] * b[ids[k - 1]]
            ).sum()
        for g, v in want.items():
            assert whole[g][0, q, k] == pytest.approx(v, abs=1e-5)
            assert k < 2 or values[g][n] == pytest.approx(v, abs=1e-5)


def test_a_finished_prior_has_largest_value_one_and_only_what_was_asked_for(text):
    p = rap_terms.sample_pairs(text, 400, 20, np.random.default_rng(0))
    a = Namespace(groups=["lag", "match", "pair"], sparsity=0.5, band=7)
    t, strength = rap_terms.finish(random_terms(), a, text.ids, p)
    assert set(t) == {"lag", "codes", "match", "pair_query", "pair_now", "pair"} and set(
        strength
    ) == {"lag", "match", "pair"}
    assert t["lag"].shape == (7,) and np.abs(t["lag"]).max() == 1
    values = rap_terms.values_of(t, text.ids, p)
    assert all(np.abs(values[g]).max() == pytest.approx(1) for g in ("match", "pair"))
    assert all((t[g] == 0).mean() == pytest.approx(0.5, abs=0.1) for g in ("match", "pair"))
    assert {n: x.dtype.name for n, x in t.items()} == {
        n: "float32" if n in strength else "int8" for n in t
    }
    with pytest.raises(rap_terms.TooLittle, match="no term"):
        rap_terms.finish({"lag": np.zeros(5)}, a, text.ids, p)


def test_the_band_ends_lag_and_no_span(text):
    p = rap_terms.sample_pairs(text, 400, 20, np.random.default_rng(0))
    given = random_terms() | {"spans": generator.span_masks([(1, 2, 0.5), (5, 8, 0.1)], 10)}
    for band, length in ((3, 9), (7, 9), (10, 10), (0, 10)):
        a = Namespace(groups=["lag"], sparsity=0.0, band=band)
        t, _ = rap_terms.finish(given, a, text.ids, p)
        assert np.flatnonzero(t["lag"]).tolist() == [*range(band or 10)]
        assert [np.flatnonzero(x).tolist() for x in t["spans"]] == [[1, 2], [5, 6, 7, 8]]
        assert len(t["lag"]) == t["spans"].shape[1] == length


class Rectifier:
    """Critical ranges as cutlass finds them: of values within a number of deviations."""

    def __init__(self, groups, quantile_bounds=None):
        self.bounds, self.sdfilter = quantile_bounds or (0.0, 1.0), 3.0

    def fit(self, x, y, feature_names):
        kept = x[y].astype(float)
        if self.sdfilter is not None:
            kept[np.abs(kept - kept.mean(0)) >= self.sdfilter * kept.std(0)] = np.nan
        self.rmin_, self.rmax_ = (np.nanquantile(kept, q, 0) for q in self.bounds)


def test_what_only_useful_pairs_have_is_a_rule():
    useful, cutlass = np.repeat([True, False], 50), SimpleNamespace(Rectifier=Rectifier)
    (rule,) = rap_terms.rectify(cutlass, {"copy": useful.astype(float)}, useful)
    assert (rule.of(useful.astype(float)) == np.where(useful, -1, 1)).all()
    with pytest.raises(rap_terms.TooLittle, match="no feature distinguishes"):
        rap_terms.fit_rules(cutlass, {"key_digit": np.zeros(100)}, useful, 0)


@pytest.mark.parametrize(("P", "bits"), [(32, 32), (8, 32), (16, 64), (2, 2)])
def test_every_bit_of_two_tokens_multiplies_two_other_bits(P, bits):
    query, now = rap_terms.pair_codes(np.arange(P)[None], bits)
    pairs = {*zip(query[0].tolist(), now[0].tolist(), strict=True)}
    assert len(pairs) == bits and all(a != b for a, b in pairs)


def test_raw_features_are_spelled_in_codes_to_within_a_step():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(50, 4))
    codes, whole = rap_terms.spell(raw, bits=3)
    want = ((raw - raw.mean(0)) / raw.std(0) / 3).clip(-1, 1)
    assert codes.shape == (50, 12) and codes.dtype == np.int8 and set(np.unique(codes)) == {-1, 1}
    assert np.abs(codes @ whole.T - want).max() <= 1 / 7 + 1e-9


def test_rules_become_terms(text):
    p = rap_terms.sample_pairs(text, 400, 20, np.random.default_rng(0))
    raw = {"copy": np.r_[np.ones(40), np.zeros(360)], "distance": np.log2(1 + p.i - p.j)}
    rules = [
        rap_terms.Rule("copy", None, 0.0, 1.5),
        rap_terms.Rule("distance", 0.0, 2.0, -0.5),
        rap_terms.Rule("same", None, 0.0, 9.0),
    ]
    assert rap_terms.effect(rules, "copy", np.array([0.0, 1.0])).tolist() == [-1.5, 1.5]
    lag = np.linspace(1, 0, 20)
    t = rap_terms.rules_terms(rules, raw, {"lag": lag, "key": np.ones(15)}, text.ids, p, 4, 4)
    assert set(t) == {"match", "lag"}  # nothing was found of pairs and keys
    assert np.abs(t["match"][1] - 3 / 4 * np.eye(4)).max() < 1e-12 and not t["match"][[0, 2]].any()
    assert t["lag"][0] > 0 and t["lag"] / t["lag"][0] == pytest.approx(lag)
    assert rules[0].words() == rap_terms.FEATURES["copy"][0] and rules[1].words().endswith(
        "is within 0..2"
    )


def test_the_difference_of_two_tokens_is_that_of_their_codes(text):
    p = rap_terms.sample_pairs(text, 400, 20, np.random.default_rng(0))
    p = p._replace(j=p.j.clip(2))
    rng = np.random.default_rng(1)
    a, b = (rng.choice(np.array([-1, 1], np.int8), (15, 6)) for _ in range(2))
    terms = rap_terms.difference_terms(text.ids, p, rng.normal(size=(15, 4)), (a, b))
    x, bits = text.ids, np.zeros((400, 6))
    for n, (i, j) in enumerate(zip(p.i, p.j, strict=True)):
        bits[n] = a[x[i - 1]] * b[x[i]] * a[x[j - 2]] * b[x[j - 1]]
    want = bits[p.useful].mean(0) - bits[~p.useful].mean(0)
    score = bits @ want
    gap = score[p.useful].mean() - score[~p.useful].mean()
    assert set(terms) == {"match", "pair"} and terms["match"].shape == (3, 4, 4)
    assert terms["pair"] == pytest.approx(want * gap / score.var())


# ---- measures


def test_auc_and_youden_against_brute_force():
    rng = np.random.default_rng(0)
    useful, score = rng.random(200) < 0.4, rng.integers(0, 9, 200).astype(float)
    score[useful] += 2
    pairs = [(p > n) + 0.5 * (p == n) for p in score[useful] for n in score[~useful]]
    area, index = rap_terms.discrimination(score, useful)
    assert area == pytest.approx(np.mean(pairs))
    best = max((score[useful] >= t).mean() - (score[~useful] >= t).mean() for t in np.unique(score))
    assert index == pytest.approx(best)


def test_the_bigram_table_sums_to_one(text):
    now = np.repeat(np.arange(12), 12)
    p = worth.bigram(text.ids, now, np.tile(np.arange(12), 12), 12).reshape(12, 12)
    assert p.sum(1) == pytest.approx(1) and (p > 0).all()


def test_a_copying_head_gains_by_the_copy_rule_where_text_repeats():
    rng = np.random.default_rng(0)
    documents = [np.tile(rng.integers(0, 40, 16), 4) for _ in range(120)]
    ids = np.concatenate(documents).astype(np.int32)
    t = rap_terms.Text(ids, np.repeat(np.arange(120) * 64, 64))
    head = worth.CopyingHead(t, t, 40, T=64, tokens=512)
    copy = np.stack(
        [np.pad(r[:, None] == r[None, :-1], ((0, 0), (1, 0))) for r in head.rows]
    ).astype(np.float32)
    gain, gates = head.tune({"match": copy})
    assert gain > 1.0 > head.gain(np.zeros(copy.shape, np.float32)) and gates["match"] > 2


# ---- the whole


@pytest.fixture(scope="module")
def correlation(base):
    assert run(base, "--generator", "correlation", *SMALL) == 0
    return read(base / "p.safetensors")


def test_the_artifact_is_what_training_reads(base, correlation):
    from nanochat.model import prior_artifact

    tokenizer = Tokenizer.load(base / "tokenizer")
    tensors, about = prior_artifact.load(
        str(base / "p.safetensors"), tokenizer.vocab_size, tokenizer.fingerprint
    )
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        n: t.shape for n, t in correlation[0].items()
    } and "correlation" in about


def test_the_artifact_records_its_origin(base, correlation):
    tensors, meta = correlation
    pair = {"pair_query", "pair_now", "pair"}
    assert set(tensors) == {"lag", "spans", "key", "codes", "match"} | pair
    assert tensors["match"].shape == (3, 24, 24) and tensors["pair"].shape == (8,)
    assert tensors["pair"].mean() > 0, "what repeats two tokens is useful"
    assert (meta["format"], meta["generator"]) == ("rap-1", "correlation")
    assert meta["tokenizer"] == Tokenizer.load(base / "tokenizer").fingerprint
    numbers = json.loads(meta["report"])
    assert (
        0.4 < numbers["auc"] <= 1
        and numbers["pairs"] == 600
        and numbers["rss_bytes"] >= 0
        and len(meta["split"]) == 64
    )
    page = (base / "p.html").read_text()
    assert (
        "<svg" in page and "Youden" in page and "http" not in page.replace("http://www.w3.org", "")
    )


def test_the_same_seed_gives_the_same_tensors(base, correlation):
    assert run(base, "--generator=correlation", *SMALL, f"--out={base / 'again.safetensors'}") == 0
    again, _ = read(base / "again.safetensors")
    assert all((again[n] == t).all() for n, t in correlation[0].items())


def test_spans_without_lag_are_not_named(base):
    out = base / "key.safetensors"
    assert run(base, "--generator=correlation", *SMALL, "--groups", "key", f"--out={out}") == 0
    tensors, meta = read(out)
    assert set(tensors) == {"key"} and json.loads(meta["spans"]) == []


def rap_python():
    if python := os.environ.get("NANOCHAT_RAP_PYTHON"):
        return python
    try:
        return sys.executable if metadata.version("cutlass") == generator.CUTLASS else None
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("kind", ["rules", "rectified"])
def test_the_full_cycle(base, kind):
    if not (python := rap_python()):
        pytest.skip(
            "no cutlass: set NANOCHAT_RAP_PYTHON to the Python of an environment that "
            "generate_rap_prior.py --env made"
        )
    out = base / f"{kind}.safetensors"
    command = [
        python,
        DEV / "generate_rap_prior.py",
        f"--tokenizer={base / 'tokenizer'}",
        f"--tokens={base / 'tokens'}",
        f"--out={out}",
    ]
    done = subprocess.run([*command, "--generator", kind, *SMALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tensors, meta = read(out)
    assert (
        "match" in tensors and meta["cutlass"] == generator.CUTLASS and json.loads(meta["ranges"])
    )
    assert tensors["match"][1].trace() > abs(
        tensors["match"][0].trace()
    )  # the copy rule is what there is to find
    if kind == "rules":
        assert any("token before the key" in rule for rule in json.loads(meta["rules"]))


# ---- the prior that is written by hand


def hand(base, *argv):
    """Run `hand` with a tokenizer alone, no tokens; the exit status."""
    folders = f"--tokenizer={base / 'tokenizer'}", f"--out={base / 'hand.safetensors'}"
    return generator.main(["--generator=hand", *folders, *argv])


def by_hand(base, *argv):
    """The artifact that `hand` writes."""
    assert hand(base, *argv) == 0
    return read(base / "hand.safetensors")


def test_hand_needs_a_tokenizer_alone(base, monkeypatch):
    monkeypatch.setattr(generator, "load_cutlass", None)
    monkeypatch.setattr(generator, "run_in", None)  # --env is not needed
    terms, meta = by_hand(base, f"--env={base / 'env'}")
    shapes = {n: (x.shape, x.dtype.name) for n, x in terms.items()}
    V = Tokenizer.load(base / "tokenizer").vocab_size
    assert shapes == {
        "codes": ((V, 32), "int8"),
        "match": ((3, 32, 32), "float32"),
        "pair_query": ((V, 32), "int8"),
        "pair_now": ((V, 32), "int8"),
        "pair": ((32,), "float32"),
        "spans": ((4, 9), "float32"),
    }
    assert [np.flatnonzero(x).tolist() for x in terms["spans"]] == [[1], [2], [3, 4], [5, 6, 7, 8]]
    assert meta["generator"] == "hand" and meta["cutlass"] == "none" and "split" not in meta
    assert [rule[:5] for rule in json.loads(meta["rules"])] == ["+1.54", "+0.47", "-0.80"]
    again, _ = by_hand(base)
    other, _ = by_hand(base, "--seed=1")
    assert all((again[n] == x).all() for n, x in terms.items())
    assert (other["codes"] != terms["codes"]).any()


def test_hand_says_what_its_rules_say(base):
    """Row a b c a b: after the second b, the key after the first b (c) has match and pair."""
    terms, _ = by_hand(base, "--code_bits=256", "--pair_bits=256")
    row = np.array([[11, 12, 13, 11, 12]])
    match, pair = (rap_terms.matrices(terms, row)[g][0] for g in ("match", "pair"))
    assert match[4, 2] == pytest.approx(1, abs=0.2), "the token before the key is the query's"
    assert match[4, 4] == match[4, 4].min() == pytest.approx(-0.52, abs=0.2), "the key is the query"
    assert match[4, 1] == pytest.approx(-0.52, abs=0.2) and abs(match[4, 3]) < 0.3
    assert pair[4, 2] == pytest.approx(1) and np.abs(pair[4, :2]).max() < 0.3


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--features", "copy", "--spans=0"], ["codes", "match"]),
        (["--features", "copy_pair", "--spans=0"], ["pair", "pair_now", "pair_query"]),
        (["--features", "copy_pair", "--spans=2"], ["pair", "pair_now", "pair_query", "spans"]),
    ],
    ids=str,
)
def test_hand_trains_with_any_of_its_rules(base, argv, names):
    import tiny
    import torch

    from nanochat.model import prior_artifact
    from nanochat.model.config import AttentionPriorKnobs
    from nanochat.model.gpt import GPT

    terms, _ = by_hand(base, *argv)
    assert sorted(terms) == names
    tokenizer = Tokenizer.load(base / "tokenizer")
    config = tiny.config(vocab_size=tokenizer.vocab_size)
    knobs = AttentionPriorKnobs(rap=str(base / "hand.safetensors"))
    config.rap, tensors = prior_artifact.prepare(
        knobs, config, tokenizer.fingerprint, torch.device("cpu")
    )
    model = tiny.randomise(GPT.build(config), 0)
    model.prior.load_state_dict(tensors)
    x = torch.randint(0, 9, (2, 16), generator=torch.Generator().manual_seed(0))
    model.loss(x, x).backward()
    assert model.prior.gates.grad.abs().sum() > 0


# ---- what it refuses


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--mix", "one:1"], "--mix has no effect with --generator hand, which reads no text"),
        (["--tokens=folder"], "--tokens has no effect"),
        (["--max_tokens=5"], "--max_tokens has no effect"),
        (["--others=matched"], "--others has no effect"),
        (["--codes=next"], None),
        (["--features", "similar"], "no feature similar: choose from copy, copy_pair, same"),
        (["--features", "same", "--code_bits=1"], "--code_bits 1 is out of range"),
    ],
    ids=str,
)
def test_hand_refuses_what_only_fitted_priors_obey(base, capsys, argv, says):
    if says is None:
        assert hand(base, *argv) == 0  # the default is no wish
    else:
        assert hand(base, *argv) == 2 and says in capsys.readouterr().err


def refusal(capsys, base, *argv):
    assert run(base, *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def copied(base, to, change=lambda folder, meta: meta):
    """The shards in another folder, with their meta.json changed."""
    for meta in sorted((base / "tokens").glob("*/meta.json")):
        folder = to / meta.parent.name
        folder.mkdir(parents=True)
        for file in meta.parent.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "meta.json").write_text(json.dumps(change(folder, json.loads(meta.read_text()))))
    return f"--tokens={to}"


def test_missing_tokens_and_tokenizers_are_reported(base, tmp_path, capsys):
    plain = "--generator=correlation"
    assert "no training shards of text: let base_train" in refusal(
        capsys, base, plain, f"--tokens={tmp_path / 'none'}"
    )
    assert "there is no tokenizer in" in refusal(capsys, base, plain, f"--tokenizer={tmp_path}")
    for name in ("tokenizer.json", "meta.json"):
        (tmp_path / name).write_text("{")
    assert "damaged (JSONDecodeError)" in refusal(capsys, base, plain, f"--tokenizer={tmp_path}")
    for option in ("--code_bits 0", "--max_tokens 0", "--band -1", "--seed -1"):
        said = refusal(capsys, base, plain, option.replace(" ", "="))
        assert f"{option} is out of range" in said
    assert "is not NAME:WEIGHT" in refusal(capsys, base, plain, "--mix", "one")
    assert "no training shards of three, only of one, two-train-2" in refusal(
        capsys, base, plain, "--mix", "three:1"
    )
    assert "no feature beauty" in refusal(capsys, base, plain, "--features", "beauty")


def test_shards_that_may_not_be_used_are_refused(base, tmp_path, capsys):
    plain, val = "--generator=correlation", tmp_path / "val"
    copied(base, val)
    for folder in val.glob("*-train-*"):
        if "-val-" not in folder.name:
            folder.rename(tmp_path / folder.name)
    assert "only validation shards, which no prior may see" in refusal(
        capsys, base, plain, f"--tokens={val}"
    )
    other = copied(base, tmp_path / "other", lambda folder, meta: {**meta, "tokenizer": "x"})
    assert "(4 shards are of another tokenizer)" in refusal(capsys, base, plain, other)
    newer = copied(base, tmp_path / "newer", lambda folder, meta: {**meta, "format": 3})
    assert "has format 3, this generator reads 2" in refusal(capsys, base, plain, newer)
    older = copied(base, tmp_path / "older", lambda folder, meta: {**meta, "format": 1})
    assert "no training shards of text: let base_train" in refusal(capsys, base, plain, older)
    strange = copied(base, tmp_path / "strange", lambda folder, meta: {**meta, "format": "2"})
    assert "is damaged (TypeError)" in refusal(capsys, base, plain, strange)

    def cut(folder, meta):
        os.truncate(folder / "tokens.bin", 2)
        return meta

    def empty(folder, meta):
        (folder / "tokens.bin").write_bytes(b"")
        np.save(folder / "offsets.npy", np.zeros(1, np.int64))
        return {**meta, "tokens": 0, "documents": 0}

    assert "is damaged" in refusal(capsys, base, plain, copied(base, tmp_path / "cut", cut))
    assert "holds 0 tokens, too few" in refusal(
        capsys, base, plain, copied(base, tmp_path / "empty", empty)
    )


def test_the_wrong_cutlass_is_recognised(base, monkeypatch, capsys):
    def absent(name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(generator.metadata, "version", absent)
    monkeypatch.setattr(generator.util, "find_spec", lambda name: None)
    assert (
        "cutlass 0.9.0, the rectified LASSO, is not installed here: run this file with --env"
        in refusal(capsys, base)
    )
    monkeypatch.setattr(
        generator.util, "find_spec", lambda name: SimpleNamespace(origin="dsl/cutlass/__init__.py")
    )
    assert "(dsl/cutlass/__init__.py) is NVIDIA's or another's" in refusal(capsys, base)
    monkeypatch.setattr(generator.metadata, "version", lambda name: "0.8.1")
    assert "installed in version 0.8.1, and this generator was written for 0.9.0" in refusal(
        capsys, base
    )
    monkeypatch.setattr(generator.metadata, "version", lambda name: generator.CUTLASS)
    monkeypatch.setattr(
        generator, "import_module", lambda name: SimpleNamespace(__file__="dsl/cutlass/__init__.py")
    )
    assert "NVIDIA's cutlass (dsl/cutlass/__init__.py) hides" in refusal(capsys, base)


# ---- the experiments


def test_each_generator_runs_with_what_it_needs(tmp_path, monkeypatch):
    """Only those that fit rules get an environment and the mixture; a prior is made once."""
    load("trials")
    experiments, runs = load("rap_experiments"), []
    monkeypatch.setattr(experiments.trials, "run", lambda words, base: runs.append(words))
    env, data = tmp_path / "env", ["wikipedia=texts/wikipedia:0.45", "books=texts/books:0.4"]
    generators = {
        c.generator
        for e in experiments.EXPERIMENTS.values()
        for c in e.conditions.values()
        if c.generator
    }
    outs = {experiments.prior(generator, tmp_path, data, env) for generator in generators}
    assert len(outs) == len(generators) == len(runs) and not any("=" in out for out in outs)
    for words in runs:
        by_hand = "hand" in words
        assert ("--env" in words) != by_hand and ("wikipedia:0.45" in words) != by_hand
    (tmp_path / "priors").mkdir()
    (tmp_path / experiments.prior("--generator hand", tmp_path, data, env)).touch()
    before = len(runs)
    experiments.prior("--generator hand", tmp_path, data, env)
    assert len(runs) == before
    assert all(next(iter(e.conditions)) == "none" for e in experiments.EXPERIMENTS.values())


def test_experiments_keep_to_one_folder_of_texts(tmp_path, monkeypatch):
    trials, (old, new) = load("trials"), (tmp_path / "old", tmp_path / "new")
    monkeypatch.setattr(trials, "run", lambda words, base: None)
    old.mkdir()
    trials.prepared("prose", old, tmp_path / "base", 512)
    old.rename(new)
    trials.prepared("prose", new, tmp_path / "base", 512)
    assert (tmp_path / "base/texts").resolve() == new
    old.mkdir()
    with pytest.raises(SystemExit, match=f"leads to {new}, not to {old}"):
        trials.prepared("prose", old, tmp_path / "base", 512)


def test_made_tables_repeat_the_row_above_in_three_rows_of_five():
    rows = [
        line.split(",")
        for n in range(40)
        for line in load("made_tables").table(random.Random(n)).split("\n")[1:]
    ]
    pairs = [(a, b) for a, b in pairwise(rows) if int(b[0]) == int(a[0]) + 1]
    same = [x == y for a, b in pairs for x, y in zip(a[1:-1], b[1:-1], strict=False)]
    assert 0.58 < np.mean(same) < 0.68  # 0.6, and by chance one in twelve of the others
    assert all((a[1] == b[1]) <= (a[-1] == b[-1]) for a, b in pairs), "a name has one price"
