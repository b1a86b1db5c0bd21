"""
Text from generated tokens, piece by piece: the reply to a conversation and the continuation of a
text. Needs no torch.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from nanochat.data.rendering import PART_TOKENS, checked_messages, visible_content
from nanochat.data.tokenizer import StreamDecoder, Tokenizer, in_common

if TYPE_CHECKING:
    from nanochat.chat.generate import Token

# The kind of the part that follows a special token
KIND_AFTER: dict[str | None, str] = {start: kind for kind, (start, _) in PART_TOKENS.items()}
KIND_AFTER |= {end: "text" for _, end in PART_TOKENS.values()}


class Reply:
    """
    What the model writes, assembled from the tokens of one row. Pieces are (kind, text) with the
    kinds of a message's parts: "text" as it comes and never with half a character, "python" and
    "python_output" whole. A `plain` one, the continuation of a text, has no parts: all is text.
    `content` is the message's content so far, `tokens` how many were generated, `finish` why the
    row ended ("" until it has).
    """

    def __init__(self, tokenizer: Tokenizer, plain: bool = False):
        self.parts: list[dict[str, str]] = []
        self.finish, self.tokens = "", 0
        self._kind_after = {} if plain else KIND_AFTER
        self._names = {id: name for name, id in tokenizer.specials.items()}
        self._decoder = StreamDecoder(tokenizer)
        self._kind, self._text = "text", ""  # of the part under way; text not yet handed out

    @property
    def content(self) -> str | list[dict[str, str]]:
        only_text = all(part["type"] == "text" for part in self.parts)
        return visible_content(self.parts) if only_text else self.parts

    def stream(self, steps: Iterable[list["Token"]]) -> Iterator[tuple[str, str]]:
        """The pieces of a reply, from the steps of Engine.generate."""
        for step in steps:
            for token in step:
                if piece := self.push(token):
                    yield piece

    def push(self, token: "Token") -> tuple[str, str] | None:
        """Add the row's next token; returns the piece that it completes, if any."""
        self.tokens += 1
        self.finish = token.finish
        name = self._names.get(token.id)
        ends_part = name in self._kind_after or bool(token.finish)
        if name is None:
            self._text += self._decoder.push(token.id)
        if ends_part:
            self._text += self._decoder.flush()
        piece = None
        if self._text and (ends_part or self._kind == "text"):
            piece = self._kind, self._text
            add_part(self.parts, *piece)
            self._text = ""
        self._kind = self._kind_after.get(name, self._kind)
        return piece


def add_part(parts: list[dict[str, str]], kind: str, text: str) -> None:
    """Add a piece to the parts of a message; text continues a part that is text."""
    if parts and parts[-1]["type"] == kind == "text":
        parts[-1]["text"] += text
    elif text:
        parts.append({"type": kind, "text": text})


def answer_room(context: int, max_tokens: int) -> int:
    """
    How many tokens of a context a prompt must leave for the answer: `max_tokens`, but at least a
    quarter and at most half of the context.
    """
    return max(context // 4, min(max_tokens, context // 2))


def fit_text(tokenizer: Tokenizer, text: str, limit: int) -> tuple[list[int], int]:
    """
    The tokens of a text, after <|bos|>, in at most `limit` tokens, and how many were cut: the first
    ones of the text.
    """
    bos, *tokens = tokenizer.encode(text, bos=True)
    kept = tokens[1 - limit :]
    return [bos, *kept], len(tokens) - len(kept)


def fit_prompt(tokenizer: Tokenizer, messages: list[dict], limit: int) -> tuple[list[int], int]:
    """
    The prompt of a conversation in at most `limit` tokens, and how many tokens were cut: the first
    ones of the last question. What comes before it is kept, unless that takes more than half of the
    limit.
    """
    prompt = tokenizer.render_prompt({"messages": messages})
    if len(prompt) <= limit:
        return prompt, 0
    empty = tokenizer.render_prompt({"messages": [*messages[:-1], {**messages[-1], "content": ""}]})
    before = in_common([prompt, empty])
    if before > limit // 2:
        before = 2  # <|bos|> and <|user_start|>
    cut = len(prompt) - limit
    return prompt[:before] + prompt[before + cut :], cut


def fit_conversation(tokenizer: Tokenizer, conversation: dict, limit: int) -> tuple[dict, int]:
    """
    The conversation without its oldest exchanges, and how many were dropped: as few as needed for a
    prompt of at most `limit` tokens. The system message and the last question are always kept.
    Raises UserError if the messages have the wrong shape.
    """
    checked_messages(conversation)
    messages = conversation["messages"]
    first = 1 if messages[0]["role"] == "system" else 0

    def without(dropped: int) -> dict[str, Any]:
        kept = [*messages[:first], *messages[first + 2 * dropped :]]
        return {**conversation, "messages": kept}

    def fits(dropped: int) -> bool:
        return len(tokenizer.render_prompt(without(dropped))) <= limit

    # By halving, because rendering once per exchange would take quadratic time
    most = (len(messages) - first - 1) // 2
    dropped = bisect_left(range(most), True, key=fits)
    return without(dropped), dropped
