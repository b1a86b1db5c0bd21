"""
What other predictors make of a text: bits per byte of xz and gzip, and of an n-gram model of bytes,
each after it has seen the training text.

A compressor is charged what the held-out text adds: the size of both together minus that of the
training text. gzip looks back 32 KB only, which is its nature.
"""

import gzip
import lzma
from collections.abc import Sequence

import numpy as np

MOST_BYTES = 1 << 25  # of training text, from its end, that the baselines read
ORDERS = 6  # bytes of context of the n-gram model


def compressors(train: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text for xz and gzip."""
    train = train[-MOST_BYTES:]
    size = max(1 << 16, len(train) + len(held_out))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": size}]
    packers = {
        "xz": lambda data: lzma.compress(data, filters=filters),
        "gzip": lambda data: gzip.compress(data, 9),
    }
    return {
        name: 8 * (len(pack(train + held_out)) - len(pack(train))) / len(held_out)
        for name, pack in packers.items()
    }


def ngram(train: bytes, held_out: bytes, orders: int = ORDERS) -> float:
    """
    Bits per byte of the held-out text for an interpolated n-gram model of bytes (Witten and Bell
    1991) with up to `orders` bytes of context, at most 7:

        p_k(c) = (count(context c) + T p_{k-1}(c)) / (count(context) + T)

    with T the number of different bytes seen after the context, and p_{-1} = 1/256.
    """
    train = train[-MOST_BYTES:]
    seen = np.frombuffer(bytes(orders) + train, dtype=np.uint8).astype(np.uint64)
    asked = np.frombuffer(bytes(orders) + held_out, dtype=np.uint8).astype(np.uint64)
    p = np.full(len(held_out), 1 / 256)
    for k in range(orders + 1):
        contexts, queries = _codes(seen, k, orders, 1), _codes(asked, k, orders, 1)
        grams, counts = np.unique(_codes(seen, k + 1, orders, 0), return_counts=True)
        heads, totals = np.unique(contexts, return_counts=True)
        _, kinds = np.unique(grams >> np.uint64(8), return_counts=True)  # in the order of heads
        total, kind = _looked_up(heads, [totals, kinds], queries)
        (count,) = _looked_up(grams, [counts], _codes(asked, k + 1, orders, 0))
        known = total > 0
        p[known] = (count + kind * p)[known] / (total + kind)[known]
    return float(-np.log2(p).mean())


def _codes(data: np.ndarray, length: int, skipped: int, back: int) -> np.ndarray:
    """
    For each byte after the first `skipped`, the `length` bytes that end there (with `back`, that
    end before it) as one number: (bytes,) uint64.
    """
    codes = np.zeros(len(data) - skipped, dtype=np.uint64)
    end = len(data)
    for i in range(length - 1 + back, back - 1, -1):
        codes = codes << np.uint64(8) | data[skipped - i : end - i]
    return codes


def _looked_up(
    keys: np.ndarray, columns: Sequence[np.ndarray], wanted: np.ndarray
) -> list[np.ndarray]:
    """Each column at the wanted keys, which are sorted; 0 where a key is missing."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return [np.where(keys[at] == wanted, column[at], 0).astype(np.float64) for column in columns]
