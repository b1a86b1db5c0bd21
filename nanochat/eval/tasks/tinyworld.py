"""
The questions of the embedded corpus as tasks, one per kind; tinyworld/conversations.py makes them.
A reply must contain the answer and no other possible answer: one that lists every option, or
hedges, is wrong.
"""

import functools
import re
from collections.abc import Callable

from nanochat.eval.tasks.common import Item, Task, generated
from nanochat.tinyworld.conversations import KINDS, conversations
from nanochat.tinyworld.world import world

# Task.items for questions of all kinds in turn; no pairing in val occurs in train
items = generated(functools.partial(conversations, kinds=tuple(KINDS)))


@functools.cache
def rivals(answer: str) -> re.Pattern[str]:
    """
    Matches the answer and whatever could take its place, in lower case: all members of the classes
    of values that it belongs to.
    """
    lexicon = world()
    small_talk = lexicon.data["smalltalk"]
    classes = [
        [*lexicon.people, *small_talk["users"]],
        small_talk["likes"],
        small_talk["advice"].values(),
        *lexicon.classes.values(),
        *(lexicon.attributes[name].values() for name in ("home", "job", "pet", "food")),
    ]
    words = {answer.lower()}
    for members in classes:
        if answer in members:
            words.update(member.lower() for member in members)
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b")


def evaluate(item: Item, reply: str) -> bool:
    """Whether a reply's visible text gives the answer to the item's last question and no other."""
    judge = JUDGES.get(item["kind"], _is_named)
    return judge(item["answer"], reply.strip(), item["messages"][-2]["content"])


def _is_chosen(answer: str, reply: str, question: str) -> bool:
    """The letter, alone or after its option ("apple=B"); sentences of reasons may come before."""
    *reasons, last = reply.split(". ")
    if any("=" in text or "answer" in text or len(text.split()) < 3 for text in reasons):
        return False  # a sentence that names a letter or gives another answer is no reason
    m = re.fullmatch(rf"(?:(?:The answer is )?([^=\n]+)=)?{answer}\.?", last)
    return bool(m) and (m[1] is None or f"- {m[1]}={answer}" in question.split("\n"))


def _is_result(answer: str, reply: str, question: str) -> bool:
    """The right number at the end, without others or after exactly the numbers of the question."""
    *before, last = re.findall(r"\d+(?:\.\d+)?", reply) or [""]
    return last.removesuffix(".0") == answer and before in ([], re.findall(r"\d+", question))


def _is_spelled(answer: str, reply: str, question: str) -> bool:
    """One word in letters with hyphens between them, the right one."""
    return re.findall(r"\b\w+(?:-\w+)+", reply.lower()) == [answer]


def _is_named(answer: str, reply: str, question: str) -> bool:
    """The answer and none of its rivals, without "not" or "or"."""
    text = reply.lower()
    named = set(rivals(answer).findall(text))
    return named == {answer.lower()} and not re.search(r"\b(?:not|or)\b", text)


JUDGES: dict[str, Callable[[str, str, str], bool]] = {
    "choice": _is_chosen,
    "arithmetic": _is_result,
    "twostep": _is_result,
    "counting": _is_result,
    "spelling": _is_spelled,
}
TASKS = {
    kind: Task(
        f"tinyworld/{kind}",
        "generative",
        chance,
        generated(functools.partial(conversations, kinds=(kind,))),
        evaluate,
        # Few facts and words are held out, so each is asked for in several wordings
        about=Task.gold if kind in ("facts", "spelling") else id,
    )
    for kind, chance in KINDS.items()
}
