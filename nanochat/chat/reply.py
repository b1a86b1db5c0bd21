"""
Text from generated tokens, piece by piece: the reply to a conversation and the continuation of a
text. Needs no torch.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from nanochat.data.rendering import PART_TOKENS, checked_messages, conversation_pieces
from nanochat.data.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from nanochat.chat.generate import Engine, Token

# The kind of the part that follows a special token
KIND_AFTER: dict[str | None, str] = {start: kind for kind, (start, _) in PART_TOKENS.items()}
KIND_AFTER |= {end: "text" for _, end in PART_TOKENS.values()}


class Reply:
    """
    The assistant's reply, assembled from the tokens of one row. Pieces are (kind, text) with the
    kinds of a message's parts: "text" as it comes and never with half a character, "python" and
    "python_output" whole. `content` is the message's content so far, `tokens` how many were
    generated, `finish` why the row ended ("" until it has).
    """

    def __init__(self, tokenizer: Tokenizer):
        self.parts: list[dict[str, str]] = []
        self.finish, self.tokens = "", 0
        self._names = {id: name for name, id in tokenizer.specials.items()}
        self._decoder = StreamDecoder(tokenizer)
        self._kind, self._text = "text", ""  # of the part under way; text not yet handed out

    @property
    def content(self) -> str | list[dict[str, str]]:
        if all(part["type"] == "text" for part in self.parts):
            return "".join(part["text"] for part in self.parts)
        return self.parts

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
        ends_part = name in KIND_AFTER or bool(token.finish)
        if name is None:
            self._text += self._decoder.push(token.id)
        if ends_part:
            self._text += self._decoder.flush()
        piece = None
        if self._text and (ends_part or self._kind == "text"):
            piece = kind, text = self._kind, self._text
            self._text = ""
            if self.parts and self.parts[-1]["type"] == kind == "text":
                self.parts[-1]["text"] += text
            else:
                self.parts.append({"type": kind, "text": text})
        self._kind = KIND_AFTER.get(name, self._kind)
        return piece


class Continuation:
    """
    What a model writes after a text: whole characters, without special tokens. `tokens` counts what
    was generated, `finish` is why the row ended ("" until it has).
    """

    def __init__(self, tokenizer: Tokenizer):
        self.finish, self.tokens = "", 0
        self._special = set(tokenizer.specials.values())
        self._decoder = StreamDecoder(tokenizer)

    def stream(self, steps: Iterable[list["Token"]]) -> Iterator[str]:
        """The pieces of the text, from the steps of Engine.generate."""
        for step in steps:
            for token in step:
                self.tokens += 1
                self.finish = token.finish
                if token.id not in self._special:
                    yield self._decoder.push(token.id)
        yield self._decoder.flush()


def continue_text(engine: "Engine", text: str, **sampling: Any) -> Iterator[str]:
    """The pieces of the text that a model writes after `text`; `sampling`: see Engine.generate."""
    steps = engine.generate(engine.tokenizer.encode(text, bos=True), **sampling)
    return Continuation(engine.tokenizer).stream(steps)


def answer_room(context: int, max_tokens: int) -> int:
    """
    How many tokens of a context a prompt must leave for the answer: `max_tokens`, but at least a
    quarter and at most half of the context.
    """
    return max(context // 4, min(max_tokens, context // 2))


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
    pairs = enumerate(zip(prompt, empty, strict=False))
    before = next((i for i, (a, b) in pairs if a != b), len(prompt))
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
    messages = conversation["messages"]
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) - first <= 2:
        return conversation, 0
    checked_messages(conversation)
    sizes = [_size(tokenizer, message) for message in messages]
    start, rest = first, sum(sizes[first:])
    while len(messages) - start > 2:
        rest -= sizes[start]  # the tokens of what follows the question `start`
        head = {"messages": [*messages[:first], messages[start]]}
        if rest <= limit and rest + len(tokenizer.render_prompt(head)) <= limit:
            break
        rest -= sizes[start + 1]
        start += 2
    kept = [*messages[:first], *messages[start:]]
    return {**conversation, "messages": kept}, (start - first) // 2


def _size(tokenizer: Tokenizer, message: dict) -> int:
    """How many tokens a message takes in a conversation."""
    _, *pieces = conversation_pieces([message])  # without <|bos|>
    return sum(1 if piece.special else len(tokenizer.encode(piece.text)) for piece in pieces)
