"""
SpellingBee: spell a word, or count a letter in a word with the calculator. The questions are
generated from words of the embedded corpus; train has no word of the val split.
"""

import functools
import re
from collections.abc import Iterator

from nanochat.eval.tasks.common import Item, Task, exchange, generated
from nanochat.tinyworld.conversations import tool_call
from nanochat.tinyworld.world import Draw, choices, held_out, world

SPELL = """[Please spell|Spell] [the word |]{w}. | How is [the word |]{w} spelled? |
How do [I|you] [spell|write] [the word |]{w}? | What are the letters of [the word |]{w}? |
Take the word {w} letter by letter. | {w}: how is that spelled?"""
COUNT = """How many times does [the letter |]{l} [occur|appear|stand] in [the word |]{w}? |
How often does {w} have the letter {l}? | How many [letters |]{l} are [there |]in [the word |]{w}? |
Count [the letter|every] {l} in [the word |]{w}."""
TIMES = (0, 1, 1, 2, 2, 3)  # how often the counted letter occurs, drawn uniformly from these


@functools.cache
def words(split: str) -> list[str]:
    """The words of a split, sorted; val has the eighth that tinyworld holds out of spelling."""
    lexicon = world()
    texts = [text for values in lexicon.classes.values() for text in values] + list(lexicon.kind_of)
    for _, beats in lexicon.plots:
        texts += [re.sub(r"%\(.*?\)s", " ", text) for beat in beats for text in beat]
    known = {word for text in texts for word in re.findall(r"\b[a-z]{3,10}\b", text)}
    return sorted(word for word in known if held_out(word, "spelling") == (split == "val"))


@functools.cache
def _countable(split: str, times: int) -> list[tuple[str, str]]:
    """The (word, letter) pairs with `times` occurrences of the letter; in train none held out."""
    return [
        (word, letter)
        for word in words(split)
        for letter in "abcdefghiklmnoprstuwy"
        if word.count(letter) == times and (split == "val" or not held_out(word, letter))
    ]


def conversations(seed: int, split: str) -> Iterator[Item]:
    """Endless items, spelling and counting in turn. No word repeats before all have been used."""
    draw, spell, count = Draw(seed, split, "spellingbee"), choices(SPELL), choices(COUNT)
    while True:
        word = draw.deal("spell", words(split))
        letters = "-".join(word)
        question = draw.pick(spell).format(w=word)
        reply = f"The word {word} is spelled {letters}."
        yield exchange(question, reply, kind="spell", answer=letters)

        times = draw.pick(TIMES)
        word, letter = draw.deal(f"count {times}", _countable(split, times))
        spelled = {"type": "text", "text": f"The word {word} is spelled {'-'.join(word)}. "}
        result = f"So {letter} occurs {times} time{'' if times == 1 else 's'}."
        call = tool_call(f"'{word}'.count('{letter}')", str(times), result)
        question = draw.pick(count).format(w=word, l=letter)
        yield exchange(question, [spelled, *call], kind="count", answer=str(times))


def evaluate(item: Item, reply: str) -> bool:
    """Whether a reply spells one word, the right one, or has the right number and no other."""
    if item["kind"] == "spell":
        return re.findall(r"\b\w(?:-\w+)+", reply.lower()) == [item["answer"]]
    return set(re.findall(r"\d+", reply)) == {item["answer"]}


# Chance: half of the items count letters, and a third of those have the same answer
TASK = Task("SpellingBee", "generative", 1 / 6, generated(conversations), evaluate)
