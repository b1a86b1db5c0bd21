"""
The shape of a conversation, and the order of text and special tokens in which it is rendered.

    {"messages": [{"role": "user" or "assistant", "content": text}, ...]}

Other shapes become this one in shapes.py.

User and assistant take turns, after an optional system message. The content of an assistant message
may also be a list of parts, {"type": "text", "python" or "python_output", "text": ...}: a call of
the calculator and its result. An assistant message, or a part of one, with "weight": 0 is not
learned.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from nanochat.base.common import UserError
from nanochat.base.strangers import shown

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # around a call of the calculator
    "<|python_end|>",
    "<|output_start|>",  # around its result
    "<|output_end|>",
)
PART_TOKENS = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


class Piece(NamedTuple):
    """Ordinary text or the name of a special token; `supervised` if the model learns to say it."""

    text: str
    special: bool
    supervised: bool


def checked_messages(conversation: dict) -> list[dict]:
    """
    The messages, with a system message merged into the first user message. Raises UserError if the
    conversation does not have the right shape.
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError('a conversation must be {"messages": [{"role": ..., "content": ...}, ...]}')
    first = 1 if messages and messages[0].get("role") == "system" else 0
    for i, message in enumerate(messages):
        role = message.get("role")
        expected = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        if role != expected:
            raise UserError(
                f"message {i}: expected role {expected!r}, got {role!r} (user and assistant take "
                "turns)"
            )
        check_content(i, role, message.get("content"))
    if len(messages) == first:
        raise UserError("a conversation needs a user message")
    if first:
        content = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = [{**messages[1], "content": content}, *messages[2:]]
    return messages


def check_content(i: int, role: object, content: object) -> None:
    """Raise UserError unless message i of this role may have this content."""
    if isinstance(content, str):
        return
    if role != "assistant" or not isinstance(content, list):
        raise UserError(
            f"message {i}: the content of a message with role {role!r} must be text, not "
            f"{shown(content)}"
        )
    for part in content:
        known = isinstance(part, dict) and part.get("type") in ("text", *PART_TOKENS)
        if not known or not isinstance(part.get("text"), str):
            raise UserError(
                f'message {i}: a part must be {{"type": one of text, {", ".join(PART_TOKENS)}; '
                f'"text": ...}}, not {shown(part)}'
            )


def parts_of(content: str | list[Any]) -> list[Any]:
    """The content of a message as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def visible_content(content: str | list[dict[str, str]]) -> str:
    """The text of a message's content, without the calculator's calls and results."""
    return "".join(part["text"] for part in parts_of(content) if part["type"] == "text")


def conversation_pieces(messages: list[dict]) -> Iterator[Piece]:
    """Checked messages in pieces. The chat template of the export follows the same order."""
    yield Piece("<|bos|>", True, False)
    for message in messages:
        role, parts = message["role"], parts_of(message["content"])
        learned = role == "assistant" and message.get("weight") != 0
        yield Piece(f"<|{role}_start|>", True, False)
        for part in parts:
            # The user and the calculator say the other parts, not the model
            supervised = learned and part["type"] != "python_output" and part.get("weight") != 0
            start, end = PART_TOKENS.get(part["type"], ("", ""))
            for text, special in ((start, True), (part["text"], False), (end, True)):
                if text:
                    yield Piece(text, special, supervised)
        learned = learned and not (parts and parts[-1].get("weight") == 0)
        yield Piece(f"<|{role}_end|>", True, learned)
