"""
The form of every task: a record of functions that list items and judge replies. A task never sees a
model or a tokenizer; eval/chat.py runs it.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.data.rendering import visible_content
from nanochat.data.shapes import with_options

# A conversation whose last message is the gold reply, with what the task needs to judge replies
Item = dict[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALL_GENERATED = 1000  # items of a generated task, which are endless, when all are asked for


@dataclass(frozen=True)
class Task:
    """
    A set of questions and how to judge replies. In a "choice" task, items have "letters", of which
    a reply is one; in a "generative" task, a reply is free text and may call tools.
    """

    name: str
    kind: Literal["choice", "generative"]
    chance: float  # the score of guessing, 0 to 1
    # (split "train" or "val", n, seed=0, folder=None) -> at most n items (0: all), reproducibly
    items: Callable[..., list[Item]]
    evaluate: Callable[[Item, str], bool]  # whether a reply's visible text is right
    max_tokens: int = 64  # default limit of a reply
    missing: Callable[[], str] = str  # why this machine cannot judge replies; "" if it can
    # What an item asks about: items with equal values are one question in several wordings
    about: Callable[[Item], Hashable] = id

    @staticmethod
    def prompt(item: Item) -> Item:
        """The conversation without its last message, the gold reply."""
        return {"messages": item["messages"][:-1]}

    @staticmethod
    def gold(item: Item) -> str:
        """The visible text of the gold reply, without tool calls and their output."""
        return visible_content(item["messages"][-1]["content"])


def generated(conversations: Callable[[int, str], Iterator[Item]]) -> Callable[..., list[Item]]:
    """The Task.items that returns the first n of the endless stream conversations(seed, split)."""

    def items(split: str, n: int, seed: int = 0, folder: object = None) -> list[Item]:
        return list(itertools.islice(conversations(seed, split), n or ALL_GENERATED))

    return items


def exchange(*contents: str | list[dict[str, str]], **fields: Any) -> Item:
    """An item in which user and assistant say these contents in turn, the last as gold reply."""
    sides = zip(itertools.cycle(("user", "assistant")), contents, strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in sides], **fields}


def choice(question: str, options: Sequence[str], right: int) -> Item:
    """
    A multiple-choice item in the layout of tinyworld: one option per line, followed directly by its
    letter. `right` is the index of the right option. Raises ValueError unless there are 2 to 26
    options, all of them text, and `right` is one of them.
    """
    if not all(isinstance(text, str) for text in (question, *options)):
        raise ValueError("the question or an option is not text")
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a question needs 2 to 26 options, not {len(options)}")
    if not 0 <= right < len(options):
        raise ValueError(f"the answer is option {right} of {len(options)}, counted from 0")
    letters, answer = list(LETTERS[: len(options)]), LETTERS[right]
    return exchange(with_options(question, options), answer, letters=letters, answer=answer)


def is_answer(item: Item, reply: str) -> bool:
    """Whether a reply is the right letter and nothing else."""
    return reply.strip() == item["answer"]
