"""
The texts of the embedded corpus: an endless, seeded stream of short English documents about the
small world. Nothing is downloaded and nothing repeats; the val split is built from pairings that
train never shows.
"""

import re
from collections.abc import Iterator, Sequence

from nanochat.tinyworld.conversations import STATEMENTS, ConversationMaker
from nanochat.tinyworld.world import (
    ATTRIBUTES,
    NUMBERS,
    Plot,
    Slots,
    Unfit,
    article,
    capitalised,
)

# kind of document (a method of DocumentMaker) -> how frequent it is. Facts, what things are, and
# spelling must be learned by heart and are the most frequent; with copy heads, looking something up
# in the context takes little practice (dev/LOG.md).
WEIGHTS = {
    "story": 18,
    "stories": 3,
    "profile": 52,
    "quiz": 36,
    "memory": 8,
    "roll": 12,
    "dialogue": 6,
    "lesson": 12,
    "spelling_lesson": 18,
    "sums": 4,
    "room": 3,
    "diary": 4,
    "village": 2,
}
SAME_SPEAKER_NAMED_TWICE = re.compile(r'" (?:said|asked) (\w+)\. "[^"]*" (?:said|asked) \1\b')

Couple = tuple[str, str]


def speech(line: str, speaker: str, script: bool) -> str:
    """The template of one line of a dialogue, in the form of a script or of a story."""
    if script:
        return f"%({speaker})s: {line}"
    text, end = line[:-1], line[-1]
    verb = "asked" if end == "?" else "said"
    return f'"{text}{"," if end == "." else end}" {verb} %({speaker})s.'


def listing(words: list[str] | Couple) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


class DocumentMaker(ConversationMaker):
    """
    Makes documents. Each kind has a method of its name, which returns a text, or raises Unfit if it
    has drawn nothing that fits the split.
    """

    stream = "tales"

    def couple(self) -> Couple:
        """Two people whose pairing belongs to the split."""
        first = self.pick(self.world.people)
        return first, self.matched(self.world.people, (first,), self.val, (first,))

    def fitting(self, values: Sequence[str], n: int) -> list[str]:
        """n different values in random order; the pairing of the first two belongs to the split."""
        chosen = self.sample(values, n)
        self.require(chosen[0], chosen[1])
        return chosen

    def add(self, slots: Slots, spec: str) -> None:
        """Fill the slots of `spec` ("name:class name:class") with any words of their classes."""
        for name, cls, *_ in self.world.slots(spec):
            slots[name] = self.pick(self.world.classes[cls])

    # ---- stories

    def story(self) -> str:
        return self.plot(self.deal("plots", self.world.plots), {})

    def stories(self) -> str:
        """Two or three stories about the same two people."""
        people = self.attempt(self.couple)

        def about_two(plot: Plot) -> bool:
            return [slot.cls for slot in plot.slots[:2]] == ["person", "person"]

        n = self.between(2, 3)
        plots = [self.deal("plots", self.world.plots, about_two) for _ in range(n)]
        if people is None:
            raise Unfit
        a, b = people
        stories = [self.attempt(self.plot, plot, {"A": a, "B": b}) for plot in plots]
        if None in stories:
            raise Unfit
        opening = f"Here are some stories about {a} and {b}."
        return "\n\n".join([opening, *filter(None, stories)])

    def plot(self, plot: Plot, people: dict[str, str]) -> str:
        """One story of a plot, about the given people in its slots, or else about any."""
        slots = self.fill(plot.slots, people)
        sentences = filter(None, [self.pick(beat) for beat in plot.beats])
        text = (" ".join(sentences) % slots).replace(" \n\n ", "\n\n")
        if SAME_SPEAKER_NAMED_TWICE.search(text):
            raise Unfit
        return text

    # ---- facts

    def profile(self) -> str:
        """Stable facts about two or three people, in many wordings."""
        couple = self.couple()
        people, most = list(couple), 5
        if self.random() < 0.3:
            third = self.paired(self.world.people, couple, False, couple)
            if third:
                people, most = [*couple, third], 3
        wordings = self.phrases["profile"]
        parts = []
        for person in people:
            slots = Slots(P=person)
            facts = self.sample(ATTRIBUTES, self.between(2, most))
            sentences = [self.pick(wordings[name][i > 0]) % slots for i, name in enumerate(facts)]
            parts.append(" ".join(sentences))
        names = listing(people)
        openings = f"Let me tell you about {names}. ", f"Do you know {names}? ", *[""] * 4
        return self.pick(openings) + self.pick(("\n\n", " ")).join(parts)

    def quiz(self) -> str:
        """Questions with their answers, like those of conversations."""
        form = self.random()
        if form >= 0.75:
            several = [self.attempt(self.options) for _ in range(self.between(1, 3))]
            return "\n\n".join(f"{x.question}\nAnswer: {x.reply}" for x in several if x)
        lines = []
        if form < 0.6:
            text, statements = self.short_story()
            lines.append(text)
            asked = statements if self.random() < 0.8 else statements[:1]
            questions = [self.ask(statement) for statement in asked]
        else:
            facts = [self.known_fact(self.val)[1] for _ in range(self.between(3, 8))]
            questions = {fact.answer: fact for fact in facts}.values()
        lines += [f"Question: {x.question}\nAnswer: {x.reply}" for x in questions]
        return "\n".join(lines)

    def lesson(self) -> str:
        """What things are, or what the opposites of words are."""
        n = self.between(3, 7)
        if self.random() < 0.25:
            opposites = self.world.data["opposites"]
            words = self.fitting(list(opposites), n + 3)
            return " ".join(f"The opposite of {word} is {opposites[word]}." for word in words)
        kinds, kind_of = self.world.data["kinds"], self.world.kind_of
        alike = self.random() < 0.5
        kind = self.deal("kinds", list(kinds)) if alike else ""
        words = self.fitting(list(kinds[kind] if alike else kind_of), n)
        lines = []
        riddles = self.random() < 0.3
        for word in words:
            of, noun = kind_of[word], article(word)
            about = kinds[of][word]
            if riddles:
                question = "What is it?" if alike else f"Which {of} is it?"
                lines.append(f"{about} {question} It is {noun}.")
            else:
                lines.append(f"{capitalised(noun)} is {article(of)}. {about}")
        if alike:
            first, of, rest = kind.partition(" of ")
            nouns = listing([article(word) for word in words])
            lines.append(f"So {nouns} are {first}s{of}{rest}.")
        return " ".join(lines)

    # ---- lists to remember

    def memory(self) -> str:
        """One person says a few things, and another repeats them word for word in another order."""
        people = self.couple()
        used, lines = set(people), []
        for i in range(self.between(3, 6)):
            kind = self.pick(STATEMENTS)
            lines.append(self.statement(kind, self.val and i == 0, used).text)
        repeated = self.sample(lines, len(lines))
        if repeated == lines:
            repeated = lines[::-1]
        slots = Slots(A=people[0], B=people[1], day=self.pick(self.world.classes["day"]))
        wordings = self.phrases["memory"]
        before, between, after = (
            self.pick(readings) % slots for readings in wordings[self.pick(list(wordings))]
        )
        text = f'{before} "{" ".join(lines)}" {between} "{" ".join(repeated)}" {after}'
        return text.strip()

    def roll(self) -> str:
        """
        A list that one person reads and another repeats: names, numbers, things, words or what to
        buy in the same order, or cards with letters in another order.
        """
        people = self.couple()
        classes, words, wordings = self.world.classes, self.world.words, self.phrases["roll"]
        what = self.pick([*wordings, "labels", "labels"])
        if what == "labels":
            values = self.pick((words, classes["thing"], classes["colour"], NUMBERS[2:]))
        else:
            numbers = [str(i) for i in range(1, 100)]
            lists = {"names": self.world.people, "words": words, "numbers": numbers}
            values = lists.get(what) or classes[what]
            # A word such as "orange" would give the next thing of the list a colour.
            values = [value for value in values if value not in classes["colour"]]
        values = [value for value in values if value not in people]
        items = self.fitting(values, min(self.between(8, 20), len(values)))
        repeated = items
        if what == "labels":
            items = [f"{item}={self.pick('ABCD')}" for item in items]
            repeated = self.sample(items, len(items))
        slots = Slots(A=people[0], B=people[1])
        first, then, close = (self.pick(readings) % slots for readings in wordings[what])
        gap = ", " if what in ("numbers", "count") else " "
        return f"{first} {gap.join(items)}. {then} {gap.join(repeated)}. {close}".strip()

    # ---- dialogues

    def dialogue(self) -> str:
        """Two people talk: a greeting, two to four topics and a farewell."""
        people = self.couple()
        wordings = self.phrases["dialogue"]
        topics = self.topics()
        script = self.random() < 0.4
        # Each topic has its own day: what is planned for a day cannot have happened on it.
        days = self.sample(self.world.classes["day"], 7)
        lines: list[str] = []
        met = list(people)
        for topic in [self.pick(wordings["hello"]), *topics, self.pick(wordings["bye"])]:
            # The one who did not speak last begins.
            first, second = people if len(lines) % 2 == 0 else people[::-1]
            if isinstance(topic, str):
                if self.cannot_ask(topic, first, second):
                    continue
                topic = self.pick(wordings[topic])
            slots = self.topic_slots(people, met, days)
            slots |= {"A": first, "B": second}
            for i, readings in enumerate(topic):
                lines.append(speech(self.pick(readings), "AB"[i % 2], script) % slots)
        return "\n".join(lines)

    def topics(self) -> list:
        """Topics to talk about: the lines of an exchange, or an attribute to ask for."""
        wordings = self.phrases["dialogue"]
        topics = [*self.sample(wordings["topic"], 3), *self.sample(ATTRIBUTES, 2)]
        topics = self.sample(topics, self.between(1, 3))
        weather = self.pick(wordings["weather"]) if self.random() < 0.5 else None
        # Only the first kind of weather is good enough for an outdoor topic.
        if weather is None or weather is wordings["weather"][0]:
            topics = self.sample([*topics, self.pick(wordings["outdoors"])], len(topics))
        return [weather, *topics] if weather else topics

    def cannot_ask(self, attribute: str, asker: str, person: str) -> bool:
        """Whether the question is held out, or the asker knows the answer: they share a home."""
        home = self.world.attributes["home"]
        is_known = attribute == "home" and home[asker] == home[person]
        return is_known or not self.may_show(person, attribute)

    def topic_slots(self, people: Couple, met: list[str], days: list[str]) -> Slots:
        """
        The values in a topic's lines, apart from its speakers. Adds a person to `met`, and takes a
        day from `days`.
        """
        classes = self.world.classes
        third = self.paired(self.world.people, people, False, met)
        thing = self.paired(classes["thing"], (third or "",), False)
        if third is None or thing is None:
            raise Unfit
        met.append(third)
        n, (m, o) = self.between(2, 9), self.sample(classes["month"], 2)
        slots = Slots(C=third, t=thing, n=NUMBERS[n], k=NUMBERS[self.between(n + 1, 20)], m=m, o=o)
        slots["q"] = days.pop()
        self.add(slots, "d:dish s:topic i:music x:pick")
        for name, cls, (partner,), _ in self.world.slots(
            "c:colour@t h:spot@t p:place@C r:outing@C"
        ):
            slots[name] = self.paired(classes[cls], (slots[partner],), False) or ""
        if not all(slots.values()):
            raise Unfit
        return slots

    # ---- lessons

    def spelling_lesson(self) -> str:
        words = self.fitting(self.world.words, self.between(3, 6))
        wordings = self.phrases["spelling"]
        opening = self.pick(wordings["open"])
        p, q = self.sample(self.world.people, 2)
        lines = [opening % {"P": p, "Q": q}]
        spelled = self.pick(wordings["told"])
        for word in words:
            lines.append(spelled % Slots(w=word, l="-".join(word)))
            letter = self.pick(word)
            if self.random() < 0.5 and self.may_show(word, letter):
                n = word.count(letter)
                times = {1: "once", 2: "twice"}.get(n, f"{NUMBERS[n]} times")
                lines.append(f"The letter {letter} occurs {times} in {word}.")
        return "\n".join(lines)

    def sums(self) -> str:
        person = self.pick(self.world.people)
        opening = self.pick(
            (
                f"{person} is doing sums.",
                f"{person} likes sums.",
                "Here are some sums.",
                "Let us calculate.",
            )
        )
        style = self.between(0, 2)
        words = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
        lines = [opening]
        for op, a, b, result in dict.fromkeys(self.operands() for _ in range(self.between(4, 9))):
            if style == 0:
                lines.append(f"{a} {op} {b} = {result}")
            elif style == 1:
                lines.append(f"{a} {words[op]} {b} is {result}.")
            else:
                slots = self.sum_slots((a, b), result)
                lines.append(self.phrases["sums"]["told"]["+-*/".index(op)][0] % slots)
        return "\n".join(lines)

    # ---- places and days

    def room(self) -> str:
        person, classes = self.deal("rooms", self.world.people), self.world.classes
        wordings = self.phrases["room"]
        self.random()  # unused, but without it the corpus would change
        used: set[str] = set()
        items = []
        for _ in range(self.between(3, 5)):
            thing = self.matched(classes["thing"], (person,), False, used)
            spot = self.paired(classes["spot"], (thing,), self.val, used)
            colour = self.paired(classes["colour"], (thing,), False, used)
            if not (spot and colour):
                raise Unfit
            used |= {thing, spot, colour}
            items.append(self.pick(wordings["item"]) % Slots(t=thing, c=colour, h=spot))
        slots = Slots(A=person)
        opening, close = (self.pick(wordings[name]) % slots for name in ("open", "close"))
        return " ".join(filter(None, [opening, *items, close]))

    def diary(self) -> str:
        (a, b), home = self.couple(), self.world.attributes["home"]
        if home[a] == home[b]:
            raise Unfit
        wordings, pick = self.phrases["diary"], self.pick
        season = pick(("winter", "summer"))
        entries = [line for group in wordings[season] for line in group]
        n = self.between(3, 6)
        start = self.between(0, 7 - n)
        chosen: list[str] = []
        for _ in range(n):
            chosen.append(self.deal(season, entries, lambda line: line not in chosen))
        days = self.world.classes["day"][start : start + n]
        lines = [pick(wordings["open"])]
        lines += [f"{day}: {entry}" for day, entry in zip(days, chosen, strict=True)]
        slots = Slots(A=a, B=b)
        self.add(slots, "x:topic h:hot k:cake g:game n:number y:pick feel:feel")
        lines.append(pick(wordings["close"]))
        return "\n".join(filter(None, lines)) % slots

    def village(self) -> str:
        home, wordings = self.world.attributes["home"], self.phrases["village"]
        name = self.pick(self.world.classes["village"])
        residents = [person for person in self.world.people if home[person] == name]
        people = self.fitting(residents, self.between(2, 3))
        slots = Slots(V=name, X=self.world.data["villages"][name])
        lines = [self.pick(wordings["open"]) % slots]
        lines += [line % slots for line in self.sample(wordings["life"], self.between(1, 3))]
        for person, line in zip(people, self.sample(wordings["live"], len(people)), strict=True):
            lines.append(line % Slots(P=person, V=name))
        return " ".join(lines)


def documents(seed: int = 0, split: str = "train") -> Iterator[str]:
    """
    Endless texts of 40 to 350 tokens, all different and determined by seed and split. Raises
    ValueError for an unknown split.
    """
    maker = DocumentMaker(seed, split)
    kinds = [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]
    while True:
        text = maker.attempt(getattr(maker, maker.pick(kinds)))
        if text and len(text) >= 120 and maker.is_new(text):
            yield text
