"""
Conversations about the small world, each with an exact answer: small talk, questions about a short
story, stable facts, multiple choice, spelling, and sums and letter counts that use the calculator.
eval/tasks/tinyworld.py judges replies to them.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nanochat.tinyworld.world import (
    ATTRIBUTES,
    Draw,
    Slot,
    Slots,
    Unfit,
    article,
    capitalised,
    held_out,
    world,
)

# kind -> chance level, the score of guessing among plausible answers
KINDS: dict[str, float] = {
    "smalltalk": 0.05,
    "context": 0.36,
    "facts": 0.09,
    "choice": 0.36,
    "arithmetic": 0.03,
    "twostep": 0.02,
    "spelling": 0.0,
    "counting": 0.5,
}
# The order of kinds in training. Multiple choice needs the most knowledge and is the most frequent.
CYCLE = (
    "smalltalk choice context facts choice spelling counting choice arithmetic spelling choice "
    "context facts choice counting "
) * 3 + "twostep"
# The kinds, in turn, for models of other text: answering needs no knowledge of this world.
EVERYDAY = "smalltalk", "context", "smalltalk", "arithmetic"
SECTIONS = (  # of tinyworld.toml that hold wordings
    "context facts choice sums spelling profile smalltalk room village roll memory diary dialogue"
)
# The share of two-step sums with two different signs: small in the mixture of all kinds, so that RL
# has them to teach, and large when particular kinds are asked for.
MIXED_IN_TRAINING, MIXED = 0.01, 0.75
STATEMENTS = ["where", "moved", "who", "gave", "what", "colour", "many", "place"]
LEADING = [*STATEMENTS, "where", "who", "place", "many"]  # of the first of a story, by weight
LYING, OWNING = ("where", "moved"), ("who", "gave", "what")
# kind of a story's first statement -> kinds of the others; by default they are of the same kind
RELATED = {"where": LYING, "moved": LYING, "who": OWNING, "gave": OWNING, "what": OWNING}

Turns = list[Any]  # the contents of the messages, user and assistant in turn


class Statement(NamedTuple):
    """A fact of a short story."""

    kind: str  # a table of [context] in tinyworld.toml
    text: str
    slots: Slots  # the values in it


class Question(NamedTuple):
    question: str
    reply: str
    answer: str  # which a right reply must contain


class Options(NamedTuple):
    """A multiple-choice question."""

    question: str  # with the options
    reply: str
    letters: list[str]


@functools.cache
def phrases() -> dict[str, Any]:
    """The tables of SECTIONS in tinyworld.toml, with all sentences expanded into templates."""
    return {name: world().expanded(world().data[name]) for name in SECTIONS.split()}


@functools.cache
def statement_slots(kind: str) -> list[Slot]:
    """The slots of a kind of statement, in the order in which they get their values."""
    return world().slots(world().data["context"][kind]["slots"])


def tool_call(code: str, output: str, text: str) -> list[dict[str, str]]:
    """An assistant message that calls the calculator and then answers."""
    return [
        {"type": "python", "text": code},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    ]


class ConversationMaker(Draw):
    """
    Makes conversations. Each kind has a method of its name, which returns (turns, answer), or for
    choice (turns, answer, letters). It raises Unfit if it has drawn nothing that fits the split.
    """

    stream = "talk"  # part of the seed
    mixed = MIXED
    # Indices of the courtesies in [smalltalk] chat, each followed by its reply; without thanks
    courtesies: Sequence[int] = (0, 4, 6)

    def __init__(self, seed: int, split: str):
        super().__init__(seed, split, self.stream)
        self.phrases = phrases()

    def fits_split(self, a: object, b: object) -> bool:
        """Whether a pairing belongs to this split."""
        return held_out(str(a), str(b)) == self.val

    def may_show(self, a: object, b: object) -> bool:
        """
        Whether a pairing may come up beside what is asked for: in train, a held-out one never does.
        Its members are no wrong options either. They are never right in train, so the model would
        learn that they are always wrong, and fail on them in val.
        """
        return self.val or self.fits_split(a, b)

    def require(self, a: str, b: str) -> None:
        """Raise Unfit unless the pairing belongs to this split."""
        if not self.fits_split(a, b):
            raise Unfit

    # ---- short stories

    def statement(self, kind: str, in_val: bool, used: set[str]) -> Statement:
        """
        A statement with values that are not in `used`; adds them to it. The pairing that is the
        answer is a held-out one if `in_val`; the others never are.
        """
        slots, answer = Slots(), self.world.data["context"][kind]["answer"]
        for name, cls, partners, _ in statement_slots(kind):
            repeats = cls == "count"  # a number of things may come up again
            slots[name] = value = self.matched(
                self.world.classes[cls],
                [slots[partner] for partner in partners],
                in_val and name == answer,
                () if repeats else used,
            )
            if not repeats:
                used.add(value)
        if kind == "many" and held_out(slots["n"], slots["x"]):
            raise Unfit
        return Statement(kind, self.pick(self.phrases["context"][kind]["told"]) % slots, slots)

    def short_story(self) -> tuple[str, list[Statement]]:
        """
        Two to four statements as a text in random order, and as a list. In val, the first one of
        the list has a held-out pairing.
        """
        kind = self.pick(LEADING)
        used: set[str] = set()
        statements: list[Statement] = []
        for i in range(self.between(2, 3)):
            next_kind = self.pick(RELATED.get(kind, (kind,))) if i else kind
            statements.append(self.statement(next_kind, self.val and i == 0, used))
        if kind != "place" and self.random() < 0.2:  # a statement about something else
            other = self.attempt(self.statement, "place", False, used)
            if other:
                statements.append(other)
        sentences = [s.text for s in self.sample(statements, len(statements))]
        filler = self.pick(self.phrases["context"]["filler"])
        if filler:
            sentences.insert(0, filler % {"q": self.pick(self.world.classes["day"])})
        return " ".join(sentences), statements

    def ask(self, statement: Statement) -> Question:
        """A question about a statement."""
        kind, slots = statement.kind, statement.slots
        wording = self.phrases["context"][kind]
        answer = slots[self.world.data["context"][kind]["answer"]]
        return Question(self.pick(wording["ask"]) % slots, wording["reply"][0] % slots, answer)

    # ---- the kinds

    def context(self) -> tuple[Turns, str]:
        text, (first, *others) = self.short_story()
        lead = self.pick(self.phrases["context"]["lead"])
        text = f"{lead} {text}" if lead else text
        turns, answer = [], ""
        for statement in [*self.sample(others, self.between(0, min(2, len(others)))), first]:
            question, reply, answer = self.ask(statement)
            if not turns:
                question = text + self.pick((" ", "\n")) + question
            turns += [question, reply]
        return turns, answer

    def known_fact(self, in_val: bool) -> tuple[str, Question]:
        """(attribute, question) about a stable fact of a person, a held-out one if `in_val`."""
        facts = [(person, attribute) for person in self.world.people for attribute in ATTRIBUTES]
        person, attribute = self.deal(
            f"facts {in_val}", facts, lambda pair: held_out(*pair) == in_val, always=True
        )
        slots = Slots(P=person)
        ask, reply = self.phrases["facts"][attribute]
        answer = self.world.attributes[attribute][person]
        return attribute, Question(self.pick(ask) % slots, reply[0] % slots, answer)

    def facts(self) -> tuple[Turns, str]:
        turns: Turns = []
        for _ in range(self.pick((0, 0, 1, 2))):
            turns += self.known_fact(False)[1][:2]
        _, (question, reply, answer) = self.known_fact(self.val)
        return [*turns, question, reply], answer

    def smalltalk(self) -> tuple[Turns, str]:
        data, wordings = self.world.data["smalltalk"], self.phrases["smalltalk"]
        topic, slot, values = self.pick(
            (
                ("like", "L", data["likes"]),
                ("from", "V", self.world.classes["village"]),
                ("have", "P", sorted(set(self.world.attributes["pet"].values()))),
            )
        )
        # The people of this world have a home and a pet, so only strangers can claim another one.
        is_native = topic == "like" and self.random() < 0.5
        user = self.pick(self.world.people if is_native else data["users"])
        value = self.paired(values, (user,), self.val)
        weather = self.paired(list(data["advice"]), (user,), self.val)
        if value is None or weather is None:
            raise Unfit
        slots = Slots({"U": user, slot: value, "W": weather, "K": data["advice"][weather]})
        if slot == "V":
            slots["X"] = self.world.data["villages"][value]

        def say(name: str, turn: int) -> str:
            return self.pick(wordings[name][turn]) % slots

        hello, statement, response = say("name", 0), say(topic, 0), say(topic, 1)
        greeting, form = say("name", 1), self.between(0, 4)
        if form == 0:  # name and statement together, and a reply with the name
            greeting = self.pick(("Hello", "Hi", "Welcome"))
            return [f"{hello} {statement}", f"{greeting}, {user}! {response}"], user
        if form == 1:
            advice = wordings["weather"][1][0] % slots
            return [hello, greeting, say("weather", 0), advice], slots["K"]
        question, answer = self.pick((("askname", user), ("ask" + topic, value)))
        if form == 2:
            turns = [f"{hello} {statement}", greeting]
        else:
            turns = [hello, greeting, statement, response]
        return [*turns, say(question, 0), say(question, 1)], answer

    def with_options(
        self, question: str, right: str, wrong: Sequence[str], reason: str = ""
    ) -> Options:
        """
        The question with two to four options in random order, each directly followed by its letter.
        The reply begins with the reason, if there is one.
        """
        n = self.between(2, 4)
        others = list(dict.fromkeys(option for option in wrong if option != right))[: n - 1]
        options = self.sample(others, n - 1)
        letters = list("ABCD"[:n])
        letter = self.pick(letters)
        options.insert(letters.index(letter), right)
        end = self.pick(self.phrases["choice"]["end"])
        lines = [f"- {option}={x}" for option, x in zip(options, letters, strict=True)]
        text = "\n".join(filter(None, [question, *lines, end]))
        return Options(text, f"{reason} The answer is {right}={letter}.".lstrip(), letters)

    def options(self) -> Options:
        """A multiple-choice question of any sort."""
        form = self.random()
        if form < (0.15 if self.val else 0.3):  # more stories in train, and so fewer facts
            return self.options_about_story()
        if form < 0.5:
            return self.options_of_fact()
        if form < 0.8:
            return self.options_of_kind()
        return self.options_of_opposite() if form < 0.9 else self.options_of_first_letter()

    def options_of_fact(self) -> Options:
        attribute, (question, _, answer) = self.known_fact(self.val)
        values = sorted(set(self.world.attributes[attribute].values()))
        return self.with_options(question, answer, self.sample(values, 5))

    def options_of_opposite(self) -> Options:
        pairs = self.world.data["opposites"]
        word, opposite = self.pick(list(pairs.items()))
        self.require(word, opposite)
        others = [x for p in pairs.items() if self.may_show(*p) for x in p if x != word]
        question = self.pick(self.phrases["choice"]["opposite"]) % {"w": word}
        reason = f"The opposite of {word} is {opposite}."
        return self.with_options(question, opposite, self.sample(others, 6), reason)

    def options_of_first_letter(self) -> Options:
        word = self.pick(self.world.words)
        self.require(word, "first letter")
        others = [
            x
            for x in self.sample(self.world.words, 24)
            if x[0] != word[0] and self.may_show(x, "first letter")
        ]
        question = self.pick(self.phrases["choice"]["first"]) % {"l": word[0]}
        return self.with_options(question, word, others)

    def options_about_story(self) -> Options:
        text, (first, *others) = self.short_story()
        question, reply, answer = self.ask(first)
        asked = self.world.data["context"][first.kind]["answer"]
        classes = {slot.name: slot.cls for slot in statement_slots(first.kind)}
        wrong = [other.slots[asked] for other in others if asked in other.slots]
        wrong += self.sample(self.world.classes[classes[asked]], 6)
        return self.with_options(f"{text}\n{question}", answer, wrong, reply)

    def options_of_kind(self) -> Options:
        """
        Which of several things is, for example, a fruit. The reason says what each one is, from the
        first to the right one.
        """
        data, kind_of = self.world.data, self.world.kind_of
        kind = self.pick(list(data["kinds"]))
        word = self.matched(list(data["kinds"][kind]), (kind,), self.val)
        similar = (kind, *data["wider"].get(kind, ()))
        others = [x for x, of in kind_of.items() if of not in similar and self.may_show(x, of)]
        question = self.pick(self.phrases["choice"]["member"]) % Slots(k=kind)
        asked = self.with_options(question, word, self.sample(others, 5))
        options = re.findall(r"^- (.+)=", asked.question, re.MULTILINE)
        named = options[: options.index(word) + 1]
        reasons = [f"{capitalised(article(x))} is {article(kind_of[x])}." for x in named]
        return asked._replace(reply=" ".join([*reasons, asked.reply]))

    def choice(self) -> tuple[Turns, str, list[str]]:
        question, reply, letters = self.options()
        return [question, reply], reply[-2], letters

    def operands(self) -> tuple[str, int, int, int]:
        """(operator, a, b, result); the pair of numbers belongs to the split."""
        while True:
            op = self.pick("++--*/")
            low, high = (2, 99) if op in "+-" else (2, 12)
            a, b = self.between(low, high), self.between(low, high)
            if op == "-" and a - b < 2:
                continue
            if op == "/":
                a *= b
            if self.fits_split(a, b):
                return op, a, b, {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]

    def sum_slots(self, numbers: Sequence[int], result: int) -> dict[str, Any]:
        """The values in the wordings of a sum: its numbers and result, a person and some things."""
        slots: dict[str, Any] = dict(zip("abc", numbers, strict=False))
        person, things = self.pick(self.world.people), self.pick(self.world.classes["many"])
        return {**slots, "r": result, "P": person, "x": things}

    def calculation(self, operators: str, numbers: Sequence[int], result: int) -> tuple[Turns, str]:
        """A sum, given in figures or told as a story, that the calculator answers."""
        slots = self.sum_slots(numbers, result)
        form = 2 if self.random() < 0.35 else 0
        question, reply = self.phrases["sums"][operators][form : form + 2]
        code = str(numbers[0])
        for operator, number in zip(operators, numbers[1:], strict=True):
            code += f"{operator}{number}"
        call = tool_call(code, str(result), reply[0] % slots)
        return [self.pick(question) % slots, call], str(result)

    def arithmetic(self) -> tuple[Turns, str]:
        op, *numbers, result = self.operands()
        turns, answer = self.calculation(op, numbers, result)
        # Without two sums in a row, a model would repeat the numbers of the first
        if not self.val and self.random() < 0.3:
            turns = [*self.arithmetic()[0], *turns]
        return turns, answer

    def twostep(self) -> tuple[Turns, str]:
        ops = self.pick(("+-", "-+") if self.random() < self.mixed else ("++", "--"))
        while True:
            a, b, c = (self.between(2, 99) for _ in range(3))
            first = a + b if ops[0] == "+" else a - b
            result = first + c if ops[1] == "+" else first - c
            fits = self.fits_split(a, b) and self.may_show(b, c)
            if first >= 2 and result >= 2 and fits:
                return self.calculation(ops, (a, b, c), result)

    def spelling(self) -> tuple[Turns, str]:
        word = self.deal(
            "spelling",
            self.world.words,
            lambda word: self.fits_split(word, "spelling"),
            always=True,
        )
        letters = "-".join(word)
        question = self.pick(self.phrases["spelling"]["ask"]) % {"w": word}
        return [question, f"The word {word} is spelled {letters}."], letters

    def counting(self) -> tuple[Turns, str]:
        goal = self.pick((0, 1, 1, 2, 2, 2, 3))
        word = self.pick(self.world.words)
        letter = self.pick(word if goal else "abcdefghilmnoprstu")
        n = word.count(letter)
        if n != goal and self.random() < 0.95:
            raise Unfit
        self.require(word, letter)
        text = f"It occurs {n} {'time' if n == 1 else 'times'}."
        question = self.pick(self.phrases["spelling"]["count"]) % {"w": word, "l": letter}
        return [question, tool_call(f"'{word}'.count('{letter}')", str(n), text)], str(n)

    def courtesy(self) -> list[str]:
        """A courtesy and its reply, to come before a question."""
        lines, i = self.phrases["smalltalk"]["chat"], self.pick(self.courtesies)
        return [self.pick(lines[i]), self.pick(lines[i + 1])]


FRUITLESS = 20_000  # tries in a row, after which a kind is taken to have no new conversation


def conversations(
    seed: int = 0, split: str = "train", kinds: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """
    Conversations {"messages", "kind", "answer"[, "letters"]}, all different, of the kinds in
    `kinds` in turn (default CYCLE). The last message is the assistant's gold reply; in val, what it
    pairs is never paired in train. The stream is endless, except that a kind ends when it has no
    new conversation: val has some 2,600 about spelling. Raises ValueError for an unknown kind or
    split.
    """
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}: the kinds are {', '.join(KINDS)}")
    maker = ConversationMaker(seed, split)
    maker.mixed = MIXED if kinds else MIXED_IN_TRAINING
    if kinds == EVERYDAY:  # thanks instead of an offer that only a model of this world can make
        maker.courtesies = 0, 2, 6
    remaining = [*(kinds or CYCLE.split())]
    while remaining:
        for kind in tuple(remaining):
            if kind in remaining and (item := _next_new(maker, kind)):
                yield item
            else:
                remaining = [other for other in remaining if other != kind]


def _next_new(maker: ConversationMaker, kind: str) -> dict[str, Any] | None:
    """A conversation of a kind that the stream has not had yet; None if none is found."""
    for _ in range(FRUITLESS):
        drawn = maker.attempt(getattr(maker, kind))
        if drawn is None:
            continue
        turns, answer, *letters = drawn
        if kind != "smalltalk" and maker.random() < 0.15:
            turns = [*maker.courtesy(), *turns]
        if not maker.is_new(json.dumps(turns)):
            continue
        roles = ("user", "assistant") * len(turns)
        messages = [
            {"role": role, "content": content} for role, content in zip(roles, turns, strict=False)
        ]
        item = {"messages": messages, "kind": kind, "answer": answer}
        return {**item, "letters": letters[0]} if letters else item
    return None
