"""How much of a generated text was copied: the longest run of characters shared with a corpus."""

from typing import NamedTuple

MARGIN = 60  # characters of the corpus shown before and after a shared run


class Overlap(NamedTuple):
    """A run of characters of a sample that the corpus has as well, and the passage it stands in."""

    overlap: str
    share: float  # of the sample's characters
    passage: str


def normalised(text: str) -> str:
    """The text with every stretch of white space as one space, so that line breaks do not count."""
    return " ".join(text.split())


def longest_overlap(sample: str, corpus: str) -> Overlap:
    """The longest run; `corpus` is normalised already. The first of equal runs counts."""
    sample = normalised(sample)
    best = start = 0
    for i in range(len(sample)):
        while i + best < len(sample) and sample[i : i + best + 1] in corpus:
            best, start = best + 1, i
    text = sample[start : start + best]
    at = corpus.find(text)
    passage = corpus[max(0, at - MARGIN) : at + best + MARGIN] if best else ""
    return Overlap(text, best / max(1, len(sample)), passage)
