"""What a run spent its time on, in words. Importing this needs no torch."""

from collections.abc import Mapping

from nanochat.base.common import duration

# The activities that Run.spent counts -> what the summary calls them
WORDS = {
    "steps": "training steps",
    "batches": "batches",  # waiting for the feed; in RL, sampling the replies
    "eval": "evaluation",
    "sample": "samples",
    "save": "saving",
    "compiling": "compiling",
    "opening": "opening",
}


def shares(spent: Mapping[str, float], seconds: float) -> dict[str, float]:
    """The share of a run's seconds by activity, for all of WORDS, and the rest as "other"."""
    named = dict.fromkeys(WORDS.values(), 0.0)
    for name, part in spent.items():
        named[WORDS.get(name, name)] = part
    named["other"] = max(0.0, seconds - sum(named.values()))
    return {word: part / max(seconds, 1e-9) for word, part in named.items()}


def describe(spent: Mapping[str, float], seconds: float) -> str:
    """For example "training steps 3m24s (85%), evaluation 9s (4%)"; shares of 0 % are left out."""
    return ", ".join(
        f"{word} {duration(share * seconds)} ({share:.0%})"
        for word, share in shares(spent, seconds).items()
        if share >= 0.005
    )
