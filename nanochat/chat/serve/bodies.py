"""
The bodies of answers in the forms of OpenAI's API: a whole one, or events as tokens come. A shape
has the fields that chat and completions do not share.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from nanochat.chat.reply import add_part
from nanochat.chat.serve.answer import Delta, chat_logprobs, completion_logprobs
from nanochat.chat.serve.call import Call
from nanochat.chat.serve.requests import ApiError, Fields


@dataclass
class ChatShape:
    """chat.completion and its chunks."""

    call: Call
    id_prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Fields]:
        """The first chunk of every choice has the role."""
        return [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            for i in range(len(self.call.answers))
        ]

    def _logprobs(self, delta: Delta) -> Fields | None:
        if self.call.request.alternatives is None:
            return None
        return chat_logprobs(self.call.served.tokenizer, delta.tokens)

    def chunk(self, i: int, delta: Delta) -> Fields:
        content = {"content": delta.text} if delta.text else {}
        choice = {
            "index": i,
            "delta": {**content, **_tool_parts(delta)},
            "finish_reason": delta.finish or None,
        }
        if logprobs := self._logprobs(delta):
            choice["logprobs"] = logprobs
        return choice

    def whole(self, i: int, delta: Delta) -> Fields:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {
            "index": i,
            "message": {**message, **_tool_parts(delta)},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish,
        }


def _tool_parts(delta: Delta) -> Fields:
    """A field with all parts of a message, if some belong to the calculator."""
    tools = any(part["type"] != "text" for part in delta.parts)
    return {"nanochat": {"parts": delta.parts}} if tools else {}


class CompletionShape:
    """text_completion, the same in chunks. With `echo`, answers begin with their prompts."""

    id_prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, call: Call, echo: bool):
        self.call, decode = call, call.served.tokenizer.decode
        texts = [decode(ids[1:]) if echo else "" for ids in call.prompts]
        samples = len(call.answers) // len(texts)
        self._echo = [text for text in texts for _ in range(samples)]

    def opening(self) -> list[Fields]:
        return [
            {"index": i, "text": text, "logprobs": None, "finish_reason": None}
            for i, text in enumerate(self._echo)
            if text
        ]

    def chunk(self, i: int, delta: Delta) -> Fields:
        logprobs = None
        if self.call.request.alternatives is not None:
            logprobs = completion_logprobs(self.call.served.tokenizer, delta)
        finish = delta.finish or None
        return {"index": i, "text": delta.text, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, i: int, delta: Delta) -> Fields:
        choice = self.chunk(i, delta)
        return {**choice, "text": self._echo[i] + choice["text"]}


Shape = ChatShape | CompletionShape


def _head(shape: Shape, name: str) -> Fields:
    """The fields that every chunk of an answer repeats."""
    served = shape.call.served
    return {
        "id": f"{shape.id_prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": served.id,
        "system_fingerprint": served.fingerprint,
        "object": name,
    }


def _usage(call: Call) -> dict[str, int]:
    prompt = sum(map(len, call.prompts))
    completion = sum(answer.reply.tokens for answer in call.answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _extension(call: Call) -> Fields:
    """What the page shows beside the answer."""
    seconds = max(1e-6, time.monotonic() - call.began)
    speed = sum(answer.reply.tokens for answer in call.answers) / seconds
    return {"seed": call.seed, "dropped": call.dropped, "tokens_per_second": round(speed, 1)}


async def whole(shape: Shape) -> Fields:
    """The body of an answer that is not streamed."""
    call = shape.call
    sums = [Delta() for _ in call.answers]
    async for deltas in call.deltas():
        for i, delta in deltas.items():
            for part in delta.parts:
                add_part(sums[i].parts, part["type"], part["text"])
            sums[i].tokens += delta.tokens
            sums[i].offsets += delta.offsets
            sums[i].finish = delta.finish
    return {
        **_head(shape, shape.name),
        "choices": [shape.whole(i, delta) for i, delta in enumerate(sums)],
        "usage": _usage(call),
        "nanochat": _extension(call),
    }


async def events(shape: Shape) -> AsyncIterator[str]:
    """
    The events of a streamed answer. An error in the middle is an event, and then the stream ends
    without [DONE]. JSON is ASCII here: some clients split lines at any line break of Unicode.
    """
    call, head = shape.call, _head(shape, shape.chunk_name)
    # Each piece that is handed on costs a turn of the event loop: the first one waits for the first
    # token, and the last one has the usage and [DONE].
    piece = "".join(
        _event({**head, "choices": [choice], "nanochat": _extension(call)})
        for choice in shape.opening()
    )
    try:
        async for deltas in call.deltas():
            for i, delta in deltas.items():
                piece += _event({**head, "choices": [shape.chunk(i, delta)]})
            if not call.finished:
                yield piece if deltas else ": waiting\n\n"
                piece = "" if deltas else piece
    except ApiError as error:
        yield _event(error.body)
        return
    if call.request.wants_usage:
        last = {"choices": [], "usage": _usage(call), "nanochat": _extension(call)}
        piece += _event({**head, **last})
    yield piece + "data: [DONE]\n\n"


def _event(data: Fields) -> str:
    return f"data: {json.dumps(data)}\n\n"
