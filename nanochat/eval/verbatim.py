"""How much of a generated text was copied: the longest run of characters that a corpus also has."""

from typing import NamedTuple

MARGIN = 60  # characters of the corpus shown before and after a shared run


class Overlap(NamedTuple):
    """A run of characters that a sample and a corpus share."""

    overlap: str
    share: float  # its length as a part of the sample's, 0 to 1
    passage: str  # the run in the corpus, with up to MARGIN characters on either side


def normalised(text: str) -> str:
    """The text with single spaces for any white space, so that line breaks make no difference."""
    return " ".join(text.split())


def longest_overlap(sample: str, corpus: str) -> Overlap:
    """
    The longest run, or the first of the longest. `corpus` must be normalised. It is searched up to
    twice for each character of the sample.
    """
    sample = normalised(sample)
    length = start = 0
    for i in range(len(sample)):
        while i + length < len(sample) and sample[i : i + length + 1] in corpus:
            length, start = length + 1, i
    text = sample[start : start + length]
    place = corpus.find(text)
    passage = corpus[max(0, place - MARGIN) : place + length + MARGIN] if length else ""
    return Overlap(text, length / max(1, len(sample)), passage)
