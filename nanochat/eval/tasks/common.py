"""
What every task of the evaluations is: a declarative record. A task lists items, shows the prompt of one, knows its gold reply and judges a
reply. It never sees a model or a tokenizer: chat_eval.py runs it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Item = dict[
    str, Any
]  # a conversation whose last message is the gold reply, with whatever the task needs to judge another one
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GENERATED = 1000  # items of a generated task where all are asked for


@dataclass(frozen=True)
class Task:
    """A set of questions with a way to judge replies."""

    name: str
    kind: Literal[
        "choice", "generative"
    ]  # choice: an item has "letters" and a reply is one of them; generative: free text, tools allowed
    chance: float  # what guessing scores, 0 to 1
    items: Callable[
        ..., list[Item]
    ]  # (split "train" | "val", n, seed=0, folder=None) -> at most n items (0: all), each time the same
    prompt: Callable[[Item], Item]  # the conversation up to the user's last message
    gold: Callable[[Item], str]  # the visible text of the right reply
    evaluate: Callable[
        [Item, str], bool
    ]  # whether a reply's visible text (tool calls left out) is right
    max_tokens: int = 64  # of a reply, unless the user says otherwise
    missing: Callable[[], str] = str  # why no reply can be judged on this machine; "" where it can


def prompt(item: Item) -> Item:
    """The conversation without its last message, the gold reply."""
    return {"messages": item["messages"][:-1]}


def visible(content: str | list[dict[str, str]]) -> str:
    """The text of a message that the user reads: its parts without tool calls and their output."""
    return (
        content
        if isinstance(content, str)
        else "".join(part["text"] for part in content if part["type"] == "text")
    )


def gold(item: Item) -> str:
    """The visible text of the gold reply."""
    return visible(item["messages"][-1]["content"])


def exchange(question: str, reply: str | list[dict[str, str]], **more: Any) -> Item:
    """An item of one question and its gold reply."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ],
        **more,
    }


def choice(question: str, options: Sequence[str], right: int) -> Item:
    """
    A multiple-choice item, laid out as tinytalk.py lays them out: an option a line, its letter directly behind it. ValueError unless there
    are 2 to 26 options of text and `right` is the number of one of them, from 0.
    """
    if (
        not isinstance(question, str)
        or not all(isinstance(x, str) for x in options)
        or not 2 <= len(options) <= len(LETTERS)
    ):
        raise ValueError("a question of text with 2 to 26 options of text is wanted")
    if not 0 <= right < len(options):
        raise ValueError(f"the answer is option {right} of {len(options)}, counted from 0")
    letters = list(LETTERS[: len(options)])
    lines = "\n".join(
        f"- {' '.join(option.split())}={letter}"
        for option, letter in zip(options, letters, strict=True)
    )
    return exchange(
        f"{question}\n{lines}\nAnswer with the letter alone.",
        letters[right],
        letters=letters,
        answer=letters[right],
    )


def is_answer(item: Item, reply: str) -> bool:
    """Whether a reply is the letter of the right option, and nothing else."""
    return reply.strip() == item["answer"]
