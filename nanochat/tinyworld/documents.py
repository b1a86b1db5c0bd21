"""
The embedded corpus: an endless, seeded stream of short English texts about one small world, and conversations with exact answers
(see tinytalk.py). Nothing is downloaded and nothing repeats; the val split is built from pairings that train never shows.
"""

import re
import zlib
from collections.abc import Callable, Iterator

from nanochat.tinyworld.conversations import KINDS, Talk, conversations
from nanochat.tinyworld.world import ATTRIBUTES, NUMBERS, Plot, Slots, article, held_out

__all__ = ["KINDS", "conversations", "documents", "held_out"]

WEIGHTS = {
    "story": 22,
    "stories": 4,
    "profile": 16,
    "quiz": 36,
    "memory": 36,
    "roll": 26,
    "dialogue": 6,
    "lesson": 7,
    "spelling_lesson": 13,
    "sums": 4,
    "room": 3,
    "diary": 4,
    "village": 2,
}

STATES = (
    "where",
    "moved",
    "who",
    "gave",
    "what",
    "colour",
    "many",
    "place",
)  # what is stated in the memory game


SAID_TWICE = re.compile(
    r'" (?:said|asked) (\w+)\. "[^"]*" (?:said|asked) \1\b'
)  # clumsy: the same speaker named twice running


def said(line: str, speaker: str, script: bool) -> str:
    """One line of a dialogue (a template), as in a script or as in a story."""
    if script:
        return f"%({speaker})s: {line}"
    end = line[-1]
    return f'"{line[:-1]}{"," if end == "." else end}" {"asked" if end == "?" else "said"} %({speaker})s.'


def of_two(plot: Plot) -> bool:
    """Whether the story is about two people, whoever they are."""
    return [row[1] for row in plot[0][:2]] == ["person", "person"]


def listing(words: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    return ", ".join(words[:-1]) + " and " + words[-1]


class Tales(Talk):
    """Texts of every sort. Each maker returns a text or None when the split's rule could not be met this time."""

    def __init__(self, seed: int, split: str):
        super().__init__(seed, split, "tales")
        w = self.world
        data = w.data
        self.parts = {
            name: {k: w.templates(v) for k, v in data[name].items()} for name in ("room", "village")
        }
        self.rolls, self.memories = (
            {what: [w.templates(t) for t in texts] for what, texts in data[name].items()}
            for name in ("roll", "memory")
        )
        self.diary_days = {
            k: [w.templates(t) for t in data["diary"][k]] for k in ("winter", "summer")
        }
        self.diary_ends = {k: w.templates(data["diary"][k]) for k in ("open", "close")}
        self.pairs_told = [w.templates(t) for t in data["sums"]["told"]]
        self.talks: dict[str, list[list[list[str]]]] = {}
        for name, texts in data["dialogue"].items():
            self.talks[name] = [
                self.exchange(t) for t in ([texts] if isinstance(texts, str) else texts)
            ]

    def exchange(self, text: str) -> list[list[str]]:
        """A topic's lines -> the readings of each line by A and B in turn."""
        return [self.world.templates(line) for line in text.strip().split("\n")]

    def couple(self) -> tuple[str, str] | None:
        """Two people whose pairing belongs to the split."""
        a = self.pick(self.world.people)
        b = self.paired(self.world.people, (a,), self.val, (a,))
        return (a, b) if b else None

    def stories(self) -> str | None:
        """Two or three stories about the same two people."""
        people = self.couple()
        n = self.between(2, 3)
        plots = [self.dealt("plots", self.world.plots, of_two) for _ in range(n)]
        told = [people and self.plot(plot, dict(zip("AB", people, strict=True))) for plot in plots]
        if people is None or None in told:
            return None
        return "\n\n".join(
            [f"Here are some stories about {listing(list(people))}.", *filter(None, told)]
        )

    def story(self) -> str | None:
        return self.plot(self.dealt("plots", self.world.plots), {})

    def plot(self, plot: Plot, people: dict[str, str]) -> str | None:
        """One story; every plot is told of new people and things, and what happens to them stays consistent."""
        spec, beats = plot
        slots = self.fill(spec, people)
        if slots is None:
            return None
        pick = self.pick
        text = (" ".join([s for s in [pick(beat) for beat in beats] if s]) % slots).replace(
            " \n\n ", "\n\n"
        )
        return None if SAID_TWICE.search(text) else text

    def profile(self) -> str | None:
        """Who two or three people are: the stable facts, in many wordings."""
        people = self.couple()
        if people is None:
            return None
        if self.random() < 0.3 and (third := self.paired(self.world.people, people, False, people)):
            people = (*people, third)
        told, pick = self.p["profile"], self.pick
        parts = []
        for person in people:
            slots = Slots(P=person)
            about = self.some(
                ATTRIBUTES, self.between(2, 5) if len(people) == 2 else self.between(2, 3)
            )
            parts.append(
                " ".join([pick(told[name][i > 0]) % slots for i, name in enumerate(about)])
            )
        opening = pick(
            (
                f"Let me tell you about {listing(list(people))}. ",
                f"Do you know {listing(list(people))}? ",
                "",
                "",
                "",
                "",
            )
        )
        return opening + pick(("\n\n", " ")).join(parts)

    def quiz(self) -> str | None:
        """Questions and their answers, as they will be asked in conversations."""
        form = self.random()
        if form < 0.6:
            told = self.situation()
            if told is None:
                return None
            text, facts = told
            rows = [self.ask(kind, s) for kind, s in (facts if self.random() < 0.8 else facts[:1])]
        elif form < 0.75:
            text, rows = (
                "",
                list(
                    {
                        row[2]: row
                        for row in (self.fact(self.val) for _ in range(self.between(3, 8)))
                    }.values()
                ),
            )
        else:
            several = [self.lettered() for _ in range(self.between(1, 3))]
            return "\n\n".join([f"{made[0]}\nAnswer: {made[1]}" for made in several if made])
        return "\n".join(
            ([text] if text else [])
            + [f"Question: {question}\nAnswer: {reply}" for question, reply, _ in rows]
        )

    def memory(self) -> str | None:
        """One says a few things, another says them again in another order: every word of that stands above."""
        people, pick = self.couple(), self.pick
        if people is None:
            return None
        used = set(people)
        said = []
        for i in range(self.between(3, 6)):
            state = self.state(pick(STATES), self.val and i == 0, used)
            if state is None:
                return None
            said.append(state[0])
        again = self.some(said, len(said))
        again = again if again != said else said[::-1]
        slots = Slots(A=people[0], B=people[1], day=pick(self.world.classes["day"]))
        before, between, after = (
            pick(readings) % slots for readings in self.memories[pick(list(self.memories))]
        )
        return f'{before} "{" ".join(said)}" {between} "{" ".join(again)}" {after}'.strip()

    def roll(self) -> str | None:
        """
        A list that one reads and another repeats: names, numbers, things, words or what to buy in the same order, cards with
        letters in another one.
        """
        people, w, c, pick = self.couple(), self.world, self.world.classes, self.pick
        if people is None:
            return None
        what = pick([*self.rolls, "labels", "labels"])
        values = {
            "names": w.people,
            "words": w.words,
            "numbers": [str(i) for i in range(1, 100)],
        }.get(what) or c.get(what)
        values = values or pick((w.words, c["thing"], c["colour"], NUMBERS[2:]))  # to be labelled
        # "orange", a word to spell, would colour the next one
        values = [
            v for v in values if v not in people and (what == "labels" or v not in c["colour"])
        ]
        items = self.some(values, min(self.between(8, 20), len(values)))
        if held_out(items[0], items[1]) != self.val:
            return None
        again = items
        if what == "labels":
            items = [f"{item}={pick('ABCD')}" for item in items]
            again = self.some(items, len(items))
        first, then, close = (
            pick(readings) % Slots(A=people[0], B=people[1]) for readings in self.rolls[what]
        )
        gap = ", " if what in ("numbers", "count") else " "
        return f"{first} {gap.join(items)}. {then} {gap.join(again)}. {close}".strip()

    def dialogue(self) -> str | None:
        """Two people talk: a greeting, two to four topics and a farewell."""
        people = self.couple()
        if people is None:
            return None
        c, pick, t = self.world.classes, self.pick, self.talks
        topics = self.some(
            [*self.some(t["topic"], 3), *self.some(ATTRIBUTES, 2)], self.between(1, 3)
        )
        weather = pick(t["weather"]) if self.random() < 0.5 else None
        if (
            weather is None or weather is t["weather"][0]
        ):  # nobody sits in the meadow while it snows
            topics = self.some([*topics, pick(t["outdoors"])], len(topics))
        if weather:
            topics.insert(0, weather)
        script = self.random() < 0.4
        lines: list[str] = []
        met: list[str] = []
        days = self.some(
            c["day"], 7
        )  # a day each: what was done on one cannot be planned for the same
        for topic in [pick(t["hello"]), *topics, pick(t["bye"])]:
            first, second = (
                people if len(lines) % 2 == 0 else people[::-1]
            )  # whoever did not speak last begins
            if isinstance(topic, str):
                if (
                    held_out(second, topic) and not self.val
                ):  # no held-out question in a train document
                    continue
                if (
                    topic == "home"
                    and self.world.attributes["home"][first]
                    == self.world.attributes["home"][second]
                ):
                    continue
                topic = pick(t[topic])
            third = self.paired(self.world.people, people, False, (*people, *met))
            met.append(third or "")
            thing = self.paired(c["thing"], (third or "",), False)
            if third is None or thing is None:
                return None
            n, (m, o) = self.between(2, 9), self.some(c["month"], 2)
            slots = Slots(
                A=first,
                B=second,
                C=third,
                t=thing,
                n=NUMBERS[n],
                k=NUMBERS[self.between(n + 1, 20)],
                m=m,
                o=o,
            )
            slots |= {
                "q": days.pop(),
                "d": pick(c["dish"]),
                "s": pick(c["topic"]),
                "i": pick(c["music"]),
                "x": pick(c["pick"]),
            }
            for slot, cls, partner in (
                ("c", "colour", thing),
                ("h", "spot", thing),
                ("p", "place", third),
                ("r", "outing", third),
            ):
                slots[slot] = self.paired(c[cls], (partner,), False) or ""
            if not (slots["c"] and slots["h"] and slots["p"] and slots["r"]):
                return None
            filled = Slots(slots)
            lines += [
                said(pick(line), "AB"[i % 2], script) % filled for i, line in enumerate(topic)
            ]
        return "\n".join(lines)

    def lesson(self) -> str | None:
        """What things are, or what the opposites of words are."""
        kinds = self.world.data["kinds"]
        n = self.between(3, 7)
        if self.random() < 0.25:
            table = self.world.data["opposites"]
            words = self.some(list(table), n + 3)
            if held_out(words[0], words[1]) != self.val:
                return None
            return " ".join([f"The opposite of {w} is {table[w]}." for w in words])
        alike = self.random() < 0.5
        kind = self.dealt("kinds", list(kinds)) if alike else ""
        words = self.some(list(kinds[kind]) if alike else list(self.world.kind_of), n)
        if held_out(words[0], words[1]) != self.val:
            return None
        lines = []
        riddles = self.random() < 0.3
        for word in words:
            k, noun = self.world.kind_of[word], article(word)
            riddle = (
                f"{kinds[k][word]} {'What is it' if alike else f'Which {k} is it'}? It is {noun}."
            )
            lines.append(
                riddle
                if riddles
                else f"{noun[0].upper()}{noun[1:]} is {article(k)}. {kinds[k][word]}"
            )
        if alike:
            first, _, rest = kind.partition(" of ")
            lines.append(
                f"So {listing([article(w) for w in words])} are {first}s{' of ' + rest if rest else ''}."
            )
        return " ".join(lines)

    def spelling_lesson(self) -> str | None:
        words = self.some(self.world.words, self.between(3, 6))
        if held_out(words[0], words[1]) != self.val:
            return None
        p, pick = self.p["spelling"], self.pick
        lines = [pick(p["open"]) % dict(zip("PQ", self.some(self.world.people, 2), strict=True))]
        told = pick(p["told"])
        for word in words:
            lines.append(told % Slots(w=word, l="-".join(word)))
            letter = pick(word)
            if self.random() < 0.5 and (self.val or not held_out(word, letter)):
                n = word.count(letter)
                lines.append(
                    f"The letter {letter} occurs {('once', 'twice')[n - 1] if n < 3 else f'{NUMBERS[n]} times'} in {word}."
                )
        return "\n".join(lines)

    def sums(self) -> str:
        pick = self.pick
        person = pick(self.world.people)
        lines = [
            pick(
                (
                    f"{person} is doing sums.",
                    f"{person} likes sums.",
                    "Here are some sums.",
                    "Let us calculate.",
                )
            )
        ]
        style = self.between(0, 2)
        for op, a, b, r in dict.fromkeys(self.operands() for _ in range(self.between(4, 9))):
            if style == 0:
                lines.append(f"{a} {op} {b} = {r}")
            elif style == 1:
                lines.append(
                    f"{a} {({'+': 'plus', '-': 'minus', '*': 'times', '/': 'divided by'})[op]} {b} is {r}."
                )
            else:
                slots = {
                    "P": pick(self.world.people),
                    "x": pick(self.world.classes["many"]),
                    "a": a,
                    "b": b,
                    "r": r,
                }
                lines.append(self.pairs_told["+-*/".index(op)][0] % slots)
        return "\n".join(lines)

    def room(self) -> str | None:
        person, c, parts, pick = (
            self.dealt("rooms", self.world.people),
            self.world.classes,
            self.parts["room"],
            self.pick,
        )
        lines = [pick(parts["open"])]
        used: set[str] = set()
        text = []
        for _ in range(self.between(3, 5)):
            thing = self.paired(c["thing"], (person,), False, used)
            spot = thing and self.paired(c["spot"], (thing,), self.val, used)
            colour = thing and self.paired(c["colour"], (thing,), False, used)
            if not (thing and spot and colour):
                return None
            used |= {thing, spot, colour}
            text.append(pick(parts["item"]) % Slots(t=thing, c=colour, h=spot))
        lines = [pick(parts["open"]), *text, pick(parts["close"])]
        slots = Slots(A=person)
        return " ".join([s % slots for s in lines if s])

    def diary(self) -> str | None:
        people = self.couple()
        home = self.world.attributes["home"]
        if people is None or home[people[0]] == home[people[1]]:
            return None
        c, pick = self.world.classes, self.pick
        season = pick(("winter", "summer"))
        days = [line for group in self.diary_days[season] for line in group]
        n = self.between(3, 6)
        start = self.between(0, 7 - n)
        told: list[str] = []
        for _ in range(n):
            told.append(self.dealt(season, days, lambda line: line not in told))
        lines = [pick(self.diary_ends["open"])]
        lines += [f"{day}: {line}" for day, line in zip(c["day"][start:], told, strict=False)]
        slots = Slots(
            A=people[0],
            B=people[1],
            x=pick(c["topic"]),
            h=pick(c["hot"]),
            k=pick(c["cake"]),
            g=pick(c["game"]),
        )
        slots |= {"n": pick(c["number"]), "y": pick(c["pick"]), "feel": pick(c["feel"])}
        return "\n".join([s for s in (*lines, pick(self.diary_ends["close"])) if s]) % Slots(slots)

    def village(self) -> str | None:
        home, parts, pick = self.world.attributes["home"], self.parts["village"], self.pick
        name = pick(self.world.classes["village"])
        people = self.some([p for p in self.world.people if home[p] == name], self.between(2, 3))
        if held_out(people[0], people[1]) != self.val:
            return None
        lines = [pick(parts["open"]) % Slots(V=name, X=self.world.data["villages"][name])]
        lines += self.some([s % {"V": name} for s in parts["life"]], self.between(1, 3))
        lines += [
            template % Slots(P=p, V=name)
            for p, template in zip(people, self.some(parts["live"], len(people)), strict=True)
        ]
        return " ".join(lines)


def documents(seed: int = 0, split: str = "train") -> Iterator[str]:
    """Endless texts of 40 to 350 tokens, no two alike, the same for the same (seed, split). Raises ValueError for an unknown split."""
    tales = Tales(seed, split)
    makers: list[Callable[[], str | None]] = []
    for name, weight in WEIGHTS.items():
        makers += [getattr(tales, name)] * weight
    while True:
        text = tales.pick(makers)()
        if text and len(text) >= 120 and tales.fresh(zlib.crc32(text.encode())):
            yield text
