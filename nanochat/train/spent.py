"""Where the time of a run went, in words. Importing this needs no torch."""

from collections.abc import Mapping

from nanochat.base.common import duration

# What Run.spent counts -> what the summary calls it
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
    """Words -> the share of a run's seconds, the rest as "other"; every one of WORDS is there."""
    named = {
        WORDS.get(name, name): part for name, part in {**dict.fromkeys(WORDS, 0.0), **spent}.items()
    }
    named["other"] = max(0.0, seconds - sum(named.values()))
    return {word: part / max(seconds, 1e-9) for word, part in named.items()}


def describe(spent: Mapping[str, float], seconds: float) -> str:
    """'training steps 3m24s (85%), evaluation 9s (4%), ...', without what rounds to 0 %."""
    return ", ".join(
        f"{word} {duration(share * seconds)} ({share:.0%})"
        for word, share in shares(spent, seconds).items()
        if share >= 0.005
    )
