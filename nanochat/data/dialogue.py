"""
Conversations in files that hold no rows of them: exports of WhatsApp (text), Telegram and Discord
(JSON), plain text in which lines begin with the speaker ("User: ...", "Assistant: ..."), and trees
of OpenAssistant. Given `me`, the name of a person in a chat, the chat becomes conversations in
which that person is the assistant. Read as text, a chat keeps its names and loses its times.

A chat is divided where nobody wrote for SILENCE seconds, so that each part has one topic. Given
`me`, a part is divided again after LONG characters, so that it fits the context of a small model.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from nanochat.base.common import UserError
from nanochat.data.shapes import ROLE_OF, Row

SILENCE = 6 * 3600
# Characters after which a person's next question begins a new conversation: a context of 256 tokens
# holds about this many, and finetuning cuts off the rest
LONG = 500
HEAD = 1 << 16  # characters at the beginning of a file that decide whether it is a chat
# An export of WhatsApp has at least this many messages within its first FIRST_LINES lines
FEWEST_MESSAGES = 3
FIRST_LINES = 40
# 31.12.20, 21:41 - Ada: Hi    [31/12/2020, 9:41:05 PM] Ada: Hi
STAMPED = re.compile(
    r"^[\u200e\u200f\ufeff]*\[?(\d{1,4})[./-](\d{1,2})[./-](\d{2,4}),? +"
    r"(\d{1,2})[:.](\d{2})(?:[:.](\d{2}))?[ \u202f\u00a0]?([AaPp]\.?[ \u00a0]?[Mm]\.?)?"
    r"(?:\]| -| –)[ \u200e]+(.*)$"
)
SPOKEN = re.compile(r"^(?:\*\*|__)?([^:*\n]{1,60}?)(?:\*\*|__)?:(?:\*\*|__)? ?(.*)$")
BREAK = re.compile(r"^\s*(?:-{3,}|={3,}|\*{3,}|#{3,}|<\|endoftext\|>)\s*$")
SHORT_NAMES = {"q": "user", "a": "assistant", "question": "user", "answer": "assistant"}
OMITTED = re.compile(r"<[^<>]{3,40}>|[\u200e].{0,20} omitted|null")  # <Media omitted>


class NobodyIsAssistant(UserError):
    """The people of a chat are known, but not which of them is the assistant."""


class Message(NamedTuple):
    """What a person wrote, and when: `time` in seconds, or None if unknown."""

    person: str
    text: str
    time: float | None = None


Chat = list[Message]


def whatsapp(lines: Iterable[str]) -> Chat:
    """The messages of a chat that WhatsApp exported, without those of WhatsApp itself."""
    said: list[tuple[str, list[str], float | None]] = []  # a person, lines, and the time
    kept = False  # whether the last message is in the chat
    for line in lines:
        if stamped := STAMPED.match(line):
            spoken = SPOKEN.match(stamped[8])
            kept = spoken is not None and not OMITTED.fullmatch(spoken[2].strip())
            if spoken and kept:
                person, text = spoken[1].strip("\u200e~ "), spoken[2].rstrip()
                said.append((person, [text], _seconds(stamped)))
        elif kept:  # a message of several lines
            said[-1][1].append(line.rstrip())
    return [Message(person, "\n".join(parts), time) for person, parts, time in said]


def _seconds(stamped: re.Match[str]) -> float | None:
    """
    The time of a message; None if there is no such date. Where day and month cannot be told apart,
    they may be swapped: the pauses within a day stay right.
    """
    first, second, third, hour, minute = (int(stamped[i]) for i in range(1, 6))
    year, month, day = (first, second, third) if first > 31 else (third, second, first)
    if month > 12:
        month, day = day, month
    if stamped[7]:
        hour = hour % 12 + (12 if stamped[7][0] in "Pp" else 0)
    try:
        return datetime(year % 100 + 2000, month, day, hour, minute).timestamp()
    except ValueError:
        return None


def exported(value: Any) -> list[Chat] | None:
    """
    The chats of an export of Telegram or Discord, given as parsed JSON, divided by sessions(). None
    if `value` is no such export.
    """
    if not isinstance(value, dict):
        return None
    chats = value.get("chats")
    listed = chats.get("list") if isinstance(chats, dict) else None
    if isinstance(listed, list):
        return [chat for one in listed for chat in exported(one) or []]
    messages = value.get("messages")
    if not isinstance(messages, list) or not ({"type", "guild", "channel"} & value.keys()):
        return None
    chat = [*filter(None, map(_exported_message, messages))]
    return sessions(chat) if chat or not messages else None


def _exported_message(message: Any) -> Message | None:
    if not isinstance(message, dict):
        return None
    person, author = message.get("from"), message.get("author")  # Telegram and Discord
    if isinstance(author, dict):
        person = author.get("nickname") or author.get("name")
    text = message.get("content", message.get("text"))
    if isinstance(text, list):  # Telegram's links and mentions
        parts = (part.get("text", "") if isinstance(part, dict) else part for part in text)
        text = "".join(map(str, parts))
    if not isinstance(person, str) or not isinstance(text, str) or not text.strip():
        return None
    when = None
    with suppress(ValueError, OverflowError, OSError):
        date = message.get("date") or message.get("timestamp")
        when = datetime.fromisoformat(str(date)).timestamp()
    return Message(person, text, when)


def chats_in_text(text: str, me: str | None = None) -> list[Chat]:
    """
    The chats of a plain text: an export of WhatsApp, divided by sessions(), or dialogues whose
    lines begin with a role (User, Assistant, Q, A ...) or, given `me`, with any name. Empty if it
    is neither.
    """
    lines = text.splitlines()
    if lines and STAMPED.match(lines[0]):
        return sessions(whatsapp(lines)) if _is_export(lines) else []
    chats = [chat for chat in _spoken(lines, me) if len(chat) > 1]
    roles = {role_of(m.person, me) for chat in chats for m in chat}
    return chats if {"user", "assistant"} <= roles else []


def _is_export(lines: Sequence[str]) -> bool:
    """
    Whether lines, the first of which begins with a time, are an export of WhatsApp. Diaries and
    logs have times as well, but seldom a name and a colon after them.
    """
    early = [line for line in lines[:FIRST_LINES] if STAMPED.match(line)]
    messages = [match for line in lines if (match := STAMPED.match(line))]
    spoken = [match for match in messages if SPOKEN.match(match[8])]
    return len(early) >= min(FEWEST_MESSAGES, len(lines)) and 2 * len(spoken) > len(messages)


def _spoken(lines: Sequence[str], me: str | None) -> list[Chat]:
    """The dialogues in lines that begin with a speaker; none if the first line does not."""
    chats: list[list[tuple[str, list[str]]]] = []  # of messages as a person and lines
    begins, blank = True, 0  # whether the next message begins a dialogue; empty lines in a row
    for line in lines:
        spoken, is_break = SPOKEN.match(line), BREAK.match(line)
        begins = begins or is_break is not None or blank > 1
        blank = 0 if line.strip() else blank + 1
        if is_break:
            continue
        if spoken and (me or role_of(spoken[1])):
            if begins:
                chats.append([])
            chats[-1].append((spoken[1].strip(), [spoken[2]]))
            begins = False
        elif chats:
            chats[-1][-1][1].append(line)
        elif line.strip():
            return []
    return [[Message(person, "\n".join(said).strip()) for person, said in chat] for chat in chats]


def role_of(person: str, me: str | None = None) -> str | None:
    """
    The role of a speaker: given `me`, "assistant" for that person and "user" for all others; else
    the role that the name stands for, or None.
    """
    name = person.strip().lower()
    if me is not None:
        return "assistant" if name == me.strip().lower() else "user"
    return SHORT_NAMES.get(name) or ROLE_OF.get(name)


def sessions(chat: Chat) -> list[Chat]:
    """A chat, divided where nobody wrote for SILENCE seconds."""
    divided: list[Chat] = []
    last: float | None = None
    for message in chat:
        pause = 0.0 if last is None or message.time is None else abs(message.time - last)
        if not divided or pause > SILENCE:
            divided.append([])
        divided[-1].append(message)
        last = message.time
    return divided


def as_text(chat: Chat) -> str:
    """A chat as text, a message per line."""
    return "\n".join(f"{m.person}: {m.text}" for m in chat)


def as_rows(chats: Sequence[Chat], me: str | None, place: str) -> Iterator[Row]:
    """
    Chats as conversations {"messages": [...]}, without the user's messages at the end, which have
    no reply. Given `me`, a chat is divided after LONG characters where `me` has answered and
    somebody else writes. `place` names the chats in an error. Raises NobodyIsAssistant if nobody in
    them is the assistant.
    """
    people = sorted({message.person for chat in chats for message in chat})
    roles = {person: role_of(person, me) for person in people}
    if "assistant" not in roles.values():
        names = ", ".join([*people[:8], "..."] if len(people) > 8 else people)
        who = f"{me} is not among them; name one of them" if me else "say who is the assistant"
        raise NobodyIsAssistant(f'{place} is a chat of {names}: {who}, as in --me "{people[0]}"')
    longest = LONG if me else math.inf
    users_need_names = me is not None and [*roles.values()].count("user") > 1
    for chat in chats:
        messages: list[dict[str, str]] = []
        answered = size = 0  # messages up to the last reply, and characters
        for person, text, _ in chat:
            role = roles[person] or "user"
            if size > longest and role == "user" and answered == len(messages):
                yield {"messages": messages}
                messages, answered, size = [], 0, 0
            size += len(text)
            if users_need_names and role == "user":
                text = f"{person}: {text}"
            messages.append({"role": role, "content": text})
            if role == "assistant":
                answered = len(messages)
        if answered:
            yield {"messages": messages[:answered]}


def tree_conversations(tree: Any) -> Iterator[Row]:
    """
    Every path of an OpenAssistant tree, {"role", "text", "replies": [...]}, that ends with the
    assistant. A reply that is trained on in one path has weight 0 in the later ones. Raises
    UserError if a message has no text.
    """
    stack: list[tuple[Any, list[Row]]] = [(tree, [])]
    while stack:
        node, before = stack.pop()
        if not isinstance(node, dict) or not isinstance(node.get("text"), str):
            raise UserError("a message of the tree has no text")
        path = [*before, {"role": node.get("role"), "content": node["text"]}]
        replies = node.get("replies") or []
        stack += [(reply, path) for reply in reversed(replies)]
        goes_on = any(isinstance(reply, dict) and reply.get("replies") for reply in replies)
        if _is_assistant(node) and not goes_on:
            yield {"messages": [dict(message) for message in path]}
            for message in filter(_is_assistant, path):
                message["weight"] = 0  # in the later paths, which share it


def _is_assistant(message: Row) -> bool:
    return ROLE_OF.get(str(message.get("role")).lower()) == "assistant"


def trees(rows: Iterable[Row]) -> list[Row]:
    """The trees that messages with a "message_id" and a "parent_id" make up."""
    messages = {row["message_id"]: {**row, "replies": []} for row in rows}
    roots = []
    for message in messages.values():
        parent = messages.get(message.get("parent_id"))
        siblings = parent["replies"] if parent else roots
        siblings.append(message)
    return roots
