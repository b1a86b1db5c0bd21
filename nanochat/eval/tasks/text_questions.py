"""
Conversations and questions about a person's own text, made from it by rule: continue a passage,
tell of a person or a thing, complete a sentence, say who said something, answer several questions
about one passage; and the dialogues in the text itself, in quotation marks or as "NAME: words".

The wordings are English; the text may be in any language that separates its words. The same texts
and seed give the same conversations. Questions for a trained model are made from held-out texts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from random import Random
from typing import NamedTuple

from nanochat.eval.tasks.common import Item, Task, exchange

# kind -> chance level, for the kinds whose questions have one right answer
JUDGED = {"name": 0.05, "speaker": 0.4, "follows": 0.03, "complete": 0.0}
# The kinds in training, in turn. "passage" asks about one passage several times, so that answers
# are a larger part of what the model reads.
KINDS = "dialogue", "continue", "tell", "passage", "said", "tell", "continue", "complete"
TRIES = 10  # at a conversation of a kind, before it is the next kind's turn
MOST_FAILURES = 200  # in a row, after which the texts hold no more of a kind
ABOUT = {  # what a kind asks for, as reports name it
    "name": "find the name in a passage",
    "speaker": "say who speaks in a passage",
    "follows": "find the word that follows two others in a passage",
    "complete": "guess the next word of a sentence",
    "smalltalk": "greet, remember a name, give advice on the weather",
    "context": "answer from a short story",
    "arithmetic": "do a sum with the calculator",
}
ASK = {  # {x}: words of the text
    "continue": ("Continue: {x}", "Go on: {x}", "What comes next? {x}"),
    "tell": ("Tell me about {x}.", "Write about {x}.", "What about {x}?"),
    "name": ("Who is {x}?", "What do you know of {x}?", "Tell me about {x}.", "What of {x}?"),
    "said": ('Who said "{x}"?', 'Who says "{x}"?'),
    "complete": ("Complete the sentence: {x}", "How does this end? {x}"),
}
# (questions about a passage, form of the reply). The reply to "follows" repeats the words before
# the answer as they are in the passage, which makes the answer easier to find.
ASK_PASSAGE = {
    "name": (("Which name is in this text?", "Find the name."), "The name is {a}."),
    "speaker": (("Who speaks here?", "Who is speaking?"), "It is {a}."),
    "follows": (
        ('Which word follows "{w}"?', 'What comes after "{w}"?'),
        'It says "{w} {a}".',
    ),
}
PASSAGE = 240  # characters: with a question and a reply it fits a context of 256 tokens
TURN = 160  # characters of one turn of dialogue
MOST_PROSE = 6  # lines between two turns of one dialogue
SUBJECT = 40  # first characters of a sentence, in which its subject is looked for
TURNS = 4  # that a conversation takes from a dialogue
# After a full stop or the like, but not after Mr., Mrs., Dr. or an initial: a capital and up to two
# more letters. The last two lines are for Chinese and Japanese, which have no space after it
SENTENCE_END = re.compile(
    r"(?<=[.!?…。！？])(?<!\b[A-Z]\.)(?<!\b[A-Z]\w\.)(?<!\b[A-Z]\w\w\.)\s+"
    r"|(?<=[.!?…。！？][\"'”’»)])\s+"
    r"|(?<=[。！？])(?=[^\s\"'”’»)」』])"
    r"|(?<=[。！？][”’」』])(?=\S)"
)
QUOTED = re.compile(r"“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|\"([^\"]+)\"")
SPEAKER = re.compile(r"^([^\W\d_][\w .'-]{0,24}):[ \t]+(\S.*)$")
SPEECH_TAG = re.compile(  # '" said Mira', after a quotation
    r"[\"”»]\s+(?:said|says|asked|cried|answered|replied|exclaimed|whispered)\s+"
    r"((?:(?:Mr|Mrs|Dr|Miss|Sir|Lady)\.? )?[A-Z][\w’'-]+)"
)
NOT_A_NAME = re.compile(r"I['’]|.*['’]s$")
OPENING = re.compile(r"\s*[\"“„«]")
THING = re.compile(r"\b[Tt]he ([a-z]{3,})[.,;!?]")
MID_SENTENCE = re.compile(r"(?:[\w,;]|\b[A-Z]\w{0,2}\.)\s$")  # before a word within a sentence
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


class Question(NamedTuple):
    question: str
    reply: str
    answer: str  # what a right reply contains


class TextQuestions:
    """
    Makes conversations from texts. The method make_KIND, or make_question for the kinds of
    ASK_PASSAGE, returns one, or None if the passage that it drew does not allow one. `vocabulary`
    decides which words are names: the count_words() of all texts, by default of these.
    """

    def __init__(self, texts: Sequence[str], vocabulary: Counter[str] | None = None):
        self.passages = [p for text in texts for p in passages(text)]
        self.spoken = [p for p in self.passages if len(SPEECH_TAG.findall(p)) == 1]
        self.dialogues = [d for text in texts for d in dialogues(text)]
        self.words = count_words(texts) if vocabulary is None else vocabulary

    def conversations(self, seed: int, kinds: Sequence[str], count: int) -> Iterator[Item]:
        """
        At most `count` different conversations, the kinds in turn. A kind is left out once the
        texts hold no more of it.
        """
        rng, seen, failures = Random(seed), set(), Counter()
        pools = {"dialogue": self.dialogues, "said": self.spoken}
        kinds = [kind for kind in kinds if pools.get(kind, self.passages)]
        while kinds:
            for kind in list(kinds):
                if len(seen) >= count:
                    return
                make = getattr(self, f"make_{kind}", partial(self.make_question, kind))
                item = next(filter(None, (make(rng) for _ in range(TRIES))), None)
                if item is None or (key := str(item["messages"])) in seen:
                    failures[kind] += 1
                    if failures[kind] > MOST_FAILURES:
                        kinds.remove(kind)
                    continue
                failures[kind] = 0
                seen.add(key)
                yield {**item, "kind": kind}

    def make_dialogue(self, rng: Random) -> Item:
        turns = rng.choice(self.dialogues)
        start = rng.randrange(len(turns) - 1)
        chosen = turns[start : start + rng.choice((2, 2, TURNS))]
        return exchange(*chosen[: len(chosen) // 2 * 2])

    def make_continue(self, rng: Random) -> Item | None:
        sentences = SENTENCE_END.split(rng.choice(self.passages))
        if len(sentences) < 2:
            return None
        cut = rng.randrange(1, len(sentences))
        question = rng.choice(ASK["continue"]).format(x=joined(sentences[:cut]))
        return exchange(question, joined(sentences[cut:]))

    def make_tell(self, rng: Random) -> Item | None:
        """The reply is the first sentence about a person or a thing, and those after it."""
        first = rng.randrange(len(self.passages))
        sentences = SENTENCE_END.split(joined(self.passages[first : first + 2]))
        for i, sentence in enumerate(sentences):
            names = [w for w in WORD.findall(sentence, 0, SUBJECT) if self.is_name(w)]
            things = [f"the {thing}" for thing in THING.findall(sentence, 0, SUBJECT)]
            if names or things:
                kind, subject = ("name", names[0]) if names else ("tell", things[0])
                reply = next(passages(joined(sentences[i:])))
                return exchange(rng.choice(ASK[kind]).format(x=subject), reply)
        return None

    def make_said(self, rng: Random) -> Item:
        passage = rng.choice(self.spoken)
        (tag,) = SPEECH_TAG.finditer(passage)
        quotation = OPENING.split(passage[: tag.start()])[-1].strip(" ,")
        return exchange(rng.choice(ASK["said"]).format(x=quotation), f"{tag[1]} said that.")

    def make_complete(self, rng: Random) -> Item | None:
        words = rng.choice(SENTENCE_END.split(rng.choice(self.passages))).split()
        if len(words) < 6:
            return None
        cut = rng.randrange(4, len(words) - 1)
        answer = without_marks(words[cut])
        if not answer:  # a dash cannot be judged
            return None
        question = rng.choice(ASK["complete"]).format(x=" ".join(words[:cut]))
        return exchange(question, " ".join(words[cut:]), answer=answer)

    def make_passage(self, rng: Random) -> Item | None:
        """Up to four questions about a passage, which comes with the first."""
        passage = rng.choice(self.passages)
        kinds = rng.sample(("name", "speaker", *("follows",) * 3), 5)
        asked = filter(None, [self.ask(kind, passage, rng) for kind in kinds])
        replies = {question: reply for question, reply, _ in asked}  # each question once
        if not replies:
            return None
        contents = [text for pair in list(replies.items())[:4] for text in pair]
        contents[0] += f" {passage}"
        return exchange(*contents)

    def make_question(self, kind: str, rng: Random) -> Item | None:
        """One question about a passage."""
        passage = rng.choice((kind == "speaker" and self.spoken) or self.passages)
        asked = self.ask(kind, passage, rng)
        return asked and exchange(f"{asked.question} {passage}", asked.reply, answer=asked.answer)

    def ask(self, kind: str, passage: str, rng: Random) -> Question | None:
        """A question of a kind of ASK_PASSAGE; None if it has no answer or several."""
        words, pair = passage.replace('"', "").split(), ""
        answers: set[str] = set()
        if kind == "name":
            answers = {word for word in WORD.findall(passage) if self.is_name(word)}
        elif kind == "speaker":
            answers = set(SPEECH_TAG.findall(passage))
        elif len(words) > 8:
            i = rng.randrange(len(words) - 2)
            pair = " ".join(words[i : i + 2])
            if f" {passage} ".count(f" {pair} ") == 1:
                answers = {words[i + 2]}
        answer = without_marks(answers.pop()) if len(answers) == 1 else ""
        if not answer:
            return None
        questions, reply = ASK_PASSAGE[kind]
        question = rng.choice(questions).format(w=pair)
        return Question(question, reply.format(w=pair, a=answer), answer)

    def is_name(self, word: str) -> bool:
        """
        Whether the texts write a word with a capital everywhere, within sentences too, and it is
        not one like "I", "I'll", "Mira's" or "Mr.".
        """
        if len(word) < 2 or not word[0].isupper() or NOT_A_NAME.match(word):
            return False
        counts = self.words
        often = counts[word] > 1 + 2 * counts[f"{word}."]
        return often and counts[f", {word}"] > 0 and not counts[word.lower()]


def count_words(texts: Iterable[str]) -> Counter[str]:
    """
    How often each word occurs as it is written ("Mira"), with a full stop after it ("Mira."), and
    within a sentence (", Mira").
    """
    counts: Counter[str] = Counter()
    for text in texts:
        for m in WORD.finditer(text):
            counts[m[0]] += 1
            counts[f"{m[0]}."] += text[m.end() : m.end() + 1] == "."
            before = text[max(0, m.start() - 6) : m.start()]
            counts[f", {m[0]}"] += MID_SENTENCE.search(before) is not None
    return counts


def without_marks(word: str) -> str:
    """A word without the punctuation and quotation marks around it."""
    return word.strip(" \"'“”„‘’«»().,;:!?…-—_*")


def passages(text: str) -> Iterator[str]:
    """
    A text as consecutive passages of whole sentences, of at most PASSAGE characters. A sentence
    that is longer loses its end.
    """
    passage = ""
    for sentence in SENTENCE_END.split(" ".join(text.split())):
        if passage and len(passage) + 1 + len(sentence) > PASSAGE:
            yield passage
            passage = ""
        if len(sentence) > PASSAGE:
            sentence = sentence[:PASSAGE]
            sentence = sentence.rpartition(" ")[0] or sentence
        passage = joined([passage, sentence])
    if passage:
        yield passage


def joined(sentences: Sequence[str]) -> str:
    """Sentences as a text, with spaces between them except in Chinese and Japanese."""
    text = ""
    for sentence in sentences:
        spaced = text and not text.rstrip("”’」』").endswith(("。", "！", "？"))
        text += f" {sentence}" if spaced else sentence
    return text.strip()


def dialogues(text: str) -> Iterator[list[str]]:
    """
    The dialogues of at least two turns in a text. A turn is a line "NAME: words", if the name
    changes, or what a paragraph that begins with a quotation has in quotation marks. A dialogue
    ends at a turn that is too long or has the same speaker, and after more than MOST_PROSE lines of
    prose.
    """
    turns: list[str] = []
    speaker, prose = None, 0  # prose: lines since the last turn
    for who, words in _turns(text):
        is_turn = 0 < len(words) <= TURN
        if is_turn and (who is None or who != speaker):
            turns.append(words)
            speaker, prose = who, 0
            continue
        prose += 1
        if prose > MOST_PROSE or words:
            if len(turns) > 1:
                yield turns
            turns, speaker, prose = [words] if is_turn else [], who, 0
    if len(turns) > 1:
        yield turns


def _turns(text: str) -> Iterator[tuple[str | None, str]]:
    """
    For each line that is not empty: (its speaker if it names one, its words, or what the paragraph
    that begins there quotes, or "").
    """
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if m := SPEAKER.match(line):
            yield m[1], m[2].strip()
        elif OPENING.match(line):
            following = lines[i + 1 : i + 6]  # a paragraph may have several lines
            rest = takewhile(lambda line: line.strip() and not OPENING.match(line), following)
            quoted = QUOTED.findall(" ".join([line, *rest]))
            yield None, " ".join(" ".join(map(" ".join, quoted)).split())
        elif line.strip():
            yield None, ""


def about_names(questions: Sequence[Item], count: int) -> list[str]:
    """Questions about the `count` names that are most often the answer to `questions`."""
    names = Counter(q["answer"] for q in questions if q["kind"] == "name")
    return [ASK["tell"][0].format(x=name) for name, _ in names.most_common(count)]


def is_right(item: Item, reply: str) -> bool:
    """
    Whether a reply is the answer, alone or in the sentence that training teaches. To complete a
    sentence, the first word must be right.
    """
    replied, answer, gold = (
        [without_marks(word).casefold() for word in text.split()]
        for text in (reply, item["answer"], item["messages"][-1]["content"])
    )
    return replied[:1] == answer if item["kind"] == "complete" else replied in (answer, gold)


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
