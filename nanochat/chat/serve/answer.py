"""
What a client sees of one row: the visible text, cut at stop strings; the calculator's parts; and
log probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.chat.generate import Token
from nanochat.chat.reply import Reply, add_part
from nanochat.data.rendering import visible_content
from nanochat.data.tokenizer import Tokenizer


@dataclass
class Delta:
    """
    What new tokens add to an answer: pieces of the message's parts, of which those of type "text"
    are visible; where in the visible text each token begins; and why the row ended ("" while it
    continues).
    """

    parts: list[dict[str, str]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str = ""

    @property
    def text(self) -> str:
        return visible_content(self.parts)


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max(
        (
            n
            for stop in stops
            for n in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:n])
        ),
        default=0,
    )


class Answer:
    """
    One row's answer. `stopped` becomes true when the visible text has a stop string: no more tokens
    are needed then. A `plain` answer (a completion) has no parts.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), plain: bool = False):
        self.reply, self.stops, self.stopped = Reply(tokenizer, plain), stops, False
        self._pending = ""  # visible text that may be the beginning of a stop string
        self._length = 0  # of the visible text, pending or not

    def push(self, tokens: Sequence[Token]) -> Delta:
        """Add the row's next tokens; returns what they change."""
        delta = Delta()
        for token in tokens:
            if self.stopped:
                break
            delta.tokens.append(token)
            delta.offsets.append(self._length)
            kind, text = self.reply.push(token) or ("text", "")
            if kind == "text":
                self._length += len(text)
                self._take_text(text, delta)
            else:
                self._release(delta)
                add_part(delta.parts, kind, text)
            if token.finish and not self.stopped:
                self._release(delta)
                delta.finish = "length" if token.finish == "context" else token.finish
        return delta

    def _take_text(self, text: str, delta: Delta) -> None:
        text = self._pending + text
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._pending = True, ""
            add_part(delta.parts, "text", text[: min(places)])
            delta.finish = "stop"
            return
        shown = len(text) - held_back(text, self.stops)
        add_part(delta.parts, "text", text[:shown])
        self._pending = text[shown:]

    def _release(self, delta: Delta) -> None:
        """Hand out the pending text: no stop string can begin in it any more."""
        add_part(delta.parts, "text", self._pending)
        self._pending = ""


def spelled(tokenizer: Tokenizer, id: int) -> tuple[str, list[int]]:
    """A token's text (U+FFFD for part of a character) and its bytes."""
    data = tokenizer.decode_bytes([id])
    return data.decode("utf-8", errors="replace"), list(data)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """The logprobs of a chat choice. A token that the calculator forced has logprob null."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        text, data = spelled(tokenizer, id)
        return {"token": text, "logprob": logprob, "bytes": data}

    content = [
        {**entry(t.id, t.logprob), "top_logprobs": [entry(id, value) for id, value in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def _named(tokenizer: Tokenizer, id: int) -> str:
    """A token's text or, as in OpenAI's API, its bytes if it is part of a character."""
    text, data = spelled(tokenizer, id)
    return text if text.encode() == bytes(data) else f"bytes:{repr(bytes(data))[2:-1]}"


def completion_logprobs(tokenizer: Tokenizer, delta: Delta) -> dict[str, Any]:
    """The logprobs of a completion's choice."""
    tops = []
    for t in delta.tokens:
        top = {_named(tokenizer, id): value for id, value in t.top}
        if t.logprob is not None:  # as in OpenAI's API, the token that was drawn is among them
            top[_named(tokenizer, t.id)] = t.logprob
        tops.append(top)
    return {
        "tokens": [_named(tokenizer, t.id) for t in delta.tokens],
        "token_logprobs": [t.logprob for t in delta.tokens],
        "top_logprobs": tops,
        "text_offset": delta.offsets,
    }
