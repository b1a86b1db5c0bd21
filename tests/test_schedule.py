"""Rates and momentum as functions of progress: bounds, plateau, floor, no jumps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
