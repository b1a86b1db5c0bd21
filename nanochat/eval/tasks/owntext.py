"""
Conversations and questions about a person's own text, made from it by rule: continue a passage,
tell of a person or a thing, complete a sentence, choose the missing word, look up a name or a word
in a passage; and the turns of dialogue that the text itself holds, in quotation marks or as "NAME:
words".

The wordings are English; the text may be in any language that separates its words. The same texts
and seed give the same conversations. What is asked of a trained model is made from held-out texts.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from nanochat.eval.tasks.common import Item, Task, exchange

# kind -> chance level of the kinds that have one right answer; the others have none to judge
JUDGED = {"missing": 1 / 3, "name": 0.05, "follows": 0.03, "complete": 0.0}
KINDS = ("dialogue", "continue", "tell", "missing", "name", "follows", "complete")
ABOUT = {  # what a kind asks for, for people
    "missing": "choose the missing word of a sentence among three",
    "name": "find the name in a passage",
    "follows": "find the word that follows two others in a passage",
    "complete": "guess the next word of a sentence",
    "dialogue": "answer like the speakers in the text",
    "continue": "continue a passage",
    "tell": "tell of a person or a thing as the text does",
}
ASK = {
    "continue": ("Continue: {x}", "Go on: {x}", "What comes next? {x}"),
    "tell": ("Tell me about {x}.", "Write about {x}.", "What about {x}?"),
    "complete": ("Complete the sentence: {x}", "How does this end? {x}"),
    "missing": ("Which word is missing, {o}? {x}", "Fill in {o}: {x}"),
    "name": ("Which name is in this text? {x}", "Find the name: {x}"),
    "follows": ('Which word follows "{w}"? {x}', 'What comes after "{w}" here? {x}'),
}
PASSAGE = 240  # characters: with a question and a reply it fits a context of 256 tokens
TURN = 160  # characters of one turn of dialogue
SILENT = 6  # lines of prose between two turns of one dialogue
COMMONEST = 100  # words that are about nothing
TURNS = 4  # that a conversation takes from a dialogue
# After a mark, but not after Mr., Mrs., Dr. or an initial: capitals of up to three letters
SENTENCE_END = re.compile(
    r"(?<=[.!?…。！？])(?<!\b[A-Z]\.)(?<!\b[A-Z]\w\.)(?<!\b[A-Z]\w\w\.)\s+"
    r"|(?<=[.!?…。！？][\"'”’»)])\s+"
)
QUOTED = re.compile(r"“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|\"([^\"]+)\"")
SPEAKER = re.compile(r"^([^\W\d_][\w .'-]{0,24}):[ \t]+(\S.*)$")
WITHIN = re.compile(r"(?:[\w,;]|\b[A-Z]\w{0,2}\.)\s$")  # before a word that begins no sentence
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


class TextQuestions:
    """
    Makes conversations from texts. `vocabulary`, the counts of the words of all texts (by default
    of these), decides which words are names and which can stand in each other's place.
    """

    def __init__(self, texts: Sequence[str], vocabulary: Counter[str] | None = None):
        self.passages = [p for text in texts for p in passages(text)]
        self.dialogues = [d for text in texts for d in dialogues(text)]
        self.words = words_of(texts) if vocabulary is None else vocabulary
        common = [
            w
            for w, n in self.words.most_common()
            if len(w) > 3 and w.islower() and n > 1 and w[0] != "," and w[-1] != "."
        ]
        self.ranks = {word: rank for rank, word in enumerate(common)}
        self.common = common

    def conversations(self, seed: int, kinds: Sequence[str], count: int) -> Iterator[Item]:
        """At most `count` different ones, the kinds in turn; a kind that finds none is left out."""
        rng, seen, failures = random.Random(seed), set(), Counter()
        kinds = [k for k in kinds if (self.dialogues if k == "dialogue" else self.passages)]
        while count > 0 and kinds:
            for kind in list(kinds):
                item = getattr(self, f"make_{kind}")(rng)
                if item is None or (key := str(item["messages"])) in seen:
                    failures[kind] += 1
                    if failures[kind] > 200:  # in a row: the texts have no more of this kind
                        kinds.remove(kind)
                    continue
                failures[kind] = 0
                seen.add(key)
                yield {**item, "kind": kind}
                if (count := count - 1) <= 0:
                    return

    def make_dialogue(self, rng: random.Random) -> Item | None:
        turns = rng.choice(self.dialogues)
        start = rng.randrange(len(turns) - 1)
        chosen = turns[start : start + rng.choice((2, 2, TURNS))]
        chosen = chosen[: len(chosen) // 2 * 2]
        roles = ("user", "assistant") * len(chosen)
        messages = [{"role": r, "content": c} for r, c in zip(roles, chosen, strict=False)]
        return {"messages": messages}

    def make_continue(self, rng: random.Random) -> Item | None:
        sentences = SENTENCE_END.split(rng.choice(self.passages))
        if len(sentences) < 2:
            return None
        cut = rng.randrange(1, len(sentences))
        asked = rng.choice(ASK["continue"]).format(x=" ".join(sentences[:cut]))
        return exchange(asked, " ".join(sentences[cut:]))

    def make_tell(self, rng: random.Random) -> Item | None:
        passage = rng.choice(self.passages)
        words = {m[0] for m in WORD.finditer(passage)}
        subjects = [w for w in words if self.is_name(w)]
        subjects = subjects or [w for w in words if self.ranks.get(w, 0) > COMMONEST]
        if not subjects:
            return None
        return exchange(rng.choice(ASK["tell"]).format(x=rng.choice(sorted(subjects))), passage)

    def make_complete(self, rng: random.Random) -> Item | None:
        words = self._sentence(rng).split()
        if len(words) < 6:
            return None
        cut = rng.randrange(4, len(words) - 1)
        asked = rng.choice(ASK["complete"]).format(x=" ".join(words[:cut]))
        return exchange(asked, " ".join(words[cut:]), answer=bare(words[cut]))

    def make_missing(self, rng: random.Random) -> Item | None:
        sentence = self._sentence(rng)
        found = [m for m in WORD.finditer(sentence) if m[0] in self.ranks]
        if len(sentence.split()) < 6 or not found:
            return None
        gap = rng.choice(found)
        rank = self.ranks[gap[0]]
        near = self.common[max(0, rank - 20 - rank // 2) : rank + 20 + rank // 2]
        others = [word for word in near if word not in sentence]
        if len(others) < 2:
            return None
        options = [gap[0], *rng.sample(others, 2)]
        rng.shuffle(options)
        asked = rng.choice(ASK["missing"]).format(
            o=f"{options[0]}, {options[1]} or {options[2]}",
            x=f"{sentence[: gap.start()]}___{sentence[gap.end() :]}",
        )
        return exchange(asked, gap[0], answer=gap[0])

    def make_name(self, rng: random.Random) -> Item | None:
        passage = rng.choice(self.passages)
        names = {m[0] for m in WORD.finditer(passage) if self.is_name(m[0])}
        if len(names) != 1:
            return None
        (name,) = names
        return exchange(rng.choice(ASK["name"]).format(x=passage), name, answer=name)

    def make_follows(self, rng: random.Random) -> Item | None:
        passage = rng.choice(self.passages)
        words = passage.split()
        if len(words) < 8:
            return None
        i = rng.randrange(len(words) - 2)
        pair = " ".join(words[i : i + 2])
        answer = bare(words[i + 2])
        if f"{passage} ".count(f"{pair} ") > 1 or not answer or '"' in pair:
            return None
        asked = rng.choice(ASK["follows"]).format(w=pair, x=passage)
        return exchange(asked, answer, answer=answer)

    def is_name(self, word: str) -> bool:
        """
        Whether a word is written with a capital wherever the texts have it, also within a sentence,
        and is no "I" and no "Mr.".
        """
        often, abbreviated, within = (self.words[key] for key in (word, f"{word}.", f", {word}"))
        named = len(word) > 1 and word[0].isupper() and within > 0
        return named and often > 1 + 2 * abbreviated and not self.words[word.lower()]

    def _sentence(self, rng: random.Random) -> str:
        return rng.choice(SENTENCE_END.split(rng.choice(self.passages)))


def words_of(texts: Iterable[str]) -> Counter[str]:
    """
    How often each word occurs, as it is written, with a full stop after it ("Mr."), and within a
    sentence (", Mira").
    """
    counts: Counter[str] = Counter()
    for text in texts:
        for m in WORD.finditer(text):
            counts[m[0]] += 1
            counts[f"{m[0]}."] += text[m.end() : m.end() + 1] == "."
            before = text[max(0, m.start() - 6) : m.start()]
            counts[f", {m[0]}"] += WITHIN.search(before) is not None
    return counts


def bare(word: str) -> str:
    """A word without the marks around it."""
    return word.strip("\"'“”„‘’«»().,;:!?…-—_*")


def passages(text: str) -> Iterator[str]:
    """Whole sentences that follow each other, at most PASSAGE characters together."""
    held = ""
    for sentence in SENTENCE_END.split(" ".join(text.split())):
        if held and len(held) + 1 + len(sentence) > PASSAGE:
            yield held
            held = ""
        if len(sentence) > PASSAGE:  # cut at a word; what is left is dropped
            sentence = sentence[:PASSAGE].rpartition(" ")[0]
        held = f"{held} {sentence}".strip()
    if held:
        yield held


def dialogues(text: str) -> Iterator[list[str]]:
    """
    Turns that follow each other, at least two: lines "NAME: words" of changing names, or paragraphs
    that begin with a quotation, without what stands between the quotations.
    """
    turns: list[str] = []
    speaker, silent = None, 0  # silent: lines since the last turn
    for line, who, words in _turns(text):
        if words and len(words) <= TURN and (who is None or who != speaker):
            turns.append(words)
            speaker, silent = who, 0
            continue
        silent += bool(line.strip())
        if silent > SILENT or words:
            if len(turns) > 1:
                yield turns
            turns, speaker, silent = [words] * bool(words and len(words) <= TURN), who, 0
    if len(turns) > 1:
        yield turns


def _turns(text: str) -> Iterator[tuple[str, str | None, str]]:
    """(line, speaker if it names one, what is said in the paragraph that begins there or "")."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if m := SPEAKER.match(line):
            yield line, m[1], m[2].strip()
        elif line.lstrip()[:1] in tuple('"“„«') and line.strip():
            paragraph = [line]
            for following in lines[i + 1 : i + 6]:  # a paragraph may be wrapped
                if not following.strip() or following.lstrip()[:1] in tuple('"“„«'):
                    break
                paragraph.append(following)
            quoted = QUOTED.findall(" ".join(paragraph))
            yield line, None, " ".join(" ".join(map(" ".join, quoted)).split())
        else:
            yield line, None, ""


def about_names(questions: Sequence[Item], count: int) -> list[str]:
    """Questions about the names that `questions` ask for most often."""
    names = Counter(q["answer"] for q in questions if q["kind"] == "name")
    return [ASK["tell"][0].format(x=name) for name, _ in names.most_common(count)]


def is_right(item: Item, reply: str) -> bool:
    """Whether a reply is the answer; of a completed sentence, whether its first word is."""
    words = [bare(word).casefold() for word in reply.split()]
    said = words[:1] if item["kind"] == "complete" else words
    return said == [item["answer"].casefold()]


def tasks(questions: Sequence[Item]) -> list[Task]:
    """A task for each judged kind among the questions."""

    def items(kind: str, split: str, n: int, seed: int = 0, folder: object = None) -> list[Item]:
        return [q for q in questions if q["kind"] == kind][: n or None]

    present = {question["kind"] for question in questions}
    return [
        Task(f"own/{kind}", "generative", chance, partial(items, kind), is_right, max_tokens=24)
        for kind, chance in JUDGED.items()
        if kind in present
    ]
