"""
Conversations and questions about a person's own text, made from it by rule: continue a passage,
tell of a person or a thing, complete a sentence, say who said something, answer several questions
about one passage; and the turns of dialogue that the text itself holds, in quotation marks or as
"NAME: words".

The wordings are English; the text may be in any language that separates its words. The same texts
and seed give the same conversations. What is asked of a trained model is made from held-out texts.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial, partialmethod

from nanochat.eval.tasks.common import Item, Task, exchange

# kind -> chance level of the kinds that have one right answer; the others have none to judge
JUDGED = {"name": 0.05, "speaker": 0.4, "follows": 0.03, "complete": 0.0}
# In training, in turn. A passage is asked about several times in a row, so that more of what is
# read is an answer.
KINDS = "dialogue", "continue", "tell", "passage", "said", "tell", "continue", "complete"
TRIES = 10  # at a conversation of a kind, before its turn is over
ABOUT = {  # what a kind asks for, for people
    "name": "find the name in a passage",
    "speaker": "say who speaks in a passage",
    "follows": "find the word that follows two others in a passage",
    "complete": "guess the next word of a sentence",
    "smalltalk": "greet, remember a name, give advice on the weather",
    "context": "answer from a short story",
    "arithmetic": "do a sum with the calculator",
}
ASK = {  # {x}: of the text
    "continue": ("Continue: {x}", "Go on: {x}", "What comes next? {x}"),
    "tell": ("Tell me about {x}.", "Write about {x}.", "What about {x}?"),
    "name": ("Who is {x}?", "What do you know of {x}?", "Tell me about {x}.", "What of {x}?"),
    "said": ('Who said "{x}"?', 'Who says "{x}"?'),
    "complete": ("Complete the sentence: {x}", "How does this end? {x}"),
}
# Questions about a passage, and the form of the reply: the words before an answer are those that
# precede it in the passage, which makes it easier to find.
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
SILENT = 6  # lines of prose between two turns of one dialogue
NEAR = 40  # characters from the beginning of a sentence that is about something
TURNS = 4  # that a conversation takes from a dialogue
# After a mark, but not after Mr., Mrs., Dr. or an initial: capitals of up to three letters
SENTENCE_END = re.compile(
    r"(?<=[.!?…。！？])(?<!\b[A-Z]\.)(?<!\b[A-Z]\w\.)(?<!\b[A-Z]\w\w\.)\s+"
    r"|(?<=[.!?…。！？][\"'”’»)])\s+"
    r"|(?<=[。！？])(?=[^\s\"'”’»)」』])|(?<=[。！？][”’」』])(?=\S)"  # which no space follows
)
QUOTED = re.compile(r"“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|\"([^\"]+)\"")
SPEAKER = re.compile(r"^([^\W\d_][\w .'-]{0,24}):[ \t]+(\S.*)$")
SAID = re.compile(  # after what is said
    r"[\"”»]\s+(?:said|says|asked|cried|answered|replied|exclaimed|whispered)\s+"
    r"((?:(?:Mr|Mrs|Dr|Miss|Sir|Lady)\.? )?[A-Z][\w’'-]+)"
)
NO_NAME = re.compile(r"I['’]|.*['’]s$")
OPENING = re.compile(r"[\"“„«]")
THING = re.compile(r"\b[Tt]he ([a-z]{3,})[.,;!?]")
WITHIN = re.compile(r"(?:[\w,;]|\b[A-Z]\w{0,2}\.)\s$")  # before a word that begins no sentence
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


class TextQuestions:
    """
    Makes conversations from texts. `vocabulary`, the counts of the words of all texts (by default
    of these), decides which words are names.
    """

    def __init__(self, texts: Sequence[str], vocabulary: Counter[str] | None = None):
        self.passages = [p for text in texts for p in passages(text)]
        self.spoken = [p for p in self.passages if len(SAID.findall(p)) == 1]
        self.dialogues = [d for text in texts for d in dialogues(text)]
        self.words = words_of(texts) if vocabulary is None else vocabulary

    def conversations(self, seed: int, kinds: Sequence[str], count: int) -> Iterator[Item]:
        """At most `count` different ones, the kinds in turn; a kind that finds none is left out."""
        rng, seen, failures = random.Random(seed), set(), Counter()
        kinds = [k for k in kinds if (self.dialogues if k == "dialogue" else self.passages)]
        while count > 0 and kinds:
            for kind in list(kinds):
                make = getattr(self, f"make_{kind}")
                item = next(filter(None, (make(rng) for _ in range(TRIES))), None)
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
        asked = rng.choice(ASK["continue"]).format(x=together(sentences[:cut]))
        return exchange(asked, together(sentences[cut:]))

    def make_tell(self, rng: random.Random) -> Item | None:
        """The first sentence that names a person, or a thing, and those after it."""
        at = rng.randrange(len(self.passages))
        sentences = SENTENCE_END.split(together(self.passages[at : at + 2]))
        for i, sentence in enumerate(sentences):
            names = [w for w in WORD.findall(sentence, 0, NEAR) if self.is_name(w)]
            things = [f"the {thing}" for thing in THING.findall(sentence, 0, NEAR)]
            if names or things:
                kind, subject = ("name", names[0]) if names else ("tell", things[0])
                reply = next(passages(together(sentences[i:])))
                return exchange(rng.choice(ASK[kind]).format(x=subject), reply)
        return None

    def make_said(self, rng: random.Random) -> Item | None:
        if not self.spoken:
            return None
        passage = rng.choice(self.spoken)
        (found,) = SAID.finditer(passage)
        words = OPENING.split(passage[: found.start()])[-1].strip(" ,")
        return exchange(rng.choice(ASK["said"]).format(x=words), f"{found[1]} said that.")

    def make_complete(self, rng: random.Random) -> Item | None:
        words = self._sentence(rng).split()
        if len(words) < 6:
            return None
        cut = rng.randrange(4, len(words) - 1)
        if not bare(words[cut]):  # a dash: there is no word to tell by
            return None
        asked = rng.choice(ASK["complete"]).format(x=" ".join(words[:cut]))
        return exchange(asked, " ".join(words[cut:]), answer=bare(words[cut]))

    def make_passage(self, rng: random.Random) -> Item | None:
        """Several questions about a passage, which comes with the first."""
        passage = rng.choice(self.passages)
        kinds = rng.sample(("name", "speaker", *("follows",) * 3), 5)
        found = [self.ask(kind, passage, rng) for kind in kinds]
        asked = dict(exchanged for exchanged in found if exchanged)  # each question once
        if not asked:
            return None
        contents = [text for question in list(asked)[:4] for text in (question, asked[question][0])]
        contents[0] += f" {passage}"
        roles = ("user", "assistant") * len(contents)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        return {"messages": messages}

    def single(self, kind: str, rng: random.Random) -> Item | None:
        """One question about a passage."""
        passage = rng.choice((kind == "speaker" and self.spoken) or self.passages)
        asked = self.ask(kind, passage, rng)
        if asked is None:
            return None
        question, (reply, answer) = asked
        return exchange(f"{question} {passage}", reply, answer=answer)

    make_name = partialmethod(single, "name")
    make_speaker = partialmethod(single, "speaker")
    make_follows = partialmethod(single, "follows")

    def ask(
        self, kind: str, passage: str, rng: random.Random
    ) -> tuple[str, tuple[str, str]] | None:
        """(question, (reply, answer)) of a kind of ASK_PASSAGE, or None if there is none."""
        words, pair = passage.replace('"', "").split(), ""
        answers = []
        if kind == "name":
            answers = sorted({m[0] for m in WORD.finditer(passage) if self.is_name(m[0])})
        elif kind == "speaker":
            answers = sorted(set(SAID.findall(passage)))
        elif len(words) > 8:
            i = rng.randrange(len(words) - 2)
            pair = " ".join(words[i : i + 2])
            if f" {passage} ".count(f" {pair} ") == 1:
                answers = [words[i + 2]]
        answers = [bare(answer) for answer in answers]
        if len(answers) != 1 or not answers[0]:
            return None
        questions, reply = ASK_PASSAGE[kind]
        (answer,) = answers
        return rng.choice(questions).format(w=pair), (reply.format(w=pair, a=answer), answer)

    def is_name(self, word: str) -> bool:
        """
        Whether a word is written with a capital wherever the texts have it, also within a sentence,
        and is no "I", "I'll", "Mira's" or "Mr.".
        """
        often, abbreviated, within = (self.words[key] for key in (word, f"{word}.", f", {word}"))
        named = len(word) > 1 and word[0].isupper() and within > 0 and not NO_NAME.match(word)
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
    return word.strip(" \"'“”„‘’«»().,;:!?…-—_*")


def passages(text: str) -> Iterator[str]:
    """Whole sentences that follow each other, at most PASSAGE characters together."""
    held = ""
    for sentence in SENTENCE_END.split(" ".join(text.split())):
        if held and len(held) + 1 + len(sentence) > PASSAGE:
            yield held
            held = ""
        if len(sentence) > PASSAGE:  # cut at a word if there are any; what is left is dropped
            sentence = sentence[:PASSAGE]
            sentence = sentence.rpartition(" ")[0] or sentence
        held = together([held, sentence])
    if held:
        yield held


def together(sentences: Sequence[str]) -> str:
    """Sentences as they stand in a text: with spaces between them, but for Chinese and Japanese."""
    text = ""
    for sentence in sentences:
        spaced = text and not text.rstrip("”’」』").endswith(("。", "！", "？"))
        text += f" {sentence}" if spaced else sentence
    return text.strip()


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
    """
    Whether a reply is the answer, alone or in the sentence that training teaches; of a completed
    sentence, whether its first word is.
    """
    said, answer, gold = (
        [bare(word).casefold() for word in text.split()]
        for text in (reply, item["answer"], item["messages"][-1]["content"])
    )
    return said[:1] == answer if item["kind"] == "complete" else said in (answer, gold)


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
