"""The data summary: its figures are those of what the feed draws, and it refuses what cannot be meant."""

import json
from collections import Counter

import numpy as np
import pytest
from test_feed import make

from nanochat.base.common import UserError
from nanochat.data import order
from nanochat.data.feed import RowFeed
from nanochat.data.shards import prepare_conversations
from nanochat.data.summary import survey


def masked(path, rows, name="talk-conversations-train", divided=True):
    """Conversations of (tokens, supervised tokens at their end)."""

    class Plain:
        fingerprint, vocab_size, bos = "plain", 50_000, 0

        def render_conversation(self, row):
            length, taught = row
            return [0, *range(1, length)], [0] * (length - taught) + [1] * taught

    key = f"{name} {rows}"
    return prepare_conversations(name, rows, Plain(), path, identity=key, divided=divided)


def text(path, lengths, name="a", first=1, divided=True):
    shards = make(path, lengths, name, first=first)
    shards.masked, shards.divided = False, divided
    shards._masks = [None] * len(shards._masks)
    return shards


def feed(*sources, rows=8, T=32, **changes):
    pairs = [s if isinstance(s, tuple) else (s, None) for s in sources]
    return RowFeed(pairs, rows=rows, device_rows=rows, sequence_len=T, seed=1, **changes)


def summary(f, *validation, steps=None):
    return survey(f.order, validation, f.rows, steps)


def drawn(f, steps, borders):
    """Tokens that a feed really hands out in some steps, by the source of each."""
    counts = Counter()
    for _ in range(steps):
        for batch in next(f):
            ids = batch.targets.numpy().ravel()
            counts.update(np.searchsorted(borders, ids[ids > 0], side="right").tolist())
    return [counts[i] for i in range(len(borders) + 1)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(order, "BLOCK_TOKENS", 4000)


@pytest.mark.parametrize("weights", [(None, None, None), (0.5, 0.3, 0.2), (1, 1, 20), (0.01, 5, 1)])
def test_shares_and_passes_are_what_the_feed_draws(tmp_path, weights):
    rng = np.random.default_rng(0)
    sources, borders, first = [], [], 1
    for name, (low, high, n) in zip(
        "abc", [(2, 20, 200), (30, 200, 60), (5, 60, 300)], strict=True
    ):
        lengths = rng.integers(low, high, n).tolist()
        sources.append(text(tmp_path, lengths, name, first))
        first += sum(lengths) - n
        borders.append(first)
    f = feed(*zip(sources, weights, strict=True), total_steps=240)
    found = summary(f, steps=240).sources
    counts = drawn(f, 240, borders[:-1])
    # A row holds the <|bos|> of each document too, which is never a target
    words = [s.share * s.to_learn / s.tokens for s in found]
    assert [w / sum(words) for w in words] == pytest.approx(
        [n / sum(counts) for n in counts], rel=0.05, abs=0.002
    )
    real = [n / s.to_predict().sum() for n, s in zip(counts, sources, strict=True)]
    assert [s.passes for s in found] == pytest.approx(real, rel=0.05, abs=0.02)


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_epochs_are_passes(tmp_path, epochs, mode):
    talk = masked(tmp_path, [(20, 5), (40, 10), (9, 3)] * 20)
    f = feed(talk, epochs=epochs, mode=mode)
    found = summary(f)
    assert found.sources[0].passes == pytest.approx(epochs)
    assert found.steps == pytest.approx(sum(1 for _ in f), abs=1 + 0.02 * found.steps)


def test_padded_rows_are_counted_after_the_cut(tmp_path):
    short, long = masked(tmp_path, [(20, 5)] * 30, "s"), masked(tmp_path, [(200, 180)] * 30, "l")
    a, b = summary(feed((short, 1), (long, 1), mode="padded"), steps=10).sources
    assert (a.tokens, b.tokens, b.longer, b.longest) == (600, 990, 30, 200)
    assert b.to_learn == 13 * 30, "of 33 tokens that are left, 20 belong to the prompt"
    assert b.share < a.share, "each gives as many tokens, of which the long ones lose most"
    assert "30 of 60 are longer and lose their end" in "\n".join(
        summary(feed((short, 1), (long, 1), mode="padded"), steps=10).lines()
    )


def test_a_summary_is_four_to_eight_lines_and_json(tmp_path):
    val = text(tmp_path, [40] * 8, "val")
    for sources in (["a"], ["a", "b"], ["a", "b", "c", "d"]):
        shards = [text(tmp_path, [30] * 50, name) for name in sources]
        found = summary(feed(*shards), val, steps=7)
        assert 4 <= len(found.lines()) <= 8 and json.loads(json.dumps(found.record()))
        assert "7 steps of 8 rows of 32 tokens: 1.79k tokens" in "\n".join(found.lines())
        assert "8 documents, 320 tokens" in found.lines()[2]
    clock = "\n".join(summary(feed(shards[0]), val).lines())
    assert "until the time is over" in clock and "1 in 6 steps" in clock


@pytest.mark.parametrize(
    ("rows", "mode"),
    [
        ([(50, 0)] * 20, "packed"),  # every turn is masked
        ([(50, 0)] * 20, "padded"),
        ([(90, 40)] * 20, "padded"),  # the replies are beyond the context
        ([(34, 1), (400, 12)] * 9, "padded"),
    ],
)
def test_nothing_to_learn_is_an_error(tmp_path, rows, mode):
    found = summary(feed(masked(tmp_path, rows), mode=mode), steps=3)
    with pytest.raises(
        UserError, match="nothing to learn in talk: not one conversation has a reply"
    ):
        found.check(useful=4)
    f = feed(masked(tmp_path, [*rows, (30, 9)]), mode=mode)
    mixed = summary(f, steps=3)
    mixed.check(useful=4)
    assert mixed.sources[0].silent == len(rows)
    assert f"none in {len(rows)} of {len(rows) + 1} conversations of talk" in mixed.lines()[-1]


@pytest.mark.parametrize(
    ("train", "val", "says"),
    [
        ([20] * 20, [30] * 60, "validation split of a has 1,800 tokens and its training split"),
        ([20] * 20, [401], "has 401 tokens and its training split only 400"),
        ([20] * 50, [9] * 8, "has only 72 tokens, too few"),
        ([20] * 50, [2], "has only 2 tokens, too few"),
    ],
)
def test_a_useless_validation_split_is_an_error(tmp_path, train, val, says):
    shards, held_out = text(tmp_path, train), text(tmp_path, val, "val")
    with pytest.raises(UserError, match=says):
        summary(feed(shards), held_out, steps=3).check(useful=4)
    shards.divided = False  # generated, or drawn: validation takes nothing from training
    summary(feed(shards), held_out, steps=3).check(useful=4)


def test_conversations_without_a_reply_to_validate_on(tmp_path):
    train, val = masked(tmp_path, [(20, 5)] * 9), masked(tmp_path, [(20, 0)], "val")
    with pytest.raises(UserError, match="no reply to predict"):
        summary(feed(train), val, steps=3)
    summary(feed(train), masked(tmp_path, [(20, 1)], "val"), steps=3).check(useful=4)


@pytest.mark.parametrize("weights", [(1, 1e9), (1e-9, 1), (1e-300, 5)])
def test_a_source_that_is_never_drawn_is_an_error(tmp_path, weights):
    f = feed(*zip([text(tmp_path, [20] * 50, n) for n in "ab"], weights, strict=True))
    with pytest.raises(UserError, match="a would never be drawn"):
        summary(f, steps=3).check(useful=4)


@pytest.mark.parametrize(("steps", "said"), [(2, False), (20, True), (400, True)])
def test_many_passes_are_said(tmp_path, steps, said, capsys):
    summary(feed(text(tmp_path, [30] * 30)), steps=steps).check(useful=4)
    assert ("this run goes over a" in capsys.readouterr().err) == said
