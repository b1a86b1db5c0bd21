"""
SpellingBee: spell a word, or count a letter in one with the calculator. Generated from the words of the embedded corpus, so that nothing is
fetched; no word of the val split is ever asked for in train.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from nanochat.eval.tasks.common import GENERATED, Item, Task, exchange, gold, prompt
from nanochat.tinyworld.conversations import tool_call
from nanochat.tinyworld.world import Draw, choices, held_out, world

SPELL = """[Please spell|Spell] [the word |]{w}. | How is [the word |]{w} spelled? | How do [I|you] [spell|write] [the word |]{w}? |
What are the letters of [the word |]{w}? | Take the word {w} letter by letter. | {w}: how is that spelled?"""
COUNT = """How many times does [the letter |]{l} [occur|appear|stand] in [the word |]{w}? | How often does {w} have the letter {l}? |
How many [letters |]{l} are [there |]in [the word |]{w}? | Count [the letter|every] {l} in [the word |]{w}."""
TIMES = (
    0,
    1,
    1,
    2,
    2,
    3,
)  # how often the letter that is counted may occur, each as likely as it stands here


@functools.cache
def words(split: str) -> list[str]:
    """The words of a split: those that tinyworld holds out of spelling, an eighth of all, are val here too."""
    w = world()
    texts = [text for values in w.classes.values() for text in values] + list(w.kind_of)
    texts += [
        re.sub(r"%\(.*?\)s", " ", text) for _, beats in w.plots for beat in beats for text in beat
    ]
    found = {word for text in texts for word in re.findall(r"\b[a-z]{3,10}\b", text)}
    return sorted(word for word in found if held_out(word, "spelling") == (split == "val"))


@functools.cache
def _countable(split: str) -> dict[int, list[tuple[str, str]]]:
    """How often a letter occurs -> the (word, letter) where it does; in train none that tinyworld holds out."""
    pairs = [
        (w, c)
        for w in words(split)
        for c in "abcdefghiklmnoprstuwy"
        if split == "val" or not held_out(w, c)
    ]
    return {n: [(w, c) for w, c in pairs if w.count(c) == n] for n in TIMES}


def conversations(seed: int, split: str) -> Iterator[Item]:
    """Endless items, spelling and counting in turn; a word comes again when all have had their turn."""
    draw, spell, count = Draw(seed, split, "spellingbee"), choices(SPELL), choices(COUNT)
    while True:
        word = draw.dealt("spell", words(split))
        letters = "-".join(word)
        yield exchange(
            draw.pick(spell).format(w=word),
            f"The word {word} is spelled {letters}.",
            kind="spell",
            answer=letters,
        )
        n = draw.pick(TIMES)
        word, letter = draw.dealt(f"count {n}", _countable(split)[n])
        first = {"type": "text", "text": f"The word {word} is spelled {'-'.join(word)}. "}
        then = tool_call(
            f"'{word}'.count('{letter}')",
            str(n),
            f"So {letter} occurs {n} time{'' if n == 1 else 's'}.",
        )
        yield exchange(
            draw.pick(count).format(w=word, l=letter), [first, *then], kind="count", answer=str(n)
        )


def items(split: str, n: int, seed: int = 0, folder: Path | None = None) -> list[Item]:
    """The first n of conversations()."""
    stream = conversations(seed, split)
    return [next(stream) for _ in range(n or GENERATED)]


def evaluate(item: Item, reply: str) -> bool:
    """Whether a reply spells the word once and right, or names the right number and no other."""
    if item["kind"] == "spell":
        return re.findall(r"\b\w(?:-\w+)+", reply.lower()) == [item["answer"]]
    return set(re.findall(r"\d+", reply)) == {item["answer"]}


TASK = Task(
    "SpellingBee", "generative", 1 / 6, items, prompt, gold, evaluate
)  # half are counts, a third of which have the same answer
