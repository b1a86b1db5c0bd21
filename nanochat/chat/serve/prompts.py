"""From a request to the tokens of its prompts, which are shortened if the request allows that."""

from typing import Any

from nanochat.base.common import UserError
from nanochat.chat.generate import clip
from nanochat.chat.reply import fit_conversation
from nanochat.chat.serve.models import Served
from nanochat.chat.serve.requests import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Fields,
    conversation,
)
from nanochat.data.tokenizer import Tokenizer


def chat_prompt(served: Served, request: ChatRequest) -> tuple[list[int], int]:
    """The prompt's tokens and how many exchanges were left out to make room."""
    room = served.prompt_room if request.truncation == "auto" else None
    prompt, dropped = rendered(served.tokenizer, request.messages, room)
    _check_length(prompt, served, "messages")
    return prompt, dropped


def rendered(
    tokenizer: Tokenizer, messages: list[Fields], room: int | None = None
) -> tuple[list[int], int]:
    """
    The tokens of a conversation, and how many of its oldest exchanges were left out so that they
    fit into `room`.
    """
    talk, dropped = conversation(messages), 0
    try:
        if room is not None:
            talk, dropped = fit_conversation(tokenizer, talk, room)
        return tokenizer.render_prompt(talk), dropped
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None


def completion_prompts(served: Served, request: CompletionRequest) -> tuple[list[list[int]], int]:
    """
    The prompts' tokens, each with <|bos|> before it, and how many first tokens were left out to
    make room.
    """
    given: Any = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 1 <= len(given) <= 8:
        raise ApiError(400, f"prompt takes 1 to 8 prompts (got {len(given)})", "prompt")
    tokenizer, room = served.tokenizer, served.prompt_room
    prompts, dropped = [], 0
    for one in given:
        ids = tokenizer.encode(one) if isinstance(one, str) else list(one)
        if any(not 0 <= id < tokenizer.vocab_size for id in ids):
            raise ApiError(400, f"token ids are 0 to {tokenizer.vocab_size - 1}", "prompt")
        if ids[:1] != [tokenizer.bos]:
            ids = [tokenizer.bos, *ids]
        if request.truncation == "auto" and len(ids) > room:
            dropped += len(ids) - room
            ids = clip(ids, room)
        _check_length(ids, served, "prompt")
        prompts.append(ids)
    return prompts, dropped


def _check_length(prompt: list[int], served: Served, field: str) -> None:
    if len(prompt) >= served.context:
        raise ApiError(
            400,
            f"the prompt has {len(prompt):,} tokens and the context {served.context:,}: shorten it",
            field,
            "context_length_exceeded",
        )
