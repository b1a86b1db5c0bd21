"""
What every task of the evaluations is: a declarative record. A task lists items, shows the prompt of one, knows its gold reply and judges a
reply. It never sees a model or a tokenizer: chat_eval.py runs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Item = dict[str, Any]  # a conversation whose last message is the gold reply, with whatever the task needs to judge another one


@dataclass(frozen=True)
class Task:
    """A set of questions with a way to judge replies."""

    name: str
    kind: Literal["choice", "generative"]  # choice: an item has "letters" and a reply is one of them; generative: free text, tools allowed
    chance: float  # what guessing scores, 0 to 1
    items: Callable[[str, int, int], list[Item]]  # (split, n, seed) -> at most n items, the same for the same arguments
    prompt: Callable[[Item], Item]  # the conversation up to the user's last message
    gold: Callable[[Item], str]  # the visible text of the right reply
    evaluate: Callable[[Item, str], bool]  # whether a reply's visible text (tool calls left out) is right


def prompt(item: Item) -> Item:
    """The conversation without its last message, the gold reply."""
    return {"messages": item["messages"][:-1]}


def visible(content: str | list[dict[str, str]]) -> str:
    """The text of a message that the user reads: its parts without tool calls and their output."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def gold(item: Item) -> str:
    """The visible text of the gold reply."""
    return visible(item["messages"][-1]["content"])
