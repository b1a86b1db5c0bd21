"""
Bits per byte of held-out text for predictors other than a model: xz, gzip, and an n-gram model of
bytes, each after it has read the training text.

A compressor is charged for what the held-out text adds: the size of both texts together minus that
of the training text alone. gzip sees only the last 32 KB of what it has read.
"""

import gzip
import lzma

import numpy as np

MOST_BYTES = 1 << 25  # of training text, from its end, that these predictors read
CONTEXT = 6  # bytes before each byte that the n-gram model uses
_BYTE = np.uint64(8)  # bits; of the type that keeps shifted uint64 what they are


def compressors(train: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text for xz and gzip."""
    train = train[-MOST_BYTES:]
    size = max(1 << 16, len(train) + len(held_out))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": size}]
    methods = {
        "xz": lambda data: lzma.compress(data, filters=filters),
        "gzip": lambda data: gzip.compress(data, 9),
    }
    return {
        name: 8 * (len(compress(train + held_out)) - len(compress(train))) / len(held_out)
        for name, compress in methods.items()
    }


def ngram(train: bytes, held_out: bytes, context: int = CONTEXT) -> float:
    """
    Bits per byte of the held-out text for an interpolated n-gram model of bytes (Witten and Bell
    1991) with up to `context` bytes of context, at most 7. The probability of a byte c after its
    last k bytes h is

        p_k(c) = (count(h c) + kinds(h) p_{k-1}(c)) / (count(h) + kinds(h))

    where kinds(h) is the number of different bytes seen after h, and p_{-1} = 1/256. After an
    unseen h, p_k is p_{k-1}.
    """
    train = train[-MOST_BYTES:]
    p = np.full(len(held_out), 1 / 256)
    for k in range(context + 1):
        seen, asked = _ngrams(train, k + 1), _ngrams(held_out, k + 1)
        grams, gram_counts = np.unique(seen, return_counts=True)
        # A gram without its last byte is its context
        contexts, context_counts = np.unique(seen >> _BYTE, return_counts=True)
        _, context_kinds = np.unique(grams >> _BYTE, return_counts=True)  # ordered as contexts
        count = _lookup(grams, gram_counts, asked)
        total = _lookup(contexts, context_counts, asked >> _BYTE)
        kinds = _lookup(contexts, context_kinds, asked >> _BYTE)
        p = np.where(total > 0, (count + kinds * p) / np.maximum(total + kinds, 1), p)
    return float(-np.log2(p).mean())


def _ngrams(text: bytes, n: int) -> np.ndarray:
    """
    For each byte of a text the n bytes that end with it, as one number: (bytes,) uint64. The text
    is taken to follow zeros.
    """
    padded = np.frombuffer(bytes(n - 1) + text, dtype=np.uint8)
    grams = np.zeros(len(text), dtype=np.uint64)
    for first in range(n):
        grams = grams << _BYTE | padded[first : first + len(text)]
    return grams


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is missing; `keys` are sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
