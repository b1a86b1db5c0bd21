"""
The small world of the embedded corpus: its people, things and sentences, read once from
tinyworld.toml; the rule that holds pairings out of training; and random choices that obey it.
"""

import functools
import hashlib
import itertools
import random
import re
import tomllib
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
ATTRIBUTES = "home", "job", "pet", "food", "colour"  # of a person: the facts that are asked for
PERSON = ["sex", "home", "job", "pet", "petname", "food", "colour"]  # the columns of [people]
PRONOUNS = "he", "his", "him", "himself"
NUMERALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
NUMBERS = tuple(NUMERALS.split())
KEEPABLE = "cat", "dog", "rabbit", "tortoise", "hamster"  # pets that a story can put in a basket


class Unfit(Exception):
    """What was drawn does not fit the split; the caller draws again."""


class Slot(NamedTuple):
    """A slot of a template, written 'name:class@partner@partner%attribute' in tinyworld.toml."""

    name: str
    cls: str  # the class of words that fills it
    partners: list[str]  # slots or words with which its value is paired
    differs: str  # attribute that must differ from that of the person in slot A, or ""


class Plot(NamedTuple):
    slots: list[Slot]
    beats: list[list[str]]  # for each sentence of the story, its alternative templates


@functools.cache
def held_out(a: str, b: str) -> bool:
    """
    Whether the pairing of two names or values is reserved for the val split. A hash decides, which
    reserves an eighth of all pairings; (a, b) and (b, a) are the same pairing.
    """
    key = "|".join(sorted((a, b))).encode()
    return hashlib.blake2b(key, digest_size=1).digest()[0] % 8 == 0


def article(noun: str) -> str:
    """'apple' -> 'an apple', 'kite' -> 'a kite'."""
    vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "use", "eu", "one"))
    return f"{'an' if vowel else 'a'} {noun}"


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def choices(text: str) -> list[str]:
    """
    All readings of a text with [choices|in brackets], which may be nested; the whole text can be a
    choice too. 'a [b|c] | d' -> ['a b', 'a c', 'd'].
    """

    def sequence(i: int) -> tuple[list[str], int]:
        """The readings from position i to the closing bracket, and the position after it."""
        alternatives: list[str] = []
        parts: list[list[str]] = [[""]]
        while i < len(text) and text[i] != "]":
            if text[i] == "[":
                inner, i = sequence(i + 1)
                parts.append(inner)
            elif text[i] == "|":
                alternatives += map("".join, itertools.product(*parts))
                parts, i = [[""]], i + 1
            else:
                start = i
                while i < len(text) and text[i] not in "[]|":
                    i += 1
                parts.append([text[start:i]])
        return alternatives + list(map("".join, itertools.product(*parts))), i + 1

    return [" ".join(reading.split()) for reading in sequence(0)[0]]


class Slots(dict[str, str]):
    """
    The values that fill a template. Values derived from them are computed on demand: 'a t' (slot t
    with its article), '^t' (capitalised) and 'A.home' (an attribute of what is in slot A).
    """

    def __missing__(self, key: str) -> str:
        if key[0] == "^":
            value = capitalised(self[key[1:]])
        elif key[:2] == "a ":
            value = article(self[key[2:]])
        elif "." in key:
            slot, attribute = key.split(".")
            value = world().attributes[attribute][self[slot]]
        else:
            raise KeyError(key)
        self[key] = value
        return value


class World:
    """
    Everything in tinyworld.toml. `attributes` is {attribute: {person or place: value}}, and
    `classes` is {class of words: its members}. Templates are for the % operator with Slots.
    """

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.people: list[str] = list(data["people"])
        self.attributes: dict[str, dict[str, str]] = {"at": data["places"]}
        for name, row in data["people"].items():
            facts = dict(zip(PERSON, row.split(), strict=True))
            facts |= zip(PRONOUNS, data["pronouns"][facts.pop("sex")], strict=True)
            facts["works"], facts["worked"] = data["jobs"][facts["job"]]
            facts["where"] = data["villages"][facts["home"]]
            for attribute, value in facts.items():
                self.attributes.setdefault(attribute, {})[name] = value
        pets = self.attributes["pet"]
        self.classes: dict[str, list[str]] = {
            **data["classes"],
            **{name: choices(self.with_macros(text)) for name, text in data["scenes"].items()},
            "person": self.people,
            "keeper": [name for name in self.people if pets[name] in KEEPABLE],
            "dogowner": [name for name in self.people if pets[name] == "dog"],
            "place": list(data["places"]),
            "village": list(data["villages"]),
        }
        self.kind_of: dict[str, str] = {
            word: kind for kind, words in data["kinds"].items() for word in words
        }
        self.words = [word for word in self.kind_of if 3 <= len(word) <= 8]  # to spell and count in
        self.clash = {  # pairs that do not go together, in both orders
            pair
            for place, things in data["clash"].items()
            for thing in things
            for pair in ((thing, place), (place, thing))
        }
        self.plots = [Plot(self.slots(p["slots"]), self.lines(p["text"])) for p in data["plot"]]

    def with_macros(self, text: str) -> str:
        """Replace <name P> and <name P:Q> by the macro's choices, about the people in P and Q."""

        def replace(match: re.Match[str]) -> str:
            name, *people = match.groups()
            body = self.data["macros"][name]
            for letter, person in zip("PQ", people, strict=True):
                if person:
                    body = re.sub(r"\{(\^?(?:a )?)" + letter + r"\b", r"{\g<1>" + person, body)
            return f"[{body}]"

        return re.sub(r"<(\w+)(?: (\w))?(?::(\w))?>", replace, text)

    def templates(self, text: str) -> list[str]:
        """The readings of a sentence, each ready for `template % slots`."""
        readings = choices(self.with_macros(text).replace("%", "%%"))
        return [re.sub(r"\{([^}]*)\}", r"%(\1)s", reading) for reading in readings]

    def lines(self, text: str) -> list[list[str]]:
        """The templates of each line of a text; an empty line is a paragraph break."""
        return [self.templates(line) if line else ["\n\n"] for line in text.strip().split("\n")]

    def slots(self, text: str) -> list[Slot]:
        """The slots of a text such as 'A:person t:thing@A'."""
        slots = []
        for item in text.split():
            rest, _, differs = item.partition("%")
            first, *partners = rest.split("@")
            name, cls = first.split(":")
            slots.append(Slot(name, cls, partners, differs))
        return slots

    def expanded(self, value: Any) -> Any:
        """
        The same tables and lists with each text as its templates, or with a list of the templates
        of each line if it has several.
        """
        if isinstance(value, dict):
            return {name: self.expanded(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self.expanded(part) for part in value]
        return self.lines(value) if "\n" in value else self.templates(value)


@functools.cache
def world() -> World:
    """The world, read on first use."""
    file = resources.files("nanochat.tinyworld") / "tinyworld.toml"
    return World(tomllib.loads(file.read_text(encoding="utf-8")))


class Draw:
    """
    Random choices for one stream of texts, seeded by all three arguments. In train, no pairing is a
    held-out one; in val, those that are asked for or come first in a text all are. Raises
    ValueError for an unknown split.
    """

    def __init__(self, seed: int, split: str, stream: str):
        if split not in ("train", "val"):
            raise ValueError(f"split is {split!r}: it must be 'train' or 'val'")
        self.rng = random.Random(f"{stream}|{split}|{seed}")
        self.random = self.rng.random
        self.val = split == "val"
        self.world = world()
        self.seen: set[int] = set()
        self.packs: dict[str, list[Any]] = {}

    def pick(self, values: Sequence[Any]) -> Any:
        """A uniformly random value; several times faster than random.choice."""
        return values[int(self.random() * len(values))]

    def sample(self, values: Sequence[Any], n: int) -> list[Any]:
        """n different values in random order."""
        return self.rng.sample(values, n)

    def deal(
        self,
        name: str,
        values: Sequence[Any],
        fits: Callable[[Any], bool] = lambda _: True,
        always: bool = False,
    ) -> Any:
        """
        The next value that fits from the shuffled pack of this name. No value comes again before
        all others have had their turn. `always`: whether a value fits never changes, so that the
        pack need not keep those that do not.
        """
        pack = self.packs.setdefault(name, [])
        while True:
            for i, value in enumerate(pack):
                if fits(value):
                    return pack.pop(i)
            shuffled = self.sample(values, len(values))
            pack += filter(fits, shuffled) if always else shuffled

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def paired(
        self, values: Sequence[str], partners: Iterable[str], in_val: bool, used: Iterable[str] = ()
    ) -> str | None:
        """
        A value that is not in `used` and clashes with no partner, and whose pairings with the
        partners are all held out (`in_val`) or all not. None after forty tries.
        """
        clash = self.world.clash
        for _ in range(40):
            value = self.pick(values)
            if value not in used and all(
                held_out(value, p) == in_val and (value, p) not in clash for p in partners
            ):
                return value
        return None

    def matched(
        self, values: Sequence[str], partners: Iterable[str], in_val: bool, used: Iterable[str] = ()
    ) -> str:
        """Like paired(), but raises Unfit instead of returning None."""
        value = self.paired(values, partners, in_val, used)
        if value is None:
            raise Unfit
        return value

    def attempt(self, make: Callable[..., T], *args: Any) -> T | None:
        """The result of make(*args), or None if it raises Unfit."""
        try:
            return make(*args)
        except Unfit:
            return None

    def fill(self, spec: Sequence[Slot], given: dict[str, str]) -> Slots:
        """The values of all slots, of which some are given. Raises Unfit if one finds no value."""
        classes, attributes = self.world.classes, self.world.attributes
        slots = Slots(given, feel=self.pick(classes["feel"]))
        for name, cls, pairs, differs in spec:
            partners = [slots.get(pair, pair) for pair in pairs]
            if name in given:
                value = given[name]
            elif cls == "split":  # of n things, m are given away and k remain
                n = self.between(5, 16)
                m = self.between(2, n - 2)
                value = slots["n"] = NUMBERS[n]
                slots["m"], slots["k"] = NUMBERS[m], NUMBERS[n - m]
                if any(held_out(value, partner) != self.val for partner in partners):
                    raise Unfit
            else:
                values = classes.get(cls) or [cls]
                value = self.matched(values, partners, self.val, slots.values())
            slots[name] = value
            if differs and attributes[differs][value] == attributes[differs][slots["A"]]:
                raise Unfit
        return slots

    def is_new(self, text: str) -> bool:
        """
        Whether the stream has not had this text. Compares checksums of 32 bits, so the answer is
        also False for the rare text with the checksum of a different one.
        """
        key = zlib.crc32(text.encode())
        if key in self.seen:
            return False
        self.seen.add(key)
        return True
