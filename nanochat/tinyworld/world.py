"""
The small world behind the embedded corpus: its people, things and sentences, read once from
tinyworld.toml; the rule that holds pairings out of training; and seeded choices under that rule.
"""

import functools
import hashlib
import itertools
import random
import re
import tomllib
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
    """What was drawn does not meet the split's rule, so the maker draws again."""


class Slot(NamedTuple):
    """A slot of a text, written 'name:class@partner@partner%attribute'."""

    name: str
    cls: str  # the class of words that fills it
    partners: list[str]  # slots or words with which its value is paired
    differs: str  # attribute that must differ from that of the person in slot A, or ""


class Plot(NamedTuple):
    slots: list[Slot]
    beats: list[list[str]]  # for each sentence of the story its alternative templates


@functools.cache
def held_out(a: str, b: str) -> bool:
    """
    Whether the pairing of two names or values is kept for the val split: always the same eighth of
    all pairs, whatever their order.
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
    All readings of a text with [choices|in brackets]; the text itself is also a choice.
    'a [b|c]' -> ['a b', 'a c'].
    """

    def sequence(i: int) -> tuple[list[str], int]:  # the readings up to the closing bracket
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
    The values that fill a template. Derived ones are worked out on demand: 'a t' (with its
    article), '^t' (capitalised) and 'A.home' (an attribute of what is in slot A).
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
    """Everything in tinyworld.toml, with sentences expanded into templates for the % operator."""

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
        """Replace <name P> and <name P:Q> by the macro's choices, told of those people."""

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
        """The readings of each line of a text; an empty line is a paragraph break."""
        return [self.templates(line) if line else ["\n\n"] for line in text.strip().split("\n")]

    def slots(self, text: str) -> list[Slot]:
        """'A:person t:thing@A' -> the slots with their classes and partners."""
        slots = []
        for item in text.split():
            rest, _, differs = item.partition("%")
            first, *partners = rest.split("@")
            name, cls = first.split(":")
            slots.append(Slot(name, cls, partners, differs))
        return slots

    def expanded(self, value: Any) -> Any:
        """The same tables and lists with all texts expanded: a line, or each of several lines."""
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
    Seeded choices for one stream of texts. In train no pairing is a held-out one; in val the
    pairings that are asked for, or that lead a text, all are.
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
        """One value, uniformly; several times faster than random.choice."""
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
        The next fitting value from the shuffled pack of this name. No value comes again before all
        others have had their turn. `always`: what does not fit now never will.
        """
        pack = self.packs.setdefault(name, [])
        while True:
            for i, value in enumerate(pack):
                if fits(value):
                    return pack.pop(i)
            new = self.sample(values, len(values))
            pack += filter(fits, new) if always else new

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def paired(
        self, values: Sequence[str], partners: Iterable[str], want: bool, used: Iterable[str] = ()
    ) -> str | None:
        """
        A value not in `used` that goes with every partner, and whose pairings with them are all
        held out (`want`) or all not. None after forty tries.
        """
        clash = self.world.clash
        for _ in range(40):
            value = self.pick(values)
            if value not in used and all(
                held_out(value, p) == want and (value, p) not in clash for p in partners
            ):
                return value
        return None

    def matched(
        self, values: Sequence[str], partners: Iterable[str], want: bool, used: Iterable[str] = ()
    ) -> str:
        """`paired`, but raises Unfit instead of returning None."""
        value = self.paired(values, partners, want, used)
        if value is None:
            raise Unfit
        return value

    def attempt(self, make: Callable[..., T], *args: Any) -> T | None:
        """What make(*args) returns, or None where it raises Unfit."""
        try:
            return make(*args)
        except Unfit:
            return None

    def fill(self, spec: Sequence[Slot], given: dict[str, str]) -> Slots:
        """Values for the slots that are not given. Raises Unfit."""
        classes, attributes = self.world.classes, self.world.attributes
        slots = Slots(given, feel=self.pick(classes["feel"]))
        for name, cls, pairs, differs in spec:
            partners = [slots.get(pair, pair) for pair in pairs]
            if name in given and cls == "person":
                value = given[name]
            elif cls == "split":  # of n things m are given away and k are left
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

    def is_new(self, key: int) -> bool:
        """
        Whether the stream has had no text with this 32-bit checksum; the rare text that shares its
        checksum with another one is dropped too.
        """
        if key in self.seen:
            return False
        self.seen.add(key)
        return True
