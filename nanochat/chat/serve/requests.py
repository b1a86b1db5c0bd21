"""
The bodies of requests in the form of OpenAI's API, and errors in the form that its clients expect.

A known field that this server does not support is refused with status 400 and its name in `param`;
it is never ignored silently. Such a field with a value that changes nothing (penalties of 0, no
tools, text as the response format) is accepted, and so are unknown fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanochat.chat.sampling import Sampling
from nanochat.data.rendering import PART_TOKENS, visible_content

TEMPERATURE, TOP_K = 0.6, 50  # where a request says nothing, as in the terminal
Fields = dict[str, Any]  # of an object in JSON


@dataclass(eq=False)
class ApiError(Exception):
    """
    An error as the answer to a request: the HTTP status, the message, the name of the wrong field
    (`param`), a `code` for programs, and additional headers.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> Fields:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        other = "invalid_request_error" if self.status < 500 else "server_error"
        kind = kinds.get(self.status, other)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class ModelRequest(BaseModel):
    """A request to a model, by default the one that was loaded at the start."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str = ""


T = TypeVar("T", bound=ModelRequest)


class StreamOptions(BaseModel):
    include_usage: bool = False


class _SharedFields(ModelRequest):
    """The fields that chat and completions share. None means "not given"."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    user: str | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_SharedFields):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Fields], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to report for each place; None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_SharedFields):
    """POST /v1/completions"""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int:
        return self.max_tokens or 16  # as in OpenAI's API

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


GenerationRequest = ChatRequest | CompletionRequest


def sampling_of(request: GenerationRequest) -> Sampling:
    return Sampling(
        TEMPERATURE if request.temperature is None else request.temperature,
        TOP_K if request.top_k is None else request.top_k,
        request.top_p,
        request.alternatives,
    )


class TokenizeRequest(ModelRequest):
    """POST /tokenize: a text, or messages as the model sees them."""

    prompt: str | None = None
    messages: list[Fields] | None = None


# Fields that this server refuses unless their value changes nothing, and why
REFUSED = {
    "tools": "this model cannot call tools; its calculator needs none: leave tools out",
    "tool_choice": "this model cannot call tools: leave tool_choice out",
    "functions": "this model cannot call functions: leave functions out",
    "function_call": "this model cannot call functions: leave function_call out",
    "web_search_options": "this model cannot search the web: leave web_search_options out",
    "frequency_penalty": "penalties are not supported: leave frequency_penalty out or set it to 0",
    "presence_penalty": "penalties are not supported: leave presence_penalty out or set it to 0",
    "repetition_penalty": "penalties are not supported: leave repetition_penalty out or set it to "
    "1",
    "logit_bias": "logit_bias is not supported: leave it out",
    "audio": "this model has no audio: leave audio out",
    "modalities": "only text is supported: leave modalities out",
    "suffix": "text cannot be inserted before a suffix: leave suffix out",
}
NEUTRAL = None, 0, "", [], {}, "none", "auto"  # values that change nothing in any field
ALSO_NEUTRAL = {"repetition_penalty": 1, "modalities": ["text"]}


def _unsupported(param: str, why: str) -> ApiError:
    return ApiError(400, why, param, "unsupported_parameter")


def _refuse_unsupported(request: GenerationRequest) -> None:
    """Raise ApiError 400 for a field or a value that this server does not support."""
    extra = request.model_extra or {}
    for name, why in REFUSED.items():
        if extra.get(name) not in (*NEUTRAL, ALSO_NEUTRAL.get(name)):
            raise _unsupported(name, why)
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        why = "log probabilities of an echoed prompt are not supported: leave echo or logprobs out"
        raise _unsupported("logprobs", why)
    response_format = extra.get("response_format")
    kind = response_format.get("type") if isinstance(response_format, dict) else response_format
    if kind not in (None, "text"):
        why = "leave it out and ask for the format in words"
        raise _unsupported("response_format", f"response_format {kind!r} is not supported: {why}")
    best_of = extra.get("best_of")
    if isinstance(best_of, int) and best_of > (request.n or 1):
        raise _unsupported("best_of", "best_of is not supported: ask for n answers")
    if len(request.stops) > 4 or not all(request.stops):
        raise ApiError(
            400, f"stop takes at most 4 strings that are not empty (got {request.stops!r})", "stop"
        )


def parse(kind: type[T], body: bytes) -> T:
    """The request in a body. Raises ApiError 400, which names the field that is wrong."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as e:
        problem = e.errors()[0]
        place = [str(part) for part in problem["loc"]]
        message = f"{'.'.join(place) or 'the body'}: {problem['msg']}"
        raise ApiError(400, message, place[0] if place else None) from None
    if isinstance(request, GenerationRequest):
        _refuse_unsupported(request)
    return request


def _content(message: Mapping[str, Any], i: int) -> str | list[dict[str, str]]:
    """
    A message's content: text, or the parts of an assistant's answer; parts that are all text are
    joined. Raises ApiError 400 for anything else.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    place = f"messages[{i}].content"
    if not isinstance(content, list):
        raise ApiError(400, f"{place} must be text or a list of parts", "messages")
    kinds = ("text", *PART_TOKENS) if message.get("role") == "assistant" else ("text",)
    for part in content:
        fields = part if isinstance(part, dict) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind not in kinds or not isinstance(text, str):
            raise ApiError(
                400,
                f"{place}: a part of type {kind!r} is not supported; use type text with a text",
                "messages",
                "unsupported_parameter" if isinstance(kind, str) else None,
            )
    only_text = all(part["type"] == "text" for part in content)
    return visible_content(content) if only_text else content


def conversation(messages: list[Fields]) -> dict[str, list[Fields]]:
    """
    The messages as a conversation for the tokenizer; the role developer becomes system. Raises
    ApiError 400 for tools and other media.
    """
    out = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if message.get("tool_calls") or role in ("tool", "function"):
            why = f"messages[{i}]: tool calls are not supported: leave this message out"
            raise _unsupported("messages", why)
        role = "system" if role == "developer" else role
        out.append({"role": role, "content": _content(message, i)})
    return {"messages": out}
