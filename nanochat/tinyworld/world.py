"""
The little world behind the embedded corpus: its people, things and sentences, read once from tinyworld.toml, the rule that holds
pairings out of training, and the drawing of values under that rule. It writes no text of its own and downloads nothing.
"""

import functools
import hashlib
import itertools
import random
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

ATTRIBUTES = (
    "home",
    "job",
    "pet",
    "food",
    "colour",
)  # the stable facts of a person that questions ask for
NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)


Spec = list[
    tuple[str, str, list[str], str]
]  # of a plot's slots: name, class, what it is paired with, what must differ from A's
Plot = tuple[Spec, list[list[str]]]  # its slots and its beats, each a list of templates


@functools.cache
def held_out(a: str, b: str) -> bool:
    """Whether the pairing of two names or values is kept for the val split: a stable eighth of all pairs, whatever their order."""
    return hashlib.blake2b("|".join(sorted((a, b))).encode(), digest_size=1).digest()[0] % 8 == 0


def article(noun: str) -> str:
    """'apple' -> 'an apple', 'kite' -> 'a kite'."""
    return (
        "an " if noun[0] in "aeiou" and not noun.startswith(("uni", "use", "eu", "one")) else "a "
    ) + noun


def choices(text: str) -> list[str]:
    """All readings of a sentence with [choices|in brackets]; the bare text is itself a choice. 'a [b|c]' -> ['a b', 'a c']."""

    def sequence(i: int) -> tuple[list[str], int]:  # readings of text[i:] up to the closing bracket
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
                end = re.compile(r"[\[\]|]|\Z").search(text, i).start()  # pyright: ignore[reportOptionalMemberAccess]
                parts.append([text[i:end]])
                i = end
        return alternatives + list(map("".join, itertools.product(*parts))), i + 1

    return [" ".join(s.split()) for s in sequence(0)[0]]


class Slots(dict[str, str]):
    """The values that a text is filled with; 'a t' (article), '^t' (capital) and 'A.home' (attribute) are worked out on demand."""

    def __missing__(self, key: str) -> str:
        if key[0] == "^":
            value = self[key[1:]]
            value = value[0].upper() + value[1:]
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
    """Everything in tinyworld.toml, with its sentences expanded into lists of templates for the % operator."""

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.macros: dict[str, str] = data["macros"]
        self.people: list[str] = list(data["people"])
        names = ("he", "his", "him", "himself", "petname", "works", "worked", "where", *ATTRIBUTES)
        self.attributes: dict[str, dict[str, str]] = {name: {} for name in names}
        for name, row in data["people"].items():
            sex, home, job, pet, petname, food, colour = row.split()
            pronouns = (
                ("she", "her", "her", "herself") if sex == "f" else ("he", "his", "him", "himself")
            )
            facts = dict(zip(("he", "his", "him", "himself"), pronouns, strict=True))
            facts |= {
                "home": home,
                "job": job,
                "pet": pet,
                "petname": petname,
                "food": food,
                "colour": colour,
            }
            facts |= {
                "works": data["jobs"][job][0],
                "worked": data["jobs"][job][1],
                "where": data["villages"][home],
            }
            for key, value in facts.items():
                self.attributes[key][name] = value
        self.attributes["at"] = data["places"]
        pets = self.attributes["pet"]
        self.classes: dict[str, list[str]] = {
            **data["classes"],
            **{name: choices(self.with_macros(text)) for name, text in data["scenes"].items()},
            "person": self.people,
            "keeper": [
                p for p in self.people if pets[p] in ("cat", "dog", "rabbit", "tortoise", "hamster")
            ],
            "dogowner": [p for p in self.people if pets[p] == "dog"],
            "place": list(data["places"]),
            "village": list(data["villages"]),
        }
        self.kind_of: dict[str, str] = {
            word: kind for kind, words in data["kinds"].items() for word in words
        }
        self.clash = {
            pair
            for place, things in data["clash"].items()
            for t in things
            for pair in ((t, place), (place, t))
        }
        self.words = [
            w for w in self.kind_of if 3 <= len(w) <= 8
        ]  # the words that are spelled and counted in
        self.plots: list[Plot] = [
            (self.slots(p["slots"]), self.beats(p["text"])) for p in data["plot"]
        ]

    def with_macros(self, text: str) -> str:
        """Replace <name P> and <name P:Q> by the macro's choices, told of those people."""

        def replace(match: re.Match[str]) -> str:
            name, *people = match.groups()
            body = self.macros[name]
            for letter, person in zip("PQ", people, strict=True):
                if person:
                    body = re.sub(r"\{(\^?(?:a )?)" + letter + r"\b", r"{\g<1>" + person, body)
            return f"[{body}]"

        return re.sub(r"<(\w+)(?: (\w))?(?::(\w))?>", replace, text)

    def templates(self, text: str) -> list[str]:
        """A sentence of the .toml -> the list of its readings, each ready for `template % slots`."""
        return [
            re.sub(r"\{([^}]*)\}", r"%(\1)s", s.replace("%", "%%"))
            for s in choices(self.with_macros(text))
        ]

    def beats(self, text: str) -> list[list[str]]:
        """A plot's lines -> the readings of each; an empty line is a paragraph break."""
        return [self.templates(line) if line else ["\n\n"] for line in text.strip().split("\n")]

    def slots(self, text: str) -> Spec:
        """'A:person t:thing@A' -> (slot, class, what it is paired with, attribute that must differ from A's) for each slot."""
        rows = []
        for item in text.split():
            name, cls, pairs, differs = re.fullmatch(
                r"(\w+):(\w+)((?:@\w+)*)(?:%(\w+))?", item
            ).groups()  # pyright: ignore[reportOptionalMemberAccess]
            rows.append((name, cls, [p for p in pairs.split("@") if p], differs or ""))
        return rows


@functools.cache
def world() -> World:
    """The world, read on first use."""
    return World(
        tomllib.loads(
            resources.files("nanochat.tinyworld")
            .joinpath("tinyworld.toml")
            .read_text(encoding="utf-8")
        )
    )


class Draw:
    """Seeded choices for one stream of texts. In train no pairing is a held-out one; in val the asked or leading pairings all are."""

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

    def some(self, values: Sequence[Any], n: int) -> list[Any]:
        """n different values in random order."""
        return self.rng.sample(values, n)

    def dealt(
        self, name: str, values: Sequence[Any], fit: Callable[[Any], bool] = lambda _: True
    ) -> Any:
        """The next fitting value from the shuffled pack of this name: none comes again before the others have had their turn."""
        pack = self.packs.setdefault(name, [])
        while True:
            for i, value in enumerate(pack):
                if fit(value):
                    return pack.pop(i)
            pack += self.some(values, len(values))

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def paired(
        self, values: Sequence[str], partners: Iterable[str], want: bool, used: Iterable[str] = ()
    ) -> str | None:
        """A value not yet used that suits every partner and whose pairing is held out (want) or is not; None after forty tries."""
        clash = self.world.clash
        for _ in range(40):
            value = self.pick(values)
            if value not in used and all(
                held_out(value, p) == want and (value, p) not in clash for p in partners
            ):
                return value
        return None

    def fill(self, spec: Spec, given: dict[str, str]) -> Slots | None:
        """Values for all slots of a plot that are not given, or None when the split's rule cannot be met this time."""
        slots = Slots(given, feel=self.pick(self.world.classes["feel"]))
        for name, cls, pairs, differs in spec:
            if name in given and cls == "person":
                value = given[name]
            elif cls == "split":  # n things, of which m are given away and k are left
                n = self.between(5, 16)
                m = self.between(2, n - 2)
                slots["n"], slots["m"], slots["k"] = NUMBERS[n], NUMBERS[m], NUMBERS[n - m]
                value = (
                    slots["n"]
                    if all(held_out(slots["n"], slots[p]) == self.val for p in pairs)
                    else None
                )
            else:
                partners = [slots.get(p, p) for p in pairs]
                value = self.paired(
                    self.world.classes.get(cls) or [cls], partners, self.val, slots.values()
                )
            if value is None:
                return None
            slots[name] = value
            if (
                differs
                and len({self.world.attributes[differs][slots[p]] for p in ("A", name)}) == 1
            ):
                return None
        return slots

    def fresh(self, key: int) -> bool:
        """Whether the text of this 32-bit checksum is new to the stream; a rare text that shares its checksum is dropped too."""
        if key in self.seen:
            return False
        self.seen.add(key)
        return True
