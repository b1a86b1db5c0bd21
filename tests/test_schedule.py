"""Rates and momentum as functions of progress: bounds, plateau, floor, no jumps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.base.common import UserError
from nanochat.data.contexts import Contexts
from nanochat.train.schedule import Schedule

share = st.floats(0, 1)


@given(warmup=share, decay=share, final=share, progress=st.floats(-1, 2))
def test_the_rate_stays_between_zero_and_the_peak(warmup, decay, final, progress):
    assert 0 <= Schedule(warmup, decay, final).lr_mult(progress) <= 1


@given(warmup=st.floats(0.05, 1), decay=st.floats(0.05, 1), final=share, progress=share)
def test_the_rate_never_jumps(warmup, decay, final, progress):
    s, d = Schedule(warmup, decay, final), 1e-4
    assert abs(s.lr_mult(progress + d) - s.lr_mult(progress)) <= d / 0.05 + 1e-9


@given(decay=st.floats(0.01, 1), final=share, n=st.integers(1, 500))
def test_it_only_falls_without_warmup_and_ends_at_the_floor(decay, final, n):
    s = Schedule(0.0, decay, final)
    rates = [s.lr_mult(i / n) for i in range(n + 1)]
    assert rates[0] == 1
    assert rates[-1] == pytest.approx(final)
    assert rates == sorted(rates, reverse=True)


def test_plateau():
    s = Schedule(0.1, 0.4, 0.1)
    assert 0 < s.lr_mult(0) < 0.02
    assert [s.lr_mult(p) for p in (0.1, 0.3, 0.6)] == [1, 1, 1]
    assert s.lr_mult(0.8) == pytest.approx(0.55)
    assert s.lr_mult(1.0) == pytest.approx(0.1)


def test_no_decay_keeps_the_peak():
    assert Schedule(0.0, 0.0, 0.0).lr_mult(1.0) == 1


@given(step=st.integers(0, 10**6), warmup=st.integers(0, 1000))
def test_momentum_rises_to_its_height(step, warmup):
    s = Schedule(momentum=(0.85, 0.95), momentum_warmup=warmup)
    assert 0.85 <= s.momentum_at(step) <= s.momentum_at(step + 1) <= 0.95
    assert s.momentum_at(max(step, warmup)) == 0.95


@given(begin=st.floats(0, 0.99), factor=share, final=share, progress=share)
def test_redecay_falls_straight_from_where_it_stands(begin, factor, final, progress):
    s = Schedule(0.1, 0.4, final, since=(begin, factor))
    floor = min(final, factor)
    assert s.lr_mult(begin) == pytest.approx(factor) and s.lr_mult(1.0) == pytest.approx(floor)
    assert floor - 1e-12 <= s.lr_mult(progress) <= factor + 1e-12
    if progress > begin:
        line = factor + (floor - factor) * (progress - begin) / (1 - begin)
        assert s.lr_mult(progress) == pytest.approx(line, abs=1e-9)


# ---- context stages


def test_context_stages():
    c = Contexts.parse(("512@0", "1024@0.6", "2048@.9"), 2048)
    assert [c.at(p) for p in (0.0, 0.5999, 0.6, 0.75, 0.9, 1.0)] == [
        512,
        512,
        1024,
        1024,
        2048,
        2048,
    ]
    assert c.lengths == [512, 1024, 2048] and c.longest == 2048
    assert c.mean(float) == pytest.approx(0.6 * 512 + 0.3 * 1024 + 0.1 * 2048)
    assert Contexts.parse(("512@0 1024@0.6 2048@0.9",), 7, fixed=False) == c, (
        "in one text too, and setting the length"
    )
    alone = Contexts.parse((), 300)
    assert alone.stages == ((0.0, 300),) and alone.mean(lambda T: T * 1.1) == 300 * 1.1


@given(n=st.integers(1, 400), tenths=st.lists(st.integers(1, 9), max_size=4, unique=True))
def test_every_stage_begins_at_its_share_of_the_steps(n, tenths):
    begins = [0.0, *(t / 10 for t in sorted(tenths))]
    c = Contexts(tuple((begin, 2 << i) for i, begin in enumerate(begins)))
    met = [c.at(step / n) for step in range(n)]
    assert met == sorted(met)
    for begin, T in c.stages:
        first = next((step for step, t in enumerate(met) if t >= T), n)
        assert first == -(-round(begin * 10) * n // 10)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ("512", "'512' is not TOKENS@SHARE: write for example 512@0 1024@0.6"),
        ("512@0 1024@x", "'1024@x' is not TOKENS@SHARE"),
        ("512@0 1024@-0.5", "is not TOKENS@SHARE"),
        (
            "512@0.1 1024@0.6",
            "nothing is said of the run before its context stage 512@0.1: let the first one begin at 0, as in 512@0",
        ),
        ("512@0 1024@1", "1024@1 never trains"),
        ("512@0 1024@1.5", "1024@1.5 never trains"),
        ("0@0 1024@0.5", "0@0 never trains"),
        ("512@0 1024@0.6 2048@0.6", "2048@0.6 comes after 1024@0.6: let tokens and shares rise"),
        ("512@0 1024@0.6 2048@0.3", "2048@0.3 comes after 1024@0.6"),
        ("1024@0 512@0.5", "512@0.5 comes after 1024@0"),
        ("512@0 1024@0.5", "the last context stage has 1024 tokens, but sequence_len is 2048"),
    ],
)
def test_stages_that_make_no_sense(texts, says):
    with pytest.raises(UserError) as e:
        Contexts.parse(texts.split(), 2048)
    assert says in str(e.value)
