"""Packing: no token lost or repeated, no row too long, hardly any padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.packing import one_a_row, pack


def rows_of(packing):
    for r in range(len(packing)):
        span = range(packing.first[r], packing.first[r + 1])
        yield [
            (int(packing.document[p]), int(packing.start[p]), int(packing.stop[p])) for p in span
        ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 90), max_size=60), st.integers(2, 40))
def test_every_token_once_in_order_and_no_row_overflows(lengths, width):
    packing = pack(np.array(lengths, dtype=np.int64), width)
    pieces = {d: [] for d in range(len(lengths))}
    for row in rows_of(packing):
        assert row
        assert sum(stop - start + (start > 0) for _, start, stop in row) <= width
        for d, start, stop in row:
            pieces[d].append((start, stop))
    for d, length in enumerate(lengths):
        spans = sorted(pieces[d])
        assert [t for start, stop in spans for t in range(start, stop)] == list(range(length))
        assert all(stop > start for start, stop in spans)
        if length <= width:
            assert len(spans) == (length > 0)  # only a document longer than a row is split
        else:
            assert spans[0] == (0, width)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 90)), max_size=60), st.integers(2, 40))
def test_the_rest_of_documents(rests, width):
    """Tokens begin:stop of each come once, in order; a later piece takes one more place."""
    begin, stop = (
        np.array([b for b, _ in rests], dtype=np.int64),
        np.array([b + n for b, n in rests], dtype=np.int64),
    )
    pieces = {d: [] for d in range(len(rests))}
    for row in rows_of(pack(stop, width, begin)):
        assert sum(b - a + (a > 0) for _, a, b in row) <= width
        for d, a, b in row:
            pieces[d].append((a, b))
    for d, (b, n) in enumerate(rests):
        assert [t for start, end in sorted(pieces[d]) for t in range(start, end)] == list(
            range(b, b + n)
        )
        if n + (b > 0) <= width and b == 0:
            assert len(pieces[d]) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=80), st.integers(2, 64))
def test_same_lengths_same_rows(lengths, width):
    a, b = pack(np.array(lengths), width), pack(np.array(lengths), width)
    assert all(
        np.array_equal(getattr(a, f), getattr(b, f)) for f in ("document", "start", "stop", "first")
    )


def test_nothing_to_pack():
    assert len(pack(np.array([], dtype=np.int64), 9)) == 0
    assert len(pack(np.array([0, 0]), 9)) == 0


def test_exact_fits():
    assert [len(r) for r in rows_of(pack(np.array([8, 8, 8]), 8))] == [1, 1, 1]
    assert len(pack(np.array([5, 3, 4, 4, 6, 2]), 8)) == 3
    # 8 + (7 + bos) places: two full rows, and 16 tokens need one place more than two rows have
    assert len(pack(np.array([15]), 8)) == 2
    assert len(pack(np.array([16]), 8)) == 3


def test_too_narrow():
    with pytest.raises(ValueError, match="1 places"):
        pack(np.array([3]), 1)


def padding(packing, width):
    return 1 - (packing.stop - packing.start + (packing.start > 0)).sum() / (len(packing) * width)


@pytest.mark.parametrize("width", [129, 257, 513, 1025, 2049])
@pytest.mark.parametrize("mean", [4.5, 5.5, 6.5, 7.5])
def test_hardly_any_padding_on_text_like_lengths(width, mean):
    lengths = np.random.default_rng(0).lognormal(mean, 0.8, 5000).astype(np.int64) + 1
    assert padding(pack(lengths, width), width) < 0.002


@pytest.mark.parametrize("width", [257, 513, 1025])
def test_padding_under_one_percent_without_splitting(width):
    lengths = (
        np.random.default_rng(0).normal(width / 4, width / 20, 5000).astype(np.int64).clip(2, width)
    )  # too alike to mix at will
    assert padding(pack(lengths, width), width) < 0.01


def test_lengths_that_go_badly_together_fill_their_holes():
    lengths = np.random.default_rng(0).integers(
        1400, 1900, 2000
    )  # remainders that never pair up in rows of 1024
    assert padding(pack(lengths, 1024), 1024) < 0.002


def test_one_a_row_truncates():
    packing = one_a_row(np.array([3, 30, 8]), 9)
    assert list(rows_of(packing)) == [[(0, 0, 3)], [(1, 0, 9)], [(2, 0, 8)]]
