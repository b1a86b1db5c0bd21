"""
Conversations of the little world with an exact answer each: small talk, questions about a short story, stable facts, multiple choice,
sums and letter counts through the calculator, spelling. It judges no reply (tasks/tinyworld.py does) and knows no tokens.
"""

import functools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nanochat.tinyworld.world import ATTRIBUTES, NUMBERS, Draw, Slots, held_out, world

# kind -> chance level: what a guess among the right sort of answers scores
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
# the kinds in the order in which they are told for training: what is looked up, in the context or in a list of options, is hardest to
# learn. Sums in two steps are shown with one sign, a + b + c and a - b - c, and but once in a hundred with two: these are left to
# reinforcement, which asks for the kind by its name and gets most of them so
MIXED = 0.01
CYCLE = (
    "smalltalk",
    "choice",
    "context",
    "facts",
    "choice",
    "spelling",
    "context",
    "choice",
    "arithmetic",
    "choice",
    "context",
    "spelling",
    "choice",
    "counting",
) * 3 + ("twostep",)
# what may not stand among the wrong options, because it could pass for the right one; and which statements go together in one story
WIDER = {
    "animal": ("bird", "insect"),
    "fruit": ("vegetable", "tree"),
    "vegetable": ("fruit",),
    "tree": ("fruit", "flower"),
    "flower": ("fruit",),
    "tool": ("vehicle", "instrument"),
    "instrument": ("tool",),
    "part of the body": ("instrument",),
}
LYING, OWNING = ("where", "moved"), ("who", "gave", "what")
RELATED = {"where": LYING, "moved": LYING, "who": OWNING, "gave": OWNING, "what": OWNING}


@functools.cache
def phrases() -> dict[str, Any]:
    """The wordings of conversations, expanded: a table of lists of templates."""
    w = world()

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return w.templates(value)
        return (
            {k: expand(v) for k, v in value.items()}
            if isinstance(value, dict)
            else [expand(v) for v in value]
        )

    table = {
        name: expand(w.data[name])
        for name in ("context", "facts", "choice", "sums", "spelling", "profile")
    }
    small = w.data["smalltalk"]
    table["smalltalk"] = {
        name: expand(rows)
        for name, rows in small.items()
        if name not in ("likes", "users", "advice")
    }
    return table


def tool_call(code: str, output: str, text: str) -> list[dict[str, str]]:
    """An assistant message that calls the calculator and then answers."""
    return [
        {"type": "python", "text": code},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    ]


class Talk(Draw):
    """Questions and answers of every kind. Each maker returns (turns, answer, ...) or None when the split's rule could not be met."""

    def __init__(self, seed: int, split: str, stream: str = "talk"):
        super().__init__(seed, split, stream)
        self.p = phrases()
        self.mixed = 0.75  # share of sums in two steps that have two signs

    # -- short states of affairs -------------------------------------------------------------------------------------------------

    def state(self, kind: str, want: bool, used: set[str]) -> tuple[str, Slots] | None:
        """One statement of a kind of [context] with values not in `used`; want: the asked pairing is held out, the others never are."""
        c, clash, s = self.world.classes, self.world.clash, Slots()

        def draw(slot: str, cls: str, *partners: str) -> bool:
            asked = s.get(self.p["context"][kind][4][0], "")  # its partner is the key slot
            is_answer = slot == self.p["context"][kind][3][0]
            for _ in range(40):
                value = self.pick(c[cls])
                if value not in used and all(
                    held_out(value, s[q]) == (want and is_answer and s[q] == asked)
                    and (value, s[q]) not in clash
                    for q in partners
                ):
                    s[slot] = value
                    used.add(value)
                    return True
            return False

        if kind == "place":
            ok = draw("A", "person") and draw("p", "place", "A")
        elif kind == "many":
            ok = draw("A", "person")
            if ok:
                x = self.paired(c["count"], (s["A"],), False)
                n = x and self.paired(NUMBERS[2:], (s["A"],), want, used)
                ok = bool(x and n and not held_out(n, x))
                s["x"], s["n"] = x or "", n or ""
                used.add(n or "")
        elif kind in ("what", "colour"):
            ok = draw("A", "person") and draw("t", "thing", "A") and draw("c", "colour", "t")
        elif kind in ("who", "gave"):
            ok = draw("t", "thing") and draw("A", "person", "t") and draw("c", "colour", "t")
            ok = ok and (kind == "who" or draw("B", "person", "t"))
        else:
            ok = (
                draw("t", "thing")
                and draw("A", "person", "t")
                and draw("c", "colour", "t")
                and draw("h", "spot", "t")
            )
            ok = ok and (kind == "where" or draw("g", "spot", "t"))
        return (self.pick(self.p["context"][kind][0]) % s, s) if ok else None

    def situation(self) -> tuple[str, list[tuple[str, Slots]]] | None:
        """Two to four statements in random order, and what can be asked about; the first is the one whose pairing is held out in val."""
        kind = self.pick(
            (
                "where",
                "moved",
                "who",
                "gave",
                "what",
                "colour",
                "many",
                "place",
                "where",
                "who",
                "place",
                "many",
            )
        )
        used: set[str] = set()
        facts: list[tuple[str, str, Slots]] = []
        for i in range(self.between(2, 3)):
            k = kind if i == 0 else self.pick(RELATED.get(kind, (kind,)))
            state = self.state(k, self.val and i == 0, used)
            if state is None:
                return None
            facts.append((k, *state))
        if kind != "place" and self.random() < 0.2:  # something else happens as well
            state = self.state("place", False, used)
            if state:
                facts.append(("place", *state))
        sentences = [f[1] for f in self.some(facts, len(facts))]
        filler = self.pick(self.p["context"]["filler"])
        if filler:
            sentences.insert(0, filler % {"q": self.pick(self.world.classes["day"])})
        return " ".join(sentences), [(k, s) for k, _, s in facts]

    def ask(self, kind: str, s: Slots) -> tuple[str, str, str]:
        """(question, reply, answer) about one statement."""
        row = self.p["context"][kind]
        return self.pick(row[1]) % s, row[2][0] % s, s[row[3][0]]

    # -- the kinds -----------------------------------------------------------------------------------------------------------------

    def context(self) -> tuple[list[Any], str] | None:
        told = self.situation()
        if told is None:
            return None
        text, facts = told
        lead = self.pick(self.p["context"]["lead"])
        turns: list[Any] = [f"{lead} {text}" if lead else text]
        for kind, s in [*self.some(facts[1:], self.between(0, min(2, len(facts) - 1))), facts[0]]:
            question, reply, answer = self.ask(kind, s)
            if len(turns) == 1:
                turns[0] += self.pick((" ", "\n")) + question
            else:
                turns.append(question)
            turns.append(reply)
        return turns, answer  # pyright: ignore[reportPossiblyUnboundVariable]

    def fact(self, want: bool) -> tuple[str, str, str]:
        return self.known(want)[2:]

    def known(self, want: bool) -> tuple[str, str, str, str, str]:
        """(person, attribute, question, reply, answer) of a stable fact."""
        known = [(person, attribute) for person in self.world.people for attribute in ATTRIBUTES]
        person, attribute = self.dealt(f"facts {want}", known, lambda pair: held_out(*pair) == want)
        s = Slots(P=person)
        question, reply = self.p["facts"][attribute]
        return (
            person,
            attribute,
            self.pick(question) % s,
            reply[0] % s,
            self.world.attributes[attribute][person],
        )

    def facts(self) -> tuple[list[Any], str]:
        turns: list[Any] = []
        for _ in range(self.pick((0, 0, 1, 2))):
            turns += self.fact(False)[:2]
        question, reply, answer = self.fact(self.val)
        return [*turns, question, reply], answer

    def smalltalk(self) -> tuple[list[Any], str] | None:
        p, data = self.p["smalltalk"], self.world.data["smalltalk"]
        pets = sorted(set(self.world.attributes["pet"].values()))
        topics = (
            ("like", "L", data["likes"]),
            ("from", "V", self.world.classes["village"]),
            ("have", "P", pets),
        )
        topic, slot, values = self.pick(topics)
        # the people of the world have a home and a pet already: only strangers may claim others
        user = self.pick(
            self.world.people if topic == "like" and self.random() < 0.5 else data["users"]
        )
        value = self.paired(values, (user,), self.val)
        weather = self.paired(list(data["advice"]), (user,), self.val)
        if value is None or weather is None:
            return None
        s = Slots({"U": user, slot: value, "W": weather, "K": data["advice"][weather]})
        if slot == "V":
            s["X"] = self.world.data["villages"][value]
        hello, statement, answer_to = (
            self.pick(p["name"][0]) % s,
            self.pick(p[topic][0]) % s,
            self.pick(p[topic][1]) % s,
        )
        greeting, form = self.pick(p["name"][1]) % s, self.between(0, 4)
        if form == 0:  # both at once, greeted back by name
            return [
                f"{hello} {statement}",
                f"{self.pick(('Hello', 'Hi', 'Welcome'))}, {user}! {answer_to}",
            ], user
        if form == 1:
            return [hello, greeting, self.pick(p["weather"][0]) % s, p["weather"][1][0] % s], s["K"]
        question, key = self.pick((("askname", user), ("ask" + topic, value)))
        turns = (
            [f"{hello} {statement}", greeting]
            if form == 2
            else [hello, greeting, statement, answer_to]
        )
        return [*turns, self.pick(p[question][0]) % s, self.pick(p[question][1]) % s], key

    def options(
        self, question: str, right: str, wrong: Sequence[str]
    ) -> tuple[str, str, list[str]]:
        """(the question with its lettered options, the reply, all letters): the letter follows its option directly."""
        n = self.between(2, 4)
        others = list(dict.fromkeys(x for x in wrong if x != right))[: n - 1]
        others = self.some(others, n - 1)
        letters = list("ABCD"[:n])
        letter = self.pick(letters)
        others.insert(letters.index(letter), right)
        end = self.pick(self.p["choice"]["end"])
        lines = "\n".join(f"- {option}={x}" for option, x in zip(others, letters, strict=True))
        return (
            f"{question}\n{lines}" + (f"\n{end}" if end else ""),
            f"The answer is {right}={letter}.",
            letters,
        )

    def lettered(self) -> tuple[str, str, list[str]] | None:
        """A question with options, the right option with its letter, and the letters."""
        w, p, form = self.world, self.p["choice"], self.random()
        if form < 0.15:
            told = self.situation()
            if told is None:
                return None
            text, ((kind, s), *rest) = told
            question, _, answer = self.ask(kind, s)
            slot = self.p["context"][kind][3][0]
            values = w.classes[
                {
                    "h": "spot",
                    "A": "person",
                    "t": "thing",
                    "c": "colour",
                    "n": "number",
                    "p": "place",
                }[slot]
            ]
            near = [r[slot] for _, r in rest if slot in r]
            return self.options(f"{text}\n{question}", answer, near + self.some(values, 6))
        if form < 0.5:
            _, attribute, question, _, answer = self.known(self.val)
            return self.options(
                question, answer, self.some(sorted(set(w.attributes[attribute].values())), 5)
            )
        if form < 0.8:
            kind = self.pick(list(w.data["kinds"]))
            word = self.paired(list(w.data["kinds"][kind]), (kind,), self.val)
            if word is None:
                return None
            others = [x for x, k in w.kind_of.items() if k != kind and k not in WIDER.get(kind, ())]
            return self.options(self.pick(p["member"]) % Slots(k=kind), word, self.some(others, 5))
        if form < 0.9:
            pairs = w.data["opposites"]
            word, opposite = self.pick(list(pairs.items()))
            if held_out(word, opposite) != self.val:
                return None
            others = [x for pair in pairs.items() for x in pair if x != word]
            return self.options(
                self.pick(p["opposite"]) % {"w": word}, opposite, self.some(others, 6)
            )
        word = self.pick(w.words)
        if held_out(word, "first letter") != self.val:
            return None
        others = [x for x in self.some(w.words, 24) if x[0] != word[0]]
        return self.options(self.pick(p["first"]) % {"l": word[0]}, word, others)

    def choice(self) -> tuple[list[Any], str, list[str]] | None:
        made = self.lettered()
        return made and ([made[0], made[1]], made[1][-2], made[2])

    def operands(self) -> tuple[str, int, int, int]:
        """(operator, a, b, result); the pair of numbers belongs to the split."""
        while True:
            op = self.pick("++--*/")
            a, b = (
                (self.between(2, 99), self.between(2, 99))
                if op in "+-"
                else (self.between(2, 12), self.between(2, 12))
            )
            if op == "-" and a - b < 2:
                continue
            if op == "/":
                a *= b
            if held_out(str(a), str(b)) == self.val:
                return op, a, b, {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]

    def calculated(self, ops: str, numbers: Sequence[int], r: int) -> tuple[list[Any], str]:
        """A sum asked as such or told as a story, and its answer by the calculator."""
        given = dict(zip("abc", numbers, strict=False))
        s = {
            **given,
            "r": r,
            "P": self.pick(self.world.people),
            "x": self.pick(self.world.classes["many"]),
        }
        form = 2 if self.random() < 0.35 else 0
        question, reply = self.p["sums"][ops][form], self.p["sums"][ops][form + 1]
        code = str(numbers[0]) + "".join(f"{op}{n}" for op, n in zip(ops, numbers[1:], strict=True))
        return [self.pick(question) % s, tool_call(code, str(r), reply[0] % s)], str(r)

    def arithmetic(self) -> tuple[list[Any], str]:
        op, a, b, r = self.operands()
        return self.calculated(op, (a, b), r)

    def twostep(self) -> tuple[list[Any], str]:
        ops = self.pick(("+-", "-+") if self.random() < self.mixed else ("++", "--"))
        while True:
            a, b, c = (self.between(2, 99) for _ in range(3))
            first = a + b if ops[0] == "+" else a - b
            r = first + c if ops[1] == "+" else first - c
            pair, next_pair = held_out(str(a), str(b)), held_out(str(b), str(c))
            if first >= 2 and r >= 2 and pair == self.val and (self.val or not next_pair):
                return self.calculated(ops, (a, b, c), r)

    def spelling(self) -> tuple[list[Any], str]:
        word = self.dealt(
            "spelling", self.world.words, lambda word: held_out(word, "spelling") == self.val
        )
        letters = "-".join(word)
        return [
            self.pick(self.p["spelling"]["ask"]) % {"w": word},
            f"The word {word} is spelled {letters}.",
        ], letters

    def counting(self) -> tuple[list[Any], str] | None:
        goal = self.pick((0, 1, 1, 2, 2, 2, 3))
        word = self.pick(self.world.words)
        letter = self.pick(word) if goal else self.pick("abcdefghilmnoprstu")
        n = word.count(letter)
        if (n != goal and self.random() < 0.95) or held_out(word, letter) != self.val:
            return None
        reply = tool_call(
            f"'{word}'.count('{letter}')", str(n), f"It occurs {n} {'time' if n == 1 else 'times'}."
        )
        return [self.pick(self.p["spelling"]["count"]) % {"w": word, "l": letter}, reply], str(n)

    def chat(self) -> list[str]:
        """A courtesy and its reply, to stand before a question."""
        c, i = self.p["smalltalk"]["chat"], self.pick((0, 4, 6))
        return [self.pick(c[i]), self.pick(c[i + 1])]


def conversations(
    seed: int = 0, split: str = "train", kinds: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """
    Endless conversations {"messages", "kind", "answer"[, "letters"]}, no two alike, in turn of every kind in `kinds` (default CYCLE).
    The last message is the assistant's gold reply; in val its pairing never occurs in train. ValueError for an unknown kind or split.
    """
    names = list(kinds or CYCLE)
    if unknown := [k for k in names if k not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}: the kinds are {', '.join(KINDS)}")
    talk = Talk(seed, split)
    talk.mixed = talk.mixed if kinds else MIXED
    makers: list[tuple[str, Callable[[], Any]]] = [(k, getattr(talk, k)) for k in names]
    while True:
        for kind, make in makers:
            while True:
                made = make()
                if made is None:
                    continue
                turns, answer, *letters = made
                if kind != "smalltalk" and talk.random() < 0.15:
                    turns = [*talk.chat(), *turns]
                if talk.fresh(zlib.crc32(json.dumps(turns).encode())):
                    break
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": content}
                for i, content in enumerate(turns)
            ]
            yield {
                "messages": messages,
                "kind": kind,
                "answer": answer,
                **({"letters": letters[0]} if letters else {}),
            }
