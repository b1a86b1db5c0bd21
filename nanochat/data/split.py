"""
The validation split: a document or a conversation belongs to it when a hash of its content is small
enough. Adding, moving or reordering files therefore moves nothing from one split to the other, and
two copies of a text are always in the same split.
"""

import hashlib
import heapq
from collections.abc import Iterable

LEAST = 8  # documents that a small source gives to validation, but at most a tenth of them


def place(text: str) -> float:
    """Where a text falls in 0..1, decided by its content alone; the distribution is uniform."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def cutoff(places: Iterable[float], share: float) -> float | None:
    """
    The place up to which a text is validation: `share`, or more where that leaves fewer than LEAST
    different texts. Reads no further than it must, so a large source costs a few hundred texts.
    None if there are fewer than two different texts.
    """
    seen: set[float] = set()
    below = 0
    for p in places:
        below += p <= share and p not in seen
        seen.add(p)
        if below == LEAST:
            return share
    if len(seen) < 2:
        return None
    wanted = max(1, min(LEAST, len(seen) // 10))
    return max(share, heapq.nsmallest(wanted, seen)[-1])
