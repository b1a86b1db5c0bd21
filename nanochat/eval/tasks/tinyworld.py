"""
The questions of the little world as tasks, one a kind. A reply must hold the key and nothing that competes with it: a reply that lists
every option, or hedges, is wrong. It makes no questions of its own (tinytalk.py does) and runs no model.
"""

import functools
import itertools
import re
from pathlib import Path

from nanochat.eval.tasks.common import GENERATED, Item, Task, gold, prompt
from nanochat.tinyworld.conversations import KINDS, conversations
from nanochat.tinyworld.world import world

__all__ = ["KINDS", "TASKS", "evaluate", "gold", "items", "prompt"]


def items(split: str, n: int, seed: int = 0, kinds: tuple[str, ...] = tuple(KINDS)) -> list[Item]:
    """n questions in turn of every kind; in val none of their pairings is ever asked in training."""
    return list(itertools.islice(conversations(seed, split, kinds), n or GENERATED))


@functools.cache
def rivals(answer: str) -> re.Pattern[str]:
    """Matches whatever could stand in the answer's place: all members of the classes of values that it belongs to, and itself."""
    w = world()
    small = w.data["smalltalk"]
    classes = [
        [*w.people, *small["users"]],
        small["likes"],
        list(small["advice"].values()),
        *w.classes.values(),
    ]
    classes += [list(w.attributes[name].values()) for name in ("home", "job", "pet", "food")]
    words = {answer.lower()}.union(
        *({x.lower() for x in members} for members in classes if answer in members)
    )
    return re.compile(
        r"\b(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + r")\b"
    )


def evaluate(item: Item, reply: str) -> bool:
    """Whether the visible text of a reply answers the item's last question, exactly and without hedging."""
    kind, answer, text = item["kind"], item["answer"], reply.strip()
    if kind == "choice":
        said = re.fullmatch(
            rf"(?:(?:The answer is )?([^=\n]+)=)?{answer}\.?", text
        )  # the letter, alone or with the option it stands for
        return bool(
            said
            and (
                said[1] is None
                or f"- {said[1]}={answer}" in item["messages"][-2]["content"].split("\n")
            )
        )
    if kind in ("arithmetic", "twostep", "counting"):
        numbers = re.findall(r"\d+(?:\.\d+)?", text)
        asked = re.findall(r"\d+", item["messages"][-2]["content"])
        return (
            bool(numbers)
            and numbers[-1].removesuffix(".0") == answer
            and numbers[:-1] in ([], asked)
        )
    if kind == "spelling":
        return re.findall(r"\b\w+(?:-\w+)+", text.lower()) == [answer]
    found = set(rivals(answer).findall(text.lower()))
    return found == {answer.lower()} and not re.search(r"\b(?:not|or)\b", text.lower())


def _task(kind: str, chance: float) -> Task:
    def of_kind(split: str, n: int, seed: int = 0, folder: Path | None = None) -> list[Item]:
        return items(split, n, seed, (kind,))

    return Task(f"tinyworld/{kind}", "generative", chance, of_kind, prompt, gold, evaluate)


TASKS: dict[str, Task] = {kind: _task(kind, chance) for kind, chance in KINDS.items()}
