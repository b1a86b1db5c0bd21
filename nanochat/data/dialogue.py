"""
Conversations in files that hold no rows of them: exports of WhatsApp (text), Telegram and Discord
(JSON), plain text in which lines begin with the speaker ("User: ...", "Assistant: ..."), and trees
of OpenAssistant. A chat that a person of choice, `me`, takes part in becomes conversations in which
that person is the assistant; as text, it keeps the names and loses the times.

A chat is divided where nobody has written for SILENCE seconds, so that each has one topic, and its
conversations with `me` after LONG characters, so that they fit into the context of a small model.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from nanochat.base.common import UserError
from nanochat.data.shapes import ROLE_OF

SILENCE = 6 * 3600
# Characters after which a person's next question begins a new conversation: a context of 256 tokens
# holds about so many, and finetuning loses what is beyond
LONG = 500
ENOUGH = 3  # messages that a chat must have within its first LOOK lines to be seen as one
LOOK = 40
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
    """What a person wrote, and when, in seconds since an epoch of its own."""

    person: str
    text: str
    time: float | None = None


Chat = list[Message]


def whatsapp(lines: Iterable[str]) -> Iterator[Message]:
    """The messages of a chat that WhatsApp exported; what the program itself says is left out."""
    open_message: Message | None = None
    for line in lines:
        if not (stamped := STAMPED.match(line)):
            if open_message:  # a message of several lines
                text = f"{open_message.text}\n{line.rstrip()}"
                open_message = open_message._replace(text=text)
            continue
        if open_message:
            yield open_message
        spoken = SPOKEN.match(stamped[8])
        omitted = spoken is None or OMITTED.fullmatch(spoken[2].strip())
        open_message = None
        if spoken and not omitted:
            open_message = Message(
                spoken[1].strip("\u200e~ "), spoken[2].rstrip(), _seconds(stamped)
            )
    if open_message:
        yield open_message


def _seconds(stamped: re.Match[str]) -> float | None:
    """
    The time of a message. Day and month may be the other way round, which moves days and leaves
    the silences within a day as they are.
    """
    first, second, third, hour, minute = (int(stamped[i]) for i in range(1, 6))
    year, month, day = (first, second, third) if first > 31 else (third, second, first)
    if month > 12:
        month, day = day, month
    if stamped[7]:
        hour = hour % 12 + 12 * (stamped[7][0] in "Pp")
    try:
        return datetime(year % 100 + 2000, month, day, hour, minute).timestamp()
    except ValueError:
        return None


def exported(value: Any) -> list[Chat] | None:
    """The chats of an export of Telegram or Discord in JSON; None if `value` is none."""
    if not isinstance(value, dict):
        return None
    chats = value.get("chats")
    listed = chats.get("list") if isinstance(chats, dict) else None
    if isinstance(listed, list):
        return [chat for one in listed for chat in exported(one) or []]
    messages = value.get("messages")
    if not isinstance(messages, list) or not ({"type", "guild", "channel"} & value.keys()):
        return None
    chat = [m for m in map(_exported_message, messages) if m]
    return [chat] if chat else None if messages else []


def _exported_message(message: Any) -> Message | None:
    if not isinstance(message, dict):
        return None
    author = message.get("author")  # Discord; Telegram has "from"
    if isinstance(author, dict):
        person = author.get("nickname") or author.get("name")
    else:
        person = message.get("from")
    text = message.get("content", message.get("text"))
    if isinstance(text, list):  # Telegram's links and mentions
        parts = (part.get("text", "") if isinstance(part, dict) else part for part in text)
        text = "".join(map(str, parts))
    if not isinstance(person, str) or not isinstance(text, str) or not text.strip():
        return None
    try:
        when = datetime.fromisoformat(str(message.get("date") or message.get("timestamp")))
        return Message(person, text, when.timestamp())
    except (ValueError, OverflowError, OSError):
        return Message(person, text)


def chats_in_text(text: str, me: str | None = None) -> list[Chat]:
    """
    The chats of a plain text: an export of WhatsApp, or dialogues whose lines begin with a role
    (User, Assistant, Q, A ...) or, given `me`, with any name. Empty if it is neither.
    """
    lines = text.splitlines()
    if STAMPED.match(next(iter(lines), "")):
        stamped = [found for line in lines if (found := STAMPED.match(line))]
        enough = sum(map(bool, map(STAMPED.match, lines[:LOOK]))) >= min(ENOUGH, len(lines))
        # Diaries and logs have times as well, but seldom a name and a colon behind them
        spoken = sum(bool(SPOKEN.match(found[8])) for found in stamped)
        return sessions(list(whatsapp(lines))) if enough and 2 * spoken > len(stamped) else []
    chats = [
        [m._replace(text=m.text.strip()) for m in chat]
        for chat in _spoken(lines, me)
        if len(chat) > 1
    ]
    roles = {role_of(m.person, me) for chat in chats for m in chat}
    return chats if {"user", "assistant"} <= roles else []


def _spoken(lines: Sequence[str], me: str | None) -> list[Chat]:
    """The dialogues of lines that begin with a speaker; none if the first line does not."""
    chats: list[Chat] = []
    begins, blank = True, 0
    for line in lines:
        spoken = SPOKEN.match(line)
        begins = begins or bool(BREAK.match(line)) or blank > 1
        blank = 0 if line.strip() else blank + 1
        if spoken and (me or role_of(spoken[1])):
            chats += [[]] * begins
            chats[-1].append(Message(spoken[1].strip(), spoken[2]))
            begins = False
        elif chats and not BREAK.match(line):
            last = chats[-1].pop()
            chats[-1].append(last._replace(text=f"{last.text}\n{line}"))
        elif line.strip() and not BREAK.match(line):
            return []
    return chats


def role_of(person: str, me: str | None = None) -> str | None:
    """The role of a speaker: given `me`, that person is the assistant, and the others users."""
    name = person.strip().lower()
    if me is not None:
        return "assistant" if name == me.strip().lower() else "user"
    return SHORT_NAMES.get(name) or ROLE_OF.get(name)


def sessions(chat: Chat) -> list[Chat]:
    """A chat, divided where nobody wrote for SILENCE seconds."""
    divided: list[Chat] = []
    last: float | None = None
    for message in chat:
        silent = None not in (last, message.time) and abs((message.time or 0) - (last or 0))
        if not divided or (silent and silent > SILENCE):
            divided.append([])
        divided[-1].append(message)
        last = message.time
    return divided


def as_text(chat: Chat) -> str:
    """A chat as text, a message per line."""
    return "\n".join(f"{m.person}: {m.text}" for m in chat)


def as_rows(chats: Sequence[Chat], me: str | None, place: str) -> Iterator[dict[str, Any]]:
    """
    Chats as conversations of {"messages": [...]}. Those that end with a user lose that end, because
    it has no reply. Raises UserError if nobody in them is the assistant.
    """
    people = sorted({m.person for chat in chats for m in chat})
    if not any(role_of(person, me) == "assistant" for person in people):
        named = ", ".join(people[:8]) + ", ..." * (len(people) > 8)
        who = f"{me} is not among them; name one of them" if me else "say who is the assistant"
        raise NobodyIsAssistant(f'{place} is a chat of {named}: {who}, as in --me "{people[0]}"')
    chats = [part for chat in chats for part in _short(chat, me)] if me else chats
    several = sum(role_of(person, me) != "assistant" for person in people) > 1 and me is not None
    for chat in chats:
        messages = []
        for message in chat:
            role = role_of(message.person, me) or "user"
            named = several and role == "user"
            text = f"{message.person}: {message.text}" if named else message.text
            messages.append({"role": role, "content": text})
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if messages:
            yield {"messages": messages}


def _short(chat: Chat, me: str) -> Iterator[Chat]:
    """A chat, divided after LONG characters where `me` has answered and another one writes."""
    part: Chat = []
    size = 0
    for message in chat:
        answered = part and role_of(part[-1].person, me) == "assistant"
        if size > LONG and answered and role_of(message.person, me) == "user":
            yield part
            part, size = [], 0
        part.append(message)
        size += len(message.text)
    yield part


def tree_conversations(tree: Any) -> Iterator[dict[str, Any]]:
    """
    Every path of an OpenAssistant tree, {"prompt": {"role", "text", "replies": [...]}}, that ends
    with the assistant. What an earlier path teaches is context in the later ones.
    """
    stack: list[tuple[Any, list[dict[str, Any]]]] = [(tree, [])]
    taught: set[int] = set()
    while stack:
        node, before = stack.pop()
        if not isinstance(node, dict) or not isinstance(node.get("text"), str):
            raise UserError("a message of the tree has no text")
        path = [*before, {**node, "replies": None}]
        replies = node.get("replies") or []
        stack += [(reply, path) for reply in reversed(replies)]
        if ROLE_OF.get(str(node.get("role")).lower()) == "assistant" and not any(
            isinstance(r, dict) and r.get("replies") for r in replies
        ):
            messages = []
            for message in path:
                plain = {"role": message["role"], "content": message["text"]}
                key = hash((message.get("message_id"), message["text"]))
                messages.append({**plain, "weight": 0} if key in taught else plain)
                if ROLE_OF.get(str(message["role"]).lower()) == "assistant":
                    taught.add(key)
            yield {"messages": messages}


def trees(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trees that flat messages with "message_id" and "parent_id" make up."""
    messages = {row["message_id"]: {**row, "replies": []} for row in rows}
    roots = []
    for message in messages.values():
        parent = messages.get(message.get("parent_id"))
        (parent["replies"] if parent else roots).append(message)
    return roots
