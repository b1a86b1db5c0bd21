"""Attention against a float64 oracle, and the key-value cache against whole sequences."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen

from nanochat.model import attention
from nanochat.model.attention import attend
from nanochat.model.cache import KVCache


def oracle(q, k, v, window=0):
    """softmax(q k^T / sqrt(D)) v written out, dense, every mask entry explicit."""
    T, groups = q.size(2), q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    seen = (j <= i) & ((i - j < window) if window > 0 else torch.ones(T, T, dtype=torch.bool))
    scores = (q @ k.transpose(2, 3) / q.size(3) ** 0.5).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ v


def draw(B, H, H_kv, T, D=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, h, T, D, dtype=dtype, generator=g) for h in (H, H_kv, H_kv))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 2, 7, 128, 200])
@pytest.mark.parametrize("window", [0, 1, 3, 64, 130])
def test_attend_is_the_oracle(
    heads, T, window
):  # outputs and gradients, also for T that no block divides
    exact = draw(2, *heads, T)
    weights = torch.randn(2, heads[0], T, 8, dtype=torch.float64)
    want_in = [x.clone().requires_grad_() for x in exact]
    got_in = [x.float().requires_grad_() for x in exact]
    want, got = oracle(*want_in, window), attend(*got_in, window)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
    (want * weights).sum().backward()
    (got * weights.float()).sum().backward()
    for a, b in zip(got_in, want_in, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("window", [0, 40])
def test_attend_without_gradients_and_in_bfloat16(window):
    q, k, v = draw(1, 4, 2, 150)
    want = oracle(q, k, v, window)
    with torch.no_grad():
        torch.testing.assert_close(
            attend(q.float(), k.float(), v.float(), window).double(), want, atol=2e-5, rtol=1e-4
        )
        low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), window)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("flash", [False, True])
def test_what_gpus_run_is_the_oracle_too(flash, monkeypatch):
    """
    With flash, what is asked of it, by its documentation: q, k, v (tokens, heads, D). It gets every
    window; without it, torch gets copies of shared heads, as it would else hold all scores.
    """
    windowed, grouped, real = [], [], attention.F.scaled_dot_product_attention

    def watched(q, k, v, *given, **options):
        grouped.append(k.size(1) < q.size(1))
        return real(q, k, v, *given, **options)

    def documented(q, k, v, starts, starts_k, longest, _, *, scale, window_size, enable_gqa):
        windowed.append(window_size[0] + 1)
        assert starts.tolist() == starts_k.tolist() and starts.dtype == torch.int32
        assert scale == q.size(2) ** -0.5 and enable_gqa == (q.size(1) > k.size(1))
        assert window_size[1] == 0 and longest == starts[1]
        rows = itertools.pairwise(starts)
        parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in rows]
        return torch.cat([oracle(*part, window_size[0] + 1)[0].transpose(0, 1) for part in parts])

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", documented)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention, "has_flash", lambda *_: flash)
    for T, window in ((5, 3), (128, 64), (200, 0), (300, 130), (64, 64)):
        q, k, v = draw(2, 4, 2, T)
        torch.testing.assert_close(attention.attend_fused(q, k, v, window), oracle(q, k, v, window))
    assert windowed == ([3, 64, 130] if flash else [])
    assert grouped == ([True] * 2 if flash else [False] * 5)


T_DOCUMENTS, BEGINS = 150, ([0, 20, 37, 130], [0, 16, 128, 149])  # of two rows


def by_document(q, k, v, window):
    """The oracle on every document alone."""
    rows = []
    for b, begins in enumerate(BEGINS):
        ends = [*begins[1:], T_DOCUMENTS]
        parts = [
            oracle(*(x[b : b + 1, :, i:j] for x in (q, k, v)), window)
            for i, j in zip(begins, ends, strict=True)
        ]
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def starts_of_documents():
    idx = torch.ones(2, T_DOCUMENTS, dtype=torch.int64)
    for row, begins in zip(idx, BEGINS, strict=True):
        row[begins] = 0
    return attention.document_starts(idx, 0)


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_documents_do_not_see_each_other(window, heads):
    want_in = [x.requires_grad_() for x in draw(2, *heads, T_DOCUMENTS)]
    got_in = [x.detach().clone().requires_grad_() for x in want_in]
    want = by_document(*want_in, window)
    got = attend(*got_in, window, starts=starts_of_documents())
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    (want * weights).sum().backward(), (got * weights).sum().backward()
    torch.testing.assert_close(got, want)
    for a, b in zip(got_in, want_in, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("window", [0, 12])
def test_documents_on_a_gpu(flash, window, monkeypatch):
    """Flash is asked for sequences of any length, empty ones at the end, by its documentation."""

    def documented(q, k, v, bounds, bounds_k, most, _, *, scale, window_size, enable_gqa):
        assert bounds.dtype == torch.int32 and bounds.tolist() == bounds_k.tolist()
        assert window_size == (window - 1, 0) and most == T_DOCUMENTS
        assert bounds[0] == 0 and bounds[-1] == len(q)
        parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in pairs(bounds)]
        return torch.cat([oracle(*part, window)[0].transpose(0, 1) for part in parts])

    def pairs(bounds):
        return [(a, b) for a, b in itertools.pairwise(bounds.tolist()) if a < b]

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", documented)
    monkeypatch.setattr(attention, "has_flash", lambda *_: flash)
    q, k, v = draw(2, 4, 2, T_DOCUMENTS)
    got = attention.attend_fused(q, k, v, window, None, starts_of_documents())
    torch.testing.assert_close(got, by_document(q, k, v, window))


def test_the_number_of_documents_is_bounded():
    """Where more begin than kernels are told of, neighbours count as one."""
    starts = attention.document_starts(torch.zeros(3, 100, dtype=torch.int64), 0)
    assert starts.unique().tolist() == list(range(0, 100, attention.CELL))
    begins = starts == torch.arange(100)
    assert begins.sum() <= 3 * (100 // attention.CELL + 2)
    assert not attention.document_starts(torch.ones(2, 9, dtype=torch.int64), 0).any()


def test_a_window_on_a_gpu_is_traced_in_one_graph_with_its_gradients():
    """On the meta device, where torch checks shapes and derivatives of the kernel it would call."""
    shapes = 4, 2, 2
    starts = torch.empty(2, 64, device="meta", dtype=torch.int64)
    q, k, v = (
        torch.empty(2, h, 64, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for h in shapes
    )
    traced = torch.compile(attention.attend_fused, backend="eager", fullgraph=True)
    for attend_window in (attention.attend_fused, traced):
        y = attend_window(q, k, v, 16) + attend_window(q, k, v, 0, None, starts)
        assert y.shape == q.shape and y.dtype == q.dtype
        grads = torch.autograd.grad(y.sum(), (q, k, v))
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]


def test_flash_is_used_where_it_runs(monkeypatch):
    card = SimpleNamespace(major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    assert attention.has_flash(gpu, half, 64) and attention.has_flash(gpu, torch.float16, 256)
    assert not attention.has_flash(gpu, torch.float32, 64)
    assert not attention.has_flash(gpu, half, 257) and not attention.has_flash(gpu, half, 100)
    for card.major, card.minor, wide in ((8, 0, True), (8, 9, False), (9, 0, True), (12, 0, False)):
        assert attention.has_flash(gpu, half, 208) == wide and attention.has_flash(gpu, half, 192)
    card.major = 7  # Turing
    assert not attention.has_flash(gpu, torch.float16, 64)
    assert not attention.has_flash(torch.device("cpu"), half, 64)
    assert attention.has_flash(torch.device("meta"), half, 64)


def test_a_mask_that_was_made_for_a_reply_serves_training():
    with torch.inference_mode():
        mask = attention.flex_mask(7, 0, torch.device("cpu"))
    assert not mask.kv_indices.is_inference()


def cached(cache, q, k, v, sizes, window=0, lengths=None):
    """
    Attend through the cache in passes of these sizes: (B, H, T, D). Rows end at `lengths`; the
    rest is padding.
    """
    B, H, T, D = q.shape
    lengths = lengths or [T] * B
    out = torch.full((B, H, T, D), float("nan"), dtype=q.dtype)
    done = [0] * B
    for n in sizes:
        counts = [min(n, lengths[b] - done[b]) for b in range(B)]
        part = [
            torch.full((B, x.size(1), n, D), 9.0, dtype=x.dtype) for x in (q, k, v)
        ]  # 9: what padding holds
        for b in range(B):
            for x, y in zip(part, (q, k, v), strict=True):
                x[b, :, : counts[b]] = y[b, :, done[b] : done[b] + counts[b]]
        cache.begin(n)
        for layer in range(2):
            y = cache.attend(layer, *part, window)
        assert not y.isnan().any()
        cache.advance(counts)
        for b in range(B):
            out[b, :, done[b] : done[b] + counts[b]] = y[b, :, : counts[b]]
            done[b] += counts[b]
    assert done == lengths == cache.lengths
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [0, 1, 5, 12])
@pytest.mark.parametrize("sizes", [[20], [1] * 20, [7, 6, 7], [13, 1, 1, 5], [19, 1]])
def test_the_cache_is_the_whole_sequence_at_every_position(heads, window, sizes):
    q, k, v = draw(2, *heads, 20)
    cache = KVCache(2, 2, heads[1], 20, 8, "cpu", torch.float64)  # filled to its last slot
    torch.testing.assert_close(cached(cache, q, k, v, sizes, window), oracle(q, k, v, window))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_ragged_rows_in_the_cache(heads, window):
    q, k, v = draw(3, *heads, 20)
    want = oracle(q, k, v, window)
    lengths = [20, 13, 2]
    for sizes in ([20], [8, 8, 4], [3, 10, 6, 1], [1] * 20):
        got = cached(
            KVCache(2, 3, heads[1], 20, 8, "cpu", torch.float64), q, k, v, sizes, window, lengths
        )
        for b, n in enumerate(lengths):
            torch.testing.assert_close(got[b, :, :n], want[b, :, :n])


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("sizes", [[70] + [1] * 80, [1] * 66 + [70, 14], [50] * 3, [149, 1]])
def test_a_cache_that_grows_keeps_what_it_holds(window, sizes):
    """On a CPU it has the slots that its longest row needs, in whole blocks."""
    q, k, v = draw(2, 4, 2, 150)
    cache = KVCache(2, 2, 2, 200, 8, "cpu", torch.float64)
    assert cache.k.size(3) == 64
    want = oracle(q, k, v, window)
    got = cached(cache, q, k, v, sizes, window, [150, 97] if len(sizes) == 3 else None)
    assert cache.k.size(3) == 160
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1, :, :97], want[1, :, :97])


def test_padding_at_the_end_of_the_capacity_spoils_nothing():
    """
    Row 0 gets 3 tokens; row 1 gets the one that fills its last slot and two of padding, which must
    not overwrite that slot.
    """
    q, k, v = draw(2, 2, 2, 8)
    cache = KVCache(1, 2, 2, 8, 8, "cpu", torch.float64)
    cache.advance([5, 7])
    cache.k[0, :, :, :7], cache.v[0, :, :, :7] = k[:, :, :7], v[:, :, :7]
    feed = [torch.full((2, 2, 3, 8), 9.0, dtype=torch.float64) for _ in range(3)]
    for x, y in zip(feed, (q, k, v), strict=True):
        x[0], x[1, :, 0] = y[0, :, 5:], y[1, :, 7]
    cache.begin(3)
    got = cache.attend(0, *feed)
    cache.advance([3, 1])
    want = oracle(q, k, v)
    torch.testing.assert_close(got[0], want[0, :, 5:])
    torch.testing.assert_close(got[1, :, 0], want[1, :, 7])
    torch.testing.assert_close(cache.k[0, :, :, :8], k)


def test_rows_are_copied_dropped_and_reordered():
    _, k, v = draw(3, 2, 2, 6)
    cache = KVCache(1, 3, 2, 10, 8, "cpu", torch.float64)
    cache.begin(6)
    cache.attend(0, k, k, v)
    cache.advance([6, 4, 5])
    more = cache.expand([2, 0, 0])
    assert more.lengths == [5, 6, 6] and more.capacity == 10
    torch.testing.assert_close(more.k[0, 0, :, :5], k[2, :, :5])
    more.k.zero_()
    torch.testing.assert_close(cache.k[0, :, :, :6], k)  # a copy, not a view
    cache.drop(0)  # the last row takes its place
    assert cache.lengths == [5, 4] and cache.k.size(1) == 2
    torch.testing.assert_close(cache.v[0, 0, :, :5], v[2, :, :5])
    torch.testing.assert_close(cache.v[0, 1, :, :4], v[1, :, :4])
    cache.drop(1)
    assert cache.lengths == [5]


def test_appended_rows_attend_as_in_their_own_cache():
    """Two caches of different lengths and capacities become one; each row goes on as in its own."""
    q, k, v = draw(3, 2, 2, 10)
    want = oracle(q, k, v)
    cache, other = (
        KVCache(1, rows, 2, n, 8, "cpu", torch.float64) for rows, n in ((2, 7), (1, 12))
    )
    cache.begin(6)
    cache.attend(0, q[:2, :, :6], k[:2, :, :6], v[:2, :, :6])
    cache.advance([6, 4])
    other.begin(9)
    other.attend(0, q[2:, :, :9], k[2:, :, :9], v[2:, :, :9])
    other.advance(9)
    cache.append(other)
    assert cache.lengths == [6, 4, 9] and cache.capacity == 12
    rows = [0, 1, 2]
    now = (x[rows, :, cache.lengths][:, :, None] for x in (q, k, v))
    cache.begin(1)
    got = cache.attend(0, *now)
    torch.testing.assert_close(got[:, :, 0], want[rows, :, cache.lengths])


@pytest.mark.parametrize("room, most", [((0, 0), 7), ((16, 0), 5), ((16, 10), 3)])
def test_rows_come_and_go_and_the_others_stay(room, most):
    """
    Ten rows join one by one and every third leaves; each row attends as in its own cache, and a
    tensor of one size per row goes with it. With room, the rows move seldom.
    """
    q, k, v = draw(10, 2, 2, 9)
    want, moves, present = oracle(q, k, v), 0, [0]

    def alone(row: int) -> KVCache:
        cache, n = KVCache(1, 1, 2, 5 + row % 4, 8, "cpu", torch.float64), 1 + row % 5
        cache.keep("recent", torch.full((1, 1, 3), float(row)))
        cache.begin(n)
        cache.attend(0, *(x[row : row + 1, :, :n] for x in (q, k, v)))
        cache.advance(n)
        return cache

    cache = alone(0)
    for row in range(1, 10):
        before = cache.k.data_ptr()
        cache.append(alone(row), room)
        moves += cache.k.data_ptr() != before
        present.append(row)
        if row % 3 == 0:
            cache.drop(row // 3)
            present[row // 3] = present[-1]
            present.pop()
    assert cache.lengths == [1 + row % 5 for row in present]
    assert cache.recent[0, :, 0].tolist() == present
    now = [x[present, :, cache.lengths][:, :, None] for x in (q, k, v)]
    cache.begin(1)
    torch.testing.assert_close(cache.attend(0, *now)[:, :, 0], want[present, :, cache.lengths])
    assert moves <= most


def test_a_cache_that_cannot_grow_stays_as_it_was(monkeypatch):
    _, k, v = draw(2, 2, 2, 4)
    cache, other = (KVCache(1, 1, 2, 4, 8, "cpu", torch.float64) for _ in range(2))
    for one, row in ((cache, 0), (other, 1)):
        one.begin(4)
        one.attend(0, k[row : row + 1], k[row : row + 1], v[row : row + 1])
        one.advance(4)
    zeros, calls = torch.Tensor.new_zeros, []

    def fail(self, *shape, **options):
        calls.append(shape)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return zeros(self, *shape, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(torch.Tensor, "new_zeros", fail)
        cache.append(other)
    assert cache.lengths == [4] and cache.k.shape == cache.v.shape
    torch.testing.assert_close(cache.v[0, :, :, :4], v[:1])
    cache.append(other)
    torch.testing.assert_close(cache.v[0, :, :, :4], v)


def test_the_cache_refuses_more_than_it_holds():
    q, k, v = draw(1, 2, 2, 5)
    cache = KVCache(1, 1, 2, 4, 8, "cpu", torch.float64)
    cache.begin(5)
    with pytest.raises(ValueError, match="holds 4 positions, but 5"):
        cache.attend(0, q, k, v)
    with pytest.raises(ValueError, match="holds 4 positions, but 5"):
        cache.advance(5)


@pytest.mark.parametrize("window", [0, 4])
def test_no_row_gives_nan(
    window,
):  # huge scores, padding beyond the capacity, rows of length 0
    q, k, v = draw(2, 4, 2, 9, dtype=torch.float32)
    for x in (q * 1e4, torch.zeros_like(q)):
        leaves = [t.clone().requires_grad_() for t in (x, k, v)]
        y = attend(*leaves, window)
        y.sum().backward()
        assert y.isfinite().all() and all(t.grad.isfinite().all() for t in leaves)
    cache = KVCache(1, 2, 2, 9, 8, "cpu", torch.float32)
    cache.advance([9, 0])
    cache.begin(9)
    assert cache.attend(0, q, k, v, window).isfinite().all()
